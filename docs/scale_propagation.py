"""Writes docs/scale_propagation.md and its figure from the registry of rules and a training step: python -m docs.scale_propagation"""

from __future__ import annotations

import pathlib
import textwrap

from docs.formats import table
from trainer.propagation.rules.registry import describe_rules

HERE = pathlib.Path(__file__).parent
_HOW = """# Scale propagation

Every floating-point value of a program is held as `data * 2**exponent`: an array near unit scale, and an integer exponent for the tensor,
or for each leading index of stacked layers and cohorts. Data then fits float16 and FP8 through the whole step, backward pass and optimizer
included, with no loss scale and no amax. The idea is that of Scalify (arXiv 2407.17353); this one runs on today's JAX, through scan, remat
and attention.

```python
from trainer import propagate_scales, scaled, unscaled

step = propagate_scales(jax.value_and_grad(loss))               # differentiate first
loss, grads = step(scaled(params, dtype="float16"), batch)      # ScaledArrays in and out: grads["w"].data, grads["w"].exponent
step = propagate_scales(jax.value_and_grad(loss), data_dtype="float16")   # a float32 program on float32 arrays, all data held in float16
```

In training it is a config value: `precision=fp16_scaled` (float16 data), `fp8_scaled` (and FP8 products: E4M3 forward, E5M2 backward, by the
carried scales), `fp8_scaled_fp16_state` (and float16 master weights and Adam moments); `precision.source=current|delayed|static|propagated` says
where the scales of quantizers come from, `precision.granularity=block` makes them relative to what is carried, `precision.data_dtype=float32`
checks that nothing changes.

![The sizes of all values of a training step, and of the data that is held](scale_propagation.png)

*Loss and gradients of the 100k decoder under `fp16_scaled` (16 x 128 bytes of text): every array in the order of the program. Plain float16
would hold the values, and below 2**-14 loses their digits; held is the data.*

## How it works

`propagate_scales` traces the function and interprets its jaxpr. Each primitive has a rule that says what happens to data and exponents;
jit, scan, while, cond, remat and custom derivatives are gone into. Four decisions make it exact and cheap:

- **One form for each value**: the float32 data of a ScaledArray argument is brought near unit scale on entry, at the cost of a pass over it. How
  much of a value was in the data and how much in the exponent makes no difference after that, down to the last bit. In a loop of your own that
  carries ScaledArrays from step to step, put the loop inside the transform; or say `unit_inputs=True`, where you keep them there yourself.
- **Exponents are integers, and symbols while tracing**: a known number plus exponents of arguments, each counted. What is the same cancels
  before XLA sees it, so a chain of elementwise operations costs nothing. Where two scales meet at run time (a sum, a concatenation), `max` of
  two int32 scalars decides, and the data is multiplied by a power of two: in float32 no bit changes.
- **Growth is known, not measured**: a matrix product over K moves floor(log2 sqrt(K)) into the exponent, a sum likewise. Rules compute in
  float32 and round once to the dtype that data is held in. Only where no rule can foresee the size is data measured, by its largest
  magnitude: narrow data after `exp`, `max` of two scales and casts to float16; and terms of sums that have a factor which may vanish
  everywhere (`exp(x)`, `1 - tanh(x)**2`): in the derivative of GELU, zero times something huge.
- **Zeros, infinities and mask values have any scale**: ReLU's zeros, scan's empty accumulators and `-1e30` never set an exponent. Other
  constants go to the nearest power of two: multiplying by a learning rate moves the scale and not the data.

Where data drifts all the same, `rescale(x, by="rms"|"amax"|"mean_abs", on="forward"|"cotangent"|"both")` brings it back, exactly, at the cost
of a reduction. `propagate_scales(f, rescale="auto")`, or `trainer.propagation.calibrate(f, *args)`, runs the function once and places the
fewest rescales that keep all data within 2**-8 to 2**8; `print(plan)` lists them by source line. With the decoder's own rules (below) its data
stays within 2**-8 to 2**8 and needs none (the figure); by the rules of primitives alone it drifts to 2**-13, and 2 rescales, one a layer, keep
it; within 2**-6 to 2**6, 2 a layer do (`python -m benchmarks.scale_propagation --only rescales`; Scalify's paper places 2 a layer by hand,
scaling as Transformer Engine does takes 18).
`step.report(*args)` counts equations before and after, and the fall-backs: a primitive without a rule is unscaled, applied and goes on at
exponent 0; `on_fallback="raise"` names it with its line.
"""
_RULES = """## Rules

a, b: data; ea, eb: exponents; e: that of the result, whose data stands in the middle column; f: the primitive itself.

"""
_REST = """Structures: jit, scan, while, cond, remat, custom_jvp and custom_vjp calls, vmap from outside and inside.

## What it costs

`python -m benchmarks.scale_propagation` measures time; [runs/reference/scaled](../runs/reference/scaled/README.md) measures loss.

## A rule of your own

For a function, where you know more than its primitives do; it holds under `vmap` and differentiation (the derivative is that of the function):

```python
@trainer.scale_rule
def softmax(x):
    return jax.nn.softmax(x)

@softmax.defrule
def _(x):                                             # a ScaledArray for every floating-point argument
    return ScaledArray(jax.nn.softmax(unscaled(x)), 0)
```

For a primitive: `@trainer.propagation.register_rule("cumprod")`, then `def rule(*scaled_arrays, **params)`. The decoder has rules for its norm,
SwiGLU, attention and for quantized products (`trainer/scaled_ops.py`, `trainer/linear.py`).

## What it does not do

- **No gradient through it.** `grad(propagate_scales(f))` is refused: it would be that of the data. Write `propagate_scales(grad(f))`.
- **No guard against drift that you did not ask for**, but for what loops carry: that is brought back where it leaves 2**-8 to 2**9. Data that
  moves 2**30 away from unit scale can overflow in products of several factors. A sum takes the larger exponent, so parameters updated by
  gradients whose exponent says more than their data lose digits in float16: an optimizer inside the transform wants float32 data. The
  trainer's computes in float32, from unscaled gradients.
- **Numbers beyond 2**24 are masks** where they stand as constants in the program: they never set a scale, and saturate. In an array that is an
  argument they are data: give masks as booleans, or with -inf in them; 0 and -1e9 in one float16 tensor leave nothing of the logits that it is added
  to, nor does finfo.min in a float32 ScaledArray.
- **One exponent for a tensor.** In float32, values 2**-126 of the largest and below become zero (numbers that stand in the program, such as an
  epsilon, become that small instead): also beside zeros that come of a dead ReLU or a cancellation at an exponent of 100 or more, and where
  rows with exponents of their own fall together. Plain arrays beside ScaledArrays stay as they are, at exponent 0.
- cumprod, igamma and what else has no rule falls back, shard_map too. In float16 data everything smaller than 2**-24 of the unit is lost, as the format has it.
- Exponents are clipped nowhere: beyond 2**127 the data is right and its float32 value is not.
"""


def decoder(precision: str):
    """(function, arguments): loss and gradients of the 100k decoder on a batch of text; with rules of its own under "fp16_scaled"."""
    import jax
    import numpy as np

    from trainer import build, config, model, policy

    chosen = build.step_structure(config("model=100k", "steps=1"), 256).model
    graphdef, call = model.blueprint(chosen)[0], model.Call(policy(precision))
    text = np.frombuffer(pathlib.Path(textwrap.__file__).read_bytes(), np.uint8)[: 16 * 129].reshape(16, 129)

    def loss(params, tokens):
        return jax.numpy.mean(model.next_token_losses(graphdef, params, tokens, call))

    return jax.value_and_grad(loss), (model.init_params(chosen, jax.random.key(0)), text.astype(np.int32))


def sizes() -> list[tuple[float, float, bool]]:
    """(log2 of the root mean square of the value, of the data, whether it is of the backward pass) of every array in the step."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from trainer import propagate_scales

    function, args = decoder("fp16_scaled")
    found = {}

    def watch(path, eqn, value) -> None:
        if not value.ndim:
            return
        backward = "transpose" in str(eqn.source_info.name_stack)
        exponent = jnp.asarray(value.exponent.traced(), jnp.float32)

        def keep(size, exponent):
            if 0 < size < np.inf and abs(exponent) < 1000:
                found[path] = (float(np.log2(size) + exponent), float(np.log2(size)), backward)

        data = value.data.astype(jnp.float32)
        masked = jnp.abs(data) > 3e4
        jax.debug.callback(keep, jnp.sqrt(jnp.mean(data * data, where=~masked)), jnp.mean(exponent))

    carried = propagate_scales(function, data_dtype="float16")
    jax.block_until_ready(jax.jit(carried.watched(None, watch))(*args))
    jax.effects_barrier()
    return [found[path] for path in sorted(found)]


def draw() -> None:
    """scale_propagation.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = sizes()
    order = range(len(points))
    figure, ax = pyplot.subplots(figsize=(10, 4), constrained_layout=True)
    ax.axhspan(-14, 16, color="tab:green", alpha=0.12, label="float16, normal numbers")
    ax.axhspan(-24, -14, color="tab:orange", alpha=0.12, label="float16, subnormal numbers")
    ax.plot(order, [value for value, _, _ in points], ".", color="0.5", markersize=4, label="value")
    ax.plot(order, [data for _, data, _ in points], ".", color="tab:blue", markersize=4, label="data held")
    begins = next(i for i, (_, _, backward) in enumerate(points) if backward)
    ax.axvline(begins, color="0.3", linewidth=0.8)
    ax.annotate("backward pass ", (begins, 15), xytext=(4, 0), textcoords="offset points", va="top", fontsize=9)
    ax.set(xlabel="equation of the program", ylabel="log2 of the root mean square", xlim=(0, len(points)))
    ax.legend(ncols=4, loc="lower left", fontsize=8)
    figure.savefig(HERE / "scale_propagation.png", dpi=110)


def rules() -> str:
    """The table of rules, from the registry."""
    rows = [(", ".join(f"`{name}`" for name in names), data.replace("|", "\\|"), exponent.replace("|", "\\|"))
            for (data, exponent), names in describe_rules().items()]
    return table(("primitives", "data", "exponent"), rows)


def page() -> str:
    """The text of docs/scale_propagation.md."""
    return "\n".join([_HOW, _RULES + rules(), _REST])


def main() -> None:
    (HERE / "scale_propagation.md").write_text(page(), encoding="utf-8")
    draw()


if __name__ == "__main__":
    main()
