"""Data sets by name. A plugin adds one with `@register("mine")` before the config is frozen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from trainer.data.dataset import Dataset

Loader = Callable[[Any], Dataset]
_F = TypeVar("_F", bound=Loader)

_loaders: dict[str, Loader] = {}


def register(name: str) -> Callable[[_F], _F]:
    """Decorator: makes `loader(data) -> Dataset` what `data=name` loads. ValueError when the name is taken."""

    def add(loader: _F) -> _F:
        if name in _loaders:
            raise ValueError(f"data={name} is already registered by {_loaders[name].__module__}; choose another name")
        _loaders[name] = loader
        return loader

    return add


def names() -> tuple[str, ...]:
    """The registered names, sorted."""
    return tuple(sorted(_loaders))


def load(data: Any) -> Dataset:
    """Loads, preparing it first where that has not been done, the data set that a config names.

    Args:
      data: any object with the attributes name, paths (tuple of str), tokenizer (str or None), validation_fraction,
        vocab_size, order, tokens, seed. A loader reads those that concern it.

    Raises:
      ValueError: one line, for an unknown name or a value that the loader cannot use.
    """
    if data.name not in _loaders:
        raise ValueError(f"data.name={data.name!r} is not known; known: {', '.join(names())}")
    return _loaders[data.name](data)


def check_fraction(fraction: float) -> None:
    """Refuses a validation fraction that leaves either part empty."""
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"data.validation_fraction={fraction!r} must lie between 0 and 1, both excluded")
