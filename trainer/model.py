"""The decoder: RMSNorm, rotary positions, SwiGLU, no biases, tied or untied head; every block matmul goes through `linear`.

NNX modules are blueprints: `blueprint(config)` splits one into a static graphdef and a plain nested dict of parameters, and
`apply` is a pure function of that dict. Layers are stacked on a leading axis L and run under `scan`, or unrolled where few.

Shapes: B batch, T time, N = B*T tokens, L layers, D model width, F feed-forward width, H heads, V vocabulary.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from trainer import ops, scaled_ops, scales
from trainer.keys import fold_in
from trainer.linear import linear
from trainer.methods.attention import attention
from trainer.operands import ROWS, RowShards, straight_through
from trainer.precision import ATTENTION_ROLES, PrecisionPolicy, Source, matches
from trainer.scales import Site
from trainer.sharding import over_rows

HEAD_SALT, EMBEDDING_SALT = 0x48454144, 0x454D4244  # random bits outside the layers, whose salts count from 0
SITES = ("qkv", "attention_out", "gate_up", "down")  # the linear layers of a block, in the order of the forward pass
ATTENTION = "attention"  # the place of what an exemption says of keys, values, scores and probabilities


def sites_of(role: str) -> tuple[str, ...]:
    """The places of a block that a role is measured at, in the order of the forward pass."""
    return (ATTENTION,) if role in ATTENTION_ROLES else SITES


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a decoder. `num_params` counts everything but the embedding and the head."""

    num_layers: int
    d_model: int
    num_heads: int
    d_ff: int
    vocab_size: int
    tied_head: bool = True
    scan_layers: bool = False
    remat: bool = False
    mup_base_width: int = 0  # 0: standard parametrisation
    extra_norm: bool = False  # an RMSNorm with a gain of its own before every linear layer of a block
    learned: tuple[str, ...] = ()  # roles with learned scales

    @property
    def embedding_width(self) -> int:
        """The width that sets the embedding's scale: the model's own, or under muP the base width, so that embeddings start alike
        at every width (Yang et al. 2022, table 8)."""
        return self.mup_base_width or self.d_model

    @property
    def logit_scale(self) -> float:
        """What multiplies a tied head's logits: 1/sqrt(width) keeps a token from predicting itself at the start, and under muP the
        logits shrink by a further base/width. An untied head is initialised with standard deviation 1/width instead."""
        return self.embedding_width**-0.5 * (self.embedding_width / self.d_model) if self.tied_head else 1.0

    @property
    def init_stds(self) -> tuple[float, ...]:
        """Standard deviations that the weights of SITES start with."""
        residual = (2 * self.num_layers) ** -0.5  # keeps the residual stream's variance independent of depth (GPT-2)
        return self.d_model**-0.5, self.d_model**-0.5 * residual, self.d_model**-0.5, self.d_ff**-0.5 * residual

    @property
    def num_params(self) -> int:
        per_layer = 4 * self.d_model**2 + 3 * self.d_model * self.d_ff + 2 * self.d_model
        return self.num_layers * per_layer + self.d_model

    @property
    def num_params_total(self) -> int:
        return self.num_params + self.vocab_size * self.d_model * (1 if self.tied_head else 2)

    @property
    def site_params(self) -> tuple[int, ...]:
        """Weights of one block's SITES."""
        d, f = self.d_model, self.d_ff
        return 3 * d * d, d * d, 2 * d * f, d * f

    def matmul_params(self) -> int:
        """Parameters that multiply activations in the blocks: those that a policy quantizes."""
        return self.num_layers * sum(self.site_params)

    def flops_per_token(self, seq_len: int) -> float:
        """Forward + backward floating-point operations per token: 6 per matmul parameter (blocks and head) and 12 L D T for the
        two attention products, not halved for causality (Chowdhery et al. 2022, appendix B)."""
        return 6.0 * (self.matmul_params() + self.vocab_size * self.d_model) + 12.0 * self.num_layers * self.d_model * seq_len


@dataclass(frozen=True)
class Call:
    """What one forward pass needs besides parameters and tokens. num_tokens: over how many the loss is averaged (all devices and
    micro-batches together), which is how large static scales expect gradients to be."""

    policy: PrecisionPolicy
    key: jax.Array | None = None  # uint32[2]; for stochastic rounding
    rows: RowShards | None = None
    sites: Site = field(default_factory=Site)  # stacked [L, S], what it measures of attention [L]; [S] and [] inside a layer
    num_tokens: int = 1


def _unstacked(tree, length: int) -> Iterator:
    """The slices of stacked leaves, one tree at a time. lax.split transposes to one concatenation; indexing would transpose to a padded
    sum per slice."""
    leaves, treedef = jax.tree.flatten(tree)
    pieces = [lax.split(leaf, (1,) * length, axis=0) for leaf in leaves]
    for index in range(length):
        yield jax.tree.unflatten(treedef, [piece[index].reshape(piece[index].shape[1:]) for piece in pieces])


def _normal(rngs: nnx.Rngs, shape, std):
    return nnx.Param(jax.random.normal(rngs.params(), shape, jnp.float32) * std)


def _ops(call: Call):
    """The module of the block's operations: with scale rules of their own where scales are carried."""
    return ops if call.policy.data_dtype is None else scaled_ops


class Block(nnx.Module):
    """One pre-norm block. Four matmuls: fused qkv, attention output, fused gate and up, down."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        d, f = config.d_model, config.d_ff
        self.stds = config.init_stds
        qkv, attention_out, gate_up, down = self.stds
        self.attention_norm = nnx.Param(jnp.ones((d,), jnp.float32))
        self.qkv = _normal(rngs, (d, 3 * d), qkv)
        self.attention_out = _normal(rngs, (d, d), attention_out)
        self.mlp_norm = nnx.Param(jnp.ones((d,), jnp.float32))
        self.gate_up = _normal(rngs, (d, 2 * f), gate_up)
        self.down = _normal(rngs, (f, d), down)
        if config.extra_norm:
            widths = (d, d, d, f)
            self.extra_norms = nnx.Dict({f"{name}_norm": nnx.Param(jnp.ones((width,), jnp.float32)) for name, width in zip(SITES, widths)})
        if config.learned:
            self.steps = nnx.Dict({role: nnx.Param(jnp.ones((len(SITES),), jnp.float32)) for role in config.learned})
        self.num_heads, self.num_layers = config.num_heads, config.num_layers
        self.extra_norm, self.learned = config.extra_norm, config.learned

    def __call__(self, h_ND, batch: int, call: Call, layer: int):
        """layer: the place in the stack that decides about exemptions."""
        meter = call.sites.meter
        sites = list(_unstacked(replace(call.sites, meter=replace(meter, attention={})), len(SITES)))
        own = _ops(call)

        def project(x, name):
            index = SITES.index(name)
            key = None if call.key is None else fold_in(call.key, index)
            policy = call.policy.at(layer, self.num_layers, name)
            learned = {role: self.steps[role][...][index] for role in policy.roles(Source.LEARNED)}
            site = replace(sites[index], expected=scales.expected_rms(policy, self.stds[index], call.num_tokens), learned=learned)
            if self.extra_norm:
                x = own.rms_norm(x, self.extra_norms[f"{name}_norm"][...])
            return over_rows(linear(x, getattr(self, name)[...], policy, key, call.rows, site))

        qkv = project(own.rms_norm(h_ND, self.attention_norm[...]), "qkv")
        here = call.policy.at(layer, self.num_layers, ATTENTION)
        attended = own.rotary_attention(qkv, batch, self.num_heads) if call.policy.data_dtype is not None else ops.rotary_attention(
            qkv, batch, self.num_heads, attention(here, call.key, call.rows and call.rows.axis_name, meter.attention))
        h_ND = h_ND + project(attended, "attention_out")
        gate_up = project(own.rms_norm(h_ND, self.mlp_norm[...]), "gate_up")
        return h_ND + project(own.swiglu(gate_up), "down")


class Decoder(nnx.Module):
    """Tokens [B, T] to logits [N, V]."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        d = config.d_model
        self.embedding = _normal(rngs, (config.vocab_size, d), config.embedding_width**-0.5)
        self.layers = jax.vmap(lambda key: Block(config, nnx.Rngs(params=key)))(jax.random.split(rngs.params(), config.num_layers))
        self.final_norm = nnx.Param(jnp.ones((d,), jnp.float32))
        self.head = None if config.tied_head else _normal(rngs, (config.vocab_size, d), 1.0 / d)
        self.config = config

    def __call__(self, tokens_BT, call: Call):
        config = self.config
        batch = tokens_BT.shape[0]
        # The table is small enough for the head's logits; this brings the residual stream to unit variance.
        table_VD = self._table(call)
        h_ND = over_rows(ops.embed(table_VD, tokens_BT.reshape(-1))) * config.embedding_width**0.5
        h_ND = self._run_layers(h_ND, batch, call)
        h_ND = _ops(call).rms_norm(h_ND, self.final_norm[...])
        if config.tied_head:
            h_ND = h_ND * config.logit_scale
        head_VD = self.embedding if self.head is None else self.head
        key = None if call.key is None else fold_in(call.key, HEAD_SALT)
        return over_rows(linear(h_ND, head_VD[...].T, call.policy.outside("head"), key, call.rows))

    def _table(self, call: Call):
        """The embedding as its policy's forward quantizer of weights makes it, straight-through; rows are what is contracted elsewhere."""
        policy = call.policy.outside("embedding")
        quantizer = policy.weights.first
        if quantizer is None:
            return self.embedding[...]
        key = None if call.key is None else fold_in(call.key, EMBEDDING_SALT)
        return straight_through(self.embedding[...], quantizer, ROWS, key, policy)

    def _run_layers(self, h_ND, batch, call):
        graphdef, stacked = nnx.split(self.layers)

        def runner(place: int):
            """The layer there, or any with the same policies."""

            def run(h_ND, layer, sites, index):
                key = None if call.key is None else fold_in(call.key, index)
                return nnx.merge(graphdef, layer)(h_ND, batch, replace(call, key=key, sites=sites), place)

            return jax.checkpoint(run) if self.config.remat else run

        num_layers = self.config.num_layers
        if not self.config.scan_layers:
            for index, (layer, sites) in enumerate(_unstacked((stacked, call.sites), num_layers)):
                h_ND = runner(index)(h_ND, layer, sites, index)
            return h_ND
        indices = jnp.arange(num_layers, dtype=jnp.uint32)
        for start, stop in alike(call.policy, num_layers):
            run, piece = runner(start), jax.tree.map(lambda x: x[start:stop], (stacked, call.sites, indices))
            h_ND, _ = lax.scan(lambda h, xs: (run(h, *xs), None), h_ND, piece)
        return h_ND


def alike(policy: PrecisionPolicy, num_layers: int) -> list[tuple[int, int]]:
    """[start, stop) of the runs of layers that no exemption tells apart."""

    def named(layer):
        return [[matches(exemption.where, layer, num_layers, site) for exemption in policy.exemptions] for site in (*SITES, ATTENTION)]

    starts = [layer for layer in range(num_layers) if layer == 0 or named(layer) != named(layer - 1)]
    return list(zip(starts, [*starts[1:], num_layers]))


def _build(config: ModelConfig, key):
    return nnx.split(Decoder(config, nnx.Rngs(params=key)))


def init_params(config: ModelConfig, key) -> dict:
    """Fresh float32 parameters as a plain nested dict; pure, may be jitted and vmapped over `key` (a typed PRNG key)."""
    return nnx.to_pure_dict(_build(config, key)[1])


def blueprint(config: ModelConfig):
    """(graphdef, shapes): the static half of the decoder, and its parameters as a dict of ShapeDtypeStructs."""
    graphdef, state = nnx.eval_shape(lambda: _build(config, jax.random.key(0)))
    return graphdef, nnx.to_pure_dict(state)


def by_path(params: dict) -> dict:
    """"layers/down" and so on -> leaf, in flattening order; the names that checkpoints use."""
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def apply(graphdef, params: dict, tokens_BT: jax.Array, call: Call) -> jax.Array:
    """Logits [N, V] of the decoder with these parameters."""
    return nnx.merge(graphdef, params)(tokens_BT, call)


def next_token_losses(graphdef, params: dict, tokens_BT1: jax.Array, call: Call) -> jax.Array:
    """Cross-entropy of every next token, nats, [B, T], from windows of T + 1 tokens."""
    inputs_BT, targets_BT = tokens_BT1[:, :-1], tokens_BT1[:, 1:]
    logits_NV = apply(graphdef, params, inputs_BT, call)
    return ops.cross_entropy(logits_NV, targets_BT.reshape(-1)).reshape(targets_BT.shape)
