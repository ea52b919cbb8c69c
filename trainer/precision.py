"""What happens to each operand of a linear layer's three matrix products.

    forward  y  = x  w        reads activations and weights
    dgrad    dx = dy w^T      reads output_gradients and weights
    wgrad    dw = x^T dy      reads activations and output_gradients

A `PrecisionPolicy` names a `Quantizer` (or None: left in float32) for each of the six operands. Policies are pytrees: widths are
leaves and may be traced or stacked over the members of a cohort; everything structural is static.
"""
from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from enum import Enum

import jax
import jax.numpy as jnp
import numpy as np

import formats
from formats import Amax, Granularity, Rounding
from trainer.methods.rotation import Rotation

ROLES = ("weights", "activations", "output_gradients")
ATTENTION_TENSORS = {"kv": ("keys", "values"), "scores": ("scores",), "probabilities": ("probabilities",)}  # role -> what it is made of
ATTENTION_ROLES = tuple(ATTENTION_TENSORS)
GEMMS = {"weights": ("forward", "dgrad"), "activations": ("forward", "wgrad"), "output_gradients": ("dgrad", "wgrad")}


class Source(str, Enum):
    """Where a quantizer's scale comes from. With blocks under a scale of the whole tensor (two levels) it is that scale's source, and
    the blocks' own scales are always current."""

    CURRENT = "current"  # amax of the tensor at hand
    DELAYED = "delayed"  # amax of earlier steps, kept in the state
    STATIC = "static"  # a constant, from the size that the tensor is expected to have (unit scaling)
    EMA = "ema"  # a moving average of the smallest and largest value of earlier steps, kept in the state
    LEARNED = "learned"  # a parameter of the model, trained by the gradient of its loss (LSQ)
    PROPAGATED = "propagated"  # the exponent that scale propagation carries beside the data: the data is at unit scale as it is
    NONE = "none"  # no scale: the element's own range


class Arithmetic(str, Enum):
    """What AdamW computes in: float32, or bfloat16 after every operation (`trainer.optimizers.collage_adamw`)."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    KAHAN = "kahan"
    COLLAGE_LIGHT = "collage_light"
    COLLAGE_PLUS = "collage_plus"


class Storage(str, Enum):
    """How narrow state is held: at the size of its format, or as float32 arrays of the same values."""

    PACKED = "packed"
    EMULATED = "emulated"


REMEMBERED = (Source.DELAYED, Source.EMA)  # what a step leaves for the next one
FROM_ELSEWHERE = tuple(s.value for s in (*REMEMBERED, Source.STATIC, Source.LEARNED, Source.PROPAGATED))  # a scale that the tensor at hand does not set


def unmovable(fmt: formats.Scaled, source: str = Source.DELAYED.value) -> str | None:
    """Why a format's scales cannot come from elsewhere than the tensor at hand, and what can; None where they can. Blocks of
    propagated data have scales of their own, relative to what is propagated."""
    if fmt.granularity in (Granularity.CHANNEL, Granularity.TOKEN):
        return (f"granularity={fmt.granularity.value} has many scales, and only one for a whole tensor can be {source}; "
                "accepted: granularity=tensor")
    if fmt.granularity is Granularity.BLOCK and not fmt.two_level and source != Source.PROPAGATED.value:
        return "its blocks have no scale of the whole tensor above them that could be delayed or static; accepted: source=current, or two_level=true"
    if source == Source.LEARNED.value and not (fmt.exact and fmt.scale_element is None and not fmt.zero_point and fmt.granularity is Granularity.TENSOR):
        return "a learned scale is one float32 number; accepted with it: granularity=tensor, scale_rule=exact, scale_format=float32, zero_point=false"
    if (fmt.zero_point and source != Source.EMA.value) or fmt.amax is not Amax.CURRENT:
        return "zero_point=True and other statistics than amax='current' are taken of the tensor at hand; accepted: source=current"
    return None


class Gradient(str, Enum):
    """What becomes of the gradient of a tensor that was quantized, besides being that of what it was quantized to (straight-through). The
    mask belongs to the values that were rounded: where those were rotated, it is applied before the gradient is rotated back."""

    STRAIGHT_THROUGH = "straight_through"  # nothing
    CLIPPED = "clipped"  # zero where the value lay beyond the range
    TRUST = "trust"  # zero where rounding moved it by more than half a step of a uniform grid (QuEST, Panferov et al. 2025, section 3.2)


def _static(**kwargs):
    return field(metadata={"static": True}, **kwargs)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantizer:
    """A format, and how values are rounded to it. The cotangent is never narrowed here.

    source: see `Source`; "none" with an element format (whose own range is then all there is), another one with a format that has
    scales. static_rms: of "static" alone, float32, the RMS that the tensor is expected to have (None: the model says). static_clip: of
    "static" and "propagated", float32, amax over RMS for elements other than minifloats (None: chosen for Gaussian data).
    transform: what is quantized is the tensor rotated along the contraction; both operands of a product need the same. gradient: see
    `Gradient`; of forward operands. native: the dtype that holds the narrow numbers in the product itself, None for float32.
    """

    format: formats.Format
    rounding: str = _static(default="nearest_even")
    source: str = _static(default="current")
    static_rms: jax.Array | np.float32 | None = None
    static_clip: jax.Array | np.float32 | None = None
    transform: Rotation | None = _static(default=None)
    gradient: str = _static(default="straight_through")
    native: str | None = _static(default=None)

    def __post_init__(self):
        if (self.source == Source.NONE.value) == isinstance(self.format, formats.Scaled) or self.source not in (s.value for s in Source):
            scaled = isinstance(self.format, formats.Scaled)
            accepted = ", ".join(s.value for s in Source if s is not Source.NONE) if scaled else "none, or the format wrapped in formats.scaled(...)"
            raise ValueError(f"source={self.source!r} with a format of type {type(self.format).__name__}; accepted: {accepted}")
        if self.source in FROM_ELSEWHERE and (reason := unmovable(self.format, self.source)):
            raise ValueError(f"source={self.source!r}: {reason}")
        if self.transform is not None and self.source in FROM_ELSEWHERE and self.source != Source.PROPAGATED.value:
            raise ValueError(f"source={self.source!r} with a transform: the range of a tensor is not that of the rotated one; accepted with it: current, propagated, none")
        if self.gradient == Gradient.CLIPPED.value and getattr(self.format, "zero_point", False):
            raise ValueError("gradient='clipped' with zero_point=True: accepted there: trust, which is the same to half a step, or straight_through")
        if self.gradient == Gradient.TRUST.value and not uniform(self.format):
            raise ValueError("gradient='trust' needs a format whose values are evenly spaced, such as an integer; accepted with others: straight_through, clipped")
        if self.source in (Source.STATIC.value, Source.PROPAGATED.value) and self.static_clip is None and _needs_clip(self.format):
            object.__setattr__(self, "static_clip", np.float32(formats.gaussian_clip(self.format.element)))

    @property
    def stochastic(self) -> bool:
        """Whether it needs random bits."""
        return Rounding(self.rounding).random or (self.transform is not None and self.transform.random)

    @property
    def element(self):
        """The format of single numbers."""
        return self.format.element if isinstance(self.format, formats.Scaled) else self.format


def _whole_grid(element) -> bool:
    """True for an element whose widths say that it is an integer; those of pytree machinery are no numbers at all."""
    return isinstance(element.exp_bits, np.integer) and element.exp_bits == 0


def uniform(fmt) -> bool:
    """False for a format whose values are known not to be evenly spaced."""
    element = fmt.element if isinstance(fmt, formats.Scaled) else fmt
    if isinstance(element, formats.Element):
        return not (isinstance(element.exp_bits, np.integer) and element.exp_bits > 0)
    return isinstance(element, formats.Midrise)


def _needs_clip(fmt: formats.Scaled) -> bool:
    """True for a tensor scale of an element whose own range says nothing about values of size 1: integers, tables, logarithms."""
    if fmt.granularity is not Granularity.TENSOR:
        return False
    return not isinstance(fmt.element, formats.Element) or _whole_grid(fmt.element)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Operand:
    """The quantizers of one role in the two products that read it (in the order of GEMMS). What the second product reads: `shared`: the
    numbers of the first, not quantized again (`moved`: and their scale, which lies along the second contraction, multiplies the output gradient
    before that is quantized, so that the product is of narrow numbers: x^T (s g) for (s x)^T g, as qwix and AQT do); `chained`: the numbers of the first (rotated, if they were), quantized by `second`, as
    Quartet does; else the tensor, quantized by `second`."""

    first: Quantizer | None = None
    second: Quantizer | None = None
    shared: bool = _static(default=True)
    chained: bool = _static(default=False)
    moved: bool = _static(default=False)

    def __post_init__(self):
        if self.moved and (not self.shared or self.first is None or not isinstance(self.first.format, formats.Scaled) or self.first.format.block is not None
                           or self.first.transform is not None):
            raise ValueError("moved=True needs shared=True and a quantizer with one scale for a tensor, channel or token, and no transform: that scale is what moves")
        if self.chained and (self.shared or self.first is None):
            raise ValueError("chained=True needs shared=False and a first quantizer: there is nothing to quantize again")
        if self.second is not None and self.second.gradient != Gradient.STRAIGHT_THROUGH.value:
            raise ValueError(f"gradient={self.second.gradient!r} of a second product's quantizer: a tensor is masked by its forward product; accepted there: straight_through")

    @property
    def kept(self) -> bool:
        """True if the second product reads what the first one was given."""
        return self.shared or self.chained

    @property
    def rotated(self) -> bool:
        """True if the second product reads numbers that were rotated for the first one: its result is then rotated too."""
        return self.kept and self.first is not None and self.first.transform is not None

    def quantizers(self) -> tuple[Quantizer, ...]:
        both = (self.first,) if self.shared else (self.first, self.second)
        return tuple(q for q in both if q is not None)

    def takes(self, source: Source) -> bool:
        """True if a quantizer has its scale from there."""
        return any(q.source == source.value for q in self.quantizers())


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Ramp:
    """Quantization that comes in gradually: x + blend (q(x) - x), with a blend of each layer that goes from 0 to 1 over `steps` updates,
    layer after layer `stagger` updates apart (float32, both). from_output: the last layer begins."""

    steps: jax.Array | np.float32
    stagger: jax.Array | np.float32
    from_output: bool = _static(default=True)

    def blend(self, step, num_layers: int) -> jax.Array:
        """float32 [L] at a step, from 0 to exactly 1."""
        place = np.arange(num_layers, dtype=np.float32)
        place = place[::-1] if self.from_output else place
        begun = jnp.asarray(step).astype(jnp.float32) - place * self.stagger
        return jnp.clip(begun / jnp.maximum(self.steps, np.float32(1.0)), 0.0, 1.0)

    def length(self, num_layers: int):
        """Updates until every layer is quantized whole."""
        return self.steps + self.stagger * (num_layers - 1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Exemption:
    """A place and the policy there. where: see `matches`."""

    where: str = _static()
    policy: PrecisionPolicy


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PrecisionPolicy:
    """Role -> quantizers; `dot_dtype` is the dtype of the product's inputs (accumulation is float32). history, history_choice: how many
    steps delayed scales remember, and which of their amax counts ("max", "most_recent"). ema_decay: of source "ema". data_dtype: the forward and backward pass run
    under scale propagation with their data held in it; None: they do not. master_weights, adam_m, adam_v: formats that the state is
    held in between steps, None for float32, and master_rounding, adam_rounding how it is rounded to them; scaled_state: float16 and
    bfloat16 as ScaledArrays; optimizer_arithmetic, storage: see `Arithmetic`, `Storage`; all of it in `trainer.stored`. extra_norm: the model has an
    RMSNorm before every linear layer (`ModelConfig`). ramp: see `Ramp`. kv, scores, probabilities: of
    attention (`methods.attention`). exemptions: places with a policy of their own, the last that
    matches counts; the embedding and the head are not quantized unless one says so."""

    weights: Operand = Operand()
    activations: Operand = Operand()
    output_gradients: Operand = Operand()
    dot_dtype: str = _static(default="float32")
    history: int = _static(default=1024)
    history_choice: str = _static(default="max")
    ema_decay: float = _static(default=0.99)
    data_dtype: str | None = _static(default=None)
    master_weights: str | None = _static(default=None)
    adam_m: str | None = _static(default=None)
    adam_v: str | None = _static(default=None)
    master_rounding: str = _static(default="nearest_even")
    adam_rounding: str = _static(default="nearest_even")
    scaled_state: bool = _static(default=True)
    optimizer_arithmetic: str = _static(default="float32")
    storage: str = _static(default="packed")
    extra_norm: bool = _static(default=False)
    ramp: Ramp | None = None
    kv: Quantizer | None = None
    scores: Quantizer | None = None
    probabilities: Quantizer | None = None
    exemptions: tuple[Exemption, ...] = ()

    def __post_init__(self):
        _check_transforms(self)

    def roles(self, source: Source) -> tuple[str, ...]:
        """The roles in which a quantizer has its scale from there."""
        return tuple(role for role in ROLES if getattr(self, role).takes(source))

    @property
    def attention_roles(self) -> tuple[str, ...]:
        """The roles of attention that are quantized here or by an exemption of a block."""
        policies = (self, *(exemption.policy for exemption in self.exemptions if exemption.where not in OUTSIDE))
        return tuple(role for role in ATTENTION_ROLES if any(getattr(policy, role) is not None for policy in policies))

    @property
    def stochastic(self) -> bool:
        """True if anything needs random bits."""
        attention = (q for q in (self.kv, self.scores, self.probabilities) if q is not None)
        own = any(q.stochastic for role in ROLES for q in getattr(self, role).quantizers()) or any(q.stochastic for q in attention)
        return own or any(exemption.policy.stochastic for exemption in self.exemptions)

    def without_quantizers(self) -> PrecisionPolicy:
        """The same dot dtype and nothing quantized: for layers that are kept high."""
        return replace(PrecisionPolicy(), dot_dtype=self.dot_dtype, data_dtype=self.data_dtype)

    def at(self, layer: int, num_layers: int, site: str) -> PrecisionPolicy:
        """The policy of a linear layer of a block."""
        return self._chosen(lambda where: matches(where, layer, num_layers, site), replace(self, exemptions=()))

    def outside(self, name: str) -> PrecisionPolicy:
        """The policy of "embedding" or "head"."""
        return self._chosen(lambda where: where == name, self.without_quantizers())

    def _chosen(self, fits, otherwise):
        return next((exemption.policy for exemption in reversed(self.exemptions) if fits(exemption.where)), otherwise)


OUTSIDE = ("embedding", "head")
_PLACE = re.compile(r"(?:(first|last|layer)(\d+))?(?:(?:^|\.)([a-z_]+))?")


def matches(where: str, layer: int, num_layers: int, site: str) -> bool:
    """Whether a place names this linear layer: "first2", "last1" (that many blocks from an end), "layer3" (counted from 0), "down" (a site
    in every block), or both, "last1.down". "embedding" and "head" name none."""
    side, count, name = _PLACE.fullmatch(where).groups()
    number = int(count or 0)
    here = {None: True, "first": layer < number, "last": layer >= num_layers - number, "layer": layer == number}[side]
    return here and name in (None, site)


def check_place(where: str, num_layers: int, sites: tuple[str, ...]) -> None:
    """ValueError, one line, for a place that no layer has."""
    found = _PLACE.fullmatch(where) if where else None
    if found is None or not (found[3] in (None, *sites) or where in OUTSIDE):
        raise ValueError(f"{where!r} is no place; accepted: first1, last2, layer0, one of {', '.join(sites)}, both as in last1.{sites[-1]}, {', '.join(OUTSIDE)}")
    if where not in OUTSIDE and not any(matches(where, layer, num_layers, site) for layer in range(num_layers) for site in sites):
        raise ValueError(f"{where!r} names no layer of a model with {num_layers}; accepted: layer0 to layer{num_layers - 1}")


def _check_transforms(policy: PrecisionPolicy) -> None:
    """ValueError if the two operands of a product are not rotated alike: their product would mean nothing."""
    x, w, g = policy.activations, policy.weights, policy.output_gradients

    def of(quantizer):
        return None if quantizer is None else quantizer.transform

    def second(operand):
        return None if operand.shared else of(operand.second)

    if g.shared and of(g.first) is not None:
        raise ValueError("output_gradients with a transform are rotated along another dimension for each product; accepted: second=fresh")
    pairs = {"forward": (("activations", of(x.first)), ("weights", of(w.first))), "dgrad": (("output_gradients", of(g.first)), ("weights", second(w))),
             "wgrad": (("activations", second(x)), ("output_gradients", second(g)))}
    for gemm, ((one, left), (other, right)) in pairs.items():
        if left != right:
            said = [f"{role} have {'no transform' if t is None else f'{t.kind.value} in blocks of {t.block}'}" for role, t in ((one, left), (other, right))]
            raise ValueError(f"in {gemm} {' and '.join(said)}; accepted: the same transform and transform_block for both, or none")
