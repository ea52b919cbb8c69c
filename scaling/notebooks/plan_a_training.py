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
# # Plan a training
#
# From a fitted law to the size, the data and the precision of the next training, with intervals, and to the runs that would narrow them.
#
# The runs of Kumar et al. (arXiv 2411.04330) are not public. This table is simulated from their printed law on their design (30
# to 220 M parameters, 1.5 to 13 B tokens, 3 to 12 bits) with 0.5 % noise, so that the right answer is known. Replace `runs` by
# your own table; nothing else changes.

# %%
# %matplotlib inline
import numpy as np

import scaling
from scaling import figures
from scaling.laws import laws

truth = laws["kumar"].published["kumar"]
WIDTHS = [(32.0, 32.0, 32.0), *((b, b, b) for b in (4.0, 5.0, 6.0, 7.0, 8.0, 12.0)), *((b, 32.0, 32.0) for b in (3.0, 4.0, 6.0, 8.0)),
          *((32.0, b, 32.0) for b in (4.0, 5.0, 6.0, 8.0)), *((32.0, 32.0, b) for b in (4.0, 5.0, 6.0, 8.0))]
N, D, kind = (part.ravel() for part in np.meshgrid([3e7, 6e7, 1.1e8, 2.2e8], [1.5e9, 3e9, 6e9, 1.3e10], np.arange(len(WIDTHS)), indexing="ij"))
runs = {"N": N, "D": D} | dict(zip(("weights_bits", "activations_bits", "kv_bits"), np.array(WIDTHS)[kind].T, strict=True))
runs["loss"] = laws["kumar"].predict(truth, **runs) * np.exp(0.005 * np.random.default_rng(0).standard_normal(N.size))
fit = scaling.fit(runs, "kumar:tied", loss="least_squares", bootstrap=100)
for name in ("alpha", "gamma_w", "gamma_a", "gamma_kv"):
    print(f"{name:>9}  {fit.estimate(name)}   truth {truth[name]:g}")

# %% [markdown]
# The design does not tell gamma from its offset (they move together), but what they imply together it tells well: the width that
# is best at any compute.

# %%
for one, other, c in fit.metrics["confounded"]:
    print(f"not separately known: {one} and {other} (correlation {c:+.3f})")
print(f"best width of all operands: {fit.estimate('optimal_bits')} bits; published 7 to 8, by the printed constants "
      f"{laws['kumar'].functionals['optimal_bits'](truth):.2f}")

# %%
figures.bits_curves(fit, runs)

# %% [markdown]
# ## The best N, D and width for a budget
#
# Compute is in FLOP of 16 bits. With `bits` a product costs in proportion to its wider operand; with `h100` what the hardware's dense rates say.

# %%
BUDGET = 2e19
for model in ("bits", "h100"):
    plan = scaling.plan(fit, compute=BUDGET, cost_model=model)
    print(f"{model:>5}: N {plan.N}, D {plan.D}, bits {plan.bits}, loss {plan.loss}")
    for note in plan.notes:
        print("       note:", note)

# %% [markdown]
# **Read:** under `h100` the width is one that the device has, the one above the law's own optimum, and the model is a little smaller for it.
#
# ## The size is given, or the memory is, or the model will be served

# %%
for what, options in {"N = 1e8": {"fix": {"N": 1e8}}, "weights in 60 MB": {"memory": 6e7}, "1e11 tokens served": {"inference_tokens": 1e11}}.items():
    plan = scaling.plan(fit, compute=BUDGET, **options)
    print(f"{what:>20}: N {plan.N.value:.3g}, D {plan.D.value:.3g}, {plan.bits.value:.2f} bits, loss {plan.loss}")

# %% [markdown]
# ## How far may it be trusted?
#
# The intervals grow beyond the largest run. More than 30 times beyond the data a plan is refused.

# %%
try:
    scaling.plan(fit, compute=1e24)
except ValueError as refusal:
    print(refusal)

# %%
figures.interval_fan(fit, runs, factor=30)

# %% [markdown]
# ## Which runs to train next?
#
# Candidates are scored by how much they are expected to shrink the interval of the quantity asked for, per FLOP.

# %%
candidates = [{"N": n, "D": d, "weights_bits": b, "activations_bits": b, "kv_bits": b} for n in (3e7, 6e7, 1.1e8) for d in (1.5e9, 6e9)
              for b in (3.5, 5.0, 7.0)]
ranked = scaling.next_runs(fit, candidates, "optimal_bits", cost=[6 * c["N"] * c["D"] * c["weights_bits"] / 16 for c in candidates])
for one in ranked[:3]:
    print(f"N {one.columns['N']:.2g}, D {one.columns['D']:.2g}, {one.columns['weights_bits']:g} bits: half-width {one.before:.3f} -> "
          f"{one.half_width:.3f} bits for {one.cost:.2g} FLOP")

# %% [markdown]
# **Conclude:** small, short runs at narrow widths come first: the width's optimum hangs on how the loss falls there, and they are
# cheap. The expectation knows nothing of whether the law is right at those widths.
