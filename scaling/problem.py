"""A law on given rows, as the solver sees it: a vector of free coordinates, residuals of the log loss, and their exact Jacobian.

Coordinates z, in the order of `free`:
  amplitude, divisor: log of the mean of its term over the rows ("centred logs": without centring, ln A and alpha are correlated at
             0.999 and the condition number is a thousand times worse). The mean itself, not that of the logs: of a term such as
             exp(-bits/g) the few rows with narrow bits tell, and those with 32 must not take part;
  scale: its logarithm;  exponent, offset: itself.
Shapes: S starts or resamples, R rows, K terms, F free coordinates.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from scaling.laws import Law

STEP = 1e-30  # of the complex-step derivative: no subtraction, so no rounding error at any size
SMALLEST, LARGEST = -25.0, 3.0  # log of (mean of a term / geometric mean of the losses): below, the term is dead; above, terms cancel
DEAD = -12.0  # the same, below which the covariance leaves the term out
BESIDE_SPAN = 25.0  # how far outside its box of starts a term of a law that is no plain sum may go


@dataclass(frozen=True)
class Problem:
    """law on columns [R] and log_loss [R]; free: names of the free parameters; ties: name -> free name it equals; fixed: name -> value.

    Parameters of the law in none of the three are absent: no row touches them. weights: [R], how much each row counts,
    1 on average, or None.
    priors: name -> (mean, deviation) of its coordinate; the penalty is prior_weight (z - mean)^2 / (2 deviation^2), see `scaling.priors`.
    """

    law: Law
    columns: Mapping[str, np.ndarray]
    log_loss: np.ndarray
    free: tuple[str, ...]
    ties: Mapping[str, str]
    fixed: Mapping[str, float]
    weights: np.ndarray | None = None
    priors: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    prior_weight: float = 1.0

    @cached_property
    def amplitudes(self) -> tuple[str, ...]:
        return tuple(name for name in self.free if self.law.parameter(name).multiplies)

    @cached_property
    def nonlinear(self) -> tuple[str, ...]:
        return tuple(name for name in self.free if not self.law.parameter(name).multiplies)

    @cached_property
    def level(self) -> float:
        """Log of the geometric mean of the losses: one run that diverged to 1e9 must not make every term look dead beside it."""
        return float(np.mean(self.log_loss))

    @property
    def row_weights(self) -> np.ndarray | float:
        """[R], or 1 where all rows count the same."""
        return 1.0 if self.weights is None else self.weights

    def rows(self, keep: np.ndarray) -> Problem:
        """The same parameters on fewer rows."""
        return replace(self, columns={name: values[keep] for name, values in self.columns.items()}, log_loss=self.log_loss[keep],
                       weights=None if self.weights is None else self.weights[keep])

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper bound of every coordinate. [F], [F]"""
        low, high = [], []
        for parameter in map(self.law.parameter, self.free):
            if parameter.multiplies and self.law.combine is None:
                low.append(self.level + SMALLEST), high.append(self.level + LARGEST)
            elif parameter.multiplies:
                low.append(parameter.span[0] - BESIDE_SPAN), high.append(parameter.span[1] + BESIDE_SPAN)
            else:
                low.append(parameter.coordinate(parameter.low)), high.append(parameter.coordinate(parameter.high))
        return np.array(low, dtype=np.float64), np.array(high, dtype=np.float64)

    def box(self) -> tuple[np.ndarray, np.ndarray]:
        """Where starts are drawn: the bounds or the smaller box of a parameter's `start`, and for amplitudes their span. [F], [F]"""
        low, high = self.bounds()
        for i, parameter in enumerate(map(self.law.parameter, self.free)):
            if parameter.multiplies:
                low[i], high[i] = parameter.span
            elif parameter.start:
                low[i], high[i] = map(parameter.coordinate, parameter.start)
        return low, high

    def dead(self, z_F: np.ndarray) -> np.ndarray:
        """Which coordinates are amplitudes of terms that no longer matter anywhere. [F] bool"""
        is_amplitude = np.array([name in self.amplitudes for name in self.free])
        if self.law.combine is None:
            return is_amplitude & (z_F < self.level + DEAD)
        jacobian_RF = self.jacobian(z_F[None])[1][0]  # the share of a term in the loss, through whatever combines them
        return is_amplitude & (np.abs(jacobian_RF).max(axis=0) < np.exp(DEAD))

    def theta(self, z_SF: np.ndarray, complex_step: str | None = None) -> dict[str, np.ndarray]:
        """Nonlinear parameters of every start, [S, 1] each; `complex_step` names the free one that moves along the imaginary axis."""
        values = {name: np.full((z_SF.shape[0], 1), value) for name, value in self.fixed.items() if name not in self.law.amplitudes}
        for name in self.nonlinear:
            value = z_SF[:, self.free.index(name)][:, None]
            value = value + 1j * STEP if name == complex_step else value
            values[name] = self.law.parameter(name).value(value)
        values |= {tied: values[source] for tied, source in self.ties.items()}
        return self.law.per_row(values, self.columns)

    def log_terms(self, theta: Mapping[str, np.ndarray]) -> np.ndarray:
        """[S, K, R]: log terms; -inf where a row leaves a term out, not finite otherwise where the law has no value."""
        shape = (next((v.shape[0] for v in theta.values()), 1), self.log_loss.size)
        terms = self.law.terms(theta, self.columns)
        made = np.empty((shape[0], len(terms), shape[1]), dtype=np.result_type(np.float64, *terms))
        for k, term in enumerate(terms):
            made[:, k] = term
        return made

    def parts(self, log_terms_SKR: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """([S, K, R] the terms without their amplitudes, centred: over the rows they have a mean of 1; [S, K] the log of what they were divided by).
        A term with a fixed amplitude is not centred. log_terms: real."""
        top_SK1 = log_terms_SKR.max(axis=-1, keepdims=True)
        top_SK1 = np.where(top_SK1 == -np.inf, 0.0, top_SK1)  # a term that touches no row
        parts_SKR = np.exp(log_terms_SKR - top_SK1)
        mean_SK = np.where(self._free_terms, np.add.reduce(parts_SKR, axis=-1) / parts_SKR.shape[-1], np.exp(-top_SK1[..., 0]))
        mean_SK = np.where(mean_SK == 0.0, 1.0, mean_SK)  # of a term that touches no row, which any amplitude leaves so
        parts_SKR /= mean_SK[..., None]
        return parts_SKR, np.where(self._free_terms, top_SK1[..., 0] + np.log(mean_SK), 0.0)

    def slope_of_centre(self, parts_SKR: np.ndarray, slopes_SKR: np.ndarray) -> np.ndarray:
        """[S, K]: derivative of the centre where the log terms have the derivatives `slopes`."""
        means = np.add.reduce(parts_SKR * slopes_SKR, axis=-1) / parts_SKR.shape[-1]
        return np.where(self._free_terms, means, 0.0)

    def _log_slopes(self, moved: Mapping[str, np.ndarray]) -> np.ndarray:
        """[S, K, R]: STEP times the derivative of the log terms by the parameter that moved; 0 where a row leaves a term out."""
        logs_SKR = self.log_terms(moved)
        return np.where(logs_SKR.real == -np.inf, 0.0, logs_SKR.imag)

    @cached_property
    def _free_terms(self) -> np.ndarray:
        return np.array([name in self.amplitudes for name in self.law.amplitudes], dtype=bool)

    def log_amplitudes(self, z_SF: np.ndarray) -> np.ndarray:
        """[S, K]: coordinates of the amplitudes (still centred), and those of the fixed ones."""
        logs = [z_SF[:, self.free.index(name)] if name in self.free
                else np.full(z_SF.shape[0], self.law.parameter(name).coordinate(self.fixed[name]))  # an amplitude of 0 is a term left out
                for name in self.law.amplitudes]
        return np.stack(logs, axis=1) if logs else np.zeros((z_SF.shape[0], 0))

    def _loss(self, theta: Mapping, parts_SKR: np.ndarray) -> np.ndarray:
        """[S, R]: the loss that the terms make."""
        if self.law.combine is None:
            return parts_SKR.sum(axis=1)
        return self.law.total(theta, tuple(np.moveaxis(parts_SKR, 1, 0)), self.columns)

    def residuals(self, z_SF: np.ndarray) -> np.ndarray:
        """[S, R]: ln(predicted loss) - ln(loss); inf where the law has no value there."""
        with np.errstate(all="ignore"):
            theta = self.theta(z_SF)
            parts_SKR, _ = self.parts(self.log_terms(theta))
            residuals = np.log(self._loss(theta, np.exp(self.log_amplitudes(z_SF))[:, :, None] * parts_SKR)) - self.log_loss
        return np.where(np.isfinite(residuals), residuals, np.inf)

    def jacobian(self, z_SF: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[S, R] residuals (finite starts only) and [S, R, F] their derivatives by the coordinates, exact to rounding."""
        with np.errstate(all="ignore"):
            theta = self.theta(z_SF)
            own_SKR, _ = self.parts(self.log_terms(theta))
            parts_SKR = np.exp(self.log_amplitudes(z_SF))[:, :, None] * own_SKR
            total_SR = self._loss(theta, parts_SKR)
            jacobian = np.empty((*total_SR.shape, len(self.free)))
            for k, name in enumerate(self.law.amplitudes):
                if name in self.free:
                    jacobian[:, :, self.free.index(name)] = self._share(theta, parts_SKR, k) / total_SR
            for name in self.nonlinear:
                moved = self.theta(z_SF, name)
                slopes_SKR = self._log_slopes(moved)
                slopes_SKR = slopes_SKR - self.slope_of_centre(own_SKR, slopes_SKR)[:, :, None]
                if self.law.combine is None:
                    slope_SR = np.einsum("skr,skr->sr", parts_SKR, slopes_SKR)
                else:
                    slope_SR = self._loss(moved, parts_SKR * (1.0 + 1j * slopes_SKR)).imag
                jacobian[:, :, self.free.index(name)] = slope_SR / (STEP * total_SR)
            return np.log(total_SR) - self.log_loss, jacobian

    def check_derivatives(self) -> None:
        """ValueError when the law loses a derivative: it uses a function that drops imaginary parts, and the complex steps see a constant that
        does nothing where a finite difference sees one that does."""
        low, high = self.box()
        middle = 0.5 * (np.maximum(low, -1e3) + np.minimum(high, 1e3))
        residuals, jacobian = (part[0] for part in self.jacobian(middle[None]))
        for i, name in enumerate(self.free):
            step = 1e-4 * np.eye(len(middle))[i]
            with np.errstate(invalid="ignore"):
                change = np.abs(self.residuals((middle + step)[None]) - self.residuals((middle - step)[None]))[0]
            seen = np.isfinite(residuals) & np.isfinite(change)
            if seen.any() and not jacobian[seen, i].any() and change[seen].max() > 1e-8:
                raise ValueError(f"law {self.law.name}: its derivative by {name} is lost; log_terms and combine must be analytic in the constants: "
                                 "no abs, real, sign or rounding of them (write sqrt(x*x) for abs(x))")

    def _share(self, theta: Mapping, parts_SKR: np.ndarray, k: int) -> np.ndarray:
        """[S, R]: d loss / d ln(term k): the term itself in a plain sum."""
        if self.law.combine is None:
            return parts_SKR[:, k]
        moved = parts_SKR.astype(np.complex128)
        moved[:, k] *= 1.0 + 1j * STEP
        return np.broadcast_to(self._loss(theta, moved).imag / STEP, parts_SKR[:, k].shape)

    def penalty(self, z_SF: np.ndarray) -> np.ndarray:
        """[S]: what the priors add to the objective."""
        return sum((0.5 * self.prior_weight * ((z_SF[:, self.free.index(name)] - mean) / sd) ** 2 for name, (mean, sd) in self.priors.items()),
                   np.zeros(len(z_SF)))

    def penalty_slopes(self, z_SF: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[S, F] and [F]: first and second derivatives of `penalty`."""
        first, second = np.zeros(z_SF.shape), np.zeros(z_SF.shape[1])
        for name, (mean, sd) in self.priors.items():
            i = self.free.index(name)
            second[i] = self.prior_weight / sd**2
            first[:, i] = second[i] * (z_SF[:, i] - mean)
        return first, second

    def prior_rows(self, inside: float) -> np.ndarray:
        """[number of priors, F]: the priors as rows of the Jacobian, where the objective's curvature is `inside` times J'J."""
        rows = np.zeros((len(self.priors), len(self.free)))
        for row, (name, (_, sd)) in zip(rows, self.priors.items(), strict=True):
            row[self.free.index(name)] = np.sqrt(self.prior_weight / inside) / sd
        return rows

    def priors_about(self, z_F: np.ndarray) -> Problem:
        """The same with the priors' means at z_F, as where the truth is z_F and priors scatter about it as runs do."""
        return replace(self, priors={name: (float(z_F[self.free.index(name)]), sd) for name, (_, sd) in self.priors.items()})

    def prior_noise(self, size: int, rng: np.random.Generator) -> np.ndarray | None:
        """[size, F]: draws of how far the priors' means may lie from the truth, for resamples; None, and no draw, without priors."""
        if not self.priors:
            return None
        noise_SF = np.zeros((size, len(self.free)))
        for name, (_, sd) in self.priors.items():
            noise_SF[:, self.free.index(name)] = sd * rng.standard_normal(size)
        return noise_SF

    def slopes_of_centre(self, z_F: np.ndarray) -> np.ndarray:
        """[F, F]: d(plain coordinates)/d(z), plain coordinates having the log of the amplitude itself. Identity but for that."""
        matrix = np.eye(len(self.free))
        own_SKR, _ = self.parts(self.log_terms(self.theta(z_F[None])))
        for name in self.nonlinear:
            centre_K = self.slope_of_centre(own_SKR, self._log_slopes(self.theta(z_F[None], name)))[0] / STEP
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
        _, centre_SK = self.parts(self.log_terms(self.theta(coordinates_SF)))
        result = coordinates_SF.copy()
        for k, name in enumerate(self.law.amplitudes):
            if name in self.free:
                result[:, self.free.index(name)] += sign * centre_SK[:, k]
        return result


def constants(law: Law, free: tuple[str, ...], ties: Mapping[str, str], fixed: Mapping[str, float], plain_F) -> dict[str, float]:
    """Plain coordinates (see `Problem.plain`) back to named constants, in the law's order; absent ones are left out."""
    values = dict(fixed)
    for name, value in zip(free, plain_F, strict=True):
        values[name] = float(law.parameter(name).value(value))
    values |= {tied: values[source] for tied, source in ties.items()}
    return {name: float(values[name]) for name in law.names if name in values}
