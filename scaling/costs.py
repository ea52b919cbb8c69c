"""What a training, and the inference after it, cost in each precision: cost models for `scaling.plan`.

Every cost is in FLOP of 16 bits, so that one budget means the same in all models: a product of two operands of 16 bits costs its FLOP, a
narrower one less. A training is three matrix products of 2 N D FLOP each (forward: weights x activations; dgrad: weights x output
gradients; wgrad: activations x output gradients), together 6 N D; inference is one of 2 N D_inf (Kaplan et al. 2020, arXiv 2001.08361,
section 2.1). What differs between models is the price of one product by the widths of its operands:

    flops              1                       precision is free
    bits               max(a, b)/16            C = (6/16) N D P when all widths are P (Kumar et al. 2024, arXiv 2411.04330, section 4.3)
    bit_operations     a b/256                 multiplies of a x b bits cost a b bit operations (van Baalen et al. 2020, arXiv 2005.07093)
    h100, v5p, ...     peak rates by dtype     the fastest dtype at least as wide as both operands
    speedups           one's own               1/speed-up of the narrowest listed width that holds both operands
"""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np

ALL_FULL: Mapping[str, float] = MappingProxyType({})  # a precision of which nothing is said
FULL = 16.0  # bits of an operand of which nothing is said: 16-bit training is what 6 N D has always meant
PRICED_WIDTHS = ("weights_bits", "activations_bits", "output_gradients_bits")
"""What costs depend on. Not kv_bits: attention scores are not in 6 N D."""


@dataclass(frozen=True)
class CostModel:
    """price(a, b): cost of one FLOP of a product of operands of widths a and b (arrays of bits that broadcast), 1 for 16 x 16 bits.

    about: the rule, one line. widths: bits at which the price jumps, () when it is smooth: no other width can be the best one.
    rate: dense peak of the device at 16 bits, FLOP/s, None when the model is of no device. source: where the rates are from. doubts: width
    -> what is not certain of the rate there.
    """

    name: str
    about: str
    price: Callable[[np.ndarray, np.ndarray], np.ndarray]
    widths: tuple[float, ...] = ()
    rate: float | None = None
    source: str = ""
    doubts: Mapping[float, str] = field(default_factory=dict)

    def doubts_of(self, precision: Mapping) -> list[str]:
        """What is not certain of the rates that a precision is priced at; empty for most."""
        weights, activations, gradients = (float(width) for width in operand_widths(precision))
        wider = (max(weights, activations), max(weights, gradients), max(activations, gradients))
        used = {next((width for width in self.widths if width >= bits), math.inf) for bits in wider} if self.doubts else set()
        return [text for width, text in self.doubts.items() if width in used]

    def per_pair(self, precision: Mapping) -> np.ndarray:
        """Training cost per parameter and token, in FLOP of 16 bits: 6 at 16 bits. `precision`: see `operand_widths`."""
        weights, activations, gradients = operand_widths(precision)
        return 2.0 * (self.price(weights, activations) + self.price(weights, gradients) + self.price(activations, gradients))

    def per_answer(self, precision: Mapping) -> np.ndarray:
        """Inference cost per parameter and token, in FLOP of 16 bits: 2 at 16 bits."""
        weights, activations, _ = operand_widths(precision)
        return 2.0 * self.price(weights, activations)

    def training(self, N, D, precision: Mapping = ALL_FULL):
        """Cost of training N parameters on D tokens, in FLOP of 16 bits."""
        return self.per_pair(precision) * N * D

    def inference(self, N, tokens, precision: Mapping = ALL_FULL):
        """Cost of reading or writing `tokens` tokens with N parameters, in FLOP of 16 bits."""
        return self.per_answer(precision) * N * tokens

    def seconds(self, cost: float) -> float | None:
        """Seconds of one device for `cost` FLOP of 16 bits, at its dense peak: real ones are longer by 1/utilisation. None: no device."""
        return None if self.rate is None else cost / self.rate


def operand_widths(precision: Mapping) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bits of weights, activations and output gradients (arrays) from a mapping that may hold weights_bits, activations_bits,
    output_gradients_bits, or `bits` for all. Absent operands have 16 bits; absent gradients, as in Kumar's cost, the wider of the others.
    """
    common = precision.get("bits", FULL)
    weights, activations = (np.asarray(precision.get(name, common), dtype=np.float64) for name in PRICED_WIDTHS[:2])
    gradients = np.asarray(precision.get(PRICED_WIDTHS[2], np.maximum(weights, activations)), dtype=np.float64)
    return weights, activations, gradients


def _stepped(rates: Mapping[float, float], what: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The price by {bits: rate}: the fastest of the widths that hold both operands. ValueError for a product wider than all of them."""
    widths = np.array(sorted(rates))
    fastest = np.maximum.accumulate(np.array([rates[bits] for bits in widths])[::-1])[::-1]
    unit = fastest[np.searchsorted(widths, FULL)]

    def price(a, b):
        wider = np.maximum(a, b)
        if np.any(wider > widths[-1]):
            raise ValueError(f"cost model {what}: has no rate for {float(np.max(wider)):g} bits; the widths that it has are "
                             f"{', '.join(f'{bits:g}' for bits in widths)}")
        return unit / fastest[np.searchsorted(widths, wider)]

    return price


def speedups(factors: Mapping[float, float]) -> CostModel:
    """Your own measured speed-ups over 16-bit training: {4: 2.0, 8: 1.6}; 16 bits is 1 unless given.

    ValueError when a width or a factor is not positive, or 16 bits is wider than all of them.
    """
    rates = {FULL: 1.0} | {float(bits): float(factor) for bits, factor in factors.items()}
    bad = next((bits for bits, factor in rates.items() if not (0 < bits < math.inf and 0 < factor < math.inf)), None)
    if bad is not None:
        raise ValueError(f"speedups: {bad:g}={rates[bad]:g}: need a positive width in bits and a positive speed-up")
    listed = ", ".join(f"{bits:g} bits {rates[bits]:g}x" for bits in sorted(rates))
    return CostModel("speedups", f"6 N D over the speed-up at the width: {listed}", _stepped(rates, "speedups"), tuple(sorted(rates)))


@dataclass(frozen=True)
class Device:
    """rates: dtype -> (bits of an operand, dense peak in FLOP/s); no structured sparsity. source: the vendor's document. doubts: dtype -> why its
    rate is not certain, told wherever it is used.

    Vendor figures are those printed in the document named. Those that NVIDIA prints with sparsity alone are halved (H200, B200),
    so they are as coarse as what is printed: half of 2.2 PFLOPS for the TF32 of B200, where eight of them are 18, half of 2.25.
    What a document leaves out and others report is secondary, and in `doubts`. The whitepapers' rates of A100 and H100 also
    follow from units and clocks (tests/scaling/test_costs.py).
    """

    name: str
    rates: Mapping[str, tuple[float, float]]
    source: str
    doubts: Mapping[str, str] = field(default_factory=dict)


T = 1e12
_HOPPER = {"int8": (8, 1978.9 * T), "float8": (8, 1978.9 * T), "bfloat16": (16, 989.4 * T), "tf32": (19, 494.7 * T), "float32": (32, 66.9 * T)}
DEVICES = {device.name: device for device in (
    Device("a100", {"int4": (4, 1248 * T), "int8": (8, 624 * T), "bfloat16": (16, 312 * T), "tf32": (19, 156 * T), "float32": (32, 19.5 * T)},
           "vendor: NVIDIA A100 Tensor Core GPU Architecture whitepaper, table of peak rates (A100 SXM, without sparsity); no FP8"),
    Device("h100", _HOPPER, "vendor: NVIDIA H100 Tensor Core GPU Architecture whitepaper v1.04, table of peak rates (H100 SXM5, without sparsity)"),
    Device("h200", _HOPPER, "vendor: NVIDIA H200 datasheet, the rates of H100 SXM5 (it prints them with sparsity: 1,979 BF16, 3,958 FP8)"),
    Device("b200", {"float4": (4, 9000 * T), "float6": (6, 4500 * T), "float8": (8, 4500 * T), "int8": (8, 4500 * T), "bfloat16": (16, 2250 * T),
                    "tf32": (19, 1100 * T), "float32": (32, 75 * T)},
           "vendor: NVIDIA Blackwell datasheet, HGX B200, per GPU, half of the printed rates with sparsity (FP4 18, FP8/FP6 9, INT8 9, BF16 4.5, "
           "TF32 2.2 PFLOPS); FP32 75 TFLOPS",
           {"float32": "B200's FP32 rate of 75 TFLOPS is the datasheet's; an earlier NVIDIA brief is reported with 80"}),
    Device("v5p", {"int8": (8, 918 * T), "float8": (8, 459 * T), "bfloat16": (16, 459 * T)},
           "vendor: Google Cloud, TPU v5p (BF16 459 TFLOP/s) and the comparison in TPU7x (FP8 459); INT8 918 is secondary",
           {"int8": "v5p's INT8 rate of 918 TOPS is not in Google's system architecture, which prints BF16 alone; it is known from reports "
            "of the announcement of 6 December 2023. v5p:float plans without it"}),
    Device("v6e", {"int8": (8, 1836 * T), "float8": (8, 918 * T), "bfloat16": (16, 918 * T)},
           "vendor: Google Cloud, TPU v6e, peak compute per chip (BF16 918 TFLOP/s, INT8 1836 TOP/s) and the comparison in TPU7x (FP8 918)"),
)}


def device(name: str, kind: str = "") -> CostModel:
    """The cost model of a device: 6 N D over the rate of the fastest dtype that holds both operands, relative to its 16-bit rate.

    kind: "int" or "float" leaves the other narrow dtypes out (an FP8 law on a chip that is faster in INT8). ValueError for unknown ones.
    """
    if name not in DEVICES or kind not in ("", "int", "float"):
        raise ValueError(f"cost model {name + (':' + kind if kind else '')!r}: unknown; devices are {', '.join(DEVICES)}, each with :int or "
                         ":float or neither")
    made = DEVICES[name]
    kept = {dtype: rate for dtype, rate in made.rates.items() if rate[0] >= FULL or dtype.startswith(kind)}
    rates: dict[float, float] = {}
    for bits, rate in kept.values():
        rates[float(bits)] = max(rate, rates.get(float(bits), 0.0))
    full = name + (f":{kind}" if kind else "")
    doubts = {float(made.rates[dtype][0]): text for dtype, text in made.doubts.items() if dtype in kept
              and made.rates[dtype][1] == rates[made.rates[dtype][0]]}
    listed = ", ".join(f"{dtype} {rate / T:g}" for dtype, (_, rate) in kept.items())
    return CostModel(full, f"6 N D at the dense peak of the fastest dtype as wide, TFLOP/s: {listed}", _stepped(rates, full),
                     tuple(sorted(rates)), rates[FULL], made.source, doubts)


SMOOTH = {model.name: model for model in (
    CostModel("flops", "6 N D, whatever the precision", lambda a, b: np.ones(np.broadcast_shapes(np.shape(a), np.shape(b)))),
    CostModel("bits", "6 N D bits/16, bits of the wider operand of each product", lambda a, b: np.maximum(a, b) / FULL),
    CostModel("bit_operations", "6 N D a b/256, a and b the bits of the operands of each product", lambda a, b: a * b / FULL**2),
)}


def cost_model(spec: str | CostModel) -> CostModel:
    """A cost model by its name: "bits", "h100", "b200:float", "speedups:4=2,8=1.6". ValueError listing the names otherwise."""
    if isinstance(spec, CostModel):
        return spec
    name, _, rest = spec.partition(":")
    if name == "speedups":
        try:
            return speedups({float(bits): float(factor) for bits, factor in (part.split("=") for part in rest.split(","))})
        except (TypeError, ValueError) as error:
            told = str(error) if str(error).startswith("speedups:") else f"{rest!r} is not WIDTH=FACTOR,..., as in speedups:4=2,8=1.6"
            raise ValueError(f"cost model {told}") from None
    if name in SMOOTH and not rest:
        return SMOOTH[name]
    if name in DEVICES:
        return device(name, rest)
    raise ValueError(f"cost model {spec!r}: unknown; accepted are {', '.join((*SMOOTH, *DEVICES))}, speedups:4=2,8=1.6")
