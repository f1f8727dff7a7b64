"""The kernels' matrix products: each storage on each kind of processor against plain arithmetic."""

# T rows, O outputs, I inputs

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gyrfalcon.kernels.cpu.structures import Storage
from gyrfalcon.kernels.quantised import QuantisedMatrix, product, quantise_int4, quantise_int8
from tests.kernels.native import (
    Array,
    Finish,
    Form,
    Guarded,
    Weights,
    code_weights,
    every_kind,
    from_bf16,
    guarded,
    is_poison,
    multiply,
    needs_kernels,
    plain_weights,
    prepare,
    random,
    rounded_to_bf16,
    splits,
    table,
    to_bf16,
)

pytestmark = needs_kernels
__all__ = ["random"]

FORMATS = ["float32", "float16", "bfloat16", "int8", "int4 of 32", "int4 of 64", "int4 of 128"]
every_format = pytest.mark.parametrize("name", FORMATS)

# Rows, outputs, inputs: one of each, none a multiple of anything, Falcon-7B's widths, and enough rows for every way;
# the last two are cut in their inner width, and have more panels and rows than are computed together.
SHAPES = [
    (1, 1, 1),
    (1, 17, 33),
    (2, 16, 64),
    (3, 71, 130),
    (5, 48, 4544),
    (8, 4544, 33),
    (17, 100, 257),
    (40, 33, 512),
    (49, 555, 2300),
    (513, 40, 4544),
]


class Case:
    """A matrix in one format with its exact product."""

    def __init__(
        self,
        name: str,
        random: np.random.Generator,
        num_outputs: int,
        width: int,
        *,
        has_bias: bool = True,
        has_zeros: bool = False,
        has_order: bool = False,
    ) -> None:
        self.name = name
        values_OI = (random.standard_normal((num_outputs, width)) / np.sqrt(width)).astype(np.float32)
        self.bias_O = random.standard_normal(num_outputs).astype(np.float32) if has_bias else None
        self.matrix: QuantisedMatrix | None = None
        if name.startswith("int"):
            self.matrix = _quantise(name, values_OI, random, has_zeros=has_zeros, has_order=has_order)
            self.values_OI = self.matrix.dequantise(torch.float32).numpy()
            self.weights: Weights = code_weights(self.matrix, self.bias_O)
            return
        storage = Storage[name.upper()]
        stored = {"float32": values_OI, "float16": values_OI.astype(np.float16), "bfloat16": to_bf16(values_OI)}[name]
        self.values_OI = from_bf16(stored) if name == "bfloat16" else stored.astype(np.float32)
        self.weights = plain_weights(stored, storage, self.bias_O)

    def exact(self, x_TI: Array, form: Form) -> tuple[Array, Array]:
        """The product in double precision, and how far off a sum of float32 may be."""
        if form is Form.BFLOAT16:
            x_TI = rounded_to_bf16(x_TI)
        size_TO = np.abs(x_TI).astype(np.float64) @ np.abs(self.values_OI).astype(np.float64).T
        if self.matrix is None:
            out_TO = x_TI.astype(np.float64) @ self.values_OI.astype(np.float64).T
        else:  # codes of activations are part of what is promised, so their rounding is no error
            out_TO = product(torch.from_numpy(x_TI), self.matrix).double().numpy()
        if form is Form.OFFSET_INT8:
            size_TO = np.abs(out_TO)  # the sums are exact; a few roundings of what is made of them remain
        if self.bias_O is not None:
            out_TO = out_TO + self.bias_O
        return out_TO, 1e-6 + 2e-6 * size_TO

    def columns(self, random: np.random.Generator, num_rows: int) -> Array:
        """Rows of activations of very different sizes."""
        sizes_T1 = np.exp(random.uniform(-4, 4, (num_rows, 1)))
        return (random.standard_normal((num_rows, self.weights.width)) * sizes_T1).astype(np.float32)


def _quantise(
    name: str, values_OI: Array, random: np.random.Generator, *, has_zeros: bool, has_order: bool
) -> QuantisedMatrix:
    width = values_OI.shape[1]
    if name == "int8":
        made = quantise_int8(torch.from_numpy(values_OI))
    else:
        made = quantise_int4(torch.from_numpy(values_OI), int(name.removeprefix("int4 of ")))
    zeros_OG = None
    if has_zeros and made.bits == 4:
        zeros_OG = torch.from_numpy(random.integers(0, 16, tuple(made.scales.shape), dtype=np.uint8))
    order_I = torch.from_numpy(random.permutation(width).astype(np.int32)) if has_order else None
    return QuantisedMatrix(made.bits, made.codes_OI, made.scales, zeros_OG, made.group, order_I)


@every_kind
@every_format
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_product(kind: str, name: str, shape: tuple[int, int, int], random: np.random.Generator) -> None:
    num_rows, num_outputs, width = shape
    kernels, case = table(kind), Case(name, random, num_outputs, width)
    x_TI = case.columns(random, num_rows)
    x = prepare(kernels, case.weights, x_TI)

    out_TO = multiply(kernels, case.weights, x, range(num_rows)).array[:, :num_outputs]

    expected_TO, allowed_TO = case.exact(x_TI, x.form)
    assert (np.abs(out_TO - expected_TO) <= allowed_TO).all(), np.abs(out_TO - expected_TO).max()


@every_kind
@pytest.mark.parametrize("name", FORMATS[3:])
@pytest.mark.parametrize("num_rows", [1, 3, 33])
def test_zeros_and_the_order_of_inputs_count(kind: str, name: str, num_rows: int, random: np.random.Generator) -> None:
    kernels, case = table(kind), Case(name, random, 50, 333, has_bias=False, has_zeros=True, has_order=True)
    x_TI = case.columns(random, num_rows)
    x = prepare(kernels, case.weights, x_TI)

    out_TO = multiply(kernels, case.weights, x, range(num_rows)).array[:, :50]

    expected_TO, allowed_TO = case.exact(x_TI, x.form)
    assert (np.abs(out_TO - expected_TO) <= allowed_TO).all(), np.abs(out_TO - expected_TO).max()


@every_kind
@every_format
def test_a_row_has_the_same_bits_alone_and_among_others(kind: str, name: str, random: np.random.Generator) -> None:
    kernels, case = table(kind), Case(name, random, 67, 391)
    x = prepare(kernels, case.weights, case.columns(random, 513))
    whole_TO = multiply(kernels, case.weights, x, range(513)).array[:, :67]

    for num_rows in (1, 1, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 128, 200, 512):
        first = int(random.integers(0, 513 - num_rows + 1))
        rows = range(first, first + num_rows)
        part_TO = multiply(kernels, case.weights, x, rows).array[:, :67]
        assert np.array_equal(part_TO.view(np.uint32), whole_TO[first : rows.stop].view(np.uint32)), (first, num_rows)


@every_kind
@every_format
@pytest.mark.parametrize("finish", [Finish.STORE, Finish.GATED_SILU])
def test_any_share_of_the_panels_on_any_thread_gives_the_same_bits(
    kind: str, name: str, finish: Finish, random: np.random.Generator
) -> None:
    unit = 2 if finish is Finish.GATED_SILU else 1
    num_outputs = 14 * 16 if unit == 2 else 14 * 16 - 5
    kernels, case = table(kind), Case(name, random, num_outputs, 200)
    for num_rows in (1, 6, 37):
        x = prepare(kernels, case.weights, case.columns(random, num_rows))
        whole = multiply(kernels, case.weights, x, range(num_rows), finish=finish)
        shared = Guarded(whole.array.shape, np.float32)

        def run(panels: range, x=x, rows=range(num_rows), into=shared) -> None:  # type: ignore[no-untyped-def]
            multiply(table(kind), case.weights, x, rows, panels=panels, finish=finish, into=into)

        with ThreadPoolExecutor(3) as pool:
            list(pool.map(run, splits(random, 14, 5, unit)))

        assert np.array_equal(shared.array.view(np.uint32), whole.array.view(np.uint32))


@every_kind
@every_format
@pytest.mark.parametrize("num_rows", [1, 9, 34])
def test_a_range_of_panels_touches_its_own_columns_alone(
    kind: str, name: str, num_rows: int, random: np.random.Generator
) -> None:
    kernels, case = table(kind), Case(name, random, 90, 65)
    x = prepare(kernels, case.weights, case.columns(random, num_rows))

    out = multiply(kernels, case.weights, x, range(num_rows), panels=range(1, 4)).array

    assert is_poison(out[:, :16])
    assert is_poison(out[:, 64:])
    assert not is_poison(out[:, 16:64])
    nothing = multiply(kernels, case.weights, x, range(num_rows), panels=range(2, 2)).array
    assert is_poison(nothing)


@every_kind
@every_format
@pytest.mark.parametrize("num_rows", [1, 5, 40])
def test_the_finishes_are_what_their_names_say(
    kind: str, name: str, num_rows: int, random: np.random.Generator
) -> None:
    kernels, case = table(kind), Case(name, random, 96, 150)
    x = prepare(kernels, case.weights, case.columns(random, num_rows))
    rows = range(num_rows)
    plain_TO = multiply(kernels, case.weights, x, rows).array[:, :96].copy()
    exact_TO = torch.from_numpy(plain_TO).double()

    before = random.standard_normal((num_rows, 99)).astype(np.float32)
    before.view(np.uint8).reshape(num_rows, -1)[:, 96 * 4 :] = 0xFF
    added = multiply(kernels, case.weights, x, rows, finish=Finish.ADD, into=guarded(before)).array[:, :96]
    np.testing.assert_array_equal(added, before[:, :96] + plain_TO)

    gelu_TO = multiply(kernels, case.weights, x, rows, finish=Finish.GELU).array[:, :96]
    assert (np.abs(gelu_TO - F.gelu(exact_TO).numpy()) <= 1e-6 * np.maximum(1, np.abs(plain_TO))).all()

    panels_T = exact_TO.view(num_rows, 3, 2, 16)
    expected_TO = (F.silu(panels_T[:, :, 0]) * panels_T[:, :, 1]).reshape(num_rows, 48).numpy()
    gated_TO = multiply(kernels, case.weights, x, rows, finish=Finish.GATED_SILU).array[:, :48]
    np.testing.assert_allclose(gated_TO, expected_TO, rtol=2e-6, atol=1e-30)

    for finish in (Finish.STORE, Finish.GELU, Finish.GATED_SILU):
        wide = multiply(kernels, case.weights, x, rows, finish=finish).array[:, :-3]
        halved = multiply(kernels, case.weights, x, rows, finish=finish, is_bf16=True).array[:, :-3]
        assert np.array_equal(halved, to_bf16(wide))


@every_kind
@every_format
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
def test_what_is_not_finite_stays_in_its_row(kind: str, name: str, bad: float, random: np.random.Generator) -> None:
    kernels, case = table(kind), Case(name, random, 40, 100)
    x_TI = case.columns(random, 36)
    sound_TO = multiply(kernels, case.weights, prepare(kernels, case.weights, x_TI), range(36)).array[:, :40]
    x_TI[7, 99] = bad
    x = prepare(kernels, case.weights, x_TI)

    for rows in (range(36), range(7, 8), range(6, 9), range(5, 25)):
        out_TO = multiply(kernels, case.weights, x, rows).array[:, :40]
        assert not np.isfinite(out_TO[7 - rows.start]).any()
        others = [row for row in rows if row != 7]
        assert np.array_equal(out_TO[[row - rows.start for row in others]], sound_TO[others])


@every_kind
@every_format
def test_a_row_of_zeros_gives_the_bias(kind: str, name: str, random: np.random.Generator) -> None:
    kernels, case = table(kind), Case(name, random, 40, 100)
    for num_rows in (1, 20):
        x = prepare(kernels, case.weights, np.zeros((num_rows, 100), dtype=np.float32))
        out_TO = multiply(kernels, case.weights, x, range(num_rows)).array[:, :40]
        assert case.bias_O is not None
        np.testing.assert_array_equal(out_TO, np.tile(case.bias_O, (num_rows, 1)))


@every_kind
@pytest.mark.parametrize(("bits", "group"), [(8, 0), (4, 32), (4, 128)])
def test_the_largest_codes_do_not_overflow(kind: str, bits: int, group: int) -> None:
    width = 4544
    codes_OI = torch.full((32, width), -128, dtype=torch.int8) if bits == 8 else torch.full((32, width), 15).byte()
    if bits == 8:
        codes_OI[::2] = 127
        matrix = QuantisedMatrix(8, codes_OI, torch.ones(32))
    else:
        codes_OI[::2] = 0
        matrix = QuantisedMatrix(4, codes_OI, torch.ones(32, -(-width // group), dtype=torch.float16), group=group)
    kernels, weights = table(kind), code_weights(matrix, None)
    x_TI = np.full((18, width), 127, dtype=np.float32) * np.where(np.arange(18) % 2, 1, -1)[:, None].astype(np.float32)
    x = prepare(kernels, weights, x_TI)

    for rows in (range(18), range(1), range(1, 3)):
        out_TO = multiply(kernels, weights, x, rows).array[:, :32]
        expected_TO = product(torch.from_numpy(x_TI[rows.start : rows.stop]), matrix).numpy()
        np.testing.assert_array_equal(out_TO, expected_TO)


@every_kind
@every_format
def test_random_shapes(kind: str, name: str, random: np.random.Generator) -> None:
    kernels = table(kind)
    for _ in range(12):
        num_rows, num_outputs, width = (int(n) for n in np.exp(random.uniform(0, np.log([130, 300, 1200]))))
        case = Case(name, random, num_outputs, width, has_bias=bool(random.integers(2)))
        x_TI = case.columns(random, num_rows)
        x = prepare(kernels, case.weights, x_TI)
        out_TO = multiply(kernels, case.weights, x, range(num_rows)).array[:, :num_outputs]
        expected_TO, allowed_TO = case.exact(x_TI, x.form)
        assert (np.abs(out_TO - expected_TO) <= allowed_TO).all(), (num_rows, num_outputs, width)
