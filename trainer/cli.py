"""`bitlaw train` and `bitlaw sweep`."""
from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from trainer import distributed
from trainer.cohort import use_devices
from trainer.config import Composer, TrainConfig, axes, config_dir, expand, freeze, hydra_ready
from trainer.config.schema import GROUPS, register_schemas
from trainer.sweep import Plan, execute, make_plan

TRAIN_HELP = """usage: bitlaw train [--config-dir DIR] [--cfg] [-m] KEY=VALUE ...
  One run. Groups: {groups}.
  Example: bitlaw train model=25k precision=int4 steps=500 seed=0
  --cfg prints the composed config; --config-dir adds a folder laid out like configs/; -m is Hydra's plain multirun."""
SWEEP_HELP = """usage: bitlaw sweep [--config-dir DIR] [sweep=NAME] [dry_run=true] [launcher=local] KEY=V1,V2 ...
  Every combination of the swept values, in cohorts; run again to resume. Sweeps by name: {sweeps}.
  Example: bitlaw sweep model=10k,25k precision=int precision.bits=3,4,6,32 steps=500 seed=range(2)"""


def explain(error: Exception) -> str:
    """One line from an error of Hydra or OmegaConf: the key, the value, what would be accepted."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    fields = dict(re.split(r": |=", line, maxsplit=1) for line in lines if re.match(r"(full_key|object_type)(: |=)", line))
    text = lines[0] if lines else type(error).__name__
    if "Available options in" in str(error):
        start = next(i for i, line in enumerate(lines) if line.startswith("Available options in"))
        stop = next((i for i, line in enumerate(lines) if line.startswith("Config search path")), len(lines))
        options = [name for name in lines[start + 1:stop] if name != "schema"]
        return f"{text}; accepted: {', '.join(options)}"
    if "full_key" in fields:
        text = f"{fields['full_key']}: {text}"
    accepted = _keys_of(fields.get("object_type"))
    return f"{text}; accepted keys: {', '.join(accepted)}" if accepted and "Key '" in text else text


def _keys_of(schema: str | None) -> list[str]:
    from trainer.config import schema as schemas

    known = getattr(schemas, schema or "", None)
    return list(known.__dataclass_fields__) if known is not None else []


def _split_flags(argv: list[str], known: tuple[str, ...]) -> tuple[dict, list[str]]:
    """Options that are not overrides, and the overrides."""
    flags, rest, words = {}, [], iter(argv)
    for word in words:
        name, _, value = word.partition("=")
        if name == "--config-dir":
            flags[name] = value or next(words, None)
            if not flags[name]:
                raise ValueError("--config-dir needs a folder")
        elif name in known:
            flags[name] = True
        elif word.startswith("-"):
            raise ValueError(f"{word} is not an option; accepted: {', '.join(('--config-dir', *known))}, and KEY=VALUE overrides")
        else:
            rest.append(word)
    return flags, rest


def run(verb: str, argv: list[str]) -> int:
    """Exit code of `bitlaw VERB ARGV`; bad input raises ValueError with one line."""
    from hydra.errors import HydraException

    try:
        return {"train": _train, "sweep": _sweep}[verb](argv)
    except (OmegaConfBaseException, HydraException) as error:
        raise ValueError(explain(error)) from error
    except YAMLError as error:  # its text names file and line
        raise ValueError(f"not YAML: {error}") from error


def _train(argv: list[str]) -> int:
    if "-m" in argv or "--multirun" in argv:
        return _multirun(argv)
    flags, overrides = _split_flags(argv, ("--cfg", "--help", "-h"))
    if "--help" in flags or "-h" in flags:
        print(TRAIN_HELP.format(groups=", ".join(GROUPS)))
        return 0
    with hydra_ready(flags.get("--config-dir")) as extra:
        composer = Composer(extra)
        if "--cfg" in flags:
            print(OmegaConf.to_yaml(composer.config(overrides)), end="")
            return 0
        for override, values in zip(overrides, axes(overrides)):
            if len(values) > 1:
                raise ValueError(f"{override} is a sweep; `bitlaw sweep` takes those, `bitlaw train` takes one value for each key")
        config = composer.freeze(overrides)
    use_devices(config.options)
    plan = make_plan([config])
    return _report(plan, execute(plan))


def _report(plan: Plan, outcome) -> int:
    """Say what came out; 0 only if every run is done."""
    if not distributed.leads():
        return 1 if outcome.failed else 0
    for run_ in plan.runs if len(plan.runs) <= 8 else ():
        record = run_.folder.record()
        if record["status"] == "failed":
            print(f"{run_.run_id} failed: {_reason((run_.folder.path / 'error.txt').read_text())}", file=sys.stderr)
        elif record["status"] == "diverged":
            print(f"{run_.run_id} diverged at step {record['diverged_step']}; {run_.folder.path}")
        else:
            print(f"{run_.run_id} {record['precision']} N={record['n_params']} D={record['tokens']} loss {record['loss']:.4f} "
                  f"+- {record['loss_std_err']:.4f} nats/token ({record['bits_per_byte']:.4f} bits/byte), "
                  f"{record['tokens_per_s']:.0f} tokens/s; {run_.folder.path}")
    if outcome.failed:
        print(f"{len(outcome.failed)} of {len(plan.runs)} runs failed; the same command tries them again", file=sys.stderr)
        return 1
    if len(plan.runs) > 1:
        spent = "" if not outcome.compiles else (f" in {outcome.seconds:.0f} s: {outcome.training_seconds:.0f} training, {outcome.event_seconds:.0f} evaluation "
                                                f"and checkpoints, {outcome.compile_seconds:.0f} for {outcome.compiles} compiles")
        print(f"{len(plan.runs)} runs done, {plan.num_done} of them before{spent}; {plan.root}")
    return 0


def _reason(traceback: str) -> str:
    """The line of a traceback that names the error: JAX adds some of its own below it."""
    lines = traceback.strip().splitlines()
    return next((line for line in reversed(lines) if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)), lines[-1])


def _multirun(argv: list[str]) -> int:
    """Hydra's own multirun: one run after another, each its own program."""
    import hydra

    print("bitlaw: -m trains one run at a time; `bitlaw sweep` with the same overrides packs them into shared programs", file=sys.stderr)
    register_schemas()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach `run`, which prints one line
    sys.argv = ["bitlaw train", *argv]

    codes = []

    def job(composed) -> float | None:
        config = freeze(composed)
        use_devices(config.options)
        plan = make_plan([config])
        codes.append(_report(plan, execute(plan)))
        return plan.runs[0].folder.record()["loss"]

    hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="train")(job)()
    return max(codes, default=0)


# --- sweep ----------------------------------------------------------------------------------------------------------


def _sweep_names(folders) -> list[str]:
    return sorted(path.stem for folder in folders for path in (folder / "sweep").glob("*.yaml"))


def _sweep_lines(name: str, extra_dir: str | None) -> list[list[str]]:
    """The `runs` of configs/sweep/NAME.yaml: a line is a product of overrides, as on the command line, after those of `common`; a later
    override of a key takes the place of an earlier one. The sweep is their union."""
    folders = [config_dir(), *([Path(extra_dir)] if extra_dir else [])]
    for folder in folders:
        path = folder / "sweep" / f"{name}.yaml"
        if path.exists():
            content = OmegaConf.to_container(OmegaConf.load(path))
            content = content if isinstance(content, dict) and set(content) <= {"runs", "common"} else {}
            lines, common = content.get("runs"), content.get("common", "")
            if not isinstance(lines, list) or not lines or not all(isinstance(line, str) for line in (*lines, common)):
                raise ValueError(f"{path} must hold `runs:` with a list of lines such as 'model=10k,25k seed=0,1', maybe `common:` with overrides of all of them, and nothing else")
            return [_over(_words(path, common), _words(path, line)) for line in lines]
    raise ValueError(f"sweep={name} is not known; accepted: {', '.join(_sweep_names(folders))}, or overrides with several values")


def _over(overrides: list[str], later: list[str]) -> list[str]:
    """All of them, of a key that is in both the later one."""
    keys = {override.partition("=")[0] for override in later}
    return [override for override in overrides if override.partition("=")[0] not in keys] + later


def _words(path: Path, line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError as error:
        raise ValueError(f"{path}: {line!r} cannot be read ({error}); accepted: overrides as on the command line") from None


def sweep_configs(overrides: list[str], extra_dir: str | None = None) -> tuple[list[TrainConfig], dict[str, str]]:
    """The frozen configs of every combination, and the launch options (dry_run, launcher) among the overrides."""
    launch = {"dry_run": "false", "launcher": "local"}
    name, own = None, []
    for override in overrides:
        key, _, value = override.partition("=")
        if key in launch:
            launch[key] = value
        elif key == "sweep":
            name = value
        else:
            own.append(override)
    lines = [[]] if name is None else _sweep_lines(name, extra_dir)
    label = f"sweep={name or 'adhoc'}"
    configs = []
    with hydra_ready(extra_dir) as extra:
        composer = Composer(extra)
        for line in lines:
            configs += [composer.freeze([label, *combination]) for combination in expand(axes(_over(line, own)))]
    return configs, launch


def _sweep(argv: list[str]) -> int:
    flags, overrides = _split_flags(argv, ("--help", "-h"))
    if "--help" in flags or "-h" in flags:
        print(SWEEP_HELP.format(sweeps=", ".join(_sweep_names([config_dir()]))))
        return 0
    configs, launch = sweep_configs(overrides, flags.get("--config-dir"))
    if launch["launcher"] != "local":
        raise ValueError(f"launcher={launch['launcher']} is not known; accepted: local")
    if launch["dry_run"] not in ("true", "false"):
        raise ValueError(f"dry_run={launch['dry_run']} is not possible; accepted: true, false")
    use_devices(configs[0].options)
    plan = make_plan(configs)
    if launch["dry_run"] == "true":
        _print_plan(plan)
        return 0
    return _report(plan, execute(plan))


def _print_plan(plan: Plan) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{len(plan.runs)} runs, {plan.num_done} done, {len(plan.cohorts)} cohorts; {plan.root}")
    for column in ("model", "runs", "updates", "FLOPs", "precisions"):
        table.add_column(column, justify="left" if column in ("model", "precisions") else "right")
    from trainer.describe import precision_name

    for cohort in plan.cohorts:
        names = dict.fromkeys(precision_name(run_.config.precision) for run_ in cohort.runs)
        table.add_row(cohort.runs[0].config.model.name, str(len(cohort.runs)), str(cohort.updates()), f"{cohort.flops():.2e}", ", ".join(names))
    Console().print(table)
