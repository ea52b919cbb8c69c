"""`bitlaw plan FIT.json --regions`: the tokens per parameter at which the best forward:backward precision changes, as a table and a map."""
from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from scaling.arguments import keyed, mixed
from scaling.files import check_target, write_whole
from scaling.inputs import refuse_input
from scaling.reach import MAX_REACH, reaches, refuse_far
from scaling.regions import BUDGETS, Scheme, boundary, spans
from scaling.result import Estimate, Fit

OWN = ("forward_speedup", "backward_speedup", "eff_N", "eff_D")
LOWEST, HIGHEST = 1.0, 1e5  # tokens per parameter
SUFFIXES = (".png", ".pdf", ".svg")
TITLES = {"training+inference": "N_max parameters may be served, and N_max D_max be trained, at the speed of the base precision",
          "training": "N is given, and N D may be trained, at the speed of the base precision"}


def run_regions(fit: Fit, arguments, console: Console) -> int:
    """Prints the table and writes the map. Returns the exit code. ValueError, one line, for schemes that cannot be compared."""
    from scaling.figures.region_map import base_loss
    from scaling.figures.sheet import baseline  # matplotlib, which a plan does without

    budget = arguments.regions
    if budget not in BUDGETS:
        raise ValueError(f"--regions {budget}: no budget; accepted: {', '.join(BUDGETS)}")
    if not {"N", "D"} <= set(fit.law.inputs):
        raise ValueError(f"--regions: needs a law of N and D; {fit.law.name} takes {', '.join(fit.law.inputs)}")
    if arguments.out:
        check_target(arguments.out, SUFFIXES)
    schemes = schemes_of(fit, arguments.scheme)
    at = baseline(fit, None, mixed(dict(arguments.fix)))
    sizes = sorted(arguments.sizes or _sizes(fit, schemes, budget))
    rows, limits = [], {}
    for size in sizes:
        limits[size] = _ratios(fit, schemes, size, budget, arguments.extrapolate)
        found = spans(base_loss(fit, fit.params, at), schemes, size, *limits[size], budget)
        for span, following in zip(found, [*found[1:], None], strict=True):
            end = following and _boundary(fit, at, schemes[span.best], schemes[following.best], size, budget)
            rows.append((size, schemes[span.best].name, span.low, span.high, end))
    console.print(_table(fit, rows, budget))
    for line in _facts(fit, schemes, rows, limits, budget, arguments.extrapolate):
        print(line)
    if arguments.out:
        print(f"written: {_draw(fit, schemes, at, sizes, limits, arguments)}")
    return 0


def schemes_of(fit: Fit, texts: Sequence[str]) -> list[Scheme]:
    """["FP4:FP8:forward_speedup=2,eff_N=0.64"] as schemes. ValueError for fewer than two, an unknown key, and numbers that are none."""
    inputs = [name for name in fit.law.inputs if name not in ("N", "D")]
    found = []
    for name, pairs in keyed(texts, "--scheme", bare=True).items():
        unknown = next((key for key in pairs if key not in (*OWN, *inputs)), None)
        if unknown:
            raise ValueError(f"--scheme {name}: {unknown!r} is no key; accepted: {', '.join((*OWN, *inputs))}")
        bad = next((key for key in OWN if key in pairs and not (isinstance(pairs[key], float) and 0 < pairs[key] < math.inf)), None)
        if bad:
            raise ValueError(f"--scheme {name}: {bad}={pairs[bad]}: need a positive number")
        for key in inputs:
            if key in pairs:
                refuse_input(fit.law, key, pairs[key], f"--scheme {name}")
        found.append(Scheme(name, **{key: pairs[key] for key in OWN if key in pairs}, inputs={key: pairs[key] for key in inputs if key in pairs}))
    if len(found) < 2:
        raise ValueError("--regions: needs two schemes or more to choose from: --scheme FP8:FP8 --scheme FP4:FP8:forward_speedup=2,eff_N=0.64")
    return found


def _sizes(fit: Fit, schemes: Sequence[Scheme], budget: str) -> list[float]:
    """The powers of ten from the smallest fitted size to the largest that may be predicted; the fitted ends where there is none."""
    low, high = fit.ranges["N"]
    largest = high * MAX_REACH / max(scheme.growth(budget)[0] for scheme in schemes)
    return [10.0**power for power in range(math.ceil(math.log10(low)), math.floor(math.log10(largest)) + 1)] or [low, high]


def _ratios(fit: Fit, schemes: Sequence[Scheme], size: float, budget: str, extrapolate: bool) -> tuple[float, float]:
    """The tokens per parameter that may be looked at for a size: those that keep every scheme's training within 30 times of what was fitted."""
    low, high = LOWEST, HIGHEST
    if extrapolate:
        return low, high
    for larger, longer in (scheme.growth(budget) for scheme in schemes):
        refuse_far(fit.ranges, {"N": size * larger}, "plan")
        for name, per_ratio in (("D", size * longer), ("N*D", size * size * larger * longer)):
            least, most = fit.ranges[name]
            low, high = max(low, least / MAX_REACH / per_ratio), min(high, most * MAX_REACH / per_ratio)
    if not low < high:
        raise ValueError(f"plan: at {size:g} parameters no number of tokens is within {MAX_REACH:g} times of the fitted range (--extrapolate, or "
                         "extrapolate=True in Python, goes further)")
    return low, high


def _boundary(fit: Fit, at, below: Scheme, above: Scheme, size: float, budget: str) -> Estimate:
    """The end of a span with its interval: where the two schemes change places under other constants, near or far."""
    from scaling.figures.region_map import base_loss

    def ends(params) -> float:
        try:
            return boundary(base_loss(fit, params, at), below, above, size, 1e-3 * LOWEST, 1e3 * HIGHEST, budget)
        except ValueError:  # under these constants they never do
            return math.nan
    ends.__name__ = "boundary"
    return fit.estimate(ends)


def _table(fit: Fit, rows: list[tuple], budget: str) -> Table:
    made = Table(title=f"{fit.label}: the scheme of the lowest loss; {TITLES[budget]}", title_justify="left")
    for name, justify in (("N (parameters)", "right"), ("best scheme", "left"), ("from D/N", "right"), ("to D/N", "right"),
                          (f"{fit.level:.0%} interval of the boundary", "left")):
        made.add_column(name, justify=justify)
    last = None
    for size, name, low, high, end in rows:
        if last not in (None, size):
            made.add_section()
        told = "end of the range looked at" if end is None else f"{end.low:.4g} to {end.high:.4g}" if end.identified else end.reason
        made.add_row("" if size == last else f"{size:.4g}", name, f"{low:.4g}", f"{high:.4g}", told)
        last = size
    return made


def _facts(fit: Fit, schemes: Sequence[Scheme], rows: list[tuple], limits: dict, budget: str, extrapolate: bool) -> list[str]:
    """What each scheme is, what was looked at, and how far that lies from the runs."""
    lines = []
    for scheme in schemes:
        own = ", ".join(f"{key}={value}" for key, value in scheme.inputs.items())
        given = not own or (scheme.eff_N, scheme.eff_D) != (1.0, 1.0)
        told = [f"the law at {own}"] * bool(own) + [f"effN {scheme.eff_N:g}, effD {scheme.eff_D:g}, taken as exact"] * given
        lines.append(f"{scheme.name}: forward {scheme.forward_speedup:g}x, backward {scheme.backward_speedup:g}x, so training "
                     f"{scheme.training_speedup:.4g}x; {'; '.join(told)}")
    for size, (low, high) in limits.items():
        if not extrapolate and (low > LOWEST or high < HIGHEST):
            lines.append(f"{size:.4g} parameters: D/N from {low:.4g} to {high:.4g} is within {MAX_REACH:g} times of what was fitted; "
                         "--extrapolate looks further")
        lines += _beyond(fit, schemes, [row for row in rows if row[0] == size], size, budget)
    return lines


def _beyond(fit: Fit, schemes: Sequence[Scheme], rows: list[tuple], size: float, budget: str) -> list[str]:
    """How far what is trained lies from the runs, a line each: at every boundary of a size the two schemes that meet there; every scheme
    where there is none. A faster scheme trains more parameters or tokens than the budget's."""
    by_name = {scheme.name: scheme for scheme in schemes}
    lines = []
    for (_, name, _, ratio, _), (_, above, *_) in zip(rows, rows[1:], strict=False):
        for scheme in (by_name[name], by_name[above]):
            larger, longer = scheme.growth(budget)
            far = reaches(fit.ranges, {"N": size * larger, "D": size * ratio * longer})
            where = f"boundary at {ratio:.4g} tokens per parameter: {scheme.name} trains where "
            lines += [f"extrapolated: {where}{sentence}" for _, sentence in far.values()]
    for scheme in schemes if len(rows) == 1 else ():
        far = reaches(fit.ranges, {"N": size * scheme.growth(budget)[0]})
        lines += [f"extrapolated: {scheme.name} trains where {sentence}" for _, sentence in far.values()]
    return lines


def _draw(fit: Fit, schemes: Sequence[Scheme], at, sizes: list[float], limits: dict, arguments):
    """Writes the map from the smallest to the largest size, half a decade to each side of a single one, over the ratios looked at."""
    from scaling.figures.region_map import region_map
    from scaling.figures.sheet import PAPER

    margin = math.sqrt(10.0) if len(sizes) == 1 else 1.0
    ends = np.array(list(limits.values()))
    ratios = (10.0, 3000.0) if arguments.extrapolate else (float(ends[:, 0].min()), float(ends[:, 1].max()))
    figure = region_map(fit, schemes, (sizes[0] / margin, sizes[-1] * margin), ratios, at=at, budget=arguments.regions,
                        extrapolate=arguments.extrapolate)
    return write_whole(arguments.out, lambda partial: figure.savefig(partial, format=arguments.out.rsplit(".", 1)[1],
                                                                     dpi=PAPER["savefig.dpi"]), SUFFIXES)
