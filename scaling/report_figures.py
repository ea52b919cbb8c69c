"""Which figures a set of runs can carry, with their captions. The drawing itself is in `plots`."""
from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from scaling import page
from scaling.analysis import Analysis
from scaling.result import MAX_CONDITION, Fit
from scaling.searches import TUNED, searches
from scaling.statistics import columns_of, paired_gaps
from scaling.summary import noise_level
from scaling.table import curves, telemetry

MIN_EXHIBITS = 2  # precisions beside the reference that make a gallery
MAX_MAPS = 3  # runs whose telemetry is drawn
TELEMETRY_ROLES = ("weights", "activations", "output_gradients")
ATTENTION_ROLES = ("kv", "scores", "probabilities")  # of the one site "attention", so their maps have rows of their own
MAX_COLUMNS = 200  # steps in a heat map
MADE_OF = "Final validation loss of each run"


def figures(analysis: Analysis, source, tuned: Sequence[str] = TUNED) -> list[str]:
    """Numbered HTML figures. source: where the analysis came from; a folder may hold training curves. tuned: columns of searches."""
    from scaling import plots  # matplotlib takes most of a second to import; tables, fits and the CLI do without it

    made: list[str] = []

    def add(name: str, figure, title: str, caption: str, narrow: bool = False) -> None:
        made.append(page.figure(plots.to_svg(figure, name), len(made) + 1, title, caption, narrow))

    with plots.style():
        if analysis.runs:
            _of_losses(analysis, add, plots)
            _of_precisions(analysis, add)
            _of_searches(analysis, tuned, add, plots)
            _of_roles(analysis, add)
        _of_training(analysis, source, add, plots)
        _of_telemetry(analysis, source, add, plots)
    return ["<h2>Figures</h2>", *made] if made else [page.paragraph("No run has finished with a finite loss: there is nothing to draw.")]


def drawable(fit: Fit | None) -> Fit | None:
    """The fit when its curve may be shown: the design identifies it, and it is a curve over one width."""
    return fit if fit is not None and fit.metrics["condition_number"] <= MAX_CONDITION and fit.one_knob else None


def predictions(analysis: Analysis) -> dict[str, float]:
    """run_id -> loss by the precision fit, or by Chinchilla for the runs of its baseline where there is none; nats per token."""
    fit, runs = analysis.fit_precision or analysis.fit_chinchilla, analysis.covered()
    if fit is None or fit.metrics["condition_number"] > MAX_CONDITION:
        return {}
    losses = fit.law.predict(fit.params, **analysis.inputs(fit, runs))
    return {run.run_id: float(loss) for run, loss in zip(runs, losses, strict=True) if np.isfinite(loss)}


def held_out_runs(analysis: Analysis) -> set[str]:
    """run_ids that no fit has seen: those of the largest size, when it is held out and something was fitted."""
    if analysis.holdout is None or (analysis.fit_precision or analysis.fit_chinchilla) is None:
        return set()
    largest = max(run.n_params for run in analysis.runs)
    return {run.run_id for run in analysis.runs if run.n_params == largest}


def _of_losses(analysis: Analysis, add, plots) -> None:
    """Loss against bits, the gaps, loss against tokens, fit against data."""
    runs, fit, held = analysis.runs, drawable(analysis.fit_precision), held_out_runs(analysis)
    lines = "Lines: the fitted precision law." if fit else "Lines join the means over seeds: no law over one width is identified here."
    hollow = " Hollow points were held out of the fit." if held else ""
    add("Loss against bits", plots.loss_against_bits(runs, fit, held), "Loss against bits, per size.",
        f"{MADE_OF}, one panel per token budget, against the width of the quantized operands; unquantized runs stand apart. {lines}{hollow}")
    sizes = {n: paired_gaps(list(runs), n) for n in sorted({run.n_params for run in runs})}
    sizes = {n: gaps for n, gaps in sizes.items() if any(gap.mean > 0 for gap in gaps)}
    if sizes:
        limit, name = noise_level(analysis.noise)
        add("Loss gap against bits", plots.gap_against_bits(runs, sizes, fit, limit, name), "The cost of low precision.",
            f"Loss minus that of the {analysis.reference} run of the same size, tokens, seed and settings, averaged over the pairs of a size "
            "(small marks: single pairs). Zero or less has no place on a logarithmic axis; it is in the table of gaps."
            + (" Lines: the fitted law; band: its interval at the largest size." if fit else ""), True)
    add("Loss against tokens", plots.loss_against_tokens(runs, fit, held), "Loss against tokens, per precision.",
        f"{MADE_OF}, one panel per size. {lines}{hollow}")
    predicted = predictions(analysis)
    if predicted:
        add("Fit against data", plots.fit_against_data([run for run in runs if run.run_id in predicted], predicted, held), "Fit against data.",
            "Left: observed against predicted loss, with the line of equality. Right: relative residuals against compute, where a trend "
            f"means that the law is wrong.{hollow}")


def _of_precisions(analysis: Analysis, add) -> None:
    """The gallery, where enough precisions stand beside a reference."""
    from scaling import gallery

    shown = gallery.exhibits(analysis.runs, analysis.relation)
    if len(shown) < MIN_EXHIBITS:
        return
    noise = None if analysis.noise is None else analysis.noise.sd * 2**0.5
    add("Gallery of precisions", gallery.figure(shown, noise), "Gallery of precisions.",
        f"Left: loss minus that of the {analysis.reference} run of the same size, tokens, seed and settings, mean over the pairs with its "
        "95% interval"
        + ("; grey: the standard deviation of such a difference between seeds alone. " if noise else ". ")
        + "Middle: time per token as the runs were trained, whatever else ran beside them. Right: what weights and optimizer state take; "
        "gradients and activations come on top.")


def _of_roles(analysis: Analysis, add) -> None:
    """What each role loses to rounding, where records say so."""
    from scaling import role_losses

    means = role_losses.role_losses(analysis.runs, analysis.relation)
    if means:
        hidden = len(means) - role_losses.MAX_ROWS
        add("What rounding loses", role_losses.figure(means), "What rounding loses, by role.",
            "Of one batch's values at the end of a run, in the role's first product; means over layers, sites and the runs of a precision. Keys and "
            "values (kv), scores and probabilities are attention's. Empty: no run quantizes the role."
            + (f" {hidden} wider precisions are not drawn." if hidden > 0 else ""))


def _of_searches(analysis: Analysis, tuned: Sequence[str], add, plots) -> None:
    """Best of k, where cells were searched."""
    found = searches(analysis.relation, tuned)
    if found:
        add("Best of k", plots.best_of_k(found, analysis.runs), "What tuning is expected to reach.",
            f"Expected lowest validation loss of a search of k runs over {', '.join(tuned)}, one panel per size, one line per precision "
            "and token budget"
            " (thicker: more tokens). From the runs made, without bias: the mean over all choices of k different ones.")


def _of_training(analysis: Analysis, source, add, plots) -> None:
    """Training curves, when the source is a folder that has them."""
    if not _has_file(source, "metrics.jsonl"):
        return
    rows = columns_of(curves(source).filter("loss IS NOT NULL AND tokens > 0").project("run_id, tokens, loss"))
    order, starts = np.unique(np.array(rows["run_id"], dtype=object).astype(str), return_index=True)
    tokens, loss = np.array(rows["tokens"], dtype=np.float64), np.array(rows["loss"], dtype=np.float64)
    bounds = dict(zip(order[np.argsort(starts)], np.split(np.arange(tokens.size), np.sort(starts)[1:]), strict=True))
    lines = {run_id: (tokens[part], loss[part]) for run_id, part in bounds.items()}
    table = columns_of(analysis.relation.project("run_id, status, n_params, precision"))
    ended = {str(run_id): (float(n), str(precision)) for run_id, status, n, precision in zip(*table.values(), strict=True)
             if status == "diverged" and n is not None}
    if lines and (analysis.runs or ended):
        add("Training curves", plots.training_curves(lines, analysis.runs, ended), "Training curves.",
            "Training loss of the longest run of each precision and size." + (" Dashed red: runs that diverged, up to where they ended."
                                                                              if ended else ""))


def _has_file(source, name: str) -> bool:
    """True for a folder with a file of that name below it."""
    return isinstance(source, (str, os.PathLike)) and os.path.isdir(source) and next(Path(source).rglob(name), None) is not None


def _of_telemetry(analysis: Analysis, source, add, plots) -> None:
    """Heat maps of scales and underflow, when the source is a folder whose runs measured them: of the longest run of the largest size for
    each precision and its sources of scales."""
    if not _has_file(source, "telemetry.jsonl"):
        return
    measured = telemetry(source).filter(f"exponent IS NOT NULL AND role IN {TELEMETRY_ROLES + ATTENTION_ROLES}")
    present = {str(run_id) for run_id in columns_of(measured.project("run_id").distinct())["run_id"]}
    names = ("precision", *(f"{role}_source" for role in (*TELEMETRY_ROLES, *ATTENTION_ROLES)))
    wanted = analysis.relation.project(", ".join(("run_id", "n_params", "tokens", "seed", *names))).order("n_params DESC, tokens DESC, seed, run_id")
    kinds: dict[tuple, tuple[str, float]] = {}
    for run_id, n_params, _, _, *kind in zip(*columns_of(wanted).values(), strict=True):
        if str(run_id) in present and n_params is not None:
            kinds.setdefault(tuple(kind), (str(run_id), float(n_params)))
    left = f" {len(kinds) - MAX_MAPS} further kinds of run with telemetry are not drawn." if len(kinds) > MAX_MAPS else ""
    for (precision, *sources), (run_id, n_params) in list(kinds.items())[:MAX_MAPS]:
        mine = measured.filter("run_id = '{}'".format(run_id.replace("'", "''")))
        kinds_of_scale = " and ".join(sorted({str(source) for source in sources if source is not None}))
        for roles, where, rows_are in ((TELEMETRY_ROLES, "", "layer and linear layer"), (ATTENTION_ROLES, " in attention", "layer")):
            rows = columns_of(mine.filter(f"role IN {roles}"))
            if not rows["step"]:
                continue
            add(f"Scales of {run_id}{where}", plots.heat_maps(*_grids(rows, roles)), f"Scales and what they lose{where}: {precision}, "
                f"{kinds_of_scale}.",
                f"Run {run_id}, {plots.count_label(n_params)} parameters. Above: log2 of the scale by {rows_are}, mean over the scales of a "
                f"tensor. Below: share of a tensor's values that were not zero and were quantized to zero; white: none.{left}", bool(where))


def _grids(rows: dict, wanted: Sequence[str] = TELEMETRY_ROLES) -> tuple[list[int], list[str], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Steps (at most MAX_COLUMNS of them), places, and role -> exponent and underflow as [places, steps], from columns of telemetry. Where a
    step was written twice the last one counts."""
    every = sorted({int(step) for step in rows["step"]})
    steps = [every[i] for i in np.unique(np.linspace(0, len(every) - 1, min(MAX_COLUMNS, len(every))).round().astype(int))]
    order = {(int(layer), str(site)): None for layer, site in zip(rows["layer"], rows["site"], strict=True)}  # as written: sites in forward order
    places = sorted(order, key=lambda place: place[0])
    row_of, column_of = {place: i for i, place in enumerate(places)}, {step: i for i, step in enumerate(steps)}
    found = set(map(str, rows["role"]))
    roles = [role for role in wanted if role in found]
    grids = tuple({role: np.full((len(places), len(steps)), np.nan) for role in roles} for _ in range(2))
    for name, grid in zip(("exponent", "underflow"), grids, strict=True):
        for step, layer, site, role, value in zip(*(rows[key] for key in ("step", "layer", "site", "role", name)), strict=True):
            if int(step) in column_of and value is not None:
                grid[str(role)][row_of[int(layer), str(site)], column_of[int(step)]] = float(value)
    return steps, [f"{layer} {site}" for layer, site in places], *grids
