"""freeze: composed Hydra config -> validated `TrainConfig`. Every refusal is one line: key, value, what would be accepted."""
from __future__ import annotations

import dataclasses
import functools
import importlib
import typing
from collections.abc import Callable

from omegaconf import DictConfig, OmegaConf

from trainer.config import frozen
from trainer.config.checks import in_range, one_of
from trainer.config.blocks import check_blocks
from trainer.config.precision import HIGH, freeze_precision
from trainer.config.schema import TrainSchema
from trainer.mirrors import MIRRORS
from trainer.data import registry as data_registry
from trainer.optimizers import OPTIMIZERS
from trainer.precision import check_place
from trainer.schedules import SCHEDULES
from trainer.sharding import Sharding

LR_RULES = ("mup", "constant")
MAX_STEPS = 2**31 - 1  # steps are int32


def load_plugins(names) -> None:
    """Imports the user's modules, which register formats, data, optimizers and laws by name."""
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ValueError(f"plugins={name} cannot be imported ({error}); accepted: the name of a module on PYTHONPATH") from None


def compose_preset(name: str, extra=()) -> dict:
    """configs/precision/NAME.yaml as it is composed by itself; Hydra is initialised wherever a config is frozen. extra: overrides that add to
    its search path. ValueError for one that is not there."""
    from hydra import compose
    from hydra.errors import HydraException

    try:
        composed = compose("train", overrides=[*extra, f"precision={name}"]).precision
    except HydraException:
        raise ValueError(f"no such precision; accepted: {HIGH}, or a name that precision= takes") from None
    return OmegaConf.to_container(composed, resolve=True)


def freeze(config: DictConfig | dict, preset: Callable[[str], dict] = compose_preset) -> frozen.TrainConfig:
    """The frozen config of one run, composed or as plain dicts. preset: what a precision that an exemption names is. ValueError in one line for an unknown name or an
    impossible value."""
    c = config if isinstance(config, dict) else OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    _check_keys("", c, TrainSchema)
    load_plugins(c["plugins"])
    model = _model(c["model"])
    batch_tokens = in_range("batch_size", c["batch_size"], 1) * in_range("seq_len", c["seq_len"], 2)
    in_range("accumulate", c["accumulate"], 1)
    if c["batch_size"] % c["accumulate"]:
        raise ValueError(f"accumulate={c['accumulate']} does not divide batch_size={c['batch_size']}; accepted: a divisor of it")
    steps = _steps(c, model, batch_tokens)
    return frozen.TrainConfig(
        model=model,
        precision=_precision(c["precision"], model, batch_tokens // c["accumulate"], c["seq_len"], c["optimizer"]["name"], steps, c["data"]["vocab_size"], preset),
        optimizer=_optimizer(c["optimizer"]),
        schedule=_schedule(c["schedule"], steps),
        data=_data(c["data"]),
        seed=in_range("seed", c["seed"], 0, 2**32 - 1),
        steps=steps,
        batch_size=c["batch_size"],
        seq_len=c["seq_len"],
        accumulate=c["accumulate"],
        eval_sequences=in_range("eval.sequences", c["eval"]["sequences"], 2),
        divergence_margin=in_range("divergence_margin", c["divergence_margin"], 0.0),
        options=_options(c),
        **_init_from(c["init_from"]),
    )


def _check_keys(prefix: str, content: dict, schema) -> None:
    """Refuses what Hydra's `+key` and `~key` can do to a config: a key that no schema has, or one that is missing."""
    known = _hints(schema)
    for key in sorted(content.keys() ^ known.keys()):
        problem = " is missing" if key in known else f"={content[key]} is not a key"
        raise ValueError(f"{prefix}{key}{problem}; accepted keys: {', '.join(known)}")
    for key, kind in known.items():
        if dataclasses.is_dataclass(kind):
            _check_keys(f"{prefix}{key}.", content[key], kind)


@functools.cache
def _hints(schema) -> dict:
    return typing.get_type_hints(schema)


def _model(m: dict) -> frozen.ModelSpec:
    for key in ("num_layers", "d_model", "num_heads", "d_ff"):
        in_range(f"model.{key}", m[key], 1)
    if m["d_model"] % (2 * m["num_heads"]):
        raise ValueError(f"model.num_heads={m['num_heads']}: rotary heads need an even width; accepted: a divisor of d_model/2 = {m['d_model'] // 2}")
    return frozen.ModelSpec(**m)


def _precision(p: dict, model: frozen.ModelSpec, tokens: int, seq_len: int, optimizer: str, steps: int, vocab_size: int, preset) -> frozen.PrecisionSpec:
    """tokens: of a micro-batch."""
    from trainer.model import ATTENTION, SITES  # the model is above config in everything else

    for place in p["exemptions"]:
        try:
            check_place(place, model.num_layers, (*SITES, ATTENTION))
        except ValueError as error:
            raise ValueError(f"precision.exemptions.{place}: {error}") from None
    precision = freeze_precision(p["name"], p, preset)
    check_blocks(precision, model, tokens, seq_len, vocab_size)
    if precision.ramp_steps is not None and (end := precision.ramp_steps + precision.ramp_stagger * (model.num_layers - 1)) > steps:
        raise ValueError(f"precision.ramp_steps={precision.ramp_steps} with ramp_stagger={precision.ramp_stagger} and {model.num_layers} layers is over after {end} updates, "
                         f"and the run takes {steps}; accepted: a ramp within it, since a model that is not quantized whole is not the one that is deployed")
    if precision.optimizer_arithmetic is not None and optimizer != "adamw":
        raise ValueError(f"precision.optimizer_arithmetic={precision.optimizer_arithmetic} is of AdamW, and optimizer.name={optimizer}; accepted with it: optimizer=adamw")
    return precision


def _init_from(path: str | None) -> dict:
    """The fields that say which run's parameters are the first ones."""
    from trainer.fine_tune import source_run  # reads run folders, which is above config in everything else

    return {} if path is None else dict(zip(("init_from", "init_run"), source_run(path)))


def _non_embedding_params(model: frozen.ModelSpec) -> int:
    from trainer.build import model_config  # build is above config in everything else

    return model_config(model, None, vocab_size=2).num_params


def _steps(c: dict, model: frozen.ModelSpec, batch_tokens: int) -> int:
    """Optimizer steps from whichever of steps, tokens, tokens_per_param is given."""
    given = {key: c[key] for key in ("steps", "tokens", "tokens_per_param") if c[key] is not None}
    if len(given) != 1:
        shown = ", ".join(f"{key}={value}" for key, value in given.items()) or "none of them"
        raise ValueError(f"{shown} is given; accepted: exactly one of steps, tokens, tokens_per_param (null unsets one)")
    (key, value), = given.items()
    in_range(key, value, 1 if key == "steps" else 1e-9)
    tokens = {"steps": lambda: value * batch_tokens, "tokens": lambda: value, "tokens_per_param": lambda: value * _non_embedding_params(model)}[key]()
    if tokens / batch_tokens > MAX_STEPS:
        raise ValueError(f"{key}={value} is not possible; accepted: what makes at most {MAX_STEPS} steps of {batch_tokens} tokens")
    return max(1, round(tokens / batch_tokens))


def _optimizer(o: dict) -> frozen.OptimizerSpec:
    one_of("optimizer.name", o["name"], OPTIMIZERS)
    one_of("optimizer.lr_rule", o["lr_rule"], LR_RULES)
    in_range("optimizer.lr", o["lr"], 0.0, 1e3)
    in_range("optimizer.base_width", o["base_width"], 1)
    for key in ("beta1", "beta2"):
        in_range(f"optimizer.{key}", o[key], 0.0, 1.0 - 1e-9, "0 up to, not including, 1")
    in_range("optimizer.eps", o["eps"], 0.0)
    in_range("optimizer.weight_decay", o["weight_decay"], 0.0)
    if o["clip_norm"] is not None:
        in_range("optimizer.clip_norm", o["clip_norm"], 1e-30, accepted="a positive number, or null for no clipping")
    return frozen.OptimizerSpec(**o)


def _schedule(s: dict, steps: int) -> frozen.ScheduleSpec:
    one_of("schedule.name", s["name"], SCHEDULES)
    in_range("schedule.warmup_steps", s["warmup_steps"], 0)
    in_range("schedule.cooldown_fraction", s["cooldown_fraction"], 0.0, 1.0)
    in_range("schedule.final_factor", s["final_factor"], 0.0, 1.0)
    # A run shorter than its warm-up and cool-down together keeps the cool-down and gives up warm-up.
    cooldown = round(s["cooldown_fraction"] * steps)
    return frozen.ScheduleSpec(s["name"], min(s["warmup_steps"], steps - cooldown), cooldown, s["final_factor"])


def _data(d: dict) -> frozen.DataSpec:
    one_of("data.name", d["name"], data_registry.names())
    in_range("data.validation_fraction", d["validation_fraction"], 1e-6, 0.5)
    in_range("data.vocab_size", d["vocab_size"], 2)
    in_range("data.order", d["order"], 0)
    in_range("data.tokens", d["tokens"], 1000)
    return frozen.DataSpec(**{**d, "paths": tuple(d["paths"])})


def _options(c: dict) -> frozen.Options:
    for key in ("log_every", "steps_per_dispatch"):
        in_range(key, c[key], 1)
    in_range("telemetry_every", c["telemetry_every"], 0, MAX_STEPS)
    if c["host_devices"] is not None:
        in_range("host_devices", c["host_devices"], 1, 1024)
    if c["sharding"] is not None:
        one_of("sharding", c["sharding"], Sharding)
    elif c["distributed"]:
        raise ValueError(f"distributed=true with sharding=null leaves nothing to share; accepted: sharding={' or '.join(s.value for s in Sharding)}")
    for key in ("eval.every_steps", "checkpoint.every_steps"):
        group, name = key.split(".")
        if c[group][name] is not None:
            in_range(key, c[group][name], 1)
    in_range("checkpoint.keep", c["checkpoint"]["keep"], 1)
    in_range("checkpoint.every_seconds", c["checkpoint"]["every_seconds"], 0.0)
    one_of("logger.name", c["logger"]["name"], MIRRORS)
    if not c["sweep"] or "/" in c["sweep"] or c["sweep"].startswith("."):
        raise ValueError(f"sweep={c['sweep']!r} is not a folder name; accepted: letters, digits, '-', '_' and '.' inside")
    return frozen.Options(
        runs_dir=c["runs_dir"], sweep=c["sweep"], logger=c["logger"]["name"],
        eval_every_steps=c["eval"]["every_steps"], checkpoint_seconds=c["checkpoint"]["every_seconds"],
        checkpoint_steps=c["checkpoint"]["every_steps"], checkpoint_keep=c["checkpoint"]["keep"], log_every=c["log_every"],
        telemetry_every=c["telemetry_every"], probe=c["probe"],
        steps_per_dispatch=c["steps_per_dispatch"], host_devices=c["host_devices"], sharding=c["sharding"], distributed=c["distributed"],
        plugins=tuple(c["plugins"]), compile_cache=c["compile_cache"],
    )
