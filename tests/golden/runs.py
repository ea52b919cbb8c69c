"""Golden runs: tiny trainings whose final losses are recorded in losses.json. They move only when numbers change.

    python -m tests.golden.runs            compares, prints
    python -m tests.golden.runs --write    records, after NUMERICS_VERSION (trainer/config/frozen.py) was raised

Eight host devices give one layout whatever the number of cores. The same bits on another machine are not claimed: vector widths
change the order of sums, within TOLERANCE. (AVX-512, AVX2 and one core agree to 2e-8.) Another jax fuses otherwise, which may tip a
rounding of a low-precision run: each minor version has entries of its own.
"""
from __future__ import annotations

import json
import pathlib
import sys
import tempfile

import jax

if __name__ == "__main__":  # as tests/conftest.py has it
    jax.config.update("jax_num_cpu_devices", 8)

import trainer
from trainer.config import NUMERICS_VERSION

PATH = pathlib.Path(__file__).with_name("losses.json")
TOLERANCE = 1e-6  # relative
COMMON = ("model=2k", "model.num_layers=1", "data=synthetic", "data.vocab_size=16", "data.order=1", "data.tokens=20000", "batch_size=8", "seq_len=32",
          "eval.sequences=16", "probe=false", "schedule.warmup_steps=5", "steps=20", "host_devices=8")  # fmt: skip

# Between them: every source of numbers that a default run has, and each flag that changes how they are computed.
RUNS = {
    "float32": ("precision=float32",),
    "int4": ("precision=int4", "accumulate=2", "schedule=cosine"),
    "fp8": ("precision=fp8", "model.tied_head=false", "optimizer.clip_norm=0.1"),
    "mxfp4": ("seed=1", "precision=mxfp4", "precision.pad=true", "model.num_layers=2", "model.scan_layers=true", "model.remat=true"),
    "quartet": ("precision=quartet", "precision.pad=true", "precision.exemptions={first1.qkv:high,head:int8}"),
    "state": ("precision=int8_fake_quant", "precision.optimizer_arithmetic=collage_plus", "precision.kv.format=int4", "precision.kv.granularity=token"),
    "packed": ("precision=lsq", "precision.master_weights=float8_e4m3fn", "precision.master_rounding=stochastic", "precision.adam_m=blockwise8",
               "precision.adam_v=blockwise8"),
    "gradual": ("precision=bitnet_finetune", "precision.ramp_steps=8", "precision.ramp_stagger=2", "model.num_layers=2"),
    "scaled": ("precision=fp8_scaled_fp16_state", "accumulate=2", "schedule=cosine"),
    "stochastic": ("precision=int4", "precision.weights.rounding=stochastic", "precision.activations.rounding=stochastic", "schedule=constant"),
}  # fmt: skip


def loss(name: str) -> float:
    """The final loss of a golden run, trained now, on eight devices."""
    with tempfile.TemporaryDirectory() as folder:
        return trainer.train(trainer.config(*COMMON, *RUNS[name], f"runs_dir={folder}"))["loss"]


def recorded() -> tuple[int, dict[str, float] | None]:
    """NUMERICS_VERSION of the record, and its losses for this jax version; None where that has none."""
    content = json.loads(PATH.read_text())
    return content["numerics_version"], content["losses"].get(_minor(jax.__version__))


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def moved(name: str, found: float, expected: float) -> str | None:
    """What to say of a loss that is not the recorded one."""
    if abs(found - expected) <= TOLERANCE * abs(expected):
        return None
    return (f"golden run {name}: loss {found!r}, recorded {expected!r} ({found / expected - 1:+.1e}). If numbers were meant to change, raise "
            "NUMERICS_VERSION in trainer/config/frozen.py and run `python -m tests.golden.runs --write`")  # fmt: skip


def write(losses: dict[str, float]) -> None:
    """Record losses for this jax version. Refused (SystemExit) where they moved and NUMERICS_VERSION did not."""
    content = json.loads(PATH.read_text()) if PATH.exists() else {"numerics_version": NUMERICS_VERSION, "losses": {}}
    if content["numerics_version"] != NUMERICS_VERSION:
        content = {"numerics_version": NUMERICS_VERSION, "losses": {}}
    before = content["losses"].get(_minor(jax.__version__), {})
    complaints = [text for name, value in losses.items() if name in before and (text := moved(name, value, before[name]))]
    if complaints:
        sys.exit("\n".join(complaints))
    content["losses"][_minor(jax.__version__)] = losses
    PATH.write_text(json.dumps(content, indent=1) + "\n")


def main(argv: list[str]) -> None:
    losses = {}
    for name in RUNS:
        losses[name] = loss(name)
        print(f"{name:12}{losses[name]!r}", flush=True)
    if argv == ["--write"]:
        write(losses)
        return
    version, expected = recorded()
    complaints = [text for name, value in (expected or {}).items() if (text := moved(name, losses[name], value))]
    if expected is None:
        complaints.append(f"losses.json has no entries for jax {jax.__version__}: record them with --write")
    if version != NUMERICS_VERSION:
        complaints.append(f"losses.json is of NUMERICS_VERSION {version}, the code of {NUMERICS_VERSION}: record again with --write")
    sys.exit("\n".join(complaints) or 0)


if __name__ == "__main__":
    main(sys.argv[1:])
