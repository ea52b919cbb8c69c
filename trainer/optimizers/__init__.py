"""Optimizers as optax transformations, built inside the step from traced numbers.

An optimizer is a function (numbers: OptimizerNumbers, lr_tree, decay_tree) -> optax.GradientTransformation, where `lr_tree` holds
each parameter's learning rate (traced float32 scalars) and `decay_tree` says (bool) whether weight decay applies to it. Plugins add
theirs with `register`.

What keeps parameters and moments in few bits is plain optax, for any training loop:

    collage_adamw(1e-3, variant="plus")                                      # all bfloat16; parameters of two words
    low_precision_params(optax.adamw(1e-3), "bfloat16", "stochastic", key)   # parameters that land on a format
    low_precision_moments(optax.adamw(1e-3), m=blockwise8(True), v=blockwise8(False))
    state_bytes(state), descent_quality(intended, before, after)
"""

from trainer.optimizers.adam import adamw, scale_by_tree
from trainer.optimizers.blockwise import Blockwise8, BlockwiseArray, blockwise8
from trainer.optimizers.collage import CollageState, Variant, collage_adamw
from trainer.optimizers.expansion import expand, fast_two_sum, grow, mul, round_bfloat16, two_prod, two_sum
from trainer.optimizers.moments import LowPrecisionMomentsState, low_precision_moments
from trainer.optimizers.parameters import LowPrecisionParamsState, low_precision_params, round_params
from trainer.optimizers.quality import DescentQuality, descent_quality
from trainer.optimizers.registry import OPTIMIZERS, OptimizerNumbers, register
from trainer.optimizers.trees import state_bytes

__all__ = [
    "OPTIMIZERS", "Blockwise8", "BlockwiseArray", "CollageState", "DescentQuality", "LowPrecisionMomentsState",
    "LowPrecisionParamsState", "OptimizerNumbers", "Variant", "adamw", "blockwise8", "collage_adamw", "descent_quality", "expand",
    "fast_two_sum", "grow", "low_precision_moments", "low_precision_params", "mul", "register", "round_bfloat16", "round_params",
    "scale_by_tree", "state_bytes", "two_prod", "two_sum",
]
