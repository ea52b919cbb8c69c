# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     name: python3
#     display_name: Python 3
# ---

# %% [markdown]
# # Fit a law to your sweep
#
# A table of runs in, constants with intervals out. The table here is a small real sweep of this repository: one model of 10,020
# parameters, 1.5 M tokens, integers of 2 to 8 bits on weights and activations, four seeds each. Put the path of yours (a folder of runs, CSV,
# Parquet, or a DuckDB query) in `BITLAW_SWEEP`.

# %%
# %matplotlib inline
import os
from pathlib import Path

import numpy as np

import scaling
from scaling import figures, plots
from scaling.analysis import analyse

root = next((p for p in (Path.cwd(), *Path.cwd().parents) if (p / "runs" / "reference").is_dir()), Path.cwd())
REFERENCE = str(root / "runs" / "reference" / "bits" / "runs.csv")
SWEEP = os.environ.get("BITLAW_SWEEP", REFERENCE)
runs = scaling.table(SWEEP)
print(len(runs), "runs with", len(runs.columns), "columns")
print(runs.aggregate("precision, count(*) AS seeds, round(avg(loss), 4) AS loss", "precision").order("loss"))

# %% [markdown]
# ## What the runs can carry
#
# `analyse` fits the standard laws and says why it does not where the design cannot carry one. This sweep has one size, so no law of N can be
# fitted to it: any exponent would do. Better to be told than to get a number.

# %%
found = analyse(SWEEP, bootstrap=0)
for law, why in found.why.items():
    print(f"{law}: {why}")
for comparison in filter(None, (found.chinchilla, found.precision)):
    print(comparison.reason())

# %% [markdown]
# ## What needs no law
#
# Runs that differ in precision alone are compared pair by pair, so that the seed cancels. `runs/reference/bits/README.md` states the same numbers.

# %%
for gap in found.gaps:
    print(f"{gap.precision:>6}  {gap.mean:+.3f} nats/token above {found.reference}, 95 % interval {gap.low:+.3f} to {gap.high:+.3f} ({len(gap.values)} pairs)")

# %% [markdown]
# **Read:** 2 to 5 bits cost something; the intervals of 6 and 8 bits hold zero, so nothing is known against them.

# %%
with plots.style():
    figure = plots.loss_against_bits(list(found.runs), found.fit_precision, set())
figure

# %% [markdown]
# ## A law of your own
#
# At one size and one budget there is still a law of the width alone. Two candidates as formulas: the excess loss falls exponentially with the bits, or as a
# power of the quantizer's error on Gaussian data (which tables of runs carry as `weights_log_mse`).

# %%
LAWS = {
    "exponential in the bits": ("E + A*exp(-P/gamma); gamma=0.2:10", {"P": "weights_bits"}),
    "power of the error": ("E + A*weights_mse^kappa", {"weights_mse": "exp(coalesce(weights_log_mse, -40))"}),  # float32 has no error
}
fits = {}
for name, (formula, columns) in LAWS.items():
    fits[name] = scaling.fit(runs, formula, columns=columns)
    fit = fits[name]
    print(f"{name}: {fit.law.about}")
    print("  ", {constant: str(fit.estimate(constant)) for constant in fit.params})
    print(f"   rms residual {fit.metrics['rmse']:.2%}, BIC {fit.metrics['bic']:.1f}, {fit.metrics['starts_agree']} of {fit.metrics['starts']} starts agree")

# %% [markdown]
# ## Which one predicts a width that was never trained?
#
# A law is chosen by what it predicts, not by what it fits: leave one width out, fit to the rest, predict it.

# %%
errors = {name: [] for name in LAWS}
for bits in (3, 4, 5, 6):
    for name, (formula, columns) in LAWS.items():
        score = scaling.fit(runs, formula, columns=columns, holdout=f"weights_bits = {bits}").metrics["held_out"]
        errors[name].append(score["rmse_nats"])
        print(f"{bits} bits left out, {name:<24} rms error {score['rmse_nats']:.3f} nats/token")
for name, values in errors.items():
    print(f"{name}: {np.sqrt(np.mean(np.square(values))):.3f} nats/token over the four")

# %% [markdown]
# **Read:** compare these errors with the scatter between seeds, below, before preferring either law: one run cannot be predicted better than its seed allows. Both
# have three constants and saw one model; neither says anything of another size.

# %%
noise = found.noise
print(f"between seeds, pooled: {noise.sd:.4f} nats/token" if noise else "too few seeds to tell their noise")

# %% [markdown]
# ## With several sizes and budgets
#
# Then the laws of N, D and precision apply. This table is simulated, to show the steps; the truth is known and printed beside the fit.

# %%
truth = {"A": 42.0, "B": 330.0, "E": 1.05, "alpha": 0.42, "beta": 0.42, "gamma_w": 1.4}
N, D, bits = (part.ravel() for part in np.meshgrid([2.3e3, 5.1e3, 1.0e4, 2.5e4], [6e5, 1.5e6, 3.8e6], [3.0, 4.0, 6.0, 32.0], indexing="ij"))
effective = N * np.where(bits < 32, 1 - np.exp(-bits / truth["gamma_w"]), 1.0) ** 2
loss = truth["A"] / effective ** truth["alpha"] + truth["B"] / D ** truth["beta"] + truth["E"]
sweep = {"params": N, "tokens seen": D, "bits": bits, "loss": loss * np.exp(0.004 * np.random.default_rng(0).standard_normal(N.size))}
columns = {"N": "params", "D": '"tokens seen"', "weights_bits": "bits", "activations_bits": "bits"}
comparison = scaling.compare(sweep, ["chinchilla", "kumar:tied+plain", "kumar:plain", "kumar"], columns=columns, holdout="N = max(N) OVER ()")
print(comparison.reason())
fit = scaling.fit(sweep, "kumar:tied+plain", columns=columns, holdout="N = max(N) OVER ()", bootstrap=200)
for name, value in truth.items():
    print(f"{name:>8}  {fit.estimate(name)}   truth {value:g}")

# %%
figures.held_out(fit, sweep)

# %%
figures.bits_curves(fit, sweep)
