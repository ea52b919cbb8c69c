"""The trainer from Python: the same composition and the same loop as the command line."""
from __future__ import annotations

from trainer.cohort import use_devices
from trainer.config import Composer, TrainConfig, hydra_ready
from trainer.config.freeze import MAX_STEPS
from trainer.config.policies import build_policy
from trainer.precision import PrecisionPolicy


def config(*overrides: str, config_dir: str | None = None) -> TrainConfig:
    """The frozen config of one run from overrides in Hydra's grammar, as `bitlaw train` takes them. ValueError for bad ones."""
    with hydra_ready(config_dir) as extra:
        return Composer(extra).freeze(list(overrides))


def policy(name: str, *overrides: str) -> PrecisionPolicy:
    """The policy of configs/precision/NAME.yaml, e.g. policy("int", "precision.bits=5"); it fits tensors of any size, and runs of any length."""
    return build_policy(config(f"precision={name}", f"steps={MAX_STEPS}", "precision.pad=true", *overrides).precision)


def train(config: TrainConfig) -> dict:
    """Train one run (or find it done) and return its record: the columns of the run table.

    The run's folder is runs_dir/sweep/run_id. RuntimeError, with the reason, if the run failed.
    """
    from trainer.sweep import execute, make_plan

    use_devices(config.options)
    plan = make_plan([config], retry_failed=True)
    outcome = execute(plan, quiet=True, wait=False)
    run = plan.runs[0]
    if outcome.failed:
        raise RuntimeError((run.folder.path / "error.txt").read_text())
    return run.folder.record()
