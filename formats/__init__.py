"""Number formats: what values a tensor may hold, how a value is rounded to them, how blocks share scales.

    formats.quantize(x, "float8_e4m3fn")                      # an element format, no scale
    formats.quantize(x, "mxfp4", rounding="stochastic", key=key)
    int4 = formats.scaled(formats.integer(4), "channel", axis=0)
    values, scale = formats.split(w_DF, int4)                 # narrow numbers and scales, for a matmul

Widths are numbers that may be traced: one compiled program serves every width, and `vmap` over formats works.
"""

from formats.blocks import Granularity, Scaled, block, scaled, split
from formats.catalogue import describe, get, names, register, table
from formats.elements import Element, identity, integer, minifloat
from formats.gaussian import gaussian_mse
from formats.noise import random_bits
from formats.quantize import quantize
from formats.modes import Overflow, Rounding
from formats.rounding import round_to
from formats.scales import Rule

Format = Element | Scaled

__all__ = ["Element", "Format", "Granularity", "Overflow", "Rounding", "Rule", "Scaled", "block", "describe", "gaussian_mse",
           "get", "identity", "integer", "minifloat", "names", "quantize", "random_bits", "register", "round_to", "scaled",
           "split", "table"]
