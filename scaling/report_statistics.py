"""The statistics of a sweep in its report: where the spread of losses comes from, searches, accuracies."""
from __future__ import annotations

from collections.abc import Sequence

from scaling import accuracies, page
from scaling.analysis import Analysis
from scaling.searches import searches
from scaling.seed_variance import seed_variance
from scaling.stats_text import ACCURACY_HEADER, accuracy_cells, search_cells, search_header, search_notes, variance_rows


def variance_table(analysis: Analysis) -> list[str]:
    """The decomposition, where two runs differ in seed alone."""
    if analysis.noise is None:
        return []
    parts = seed_variance(analysis.relation)
    note = "Standard deviations, nats per token" + "".join(f"; {one}" for one in parts.notes) + "."
    return [page.table(("spread of final losses", "sd", ""), variance_rows(parts), (1,)), page.paragraph(note, "note")]


def search_section(analysis: Analysis, tuned: Sequence[str]) -> list[str]:
    """The best of k, where cells were searched."""
    found = searches(analysis.relation, tuned)
    if not found:
        return []
    header, counts = search_header(found, tuned)
    text = (f"The lowest loss that a search of k runs is expected to end at (nats per token), were its runs drawn from those made over "
            f"{', '.join(tuned)}: unbiased, "
            "the mean over all choices of k different runs of a seed, and over seeds. Tuning has ended where a column no longer falls.")
    return [f"<h2>Searches over {page.escape(', '.join(tuned))}</h2>", page.paragraph(text, "note"),
            page.table(header, [search_cells(search, counts) for search in found], (0, 1, *range(3, len(header)))),
            *(page.paragraph(f"Note: {note}.", "note") for note in search_notes(found))]


def accuracy_section(analysis: Analysis) -> list[str]:
    """Accuracies, where the table has them, or why they cannot be told: a report is never an error."""
    if not accuracies.carries(analysis.relation.columns):
        return []
    try:
        found = accuracies.accuracies(analysis.relation)
    except ValueError as error:
        return [page.paragraph(f"No accuracies: {error}.", "note")]
    if not found:
        return []
    text = ("Credible intervals (95%): of one accuracy under a uniform prior, of two models on the same questions under a uniform prior "
            "on the four outcomes.")
    return ["<h2>Accuracies</h2>", page.table(ACCURACY_HEADER, [accuracy_cells(one) for one in found], (1, 2, 4, 5, 7)), page.paragraph(text, "note")]
