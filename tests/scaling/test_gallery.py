"""The gallery of precisions against numbers computed by hand and by scipy."""
from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

import scaling
from scaling import gallery, plots
from scaling.analysis import with_run_columns
from scaling.statistics import finished_runs

SEEDS = 4
LOSSES = {"float32": [2.0, 2.1, 1.9, 2.05], "bf16_state": [2.2, 2.25, 2.1, 2.3], "quartet": [2.05, 2.1, 2.0, 2.1], "lonely": [3.0, 3.0, 3.0, 3.0]}
SPEED = {"float32": 1000.0, "bf16_state": 500.0, "quartet": 400.0, "lonely": 100.0}


def _relation():
    """Four seeds of each; "lonely" trained at another learning rate, so that nothing stands beside it. Nothing but quartet is narrow in
    its products, so the state alone tells bf16_state from float32."""
    names = [name for name in LOSSES for _ in range(SEEDS)]
    columns = {"run_id": [f"{name}{i}" for i, name in enumerate(names)], "status": ["done"] * len(names), "n_params": [100] * len(names),
               "tokens": [1000] * len(names), "seed": [i % SEEDS for i in range(len(names))], "precision": names,
               "loss": [loss for name in LOSSES for loss in LOSSES[name]], "lr": [0.2 if name == "lonely" else 0.1 for name in names],
               "weights_bits": [4.5 if name == "quartet" else 32.0 for name in names], "tokens_per_s": [SPEED[name] for name in names],
               "weights_bytes_per_param": [2.0 if name == "bf16_state" else 4.0 for name in names],
               "moments_bytes_per_param": [None if name == "quartet" else 8.0 for name in names],
               "gradient_cosine": [0.9 if name == "quartet" else 1.0 for name in names], "edq": [0.3 if name == "bf16_state" else 1.0 for name in names]}
    return with_run_columns(scaling.table(columns))


@pytest.fixture
def shown():
    relation = _relation()
    return gallery.exhibits(finished_runs(relation), relation)


def test_gaps_costs_and_sizes(shown):
    assert [exhibit.precision for exhibit in shown] == ["quartet", "bf16_state"]  # by gap; a state of its own counts, without a pair nothing does
    quartet, bf16 = shown
    for exhibit in shown:
        gaps = np.subtract(LOSSES[exhibit.precision], LOSSES["float32"])
        low, high = scipy.stats.t.interval(0.95, SEEDS - 1, loc=gaps.mean(), scale=scipy.stats.sem(gaps))
        assert (exhibit.gap, exhibit.low, exhibit.high) == pytest.approx((gaps.mean(), low, high)) and exhibit.pairs == SEEDS
    assert (quartet.cost, bf16.cost) == (2.5, 2.0)
    assert (bf16.weights_bytes, bf16.moments_bytes, bf16.edq) == (2.0, 8.0, 0.3)
    assert quartet.moments_bytes is None and quartet.cosine == pytest.approx(0.9)


def test_table_and_figure_say_what_is_known(shown):
    html = gallery.table(shown, "float32")
    assert "gap to float32" in html and "2.50" in html and "0.9000" in html and "–" in html
    with plots.style():
        figure = gallery.figure(shown, 0.05)
        gaps, costs, sizes = figure.axes
        assert [label.get_text() for label in gaps.get_yticklabels()] == ["quartet", "bf16_state"]
        assert [float(line.get_xdata()[0]) for line in gaps.lines if line.get_marker() == "o"] == [shown[0].gap, shown[1].gap]
        assert list(costs.lines[0].get_xdata()) == [2.5, 2.0]
        assert [bar.get_width() for bar in sizes.patches] == [4.0, 2.0, 0.0, 8.0]
        assert "<svg" in plots.to_svg(figure, "gallery")
