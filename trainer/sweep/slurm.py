"""launcher=slurm: a job array with one task for each cohort, submitted through submitit; the launch returns at once.

A task is one process per node that drives all its GPUs. It carries out its own runs as any launch does: its leases keep others away, and
when Slurm says that its time is up or its node is wanted (USR2, TERM), it saves everything and puts itself back in the queue.
"""
from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax

from trainer import compiled, distributed, lease
from trainer.cohort import use_host_devices
from trainer.config import TrainConfig, load_plugins
from trainer.config.launcher import SlurmSettings
from trainer.stopping import SIGNALS, Stop
from trainer.sweep import planfile
from trainer.sweep.execute import Outcome, execute
from trainer.sweep.options import LaunchOptions
from trainer.sweep.plan import Plan, PlannedRun, make_plan
from trainer.sweep.show import report

# A task keeps its node no longer for runs that another launcher has: long enough for the lease of a dead node to go stale.
PATIENCE_S = lease.STALE_S + 30.0
# Python with the signals of SIGNALS held back: one that comes while a task still imports JAX would kill it.
HOLDING_BACK = f"import os,signal,sys;signal.pthread_sigmask(signal.SIG_BLOCK,{[int(number) for number in SIGNALS]});os.execv(sys.executable,[sys.executable,*sys.argv[1:]])"


@dataclass(frozen=True)
class Task:
    """What one task of the array does: frozen as it was submitted, whatever happens to configs/ in the meantime."""

    configs: tuple[TrainConfig, ...]
    run_ids: tuple[str, ...]
    options: LaunchOptions
    max_requeues: int

    def __call__(self) -> None:
        """Never returns: exit code 0 when its runs are done or it is back in the queue, 1 when some failed."""
        stop = Stop(self.options.max_wall)
        with stop.catching():  # in the place of submitit's handlers, which ignore TERM
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # now they come
            code = self._carry_out(stop)
        sys.exit(code)

    def _carry_out(self, stop: Stop) -> int:
        print(f"bitlaw: task {task_name()} on {socket.gethostname()}: runs {', '.join(self.run_ids)}", flush=True)
        options = self.configs[0].options
        distributed.join(None)  # the processes on other nodes, before anything else is asked of JAX
        load_plugins(options.plugins)
        compiled.keep(options)
        use_host_devices(options.host_devices or _cpus())
        plan = make_plan(list(self.configs), self.options.max_members, self.options.retry_failed)
        found = {run.run_id for run in plan.runs}
        if found != set(self.run_ids):
            raise RuntimeError(f"bitlaw or the data are others than when this task was submitted: its runs are now {', '.join(sorted(found))}; the same command again submits those")
        outcome = execute(plan, stop=stop, patience=PATIENCE_S)
        code = report(plan, outcome)
        left = sum(run.status is None for run in plan.runs)
        if left and not outcome.stopped:
            print(f"bitlaw: {left} runs are being trained by another launcher; this task ends, so that its node does not idle", flush=True)
        if stop.signal is not None and outcome.left:
            return requeue(self.max_requeues) if os.environ.get("SLURM_PROCID", "0") == "0" else 0
        return code


def task_name() -> str:
    """This task as Slurm's commands take it: 12_0 of an array, 12 alone. (A task's SLURM_JOB_ID may be the one of its whole array.)"""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def requeue(max_requeues: int) -> int:
    """Put this task back in the queue, unless Slurm has ended it already: cancelled by somebody, or queued again. The exit code."""
    state = _ask("squeue", "--noheader", "--format=%T", f"--jobs={task_name()}").strip()
    if state != "RUNNING":
        print(f"bitlaw: {task_name()} is {state or 'gone'} for Slurm and stays so", flush=True)
        return 1
    times = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if times >= max_requeues:
        print(f"bitlaw: {task_name()} was started again {times} times; launcher.max_requeues={max_requeues} ends it", flush=True)
        return 1
    print(f"bitlaw: back in the queue as {task_name()}", flush=True)
    done = subprocess.run(["scontrol", "requeue", task_name()], capture_output=True, text=True, check=False)
    if done.returncode > 0:  # below: Slurm, which ends the task now, ended this command with it
        print(f"bitlaw: not so: {' '.join(done.stderr.split())}; the same command as before submits what is left", flush=True)
        return 1
    return 0


def _cpus() -> int | None:
    """CPUs that Slurm gave this job on this node, where it does not bind processes to them; None where they are bound, or nobody tells."""
    given = os.environ.get("SLURM_CPUS_ON_NODE", "")
    return min(int(given), len(os.sched_getaffinity(0))) if given.isdecimal() and hasattr(os, "sched_getaffinity") else None


def _ask(*command: str) -> str:
    """What a Slurm command says; ValueError with its own words where it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        raise ValueError(f"{' '.join(command)}: {said}") from error


# --- on the machine that submits ------------------------------------------------------------------------------------


def launch(configs: list[TrainConfig], settings: SlurmSettings, options: LaunchOptions) -> int:
    """Submit what is to be trained and say where it is to be seen. The exit code."""
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise ValueError("launcher=slurm needs sbatch and srun, which are not here; accepted: on a machine of the cluster; dry_run=true shows the script anywhere")
    plan = plan_here(configs, options)
    with planfile.settling(plan.root):  # one launcher at a time: the second one sees what the first one queued
        run_ids, known = planfile.read(plan.root)
        queued = _queued(_logs(plan.root))
        groups = [group for group in _groups(plan, known) if not all(run.run_id in queued for run in group)]
        planfile.write(plan.root, list(dict.fromkeys([*run_ids, *(run.run_id for run in plan.runs)])), known)
        jobs = _submit(plan, groups, settings, options) if groups else []
    waiting = [run.run_id for cohort in plan.cohorts for run in cohort.runs if run.run_id in queued]
    if waiting:
        print(f"{len(waiting)} runs are queued or running already: {', '.join(sorted({queued[run_id] for run_id in waiting}))}")
    if not jobs:
        return 0 if waiting else report(plan, Outcome())
    names = jobs[0] if len(jobs) == 1 else f"{jobs[0]} to {jobs[-1]}"
    print(f"submitted {sum(map(len, groups))} runs in {len(jobs)} tasks: {names}; {plan.num_done} of {len(plan.runs)} runs were done before")
    print(f"logs: {_logs(plan.root)}/{jobs[0]}.log ...; {_logs(plan.root)}/{jobs[0].partition('_')[0]}.json says which task trains which run")
    print(f"watch: bitlaw status {plan.root}; squeue --me; the same command again submits what is left")
    if plan.failed:
        print(f"{len(plan.failed)} runs failed before; retry_failed=true tries them again", file=sys.stderr)
    return 0


def plan_here(configs: list[TrainConfig], options: LaunchOptions) -> Plan:
    """The plan, made without touching an accelerator of the machine that submits."""
    with contextlib.suppress(RuntimeError):  # JAX is already running: as it is
        jax.config.update("jax_platforms", "cpu")
    use_host_devices(configs[0].options.host_devices)
    return make_plan(configs, options.max_members, options.retry_failed)


def script(plan: Plan, settings: SlurmSettings) -> str:
    """What would be given to sbatch for everything that is left."""
    from submitit.slurm.slurm import _make_sbatch_string

    count = max(1, len(_groups(plan, planfile.read(plan.root)[1])))
    folder = _logs(plan.root) / ".submitit"
    return _make_sbatch_string(command=f"{_python(settings)} -u -m submitit.core._submit {shlex.quote(str(folder))}", folder=folder, map_count=count if count > 1 else None,
                               **_parameters(plan, settings, count))


def _submit(plan: Plan, groups: list[list[PlannedRun]], settings: SlurmSettings, options: LaunchOptions) -> list[str]:
    """Submit a task for each group: their names, such as 12_0."""
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    tasks = [Task(tuple(run.config for run in group), tuple(run.run_id for run in group), options, settings.max_requeues) for group in groups]
    try:
        with _no_job_of_our_own(), contextlib.redirect_stderr(io.StringIO()):  # submitit prints what the error says, too
            executor = submitit.SlurmExecutor(_logs(plan.root) / ".submitit", python=_python(settings))
            executor.update_parameters(**_parameters(plan, settings, len(groups)))
            jobs = [job.job_id for job in executor.submit_array(tasks)]
    except (FailedJobError, FailedSubmissionError) as error:
        raise ValueError(f"sbatch refused the job: {error}; dry_run=true shows its script") from error
    whose = {job: list(task.run_ids) for job, task in zip(jobs, tasks)}
    (_logs(plan.root) / f"{jobs[0].partition('_')[0]}.json").write_text(json.dumps(whose, indent=1))
    return jobs


def _python(settings: SlurmSettings) -> str:
    """The command that runs Python on a node; arguments follow."""
    return f"{settings.python or shlex.quote(sys.executable)} -c {shlex.quote(HOLDING_BACK)}"


def _parameters(plan: Plan, settings: SlurmSettings, count: int) -> dict:
    """What submitit makes the script of."""
    log = str(_logs(plan.root) / ("%A_%a.log" if count > 1 else "%j.log"))
    srun = ["--output", log, "--open-mode=append"]
    if settings.cpus_per_task is not None:
        srun.append(f"--cpus-per-task={settings.cpus_per_task}")  # since Slurm 22.05 srun does not take it over from the job
    setup = list(settings.setup)
    home = Path(__file__).resolve().parents[2]
    if str(home) not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):  # a checkout
        setup.append(f'export PYTHONPATH={shlex.quote(str(home))}"${{PYTHONPATH:+:$PYTHONPATH}}"')
    extra = {name: value for name, value in settings.sbatch if value is not False}
    return {"job_name": f"bitlaw-{plan.root.name}", "partition": settings.partition, "account": settings.account, "time": settings.minutes,
            "nodes": settings.nodes, "ntasks_per_node": 1, "gpus_per_node": settings.gpus_per_node, "cpus_per_task": settings.cpus_per_task,
            "mem": settings.mem, "signal_delay_s": settings.signal_delay_s, "array_parallelism": settings.array_parallelism, "setup": setup,
            "wckey": None, "stderr_to_stdout": True, "srun_args": srun, "additional_parameters": {"output": log, "requeue": True, **extra}}


def _groups(plan: Plan, known: list[planfile.Composition]) -> list[list[PlannedRun]]:
    """Runs for each task: those of a composition that is settled already, or of a cohort as planned here. Its composition is then
    settled on its node, which knows its devices."""
    place = {run_id: composition for composition in known for run_id in composition.slots if run_id is not None}
    groups: dict = {}
    for number, cohort in enumerate(plan.cohorts):
        for run in cohort.runs:
            groups.setdefault(place.get(run.run_id, number), []).append(run)
    return list(groups.values())


def _queued(logs: Path) -> dict[str, str]:
    """Run id -> task, of what was submitted and is still queued or running."""
    submitted = {}
    for path in sorted(logs.glob("*.json")):
        submitted |= json.loads(path.read_text())
    if not submitted:
        return {}
    active = set(_ask("squeue", "--noheader", "--array", "--me", "--format=%i").split())
    return {run_id: job for job, run_ids in submitted.items() if job in active for run_id in run_ids}


def _logs(root: Path) -> Path:
    return root.absolute() / "logs"


@contextlib.contextmanager
def _no_job_of_our_own() -> Iterator[None]:
    """Without the variables of the job that this may be submitted from (an interactive one): they would overrule those of the new one."""
    own = {} if "SLURM_JOB_ID" not in os.environ else {
        name: value for name, value in os.environ.items() if name.startswith(("SLURM_", "SLURMD_", "SRUN_")) and name != "SLURM_CONF"}
    for name in own:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(own)
