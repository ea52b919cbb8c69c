"""Tables as other people release them: their names, units and kinds of precision, through the report and the sentences."""
from __future__ import annotations

import itertools
import re
import warnings

import numpy as np
import pytest

import scaling
from scaling.laws import laws

KUMAR = laws["kumar"].published["kumar"]
WIDTHS = [(4, 4), (4, 8), (8, 4), (6, 6), (8, 8), (4, None), (None, None)]
MAPPED = {"n_params": "N*1e6", "tokens": "tokens*1e9", "loss": "val", "precision": "scheme", "weights_bits": "W", "activations_bits": "A"}


def released(noise: float = 0.002) -> dict[str, np.ndarray]:
    """Kumar's published law on their sizes and budgets; sizes in millions under the law's own name N, tokens in billions under the run table's."""
    cells = list(itertools.product((30, 60, 110, 220), (1.5, 3, 6, 13), WIDTHS))
    W, A = (np.array([np.nan if pair[i] is None else pair[i] for _, _, pair in cells], dtype=float) for i in (0, 1))
    N, D = (np.array([float(cell[i]) for cell in cells]) for i in (0, 1))
    loss = laws["kumar"].predict(KUMAR, N=N * 1e6, D=D * 1e9, weights_bits=W, activations_bits=A)
    scheme = ["bf16" if w is None else f"W{w}A{a or 16}" for _, _, (w, a) in cells]
    return {"N": N, "tokens": D, "W": W, "A": A, "scheme": scheme, "val": loss * np.exp(noise * np.random.default_rng(0).standard_normal(len(cells)))}


@pytest.fixture(scope="module")
def analysis():
    return scaling.analyse(released(), bootstrap=0, columns=MAPPED)


def test_a_mapped_size_is_the_one_that_is_fitted(analysis):
    """The table has an N of its own, in millions, which a law would take before n_params."""
    fit = analysis.fit_precision
    assert fit.ranges["N"] == (30e6, 110e6) and fit.ranges["D"] == (1.5e9, 13e9)
    A, alpha = fit.params["A"], fit.params["alpha"]
    assert A * 1e8**-alpha == pytest.approx(KUMAR["A"] * 1e8 ** -KUMAR["alpha"], rel=0.03)  # the term, which A and alpha share, in nats


def test_a_precision_costs_what_its_own_widths_cost(analysis):
    """W4A8 is not W4A4: each operand at its own width, against the published law."""
    sentence = scaling.summary(analysis.fit_chinchilla, analysis.fit_precision, analysis.relation)[0]
    baseline = laws["kumar"].predict(KUMAR, N=220e6, D=6e9)
    for name, widths in {"W4A4": (4, 4), "W4A8": (4, 8), "W8A4": (8, 4), "W4A16": (4, np.inf), "W6A6": (6, 6)}.items():
        truth = laws["kumar"].predict(KUMAR, N=220e6, D=6e9, weights_bits=widths[0], activations_bits=widths[1]) - baseline
        told = float(re.search(rf"{name} ([+-][\d.]+)", sentence).group(1))
        assert told == pytest.approx(truth, rel=0.12), name


def test_a_report_of_draws_without_a_value_warns_of_nothing(tmp_path):
    """Resamples in which no width is best: half the draws are infinite, and inf - inf is no number."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit = scaling.fit(released(), "kumar", bootstrap=40, columns={"N": "N*1e6", "D": "tokens*1e9", "loss": "val", "weights_bits": "W", "activations_bits": "A"})
        estimate = fit.estimate(lambda p: np.inf if p["gamma_w"] > 0 else 1.0)
    assert not estimate.identified
