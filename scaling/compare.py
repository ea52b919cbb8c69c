"""Several laws, or variants of one, on the same rows with the same runs held out: a table to choose by, and the choice."""
from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from scaling.eligible import eligible
from scaling.fit import fit
from scaling.held_out import LeftOut, pose_splits, score, verdict
from scaling.laws import Law, resolve
from scaling.result import Fit
from scaling.table import Source


DECISIVE = 2.0  # difference of BIC that counts as evidence


@dataclass(frozen=True)
class Comparison:
    """fits: one per law that could be fitted, in the order asked for; refused: law -> why it could not; left_out: their errors on the
    splits asked for (see `scaling.held_out`)."""

    fits: tuple[Fit, ...]
    refused: dict[str, str]
    left_out: tuple[LeftOut, ...] = ()

    @property
    def unit(self) -> str:
        """Of the loss that the laws are fitted to: all of them to the same column."""
        return " or ".join(dict.fromkeys(fitted.law.unit for fitted in self.fits))

    @property
    def best(self) -> Fit:
        """The fewest free parameters among the supported fits whose BIC is within 2 of the lowest (less is no evidence: Kass and
        Raftery 1995). The held-out rows do not choose, so that their error stays an honest test. ValueError when none converged."""
        supported = self.supported
        if not supported:
            raise ValueError(f"compare: no fit converged ({', '.join(fitted.label for fitted in self.fits)})")
        lowest = min(fitted.metrics["bic"] for fitted in supported)
        close = [fitted for fitted in supported if fitted.metrics["bic"] <= lowest + DECISIVE]
        return min(close, key=lambda fitted: (len(fitted.free), fitted.metrics["bic"]))

    @property
    def supported(self) -> list[Fit]:
        """The converged fits, less the variants of a law that free a parameter which then ends on its bound or within one standard
        error of zero: a BIC bought with a parameter that could be anything is no evidence for it."""
        converged = [fitted for fitted in self.fits if fitted.converged]
        simplest: dict[str, Fit] = {}
        for fitted in sorted(converged, key=lambda fitted: len(fitted.free)):
            simplest.setdefault(fitted.law.name, fitted)
        return [fitted for fitted in converged if all(_determined(fitted, name) for name in fitted.free
                                                      if name not in simplest[fitted.law.name].free)]

    def reason(self) -> str:
        """One sentence: what was chosen among what, and whether the held-out error agrees."""
        best, supported = self.best, self.supported
        others = [fitted for fitted in supported if fitted is not best]
        freed = [fitted.label for fitted in self.fits if fitted.converged and not any(fitted is one for one in supported)]
        passed_over = f"; passed over, since what they free is not determined by the data: {', '.join(freed)}" if freed else ""
        failed = [fitted.label for fitted in self.fits if not fitted.converged]
        passed_over += f"; not converged: {', '.join(failed)}" if failed else ""
        if not others:
            return f"{best.label} is the only {'supported candidate' if passed_over else 'candidate that could be fitted'}{passed_over}"
        nearest = min(others, key=lambda fitted: fitted.metrics["bic"])
        margin = nearest.metrics["bic"] - best.metrics["bic"]
        text = (f"{best.label} has the lowest BIC of {len(others) + 1} supported candidates ({margin:.1f} below {nearest.label})" if margin >= 0 else
                f"{best.label} is the simplest of {len(others) + 1} supported candidates within {DECISIVE:g} of the lowest BIC ({nearest.label})")
        scored = [fitted for fitted in (best, *others) if fitted.metrics["held_out"]]
        if scored and all(math.isfinite(fitted.metrics["held_out"]["rmse"]) for fitted in scored):
            kindest = min(scored, key=lambda fitted: fitted.metrics["held_out"]["rmse"])
            text += "; the held-out error agrees" if kindest is best else (
                f"; the held-out error would choose {kindest.label} ({kindest.metrics['held_out']['rmse']:.2%} against "
                f"{best.metrics['held_out']['rmse']:.2%})")
        return text + passed_over

    def verdict(self) -> str:
        """One sentence: whether the errors on the left-out splits choose the law that BIC chooses. "" when none were asked for."""
        return verdict(self.best.label, self.left_out) if self.left_out else ""


def _determined(fitted: Fit, name: str) -> bool:
    return name not in fitted.metrics["at_bound"] and fitted.estimate(name).relative_se < 1.0


def _takes(law: Law, name: str) -> bool:
    return name in (*law.inputs, "loss")


def _has(law: Law, name: str) -> bool:
    return name in law.names or any(factor.level(name) for factor in law.factors)


def compare(table: Source, laws: Iterable[str | Law], leave: Iterable[str] = (), **options) -> Comparison:
    """Fits every law (names may carry variants: "kumar:tied"; "chinchilla,kumar" is two) with the same options as `scaling.fit`.

    leave: splits ("largest-N", "largest-D", "each-precision", see `scaling.held_out`) on which every law is scored as well; rows in
    `holdout` take no part in them. Of `columns` and `fixed` each law gets what it knows; what no law knows is an error. A law that these
    rows cannot fit is refused with its line instead of ending the comparison; ValueError when none can.
    """
    fits, refused, left_out = [], {}, []
    laws = [name.strip() for name in laws.split(",")] if isinstance(laws, str) else list(laws)
    columns, fixed = options.pop("columns", None) or {}, options.pop("fixed", None) or {}
    resolved = [resolve(law, tuple(columns))[0] for law in laws]  # a misspelt name is an error, not a law that these rows cannot fit
    for what, given, knows in (("columns", columns, _takes), ("fixed", fixed, _has)):
        unknown = next((name for name in given if not any(knows(law, name) for law in resolved)), None)
        if unknown and laws:
            raise ValueError(f"{what}: {unknown!r} is known to none of the laws {', '.join(law.name for law in resolved)}")
    leave = tuple(leave)
    rows = eligible(table, columns, options.get("where"), options.get("holdout")) if leave else None
    splits = pose_splits(rows, leave) if leave else []
    for law, known in zip(laws, resolved, strict=True):
        own = options | {"columns": {name: sql for name, sql in columns.items() if _takes(known, name)},
                         "fixed": {name: value for name, value in fixed.items() if _has(known, name)}}
        try:
            fits.append(fit(table, law, **own))
        except ValueError as error:
            refused[law if isinstance(law, str) else law.name] = str(error)
            continue
        left_out += score(rows, law, splits, own, fits[-1].params) if splits else []
    if not fits:
        raise ValueError(next(iter(refused.values())) if refused else "laws: none given; name at least one")
    return Comparison(tuple(fits), refused, tuple(left_out))
