"""The operations in plain PyTorch: what every faster table is measured against, and what runs where there is none.

Letters as in the interface; besides: P key positions in a partition, N rows computed together, Q query tokens of
each of them, G query heads on one kv head, M = Q * G rows of a matrix product.

On CPU in float32 a token's numbers depend on nothing but its own row: not on the other rows of the step, nor on how
its prompt was cut into chunks. Three rules give that: a product has at least `MIN_PRODUCT_ROWS` rows and at most
`MAX_INNER_WIDTH` terms a sum, sums over key positions are made partition by partition in one order, whoever asks, and
no element-wise routine is used that treats the end of a tensor differently.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gyrfalcon.kernels.interface import AttentionInputs, DecoderParts, FusedDecoder, LayerCache, PackedPlace
from gyrfalcon.kernels.quantised import QuantisedMatrix, product

# With fewer rows the CPU library picks other routines for a float32 product (a matrix times one vector, say), and over
# a longer inner dimension it may share one sum between threads; both add in an order that depends on the number of
# rows. Within these two bounds every row had the same bits for any number of rows, with 1 to 8 threads, in all widths
# tried; tests/kernels/test_reference.py holds some of them to that.
MIN_PRODUCT_ROWS = 16
MAX_INNER_WIDTH = 512

# Key positions summed together. The cut is at absolute positions, so that a token meets the same partitions whether
# its keys were written by one chunk or by ten. 256 keeps one tile's scores in the second-level cache.
PARTITION = 256

# Scores (float32) computed at once by a prefill tile, and keys gathered at once for decode rows: 2 MiB and 16 MiB.
_TILE_SCORES = 1 << 19
_GATHERED_ELEMENTS = 1 << 22


_Rows = np.ndarray[tuple[int], np.dtype[np.intp]]


@dataclass(frozen=True, slots=True)
class _RunningSoftmax:
    """Softmax-weighted sums over the partitions seen so far, merged in ascending order of position."""

    maximum_NKM1: Tensor
    total_NKM1: Tensor
    weighted_NKME: Tensor

    @classmethod
    def start(cls, q_NKQGE: Tensor) -> _RunningSoftmax:
        """Sums whose values do not matter: the first partition replaces them."""
        num_rows, num_kv_heads, num_queries, group, head_size = q_NKQGE.shape
        shape = (num_rows, num_kv_heads, num_queries * group)
        return cls(
            maximum_NKM1=q_NKQGE.new_empty((*shape, 1)),
            total_NKM1=q_NKQGE.new_empty((*shape, 1)),
            weighted_NKME=q_NKQGE.new_empty((*shape, head_size)),
        )

    def part(self, rows: slice, products: slice) -> _RunningSoftmax:
        """A view of some rows and of some of their product rows; updates write through."""
        return _RunningSoftmax(
            self.maximum_NKM1[rows, :, products],
            self.total_NKM1[rows, :, products],
            self.weighted_NKME[rows, :, products],
        )

    def add(
        self,
        q_NKQGE: Tensor,
        k_NKPE: Tensor,
        v_NKPE: Tensor,
        hidden_NQP: Tensor | None,
        bias_KGP: Tensor | None,
        *,
        is_first: bool,
    ) -> None:
        """Add one partition. Where `hidden_NQP` is true a key has no weight at all, whatever the cache holds there.

        is_first: positions from 0 on, of which every query sees at least one.

        A query to which the whole partition is hidden keeps its sums bit for bit: its maximum stays, so they are
        multiplied by exp(0) = 1 and added to 0.
        """
        num_rows, num_kv_heads, num_queries, group, head_size = q_NKQGE.shape
        width = k_NKPE.shape[2]
        batch = num_rows * num_kv_heads
        scores = torch.bmm(
            q_NKQGE.reshape(batch, num_queries * group, head_size),
            k_NKPE.reshape(batch, width, head_size).transpose(1, 2),
        )
        scores_NKQGP = scores.view(num_rows, num_kv_heads, num_queries, group, width)
        if bias_KGP is not None:
            scores_NKQGP += bias_KGP[:, None]
        if hidden_NQP is not None:
            scores_NKQGP.masked_fill_(hidden_NQP[:, None, :, None], float("-inf"))
        scores_NKMP = scores.view(num_rows, num_kv_heads, num_queries * group, width)
        maximum_NKM1 = scores_NKMP.amax(dim=-1, keepdim=True)
        if not is_first:
            torch.maximum(self.maximum_NKM1, maximum_NKM1, out=maximum_NKM1)
        weights_NKMP = scores_NKMP.sub_(maximum_NKM1).exp_()
        added = torch.bmm(weights_NKMP.view(batch, -1, width), v_NKPE.reshape(batch, width, head_size))
        added_NKME = added.view(num_rows, num_kv_heads, -1, head_size)
        total_NKM1 = weights_NKMP.sum(dim=-1, keepdim=True)
        if is_first:
            self.maximum_NKM1.copy_(maximum_NKM1)
            self.total_NKM1.copy_(total_NKM1)
            self.weighted_NKME.copy_(added_NKME)
            return
        decay_NKM1 = (self.maximum_NKM1 - maximum_NKM1).exp_()
        self.maximum_NKM1.copy_(maximum_NKM1)
        self.total_NKM1.mul_(decay_NKM1).add_(total_NKM1)
        self.weighted_NKME.mul_(decay_NKM1).add_(added_NKME)

    def result(self) -> Tensor:
        """The weighted means: [N, K, M, E], float32."""
        return self.weighted_NKME / self.total_NKM1


class ReferenceOps:
    """`Ops` for any device PyTorch knows. Keeps no state."""

    def fuse(self, parts: DecoderParts, place: PackedPlace | None) -> FusedDecoder | None:
        return None

    def embed(self, ids_T: Tensor, table_VD: Tensor) -> Tensor:
        return F.embedding(ids_T, table_VD)

    def linear(self, x_TI: Tensor, weight_OI: Tensor | QuantisedMatrix, bias_O: Tensor | None = None) -> Tensor:
        if isinstance(weight_OI, QuantisedMatrix):
            out_TO = product(x_TI, weight_OI)
            return (out_TO if bias_O is None else out_TO + bias_O.float()).to(x_TI.dtype)
        num_rows, width = x_TI.shape
        # Only float32 on CPU promises equal bits in any batch; in 16 bits one row must not cost sixteen.
        if x_TI.dtype != torch.float32 or x_TI.device.type != "cpu":
            if num_rows == 1 and bias_O is None and x_TI.device.type == "cpu":
                # Reads the weights 1.2 to 1.5 times as fast as the library's product of one row.
                return torch.mv(weight_OI, x_TI[0])[None]
            return F.linear(x_TI, weight_OI, bias_O)
        if num_rows < MIN_PRODUCT_ROWS:
            x_TI = F.pad(x_TI, (0, 0, 0, MIN_PRODUCT_ROWS - num_rows))
        out_TO = F.linear(x_TI[:, :MAX_INNER_WIDTH], weight_OI[:, :MAX_INNER_WIDTH], bias_O)
        for start in range(MAX_INNER_WIDTH, width, MAX_INNER_WIDTH):
            part = slice(start, start + MAX_INNER_WIDTH)
            out_TO.addmm_(x_TI[:, part], weight_OI[:, part].t())
        return out_TO[:num_rows]

    def layer_norm(self, x_TD: Tensor, weight_D: Tensor, bias_D: Tensor, epsilon: float) -> Tensor:
        return F.layer_norm(x_TD, weight_D.shape, weight_D, bias_D, epsilon)

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
        x = x_TD.float()
        normed = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + epsilon)
        return weight_D * normed.to(x_TD.dtype)

    def gelu(self, x: Tensor) -> Tensor:
        return F.gelu(x)

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        # Written out because the library's own silu gives the last few elements of a tensor other bits than the
        # rest, so that a row's result would depend on the rows after it.
        x = gate.float()
        return (x / (-x).exp_().add_(1.0)).to(gate.dtype) * up

    def rotate(self, x_TNE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
        first, second = x_TNE.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
        return x_TNE * cos_TE[:, None] + turned * sin_TE[:, None]

    def write_kv(self, k_TKE: Tensor, v_TKE: Tensor, cache: LayerCache, slot_mapping_T: Tensor) -> None:
        slots = (-1, *k_TKE.shape[1:])
        cache.k_BSKE.view(slots).index_copy_(0, slot_mapping_T, k_TKE)
        cache.v_BSKE.view(slots).index_copy_(0, slot_mapping_T, v_TKE)

    def copy_blocks(self, cache: LayerCache, sources_C: Tensor, destinations_C: Tensor) -> None:
        for blocks in (cache.k_BSKE, cache.v_BSKE):
            blocks.index_copy_(0, destinations_C, blocks.index_select(0, sources_C))

    def attend(
        self, q_THE: Tensor, cache: LayerCache, inputs: AttentionInputs, scale: float, alibi_slopes_H: Tensor | None
    ) -> Tensor:
        num_tokens, num_heads, head_size = q_THE.shape
        num_kv_heads = cache.k_BSKE.shape[2]
        q_TKGE = (q_THE.float() * scale).view(num_tokens, num_kv_heads, num_heads // num_kv_heads, head_size)
        bias = None if alibi_slopes_H is None else _AlibiBias(alibi_slopes_H, scale, num_kv_heads)
        query_lens = np.diff(inputs.query_starts)
        out_TKGE = torch.empty_like(q_TKGE)
        if (decoding := np.flatnonzero(query_lens == 1)).size:
            if "reference decodes" not in inputs.derived:
                inputs.derived["reference decodes"] = _plan_decodes(inputs, cache, decoding)
            _attend_decodes(q_TKGE, out_TKGE, cache, inputs.derived["reference decodes"], bias)
        if (prefilling := np.flatnonzero(query_lens > 1)).size:
            tables_RW = _cut_into_partitions(inputs.device_tables, cache)
            for row in prefilling:
                _attend_prefill(q_TKGE, out_TKGE, cache, inputs, int(row), tables_RW, bias)
        return out_TKGE.view(num_tokens, num_heads, head_size).to(q_THE.dtype)


class _AlibiBias:
    """The scaled bias of a partition's key positions for every query head."""

    def __init__(self, slopes_H: Tensor, scale: float, num_kv_heads: int) -> None:
        self._slopes_KG = slopes_H.to(torch.bfloat16).view(num_kv_heads, -1)
        self._scale = scale

    def at(self, positions_P: Tensor) -> Tensor:
        """[K, G, P], float32. Both roundings to bfloat16 are the checkpoints': they were trained with them."""
        return (self._slopes_KG[:, :, None] * positions_P.to(torch.bfloat16)).float() * self._scale


@dataclass(frozen=True, slots=True)
class _DecodePart:
    """Some decode rows and one partition of their keys."""

    begin: int  # first position of the partition
    rows: slice  # among the decode rows, longest first
    blocks: Tensor  # their blocks in the partition, row by row
    positions_P: Tensor
    hidden_NP: Tensor | None  # positions past a row's own; None where there is none


@dataclass(frozen=True, slots=True)
class _DecodePlan:
    """The rows with one query token, and what they read: the same in every layer of a step."""

    tokens_N: Tensor  # their places among the step's tokens, longest row first
    parts: tuple[_DecodePart, ...]  # in ascending order of position


def _plan_decodes(inputs: AttentionInputs, cache: LayerCache, rows: _Rows) -> _DecodePlan:
    # Longest first: the rows that reach a partition are then the first ones, those that end inside it the last ones.
    rows = rows[np.argsort(-inputs.context_lens[rows], kind="stable")]
    own_positions = inputs.context_lens[rows]
    device = inputs.device_tables.device
    tables_NW = _cut_into_partitions(inputs.device_tables, cache)[torch.from_numpy(rows.astype(np.int64)).to(device)]
    own_positions_N = torch.from_numpy(own_positions.astype(np.int64)).to(device)
    width = _partition_width(cache)
    rows_at_once = max(1, _GATHERED_ELEMENTS // (width * cache.k_BSKE.shape[2] * cache.k_BSKE.shape[3]))
    parts = []
    for begin in range(0, int(own_positions[0]) + 1, width):
        num_reaching = int(np.count_nonzero(own_positions >= begin))
        num_whole = int(np.count_nonzero(own_positions >= begin + width - 1))
        positions_P = torch.arange(begin, begin + width, device=device)
        for first in range(0, num_reaching, rows_at_once):
            some = slice(first, min(first + rows_at_once, num_reaching))
            hidden_NP = positions_P > own_positions_N[some, None] if some.stop > num_whole else None
            blocks = _blocks_of(cache, tables_NW[some], begin, width)
            parts.append(_DecodePart(begin, some, blocks, positions_P, hidden_NP))
    tokens_N = torch.from_numpy(inputs.query_starts[rows].astype(np.int64)).to(device)
    return _DecodePlan(tokens_N, tuple(parts))


def _attend_decodes(
    q_TKGE: Tensor, out_TKGE: Tensor, cache: LayerCache, plan: _DecodePlan, bias: _AlibiBias | None
) -> None:
    """Rows with one query token: all of them together, one product per partition (and per gatherful of keys)."""
    _, num_kv_heads, group, head_size = q_TKGE.shape
    num_rows, num_queries = len(plan.tokens_N), _queries_for_a_product(group)
    q_NKQGE = q_TKGE.index_select(0, plan.tokens_N)[:, :, None]
    if num_queries > 1:
        padded_NKQGE = q_TKGE.new_zeros((num_rows, num_kv_heads, num_queries, group, head_size))
        padded_NKQGE[:, :, :1] = q_NKQGE
        q_NKQGE = padded_NKQGE
    sums = _RunningSoftmax.start(q_NKQGE)
    for part in plan.parts:
        k_NKPE, v_NKPE = _gather(cache, part.blocks, _partition_width(cache))
        hidden_NQP = None
        if part.hidden_NP is not None:
            v_NKPE.masked_fill_(part.hidden_NP[:, None, :, None], 0.0)
            hidden_NQP = part.hidden_NP[:, None]
        bias_KGP = None if bias is None else bias.at(part.positions_P)
        some = sums.part(part.rows, slice(None))
        some.add(q_NKQGE[part.rows], k_NKPE, v_NKPE, hidden_NQP, bias_KGP, is_first=part.begin == 0)
    out_TKGE.index_copy_(0, plan.tokens_N, sums.result()[:, :, :group])


def _attend_prefill(
    q_TKGE: Tensor,
    out_TKGE: Tensor,
    cache: LayerCache,
    inputs: AttentionInputs,
    row: int,
    tables_RW: Tensor,
    bias: _AlibiBias | None,
) -> None:
    """One row with several query tokens, in tiles of tokens; partitions in a tile's future are left out."""
    start, stop = int(inputs.query_starts[row]), int(inputs.query_starts[row + 1])
    context_len, num_tokens = int(inputs.context_lens[row]), stop - start
    _, num_kv_heads, group, head_size = q_TKGE.shape
    fewest = _queries_for_a_product(group)
    num_queries = max(num_tokens, fewest)
    q_NKQGE = q_TKGE.new_zeros((1, num_kv_heads, num_queries, group, head_size))
    q_NKQGE[0, :, :num_tokens] = q_TKGE[start:stop].transpose(0, 1)
    positions_Q = torch.arange(context_len, context_len + num_queries, device=q_TKGE.device)
    sums = _RunningSoftmax.start(q_NKQGE)
    width = _partition_width(cache)
    tile = max(2 * fewest, _TILE_SCORES // (width * num_kv_heads * group))
    for begin in range(0, context_len + num_tokens, width):
        k_NKPE, v_NKPE = _gather(cache, _blocks_of(cache, tables_RW[row : row + 1], begin, width), width)
        v_NKPE[:, :, max(0, context_len + num_tokens - begin) :] = 0.0
        positions_P = torch.arange(begin, begin + width, device=q_TKGE.device)
        bias_KGP = None if bias is None else bias.at(positions_P)
        first_reaching = min(max(0, begin - context_len), num_queries - fewest)
        for a, b in _even_tiles(first_reaching, num_queries, tile):
            hidden_NQP = None
            if context_len + a < begin + width - 1:
                hidden_NQP = (positions_P > positions_Q[a:b, None])[None]
            products = slice(a * group, b * group)
            tiled = sums.part(slice(None), products)
            tiled.add(q_NKQGE[:, :, a:b], k_NKPE, v_NKPE, hidden_NQP, bias_KGP, is_first=begin == 0)
    result_KQGE = sums.result().view(num_kv_heads, num_queries, group, head_size)
    out_TKGE[start:stop] = result_KQGE[:, :num_tokens].transpose(0, 1)


def _queries_for_a_product(group: int) -> int:
    """Fewest query tokens whose heads make a product of `MIN_PRODUCT_ROWS` rows."""
    return -(-MIN_PRODUCT_ROWS // group)


def _partition_width(cache: LayerCache) -> int:
    """Positions in a partition: whole blocks, about `PARTITION`."""
    block_size = cache.k_BSKE.shape[1]
    return max(1, PARTITION // block_size) * block_size


def _cut_into_partitions(tables_RW: Tensor, cache: LayerCache) -> Tensor:
    """The block tables widened to whole partitions; the added entries point at block 0 and are always hidden."""
    blocks_in_partition = _partition_width(cache) // cache.k_BSKE.shape[1]
    return F.pad(tables_RW, (0, -tables_RW.shape[1] % blocks_in_partition))


def _blocks_of(cache: LayerCache, tables_NW: Tensor, begin: int, width: int) -> Tensor:
    """The rows' blocks that hold the positions begin .. begin + width - 1, row by row."""
    block_size = cache.k_BSKE.shape[1]
    return tables_NW[:, begin // block_size : (begin + width) // block_size].flatten()


def _gather(cache: LayerCache, blocks: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Keys and values of some rows' blocks in one partition: fresh float32 tensors [N, K, P, E]."""
    shape = (-1, width, *cache.k_BSKE.shape[2:])

    def take(blocks_BSKE: Tensor) -> Tensor:
        taken_NKPE = blocks_BSKE.index_select(0, blocks).view(shape).transpose(1, 2)
        return taken_NKPE.to(torch.float32, memory_format=torch.contiguous_format)

    return take(cache.k_BSKE), take(cache.v_BSKE)


def _even_tiles(begin: int, end: int, tile: int) -> list[tuple[int, int]]:
    """begin .. end cut into tiles of nearly equal size, at most `tile`; of several, none is below half of that."""
    num_tiles = -(-(end - begin) // tile)
    edges = [begin + (end - begin) * i // num_tiles for i in range(num_tiles + 1)]
    return list(pairwise(edges))
