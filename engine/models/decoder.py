"""The decoder that every architecture here is: embedding, blocks of attention and gated MLP, norm, head."""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.forward_batch import ForwardBatch
from engine.kv_cache import KVCache, LayerCache
from engine.layers.linear import Dense, Grouped, Linear
from engine.layers.pruned_attention import prune
from engine.layers.rope import RotaryEmbedding
from engine.models.config import ModelConfig
from kernels import ops


@dataclass(frozen=True, slots=True)
class Rotations:
    """Cosines and sines of a step's positions, each [T, rotated dimensions / 2] float32."""

    plain: tuple[Tensor, Tensor]
    at_sinks: tuple[Tensor, Tensor] | None
    """Of the positions that queries have for attention sinks, where any sequence has some."""

    @classmethod
    def of(cls, batch: ForwardBatch, rotary: RotaryEmbedding) -> "Rotations":
        """Compute them, once for all layers."""
        at_sinks = None if batch.limits is None else batch.limits.sink_positions
        return cls(rotary(batch.positions), None if at_sinks is None else rotary(at_sinks))


@dataclass(frozen=True, slots=True)
class Attention:
    """Grouped-query attention with rotary positions over the paged KV cache."""

    qkv: Linear
    output: Linear
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None
    norm_eps: float
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None

    def __call__(
        self, x: Tensor, rotations: "Rotations", batch: ForwardBatch, cache: LayerCache, hidden: Tensor | None
    ) -> Tensor:
        """x [T, hidden] → [T, hidden]; writes the step's keys and values into ``cache``.

        ``hidden`` [B, Hkv] int32: how many first slots each KV head does not see.
        """
        qkv = self.qkv(x).view(len(x), -1, self.head_dim)
        query, key, value = qkv.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        if self.query_norm is not None and self.key_norm is not None:
            query = ops.rms_norm(query, self.query_norm, self.norm_eps)
            key = ops.rms_norm(key, self.key_norm, self.norm_eps)
        sink_query = query
        if rotations.at_sinks is not None:
            sink_query = query.clone()
            ops.rotary_embedding(sink_query, key[:, :0], *rotations.at_sinks)
        ops.rotary_embedding(query, key, *rotations.plain)
        ops.kv_write(key, value, cache.key, cache.value, batch.slots, cache.kv_format)
        attended = ops.paged_attention(
            query,
            cache.key,
            cache.value,
            batch.block_tables,
            batch.query_start,
            batch.seq_lens,
            self.head_dim**-0.5,
            self.window,
            None if batch.limits is None else ops.Sinks(batch.limits.windows, batch.limits.sinks, sink_query),
            hidden,
            cache.kv_format,
        )
        if batch.counted is not None:
            ops.attention_mass(
                query,
                cache.key,
                batch.block_tables,
                batch.query_start,
                batch.seq_lens,
                self.head_dim**-0.5,
                cache.mass,
                batch.counted,
                hidden,
                cache.kv_format,
            )
        if batch.pruned:
            prune(attended, query, batch, cache, self.head_dim**-0.5, hidden)
        return self.output(attended.view(len(x), -1))


@dataclass(frozen=True, slots=True)
class MLP:
    """down(silu(gate x) · up x), gate and up in one matmul."""

    gate_up: Linear
    down: Linear

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, hidden] → [T, hidden]."""
        return self.down(ops.silu_and_mul(self.gate_up(x)))


@dataclass(frozen=True, slots=True)
class Block:
    """One layer. The residual stream is updated in place by the norm that reads it next."""

    input_norm: Tensor
    attention: Attention
    post_norm: Tensor
    mlp: MLP


@dataclass(frozen=True, slots=True)
class Decoder:
    """A whole model, weights included."""

    config: ModelConfig
    embedding: Tensor
    """[vocab, hidden]."""
    blocks: tuple[Block, ...]
    final_norm: Tensor
    head: Linear
    rotary: RotaryEmbedding

    def __call__(self, batch: ForwardBatch, cache: KVCache) -> Tensor:
        """Compute the step's tokens; returns the logits [R, vocab] of ``batch.output_rows`` in the model's dtype."""
        return self.head(self.hidden_states(batch, cache))

    def hidden_states(self, batch: ForwardBatch, cache: KVCache) -> Tensor:
        """Compute the step's tokens; returns what the head reads, the normed states [R, hidden] of the same rows."""
        eps = self.config.norm_eps
        rotations = Rotations.of(batch, self.rotary)
        hidden = cache.hidden_slots(batch.block_tables, batch.selected)
        residual = torch.nn.functional.embedding(batch.tokens, self.embedding)
        x = ops.rms_norm(residual, self.blocks[0].input_norm, eps)
        for index, (block, layer_cache) in enumerate(zip(self.blocks, cache.layers, strict=True)):
            if index > 0:
                x = ops.rms_norm(x, block.input_norm, eps, residual)
            attended = block.attention(x, rotations, batch, layer_cache, None if hidden is None else hidden[index])
            if block is self.blocks[-1]:  # nothing reads the other rows any more
                attended, residual = batch.wanted(attended), batch.wanted(residual)
            x = block.mlp(ops.rms_norm(attended, block.post_norm, eps, residual))
        return ops.rms_norm(x, self.final_norm, eps, residual)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        shared = self.config.tie_embeddings and isinstance(self.head.weight, Dense)
        matrices = sum(linear.nbytes for linear in self._linears)
        return self.embedding.nbytes + matrices - (self.head.nbytes if shared else 0)

    @property
    def quantized_bits(self) -> tuple[int, ...]:
        """How many bits the codes of weights have that are multiplied as codes, ascending."""
        return tuple(sorted({one.weight.bits for one in self._linears if isinstance(one.weight, Grouped)}))

    @property
    def _linears(self) -> list[Linear]:
        return [
            self.head,
            *(
                linear
                for block in self.blocks
                for linear in (block.attention.qkv, block.attention.output, block.mlp.gate_up, block.mlp.down)
            ),
        ]
