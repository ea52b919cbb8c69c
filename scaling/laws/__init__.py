"""Scaling laws: `laws[name] -> Law`. One file per family; `law.py` is the protocol, `registry.py` the names, `formula.py` laws from text."""
from scaling.laws.law import Law, namespace
from scaling.laws.parameters import Factor, Operand, Parameter, amplitude, divisor, exponent, offset, scale
from scaling.laws.registry import laws, resolve

__all__ = ["Factor", "Law", "Operand", "Parameter", "amplitude", "divisor", "exponent", "laws", "namespace", "offset", "resolve", "scale"]
