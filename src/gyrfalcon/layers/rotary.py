"""Rotary positions (Su et al. 2021, arXiv 2104.09864): angles for a step's tokens."""

# T tokens in the step, E head size

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rotation:
    """Cosine and sine of every token's angles, both halves of the head alike, in the activation's dtype."""

    cos_TE: Tensor
    sin_TE: Tensor


def frequencies(theta: float, head_size: int, device: torch.device) -> Tensor:
    """theta^(-2i/E) for i below E/2: radians a position turns, float32."""
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32, device=device) / head_size
    return 1.0 / (theta**exponents)


def stretch_slow_frequencies(
    frequencies_E2: Tensor, factor: float, low_factor: float, high_factor: float, original_max_context: int
) -> Tensor:
    """Llama 3.1's scaling: frequencies that turn fewer than `low_factor` times within the original context are
    divided by `factor`, those that turn more than `high_factor` times are kept, those between are blended.
    """
    turns_E2 = original_max_context * frequencies_E2 / (2 * math.pi)
    kept_share_E2 = ((turns_E2 - low_factor) / (high_factor - low_factor)).clamp(0.0, 1.0)
    return (1 - kept_share_E2) * frequencies_E2 / factor + kept_share_E2 * frequencies_E2


def rotation(positions_T: Tensor, frequencies_E2: Tensor, dtype: torch.dtype) -> Rotation:
    """Angles in float32, cast after cosine and sine: positions in the thousands have no room in 16 bits."""
    angles_TE2 = positions_T.to(torch.float32)[:, None] * frequencies_E2
    angles_TE = torch.cat((angles_TE2, angles_TE2), dim=-1)
    return Rotation(angles_TE.cos().to(dtype), angles_TE.sin().to(dtype))
