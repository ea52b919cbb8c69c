"""A sweep as data: configs/sweep/NAME.yaml and the overrides of the command line, to the overrides of every run.

    common: data=stdlib seq_len=64            # overrides of all runs
    runs:                                     # lines, each a product of overrides, as on the command line; the sweep is their union
      - model=2k precision.bits=2,3,4
    axes:                                     # a product of values, with every line
      seed: range(4)
      tokens_per_param: [5, 10, 20]
    zip:                                      # values that go together, one after the other
      - {model: [10k, 25k], optimizer.lr: [0.01, 0.006]}
    exclude:                                  # runs that meet all conditions of a line are left out
      - model=25k precision.bits=2
      - flops>1e12
    budget_flops: 1e15                        # a sweep that needs more is refused
"""
from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from trainer import build
from trainer.config import Composer, TrainConfig, axes, config_dir, hydra_ready

KEYS = ("common", "runs", "axes", "zip", "exclude", "budget_flops")
CONDITION = re.compile(r"([A-Za-z_][\w.]*)(<=|>=|!=|<|>|=)(.+)")
# What conditions may ask for beyond the keys of a config.
DERIVED: dict[str, Callable[[TrainConfig], float]] = {
    "n_params": lambda c: _model(c).num_params, "tokens": lambda c: c.tokens, "steps": lambda c: c.steps,
    "flops": lambda c: c.tokens * _model(c).flops_per_token(c.seq_len),
}  # fmt: skip
BYTES = 256  # the vocabulary of data that do not say theirs before they are loaded

Axis = list[tuple[str, ...]]  # what one axis adds to a run: one of these groups of overrides


@dataclass(frozen=True)
class Definition:
    """Axes of every line (a run takes one entry of each axis), conditions of runs that are left out, and FLOPs that must do (None: any)."""

    lines: tuple[tuple[Axis, ...], ...] = ((),)
    exclude: tuple[tuple[tuple[str, str, str], ...], ...] = ()
    budget_flops: float | None = None

    def with_overrides(self, overrides: list[str]) -> Definition:
        """With the command line's overrides in place of those of the same keys."""
        later, own = {_key(override) for override in overrides}, _axes_of(overrides)
        lines = []
        for line in self.lines:
            kept = [[tuple(o for o in entry if _key(o) not in later) for entry in axis] for axis in line]
            lines.append((*(axis for axis in kept if any(axis)), *own))
        return Definition(tuple(lines), self.exclude, self.budget_flops)

    def runs(self) -> list[list[str]]:
        """The overrides of every run."""
        return [list(itertools.chain.from_iterable(entries)) for line in self.lines for entries in itertools.product(*line)]


def names(extra_dir: str | None = None) -> list[str]:
    """The sweeps that there are."""
    return sorted({path.stem for folder in _folders(extra_dir) for path in (folder / "sweep").glob("*.yaml")})


def read(name: str, extra_dir: str | None = None) -> Definition:
    """configs/sweep/NAME.yaml. ValueError, one line, for a name that is not known or a file that says something else than sweeps do."""
    for folder in _folders(extra_dir):
        path = folder / "sweep" / f"{name}.yaml"
        if path.exists():
            return _definition(path, OmegaConf.to_container(OmegaConf.load(path)))
    raise ValueError(f"sweep={name} is not known; accepted: {', '.join(names(extra_dir))}, or overrides with several values")


def compose(name: str | None, overrides: list[str], extra_dir: str | None = None) -> list[TrainConfig]:
    """The frozen config of every run. ValueError for an axis that names nothing, and a budget that does not do."""
    definition = (read(name, extra_dir) if name else Definition()).with_overrides(overrides)
    label = f"sweep={name or 'adhoc'}"
    with hydra_ready(extra_dir) as extra:
        composer = Composer(extra)
        configs = [config for run in definition.runs() if not _excluded(run, config := composer.freeze([label, *run]), definition.exclude)]
    if not configs:
        raise ValueError(f"sweep={name or 'adhoc'} has no runs left: exclude leaves out all of them")
    needed = sum(DERIVED["flops"](config) for config in configs)
    if definition.budget_flops is not None and needed > definition.budget_flops:
        raise ValueError(f"sweep={name} takes {needed:.3g} FLOPs, more than its budget_flops={definition.budget_flops:.3g}; accepted: fewer or shorter runs, or a larger budget")
    return configs


def _model(config: TrainConfig):
    return build.model_config(config.model, config.optimizer, config.data.vocab_size or BYTES)


def _folders(extra_dir: str | None) -> list[Path]:
    return [config_dir(), *([Path(extra_dir)] if extra_dir else [])]


def _key(override: str) -> str:
    return override.partition("=")[0]


def _axes_of(overrides: list[str]) -> tuple[Axis, ...]:
    """An axis for each override, in Hydra's sweep syntax."""
    return tuple([(value,) for value in values] for values in axes(overrides))


def _definition(path: Path, content) -> Definition:
    if not isinstance(content, dict) or not content or set(content) - set(KEYS):
        unknown = sorted(set(content) - set(KEYS))[0] if isinstance(content, dict) and content else content
        raise ValueError(f"{path}: {unknown!r} is not of a sweep; accepted: {', '.join(KEYS)}, such as `runs:` with a list of lines like 'model=10k,25k seed=0,1'")
    lines = content.get("runs", [""])
    common = content.get("common", "")
    if not isinstance(lines, list) or not lines or not all(isinstance(line, str) for line in (*lines, common)):
        raise ValueError(f"{path} must hold `runs:` with a list of lines such as 'model=10k,25k seed=0,1', maybe `common:` with overrides of all of them")
    own = _axes_of([f"{key}={_values(value)}" for key, value in _mapping(path, "axes", content.get("axes", {})).items()])
    zips = tuple(_zip(path, entry) for entry in content.get("zip", []))
    shared, found = _words(path, common), []
    twice = {_key(word) for line in (common, *lines) for word in _words(path, line)} & {_key(override) for axis in (*own, *zips) for entry in axis for override in entry}
    if twice:
        raise ValueError(f"{path}: {sorted(twice)[0]} is in a line and in axes or zip; accepted: in one of them")
    for line in lines:
        words = _words(path, line)
        later = {_key(word) for word in words}
        found.append((*_axes_of([*(word for word in shared if _key(word) not in later), *words]), *own, *zips))
    exclude = content.get("exclude", [])
    if not isinstance(exclude, list):
        raise ValueError(f"{path}: exclude={exclude!r} must be a list of lines such as 'model=25k precision.bits=2'")
    budget = content.get("budget_flops")
    if budget is not None and not (isinstance(budget, (int, float)) and budget > 0):
        raise ValueError(f"{path}: budget_flops={budget!r} must be a number above 0")
    return Definition(tuple(found), tuple(_conditions(path, str(line)) for line in exclude), budget)


def _mapping(path: Path, key: str, content) -> dict:
    if not isinstance(content, dict):
        raise ValueError(f"{path}: {key}={content!r} must map keys to values, such as {{seed: range(4), model: [10k, 25k]}}")
    return content


def _values(value) -> str:
    """Values as Hydra writes a sweep."""
    items = value if isinstance(value, list) else [value]
    return ",".join("null" if item is None else str(item).lower() if isinstance(item, bool) else str(item) for item in items)


def _zip(path: Path, entry) -> Axis:
    columns = [values[0] if len(values) == 1 else values for values in
               ([[one for (one,) in axis] for axis in _axes_of([f"{key}={_values(value)}"])] for key, value in _mapping(path, "zip", entry).items())]
    lengths = {len(column) for column in columns}
    if len(lengths) != 1:
        raise ValueError(f"{path}: zip has {', '.join(f'{len(c)} values of {_key(c[0])}' for c in columns) or 'nothing'}; accepted: as many of each")
    return list(zip(*columns, strict=True))


def _words(path: Path, line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError as error:
        raise ValueError(f"{path}: {line!r} cannot be read ({error}); accepted: overrides as on the command line") from None


def _conditions(path: Path, line: str) -> tuple[tuple[str, str, str], ...]:
    found = []
    for word in _words(path, line):
        match = CONDITION.fullmatch(word)
        if match is None:
            raise ValueError(f"{path}: exclude has {word!r}; accepted: KEY=V1,V2, KEY!=V, KEY<NUMBER, KEY>=NUMBER and so on, of keys and of {', '.join(DERIVED)}")
        found.append(match.groups())
    return tuple(found)


def _excluded(run: list[str], config: TrainConfig, exclude) -> bool:
    given = dict(override.split("=", 1) for override in run if "=" in override)
    return any(all(_holds(condition, given, config) for condition in line) for line in exclude)


def _holds(condition: tuple[str, str, str], given: dict[str, str], config: TrainConfig) -> bool:
    """Whether a run meets a condition. ValueError for a key that the run does not set and that is not derived, or for what is no number."""
    key, relation, wanted = condition
    if key in DERIVED:
        value = DERIVED[key](config)
    elif key in given:
        value = given[key]
    else:
        raise ValueError(f"exclude asks for {key}, which no line of the sweep sets; accepted: the keys that it sets, and {', '.join(DERIVED)}")
    if relation in ("=", "!="):
        return any(_same(value, one) for one in wanted.split(",")) == (relation == "=")
    try:
        left, right = float(value), float(wanted)
    except ValueError:
        raise ValueError(f"exclude compares {key}={value} with {wanted}; accepted: numbers") from None
    return {"<": left < right, ">": left > right, "<=": left <= right, ">=": left >= right}[relation]


def _same(value, wanted: str) -> bool:
    try:
        return float(value) == float(wanted)
    except ValueError:
        return str(value) == wanted
