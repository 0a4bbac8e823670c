"""Rotary position embedding: which angle each pair of dimensions turns by, per position (Su et al. 2021, §3.2.2).

Angles are computed in float64, once per step and for that step's positions only: there is no table whose length would
bound the context, and position 4,000,000 is as exact as position 4.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.errors import CheckpointError


@dataclass(frozen=True)
class RopeConfig:
    """The rotation's parameters as a config.json states them; ``scaling`` holds those of its ``rope_type``."""

    dim: int
    """Dimensions of a head that turn: its first ``dim``, an even number."""
    theta: float
    rope_type: str
    scaling: Mapping[str, Any]
    max_position: int
    """The trained context length, for the types that depend on it."""


class RotaryEmbedding:
    """Cosines and sines for the positions of a step."""

    def __init__(self, config: RopeConfig, factors: Tensor | None = None) -> None:
        """``factors`` [dim / 2]: divisors of the frequencies that a file states outright (GGUF's `rope_freqs`)."""
        self._config = config
        self._dynamic = config.rope_type == "dynamic"
        self._frequencies, self._amplitude = _scaled_frequencies(config)
        if factors is not None:
            self._frequencies = self._frequencies / factors.double()

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [T] int64 → cos, sin, each [T, dim / 2] float32 on the positions' device."""
        frequencies = self._frequencies.to(positions.device)
        if self._dynamic:
            frequencies = _dynamic_frequencies(self._config, positions)
        angles = positions.double().unsqueeze(-1) * frequencies
        return (angles.cos() * self._amplitude).float(), (angles.sin() * self._amplitude).float()


def _frequencies(dim: int, theta: float) -> Tensor:
    return theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def _scaled_frequencies(config: RopeConfig) -> tuple[Tensor, float]:
    """Angle per position for each pair of dimensions, [dim / 2] float64, and the amplitude of cos and sin."""
    plain = _frequencies(config.dim, config.theta)
    try:
        match config.rope_type:
            case "default":
                return plain, 1.0
            case "dynamic":
                float(config.scaling["factor"])  # each step needs it
                return plain, 1.0
            case "linear":
                return plain / float(config.scaling["factor"]), 1.0
            case "llama3":
                return _llama3(config, plain), 1.0
            case "yarn":
                return _yarn(config, plain)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        problem = f"lacks {error}" if isinstance(error, KeyError) else f"cannot be computed: {error}"
        raise CheckpointError(f"config.json: RoPE scaling {config.rope_type!r} {problem}") from None
    raise CheckpointError(f"config.json: RoPE scaling {config.rope_type!r} is not supported")


def _dynamic_frequencies(config: RopeConfig, positions: Tensor) -> Tensor:
    """Dynamic NTK: past the trained length the base grows with the length. [T, dim / 2] float64.

    The length is taken as the token's own position + 1, so that a key depends on its position alone and is the same
    however the prompt was chunked, cached or recomputed (docs/adr/0004). Transformers agrees when it decodes; when it
    computes a whole long prompt at once, it uses the prompt's length for every position.
    """
    factor, trained = float(config.scaling["factor"]), config.max_position
    length = (positions.double() + 1).clamp(min=trained)
    growth = factor * length / trained - (factor - 1)
    theta = config.theta * growth ** (config.dim / (config.dim - 2))
    exponents = torch.arange(0, config.dim, 2, dtype=torch.float64, device=positions.device) / config.dim
    return theta.unsqueeze(-1) ** -exponents


def _llama3(config: RopeConfig, plain: Tensor) -> Tensor:
    """Llama 3.1: long wavelengths are stretched by ``factor``, short ones kept, those between blended."""
    factor = float(config.scaling["factor"])
    low, high = float(config.scaling["low_freq_factor"]), float(config.scaling["high_freq_factor"])
    trained = float(config.scaling["original_max_position_embeddings"])
    turns = trained * plain / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return plain * kept + plain / factor * (1 - kept)


def _yarn(config: RopeConfig, plain: Tensor) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023, §3.2–3.4): a ramp over dimensions between stretched and kept, and a hotter softmax."""
    scaling = config.scaling
    trained = scaling.get("original_max_position_embeddings") or config.max_position
    factor = float(scaling.get("factor") or config.max_position / trained)

    def dimension(turns: float) -> float:
        """The pair of dimensions, as a real number, that makes so many turns over the trained length."""
        return config.dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = dimension(scaling.get("beta_fast") or 32), dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.dim - 1)
    ramp = (torch.arange(config.dim // 2, dtype=torch.float64) - low) / max(high - low, 0.001)
    stretched = ramp.clamp(0, 1)
    return plain / factor * stretched + plain * (1 - stretched), _yarn_amplitude(scaling, factor)


def _yarn_amplitude(scaling: Mapping[str, Any], factor: float) -> float:
    def amplitude(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return amplitude(scaling["mscale"]) / amplitude(scaling["mscale_all_dim"])
    return amplitude(1.0)
