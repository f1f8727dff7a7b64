"""Where a checkpoint lies: a local folder, the folder of a preset, or a download from the Hugging Face Hub.

Cache, access tokens, offline mode and progress bars are those of huggingface_hub, with its own variables
(HF_HOME, HF_TOKEN, HF_HUB_OFFLINE, HF_HUB_DISABLE_PROGRESS_BARS, ...).
"""

from __future__ import annotations

import difflib
import errno
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from gyrfalcon.errors import ModelLoadError, SettingsError
from gyrfalcon.presets import BUNDLED, NAMES, PUBLISHED, bundled_folder

# Top-level files only: subfolders hold other formats of the same weights. No pickled weights (*.bin, *.pt), no code.
WEIGHT_FILES = "*.safetensors"
WANTED_FILES = (WEIGHT_FILES, "*.json", "*.jinja", "tokenizer.model", "merges.txt")
UNWANTED_FILES = ("*/*", "consolidated*.safetensors")

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_WEIGHT_FILE = re.compile(r"\.(safetensors|bin|gguf|pt|pth)$")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint's files and its name.

    name: what answers call the model: the preset, the Hub id, or the folder's name. revision: the commit of a
    downloaded checkpoint, None for a local one.
    """

    folder: Path
    name: str
    revision: str | None = None


def locate_checkpoint(
    model: str,
    *,
    revision: str | None = None,
    cache_dir: Path | None = None,
    offline: bool = False,
    with_weights: bool = True,
) -> Checkpoint:
    """The checkpoint that `model` names, downloaded first if it is a Hub id and not in the cache yet.

    model: a folder, a preset's name or a Hub id (owner/name), tried in this order. revision: branch, tag or commit;
    for a Hub id only. cache_dir: the Hub library's own if absent. offline: download nothing, the cache must hold it.
    with_weights: false where tokenizer and configuration will do, and nothing large shall be downloaded.

    Raises ModelLoadError with the remedy; SettingsError where a revision is given and nothing is downloaded.
    """
    folder = _local_folder(model)
    if folder is not None:
        if revision is not None:
            raise SettingsError("--revision", f"`{revision}` is for Hub checkpoints, and `{model}` is a local one")
        return Checkpoint(folder, folder.resolve().name)
    folder = _download(_hub_id(model), revision, cache_dir, offline=offline, with_weights=with_weights)
    return Checkpoint(folder, model, folder.name)


def describe_source(model: str) -> str:
    """In words, where `locate_checkpoint` would look; touches no network. Raises as that does."""
    folder = _local_folder(model)
    return f"the folder {folder}" if folder is not None else f"the Hub checkpoint {_hub_id(model)}"


def hub_source(model: str) -> str | None:
    """The Hub id that `model` stands for; None for a folder and the bundled checkpoint. Raises ModelLoadError."""
    return None if _local_folder(model) is not None else _hub_id(model)


def unfinished_files(folder: Path) -> list[str]:
    """Weight files that are missing, by the index beside them, or shorter than their own headers say."""
    index = folder / "model.safetensors.index.json"
    wanted = {path.name for path in folder.glob(WEIGHT_FILES)}
    try:
        wanted |= set(json.loads(index.read_bytes())["weight_map"].values()) if index.exists() else set()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [index.name]
    return sorted(name for name in wanted if not _is_whole(folder / name))


def _is_whole(path: Path) -> bool:
    """Whether a safetensors file is there and has the bytes of all the tensors that its header lists."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if size < 8 + header_bytes:
                return False
            header = json.loads(file.read(header_bytes))
        last = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        return size >= 8 + header_bytes + int(last)
    except OSError:
        return False
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return True  # there, and not what it should be: whoever reads it says what is wrong


def _local_folder(model: str) -> Path | None:
    path = Path(model).expanduser()
    # A folder that only happens to be called like a preset does not hide it.
    if path.is_dir() and (model not in NAMES or (path / "config.json").is_file()):
        return path
    if model == BUNDLED:
        return bundled_folder()
    if path.is_file():
        raise ModelLoadError(f"`{model}` is a file; a checkpoint is a folder with config.json and *.safetensors files")
    return None


def _hub_id(model: str) -> str:
    for preset in PUBLISHED:
        if preset.name == model and preset.source is not None:
            return preset.source
    if model.startswith(("/", ".", "~")) or model.count("/") > 1 or _WEIGHT_FILE.search(model):
        raise ModelLoadError(f"there is no folder `{model}`")
    if _HUB_ID.fullmatch(model) is None or ".." in model or "--" in model:
        near = difflib.get_close_matches(model, NAMES, n=1)
        hint = f"; did you mean `{near[0]}`?" if near else f"; presets: {', '.join(NAMES)}"
        raise ModelLoadError(f"`{model}` is neither a folder nor a preset nor a Hub id (owner/name){hint}")
    return model


def _download(source: str, revision: str | None, cache_dir: Path | None, *, offline: bool, with_weights: bool) -> Path:
    import huggingface_hub  # late: it takes a while to import, and local checkpoints do not need it

    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                source,
                revision=revision,
                cache_dir=cache_dir,
                local_files_only=offline,
                allow_patterns=[name for name in WANTED_FILES if with_weights or name != WEIGHT_FILES],
                ignore_patterns=list(UNWANTED_FILES),
                token=huggingface_hub.get_token() or os.environ.get("HF_API_TOKEN") or None,
            )
        )
    except Exception as error:  # whatever the Hub library raises, the operator reads one sentence
        raise ModelLoadError(f"`{source}` cannot be had from the Hub: {_explain(error, revision, offline)}") from error
    if with_weights and not any(folder.glob(WEIGHT_FILES)):
        raise ModelLoadError(
            f"`{source}` holds no safetensors weights at revision {folder.name}; pickled weights are not loaded: "
            "choose a --revision that has safetensors, or convert the checkpoint"
        )
    return folder


def _explain(error: Exception, revision: str | None, offline: bool) -> str:
    """What went wrong and what to do, without the library's own long text where the case is known."""
    from huggingface_hub import errors

    match error:
        case errors.GatedRepoError():
            return "access is restricted; accept its terms on its page and set HF_TOKEN to a token of that account"
        case errors.RepositoryNotFoundError():
            return "no such repository, or it is private; check the name, and set HF_TOKEN if it is private"
        case errors.RevisionNotFoundError():
            return f"it has no revision `{revision or 'main'}`; check --revision"
        case errors.LocalEntryNotFoundError() if offline:
            return (
                "nothing may be downloaded (--offline, or `gyrfalcon kaito` without --allow_remote_files) "
                "and the cache does not hold it"
            )
        case errors.LocalEntryNotFoundError() | errors.OfflineModeIsEnabled():
            how = "offline mode is on (HF_HUB_OFFLINE)" if huggingface_is_offline() else "the Hub cannot be reached"
            return f"{how} and the cache does not hold all of it; connect once to download it, or give a local folder"
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return "no space is left on the disk; free some, or choose another place with --huggingface-hub-cache"
        case OSError(errno=errno.EACCES | errno.EPERM | errno.EROFS):
            return f"`{error.filename}` cannot be written; choose another place with --huggingface-hub-cache"
    first_line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first_line}"


def huggingface_is_offline() -> bool:
    """Whether the Hub library is told to use its cache alone."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def default_cache() -> Path:
    """The folder in which the Hub library keeps downloads."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)
