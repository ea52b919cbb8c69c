"""The columns of a run record (DESIGN 4) that follow from its config, layout and final evaluation."""
from __future__ import annotations

import functools
import importlib.metadata
import math
import subprocess
from pathlib import Path

import jax
import numpy as np

import formats
from trainer.config.frozen import PrecisionSpec, QuantizerSpec, TrainConfig
from trainer import telemetry
from trainer.config.policies import UNQUANTIZED_BITS, build_format
from trainer.config.precision import HIGH
from trainer.model import SITES
from trainer.precision import ATTENTION_ROLES, OUTSIDE, ROLES, Source, matches
from trainer.stored import BLOCKWISE, loses_updates

# Dense bfloat16 peak in FLOP/s (vendors' data sheets, without sparsity), by the start of jax's device_kind.
PEAK_FLOPS = {"NVIDIA A100": 312e12, "NVIDIA H100": 989e12, "NVIDIA H200": 989e12, "NVIDIA B200": 2250e12,
              "TPU v4": 275e12, "TPU v5e": 197e12, "TPU v5p": 459e12, "TPU v6": 918e12}


@functools.cache
def code_version() -> str:
    """The git commit of a checkout ("+" if modified), else the installed version."""
    root = Path(__file__).resolve().parents[1]
    try:
        if (root / ".git").exists():
            commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
            dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=root, capture_output=True, text=True, check=True)
            return commit.stdout.strip() + ("+" if dirty.stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        pass  # no git, or a checkout without commits: the version says what there is to say
    return importlib.metadata.version("bitlaw")


@functools.cache
def _log_mse(spec: QuantizerSpec) -> float | None:
    """ln of the relative mean squared error on Gaussian data; None where nothing is lost."""
    error = float(formats.gaussian_mse(build_format(spec)))
    return math.log(error) if error > 0 else None


def quantizes(spec: QuantizerSpec | None) -> bool:
    """False for what leaves float32 as it is, such as the width that marks float32 members of a cohort of integers."""
    return spec is not None and spec.bits != UNQUANTIZED_BITS


def quantized_roles(precision: PrecisionSpec) -> dict[str, bool]:
    """Role -> whether some place of a block quantizes it, for linear layers in its first product."""
    places = (precision, *(there for where, there in precision.exemptions or () if there is not None and where not in OUTSIDE))
    linear = {role: any(quantizes(getattr(there, role).first) for there in places) for role in ROLES}
    return linear | {role: any(quantizes(getattr(there, role)) for there in places) for role in ATTENTION_ROLES}


def _role_columns(role: str, spec: QuantizerSpec | None, held: str, source: str | None) -> dict:
    """The columns of one tensor role. held: the dtype of what is not quantized, whose scale is from `source`."""
    if not quantizes(spec):
        fmt = formats.identity() if held == "float32" else formats.get(held)
        own = {"granularity": None, "rounding": "nearest_even" if held != "float32" else None, "source": source, "log_mse": None}
    else:
        fmt = build_format(spec)
        granularity = fmt.granularity.value if isinstance(fmt, formats.Scaled) else None
        own = {"granularity": granularity, "rounding": spec.rounding, "source": spec.source, "log_mse": _log_mse(spec)}
        if granularity in ("tensor", "channel", "token"):
            fmt = fmt.element  # a block format has a name of its own; other scales are told by granularity and source
    about = formats.describe(fmt)
    columns = {"format": about["name"], "block": about["block"], "bits": about["bits"], "bits_effective": about["bits_effective"],
               "exp_bits": about["exp_bits"], "man_bits": about["man_bits"]} | own
    return {f"{role}_{name}": value for name, value in columns.items()}


def precision_columns(precision: PrecisionSpec) -> dict:
    """What was quantized to what, by role (as in the role's first product)."""
    columns = {}
    source = Source.PROPAGATED.value if precision.data_dtype else None
    held = precision.data_dtype or precision.dot_dtype
    for role in ROLES:
        columns |= _role_columns(role, getattr(precision, role).first, held, source)
    for role in ATTENTION_ROLES:
        columns |= _role_columns(role, getattr(precision, role), precision.data_dtype or "float32", source)
    for part, dtype in precision.state.items():
        rounding = precision.master_rounding if part == "master_weights" else precision.adam_rounding
        columns |= {f"{part}_format": dtype, f"{part}_bits": _bits(dtype), f"{part}_rounding": None if dtype == "float32" else rounding or "nearest_even"}
    return columns


def _bits(name: str) -> int:
    return 8 if name == BLOCKWISE else formats.describe(name)["bits"]


def mfu(flops_per_token: float, tokens_per_s: float) -> float | None:
    """Model-FLOP utilisation of all devices together, None where the device's peak is not known."""
    kind = jax.devices()[0].device_kind
    for prefix, peak in PEAK_FLOPS.items():
        if kind.startswith(prefix):
            return flops_per_token * tokens_per_s / (peak * jax.device_count())
    return None


def _finite(x: float | None) -> float | None:
    return x if x is not None and math.isfinite(x) else None


def mean_and_stderr(losses_W: np.ndarray) -> tuple[float, float]:
    """Mean over windows and its standard error (windows as independent draws), nats per token."""
    return float(np.mean(losses_W, dtype=np.float64)), float(np.std(losses_W, ddof=1, dtype=np.float64) / math.sqrt(losses_W.size))


def quantized_fraction(precision: PrecisionSpec, model) -> float:
    """Share of the weights of linear layers, head included, of which some product reads a quantized operand. `model`: a ModelConfig. Exemptions
    count as `PrecisionPolicy.at` and `outside` read them: the last that names a place, and the head is high unless one does."""

    def narrow(fits, otherwise: PrecisionSpec | None) -> bool:
        there = next((spec for where, spec in reversed(precision.exemptions or ()) if fits(where)), otherwise)
        return there is not None and any(quantizes(spec) for role in ROLES for spec in getattr(there, role).both)

    layers = range(model.num_layers)
    blocks = sum(size for layer in layers for site, size in zip(SITES, model.site_params, strict=True)
                 if narrow(lambda where: matches(where, layer, model.num_layers, site), precision))
    head = model.vocab_size * model.d_model
    return (blocks + (head if narrow(lambda where: where == "head", None) else 0)) / (model.matmul_params() + head)


def exemptions_name(precision: PrecisionSpec) -> str | None:
    """Places and the precisions there, as in "last1:high,head:int8"; None without any."""
    return ",".join(f"{where}:{HIGH if there is None else there.name}" for where, there in precision.exemptions or ()) or None


def config_columns(config: TrainConfig, dataset, model) -> dict:
    """The columns that are known before a run begins. `model`: its ModelConfig."""
    return {
        "sweep": config.options.sweep, "seed": config.seed, "n_params": model.num_params, "n_params_total": model.num_params_total,
        "cooldown_steps": config.schedule.cooldown_steps if config.schedule.name == "wsd" else None,
        "precision": precision_name(config.precision), "exemptions": exemptions_name(config.precision), **precision_columns(config.precision),
        "quantized_fraction": quantized_fraction(config.precision, model),
        "dot_precision": "highest" if config.precision.dot_dtype == "float32" else config.precision.dot_dtype,
        "execution": config.precision.execution or "emulated", "lr_rule": config.optimizer.lr_rule, "lr": config.optimizer.lr, "batch_tokens": config.batch_tokens,
        "schedule": config.schedule.name, "device": jax.devices()[0].device_kind, "n_devices": jax.device_count(),
        "jax_version": jax.__version__, "code_version": code_version(), "data": dataset.name, "data_sha256": dataset.sha256,
    }


def record(member, dataset, layout: str, losses_W: np.ndarray | None, model) -> dict:
    """The run table's row of a run that is over, healthy or diverged. `model`: its ModelConfig."""
    steps = member.step
    tokens = steps * member.config.batch_tokens
    loss, stderr = (None, None) if losses_W is None else mean_and_stderr(losses_W)
    rate = tokens / member.wall_s if member.wall_s > 0 else None
    per_token = model.flops_per_token(member.config.seq_len)
    return config_columns(member.config, dataset, model) | {
        "run_id": member.run_id, "trunk_id": member.trunk_id, "status": "done" if member.diverged_step is None else "diverged",
        "diverged_step": member.diverged_step, "steps": steps, "tokens": tokens, "unique_tokens": min(tokens, int(dataset.train.size)),
        "flops": per_token * tokens, "loss": loss, "loss_std_err": stderr, "loss_train": _finite(member.train_loss),
        "bits_per_byte": None if loss is None else loss / math.log(2) / dataset.bytes_per_token, "layout": layout,
        "wall_s": round(member.wall_s, 3), "tokens_per_s": rate, "mfu": None if rate is None else mfu(per_token, rate),
    }


def narrows(precision: PrecisionSpec) -> bool:
    """Whether forward and backward pass compute anything in less than float32."""
    quantized = any(quantizes(spec) for role in ROLES for spec in getattr(precision, role).both)
    return quantized or precision.dot_dtype != "float32" or precision.data_dtype not in (None, "float32") or precision.exemptions is not None or any(
        getattr(precision, role) is not None for role in ATTENTION_ROLES)


def measured(precision: PrecisionSpec, rows: list[dict], probe) -> dict:
    """The columns of what low precision did: to updates, over the logged steps of the last quarter, and to the gradients of a probe batch
    (a `step.Probe`, or None). Where nothing is narrower than float32 they are the exact ones."""
    logged = [row for row in rows if row.get("updates_per_ulp") is not None]
    last = [row for row in logged if row["step"] > 0.75 * logged[-1]["step"]] if logged else []

    def mean(name):
        values = [row[name] for row in last if row.get(name) is not None and math.isfinite(row[name])]
        return sum(values) / len(values) if values else None

    loses = loses_updates(precision)  # nothing to measure where weights are float32: null, not 1 and 0 (also of rows that have them)
    columns = {"edq": mean("edq") if loses else None, "lost_updates": mean("lost") if loses else None, "updates_per_ulp": mean("updates_per_ulp")}
    if probe is None:
        return columns if narrows(precision) else columns | {"gradient_cosine": 1.0, "gradient_magnitude": 1.0}
    columns |= {"gradient_cosine": _finite(probe.cosine), "gradient_magnitude": _finite(probe.magnitude)}
    quantized = quantized_roles(precision)  # a width of 32 measures a share of 0: that nothing is quantized is null
    return columns | {f"{role}_{what}": _finite(value) if quantized[role] else None for what in telemetry.LOSSES for role, value in getattr(probe, what).items()}


def precision_name(precision: PrecisionSpec) -> str:
    """The preset's name; for the `int` family the widths, so that a sweep's runs can be told apart by eye."""
    w, a = precision.weights.first, precision.activations.first
    if precision.name == "int" and w is not None and a is not None and w.format == a.format == "integer":
        if w.bits == a.bits:
            return precision.dot_dtype if w.bits == UNQUANTIZED_BITS else f"int{w.bits}"
        return f"int-w{w.bits}a{a.bits}"
    return precision.name
