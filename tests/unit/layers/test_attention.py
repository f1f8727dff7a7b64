"""Self-attention over a paged cache."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gyrfalcon.kernels.reference import ReferenceOps
from gyrfalcon.layers.attention import Attention
from gyrfalcon.layers.linear import Linear
from gyrfalcon.layers.rotary import frequencies, rotation
from gyrfalcon.testing.paged import PagedRows

ops = ReferenceOps()
HEADS, KV_HEADS, SIZE, HIDDEN = 4, 2, 8, 24


@pytest.mark.parametrize("is_rotary", [True, False], ids=["rotary", "no-rotation"])
def test_queries_keys_and_values_are_the_three_parts_of_one_product(is_rotary: bool) -> None:
    qkv_OD, out_DO = torch.randn((HEADS + 2 * KV_HEADS) * SIZE, HIDDEN), torch.randn(HIDDEN, HEADS * SIZE)
    attention = Attention(Linear(qkv_OD), Linear(out_DO), HEADS, KV_HEADS, SIZE, alibi_slopes_H=None)
    x_TD = torch.randn(5, HIDDEN)
    paged = PagedRows(1, 5, block_size=4)
    (cache,) = paged.empty_caches(1, KV_HEADS, SIZE, torch.float32)
    step = paged.grow({0: 5})
    turn = rotation(
        torch.from_numpy(step.attention.positions), frequencies(10000.0, SIZE, torch.device("cpu")), torch.float32
    )

    found_TD = attention.forward(x_TD, turn if is_rotary else None, step.attention, cache, ops)

    q_TO, k_TO, v_TO = (x_TD @ qkv_OD.t()).split([HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * SIZE], dim=-1)
    q_THE, k_TKE, v_TKE = q_TO.view(5, HEADS, SIZE), k_TO.view(5, KV_HEADS, SIZE), v_TO.view(5, KV_HEADS, SIZE)
    if is_rotary:
        q_THE = ops.rotate(q_THE, turn.cos_TE, turn.sin_TE)
        k_TKE = ops.rotate(k_TKE, turn.cos_TE, turn.sin_TE)
    attended = F.scaled_dot_product_attention(
        q_THE.transpose(0, 1), k_TKE.transpose(0, 1), v_TKE.transpose(0, 1), is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(found_TD, attended.transpose(0, 1).flatten(1) @ out_DO.t(), rtol=1e-4, atol=1e-4)
    stored_SKE = cache.k_BSKE.flatten(0, 1)[step.attention.slot_mapping]
    torch.testing.assert_close(stored_SKE, k_TKE)
