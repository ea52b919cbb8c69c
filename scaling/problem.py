"""A law on given rows, as the solver sees it: a vector of free coordinates, residuals of the log loss, and their exact Jacobian.

Coordinates z, in the order of `free`:
  amplitude: log of the amplitude times the geometric mean of its term over the rows ("centred logs": without centring, ln A and alpha
             are correlated at 0.999 and the condition number is a thousand times worse);
  scale: its logarithm;  exponent, offset: itself.
Shapes: S starts or resamples, R rows, K terms, F free coordinates.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from scaling.laws import Law

STEP = 1e-30  # of the complex-step derivative: no subtraction, so no rounding error at any size
SMALLEST, LARGEST = -25.0, 3.0  # log of (mean of a term / mean loss): below, the term is dead; above, terms cancel


@dataclass(frozen=True)
class Problem:
    """law on columns [R] and log_loss [R]; free: names of the free parameters; ties: name -> free name it equals; fixed: name -> value.

    Parameters of the law in none of the three are absent: no row touches them.
    """

    law: Law
    columns: Mapping[str, np.ndarray]
    log_loss: np.ndarray
    free: tuple[str, ...]
    ties: Mapping[str, str]
    fixed: Mapping[str, float]

    @cached_property
    def amplitudes(self) -> tuple[str, ...]:
        return tuple(name for name in self.free if self.law.parameter(name).kind == "amplitude")

    @cached_property
    def nonlinear(self) -> tuple[str, ...]:
        return tuple(name for name in self.free if self.law.parameter(name).kind != "amplitude")

    def rows(self, keep: np.ndarray) -> Problem:
        """The same parameters on fewer rows."""
        return replace(self, columns={name: values[keep] for name, values in self.columns.items()}, log_loss=self.log_loss[keep])

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper bound of every coordinate. [F], [F]"""
        level = float(np.log(np.mean(np.exp(self.log_loss))))
        low, high = [], []
        for parameter in map(self.law.parameter, self.free):
            if parameter.kind == "amplitude":
                low.append(level + SMALLEST), high.append(level + LARGEST)
            else:
                ends = np.array([parameter.low, parameter.high])
                ends = np.log(ends) if parameter.logarithmic else ends
                low.append(ends[0]), high.append(ends[1])
        return np.array(low), np.array(high)

    def theta(self, z_SF: np.ndarray, complex_step: str | None = None) -> dict[str, np.ndarray]:
        """Nonlinear parameters of every start, [S, 1] each; `complex_step` names the free one that moves along the imaginary axis."""
        values = {name: np.full((z_SF.shape[0], 1), value) for name, value in self.fixed.items() if name not in self.law.amplitudes}
        for name in self.nonlinear:
            value = z_SF[:, self.free.index(name)][:, None]
            value = value + 1j * STEP if name == complex_step else value
            values[name] = np.exp(value) if self.law.parameter(name).logarithmic else value
        return values | {tied: values[source] for tied, source in self.ties.items()}

    def log_terms(self, theta: Mapping[str, np.ndarray]) -> np.ndarray:
        """[S, K, R]: log terms; non-finite where the law has no value."""
        shape = (next((v.shape[0] for v in theta.values()), 1), self.log_loss.size)
        return np.stack([np.broadcast_to(term, shape) for term in self.law.log_terms(theta, self.columns)], axis=1)

    def centre(self, log_terms_SKR: np.ndarray) -> np.ndarray:
        """[S, K]: what is subtracted from a term's logs: their mean over rows, 0 for a term with a fixed amplitude."""
        free = np.array([name in self.amplitudes for name in self.law.amplitudes])
        return np.where(free, log_terms_SKR.mean(axis=-1), 0.0)

    def log_amplitudes(self, z_SF: np.ndarray) -> np.ndarray:
        """[S, K]: coordinates of the amplitudes (still centred), and logs of the fixed ones."""
        with np.errstate(divide="ignore"):  # an amplitude fixed at 0 is a term left out
            return np.stack([z_SF[:, self.free.index(name)] if name in self.free else np.full(z_SF.shape[0], np.log(self.fixed[name]))
                             for name in self.law.amplitudes], axis=1)

    def residuals(self, z_SF: np.ndarray) -> np.ndarray:
        """[S, R]: ln(predicted loss) - ln(loss); inf where the law has no value there."""
        with np.errstate(all="ignore"):
            logs_SKR = self.log_terms(self.theta(z_SF))
            parts = np.exp(self.log_amplitudes(z_SF)[:, :, None] + logs_SKR - self.centre(logs_SKR)[:, :, None])
            residuals = np.log(parts.sum(axis=1)) - self.log_loss
        return np.where(np.isfinite(residuals), residuals, np.inf)

    def jacobian(self, z_SF: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[S, R] residuals (finite starts only) and [S, R, F] their derivatives by the coordinates, exact to rounding."""
        with np.errstate(all="ignore"):
            logs_SKR = self.log_terms(self.theta(z_SF))
            parts_SKR = np.exp(self.log_amplitudes(z_SF)[:, :, None] + logs_SKR - self.centre(logs_SKR)[:, :, None])
            total_SR = parts_SKR.sum(axis=1)
            shares_SKR = parts_SKR / total_SR[:, None, :]
            jacobian = np.empty((*total_SR.shape, len(self.free)))
            for k, name in enumerate(self.law.amplitudes):
                if name in self.free:
                    jacobian[:, :, self.free.index(name)] = shares_SKR[:, k]
            for name in self.nonlinear:
                slopes_SKR = self.log_terms(self.theta(z_SF, name)).imag / STEP
                jacobian[:, :, self.free.index(name)] = (shares_SKR * (slopes_SKR - self.centre(slopes_SKR)[:, :, None])).sum(axis=1)
        return np.log(total_SR) - self.log_loss, jacobian

    def slopes_of_centre(self, z_F: np.ndarray) -> np.ndarray:
        """[F, F]: d(plain coordinates)/d(z), plain coordinates having the log of the amplitude itself. Identity but for that."""
        matrix = np.eye(len(self.free))
        for name in self.nonlinear:
            centre_K = self.centre(self.log_terms(self.theta(z_F[None], name)).imag / STEP)[0]
            for k, amplitude in enumerate(self.law.amplitudes):
                if amplitude in self.free:
                    matrix[self.free.index(amplitude), self.free.index(name)] = -centre_K[k]
        return matrix

    def plain(self, z_SF: np.ndarray) -> np.ndarray:
        """[S, F]: coordinates without centring: logs of amplitudes and scales, exponents and offsets as they are."""
        return self._shifted(z_SF, -1.0)

    def centred(self, plain_SF: np.ndarray) -> np.ndarray:
        """[S, F]: the inverse of `plain`."""
        return self._shifted(plain_SF, 1.0)

    def _shifted(self, coordinates_SF: np.ndarray, sign: float) -> np.ndarray:
        centre_SK = self.centre(self.log_terms(self.theta(coordinates_SF)))
        result = coordinates_SF.copy()
        for k, name in enumerate(self.law.amplitudes):
            if name in self.free:
                result[:, self.free.index(name)] += sign * centre_SK[:, k]
        return result


def constants(law: Law, free: tuple[str, ...], ties: Mapping[str, str], fixed: Mapping[str, float], plain_F) -> dict[str, float]:
    """Plain coordinates (see `Problem.plain`) back to named constants, in the law's order; absent ones are left out."""
    values = dict(fixed)
    for name, value in zip(free, plain_F, strict=True):
        values[name] = float(np.exp(value)) if law.parameter(name).logarithmic else float(value)
    values |= {tied: values[source] for tied, source in ties.items()}
    return {name: float(values[name]) for name in law.names if name in values}
