"""The operations on a CPU: whole decoders by the C++ kernels, everything else in plain PyTorch."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Mapping

from gyrfalcon.kernels.cpu.decoder import NativeDecoder, can_run, packed_arrays
from gyrfalcon.kernels.cpu.library import Kind
from gyrfalcon.kernels.cpu.packed_file import checkpoint_fingerprint, choose_path, open_packed, write_packed
from gyrfalcon.kernels.cpu.packing import LAYOUT_VERSION, Array
from gyrfalcon.kernels.cpu.threads import choose_num_threads
from gyrfalcon.kernels.interface import DecoderParts, FusedDecoder, PackedPlace
from gyrfalcon.kernels.reference import ReferenceOps

logger = logging.getLogger(__name__)


class CpuOps(ReferenceOps):
    """`Ops` with a decoder in C++, and the plain operations where it has no form for one."""

    def __init__(self, library: ctypes.CDLL, kind: Kind, *, block_size: int, num_threads: int | None) -> None:
        """block_size: positions in a block of the caches. num_threads: None for what fits the weights."""
        self._library = library
        self._kernels = library.gyrfalcon_kernels(kind.encode())
        self._kind = kind
        self._block_size = block_size
        self._num_threads = num_threads

    def fuse(self, parts: DecoderParts, place: PackedPlace | None) -> FusedDecoder | None:
        if not can_run(parts.shape, self._block_size):
            logger.info("plain PyTorch serves: the kernels have no form for this decoder or block size")
            return None
        arrays = self._kept_arrays(parts, place) or dict(packed_arrays(self._library, parts))
        num_threads = choose_num_threads(self._num_threads, sum(array.nbytes for array in arrays.values()))
        logger.info("cpu kernels", extra={"kind": self._kind, "threads": num_threads})
        return NativeDecoder(self._library, self._kernels, parts.shape, arrays, num_threads)

    def _kept_arrays(self, parts: DecoderParts, place: PackedPlace | None) -> Mapping[str, Array] | None:
        """The packed weights from their file, which is made first where there is none; None where it cannot be."""
        if place is None:
            return None
        path = choose_path(place.checkpoint, "-".join(place.facts.values()), place.directory)
        if path is None:
            return None
        try:
            checkpoint = checkpoint_fingerprint(place.checkpoint)
        except OSError:
            return None  # whoever reads the checkpoint itself will say what is wrong with it
        facts = {**place.facts, "checkpoint": checkpoint, "layout": str(LAYOUT_VERSION)}
        kept = open_packed(path, facts)
        if kept is None and write_packed(path, facts, packed_arrays(self._library, parts)):
            kept = open_packed(path, facts)
        return kept
