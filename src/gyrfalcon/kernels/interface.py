"""Door 3: the operations a model is written in, one table a device.

Letters: T tokens in the step (all rows, packed), R rows, D hidden, I and O a matrix's input and output width,
V vocabulary, H query heads, K kv heads, E head size, B cache blocks, S slots in a block, W blocks in a table.
Every operation returns its result in its input's dtype unless it says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gyrfalcon.kernels.quantised import QuantisedMatrix

Derived = TypeVar("Derived")


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's paged keys and values; keys are stored after rotation."""

    k_BSKE: Tensor
    v_BSKE: Tensor


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """Which tokens belong to which row, where their keys go, and what they may see.

    Row r's query tokens are the packed tokens query_starts[r] : query_starts[r + 1]; they take the positions
    context_lens[r], context_lens[r] + 1, ... and see every position up to their own. Host arrays serve loops over
    rows and the kernels in C++; tensors on the device are made of them where someone asks.
    """

    query_starts: npt.NDArray[np.int32]  # [R + 1]
    context_lens: npt.NDArray[np.int32]  # [R]; tokens in the cache before this step
    block_tables: npt.NDArray[np.int32]  # [R, W]; block of positions w*S .. w*S + S-1
    block_size: int
    device: torch.device
    derived: dict[str, Any] = field(default_factory=dict, compare=False)  # see `once`

    @property
    def token_rows(self) -> npt.NDArray[np.int32]:
        """The row of each token of the step."""
        return self.once("token rows", self._find_token_rows)

    @property
    def positions(self) -> npt.NDArray[np.int32]:
        """The position of each token of the step."""
        return self.once("positions", self._find_positions)

    @property
    def device_tables(self) -> Tensor:
        """The block tables, int64, on the device."""
        return self.once("tables", lambda: torch.from_numpy(self.block_tables).to(self.device, torch.int64))

    @property
    def slot_mapping(self) -> Tensor:
        """The flat slot (block * S + offset) of each token of the step, int64, on the device."""
        return self.once("slots", self._find_slots)

    def once(self, name: str, find: Callable[[], Derived]) -> Derived:
        """What `find` gives, worked out where it is first asked for and kept for the other layers."""
        if name not in self.derived:
            self.derived[name] = find()
        return cast(Derived, self.derived[name])

    def one_further(self) -> AttentionInputs:
        """Those of the next step, where each row has one token in both."""
        return AttentionInputs(
            self.query_starts, self.context_lens + np.int32(1), self.block_tables, self.block_size, self.device
        )

    @property
    def _is_one_token_a_row(self) -> bool:
        return bool(self.query_starts[-1] == len(self.context_lens))  # no row is without a token

    def _find_token_rows(self) -> npt.NDArray[np.int32]:
        rows_R = np.arange(len(self.context_lens), dtype=np.int32)
        return rows_R if self._is_one_token_a_row else np.repeat(rows_R, np.diff(self.query_starts))

    def _find_positions(self) -> npt.NDArray[np.int32]:
        if self._is_one_token_a_row:
            return self.context_lens
        offsets_T = np.arange(self.query_starts[-1], dtype=np.int32) - self.query_starts[self.token_rows]
        return offsets_T + self.context_lens[self.token_rows]

    def _find_slots(self) -> Tensor:
        blocks_T = self.block_tables[self.token_rows, self.positions // self.block_size].astype(np.int64)
        return torch.from_numpy(blocks_T * self.block_size + self.positions % self.block_size).to(self.device)


@dataclass(frozen=True, slots=True)
class NormParts:
    """A layer norm, or without a bias an RMS norm."""

    weight_D: Tensor
    bias_D: Tensor | None
    epsilon: float


@dataclass(frozen=True, slots=True)
class MatrixParts:
    """x W^T + b. The weight has several matrices' rows where they read the same input."""

    weight_OI: Tensor | QuantisedMatrix
    bias_O: Tensor | None


@dataclass(frozen=True, slots=True)
class BlockParts:
    """One layer of a decoder, whole.

    sequential: attention on the stream, then the MLP on the sum. parallel: both on the stream, their results added.
    """

    form: Literal["sequential", "parallel"]
    attention_norm: NormParts
    mlp_norm: NormParts | None  # None: the MLP reads what the attention reads
    qkv: MatrixParts  # rows [Q | K | V], heads in order
    output: MatrixParts
    up: MatrixParts  # is_gated: the gate's rows, then those of up
    down: MatrixParts
    is_gated: bool  # down(silu(gate(x)) * up(x)); otherwise down(gelu(up(x)))


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """What a decoder's blocks have in common."""

    num_layers: int
    hidden_size: int
    ffn_size: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype  # of weights that are not quantised
    frequencies_E2: Tensor | None  # radians a position turns, float32; None for ALiBi
    slopes_H: Tensor | None  # ALiBi slopes, float32


@dataclass(frozen=True, slots=True)
class DecoderParts:
    """A decoder, read piece by piece: no more of it than one layer need ever be in memory at once."""

    shape: DecoderShape
    embedding_VD: Callable[[], Tensor]
    blocks: Callable[[], Iterator[BlockParts]]
    final_norm: Callable[[], NormParts]
    head_VD: Callable[[], Tensor | QuantisedMatrix] | None  # None: the embedding, as it is


@dataclass(frozen=True, slots=True)
class PackedPlace:
    """Where a decoder's weights may be kept in the form that a device reads, and what they are made from."""

    checkpoint: Path  # its folder
    facts: dict[str, str]  # what else decides them: the dtype, the quantisation
    directory: Path | None  # None: beside the checkpoint, or in the user's cache


class FusedDecoder(Protocol):
    """A whole decoder that a device runs by itself; its results are those of the operations, one by one."""

    @property
    def cache_dtype(self) -> torch.dtype:
        """Of the caches that `forward` reads and writes, in an order of its own within a block."""
        ...

    @property
    def weight_bytes(self) -> int: ...

    def forward(self, ids_T: Tensor, inputs: AttentionInputs, caches: Sequence[LayerCache]) -> Tensor:
        """Hidden states after the final norm, [T, D] float32; keys and values are stored on the way.

        ids_T: int32 or int64.
        """
        ...

    def choose_next(
        self,
        ids: npt.NDArray[np.int32],
        inputs: AttentionInputs,
        caches: Sequence[LayerCache],
        tokens: npt.NDArray[np.int32],
        num_ahead: int = 0,
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """`forward` of all ids, then `choose_greedy` by the `logits` of the step's `tokens`, at once: [1 + ahead, S].

        num_ahead: further steps, each of which runs the tokens chosen before it. Then every row has one token, `tokens`
        are all of them in order, and the block tables have room for those to come. After a -1 a row's results say
        nothing.
        """
        ...

    def logits(self, hidden_SD: Tensor) -> Tensor:
        """Scores of every vocabulary entry: [S, V], float32."""
        ...

    def choose_greedy(self, logits_SV: Tensor) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """The largest score's id, the first of equals, and its log-probability.

        -1 where there is none: a score is NaN or infinite, or all are minus infinity.
        """
        ...


class Ops(Protocol):
    """What a device can do. Implementations keep no state besides scratch memory."""

    def fuse(self, parts: DecoderParts, place: PackedPlace | None) -> FusedDecoder | None:
        """The decoder as one piece, if the device has something faster than its operations one by one.

        place: where its weights may be kept for the next start; None: nowhere.
        """
        ...

    def embed(self, ids_T: Tensor, table_VD: Tensor) -> Tensor:
        """Rows of the table: [T, D]."""
        ...

    def linear(self, x_TI: Tensor, weight_OI: Tensor | QuantisedMatrix, bias_O: Tensor | None = None) -> Tensor:
        """x W^T + b: [T, O]. With codes for weights the arithmetic is that of `quantised.product`."""
        ...

    def layer_norm(self, x_TD: Tensor, weight_D: Tensor, bias_D: Tensor, epsilon: float) -> Tensor:
        """(x - mean) / sqrt(biased variance + epsilon) * weight + bias, statistics in float32."""
        ...

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
        """weight * (x / sqrt(mean(x^2) + epsilon) in float32, cast back to x's dtype)."""
        ...

    def gelu(self, x: Tensor) -> Tensor:
        """x/2 (1 + erf(x / sqrt 2)), the exact form."""
        ...

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up."""
        ...

    def rotate(self, x_TNE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
        """Rotary embedding in the half-split convention: x cos + (-x2, x1) sin; cos and sin in x's dtype."""
        ...

    def write_kv(self, k_TKE: Tensor, v_TKE: Tensor, cache: LayerCache, slot_mapping_T: Tensor) -> None:
        """Store each token's key and value in its slot."""
        ...

    def copy_blocks(self, cache: LayerCache, sources_C: Tensor, destinations_C: Tensor) -> None:
        """Copy whole blocks of one layer; no block is both a source and a destination."""
        ...

    def attend(
        self, q_THE: Tensor, cache: LayerCache, inputs: AttentionInputs, scale: float, alibi_slopes_H: Tensor | None
    ) -> Tensor:
        """Causal softmax(scale * (q k + bias)) v over each row's own positions: [T, H, E].

        Query head h reads kv head h // (H / K). Scores, softmax and sums are in float32. With slopes, the bias of
        key position j is bf16(bf16(slope) * bf16(j)), as the RW checkpoints were trained.
        """
        ...
