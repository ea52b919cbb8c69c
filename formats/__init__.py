"""Number formats: what values a tensor may hold, how a value is rounded to them, how blocks share scales.

    formats.quantize(x, "float8_e4m3fn")                      # an element format, no scale
    formats.quantize(x, "mxfp4", rounding="stochastic", key=key)
    int4 = formats.scaled(formats.integer(4), "channel", axis=0)
    values, scale = formats.split(w_DF, int4)                 # narrow numbers and scales, for a matmul
    stored = formats.encode(x, "nvfp4")                       # real codes and scale bytes; stored.decode(), stored.nbytes

Widths are numbers that may be traced: one compiled program serves every width, and `vmap` over formats works.
"""

from formats.amax import Amax, gaussian_clip
from formats.blocks import split
from formats.catalogue import get, names, register
from formats.codebooks import Codebook, binary, codebook, dybit, nf4
from formats.delayed import AmaxHistory, RangeAverage, amax_history, range_average
from formats.describe import describe, table
from formats.elements import Element, identity, integer, minifloat
from formats.gaussian import gaussian_mse
from formats.gradients import Gradient, QuantizedGradient
from formats.logarithmic import Logarithmic, lns
from formats.midrise import Midrise, midrise
from formats.modes import Overflow, Rounding, StochasticRule, mode_number
from formats.noise import random_bits
from formats.qarray import QArray, encode
from formats.quantize import quantize
from formats.rounding import round_to
from formats.scaled import Granularity, Scaled, block, scaled
from formats.scales import Rule, rule_number

Format = Element | Codebook | Logarithmic | Midrise | Scaled

__all__ = [
    "Amax", "AmaxHistory", "Codebook", "Element", "Format", "Gradient", "Granularity", "Logarithmic", "Midrise", "Overflow",
    "QArray", "QuantizedGradient", "RangeAverage", "Rounding", "Rule", "Scaled", "StochasticRule", "amax_history", "binary", "block",
    "codebook", "describe", "dybit", "encode", "gaussian_clip", "gaussian_mse", "get", "identity", "integer", "lns",
    "midrise", "minifloat", "mode_number", "names", "nf4", "quantize", "random_bits", "range_average", "register", "round_to", "rule_number",
    "scaled", "split", "table",
]
