"""Training: precision policies, low-precision matmuls, the model, cohorts of runs, records, sweeps.

    record = trainer.train(trainer.config("model=25k", "precision=int4", "steps=200"))
    layer = nnx.Linear(64, 64, dot_general=trainer.dot_general(trainer.policy("fp8")), rngs=rngs)
"""

from trainer import optimizers
from trainer.api import config, policy, train
from trainer.linear import dot_general, linear
from trainer.precision import Operand, PrecisionPolicy, Quantizer
from trainer.propagation import ScaledArray, propagate_scales, rescale, scale_rule, scaled, unscaled

__all__ = ["Operand", "PrecisionPolicy", "Quantizer", "ScaledArray", "config", "dot_general", "linear", "optimizers", "policy",
           "propagate_scales", "rescale", "scale_rule", "scaled", "train", "unscaled"]
