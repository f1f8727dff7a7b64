"""Weights from safetensors files, straight into the tensors that serve.

The headers of all files are checked before any weight is read. Data is then read, not mapped, into its destination:
mapped pages would count as memory in use until the file is closed, and a file that shrinks under a mapping ends the
process with a signal where a read ends with an error. The format is defined at
https://github.com/huggingface/safetensors: 8 bytes of header length, a JSON header, the tensors' bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from gyrfalcon.errors import ModelLoadError
from gyrfalcon.kernels.quantised import CodeFormat, QuantisedMatrix
from gyrfalcon.models import stored_codes
from gyrfalcon.models.config_file import ConfigFile
from gyrfalcon.models.quantisation import StoredFormat
from gyrfalcon.models.spec import ModelSpec, checkpoint_tensors, embedding_name
from gyrfalcon.models.stored_codes import StoredCodes

_STORED_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Of the tensors that quantised checkpoints have besides.
_CODE_DTYPES = {"I64": torch.int64, "I32": torch.int32, "I8": torch.int8}
_KNOWN_DTYPES = _STORED_DTYPES | _CODE_DTYPES

_HEAD_FORMAT = CodeFormat(8)  # in every precision: its errors reach the logits without a layer in between

# Buffers that older exports saved beside the weights: constants that a model can compute.
_IGNORED_SUFFIXES = (".inv_freq", ".attention.bias", ".attn.bias", ".masked_bias", ".position_ids")

# Bytes read, and where needed converted, at a time: small beside any weight, large beside a read's overhead.
_CHUNK_BYTES = 8 << 20

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor's bytes are."""

    path: Path
    name: str
    dtype: str  # as the format spells it: "BF16"
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file
    num_bytes: int

    @property
    def row_bytes(self) -> int:
        return self.num_bytes // self.shape[0]


@dataclass(frozen=True, slots=True)
class RowRun:
    """`count` stored rows from `source` on become the rows from `destination` on."""

    source: int
    destination: int
    count: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors of a checkpoint by their canonical names; all that the spec asks for, in the right shapes.

    spare_head: the head that a tied model's files hold besides the embedding, and that must equal it. codes: how the
    matrices among `quantised` are stored, as the parts that `codes` names.
    """

    tensors: dict[str, StoredTensor]
    spare_head: StoredTensor | None
    codes: StoredFormat | None = None
    quantised: dict[str, tuple[int, int]] = field(default_factory=dict)  # [O, I] by name, without `.weight`


def open_checkpoint(folder: Path, spec: ModelSpec, codes: StoredFormat | None = None) -> Checkpoint:
    """Check every header in `folder` against each other and against `spec`, reading no weights.

    codes: how config.json says that matrices are stored; which of them are so is told by the tensors there are.

    Raises ModelLoadError naming the file, the tensor and what was expected.
    """
    source, stored = _read_headers(folder)
    expected = checkpoint_tensors(spec)
    matrices = _matrices(spec, expected)
    possible = list(expected)
    if codes is not None:
        possible += [f"{name}.{part}" for name, shape in matrices.items() for part in (*codes.parts(shape), "bias")]
    named = _canonical_names(stored, possible)
    dtypes = dict.fromkeys(expected, tuple(_STORED_DTYPES))
    quantised = {} if codes is None else {n: shape for n, shape in matrices.items() if f"{n}.{codes.marker}" in named}
    for name, shape in quantised.items():
        assert codes is not None
        del expected[f"{name}.weight"]
        for part, wanted in codes.parts(shape).items():
            if not wanted.is_optional or f"{name}.{part}" in named:
                expected[f"{name}.{part}"] = wanted.shape
                dtypes[f"{name}.{part}"] = wanted.dtypes
        # Some writers add biases of zeros to matrices that have none.
        if f"{name}.bias" in named:
            expected[f"{name}.bias"] = shape[:1]
            dtypes[f"{name}.bias"] = tuple(_STORED_DTYPES)
    spare_head = named.pop("lm_head.weight", None) if spec.tied_head else None
    if spare_head is not None and embedding_name(spec) not in named:
        # Savers that drop one of two equal tensors do not always keep the embedding.
        named[embedding_name(spec)], spare_head = spare_head, None
    extra = [name for name in named if name not in expected and not name.endswith(_IGNORED_SUFFIXES)]
    missing = [name for name in expected if name not in named]
    if missing:
        raise ModelLoadError(
            f"{source}: missing {_listed(missing)}; config.json asks for {_described(spec)}{_hint(extra)}"
        )
    if extra:
        raise ModelLoadError(f"{source}: holds {_listed(extra)}; config.json asks for {_described(spec)}, without them")
    for name, wanted_shape in expected.items():
        _check_usable(named[name], wanted_shape, dtypes[name])
    if spare_head is not None:
        _check_usable(spare_head, expected[embedding_name(spec)])
    if codes is not None and not quantised:
        raise ModelLoadError(
            f"{source}: config.json says that matrices are stored as {codes.method} codes, but none is: there is no "
            f"tensor `{next(iter(matrices))}.{codes.marker}`, nor another of that kind"
        )
    return Checkpoint({name: named[name] for name in expected}, spare_head, codes, quantised)


def _matrices(spec: ModelSpec, expected: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    """Shapes of the matrices that are multiplied with, by name without `.weight`; the embedding is not."""
    return {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in expected.items()
        if len(shape) == 2 and name != embedding_name(spec)
    }


class WeightReader:
    """Reads a checkpoint's tensors onto a device in one dtype, and reports how far it is."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        on_progress: Callable[[int, int], None] | None,
        quantised: CodeFormat | None = None,
    ) -> None:
        """quantised: what the matrices become; None: what they are stored as, or `dtype`."""
        self.dtype = dtype
        self.device = device
        self.bytes_loaded = 0  # of the tensors made, not of the files
        self.dequantised: list[str] = []  # matrices stored as codes that had to become `dtype`
        self._format = quantised
        self._checkpoint = checkpoint
        self._on_progress = on_progress
        self._bytes_read = 0
        self._bytes_to_read = sum(tensor.num_bytes for tensor in checkpoint.tensors.values())
        # One for all tensors: freed and taken anew, it would leave holes between the weights that nothing fits into.
        self._buffer = torch.empty(0, dtype=torch.uint8)

    @property
    def makes_codes(self) -> bool:
        """Whether matrices of numbers become matrices of codes."""
        return self._format is not None

    def holds(self, name: str) -> bool:
        return name in self._checkpoint.tensors

    def load(self, name: str, rows: list[RowRun] | None = None) -> Tensor:
        """A tensor, its rows in the order stored or in that of `rows`, which must cover each row once."""
        stored = self._checkpoint.tensors[name]
        destination = self._empty(stored.shape)
        for run in rows or [RowRun(0, 0, stored.shape[0])]:
            self._read(stored, run, destination)
        return destination

    def load_stacked(self, names: Sequence[str]) -> Tensor:
        """Several tensors of equal row shape as one, in the order of `names`."""
        runs = self._stacked_runs(names)
        destination = self._empty((sum(run.count for _, run in runs), *runs[0][0].shape[1:]))
        for stored, run in runs:
            self._read(stored, run, destination)
        return destination

    def load_matrix(self, names: Sequence[str], rows: list[RowRun] | None = None) -> Tensor | QuantisedMatrix:
        """The rows of several matrices, one after another, in the form they are served in.

        names: without `.weight`. rows: as in `load`; with one name only.
        """
        if any(name in self._checkpoint.quantised for name in names):
            return self._load_codes(names, rows)
        weights = [f"{name}.weight" for name in names]
        if self._format is not None:
            return self._quantise(weights, self._format, rows)
        return self.load_stacked(weights) if rows is None else self.load(weights[0], rows)

    def load_head(self, name: str) -> Tensor | QuantisedMatrix:
        """The matrix that makes the logits. name: of the head's tensor, or of the embedding's where it is tied."""
        if self._format is None:
            return self.load_matrix([name.removesuffix(".weight")])
        return self._quantise([name], _HEAD_FORMAT, None)

    def _stacked_runs(self, weights: Sequence[str]) -> list[tuple[StoredTensor, RowRun]]:
        runs: list[tuple[StoredTensor, RowRun]] = []
        start = 0
        for weight in weights:
            stored = self._checkpoint.tensors[weight]
            runs.append((stored, RowRun(0, start, stored.shape[0])))
            start += stored.shape[0]
        return runs

    def _quantise(self, weights: Sequence[str], form: CodeFormat, rows: list[RowRun] | None) -> QuantisedMatrix:
        """Codes of tensors that are read some rows at a time: nowhere do they lie whole in another form."""
        runs = self._stacked_runs(weights)
        if rows is not None:
            runs = [(runs[0][0], run) for run in rows]
        made = QuantisedMatrix.empty(sum(run.count for _, run in runs), runs[0][0].shape[1], form)
        for stored, run in runs:
            for start, chunk in self._chunks(stored, run):
                part = form.quantise(chunk)
                if not part.scales.isfinite().all():
                    raise ModelLoadError(
                        f"{stored.path}: `{stored.name}` holds a value that is not finite or too large for codes of "
                        f"{form.bits} bits; serve it without --quantize"
                    )
                made.codes_OI[start : start + chunk.shape[0]] = part.codes_OI
                made.scales[start : start + chunk.shape[0]] = part.scales
                self._advance(chunk.shape[0] * stored.row_bytes)
        self.bytes_loaded += made.num_bytes
        return made

    def _load_codes(self, names: Sequence[str], rows: list[RowRun] | None) -> Tensor | QuantisedMatrix:
        """Matrices of which one at least is stored as codes: as one matrix of codes where there is such a one."""
        parts = [self._read_codes(name) if name in self._checkpoint.quantised else None for name in names]
        if rows is not None and parts[0] is not None:
            parts = [parts[0].with_rows(_source_rows(rows))]
        known = [part for part in parts if part is not None]
        if self.device.type == "cpu" and len(known) == len(parts):
            matrix = stored_codes.stacked(known)
            if matrix is not None:
                self.bytes_loaded += matrix.num_bytes
                return matrix
        self.dequantised += [name for name, part in zip(names, parts, strict=True) if part is not None]
        shapes = [
            self._checkpoint.tensors[f"{name}.weight"].shape if part is None else part.shape
            for name, part in zip(names, parts, strict=True)
        ]
        destination = self._empty((sum(shape[0] for shape in shapes), shapes[0][1]))
        start = 0
        for name, part, shape in zip(names, parts, shapes, strict=True):
            if part is None:
                self._read(self._checkpoint.tensors[f"{name}.weight"], RowRun(0, start, shape[0]), destination)
            else:
                part.dequantise_into(destination[start : start + shape[0]])
            start += shape[0]
        return destination

    def _read_codes(self, name: str) -> StoredCodes:
        codes, tensors = self._checkpoint.codes, self._checkpoint.tensors
        assert codes is not None
        shape = self._checkpoint.quantised[name]
        present = [part for part in codes.parts(shape) if f"{name}.{part}" in tensors]
        try:
            return stored_codes.unpack(codes, shape, {part: self._raw(tensors[f"{name}.{part}"]) for part in present})
        except ValueError as error:
            raise ModelLoadError(f"{tensors[f'{name}.{codes.marker}'].path}: `{name}`: {error}") from None

    def _raw(self, stored: StoredTensor) -> Tensor:
        """A tensor as stored."""
        tensor = torch.empty(stored.shape, dtype=_KNOWN_DTYPES[stored.dtype])
        for num_bytes in _read_in_place(stored, RowRun(0, 0, stored.shape[0]), tensor):
            self._advance(num_bytes)
        return tensor

    def finish(self) -> None:
        """Report everything as read: the rest was not needed, as a device had the weights in a form of its own."""
        self._advance(max(0, self._bytes_to_read - self._bytes_read))

    def check_spare_head(self, embedding_VD: Tensor) -> None:
        """Raise ModelLoadError if the files hold a head besides the embedding of a tied model, and it differs."""
        spare = self._checkpoint.spare_head
        if spare is None:
            return
        for start, chunk in self._chunks(spare, RowRun(0, 0, spare.shape[0])):
            rows = embedding_VD[start : start + chunk.shape[0]]
            # Bytes, not numbers: a NaN in a row that no token uses is equal to its copy.
            if not torch.equal(chunk.to(self.device, self.dtype).view(torch.uint8), rows.view(torch.uint8)):
                raise ModelLoadError(
                    f"{spare.path}: `{spare.name}` differs from the embedding, which config.json says is also the head "
                    "(`tie_word_embeddings`); correct one of them"
                )

    def _empty(self, shape: tuple[int, ...]) -> Tensor:
        tensor = torch.empty(shape, dtype=self.dtype, device=self.device)
        self.bytes_loaded += tensor.numel() * tensor.element_size()
        return tensor

    def _read(self, stored: StoredTensor, run: RowRun, destination: Tensor) -> None:
        if self.device.type == "cpu" and _STORED_DTYPES[stored.dtype] == self.dtype:
            rows = destination[run.destination : run.destination + run.count]
            for num_bytes in _read_in_place(stored, run, rows):
                self._advance(num_bytes)
            return
        for start, chunk in self._chunks(stored, run):
            destination[start : start + chunk.shape[0]].copy_(chunk)  # converts on the way, without a copy between
            self._advance(chunk.shape[0] * stored.row_bytes)

    def _chunks(self, stored: StoredTensor, run: RowRun) -> Iterator[tuple[int, Tensor]]:
        """The rows of `run` as stored, some at a time, each with its destination row. All chunks share one memory."""
        rows_at_once = max(1, min(run.count, _CHUNK_BYTES // stored.row_bytes))
        if len(self._buffer) < rows_at_once * stored.row_bytes:
            self._buffer = torch.empty(max(_CHUNK_BYTES, stored.row_bytes), dtype=torch.uint8)
        for start in range(0, run.count, rows_at_once):
            count = min(rows_at_once, run.count - start)
            raw = self._buffer[: count * stored.row_bytes]
            _read_exactly(stored, stored.offset + (run.source + start) * stored.row_bytes, raw.numpy().data)
            yield run.destination + start, raw.view(_STORED_DTYPES[stored.dtype]).view(count, *stored.shape[1:])

    def _advance(self, num_bytes: int) -> None:
        self._bytes_read += num_bytes
        if self._on_progress is not None:
            # A tied head that gets codes is read a second time.
            self._on_progress(min(self._bytes_read, self._bytes_to_read), self._bytes_to_read)


def _source_rows(rows: list[RowRun]) -> Tensor:
    """For each row of the result the stored row it is."""
    sources = torch.empty(sum(run.count for run in rows), dtype=torch.int64)
    for run in rows:
        sources[run.destination : run.destination + run.count] = torch.arange(run.source, run.source + run.count)
    return sources


def _read_in_place(stored: StoredTensor, run: RowRun, rows: Tensor) -> Iterator[int]:
    """Fill `rows`, contiguous and of the stored dtype, from the file; yields the bytes read, chunk by chunk."""
    target = rows.view(-1).view(torch.uint8).numpy().data
    offset = stored.offset + run.source * stored.row_bytes
    for start in range(0, len(target), _CHUNK_BYTES):
        chunk = target[start : start + _CHUNK_BYTES]
        _read_exactly(stored, offset + start, chunk)
        yield len(chunk)


def _read_exactly(stored: StoredTensor, offset: int, target: memoryview) -> None:
    try:
        with stored.path.open("rb", buffering=0) as file:
            file.seek(offset)
            done = 0
            while done < len(target):
                count = file.readinto(target[done:])
                if not count:
                    raise ModelLoadError(
                        f"{stored.path}: ended at byte {offset + done} while `{stored.name}` was read; the file "
                        "changed after its header was checked"
                    )
                done += count
    except OSError as error:
        raise ModelLoadError(f"{stored.path}: cannot be read: {error.strerror}") from None


def _read_headers(folder: Path) -> tuple[Path, dict[str, StoredTensor]]:
    """All stored tensors of the folder, and the file that says which they are."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return single, read_header(single)
    if index.exists():
        return index, _read_sharded(index)
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
    if pickled:
        raise ModelLoadError(
            f"{folder}: has only pickled weights ({_listed(pickled)}), which can run code when they are opened and are "
            "refused; convert them where you trust them: load the folder with transformers' "
            "AutoModelForCausalLM.from_pretrained and write it with save_pretrained, which makes safetensors"
        )
    raise ModelLoadError(f"{folder}: has neither {single.name} nor {index.name}")


def _read_sharded(index: Path) -> dict[str, StoredTensor]:
    section = ConfigFile.read(index).section("weight_map")
    if section is None:
        raise ModelLoadError(f"{index}: `weight_map` is missing; expected an object of tensor names and shard files")
    shard_of = dict(section.strings())
    shards = sorted(set(shard_of.values()))
    for shard in shards:
        if Path(shard).name != shard:
            raise ModelLoadError(f"{index}: `{shard}` is not a plain file name; shards lie beside their index")
    absent = [shard for shard in shards if not (index.parent / shard).exists()]
    if absent:
        raise ModelLoadError(
            f"{index}: {len(absent)} of {len(shards)} shards are missing: {_listed(absent)}; the download is incomplete"
        )
    stored: dict[str, StoredTensor] = {}
    for shard in shards:
        for name, tensor in read_header(index.parent / shard).items():
            if name in stored:
                raise ModelLoadError(f"{tensor.path}: `{name}` is also in {stored[name].path.name}; expected it once")
            stored[name] = tensor
    for name, shard in shard_of.items():
        if name not in stored or stored[name].path.name != shard:
            raise ModelLoadError(f"{index.parent / shard}: `{name}` is not in it, though {index.name} says so")
    return stored


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file; its size and every offset checked, its data untouched.

    Raises ModelLoadError for a file that is truncated, too long, or not a safetensors file.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            start = file.read(8)
            if start == b"version ":
                raise ModelLoadError(f"{path}: is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`")
            header_bytes = int.from_bytes(start, "little")
            if len(start) < 8 or header_bytes > min(size - 8, _MAX_HEADER_BYTES):
                raise ModelLoadError(
                    f"{path}: is {size} bytes long, and its header alone would be {header_bytes}; it is truncated or "
                    "not a safetensors file"
                )
            text = file.read(header_bytes)
    except OSError as error:
        raise ModelLoadError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        header = json.loads(text)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        data_start = 8 + header_bytes
        tensors = {name: _parse_entry(path, name, entry, data_start) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ModelLoadError(f"{path}: its header of {header_bytes} bytes is corrupt") from None
    _check_coverage(path, tensors.values(), data_start, size)
    return tensors


def _parse_entry(path: Path, name: str, entry: dict[str, object], data_start: int) -> StoredTensor:
    """Raises ValueError, KeyError or TypeError for anything that is not a tensor's entry."""
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not isinstance(shape, list) or not isinstance(offsets, list):
        raise TypeError
    begin, end = offsets
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)) or end < begin:
        raise ValueError
    if dtype in _KNOWN_DTYPES and end - begin != math.prod(shape) * _KNOWN_DTYPES[dtype].itemsize:
        raise ModelLoadError(
            f"{path}: `{name}` takes {end - begin} bytes; its shape {shape} in {dtype} needs "
            f"{math.prod(shape) * _KNOWN_DTYPES[dtype].itemsize}"
        )
    return StoredTensor(path, name, dtype, tuple(shape), data_start + begin, end - begin)


def _check_coverage(path: Path, tensors: Iterable[StoredTensor], data_start: int, size: int) -> None:
    """The tensors' bytes must fill the file from the header to its end, without gap or overlap."""
    position = data_start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.num_bytes)):
        if tensor.offset != position:
            relation = "overlaps the tensor before it" if tensor.offset < position else "leaves a gap before it"
            raise ModelLoadError(
                f"{path}: `{tensor.name}` starts at byte {tensor.offset}, expected {position}: it {relation}"
            )
        position += tensor.num_bytes
    if size != position:
        state = "is truncated or its download did not finish" if size < position else "has bytes after its tensors"
        raise ModelLoadError(f"{path}: is {size} bytes long, expected {position}: it {state}")


def _check_usable(
    stored: StoredTensor, shape: tuple[int, ...], dtypes: tuple[str, ...] = tuple(_STORED_DTYPES)
) -> None:
    if stored.shape != shape:
        raise ModelLoadError(
            f"{stored.path}: `{stored.name}` has shape {list(stored.shape)}, expected {list(shape)} from config.json"
        )
    if stored.dtype not in dtypes:
        raise ModelLoadError(
            f"{stored.path}: `{stored.name}` is stored as {stored.dtype}, expected {', '.join(dtypes)}"
        )


def _canonical_names(stored: dict[str, StoredTensor], expected: Iterable[str]) -> dict[str, StoredTensor]:
    """Stored tensors under the names of `expected`: some exports leave out the leading `transformer.` or `model.`."""
    own_names = set(expected)
    canonical = {name.partition(".")[2]: name for name in own_names if not name.startswith("lm_head.")}
    named: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        chosen = name if name in own_names else canonical.get(name, name)
        if chosen in named:
            raise ModelLoadError(f"{tensor.path}: `{tensor.name}` is also stored as `{named[chosen].name}`")
        named[chosen] = tensor
    return named


def _described(spec: ModelSpec) -> str:
    head = "tied" if spec.tied_head else "its own"
    return (
        f"a {spec.family} model of {spec.num_layers} layers ({spec.block_form.replace('_', ' ')} blocks, "
        f"{spec.num_heads} heads on {spec.num_kv_heads} kv heads, head {head})"
    )


def _hint(extra: list[str]) -> str:
    return f", and the files hold {_listed(extra)} instead" if extra else ""


def _listed(names: list[str], limit: int = 3) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
