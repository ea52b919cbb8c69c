"""The same work by other people's libraries, where they are installed: gfloat, pychop, qwix, and JAX's and ml_dtypes' own casts."""

from __future__ import annotations

import importlib.util


def peers(x, x_blocks) -> dict:
    """name -> (function, arguments), x float32 [N, 1000], x_blocks float32 [M, 1600]."""
    import jax
    import jax.numpy as jnp
    import ml_dtypes
    import numpy as np

    host = np.asarray(x)
    made = {
        "peer: jax clip and cast to float8_e4m3fn and back": (
            jax.jit(lambda x: jnp.clip(x, -448, 448).astype(jnp.float8_e4m3fn).astype(jnp.float32)), (x,)),
        "peer: jax threefry bits": (jax.jit(lambda x: jax.random.bits(jax.random.key(0), x.shape)), (x,)),
        "peer: ml_dtypes cast to float8_e4m3fn and back": (lambda: host.astype(ml_dtypes.float8_e4m3fn).astype(np.float32), ()),
    }
    if importlib.util.find_spec("gfloat"):
        import gfloat
        from gfloat.formats import format_info_ocp_e4m3

        made["peer: gfloat e4m3fn"] = (lambda: gfloat.round_ndarray(format_info_ocp_e4m3, host), ())
    if importlib.util.find_spec("pychop"):
        import pychop

        pychop.backend("jax")
        made["peer: pychop e4m3 (IEEE variant)"] = (pychop.Chop(exp_bits=4, sig_bits=3, rmode=1), (x,))
    if importlib.util.find_spec("qwix"):
        import qwix

        made["peer: qwix mxfp4 and back"] = (
            jax.jit(lambda x: qwix.dequantize(qwix.quantize(x, "mxfp4", tiled_axes={1: 32}))), (x_blocks,))
        made["peer: qwix int4 per channel and back"] = (
            jax.jit(lambda x: qwix.dequantize(qwix.quantize(x, jnp.int4, channelwise_axes=[0]))), (x,))
    return made
