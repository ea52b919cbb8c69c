"""A Slurm of one machine, for tests: munged, slurmctld and slurmd with all that they write in one folder. Debian: slurm-wlm, munge."""
from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")

# cred_expire: Slurm holds a requeued job back for as long as a credential lasts, by default two minutes.
CONFIG = """ClusterName=bitlaw
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MpiDefault=none
ReturnToService=2
KillWait=30
JobRequeue=1
MinJobAge=3600
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SchedulerParameters=bf_interval=2,sched_interval=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
"""


def missing() -> str | None:
    """Why a Slurm cannot be started here; None if it can."""
    absent = [name for name in PROGRAMS if _which(name) is None]
    if absent:
        return f"no {', '.join(absent)} here: apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "Slurm's daemons are started as root"


def _which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


class Slurm:
    """The daemons, from `start` to `stop`."""

    def __init__(self, folder: Path):
        self.folder, self.host = folder, socket.gethostname().partition(".")[0]
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen] = []

    def start(self) -> None:
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        (self.folder / "slurm.conf").write_text(CONFIG.format(host=self.host, folder=self.folder, ports=_free_ports(2), cpus=os.cpu_count()))
        here = self.folder
        self._run("munged", "--foreground", "--force", f"--socket={here}/munge.socket", f"--key-file={key}", f"--pid-file={here}/munged.pid",
                  f"--log-file={here}/munged.log", f"--seed-file={here}/munged.seed")
        _until(lambda: (here / "munge.socket").exists(), 20, "munged made no socket")
        self._run("slurmctld", "-D", "-i")
        self._run("slurmd", "-D")
        _until(lambda: self.ask("sinfo", "-h", "-o", "%T", check=False).split()[:1] == ["idle"], 60, f"the node did not become idle; see {here}/*.log")

    def stop(self) -> None:
        """Cancels what runs and ends the daemons, the last one first."""
        self.ask("scancel", "--user=root", check=False)
        self.ask("scancel", "--user=root", "--signal=KILL", "--full", check=False)
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def ask(self, *command: str, check: bool = True) -> str:
        """What a Slurm command says."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
        assert not check or done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` says of a job or of one task of an array (12_0), key by key."""
        text = self.ask("scontrol", "show", "job", job_id)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def until(self, job_id: str, *states: str, seconds: float = 180) -> dict[str, str]:
        """Wait until a job is in one of these states; what it is then."""
        _until(lambda: self.job(job_id)["JobState"] in states, seconds, f"job {job_id} is not {' or '.join(states)}")
        return self.job(job_id)

    def _run(self, name: str, *arguments: str) -> None:
        with (self.folder / f"{name}.out").open("w") as out:
            self._daemons.append(subprocess.Popen([_which(name), *arguments], env=self.environment, stdout=out, stderr=subprocess.STDOUT))


def _until(true, seconds: float, otherwise: str) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
