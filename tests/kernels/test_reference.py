"""The plain operations against their formulas, and the promise that a token's bits are its own."""

# T tokens, H query heads, K kv heads, E head size, L tokens of a row

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gyrfalcon.kernels.interface import LayerCache
from gyrfalcon.kernels.reference import ReferenceOps
from gyrfalcon.layers.alibi import alibi_slopes
from gyrfalcon.testing.paged import PagedRows

ops = ReferenceOps()

HEADS = [(4, 1), (8, 2), (4, 4), (71, 1), (6, 2)]  # query heads, kv heads


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@dataclass(frozen=True)
class Tokens:
    """Queries, keys and values of one row, whole."""

    q_LHE: Tensor
    k_LKE: Tensor
    v_LKE: Tensor

    @classmethod
    def random(cls, length: int, heads: tuple[int, int], head_size: int) -> Tokens:
        num_heads, num_kv_heads = heads
        return cls(
            torch.randn(length, num_heads, head_size),
            torch.randn(length, num_kv_heads, head_size),
            torch.randn(length, num_kv_heads, head_size),
        )


def attend_in_steps(
    rows: Sequence[Tokens],
    steps: Sequence[Mapping[int, int]],
    *,
    block_size: int = 16,
    slopes_H: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """What every token of each row attends to, when each step runs the next so many tokens of some rows."""
    longest = max(len(row.q_LHE) for row in rows)
    paged = PagedRows(len(rows), longest, block_size=block_size)
    _, num_kv_heads, head_size = rows[0].k_LKE.shape
    (cache,) = paged.empty_caches(1, num_kv_heads, head_size, dtype)
    found: list[list[Tensor]] = [[] for _ in rows]
    for counts in steps:
        taken = {row: slice(paged.lengths[row], paged.lengths[row] + count) for row, count in counts.items()}
        step = paged.grow(counts)

        def packed(name: str, taken: Mapping[int, slice] = taken) -> Tensor:
            return torch.cat([getattr(rows[row], name)[part] for row, part in taken.items()]).to(dtype)

        ops.write_kv(packed("k_LKE"), packed("v_LKE"), cache, step.attention.slot_mapping)
        out_THE = ops.attend(packed("q_LHE"), cache, step.attention, head_size**-0.5, slopes_H)
        assert out_THE.dtype == dtype
        for row, part in zip(counts, out_THE.split(list(counts.values())), strict=True):
            found[row].append(part)
    return [torch.cat(parts) for parts in found if parts]


def exact_attention(row: Tokens, slopes_H: Tensor | None) -> Tensor:
    """The formula in float64, one head and one token at a time."""
    length, num_heads, head_size = row.q_LHE.shape
    group = num_heads // row.k_LKE.shape[1]
    out_LHE = torch.empty(length, num_heads, head_size, dtype=torch.float64)
    for head in range(num_heads):
        k_LE, v_LE = row.k_LKE[:, head // group].double(), row.v_LKE[:, head // group].double()
        for token in range(length):
            scores_L = k_LE[: token + 1] @ row.q_LHE[token, head].double()
            if slopes_H is not None:
                positions_L = torch.arange(token + 1).to(torch.bfloat16)
                scores_L += (slopes_H[head].to(torch.bfloat16) * positions_L).double()
            out_LHE[token, head] = torch.softmax(scores_L / math.sqrt(head_size), dim=0) @ v_LE[: token + 1]
    return out_LHE


@pytest.mark.parametrize("has_alibi", [False, True], ids=["plain", "alibi"])
@pytest.mark.parametrize("heads", [(4, 1), (6, 2), (3, 3)], ids=str)
def test_attend_follows_the_formula(heads: tuple[int, int], has_alibi: bool) -> None:
    row = Tokens.random(530, heads, 16)
    slopes_H = torch.tensor(alibi_slopes(heads[0])) if has_alibi else None

    (out_LHE,) = attend_in_steps([row], [{0: 530}], slopes_H=slopes_H)

    torch.testing.assert_close(out_LHE.double(), exact_attention(row, slopes_H), rtol=0, atol=2e-5)


@pytest.mark.parametrize("block_size", [1, 16, 48, 300])
def test_attend_is_exact_for_any_block_size(block_size: int) -> None:
    row = Tokens.random(310, (4, 2), 16)

    (out_LHE,) = attend_in_steps([row], [{0: 290}, *[{0: 1}] * 20], block_size=block_size)

    torch.testing.assert_close(out_LHE.double(), exact_attention(row, None), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("heads", "head_size", "num_threads"),
    [
        *[(heads, head_size, 1) for heads in HEADS for head_size in (16, 32, 64, 128)],
        ((4, 1), 256, 1),
        ((4, 1), 64, 2),
        ((8, 2), 32, 2),
    ],
    ids=str,
)
def test_a_token_has_the_same_bits_in_a_prefill_alone_or_in_a_batch(
    heads: tuple[int, int], head_size: int, num_threads: int
) -> None:
    rows = [Tokens.random(length, heads, head_size) for length in (275, 257, 40, 300)]
    chunks = [{3: 255, 0: 3}, {0: 250, 1: 245, 2: 1, 3: 2}, {2: 29, 3: 33}]
    decodes = [{0: 1, 1: 1, 2: 1, 3: 1}] * 9
    with threads(num_threads):
        at_once = attend_in_steps(rows, [{0: 275}, {1: 257}, {2: 40}, {3: 300}])
        mixed = attend_in_steps(rows, [*chunks, *decodes, {0: 13, 1: 3, 2: 1, 3: 1}])
        alone = attend_in_steps(rows[:1], [{0: 1}] * 3 + [{0: 2}] + [{0: 251}] + [{0: 1}] * 19)

    for whole_LHE, part_LHE in zip(at_once, mixed, strict=True):
        assert torch.equal(whole_LHE, part_LHE)
    assert torch.equal(at_once[0], alone[0])


@settings(max_examples=25)
@given(st.data())
def test_no_chunking_changes_a_bit(data: st.DataObject) -> None:
    torch.manual_seed(1)
    lengths = data.draw(st.lists(st.integers(1, 330), min_size=1, max_size=3))
    heads = data.draw(st.sampled_from(HEADS))
    slopes_H = torch.tensor(alibi_slopes(heads[0])) if data.draw(st.booleans()) else None
    rows = [Tokens.random(length, heads, 16) for length in lengths]
    left = dict(enumerate(lengths))
    steps = []
    while left:
        chosen = data.draw(st.lists(st.sampled_from(sorted(left)), min_size=1, unique=True))
        steps.append({row: min(left[row], data.draw(st.sampled_from([1, 2, 5, 90, 330]))) for row in chosen})
        left = {row: count - steps[-1].get(row, 0) for row, count in left.items() if count > steps[-1].get(row, 0)}

    in_steps = attend_in_steps(rows, steps, slopes_H=slopes_H)
    at_once = attend_in_steps(rows, [{row: length} for row, length in enumerate(lengths)], slopes_H=slopes_H)

    assert all(torch.equal(one, other) for one, other in zip(in_steps, at_once, strict=True))


def test_attend_reads_only_the_positions_a_row_may_see() -> None:
    rows = [Tokens.random(20, (4, 2), 16), Tokens.random(300, (4, 2), 16)]
    paged = PagedRows(2, 300, block_size=16)
    (cache,) = paged.empty_caches(1, 2, 16, torch.float32)
    step = paged.grow({0: 20, 1: 300})
    ops.write_kv(
        torch.cat([row.k_LKE for row in rows]),
        torch.cat([row.v_LKE for row in rows]),
        cache,
        step.attention.slot_mapping,
    )
    assert cache.k_BSKE[0].isnan().all()  # the block that pads the shorter row's table
    assert cache.v_BSKE.isnan().any()  # the rest of each row's last block

    out_THE = ops.attend(torch.cat([row.q_LHE for row in rows]), cache, step.attention, 0.25, None)

    assert out_THE.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_attend_in_16_bits_rounds_only_its_inputs_and_its_result(dtype: torch.dtype) -> None:
    row = Tokens.random(300, (4, 1), 32)
    rounded = Tokens(row.q_LHE.to(dtype).float(), row.k_LKE.to(dtype).float(), row.v_LKE.to(dtype).float())

    (out_LHE,) = attend_in_steps([row], [{0: 290}, *[{0: 1}] * 10], dtype=dtype)
    (expected_LHE,) = attend_in_steps([rounded], [{0: 300}])

    torch.testing.assert_close(out_LHE, expected_LHE.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-5)


# The bundled model's shapes, then wider ones; with several threads the library splits sums of 1024 and more.
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize(
    ("inner", "outer"),
    [(256, 384), (256, 256), (256, 1024), (1024, 256), (256, 4096), (64, 96), (2048, 512), (1100, 300)],
)
def test_linear_gives_a_row_the_same_bits_among_any_number_of_rows(inner: int, outer: int, num_threads: int) -> None:
    weight_OI, bias_O, x_TI = torch.randn(outer, inner), torch.randn(outer), torch.randn(1024, inner)
    with threads(num_threads):
        expected_TO = ops.linear(x_TI, weight_OI)
        expected_with_bias_TO = ops.linear(x_TI, weight_OI, bias_O)

        for num_rows in (1, 2, 5, 15, 16, 17, 33, 64, 257):
            rows = slice(7, 7 + num_rows)
            assert torch.equal(ops.linear(x_TI[rows], weight_OI), expected_TO[rows]), num_rows
            assert torch.equal(ops.linear(x_TI[rows], weight_OI, bias_O), expected_with_bias_TO[rows]), num_rows


@pytest.mark.parametrize("num_rows", [1, 40])
@pytest.mark.parametrize("inner", [64, 512, 513, 1500])
def test_linear_is_the_product_plus_the_bias(inner: int, num_rows: int) -> None:
    weight_OI, bias_O, x_TI = torch.randn(96, inner), torch.randn(96), torch.randn(num_rows, inner)

    exact_TO = x_TI.double() @ weight_OI.double().t()

    torch.testing.assert_close(ops.linear(x_TI, weight_OI).double(), exact_TO, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(ops.linear(x_TI, weight_OI, bias_O).double(), exact_TO + bias_O, rtol=1e-5, atol=1e-4)


def test_linear_of_no_rows_is_empty() -> None:
    assert ops.linear(torch.empty(0, 600), torch.randn(8, 600)).shape == (0, 8)


def test_linear_in_bfloat16_keeps_the_dtype() -> None:
    x_TI, weight_OI = torch.randn(3, 700).bfloat16(), torch.randn(8, 700).bfloat16()

    assert torch.equal(ops.linear(x_TI, weight_OI), F.linear(x_TI, weight_OI))


@pytest.mark.parametrize("width", [5, 64, 333])
def test_row_wise_operations_give_a_row_the_same_bits_in_any_batch(width: int) -> None:
    x_TD, up_TD = torch.randn(50, width), torch.randn(50, width)
    weight_D, bias_D = torch.randn(width), torch.randn(width)

    def results(rows: slice) -> list[Tensor]:
        return [
            ops.layer_norm(x_TD[rows], weight_D, bias_D, 1e-5),
            ops.rms_norm(x_TD[rows], weight_D, 1e-6),
            ops.gelu(x_TD[rows]),
            ops.silu_mul(x_TD[rows], up_TD[rows]),
        ]

    expected = results(slice(0, 50))
    for rows in (slice(0, 1), slice(3, 4), slice(49, 50), slice(2, 9)):
        for found, whole_TD in zip(results(rows), expected, strict=True):
            assert torch.equal(found, whole_TD[rows])


def test_layer_norm_uses_the_biased_variance() -> None:
    x_TD, weight_D, bias_D = torch.randn(3, 8), torch.randn(8), torch.randn(8)
    centred = x_TD - x_TD.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight_D + bias_D

    torch.testing.assert_close(ops.layer_norm(x_TD, weight_D, bias_D, 1e-5), expected)


def test_rms_norm_rounds_to_the_activations_dtype_before_it_scales() -> None:
    x_TD, weight_D = torch.randn(3, 64).bfloat16(), torch.randn(64).bfloat16()
    x = x_TD.float()
    expected = (x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()).bfloat16() * weight_D

    assert torch.equal(ops.rms_norm(x_TD, weight_D, 1e-6), expected)


def test_gelu_is_the_exact_form() -> None:
    x = torch.linspace(-4, 4, 101, dtype=torch.float64)

    torch.testing.assert_close(ops.gelu(x), x / 2 * (1 + torch.erf(x / math.sqrt(2))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_silu_mul_is_the_gates_silu_times_up(dtype: torch.dtype) -> None:
    gate, up = torch.linspace(-100, 100, 301).to(dtype), torch.randn(301).to(dtype)

    torch.testing.assert_close(ops.silu_mul(gate, up), F.silu(gate) * up)


def test_rotate_turns_pairs_half_a_head_apart() -> None:
    x_TNE, angles_TE2 = torch.randn(3, 2, 8), torch.randn(3, 4)
    cos_TE, sin_TE = angles_TE2.cos().repeat(1, 2), angles_TE2.sin().repeat(1, 2)

    turned_TNE = ops.rotate(x_TNE, cos_TE, sin_TE)

    expected = torch.complex(x_TNE[..., :4], x_TNE[..., 4:]) * torch.polar(torch.ones(3, 4), angles_TE2)[:, None]
    torch.testing.assert_close(turned_TNE, torch.cat((expected.real, expected.imag), dim=-1))


def test_write_kv_stores_each_token_in_its_slot_and_nothing_else() -> None:
    cache = LayerCache(torch.zeros(3, 4, 2, 5), torch.zeros(3, 4, 2, 5))
    k_TKE, v_TKE = torch.randn(2, 2, 5), torch.randn(2, 2, 5)

    ops.write_kv(k_TKE, v_TKE, cache, torch.tensor([9, 4]))

    assert torch.equal(cache.k_BSKE[2, 1], k_TKE[0])
    assert torch.equal(cache.v_BSKE[1, 0], v_TKE[1])
    assert cache.k_BSKE.count_nonzero() == cache.v_BSKE.count_nonzero() == 20


def test_copy_blocks_copies_keys_and_values() -> None:
    cache = LayerCache(torch.randn(5, 4, 2, 5), torch.randn(5, 4, 2, 5))
    before = LayerCache(cache.k_BSKE.clone(), cache.v_BSKE.clone())

    ops.copy_blocks(cache, torch.tensor([1, 1]), torch.tensor([3, 0]))

    for after, source in ((cache.k_BSKE, before.k_BSKE), (cache.v_BSKE, before.v_BSKE)):
        assert torch.equal(after, source[[1, 1, 2, 1, 4]])


def test_embed_takes_rows_of_the_table() -> None:
    table_VD = torch.randn(7, 3)

    assert torch.equal(ops.embed(torch.tensor([6, 0]), table_VD), table_VD[[6, 0]])
