"""Scaling laws: `laws[name] -> Law`. One file per family; `law.py` is the protocol, `registry.py` the names."""
from scaling.laws.law import Law, Operand, Parameter, amplitude, exponent, namespace, offset, scale
from scaling.laws.registry import laws, resolve

__all__ = ["Law", "Operand", "Parameter", "amplitude", "exponent", "laws", "namespace", "offset", "resolve", "scale"]
