"""Composition: Hydra's groups and overrides to one config, and overrides that sweep to many.

Composing costs Hydra about 0.2 s. A sweep composes once for each combination of group choices and sets plain values in copies.
"""
from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from trainer.config.freeze import compose_preset, freeze
from trainer.config.frozen import TrainConfig
from trainer.config.schema import GROUPS, register_schemas


def config_dir() -> Path:
    """The configs/ tree: beside the packages, in a checkout as in an installed wheel."""
    return Path(__file__).resolve().parents[2] / "configs"


@contextlib.contextmanager
def hydra_ready(extra_dir: str | None = None) -> Iterator[list[str]]:
    """Hydra initialised on configs/; yields the overrides that add `extra_dir` (--config-dir) to its search path."""
    register_schemas()
    GlobalHydra.instance().clear()
    extra = []
    if extra_dir is not None:
        path = Path(extra_dir).resolve()
        if not path.is_dir():
            raise ValueError(f"--config-dir={extra_dir} is not a folder; accepted: a folder laid out like configs/ (model/, precision/, ...)")
        extra = [f"hydra.searchpath=[file://{path}]"]
    with initialize_config_dir(config_dir=str(config_dir()), version_base="1.3"):
        yield extra


def parse(overrides: list[str]) -> list[Override]:
    """Overrides in Hydra's grammar; ValueError for what is not `key=value`."""
    return [_parse(override) for override in overrides]


@functools.lru_cache(maxsize=1 << 16)
def _parse(override: str) -> Override:
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(override)
    except HydraException as error:
        key, equals, value = override.partition("=")
        if equals and value and not set(value) & set("'\",[](){}"):  # Hydra's grammar has no umlauts; a path may
            with contextlib.suppress(HydraException):
                return OverridesParser.create().parse_override(f"{key}='{value}'")
        raise ValueError(f"{override!r} is not an override; accepted: key=value ({str(error).splitlines()[0]})") from None


def axes(overrides: list[str]) -> list[list[str]]:
    """For each override the list of what it takes: one entry, or one per value of a sweep (`a=1,2`, `range(0,5)`, `choice(..)`)."""
    parsed = parse(overrides)
    return [[f"{o.get_key_element()}={value}" for value in o.sweep_string_iterator()] if o.is_sweep_override() else [o.input_line] for o in parsed]


class Composer:
    """Composes configs inside `hydra_ready`, each combination of group choices once."""

    def __init__(self, extra: list[str] = ()):
        self._extra = list(extra)
        self._groups = set(GROUPS)
        self._cache: dict[tuple[str, ...], _Composed] = {}
        self._presets: dict[str, dict] = {}

    def config(self, overrides: list[str]) -> DictConfig:
        """The composed config. Group choices, additions and deletions go through Hydra; plain values are set in a copy."""
        composed, values = self._composed(overrides)
        return composed.with_values(values)

    def freeze(self, overrides: list[str]) -> TrainConfig:
        """The frozen config of one run."""
        composed, values = self._composed(overrides)
        return freeze(composed.plain_with_values(values), self.preset)

    def preset(self, name: str) -> dict:
        """A precision as it is composed by itself, from the same folders."""
        if name not in self._presets:
            self._presets[name] = compose_preset(name, self._extra)
        return self._presets[name]

    def _composed(self, overrides: list[str]) -> tuple[_Composed, list[Override]]:
        hydra_part, values = [], []
        for override in parse(overrides):
            plain = override.type.name == "CHANGE" and override.key_or_group not in self._groups and override.package is None
            (values if plain else hydra_part).append(override)
        lines = tuple(o.input_line for o in hydra_part)
        if lines not in self._cache:
            self._cache[lines] = _Composed(compose("train", overrides=[*self._extra, *lines]))
        return self._cache[lines], values


REFERENCE = re.compile(r"\$\{([\w.]+)\}")  # to another key, from the root


class _Composed:
    """A combination of group choices. OmegaConf takes a tenth of a second to copy and to walk a config, so of a thousand runs it sees each
    value once, to convert it or to refuse it, and the configs themselves are plain dicts."""

    def __init__(self, config: DictConfig):
        self._config = config
        self._scratch: DictConfig | None = None
        self._values: dict[str, object] = {}
        self._plain = OmegaConf.to_container(config)
        if "???" in (leaves := list(_leaves(self._plain))) or any("${" in leaf and not REFERENCE.fullmatch(leaf) for leaf in leaves):
            self._plain = None  # OmegaConf's to refuse, or to resolve

    def with_values(self, values: list[Override]) -> DictConfig:
        config = self._config.copy()
        for override in values:
            OmegaConf.update(config, override.key_or_group, override.value(), merge=False)
        return config

    def plain_with_values(self, values: list[Override]) -> dict:
        """The same, resolved, as plain dicts and lists."""
        if self._plain is None:
            return OmegaConf.to_container(self.with_values(values), resolve=True, throw_on_missing=True)
        found = _copy(self._plain)
        for override in values:
            *parents, last = override.key_or_group.split(".")
            if "${" in override.input_line or not all(part.isidentifier() for part in (*parents, last)):
                return OmegaConf.to_container(self.with_values(values), resolve=True, throw_on_missing=True)
            value = self._converted(override)
            target = found
            for parent in parents:
                target = target[parent]
            target[last] = _copy(value)
        return _resolved(found, found)

    def _converted(self, override: Override):
        """The value as its schema has it, as plain objects. OmegaConf's error for one that it refuses."""
        if override.input_line not in self._values:
            if self._scratch is None:
                self._scratch = self._config.copy()
            OmegaConf.update(self._scratch, override.key_or_group, override.value(), merge=False)
            value = OmegaConf.select(self._scratch, override.key_or_group)
            self._values[override.input_line] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        return self._values[override.input_line]


def _leaves(value) -> Iterator[str]:
    """The strings in plain dicts and lists."""
    if isinstance(value, str):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _leaves(item)


def _resolved(value, root: dict):
    """With the values that references stand for."""
    if isinstance(value, dict):
        return {key: _resolved(item, root) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolved(item, root) for item in value]
    if isinstance(value, str) and (reference := REFERENCE.fullmatch(value)):
        return _resolved(functools.reduce(lambda found, part: found[part], reference[1].split("."), root), root)
    return value


def _copy(value):
    """Plain dicts and lists, copied through."""
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value
