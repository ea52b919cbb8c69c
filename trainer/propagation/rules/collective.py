"""Sums and maxima over the devices of a mesh axis (inside shard_map), whose exponents may differ from device to device."""
from __future__ import annotations

from jax import lax

from trainer.propagation.array import shift, wide
from trainer.propagation.exponents import of_array
from trainer.propagation.rules.registry import Call, rule
from trainer.propagation.values import Scaled, collapse, floats


def _agree(call: Call, x) -> Scaled:
    """x at an exponent that is the same on all devices: the largest."""
    x = call.lift(x)
    if not x.exponent.terms:
        return x
    names = tuple(axis for axis in call.params["axes"] if not isinstance(axis, int))
    if len(names) < len(call.params["axes"]):  # inside vmap, some are dimensions
        x = collapse(x)
    own = x.exponent.traced()
    top = lax.pmax(own, names, axis_index_groups=call.params.get("axis_index_groups")) if names else own
    return Scaled(shift(wide(x.data), own - top), of_array(top), x.dtype)


@rule("psum", "psum_invariant", "pmax", "pmin", data="f(a 2^(ea - e)) over devices", exponent="e = max of ea over devices")
def across_devices(call: Call, *xs):
    agreed = [_agree(call, x) if floats(x) else x for x in xs]
    results = call.bind(*(wide(x.data) if isinstance(x, Scaled) else x for x in agreed))
    results = results if isinstance(results, (list, tuple)) else [results]
    return [call.store(r, x.exponent, i) if isinstance(x, Scaled) else r for i, (r, x) in enumerate(zip(results, agreed))]


@rule("pvary", data="a", exponent="ea")
def pvary(call: Call, *xs):
    results = call.bind(*(x.data if isinstance(x, Scaled) else x for x in xs))
    results = results if isinstance(results, (list, tuple)) else [results]
    return [call.store(r, x.exponent, i) if isinstance(x, Scaled) else r for i, (r, x) in enumerate(zip(results, xs))]


