"""Whether blocks fit the dimensions that they lie along."""
from __future__ import annotations

from collections.abc import Iterator

from trainer.config.frozen import ModelSpec, PrecisionSpec, QuantizerSpec
from trainer.config.policies import TRANSFORM_BLOCK, build_format
from trainer.precision import GEMMS, ROLES, Source


def check_blocks(precision: PrecisionSpec, model: ModelSpec, tokens: int) -> None:
    """ValueError, one line, for a block that is larger than its dimension (unless precision.pad is true), or does not divide it (if it is
    false). tokens: of a micro-batch."""
    for key, size, dim, length in _lengths(precision, model, tokens):
        if size > length and precision.pad is not True:
            raise ValueError(f"{key}={size} is larger than {dim} = {length}; accepted: at most {length}, a larger model or batch, or precision.pad=true to fill it up with zeros")
        if length % size and precision.pad is False:
            raise ValueError(f"{key}={size} does not divide {dim} = {length} and precision.pad=false; accepted: a divisor of it, or precision.pad=true or null")
    for _, there in precision.exemptions or ():
        if there is not None:
            check_blocks(there, model, tokens)


def _lengths(precision: PrecisionSpec, model: ModelSpec, tokens: int) -> Iterator[tuple[str, int, str, int]]:
    """(key, block size, dimension, its length) for everything that lies in blocks."""
    d, f = model.d_model, model.d_ff
    inputs = {"model.d_model": d, "model.d_ff": f}
    outputs = {"3 model.d_model": 3 * d, "model.d_model": d, "2 model.d_ff": 2 * f}
    rows = {"tokens of a micro-batch": tokens}
    dims = {"weights": (inputs, outputs), "activations": (rows, inputs), "output_gradients": (rows, outputs)}
    contracted = {"forward": inputs, "dgrad": outputs, "wgrad": rows}
    for role in ROLES:
        for gemm, spec in zip(GEMMS[role], getattr(precision, role).both):
            if spec is None:
                continue
            along = contracted[gemm]
            across = dims[role][0] if dims[role][1] is along else dims[role][1]
            for what, sizes in _blocks(spec).items():
                for size, lengths in zip(sizes, (along, across)):
                    yield from ((f"precision.{role}.{what}", size, dim, length) for dim, length in lengths.items())


def _blocks(spec: QuantizerSpec) -> dict[str, tuple[int, ...]]:
    """Key -> sizes along and across the contraction."""
    found = {}
    block = None if spec.source == Source.NONE.value else build_format(spec).block
    if block is not None:
        found["block"] = block if isinstance(block, tuple) else (block,)
    if spec.transform is not None:
        found["transform_block"] = (spec.transform_block or TRANSFORM_BLOCK,)
    return found
