"""From a checkpoint's tensors to a decoder: which tensors make up each part, and into which dtype and place they go."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.layers.linear import Dense, Grouped, Linear
from engine.layers.rope import RotaryEmbedding
from engine.models.config import ModelConfig
from engine.models.decoder import MLP, Attention, Block, Decoder
from engine.weights.checkpoint import TensorSource
from kernels import ops

Progress = Callable[[int], object]
"""Called with the bytes (as stored in the model's dtype) of each tensor that has been loaded."""


class Loader:
    """Reads tensors by name into one dtype on one device, or keeps weights as the file has them quantized."""

    def __init__(
        self,
        source: TensorSource,
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress,
        keep_quantized: bool = False,
    ) -> None:
        self._source = source
        self._dtype = dtype
        self._device = device
        self._progress = progress
        self._keep_quantized = keep_quantized

    def tensor(self, name: str, *shape: int) -> Tensor:
        """One tensor of the given shape."""
        return self.stacked([(name, shape[0])], *shape[1:])

    def stacked(self, parts: Iterable[tuple[str, int]], *rest: int) -> Tensor:
        """Tensors [rows, *rest] laid one below the other: what is multiplied together is stored together."""
        parts = list(parts)
        whole = torch.empty((sum(rows for _, rows in parts), *rest), dtype=self._dtype)
        start = 0
        for name, rows in parts:
            self._source.copy_into(name, whole[start : start + rows])
            start += rows
        self._progress(whole.nbytes)
        return whole.to(self._device)

    def linear(self, parts: Iterable[tuple[str, int]], columns: int, *, bias: bool) -> Linear:
        """The linear map of all ``parts`` (module name, output rows) of the same input."""
        parts = list(parts)
        weights = [(f"{name}.weight", rows) for name, rows in parts]
        return Linear(
            self.kept(weights, columns) or Dense(self.stacked(weights, columns)),
            self.stacked([(f"{name}.bias", rows) for name, rows in parts]) if bias else None,
        )

    def kept(self, parts: Sequence[tuple[str, int]], columns: int) -> Grouped | None:
        """Tensors laid one below the other in their own codes, if all have some that the device multiplies."""
        if not self._keep_quantized or any(self._source.shape(name) != (rows, columns) for name, rows in parts):
            return None  # wrong shapes are the other path's to tell
        found = [weight for name, _ in parts if (weight := self._source.group_quantized(name)) is not None]
        packed = ops.pack_groups(ops.stack(found)) if len(found) == len(parts) else None
        if packed is None:
            return None
        self._progress(packed.inputs * packed.outputs * self._dtype.itemsize)
        return Grouped(packed)

    def optional(self, name: str) -> Tensor | None:
        """A float32 tensor that only some files have."""
        return self._source[name].float() if name in self._source else None


def load_decoder(
    config: ModelConfig,
    source: TensorSource,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress = lambda nbytes: None,
    keep_quantized: bool = False,
) -> Decoder:
    """Load every weight. Raises CheckpointError for one that is missing or of another shape.

    With ``keep_quantized``, matrices stay in the file's own 4 or 8 bits where the device multiplies those.
    """
    load = Loader(source, dtype, device, progress, keep_quantized)
    embedding = load.tensor("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
    blocks = tuple(_load_block(config, load, index) for index in range(config.num_layers))
    if config.tie_embeddings:
        tied = [("model.embed_tokens.weight", config.vocab_size)]
        head = Linear(load.kept(tied, config.hidden_size) or Dense(embedding))
    else:
        head = load.linear([("lm_head", config.vocab_size)], config.hidden_size, bias=False)
    return Decoder(
        config=config,
        embedding=embedding,
        blocks=blocks,
        final_norm=load.tensor("model.norm.weight", config.hidden_size),
        head=head,
        rotary=RotaryEmbedding(config.rope, _rope_factors(config, load)),
    )


def num_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """What `load_decoder` reports to its progress callback in all, within a few biases."""
    attention = config.hidden_size * config.head_dim * 2 * (config.num_heads + config.num_kv_heads)
    layer = attention + 3 * config.hidden_size * config.intermediate_size + 2 * config.hidden_size
    tables = config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2)
    return (tables + config.num_layers * layer + config.hidden_size) * dtype.itemsize


def _load_block(config: ModelConfig, load: Loader, index: int) -> Block:
    prefix, hidden = f"model.layers.{index}", config.hidden_size
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    qkv = [(f"{attention}.q_proj", q_rows), (f"{attention}.k_proj", kv_rows), (f"{attention}.v_proj", kv_rows)]
    gate_up = [(f"{mlp}.{name}", config.intermediate_size) for name in ("gate_proj", "up_proj")]
    down = [(f"{mlp}.down_proj", hidden)]
    head_norm = [load.tensor(f"{attention}.{name}_norm.weight", config.head_dim) for name in "qk" if config.qk_norm]
    return Block(
        input_norm=load.tensor(f"{prefix}.input_layernorm.weight", hidden),
        attention=Attention(
            qkv=load.linear(qkv, hidden, bias=config.qkv_bias),
            output=load.linear([(f"{attention}.o_proj", hidden)], q_rows, bias=config.output_bias),
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            window=config.windows[index],
            norm_eps=config.norm_eps,
            query_norm=head_norm[0] if head_norm else None,
            key_norm=head_norm[1] if head_norm else None,
        ),
        post_norm=load.tensor(f"{prefix}.post_attention_layernorm.weight", hidden),
        mlp=MLP(
            gate_up=load.linear(gate_up, hidden, bias=config.mlp_bias),
            down=load.linear(down, config.intermediate_size, bias=config.mlp_bias),
        ),
    )


def _rope_factors(config: ModelConfig, load: Loader) -> Tensor | None:
    factors = load.optional("rope_freqs.weight")
    if factors is not None and tuple(factors.shape) != (config.rope.dim // 2,):
        raise CheckpointError(f"rope_freqs.weight has shape {list(factors.shape)}; expected [{config.rope.dim // 2}]")
    return factors
