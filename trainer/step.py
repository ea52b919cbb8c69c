"""init, step and evaluate as pure functions of state, batch and traced hyper-parameters (DESIGN 3.7).

Shapes: B sequences of a batch (this device's share of them, under data parallelism), T time.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree

from trainer import model as decoder
from trainer import carried, scales, stored, telemetry
from trainer.keys import fold_in
from trainer.operands import RowShards
from trainer.optimizers import OptimizerNumbers
from trainer.precision import ROLES, PrecisionPolicy
from trainer.propagation import unscaled
from trainer.schedules import SCHEDULES, ScheduleNumbers

# Parameters whose learning rate scales as 1/width under muP (Yang et al. 2022, table 3, Adam: hidden and output weights).
HIDDEN_MATRICES = ("qkv", "attention_out", "gate_up", "down", "head")
PROBE_SALT = 0x50524F42
EVAL_BATCH = 32  # windows per forward pass of an evaluation, over all devices


@dataclass(frozen=True)
class StepStructure:
    """Everything about a step that is static: one value of it is one compiled program."""

    model: decoder.ModelConfig
    optimizer: str
    schedule: str
    batch_size: int
    seq_len: int
    accumulate: int = 1
    telemetry_every: int = 0  # 0: never


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hyper:
    """Traced numbers of one run. `key`: uint32[2] from the seed. `divergence_margin`: nats above the first loss, float32."""

    optimizer: OptimizerNumbers
    schedule: ScheduleNumbers
    policy: PrecisionPolicy
    key: jax.Array
    divergence_margin: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Everything that a run needs to go on. `diverged_step` is -1 while the run is healthy; a diverged run never changes again."""

    params: dict
    opt_state: Any
    step: jax.Array  # int32: updates done
    first_loss: jax.Array  # float32: the loss of step 0, the reference of the divergence rule
    diverged_step: jax.Array  # int32
    histories: dict = field(default_factory=dict)  # role -> AmaxHistory or RangeAverage of scales that go by earlier steps; empty where there are none


class Metrics(NamedTuple):
    """Of one step, float32: training loss (nats per token), global gradient norm before clipping, learning rate; how much of
    the update the parameters underwent (`optimizers.DescentQuality`; of float32 weights edq and lost are 1 and 0 by construction, see
    `stored.quality`); and role -> telemetry's
    statistics [L, sites, fields] (`model.sites_of`), NaN where the step is not due, empty where no step is."""

    loss: jax.Array
    grad_norm: jax.Array
    lr: jax.Array
    edq: jax.Array
    lost: jax.Array
    updates_per_ulp: jax.Array
    sites: dict[str, jax.Array] = {}


def no_metrics(structure: StepStructure, policy: PrecisionPolicy) -> Metrics:
    """The metrics of a step that is not taken: NaN."""
    return Metrics(*(jnp.float32(jnp.nan),) * 6, sites=_no_statistics(structure, policy))


def _no_statistics(structure: StepStructure, policy: PrecisionPolicy) -> dict[str, jax.Array]:
    def nothing(role):
        return jnp.full((structure.model.num_layers, len(decoder.sites_of(role)), len(telemetry.FIELDS)), jnp.nan, jnp.float32)

    return {role: nothing(role) for role in (*ROLES, *policy.attention_roles)} if structure.telemetry_every else {}


def _leaf_name(path) -> str:
    return path[-1].key


def lr_tree(params, model: decoder.ModelConfig, lr):
    """Each parameter's learning rate: lr, times base_width / d_model for hidden matrices under muP."""
    factor = model.mup_base_width / model.d_model if model.mup_base_width else 1.0
    return jax.tree_util.tree_map_with_path(lambda path, _: lr * factor if _leaf_name(path) in HIDDEN_MATRICES else lr, params)


def decay_tree(params):
    """True for matrices, False for the gains of normalisations and learned scales."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not (_leaf_name(path).endswith("norm") or "steps" in (part.key for part in path)), params)


def _optimizer(structure: StepStructure, params, hyper: Hyper, lr):
    return stored.optimizer(structure.optimizer, hyper.optimizer, lr_tree(params, structure.model, lr), decay_tree(params), hyper.policy, hyper.key)


def init(structure: StepStructure, hyper: Hyper, given: dict[str, jax.Array] | None = None) -> State:
    """The state before the first step; a pure function of hyper.key. given: path -> float32 parameter that starts with this value."""
    params = decoder.init_params(structure.model, jax.random.wrap_key_data(hyper.key, impl="threefry2x32"))
    if given is not None:
        params = jax.tree.unflatten(jax.tree.structure(params), [given.get(path, leaf) for path, leaf in decoder.by_path(params).items()])
    params = stored.initial(params, hyper.policy, hyper.key)
    with jax.numpy_dtype_promotion("standard"):
        opt_state = _optimizer(structure, params, hyper, hyper.optimizer.lr).init(params)
    params, opt_state = stored.held_params(params, hyper.policy), stored.held_moments(opt_state, hyper.policy)
    histories = scales.empty_histories(hyper.policy, _places(structure))
    return State(params, opt_state, jnp.int32(0), jnp.float32(jnp.inf), jnp.int32(-1), histories)


def _places(structure: StepStructure) -> tuple[int, int]:
    """Layers and linear sites of a layer."""
    return structure.model.num_layers, len(decoder.SITES)


def _rows(data_axis: str | None) -> RowShards | None:
    return None if data_axis is None else RowShards(data_axis)


def loss_and_gradients(structure: StepStructure, graphdef, params, tokens_BT1, policy, key, data_axis=None):
    """Mean loss and its gradients over the (global) batch, with nothing remembered: for policies without delayed scales."""
    loss, grads, _ = differentiate(structure, graphdef, params, tokens_BT1, policy, key, data_axis, scales.Site())
    return loss, grads


def differentiate(structure: StepStructure, graphdef, params, tokens_BT1, policy, key, data_axis, sites: scales.Site):
    """Mean loss and its gradients over the (global) batch, and what the meter of `sites` (stacked [L, S]) saw. `accumulate` micro-batches
    are run one after another. Each part's loss is its share of the mean, so that gradients inside have the size, and round as, in one
    large batch."""
    micro = structure.accumulate
    num_parts = micro * (1 if data_axis is None else lax.axis_size(data_axis))

    def loss_fn(params, meter, tokens_bT1, index):
        call = decoder.Call(policy, fold_in(key, index) if policy.stochastic else None, _rows(data_axis), replace(sites, meter=meter),
                            structure.batch_size * structure.seq_len)
        return jnp.mean(decoder.next_token_losses(graphdef, params, tokens_bT1, call)) / num_parts

    value_and_grad = jax.value_and_grad(loss_fn, argnums=(0, 1))

    def here(params, tokens_BT1):
        if micro == 1:
            loss, (grads, seen) = value_and_grad(params, sites.meter, tokens_BT1, 0)
            return loss, grads, jax.tree.map(lambda x: x[None], seen)
        parts = tokens_BT1.reshape(micro, -1, tokens_BT1.shape[-1])

        def add(total, xs):
            loss, (grads, seen) = value_and_grad(params, sites.meter, *xs)
            return jax.tree.map(jnp.add, total, (loss, grads)), seen

        zeros = (jnp.float32(0.0), jax.tree.map(jnp.zeros_like, params))
        (loss, grads), seen = lax.scan(add, zeros, (parts, jnp.arange(micro, dtype=jnp.uint32)))
        return loss, grads, seen

    loss, grads, seen = carried.under_policy(here, policy)(params, tokens_BT1)
    if data_axis is not None:  # one collective for everything
        flat, unravel = ravel_pytree((loss, grads))
        loss, grads = unravel(lax.psum(flat, data_axis))
    return loss, grads, scales.combine(seen, data_axis)


def _observe(structure: StepStructure, graphdef, state: State, tokens_BT1, hyper: Hyper, data_axis, member_axis):
    """`differentiate` for this state; with telemetry where it is due (or is for another member: under vmap all take the same branch)."""
    policy, key = hyper.policy, fold_in(hyper.key, state.step)
    meter = scales.range_meter(policy, _places(structure))
    sites = scales.Site(scales.remembered(policy, state.histories), blend=_blend(structure, policy, state.step), meter=meter)
    run = partial(differentiate, structure, graphdef, state.params, tokens_BT1, policy, key, data_axis)
    if not structure.telemetry_every:
        return run(sites)

    def unwatched():
        loss, grads, seen = run(sites)
        return loss, grads, replace(seen, statistics=_no_statistics(structure, policy))

    due = telemetry.due(state.step, structure.telemetry_every)
    if member_axis is not None:
        due = lax.pmax(due.astype(jnp.int32), member_axis) > 0
    return lax.cond(due, lambda: run(replace(sites, meter=scales.watched(meter, policy, _places(structure)))), unwatched)


def _blend(structure: StepStructure, policy: PrecisionPolicy, step):
    """How much of each layer is quantized at a step, [L, S]; None for all."""
    if policy.ramp is None:
        return None
    num_layers, num_sites = _places(structure)
    return jnp.broadcast_to(policy.ramp.blend(step, num_layers)[:, None], (num_layers, num_sites))


def step(structure: StepStructure, graphdef, state: State, tokens_BT1, hyper: Hyper, data_axis=None, member_axis=None) -> tuple[State, Metrics]:
    """One optimizer update. A loss or gradient that is not finite, or a loss above first_loss + divergence_margin, freezes the
    run: the update is not applied and `diverged_step` says where. data_axis: over which the batch is split; member_axis: the name of
    an axis over which members are mapped by vmap."""
    loss, grads, seen = _observe(structure, graphdef, state, tokens_BT1, hyper, data_axis, member_axis)
    grad_norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(grads)))
    # Not the best loss so far: that of one small batch can lie nats below the next one's.
    first_loss = jnp.where(state.step == 0, loss, state.first_loss)
    healthy = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & (loss <= first_loss + hyper.divergence_margin)

    lr = hyper.optimizer.lr * SCHEDULES[structure.schedule](state.step, hyper.schedule)
    clip = jnp.minimum(1.0, hyper.optimizer.clip_norm / jnp.maximum(grad_norm, 1e-12))
    params, opt_state = stored.wide(state.params), unscaled(state.opt_state)
    optimizer = _optimizer(structure, params, hyper, lr)
    with jax.numpy_dtype_promotion("standard"):  # optax multiplies its int32 counts with our float32 numbers
        updates, opt_state = optimizer.update(jax.tree.map(lambda g: g * clip, grads), opt_state, params)
    new = jax.tree.map(jnp.add, params, updates)
    held = stored.held_params(new, hyper.policy)
    quality = stored.quality(opt_state, params, new, held, state.step, hyper.policy)
    opt_state = stored.held_moments(opt_state, hyper.policy)

    def keep(new, old):
        return jax.tree.map(lambda n, o: jnp.where(healthy, n, o), new, old)

    after = State(
        keep(held, state.params), keep(opt_state, state.opt_state), state.step + healthy.astype(jnp.int32),
        first_loss, jnp.where(healthy, state.diverged_step, state.step),
        keep(scales.pushed(hyper.policy, state.histories, seen.ranges), state.histories),
    )
    return after, Metrics(loss, grad_norm, lr, *quality, sites=seen.statistics)


class Probe(NamedTuple):
    """What low precision does to one batch's gradients, float32: cosine of the angle to the exact ones, <g, exact> / |exact|^2, and role ->
    share of values that became zero (underflow) or lay beyond the range (overflow) in the role's first product, means over the layers and
    sites that quantize it, NaN where none does; of attention (`methods.attention`) the roles that some layer quantizes."""

    cosine: jax.Array
    magnitude: jax.Array
    underflow: dict[str, jax.Array]
    overflow: dict[str, jax.Array]


def probe(structure: StepStructure, graphdef, state: State, tokens_BT1, hyper: Hyper) -> Probe:
    """The gradients of one batch as the policy computes them, against those in float32 at the same parameters."""
    structure, policy = replace(structure, batch_size=tokens_BT1.shape[0], accumulate=1), hyper.policy
    params, places = stored.wide(state.params), _places(structure)
    sites = scales.Site(scales.remembered(policy, state.histories), meter=scales.watched(scales.range_meter(policy, places), policy, places))
    _, found, seen = differentiate(structure, graphdef, state.params, tokens_BT1, policy, fold_in(hyper.key, PROBE_SALT), None, sites)
    _, exact, _ = differentiate(structure, graphdef, params, tokens_BT1, PrecisionPolicy(), fold_in(hyper.key, PROBE_SALT), None, scales.Site())
    (found, exact) = (ravel_pytree(grads)[0] for grads in (found, exact))
    top, top_exact = (jnp.maximum(jnp.max(jnp.abs(g)), np.float32(2.0**-126)) for g in (found, exact))
    found, exact = found / top, exact / top_exact  # so that no square leaves the range
    along, size, size_exact = jnp.vdot(found, exact), jnp.vdot(found, found), jnp.vdot(exact, exact)
    shares = {name: {role: jnp.nanmean(values[..., telemetry.FIELDS.index(name)]) for role, values in seen.statistics.items()} for name in telemetry.LOSSES}
    return Probe(along / jnp.sqrt(size * size_exact), along / size_exact * (top / top_exact), **shares)


def eval_groups(num_windows: int, num_devices: int) -> int:
    """How many forward passes an evaluation takes: of EVAL_BATCH windows over all devices where that divides, else of fewer."""
    return num_windows // (num_devices * math.gcd(max(EVAL_BATCH // num_devices, 1), num_windows // num_devices))


def evaluate(graphdef, params, histories, windows_WT1, policy: PrecisionPolicy, key, data_axis=None) -> jax.Array:
    """Mean loss of every validation window of this device, nats per token, [W]. The histories of delayed scales are read only."""
    num_devices = 1 if data_axis is None else lax.axis_size(data_axis)
    groups = eval_groups(windows_WT1.shape[0] * num_devices, num_devices)
    parts = windows_WT1.reshape(groups, -1, windows_WT1.shape[-1])
    sites = scales.Site(scales.remembered(policy, histories))
    call = decoder.Call(policy, key if policy.stochastic else None, _rows(data_axis), sites)
    measure = carried.under_policy(lambda params, tokens: jnp.mean(decoder.next_token_losses(graphdef, params, tokens, call), axis=-1), policy)
    losses = lax.map(lambda tokens: measure(params, tokens), parts)
    return losses.reshape(-1)
