"""What `bitlaw plan` prints: the plan as a table, the best of each precision below it, then what to know before believing it."""
from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from scaling.arguments import keyed, mixed
from scaling.plan import Plan, plan
from scaling.result import load

HOUR = 3600.0


def run_plan(arguments, console: Console) -> int:
    """`bitlaw plan` after its arguments are parsed. Returns the exit code. ValueError, one line, for what cannot be planned."""
    _refuse_mixed(arguments)
    fit = load(arguments.fit)
    if arguments.regions:
        from scaling.regions_text import run_regions
        return run_regions(fit, arguments, console)
    if arguments.next:
        from scaling.next_text import run_next
        return run_next(fit, arguments, console)
    made = plan(fit, compute=arguments.compute, cost_model=arguments.cost_model or "bits", fix=_fixed(arguments.fix), bits=arguments.bits,
                precisions=keyed(arguments.precision, "--precision") or None, inference_tokens=arguments.inference_tokens, memory=arguments.memory,
                extrapolate=arguments.extrapolate)
    console.print(plan_table(made))
    if made.frontier:
        console.print(frontier_table(made))
    for line in facts(made):
        print(line)
    return 0


REGIONS, NEXT, PLAN = ("scheme", "sizes", "out"), ("at", "candidates", "count"), ("compute", "bits", "precision", "inference_tokens", "memory")


def _refuse_mixed(arguments) -> None:
    """ValueError for options that say nothing beside the others."""
    asked = [name for name in ("regions", "next") if getattr(arguments, name)]
    if len(asked) > 1:
        raise ValueError("plan: --regions and --next are two questions; ask one")
    foreign = {"regions": (*NEXT, *PLAN, "cost_model"), "next": (*REGIONS, *PLAN, "fix")}.get(*asked, "") if asked else (*REGIONS, *NEXT)
    given = next((name for name in foreign if getattr(arguments, name)), None)
    if given:
        home = "--regions" if given in REGIONS else "--next" if given in NEXT else "a plan"
        raise ValueError(f"plan: --{given.replace('_', '-')} belongs to {home}" + (f", not to --{asked[0]}" if asked else ": it says nothing here"))


def _fixed(pairs: Mapping[str, str]) -> dict:
    fixed = mixed(dict(pairs))
    bad = next((name for name in ("N", "D") if isinstance(fixed.get(name), str)), None)
    if bad:
        raise ValueError(f"--fix {bad}={fixed[bad]}: not a number")
    return fixed


def plan_table(made: Plan) -> Table:
    """N, D, D/N, bits, loss, with intervals and units."""
    budget = "" if made.compute is None else f", {made.compute:.4g} FLOP"
    table = Table(title=f"{made.law}{budget}, cost model {made.model.name}", title_justify="left")
    for name, justify in (("", "left"), ("value", "right"), (f"{made.level:.0%} interval", "left"), ("unit", "left")):
        table.add_column(name, justify=justify)
    rows = [("N", made.N, "parameters"), ("D", made.D, "tokens"), ("D/N", made.tokens_per_param, "tokens per parameter")]
    rows += [("bits", made.bits, "bits")] if made.bits else []
    rows += [("D_crit", made.critical_tokens, "tokens, beyond which more harm")] if made.critical_tokens else []
    for name, number, unit in (*rows, ("loss", made.loss, f"{made.unit}, interval of one run")):
        interval = "the same in all" if number.low == number.high else f"{number.low:.4g} to {number.high:.4g}"
        table.add_row(name, f"{number.value:.5g}", interval, unit)
    return table


def frontier_table(made: Plan) -> Table:
    """A row for each precision: the best N and D that it can have, and their loss."""
    shared = made.frontier[0].share is not None
    table = Table(title="the best of each precision", title_justify="left")
    for name in ("precision", "N (parameters)", "D (tokens)", f"loss ({made.unit})", *(["best in resamples"] if shared else [])):
        table.add_column(name, justify="left" if name == "precision" else "right")
    for row in made.frontier:
        cells = (row.name, f"{row.N:.4g}", f"{row.D:.4g}", f"{row.loss:.5g}")
        table.add_row(*cells, *([f"{row.share:.0%}"] if shared else []))
    return table


def facts(made: Plan) -> list[str]:
    """Precision, cost, extrapolation and notes, a line each."""
    listed = ", ".join(f"{name}={value:.4g}" if isinstance(value, (int, float)) else f"{name}={value}" for name, value in made.precision.items())
    lines = [f"precision: {listed}"] if listed else []
    lines.append(f"cost {made.cost:.4g} FLOP of 16 bits ({made.model.about})")
    if made.device_seconds is not None:
        lines.append(f"{made.device_seconds / HOUR:.4g} device hours of {made.model.name} at its dense peak, longer by 1/utilisation "
                     f"({made.model.source})")
    lines += [f"extrapolated: {sentence}" for _, sentence in made.reach.values()]
    return lines + [f"note: {note}" for note in made.notes]
