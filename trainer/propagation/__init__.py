"""Scale propagation: a program of which every float carries a power of two beside its data.

    step = propagate_scales(jax.value_and_grad(loss), data_dtype="float16")
    loss, gradients = step(scaled(params), batch)
"""
from trainer.propagation.array import ScaledArray, floor_log2, is_scaled, pow2, scaled, shift, unscaled
from trainer.propagation.calibrate import Plan
from trainer.propagation.custom import register_rule, scale_rule
from trainer.propagation.interpret import FallbackError
from trainer.propagation.rescale import rescale
from trainer.propagation.transform import Report, calibrate, propagate_scales

__all__ = ["FallbackError", "Plan", "Report", "ScaledArray", "calibrate", "floor_log2", "is_scaled", "pow2", "propagate_scales",
           "register_rule", "rescale", "scale_rule", "scaled", "shift", "unscaled"]
