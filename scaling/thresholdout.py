"""Thresholdout: a held-out set that may be asked again and again (Dwork et al. 2015, "Generalization in Adaptive Data Analysis and
Holdout Reuse", arXiv 1506.02629, figure 1; "The reusable holdout", Science 349).

Whoever compares thirty laws on one held-out set and keeps the best has fitted that set. The guard answers with the score on the training
rows, which tells nothing new, unless the held-out score differs from it by more than a noisy threshold; then it answers with the held-out
score plus noise, and pays for it from a budget.

The paper's guarantee is for means of quantities in [0, 1] over rows drawn alike. A root mean square error of ln loss over the largest runs
is neither, so here this is a brake on self-deception and no theorem; give the threshold in the units of the score.
"""
from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np

from scaling.compare import Comparison
from scaling.files import write_whole

THRESHOLD, SCALE, BUDGET = 0.01, 0.0025, 20  # errors of ln loss; the paper's experiments also have a threshold of four noise scales
TRAINING, HELD_OUT, SPENT = "training", "held-out", "budget spent"


@dataclass(frozen=True)
class Answer:
    """value: the score to be believed, NaN when the budget is spent; source: "training", "held-out" (plus noise) or "budget spent"."""

    value: float
    source: str


@dataclass
class Thresholdout:
    """The guard of one held-out set.

    threshold T, scale sigma: in the units of the scores; budget B: how many answers may come from the held-out rows; seed of all noise.
    held_out: what tells the held-out set apart, so that a guard is not used for another. asked, spent: questions and paid answers so far;
    with the seed they are all its state, since noise number i is a function of (seed, kind, i).
    """

    threshold: float = THRESHOLD
    scale: float = SCALE
    budget: int = BUDGET
    seed: int = 0
    held_out: str = ""
    asked: int = 0
    spent: int = 0

    def __post_init__(self):
        limits = {"threshold": (float, lambda x: x > 0), "scale": (float, lambda x: x > 0), "budget": (int, lambda x: x >= 1),
                  "seed": (int, lambda x: x >= 0), "asked": (int, lambda x: x >= 0), "spent": (int, lambda x: x >= 0)}
        for name, (kind, fits) in limits.items():
            value = getattr(self, name)
            if not isinstance(value, (int, kind)) or isinstance(value, bool) or not (math.isfinite(value) and fits(value)):
                wanted = "a positive number" if kind is float else "a whole number of at least " + ("1" if name == "budget" else "0")
                raise ValueError(f"guard {name}={value!r}: must be {wanted}")

    @property
    def noisy_threshold(self) -> float:
        """T + Laplace(2 sigma), drawn anew after every answer from the held-out rows."""
        return self.threshold + self._laplace(0, self.spent, 2.0)

    def ask(self, training: float, held_out: float) -> Answer:
        """The guarded score, given that on the rows fitted and that on the held-out rows. ValueError when either is not finite."""
        if not (math.isfinite(training) and math.isfinite(held_out)):
            raise ValueError(f"guard: scores must be finite; got training {training}, held-out {held_out}")
        if self.spent >= self.budget:
            return Answer(math.nan, SPENT)
        question, threshold = self.asked, self.noisy_threshold
        self.asked += 1
        if abs(held_out - training) > threshold + self._laplace(1, question, 4.0):
            self.spent += 1
            return Answer(held_out + self._laplace(2, question, 1.0), HELD_OUT)
        return Answer(training, TRAINING)

    def _laplace(self, kind: int, number: int, scales: float) -> float:
        return float(np.random.default_rng((self.seed, kind, number)).laplace(0.0, scales * self.scale))

    def save(self, path: str | os.PathLike) -> Path:
        """Writes the state as JSON, whole or not at all."""
        text = json.dumps({"bitlaw_guard": 1} | asdict(self), indent=1) + "\n"
        return write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def load_guard(path: str | os.PathLike) -> Thresholdout:
    """The guard in a file that `save` wrote. ValueError, one line, when it is none."""
    try:
        body = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"guard {path}: cannot be read ({error})") from None
    names = {field.name for field in fields(Thresholdout)}
    if not isinstance(body, dict) or body.pop("bitlaw_guard", None) != 1 or set(body) != names:
        raise ValueError(f"guard {path}: not a guard; name a file that does not exist to start one")
    return Thresholdout(**body)


def guarded(comparison: Comparison, ask: Callable[[float, float], Answer]) -> Comparison:
    """The comparison with every held-out error replaced by the guard's answer, one question per converged fit, in order. What else would tell
    of the held-out rows (bias, worst, coverage) is NaN or None."""
    hidden = {name: math.nan for name in ("bias", "worst", "rmse_nats", "bias_nats", "bias_low", "bias_high", "half_width")}
    fits = []
    for fitted in comparison.fits:
        score = fitted.metrics["held_out"]
        if score is None:
            raise ValueError("guard: no rows are held out; name them with holdout")
        finite = math.isfinite(score["rmse"])
        answer = ask(fitted.metrics["rmse"], score["rmse"]) if fitted.converged and finite else Answer(math.nan, "no score")
        told = score | hidden | {"rmse": answer.value, "covered": None, "source": answer.source}
        fits.append(replace(fitted, metrics=dict(fitted.metrics) | {"held_out": told}))
    return replace(comparison, fits=tuple(fits))
