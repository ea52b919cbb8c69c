"""Composition: Hydra's groups and overrides to one config, and overrides that sweep to many.

Composing costs Hydra about 0.2 s. A sweep composes once for each combination of group choices and sets plain values in copies.
"""
from __future__ import annotations

import contextlib
import itertools
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
    from hydra.errors import OverrideParseException

    try:
        return OverridesParser.create().parse_overrides(overrides)
    except OverrideParseException as error:
        raise ValueError(f"{error.override!r} is not an override; accepted: key=value ({str(error).splitlines()[0]})") from None


def axes(overrides: list[str]) -> list[list[str]]:
    """For each override the list of what it takes: one entry, or one per value of a sweep (`a=1,2`, `range(0,5)`, `choice(..)`)."""
    parsed = parse(overrides)
    return [[f"{o.get_key_element()}={value}" for value in o.sweep_string_iterator()] if o.is_sweep_override() else [o.input_line] for o in parsed]


class Composer:
    """Composes configs inside `hydra_ready`, each combination of group choices once."""

    def __init__(self, extra: list[str] = ()):
        self._extra = list(extra)
        self._groups = set(GROUPS)
        self._cache: dict[tuple[str, ...], DictConfig] = {}
        self._presets: dict[str, dict] = {}

    def config(self, overrides: list[str]) -> DictConfig:
        """The composed config. Group choices, additions and deletions go through Hydra; plain values are set in a copy."""
        hydra_part, values = [], []
        for override in parse(overrides):
            plain = override.type.name == "CHANGE" and override.key_or_group not in self._groups and override.package is None
            (values if plain else hydra_part).append(override)
        lines = tuple(o.input_line for o in hydra_part)
        if lines not in self._cache:
            self._cache[lines] = compose("train", overrides=[*self._extra, *lines])
        config = self._cache[lines].copy()
        for override in values:
            OmegaConf.update(config, override.key_or_group, override.value(), merge=False)
        return config

    def freeze(self, overrides: list[str]) -> TrainConfig:
        """The frozen config of one run."""
        return freeze(self.config(overrides), self.preset)

    def preset(self, name: str) -> dict:
        """A precision as it is composed by itself, from the same folders."""
        if name not in self._presets:
            self._presets[name] = compose_preset(name, self._extra)
        return self._presets[name]


def expand(axis_lists: list[list[str]]) -> list[list[str]]:
    """The product of axes: one list of overrides per run."""
    return [list(combination) for combination in itertools.product(*axis_lists)]
