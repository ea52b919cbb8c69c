"""Loss gaps by matched seed, of any table of runs."""
from __future__ import annotations

from collections.abc import Mapping

from scaling.analysis import with_run_columns
from scaling.statistics import Gap, finished_runs, paired_gaps
from scaling.table import Source, table


def loss_gaps(source: Source, *, columns: Mapping[str, str] | None = None, where: str | None = None,
              n_params: float | None = None) -> list[Gap]:
    """What each quantized precision loses: its loss minus that of the unquantized run that matches in size, tokens, seed, data, batch,
    learning rate and schedule, nats/token. One `Gap` per precision, narrowest first; [] where no quantized run has such a match.

    source: whatever `scaling.table` takes. columns, where: as for `analyse`, names of a run table -> SQL, and the rows to use.
    n_params: only models of this size; a gap depends on size and tokens, and is else the mean over those of the table.
    The unquantized precision is float32 where the table has it, else its commonest of 16 bits or more. Runs that are not done, lack a
    finite loss, or that no column tells from another run are in no pair. ValueError, one line, when `source` is no run table.
    """
    return paired_gaps(finished_runs(with_run_columns(table(source), columns, where)), n_params)
