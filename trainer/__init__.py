"""Training: precision policies, low-precision matmuls, the model, cohorts of runs, records, sweeps.

    record = trainer.train(trainer.config("model=25k", "precision=int4", "steps=200"))
    layer = nnx.Linear(64, 64, dot_general=trainer.dot_general(trainer.policy("fp8")), rngs=rngs)

Names are imported when first used: `bitlaw status` reads thousands of run folders in less time than JAX takes to import.
"""

import importlib
import sys
import types

_HOMES = {
    "trainer.api": ("config", "policy", "train"),
    "trainer.linear": ("dot_general", "linear"),
    "trainer.precision": ("Operand", "PrecisionPolicy", "Quantizer"),
    "trainer.propagation": ("ScaledArray", "propagate_scales", "rescale", "scale_rule", "scaled", "unscaled"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["Operand", "PrecisionPolicy", "Quantizer", "ScaledArray", "config", "dot_general", "linear", "optimizers", "policy",
           "propagate_scales", "rescale", "scale_rule", "scaled", "train", "unscaled"]


def __getattr__(name: str):
    if name == "optimizers":
        return importlib.import_module("trainer.optimizers")
    if name not in _HOME:
        raise AttributeError(f"module 'trainer' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Face(types.ModuleType):
    """`trainer.config` and `trainer.linear` are functions. The modules of these names, once imported, do not take their places."""

    def __setattr__(self, name: str, value) -> None:
        if not (name in _HOME and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Face
