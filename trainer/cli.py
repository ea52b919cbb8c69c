"""`bitlaw train` and `bitlaw sweep`."""
from __future__ import annotations

import contextlib
import os
import re
import shlex
import sys
from collections.abc import Iterator

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from trainer import compiled
from trainer.cohort import use_devices
from trainer.config import Composer, TrainConfig, axes, config_dir, freeze, hydra_ready
from trainer.config.launcher import SlurmSettings, launcher
from trainer.config.schema import GROUPS, register_schemas
from trainer.stopping import Stop
from trainer.sweep import definition, execute, make_plan
from trainer.sweep.candidates import Candidates
from trainer.sweep.dry_run import print_plan
from trainer.sweep.execute import OnProgress
from trainer.sweep.options import LaunchOptions, seconds, take_options
from trainer.sweep.show import report

TRAIN_HELP = """usage: bitlaw train [--config-dir DIR] [--cfg] [-m] KEY=VALUE ...
  One run. Groups: {groups}.
  Example: bitlaw train model=25k precision=int4 steps=500 seed=0
  --cfg prints the composed config; --config-dir adds a folder laid out like configs/; -m is Hydra's plain multirun."""
SWEEP_HELP = """usage: bitlaw sweep [--config-dir DIR] [sweep=NAME] [dry_run=true] [launcher=local|slurm] KEY=V1,V2 ...
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


def run(verb: str, argv: list[str], on_progress: OnProgress = lambda _: None) -> int:
    """Exit code of `bitlaw VERB ARGV`; bad input raises ValueError with one line. on_progress: of a sweep (`execute`)."""
    with _one_line():
        return _train(argv) if verb == "train" else _sweep(argv, on_progress)


def candidates(overrides: list[str], budget: str, extra_dir: str | None = None) -> Candidates:
    """The runs of a sweep, to be trained in groups within `budget`, a time as "540s" or "1.5h". ValueError, one line, for bad input."""
    limit = seconds("--budget", budget)
    if limit is None:
        raise ValueError(f"--budget={budget} is not a time; accepted: such as 540s, 9m, 1.5h")
    with _one_line():
        configs, options = sweep_configs(overrides, extra_dir)
    for key, value, accepted in (("dry_run", options.dry_run, "false"), ("max_wall", options.max_wall, "--budget"), ("launcher", options.launcher != "local", "local")):
        if value:
            raise ValueError(f"{key} is not possible in `bitlaw answer`; accepted: {accepted}")
    use_devices(configs[0].options)
    return Candidates(configs, options, limit)


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """Errors of Hydra, OmegaConf and YAML as a ValueError of one line."""
    from hydra.errors import HydraException

    try:
        yield
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
    return _carry_out([config], Stop(), wait=False, retry_failed=True)


def _carry_out(configs: list[TrainConfig], stop: Stop, wait: bool = True, on_progress: OnProgress = lambda _: None, **how) -> int:
    """Plan and train; signals end it with everything saved."""
    use_devices(configs[0].options)
    with stop.catching():
        plan = make_plan(configs, **how)
        compiled.keep(configs[0].options)
        return report(plan, execute(plan, stop=stop, wait=wait, on_progress=on_progress))


def _multirun(argv: list[str]) -> int:
    """Hydra's own multirun: one run after another, each its own program."""
    import hydra

    same = shlex.join(word for word in argv if word not in ("-m", "--multirun"))
    print(f"bitlaw: -m trains one run at a time; to pack them into shared programs type: bitlaw sweep {same}", file=sys.stderr)
    register_schemas()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach `run`, which prints one line
    sys.argv = ["bitlaw train", *argv]

    codes = []

    def job(composed) -> float | None:
        config = freeze(composed)
        use_devices(config.options)
        plan = make_plan([config], retry_failed=True)
        compiled.keep(config.options)
        codes.append(report(plan, execute(plan, wait=False)))
        return plan.runs[0].folder.record()["loss"]

    hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="train")(job)()
    return max(codes, default=0)


# --- sweep ----------------------------------------------------------------------------------------------------------


def sweep_configs(overrides: list[str], extra_dir: str | None = None) -> tuple[list[TrainConfig], LaunchOptions]:
    """The frozen configs of every combination, and the options of the launch among the overrides."""
    options, overrides = take_options(overrides)
    name, own = None, []
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "sweep":
            name = value
        else:
            own.append(override)
    return definition.compose(name, own, extra_dir), options


def _sweep(argv: list[str], on_progress: OnProgress) -> int:
    flags, overrides = _split_flags(argv, ("--help", "-h"))
    if "--help" in flags or "-h" in flags:
        print(SWEEP_HELP.format(sweeps=", ".join(definition.names())))
        return 0
    configs, options = sweep_configs(overrides, flags.get("--config-dir"))
    cluster = launcher(options.launcher, options.settings, flags.get("--config-dir"))
    if cluster is not None:
        return _on_a_cluster(configs, cluster, options)
    how = {"max_members": options.max_members, "retry_failed": options.retry_failed}
    if options.dry_run:
        use_devices(configs[0].options)
        print_plan(make_plan(configs, **how))
        return 0
    return _carry_out(configs, Stop(options.max_wall), on_progress=on_progress, **how)


def _on_a_cluster(configs: list[TrainConfig], settings: SlurmSettings, options: LaunchOptions) -> int:
    from trainer.sweep import slurm

    if not options.dry_run:
        return slurm.launch(configs, settings, options)
    plan = slurm.plan_here(configs, options)
    print_plan(plan)
    print(slurm.script(plan, settings))
    return 0
