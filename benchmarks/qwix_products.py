"""Our quantized products and qwix's in the same models, for benchmarks/policies.py.

The models, in plain JAX, differ in nothing but what multiplies by the four weights of a block:
    decoder    plain_decoder.py's whole training step, layers unrolled: attention, loss and AdamW take most of it
    linears    gradient descent on the linear layers alone: the four of a block, as many blocks, gates between them

qwix multiplies through its `dot_general_qt` (what its QtProvider puts in the place of lax.dot_general), configured as QtProvider does for
weight, activation and backward types of int8 or float8_e4m3fn: current absmax scales per token and per output channel; the backward reads
the forward's narrow values, with their scale moved onto the output gradient, which is quantized for each of its two products. All three products
are int8 x int8 -> int32, or float8 x float8. Ours goes through `trainer.dot_general` under the policy with the same elements and granularities
(scales of the forward kept for the backward): emulated, exact products of narrow values in float32; and native, where each product
quantizes for itself, or (moved) as qwix does. Activations are [batch, time, width] in both models: XLA:CPU runs int8 products that contract batch and time (qwix's)
four times as fast as the same product of matrices.
"""
from __future__ import annotations

import operator
from collections import Counter

from benchmarks import timing

E4M3 = ("fp8", "precision.weights.granularity=channel", "precision.activations.granularity=token",
        *(f"precision.output_gradients.{key}" for key in ("granularity=token", "exp_bits=4", "man_bits=3", "variant=fn")))
PAIRS = (("ours int8", "qwix int8"), ("ours int8 native", "qwix int8"), ("ours int8 moved", "qwix int8"), ("ours e4m3", "qwix e4m3"))


def ours(arguments):
    """x @ w in the precision of `trainer.policy(*arguments)`, as a function of x [..., K] and w [K, M]."""
    from trainer import dot_general, policy

    dot = dot_general(policy(*arguments))
    return lambda x, w: dot(x, w, (((x.ndim - 1,), (0,)), ((), ())))


def qwix(dtype: str):
    """The same by qwix, all three products in that dtype."""
    import jax.numpy as jnp
    from qwix._src.core.dot_general_qt import DotGeneralQtConfig, dot_general_qt

    qtype = jnp.dtype(dtype)
    config = DotGeneralQtConfig(lhs_qtype=qtype, rhs_qtype=qtype, dlhs_grad_qtype=qtype, drhs_grad_qtype=qtype)
    return lambda x, w: dot_general_qt(x, w, (((x.ndim - 1,), (0,)), ((), ())), config)


def products() -> dict:
    """Name -> product."""
    from benchmarks.policies import KEPT_INT8

    return {"float32": operator.matmul, "ours int8": ours(KEPT_INT8), "ours int8 native": ours(("int8_native",)), "ours int8 moved": ours(("int8_moved",)), "ours e4m3": ours(E4M3),
            "qwix int8": qwix("int8"), "qwix e4m3": qwix("float8_e4m3fn")}


def decoder(config, product) -> timing.Program:
    """Training steps of the plain decoder."""
    from benchmarks import train_step

    return train_step.plain(config, scan=False, product=product)


def linears_loss(layers, x_BTD, product):
    """A loss of the linear layers alone."""
    import jax
    import jax.numpy as jnp

    for index in range(layers["qkv"].shape[0]):
        q, k, v = jnp.split(product(x_BTD, layers["qkv"][index]), 3, axis=-1)
        x_BTD = x_BTD + product(jax.nn.silu(q) * k + v, layers["attention_out"][index])
        gate, up = jnp.split(product(x_BTD, layers["gate_up"][index]), 2, axis=-1)
        x_BTD = x_BTD + product(jax.nn.silu(gate) * up, layers["down"][index])
    return jnp.mean(jnp.square(x_BTD))


def linears_data(config):
    """The layers' weights, and activations of a batch."""
    import jax

    from benchmarks import our_step
    from trainer.model import init_params

    layers = init_params(config, jax.random.key(0))["layers"]
    weights = {name: layers[name] for name in ("qkv", "attention_out", "gate_up", "down")}
    return weights, jax.random.normal(jax.random.key(1), (our_step.BATCH, our_step.SEQ_LEN, config.d_model))


def linears(config, product) -> timing.Program:
    """Steps of gradient descent of the linear layers alone, several in a dispatch as in training; the gradient of the input is a result too."""
    import jax

    from benchmarks import our_step

    gradients = jax.value_and_grad(lambda layers, x: linears_loss(layers, x, product), argnums=(0, 1))

    def step(state, _):
        layers, x_BTD = state
        value, (of_layers, of_x) = gradients(layers, x_BTD)
        return (jax.tree.map(lambda w, g: w - 0.01 * g, layers, of_layers), x_BTD - 0.01 * of_x), value

    steps = jax.jit(lambda state: jax.lax.scan(step, state, length=our_step.STEPS), donate_argnums=0)
    state = linears_data(config)

    def update() -> None:
        nonlocal state
        state, losses = steps(state)
        jax.block_until_ready((state, losses))

    return timing.Program(update, units=our_step.STEPS)


MODELS = {"linears": linears, "decoder": decoder}


def dtypes_of_products(config) -> dict:
    """By library: how many products of which dtypes loss and gradients of the linear layers have (three for each layer)."""
    import jax

    data = linears_data(config)
    counts = {}
    for name, product in products().items():
        jaxpr = jax.make_jaxpr(jax.value_and_grad(lambda layers, x, p=product: linears_loss(layers, x, p), argnums=(0, 1)))(*data)
        counts[name] = dict(sorted(Counter(_products(jaxpr.jaxpr)).items()))
    return counts


def _products(jaxpr):
    """"lhs x rhs -> result" of every product, those of inner programs included."""
    from jax.extend.core import jaxprs_in_params

    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            lhs, rhs = (v.aval.dtype.name for v in eqn.invars)
            yield f"{lhs} x {rhs} -> {eqn.outvars[0].aval.dtype.name}"
        for inner in jaxprs_in_params(eqn.params):
            yield from _products(inner)
