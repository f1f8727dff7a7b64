"""A decoder that runs a step in one call of the C++ library."""

# T tokens in the step, R rows, D hidden, E head size, V vocabulary, S positions whose logits are wanted

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gyrfalcon.kernels.cpu.packing import PANEL_WIDTH, Array, PackedMatrix, pack
from gyrfalcon.kernels.cpu.structures import (
    CBatch,
    CCache,
    CDecoderSpec,
    CLayer,
    CMatrix,
    CNorm,
    CStep,
    Form,
    Storage,
    address,
)
from gyrfalcon.kernels.interface import (
    AttentionInputs,
    BlockParts,
    DecoderParts,
    DecoderShape,
    LayerCache,
    MatrixParts,
    NormParts,
)

_FORMS = {"sequential": Form.SEQUENTIAL, "parallel": Form.PARALLEL}


def can_run(shape: DecoderShape, block_size: int) -> bool:
    """Whether the kernels have a form for this decoder; the plain operations run any."""
    return block_size % PANEL_WIDTH == 0 and shape.head_size % 2 == 0 and shape.ffn_size % PANEL_WIDTH == 0


def cache_dtype(shape: DecoderShape) -> torch.dtype:
    """Of keys and values: bfloat16, or float32 where bfloat16 would lose digits that the weights have."""
    return torch.bfloat16 if shape.dtype == torch.bfloat16 else torch.float32


def packed_arrays(library: ctypes.CDLL, parts: DecoderParts) -> Iterator[tuple[str, Array]]:
    """Everything that `NativeDecoder` reads, by name, packed as it is asked for."""
    embedding_VD = parts.embedding_VD()
    head_VD = embedding_VD if parts.head_VD is None else parts.head_VD()
    head = pack(library, MatrixParts(head_VD, None))
    yield from _prefixed("head", head.named_arrays())
    if parts.head_VD is not None:
        yield "embedding", _bytes_of(embedding_VD)
    del embedding_VD, head_VD, head
    for index, block in enumerate(parts.blocks()):
        yield from _prefixed(f"layers.{index}", _block_arrays(library, block))
    yield from _prefixed("final_norm", _norm_arrays(parts.final_norm()))


def _block_arrays(library: ctypes.CDLL, block: BlockParts) -> Iterator[tuple[str, Array]]:
    yield "facts", np.array([_FORMS[block.form], block.is_gated], dtype=np.int32)
    yield from _prefixed("attention_norm", _norm_arrays(block.attention_norm))
    if block.mlp_norm is not None:
        yield from _prefixed("mlp_norm", _norm_arrays(block.mlp_norm))
    yield from _prefixed("qkv", pack(library, block.qkv).named_arrays())
    yield from _prefixed("output", pack(library, block.output).named_arrays())
    yield from _prefixed("up", pack(library, block.up, alternates=block.is_gated).named_arrays())
    yield from _prefixed("down", pack(library, block.down).named_arrays())


def _norm_arrays(norm: NormParts) -> Iterator[tuple[str, Array]]:
    yield "epsilon", np.array([norm.epsilon], dtype=np.float32)
    yield "weight", norm.weight_D.float().numpy()
    if norm.bias_D is not None:
        yield "bias", norm.bias_D.float().numpy()


def _prefixed(prefix: str, arrays: Iterator[tuple[str, Array]]) -> Iterator[tuple[str, Array]]:
    return ((f"{prefix}.{name}", array) for name, array in arrays)


def _bytes_of(tensor: Tensor) -> Array:
    """The tensor as numpy has it: 16-bit floats as plain 16-bit words."""
    tensor = tensor.contiguous()
    return tensor.numpy() if tensor.dtype == torch.float32 else tensor.view(torch.int16).numpy()


@dataclass(frozen=True, slots=True)
class _Arrays:
    """Some of the decoder's arrays by name."""

    arrays: Mapping[str, Array]
    prefix: str = ""

    def under(self, name: str) -> _Arrays:
        return _Arrays(self.arrays, f"{self.prefix}{name}.")

    def get(self, name: str) -> Array | None:
        return self.arrays.get(self.prefix + name)

    def norm(self) -> CNorm:
        """The norm of this prefix; without one, a norm without weights."""
        epsilon = self.get("epsilon")
        if epsilon is None:
            return CNorm()
        return CNorm(address(self.get("weight")), address(self.get("bias")), float(epsilon[0]))

    def matrix(self) -> CMatrix:
        own = {name[len(self.prefix) :]: a for name, a in self.arrays.items() if name.startswith(self.prefix)}
        return PackedMatrix.from_arrays(own).described()


class NativeDecoder:
    """`FusedDecoder` over packed arrays. Owned by one thread at a time."""

    def __init__(
        self, library: ctypes.CDLL, kernels: int, shape: DecoderShape, arrays: Mapping[str, Array], num_threads: int
    ) -> None:
        """kernels: the table's address. arrays: as `packed_arrays` names them; kept."""
        self.cache_dtype = cache_dtype(shape)
        self.weight_bytes = sum(array.nbytes for array in arrays.values())
        self._library = library
        self._shape = shape
        self._arrays = arrays
        frequencies = None if shape.frequencies_E2 is None else shape.frequencies_E2.float().numpy()
        slopes = None if shape.slopes_H is None else shape.slopes_H.float().numpy()
        self._kept = (frequencies, slopes)  # the library has their addresses
        spec = self._describe(frequencies, slopes)
        self._handle = library.gyrfalcon_decoder_new(ctypes.byref(spec), kernels, num_threads)
        if not self._handle:
            raise MemoryError("no memory for the kernels' threads")
        weakref.finalize(self, library.gyrfalcon_decoder_free, self._handle)
        self._caches: tuple[Sequence[LayerCache], ctypes.Array[CCache]] | None = None

    def forward(self, ids_T: Tensor, inputs: AttentionInputs, caches: Sequence[LayerCache]) -> Tensor:
        ids = np.ascontiguousarray(ids_T.numpy(), dtype=np.int32)
        step = self._described_step(ids, inputs, caches)
        hidden_TD = torch.empty((len(ids), self._shape.hidden_size), dtype=torch.float32)
        self._check(
            self._library.gyrfalcon_decoder_forward(self._handle, ctypes.byref(step), hidden_TD.data_ptr()), len(ids)
        )
        return hidden_TD

    def choose_next(
        self,
        ids: npt.NDArray[np.int32],
        inputs: AttentionInputs,
        caches: Sequence[LayerCache],
        tokens: npt.NDArray[np.int32],
        num_ahead: int = 0,
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        step = self._described_step(ids, inputs, caches)
        chosen = _Chosen(1 + num_ahead, len(tokens))
        self._check(
            self._library.gyrfalcon_decoder_choose_next(
                self._handle, ctypes.byref(step), address(tokens), len(tokens), num_ahead, *chosen.addresses
            ),
            len(ids),
        )
        return chosen.ids_and_logprobs()

    def logits(self, hidden_SD: Tensor) -> Tensor:
        hidden_SD = hidden_SD.contiguous()
        logits_SV = torch.empty((len(hidden_SD), self._shape.vocab_size), dtype=torch.float32)
        self._check(
            self._library.gyrfalcon_decoder_logits(
                self._handle, hidden_SD.data_ptr(), len(hidden_SD), logits_SV.data_ptr()
            ),
            len(hidden_SD),
        )
        return logits_SV

    def choose_greedy(self, logits_SV: Tensor) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        num_rows, width = logits_SV.shape
        chosen = _Chosen(num_rows)
        logits_SV = logits_SV.contiguous()
        self._library.gyrfalcon_decoder_choose_greedy(
            self._handle, logits_SV.data_ptr(), num_rows, width, *chosen.addresses
        )
        return chosen.ids_and_logprobs()

    def _check(self, failed: int, num_rows: int) -> None:
        if failed:
            raise MemoryError(f"no memory for the intermediate results of {num_rows} tokens")

    def _described_step(
        self, ids: npt.NDArray[np.int32], inputs: AttentionInputs, caches: Sequence[LayerCache]
    ) -> CStep:
        """Where the step's arrays lie, which the caller keeps alive."""
        batch = CBatch(
            len(inputs.context_lens),
            len(ids),
            inputs.block_tables.shape[1],
            address(inputs.query_starts),
            address(inputs.context_lens),
            address(inputs.block_tables),
            address(inputs.positions),
            address(inputs.token_rows),
        )
        return CStep(batch, address(ids), inputs.block_size, self._described_caches(caches))

    def _described_caches(self, caches: Sequence[LayerCache]) -> ctypes.Array[CCache]:
        """The caches' addresses; worked out once, as a runner has one set of caches."""
        if self._caches is None or self._caches[0] is not caches:
            described = (CCache * len(caches))(
                *(CCache(cache.k_BSKE.data_ptr(), cache.v_BSKE.data_ptr()) for cache in caches)
            )
            self._caches = (caches, described)
        return self._caches[1]

    def _describe(self, frequencies: Array | None, slopes: Array | None) -> CDecoderSpec:
        shape, arrays = self._shape, _Arrays(self._arrays)
        self._layers = (CLayer * shape.num_layers)(
            *(_described_layer(arrays.under(f"layers.{index}")) for index in range(shape.num_layers))
        )
        embedding = arrays.get("embedding")
        storage = Storage.FLOAT32
        if embedding is not None and embedding.itemsize == 2:
            storage = Storage.FLOAT16 if shape.dtype == torch.float16 else Storage.BFLOAT16
        return CDecoderSpec(
            num_layers=shape.num_layers,
            hidden_size=shape.hidden_size,
            ffn_size=shape.ffn_size,
            vocab_size=shape.vocab_size,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_size=shape.head_size,
            cache_is_bf16=self.cache_dtype == torch.bfloat16,
            layers=self._layers,
            final_norm=arrays.under("final_norm").norm(),
            head=arrays.under("head").matrix(),
            embedding=address(embedding),
            embedding_storage=storage,
            frequencies=address(frequencies),
            slopes=address(slopes),
        )


class _Chosen:
    """Where the library writes what it chooses."""

    def __init__(self, *shape: int) -> None:
        self._ids = np.empty(shape, dtype=np.int32)
        self._logprobs = np.empty(shape, dtype=np.float32)
        self._sound = np.empty(shape, dtype=np.bool_)
        self.addresses = (address(self._ids), address(self._logprobs), address(self._sound))

    def ids_and_logprobs(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """-1 for the id where there is none."""
        self._ids[~self._sound] = -1
        return self._ids, self._logprobs


def _described_layer(arrays: _Arrays) -> CLayer:
    facts = arrays.get("facts")
    assert facts is not None
    return CLayer(
        form=int(facts[0]),
        is_gated=int(facts[1]),
        attention_norm=arrays.under("attention_norm").norm(),
        mlp_norm=arrays.under("mlp_norm").norm(),
        qkv=arrays.under("qkv").matrix(),
        output=arrays.under("output").matrix(),
        up=arrays.under("up").matrix(),
        down=arrays.under("down").matrix(),
    )
