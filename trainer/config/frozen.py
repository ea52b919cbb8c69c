"""The frozen config of a run: hashable, validated, every default filled in. All that a run's numbers depend on is in here,
except the data's content and NUMERICS_VERSION, which its identity adds."""
from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass

# Raised by hand whenever the same config trains to different numbers; golden runs fail when numbers move without it.
NUMERICS_VERSION = 2


STATE_PARTS = ("master_weights", "adam_m", "adam_v")
STATE_KEYS = ("master_rounding", "adam_rounding", "scaled_state", "optimizer_arithmetic", "storage")


@dataclass(frozen=True)
class ModelSpec:
    name: str
    num_layers: int
    d_model: int
    num_heads: int
    d_ff: int
    tied_head: bool
    scan_layers: bool
    remat: bool


@dataclass(frozen=True)
class QuantizerSpec:
    """One quantizer. `format`: integer, minifloat, or a catalogue name; widths are None where the name fixes them."""

    format: str
    bits: int | None
    exp_bits: int | None
    man_bits: int | None
    variant: str | None
    granularity: str | None
    block: int | tuple[int, int] | None
    scale_format: str | None
    scale_rule: str | None
    rounding: str
    source: str
    static_rms: float | None = None
    two_level: bool | None = None
    amax: str | None = None
    amax_at: float | None = None
    pre_scale: float | None = None
    transform: str | None = None
    transform_block: int | None = None
    gradient: str | None = None
    zero_point: bool | None = None


@dataclass(frozen=True)
class RoleSpec:
    """The quantizers of a role in its two products (None: not quantized). reads: what the second product reads, None for "shared" where
    that can be and "fresh" elsewhere."""

    first: QuantizerSpec | None
    second: QuantizerSpec | None
    reads: str | None = None

    @property
    def both(self) -> tuple[QuantizerSpec | None, ...]:
        return self.first, self.second


@dataclass(frozen=True)
class PrecisionSpec:
    """history, history_choice: of delayed scales; None where nothing is delayed. data_dtype: of scale propagation, None without it.
    master_weights, adam_m, adam_v: dtypes of the state as scaled arrays, None for plain float32. execution: "native", or None for emulated.
    exemptions: place and precision there, None for what is kept high."""

    name: str
    dot_dtype: str
    weights: RoleSpec
    activations: RoleSpec
    output_gradients: RoleSpec
    history: int | None = None
    history_choice: str | None = None
    data_dtype: str | None = None
    master_weights: str | None = None
    adam_m: str | None = None
    adam_v: str | None = None
    execution: str | None = None
    master_rounding: str | None = None
    adam_rounding: str | None = None
    scaled_state: bool | None = None
    optimizer_arithmetic: str | None = None
    storage: str | None = None
    ema_decay: float | None = None
    extra_norm: bool | None = None
    ramp_steps: int | None = None
    ramp_stagger: int | None = None
    ramp_order: str | None = None
    pad: bool | None = None
    kv: QuantizerSpec | None = None
    scores: QuantizerSpec | None = None
    probabilities: QuantizerSpec | None = None
    exemptions: tuple[tuple[str, PrecisionSpec | None], ...] | None = None

    @property
    def state(self) -> dict[str, str]:
        """Part of the state -> the format that it is held in."""
        plain = "float32" if self.optimizer_arithmetic is None else "bfloat16"
        return {part: getattr(self, part) or plain for part in STATE_PARTS}


@dataclass(frozen=True)
class OptimizerSpec:
    name: str
    lr: float
    lr_rule: str
    base_width: int
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    clip_norm: float | None


@dataclass(frozen=True)
class ScheduleSpec:
    name: str
    warmup_steps: int
    cooldown_steps: int
    final_factor: float


@dataclass(frozen=True)
class DataSpec:
    name: str
    paths: tuple[str, ...]
    tokenizer: str | None
    validation_fraction: float
    vocab_size: int
    order: int
    tokens: int
    seed: int


@dataclass(frozen=True)
class Options:
    """How a run is carried out and where it is written. Not part of its identity: only host_devices and sharding touch its numbers, through
    the layout, within float rounding."""

    runs_dir: str
    sweep: str
    logger: str
    eval_every_steps: int | None
    checkpoint_seconds: float
    checkpoint_steps: int | None
    checkpoint_keep: int
    log_every: int
    telemetry_every: int
    probe: bool
    steps_per_dispatch: int
    host_devices: int | None
    sharding: str | None
    distributed: bool | None
    plugins: tuple[str, ...]
    compile_cache: str | None = None


@dataclass(frozen=True)
class TrainConfig:
    model: ModelSpec
    precision: PrecisionSpec
    optimizer: OptimizerSpec
    schedule: ScheduleSpec
    data: DataSpec
    seed: int
    steps: int
    batch_size: int
    seq_len: int
    accumulate: int
    eval_sequences: int
    divergence_margin: float
    options: Options
    init_from: str | None = None  # path of the run folder whose parameters come first
    init_run: str | None = None  # and the run_id in its record

    @property
    def batch_tokens(self) -> int:
        return self.batch_size * self.seq_len

    @property
    def tokens(self) -> int:
        return self.steps * self.batch_tokens

    def identity(self) -> dict:
        """What the run's numbers depend on, as plain JSON types. Names that only label (of a model or precision) are left out, and
        of the data's description all but the name: its content is in the sha256."""
        whole = dataclasses.asdict(self)
        precisions = [whole["precision"], *(there for _, there in whole["precision"]["exemptions"] or () if there)]
        del whole["options"], whole["model"]["name"]
        for precision in precisions:
            del precision["name"]
        whole["data"] = self.data.name
        del whole["init_run"]
        whole["init_from"] = self.init_run  # whatever folder it lies in: a run is named by what it is
        return _without_unset(whole)


# Keys that came after runs were made: where they say nothing they are left out, so that those runs keep their identity.
LATER_KEYS = ("static_rms", "two_level", "history", "history_choice", "data_dtype", *STATE_PARTS, "amax", "amax_at", "pre_scale", "transform",
              "transform_block", "gradient", "reads", "execution", "pad", "exemptions", "zero_point", "ema_decay", "extra_norm", *STATE_KEYS, "ramp_steps", "ramp_stagger", "ramp_order", "init_from", "kv", "scores", "probabilities")


def _without_unset(content: dict) -> dict:
    """The same without later keys that are None, at any depth."""
    inner = {key: _without_unset(value) if isinstance(value, dict) else value for key, value in content.items()}
    return {key: value for key, value in inner.items() if not (key in LATER_KEYS and value is None)}


def digest(content: dict) -> str:
    """16 hex digits of the sha256 of canonical JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def run_id(config: TrainConfig, data_sha256: str) -> str:
    """A run's identity: hash of frozen config, data content and NUMERICS_VERSION."""
    return digest({"config": config.identity(), "data_sha256": data_sha256, "numerics": NUMERICS_VERSION})


def trunk_id(config: TrainConfig, data_sha256: str) -> str:
    """Equal for runs that are the same run until a cool-down starts: all but length and cool-down (WSD schedules), else run_id."""
    if config.schedule.name != "wsd":
        return run_id(config, data_sha256)
    identity = config.identity()
    del identity["steps"], identity["schedule"]["cooldown_steps"], identity["schedule"]["final_factor"]
    return digest({"trunk": identity, "data_sha256": data_sha256, "numerics": NUMERICS_VERSION})
