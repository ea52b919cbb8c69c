"""Our training step as benchmarks drive it: through the program that every run uses, with a policy and a number of members.

All six operands are quantized in QUANTIZED: float8_e4m3fn with one current scale per tensor, its widths traced.
"""
from __future__ import annotations

import jax
import numpy as np

import formats
from benchmarks.timing import Program
from trainer import cohort
from trainer.model import ModelConfig
from trainer.optimizers import OptimizerNumbers
from trainer.precision import Operand, PrecisionPolicy, Quantizer
from trainer.schedules import ScheduleNumbers
from trainer.step import Hyper, StepStructure

BATCH, SEQ_LEN, VOCABULARY = 16, 128, 256
# Updates of one dispatch; a training run takes 25. Each dispatch of XLA:CPU gets fresh pages for its intermediate values, and the
# page faults are a third of a single step at d 64 (measured).
STEPS = 5
SIZES = {32: (2, 4, 88), 64: (3, 4, 176), 128: (4, 4, 352)}  # width: (layers, heads, d_ff)

_E4M3 = Operand(Quantizer(formats.scaled(formats.minifloat(4, 3, "fn"), "tensor")))
FLOAT32, QUANTIZED = PrecisionPolicy(), PrecisionPolicy(_E4M3, _E4M3, _E4M3)


def model(width: int) -> ModelConfig:
    """The decoder of that width; ValueError for one that is not in SIZES."""
    if width not in SIZES:
        raise ValueError(f"width={width} must be one of {', '.join(map(str, SIZES))}")
    num_layers, num_heads, d_ff = SIZES[width]
    return ModelConfig(num_layers, width, num_heads, d_ff, VOCABULARY)


def tokens(seed: int = 0, shape=(BATCH, SEQ_LEN + 1)) -> np.ndarray:
    """Random bytes: the time of a step does not depend on them."""
    return np.random.default_rng(seed).integers(0, VOCABULARY, shape, dtype=np.uint8)


def hyper(policy: PrecisionPolicy, seed: int = 0, learning_rate: float = 3e-3, warmup_steps: int = 50) -> Hyper:
    """AdamW with decay 0.1 and clipping at 1, an endless WSD schedule."""
    f32 = np.float32
    numbers = OptimizerNumbers(f32(learning_rate), f32(0.9), f32(0.95), f32(1e-8), f32(0.1), f32(1.0))
    schedule = ScheduleNumbers(np.int32(10**6), np.int32(warmup_steps), np.int32(0), f32(0.0))
    return Hyper(numbers, schedule, policy, np.array([0, seed], np.uint32), f32(1e3))


def program(config: ModelConfig, policy: PrecisionPolicy, num_members: int = 1, steps: int = STEPS, telemetry_every: int = 0) -> Program:
    """`steps` updates of every member in one dispatch, on all host devices; a unit is one update of one member."""
    structure = StepStructure(config, "adamw", "wsd", BATCH, SEQ_LEN, telemetry_every=telemetry_every)
    compiled = cohort.Program(structure, cohort.choose_layout(num_members, BATCH))
    slots = -(-num_members // compiled.layout.member_devices) * compiled.layout.member_devices
    hypers = compiled.put(jax.tree.map(lambda *xs: np.stack(xs), *(hyper(policy, seed) for seed in range(slots))))
    state = compiled.init(hypers)
    batch = tokens(shape=(slots, steps, BATCH, SEQ_LEN + 1))
    stop = np.full(slots, 10**6, np.int32) * (np.arange(slots) < num_members)

    def update() -> None:
        nonlocal state
        state, *rest = compiled.run(state, hypers, batch, stop)
        jax.block_until_ready((state, rest))

    return Program(update, units=num_members * steps)
