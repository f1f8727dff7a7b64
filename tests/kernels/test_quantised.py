"""Codes of 8 and 4 bits: how well they stand for a matrix, and what a product with them is, to the bit."""

# T tokens, O outputs, I inputs

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gyrfalcon.kernels.quantised import (
    GROUP_SIZES,
    CodeFormat,
    QuantisedMatrix,
    num_groups,
    product,
    quantise_int4,
    quantise_int8,
)
from gyrfalcon.kernels.reference import ReferenceOps

FORMATS = [CodeFormat(8), *(CodeFormat(4, group) for group in GROUP_SIZES)]
ops = ReferenceOps()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def random_codes(outputs: int, width: int, group: int, *, has_zeros: bool, is_ordered: bool) -> QuantisedMatrix:
    """4-bit codes as a checkpoint may hold them, not as we make them."""
    groups = num_groups(width, group)
    return QuantisedMatrix(
        bits=4,
        codes_OI=torch.randint(0, 16, (outputs, width), dtype=torch.uint8),
        scales=(torch.randn(outputs, groups) * 0.01).half(),
        zeros_OG=torch.randint(0, 17, (outputs, groups), dtype=torch.uint8) if has_zeros else None,
        group=group,
        order_I=torch.randperm(width).to(torch.int32) if is_ordered else None,
    )


def codes_of(values: Tensor) -> tuple[list[int], np.float32]:
    """8-bit codes of some activations, and their scale."""
    scale = np.float32(np.abs(values.numpy()).max()) / np.float32(127)
    return [int(np.rint(value / scale)) if scale else 0 for value in values.numpy()], scale


def slow_product(x_TI: Tensor, weight: QuantisedMatrix) -> Tensor:
    """The definition, element by element, in Python's integers and numpy's float32."""
    order = range(weight.shape[1]) if weight.order_I is None else weight.order_I.tolist()
    rows = []
    for x_I in x_TI:
        ordered = x_I[list(order)]
        row = []
        for output in range(weight.shape[0]):
            codes = weight.codes_OI[output].tolist()
            if weight.bits == 8:
                x_codes, x_scale = codes_of(ordered)
                total = sum(a * b for a, b in zip(x_codes, codes, strict=True))
                row.append(np.float32(total) * (x_scale * weight.scales[output].numpy()))
                continue
            sums = np.float32(0)
            for index, start in enumerate(range(0, len(codes), weight.group)):
                x_codes, x_scale = codes_of(ordered[start : start + weight.group])
                zero = 8 if weight.zeros_OG is None else int(weight.zeros_OG[output, index])
                total = sum(a * (b - zero) for a, b in zip(x_codes, codes[start : start + weight.group], strict=True))
                sums += np.float32(total) * (x_scale * np.float32(weight.scales[output, index].item()))
            row.append(sums)
        rows.append(row)
    return torch.from_numpy(np.array(rows, dtype=np.float32))


@pytest.mark.parametrize("form", FORMATS)
def test_a_code_is_the_nearest_to_its_weight(form: CodeFormat) -> None:
    weight_OI = torch.randn(40, 300)
    made = form.quantise(weight_OI)

    errors = (made.dequantise(torch.float32) - weight_OI).abs()

    scales = made.scales.float().abs()
    steps = scales[:, None] if form.bits == 8 else scales.repeat_interleave(form.group, 1)[:, :300]
    if form.bits == 8:
        assert bool((errors <= steps / 2 * 1.0001).all())
        assert bool((made.codes_OI.abs().amax(dim=1) == 127).all())
    else:  # the largest of a group may be clipped by a step and a bit
        assert bool((errors <= steps * 1.6).all())
        assert float((errors <= steps / 2 * 1.01).float().mean()) > 0.95
        assert int(made.codes_OI.max()) <= 15


@pytest.mark.parametrize(("group", "limit"), [(32, 0.083), (64, 0.092), (128, 0.099)])
def test_4_bit_codes_of_normal_weights_have_a_known_error(group: int, limit: float) -> None:
    weight_OI = torch.randn(64, 1024)

    error = (quantise_int4(weight_OI, group).dequantise(torch.float32) - weight_OI).square().mean().sqrt()

    assert limit - 0.006 < float(error) < limit


def test_a_group_takes_no_worse_a_scale_than_its_largest_weight_suggests() -> None:
    weight_OI = torch.randn(64, 256) ** 3
    groups = weight_OI.view(64, 4, 64)
    extremes = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))
    plain = (groups / (extremes / -8)).round().clamp(-8, 7) * (extremes / -8)

    error = (quantise_int4(weight_OI, 64).dequantise(torch.float32) - weight_OI).square().sum()

    assert float(error) < float((plain - groups).square().sum())


@pytest.mark.parametrize("form", FORMATS)
def test_zeros_stay_zero(form: CodeFormat) -> None:
    weight_OI = torch.zeros(3, 200)
    weight_OI[1, 150] = -5.0

    made = form.quantise(weight_OI)

    assert torch.equal(made.dequantise(torch.float32)[0], weight_OI[0])
    assert made.dequantise(torch.float32)[1, 150] == pytest.approx(-5.0, rel=0.2)
    assert bool(made.scales.isfinite().all())


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_shows_in_the_scale(form: CodeFormat, value: float) -> None:
    weight_OI = torch.randn(3, 200)
    weight_OI[1, 77] = value

    is_finite = form.quantise(weight_OI).scales.isfinite().view(3, -1)

    assert is_finite.all(dim=1).tolist() == [True, False, True]


def test_a_scale_beyond_half_precision_is_not_finite() -> None:
    assert not bool(quantise_int4(torch.full((1, 64), 1e6), 64).scales.isfinite().all())


@pytest.mark.parametrize("form", FORMATS)
def test_rows_are_quantised_by_themselves(form: CodeFormat) -> None:
    weight_OI = torch.randn(700, 600)  # more than one chunk
    whole = form.quantise(weight_OI)
    rows = form.quantise(weight_OI[450:470])

    assert torch.equal(whole.codes_OI[450:470], rows.codes_OI)
    assert torch.equal(whole.scales[450:470], rows.scales)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("width", [1, 32, 100, 1100])
def test_a_product_is_the_definition_to_the_bit(form: CodeFormat, width: int) -> None:
    weight = form.quantise(torch.randn(5, width))
    x_TI = torch.randn(4, width) * torch.tensor([[1.0], [1e-6], [0.0], [300.0]])

    assert torch.equal(product(x_TI, weight), slow_product(x_TI, weight))


@settings(max_examples=25)
@given(
    outputs=st.integers(1, 6),
    width=st.integers(1, 300),
    tokens=st.integers(1, 4),
    group=st.sampled_from(GROUP_SIZES),
    has_zeros=st.booleans(),
    is_ordered=st.booleans(),
)
def test_zeros_orders_and_short_last_groups_are_honoured(
    outputs: int, width: int, tokens: int, group: int, has_zeros: bool, is_ordered: bool
) -> None:
    weight = random_codes(outputs, width, group, has_zeros=has_zeros, is_ordered=is_ordered)
    x_TI = torch.randn(tokens, width)

    out_TO = product(x_TI, weight)

    assert torch.equal(out_TO, slow_product(x_TI, weight))
    exact_TO = x_TI.double() @ weight.dequantise(torch.float64).t()
    bound = x_TI.abs().max() / 127 * weight.dequantise(torch.float32).abs().sum(dim=1)
    assert bool(((out_TO - exact_TO).abs() <= bound + 1e-5).all())


@pytest.mark.parametrize("bits", [8, 4])
def test_the_largest_codes_of_a_wide_matrix_are_summed_exactly(bits: int) -> None:
    width = 18176
    codes = torch.full((1, width), -128, dtype=torch.int8) if bits == 8 else torch.zeros((1, width), dtype=torch.uint8)
    scales = torch.ones(1) if bits == 8 else torch.ones((1, width // 128), dtype=torch.float16)
    zeros = None if bits == 8 else torch.full((1, width // 128), 16, dtype=torch.uint8)
    weight = QuantisedMatrix(bits, codes, scales, zeros, group=0 if bits == 8 else 128)

    out_TO = product(torch.full((1, width), 127.0), weight)

    assert out_TO.item() == -127 * (128 if bits == 8 else 16) * width


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_a_row_has_the_same_bits_in_any_batch(form: CodeFormat, num_threads: int) -> None:
    weight = form.quantise(torch.randn(301, 1100))
    x_TI = torch.randn(70, 1100)
    alone = torch.cat([product(row[None], weight) for row in x_TI])
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        assert torch.equal(product(x_TI, weight), alone)
        assert torch.equal(product(x_TI[13:29], weight), alone[13:29])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("form", FORMATS)
def test_an_activation_that_is_no_number_spoils_its_own_row_only(form: CodeFormat) -> None:
    weight = form.quantise(torch.randn(7, 128))
    x_TI = torch.randn(3, 128)
    clean = product(x_TI, weight)
    x_TI[1, 5] = float("nan")

    out_TO = product(x_TI, weight)

    assert bool(out_TO[1].isnan().all())
    assert torch.equal(out_TO[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_plain_operations_add_the_bias_before_rounding_once(dtype: torch.dtype) -> None:
    weight = quantise_int8(torch.randn(6, 64))
    x_TI, bias_O = torch.randn(2, 64).to(dtype), torch.randn(6).to(dtype)

    out_TO = ops.linear(x_TI, weight, bias_O)

    assert torch.equal(out_TO, (product(x_TI.float(), weight) + bias_O.float()).to(dtype))
    assert torch.equal(ops.linear(x_TI, weight), product(x_TI.float(), weight).to(dtype))


def test_an_order_names_the_input_of_each_packed_position() -> None:
    weight = QuantisedMatrix(
        bits=4,
        codes_OI=torch.tensor([[9, 10, 11]], dtype=torch.uint8),
        scales=torch.ones((1, 1), dtype=torch.float16),
        group=32,
        order_I=torch.tensor([2, 0, 1], dtype=torch.int32),
    )

    assert weight.dequantise(torch.float32).tolist() == [[2.0, 3.0, 1.0]]


def test_its_memory_is_that_of_its_parts() -> None:
    assert quantise_int8(torch.randn(10, 64)).num_bytes == 10 * 64 + 10 * 4
    assert quantise_int4(torch.randn(10, 64), 32).num_bytes == 10 * 64 + 10 * 2 * 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 3}, "no codes of 3 bits in groups of 32"),
        ({"group": 16}, "no codes of 4 bits in groups of 16"),
        ({"scales": torch.ones((2, 1), dtype=torch.float16)}, "codes and scales of 4 bits are"),
        ({"scales": torch.ones((2, 2))}, "codes and scales of 4 bits are"),
        ({"codes_OI": torch.zeros((2, 64), dtype=torch.int8)}, "codes and scales of 4 bits are"),
        ({"zeros_OG": torch.zeros((2, 1), dtype=torch.uint8)}, "zeros are torch.uint8"),
        ({"order_I": torch.arange(64)}, "the order is torch.int64"),
        ({"bits": 8}, "8-bit codes have no groups"),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused(fields: dict[str, object], message: str) -> None:
    fitting = {
        "bits": 4,
        "codes_OI": torch.zeros((2, 64), dtype=torch.uint8),
        "scales": torch.ones((2, 2), dtype=torch.float16),
        "group": 32,
    }

    with pytest.raises(ValueError, match=message):
        QuantisedMatrix(**(fitting | fields))  # type: ignore[arg-type]
