"""What a job may set: mutable schema dataclasses that Hydra composes and type-checks. `freeze` turns them into the frozen ones.

One class per config group; a name here is a key on the command line (`precision.weights.bits=5`). Unset means None.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional

from omegaconf import MISSING


@dataclass
class ModelSchema:
    name: str = MISSING
    num_layers: int = MISSING
    d_model: int = MISSING
    num_heads: int = MISSING
    d_ff: int = MISSING
    tied_head: bool = True
    scan_layers: bool = False
    remat: bool = False


@dataclass
class GemmSchema:
    """A role's quantizer in one of its matrix products; what is unset is as for the role."""

    format: Optional[str] = None  # "integer", "midrise", "minifloat", or a name of `bitlaw formats`; "float32" is not quantized
    bits: Optional[int] = None
    exp_bits: Optional[int] = None
    man_bits: Optional[int] = None
    variant: Optional[str] = None
    granularity: Optional[str] = None
    block: Optional[Any] = None  # that many values along the contraction, or a tile [along it, across it]
    scale_format: Optional[str] = None
    scale_rule: Optional[str] = None
    amax: Optional[str] = None  # what a scale maps to the largest value: current, rms, std, absmean, percentile, mse
    amax_at: Optional[float] = None  # its parameter: the multiple of the rms or std, the percentile
    pre_scale: Optional[float] = None  # multiplies before rounding and divides after: 0.75 keeps power-of-two scales from clipping
    two_level: Optional[bool] = None  # blocks' scales under one float32 scale of the tensor, as NVFP4 has them
    zero_point: Optional[bool] = None  # affine: unsigned integers relative to a code of their own for zero
    rounding: Optional[str] = None
    transform: Optional[str] = None  # rotate blocks of transform_block values along the contraction before rounding: hadamard, random_hadamard, ...
    transform_block: Optional[int] = None
    gradient: Optional[str] = None  # straight_through (unset), clipped, trust: where the gradient of what was rounded passes
    source: Optional[str] = None  # current, delayed, ema, static, learned, propagated, none: where the scale comes from
    static_rms: Optional[float] = None  # of source=static: the RMS that the tensor is expected to have; unset: the model says


@dataclass
class RoleSchema(GemmSchema):
    second: Optional[str] = None  # what the second product reads: shared, fresh, chained, moved; unset: shared where that can be
    forward: GemmSchema = field(default_factory=GemmSchema)
    dgrad: GemmSchema = field(default_factory=GemmSchema)
    wgrad: GemmSchema = field(default_factory=GemmSchema)


@dataclass
class PrecisionSchema:
    name: str = MISSING
    bits: Optional[int] = None  # shorthand that presets refer to
    source: Optional[str] = None  # shorthand for every quantizer that has none of its own
    granularity: Optional[str] = None  # in the place of every role's own, with `block` (unset: 32) and `two_level`
    block: Optional[int] = None
    two_level: Optional[bool] = None
    history: Optional[int] = None  # of source=delayed: how many steps are remembered; unset: 1024
    ema_decay: Optional[float] = None  # of source=ema: what a step keeps of the average; unset: 0.99
    history_choice: Optional[str] = None  # and which of their amax counts: max (unset) or most_recent
    dot_dtype: str = "float32"
    execution: str = "emulated"  # or native: products of the narrow numbers in a dtype that holds them
    pad: Optional[bool] = None  # dimensions that blocks do not divide: padded (unset: those of at least one block; true: any), or refused (false)
    extra_norm: Optional[bool] = None  # an RMSNorm with a gain of its own before every linear layer of a block
    ramp_steps: Optional[int] = None  # all that is quantized comes in gradually over that many updates, layer after layer; unset: at once
    ramp_stagger: Optional[int] = None  # updates from one layer's beginning to the next one's; unset: 0
    ramp_order: Optional[str] = None  # which layer begins: output (unset), input
    exemptions: Dict[str, str] = field(default_factory=dict)  # place -> precision, or "high": {last2: high, first1.qkv: int8, head: int8}
    data_dtype: Optional[str] = None  # scale propagation: forward and backward pass with data in float16, bfloat16 or float32; unset: off
    master_weights: Optional[str] = None  # kept between steps in this format: float16, bfloat16, float8_e4m3fn, ...; unset: float32
    master_rounding: Optional[str] = None  # and how they are rounded to it: nearest_even (unset), stochastic, ...
    adam_m: Optional[str] = None  # first moments, likewise; blockwise8 too, or a block format such as mxfp8_e4m3
    adam_v: Optional[str] = None  # second moments, likewise
    adam_rounding: Optional[str] = None
    scaled_state: Optional[bool] = None  # float16 state, and bfloat16 rounded to nearest, with powers of two beside it (unset: yes)
    optimizer_arithmetic: Optional[str] = None  # float32 (unset), or AdamW all in bfloat16: bfloat16, kahan, collage_light, collage_plus
    storage: Optional[str] = None  # packed (unset): state at the size of its format; emulated: the same values as float32
    weights: RoleSchema = field(default_factory=RoleSchema)
    activations: RoleSchema = field(default_factory=RoleSchema)
    output_gradients: RoleSchema = field(default_factory=RoleSchema)
    kv: GemmSchema = field(default_factory=GemmSchema)  # keys and values of attention, and below what it makes of them
    scores: GemmSchema = field(default_factory=GemmSchema)
    probabilities: GemmSchema = field(default_factory=GemmSchema)


@dataclass
class OptimizerSchema:
    name: str = MISSING
    lr: float = 0.016
    lr_rule: str = "mup"  # "mup": hidden and head learning rates times base_width / d_model; "constant"
    base_width: int = 32
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: Optional[float] = 1.0


@dataclass
class ScheduleSchema:
    name: str = MISSING
    warmup_steps: int = 50
    cooldown_fraction: float = 0.2
    final_factor: float = 0.0


@dataclass
class DataSchema:
    name: str = MISSING
    paths: List[str] = field(default_factory=list)
    tokenizer: Optional[str] = None
    validation_fraction: float = 0.05
    vocab_size: int = 256
    order: int = 2
    tokens: int = 4_000_000
    seed: int = 0


@dataclass
class EvalSchema:
    sequences: int = 512
    every_steps: Optional[int] = None


@dataclass
class CheckpointSchema:
    every_seconds: float = 60.0
    every_steps: Optional[int] = None
    keep: int = 2


@dataclass
class LoggerSchema:
    name: str = MISSING


@dataclass
class TrainSchema:
    model: ModelSchema = MISSING
    precision: PrecisionSchema = MISSING
    optimizer: OptimizerSchema = MISSING
    schedule: ScheduleSchema = MISSING
    data: DataSchema = MISSING
    logger: LoggerSchema = MISSING
    eval: EvalSchema = field(default_factory=EvalSchema)
    checkpoint: CheckpointSchema = field(default_factory=CheckpointSchema)
    seed: int = 0
    steps: Optional[int] = None
    tokens: Optional[float] = None
    tokens_per_param: Optional[float] = None
    batch_size: int = 16
    seq_len: int = 128
    accumulate: int = 1
    init_from: Optional[str] = None  # the folder of a run that is done, whose last checkpoint gives the parameters to start from
    divergence_margin: float = 2.0
    runs_dir: str = "runs"
    sweep: str = "train"
    log_every: int = 10
    telemetry_every: int = 0
    probe: bool = True  # compare the gradients of one batch with exact ones when a run ends
    steps_per_dispatch: int = 25
    host_devices: Optional[int] = None
    compile_cache: Optional[str] = "auto"
    sharding: Optional[str] = None  # one run over all devices as a whole: data, fsdp
    distributed: Optional[bool] = None  # several processes: jax.distributed
    plugins: List[str] = field(default_factory=list)


GROUPS = {"model": ModelSchema, "precision": PrecisionSchema, "optimizer": OptimizerSchema, "schedule": ScheduleSchema,
          "data": DataSchema, "logger": LoggerSchema}


def register_schemas() -> None:
    """Tells Hydra's ConfigStore the types of every group, so that a misspelt key or a wrong type fails at composition."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(name="train_schema", node=TrainSchema)
    for group, node in GROUPS.items():
        store.store(group=group, name="schema", node=node)
