"""Whether blocks fit the dimensions that they lie along."""
from __future__ import annotations

from collections.abc import Iterator

from trainer.config.frozen import ModelSpec, PrecisionSpec, QuantizerSpec
from trainer.config.policies import TRANSFORM_BLOCK, build_format
from trainer.precision import ATTENTION_ROLES, GEMMS, OUTSIDE, ROLES, Source


def check_blocks(precision: PrecisionSpec, model: ModelSpec, tokens: int, seq_len: int, vocab_size: int, place: str | None = None) -> None:
    """ValueError, one line, for a block that is larger than its dimension (unless precision.pad is true), or does not divide it (if it is
    false). tokens: of a micro-batch. place: that of an exemption."""
    for key, size, dim, length in (*_lengths(precision, _sides(model, vocab_size, place), tokens, place), *_attention_lengths(precision, model, seq_len, place)):
        key = f"precision.{key}" if place is None else f"precision.exemptions.{place}={precision.name}: {key}"
        if size > length and precision.pad is not True:
            raise ValueError(f"{key}={size} is larger than {dim} = {length}; accepted: at most {length}, a larger model or batch, or precision.pad=true to fill it up with zeros")
        if length % size and precision.pad is False:
            raise ValueError(f"{key}={size} does not divide {dim} = {length} and precision.pad=false; accepted: a divisor of it, or precision.pad=true or null")
    for where, there in precision.exemptions or ():
        if there is not None:
            check_blocks(there, model, tokens, seq_len, vocab_size, where)


def _sides(model: ModelSpec, vocab_size: int, place: str | None) -> tuple[dict[str, int], dict[str, int]]:
    """Name -> length of the inputs and of the outputs of the linear layers at a place."""
    d, f = model.d_model, model.d_ff
    if place in OUTSIDE:
        return {"model.d_model": d}, {"the vocabulary": vocab_size}
    return {"model.d_model": d, "model.d_ff": f}, {"3 model.d_model": 3 * d, "model.d_model": d, "2 model.d_ff": 2 * f}


def _lengths(precision: PrecisionSpec, sides, tokens: int, place: str | None) -> Iterator[tuple[str, int, str, int]]:
    """(key, block size, dimension, its length) for everything that lies in blocks. An embedding reads its weights' forward quantizer alone."""
    inputs, outputs = sides
    rows = {"tokens of a micro-batch": tokens}
    dims = {"weights": (inputs, outputs), "activations": (rows, inputs), "output_gradients": (rows, outputs)}
    contracted = {"forward": inputs, "dgrad": outputs, "wgrad": rows}
    for role in ROLES if place != "embedding" else ("weights",):
        for gemm, spec in zip(GEMMS[role] if place != "embedding" else ("forward",), getattr(precision, role).both):
            if spec is None:
                continue
            along = contracted[gemm]
            across = dims[role][0] if dims[role][1] is along else dims[role][1]
            for what, sizes in _blocks(spec).items():
                for size, lengths in zip(sizes, (along, across)):
                    yield from ((f"{role}.{what}", size, dim, length) for dim, length in lengths.items())


def _attention_lengths(precision: PrecisionSpec, model: ModelSpec, seq_len: int, place: str | None) -> Iterator[tuple[str, int, str, int]]:
    """As `_lengths`, of attention: blocks of keys and values lie along the head width, those of scores and probabilities along the keys."""
    if place in OUTSIDE:
        return
    dims = {"kv": ("the head width (model.d_model / model.num_heads)", model.d_model // model.num_heads)}
    for role in ATTENTION_ROLES:
        spec = getattr(precision, role)
        for what, (size, *_) in ({} if spec is None else _blocks(spec)).items():
            yield f"{role}.{what}", size, *dims.get(role, ("seq_len", seq_len))


def _blocks(spec: QuantizerSpec) -> dict[str, tuple[int, ...]]:
    """Key -> sizes along and across the contraction."""
    found = {}
    block = None if spec.source == Source.NONE.value else build_format(spec).block
    if block is not None:
        found["block"] = block if isinstance(block, tuple) else (block,)
    if spec.transform is not None:
        found["transform_block"] = (spec.transform_block or TRANSFORM_BLOCK,)
    return found
