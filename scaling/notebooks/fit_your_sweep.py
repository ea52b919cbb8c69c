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
# A table of runs in, constants with intervals out, and a law chosen by what it predicts. The table here is a real sweep of this repository
# (`runs/reference/ladder`): four sizes, three budgets, integers on weights, on activations or on both. Put the path of yours (a folder of runs,
# CSV, Parquet, or a DuckDB query) in `BITLAW_SWEEP`.

# %%
# %matplotlib inline
import os
from pathlib import Path

import numpy as np

import scaling
from scaling import figures, plots
from scaling.analysis import analyse

root = next((p for p in (Path.cwd(), *Path.cwd().parents) if (p / "runs" / "reference").is_dir()), Path.cwd())
REFERENCE = str(root / "runs" / "reference" / "ladder" / "runs.csv")
SWEEP = os.environ.get("BITLAW_SWEEP", REFERENCE)
runs = scaling.table(SWEEP)
print(len(runs), "runs with", len(runs.columns), "columns")
print(runs.aggregate("n_params, count(*) AS runs, count(DISTINCT tokens) AS budgets, count(DISTINCT precision) AS precisions",
                     "n_params").order("n_params"))

# %% [markdown]
# ## What needs no law
#
# Runs that differ in precision alone are compared pair by pair, so that the seed cancels.

# %%
found = analyse(SWEEP, bootstrap=0)
print(f"between seeds, pooled: {found.noise.sd:.4f} nats/token" if found.noise else "too few seeds to tell their noise")
for gap in found.gaps:
    print(f"{gap.precision:>10}  {gap.mean:+.3f} nats/token above {found.reference}, 95 % interval {gap.low:+.3f} to {gap.high:+.3f} "
          f"({len(gap.values)} pairs)")

# %%
with plots.style():
    figure = plots.loss_against_tokens(list(found.runs), None, set())
figure

# %% [markdown]
# **Read:** narrow activations (`w32a2`: float32 weights, 2-bit activations) cost more than narrow weights, and more in larger
# models. With 2 bits the largest model does not gain from data at all.
#
# ## What the runs can carry
#
# `analyse` fits the standard laws and says which constants the design does not identify. Better to be told than to get a number:
# the loss that would be left at infinite size, E, cannot be seen from models this small.

# %%
for comparison in filter(None, (found.chinchilla, found.precision)):
    print(comparison.reason())
    for constant in comparison.best.params:
        print(f"   {constant:>8}  {comparison.best.estimate(constant)}")
for law, why in found.why.items():
    print(f"{law}: {why}")

# %% [markdown]
# ## Weights alone
#
# Where only weights are narrow, the law of Kumar et al. is at home: a width takes away from the parameters that count. The largest size is held out.

# %%
LARGEST = "N = max(N) OVER ()"
WEIGHTS = "activations_bits = 32"
fit = scaling.fit(runs, "kumar:tied", where=WEIGHTS, holdout=LARGEST, loss="least_squares", bootstrap=100)
print(fit.label, {name: str(fit.estimate(name)) for name in ("alpha", "gamma_w", "n_w")})
score = fit.metrics["held_out"]
print(f"largest size: rms error {score['rmse']:.2%}, {score['covered']:.0%} of {score['rows']} runs in their intervals")
for law in ("kumar:tied", "mse_efficiency"):
    for one in scaling.leave_out(runs, law, ["each-weights_bits"], where=WEIGHTS, loss="least_squares"):
        print(f"{law:>15}, {one.split.level} left out: " + (one.why or f"rms error {one.rmse:.1%}"))

# %%
figures.bits_curves(fit, runs)

# %%
figures.held_out(fit, runs)

# %% [markdown]
# **Read:** both laws interpolate; only the quantizer's error reaches 2 bits from 3 and 4: Kumar's factor 1 - exp(-P/gamma + n),
# fitted to these, is below 0 there.
#
# ## All runs, and a law of your own
#
# An effective number of parameters bounds what a width can cost, and every such loss falls with the data. The runs say otherwise,
# so here is a law that says what they do, as a formula: Chinchilla, and an excess for each operand that falls exponentially with
# its bits and grows with size and data.

# %%
LAWS = {
    "effective parameters (kumar)": "kumar",
    "effective parameters (mse_efficiency)": "mse_efficiency",
    "excess by width": "E + A/N^alpha + B/D^beta + C*exp(-weights_bits/gw) + G*exp(-activations_bits/ga); gw=0.2:10; ga=0.2:10",
    "excess that grows": "E + A/N^alpha + B/D^beta + C*exp(-weights_bits/gw)*N^m + G*exp(-activations_bits/ga)*N^n*D^k; gw=0.2:10; "
    "ga=0.2:10; m=-1:1; n=-1:1; k=-1:1",
}
fits = {}
for name, law in LAWS.items():
    fits[name] = scaling.fit(runs, law, holdout=LARGEST, loss="least_squares")
    score = fits[name].metrics["held_out"]
    print(f"{name:<38} {len(fits[name].free):>2} constants, BIC {fits[name].metrics['bic']:7.1f}, largest size: rms error {score['rmse']:.1%}, "
          f"{score['covered']:.0%} of {score['rows']} runs in their intervals")
own = fits["excess that grows"]
print({name: str(own.estimate(name)) for name in ("m", "n", "k", "gw", "ga")})

# %% [markdown]
# ## Which one predicts a precision that was never trained?
#
# A law is chosen by what it predicts, not by what it fits: leave one precision out, fit to the rest, predict it.

# %%
for name, law in LAWS.items():
    told = [one for one in scaling.leave_out(runs, law, ["each-precision"], loss="least_squares")]
    scored = [one for one in told if np.isfinite(one.rmse)]
    rms = np.sqrt(sum(one.rows * one.rmse**2 for one in scored) / sum(one.rows for one in scored))
    print(f"{name:<38} rms error {rms:.1%} of {sum(one.rows for one in scored)} runs"
          + (f", none for {len(told) - len(scored)} precisions" if len(told) > len(scored) else ""))

# %% [markdown]
# **Read:** compare these errors with the scatter between seeds, 0.6 % of the loss: one run cannot be predicted better than its
# seed allows. The formula says nothing of models outside of this ladder: beyond it, its intervals grow, and more than 30 times
# beyond it answers nothing.

# %%
print(own.predict(N=1e5, D=1e7, weights_bits=4.0, activations_bits=8.0))
try:
    own.predict(N=1e9, D=2e10, weights_bits=4.0, activations_bits=8.0)
except ValueError as refusal:
    print(refusal)
