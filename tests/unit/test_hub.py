"""Finding checkpoints: folders, presets, the Hub's cache, and the messages where there is none."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from gyrfalcon.errors import ModelLoadError, SettingsError
from gyrfalcon.hub import UNWANTED_FILES, WANTED_FILES, describe_source, locate_checkpoint
from gyrfalcon.presets import bundled_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_checkpoint(folder: Path, weights: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / weights).write_bytes(b"")
    return folder


def write_cache(cache: Path, source: str, weights: str = "model.safetensors") -> Path:
    """The layout in which the Hub library keeps a downloaded repository."""
    repository = cache / f"models--{source.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    return write_checkpoint(repository / "snapshots" / COMMIT, weights)


def fail_with(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def download(*_arguments: object, **_options: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)


def hub_error(kind: type[errors.HfHubHTTPError], status: int) -> Exception:
    request = httpx2.Request("GET", "https://hub.example/api/models/a/b")
    return kind("a long text\nof several lines", response=httpx2.Response(status, request=request))


def test_a_folder_is_taken_as_it_is_and_named_after_itself(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "my-falcon")
    found = locate_checkpoint(str(folder))
    assert (found.folder, found.name, found.revision) == (folder, "my-falcon", None)


def test_a_folder_given_relative_to_the_current_one_has_its_real_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write_checkpoint(tmp_path / "my-falcon"))
    assert locate_checkpoint(".").name == "my-falcon"


def test_eyas_is_the_bundled_folder() -> None:
    found = locate_checkpoint("eyas")
    assert (found.folder, found.name, found.revision) == (bundled_folder(), "eyas", None)


def test_a_folder_called_like_a_preset_hides_it_only_if_it_holds_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "eyas").mkdir()
    assert locate_checkpoint("eyas").folder == bundled_folder()
    (tmp_path / "eyas" / "config.json").write_text("{}", encoding="utf-8")
    assert locate_checkpoint("eyas").folder.resolve() == tmp_path / "eyas"


@pytest.mark.parametrize(
    ("model", "source"), [("falcon-7b-instruct", "tiiuae/falcon-7b-instruct"), ("owner/name", "owner/name")]
)
def test_presets_and_hub_ids_come_from_the_cache_when_offline(model: str, source: str, tmp_path: Path) -> None:
    snapshot = write_cache(tmp_path, source)
    found = locate_checkpoint(model, cache_dir=tmp_path)
    assert (found.folder, found.name, found.revision) == (snapshot, model, COMMIT)


def test_a_commit_that_is_in_the_cache_is_found(tmp_path: Path) -> None:
    write_cache(tmp_path, "owner/name")
    assert locate_checkpoint("owner/name", revision=COMMIT, cache_dir=tmp_path).revision == COMMIT


def test_offline_and_not_in_the_cache_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"`owner/name` .*offline mode is on \(HF_HUB_OFFLINE\)"):
        locate_checkpoint("owner/name", cache_dir=tmp_path)


def test_where_nothing_may_be_downloaded_the_cache_is_taken_or_the_reason_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    snapshot = write_cache(tmp_path, "owner/name")
    assert locate_checkpoint("owner/name", cache_dir=tmp_path, offline=True).folder == snapshot
    with pytest.raises(
        ModelLoadError, match=r"`owner/other` .* nothing may be downloaded \(--offline, .*cache does not"
    ):
        locate_checkpoint("owner/other", cache_dir=tmp_path, offline=True)


def test_only_pickled_weights_are_refused(tmp_path: Path) -> None:
    write_cache(tmp_path, "owner/name", weights="pytorch_model.bin")
    with pytest.raises(ModelLoadError, match="holds no safetensors weights at revision 0123"):
        locate_checkpoint("owner/name", cache_dir=tmp_path)


def test_without_weights_none_are_downloaded_or_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = write_cache(tmp_path, "owner/name")
    (snapshot / "model.safetensors").unlink()
    wanted: list[str] = []
    download = huggingface_hub.snapshot_download

    def record(source: str, *, allow_patterns: list[str], **options: Any) -> str:
        wanted.extend(allow_patterns)
        return download(source, allow_patterns=allow_patterns, **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", record)
    assert locate_checkpoint("owner/name", cache_dir=tmp_path, with_weights=False).folder == snapshot
    assert "*.json" in wanted
    assert "*.safetensors" not in wanted


def test_a_revision_of_something_local_is_refused(tmp_path: Path) -> None:
    for model in ("eyas", str(write_checkpoint(tmp_path / "mine"))):
        with pytest.raises(SettingsError, match="^--revision: `v2` is for Hub checkpoints"):
            locate_checkpoint(model, revision="v2")


@pytest.mark.parametrize(
    ("model", "part"),
    [
        ("./missing", "there is no folder `./missing`"),
        ("/missing/folder", "there is no folder"),
        ("a/b/c", "there is no folder"),
        ("models/model.safetensors", "there is no folder"),
        ("falcon7b", "did you mean `falcon-7b`"),
        ("qqqq", "presets: eyas, falcon-7b"),
        ("owner/na me", "neither a folder nor a preset nor a Hub id"),
        ("owner/a..b", "neither a folder nor a preset nor a Hub id"),
        ("owner/", "neither a folder nor a preset nor a Hub id"),
    ],
)
def test_what_cannot_name_a_checkpoint_is_refused_without_asking_the_hub(
    model: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(monkeypatch, AssertionError("the Hub was asked"))
    for find in (locate_checkpoint, describe_source):
        with pytest.raises(ModelLoadError, match=part):
            find(model)


def test_a_file_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "mine")
    with pytest.raises(ModelLoadError, match="is a file; a checkpoint is a folder"):
        locate_checkpoint(str(folder / "model.safetensors"))


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (hub_error(errors.GatedRepoError, 401), "accept its terms on its page and set HF_TOKEN"),
        (hub_error(errors.RepositoryNotFoundError, 404), "no such repository, or it is private"),
        (hub_error(errors.RevisionNotFoundError, 404), "it has no revision `v9`"),
        (hub_error(errors.HfHubHTTPError, 503), "HfHubHTTPError: a long text$"),
        (OSError(errno.ENOSPC, "No space left on device"), "no space is left on the disk"),
        (PermissionError(errno.EACCES, "Permission denied", "/data/hub"), "`/data/hub` cannot be written"),
        (RuntimeError("odd"), "RuntimeError: odd"),
    ],
)
def test_a_failed_download_says_what_to_do(error: Exception, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, error)
    with pytest.raises(ModelLoadError, match=f"^`owner/name` cannot be had from the Hub: .*{part}"):
        locate_checkpoint("owner/name", revision="v9")


def test_a_download_asks_for_safe_files_at_the_revision_into_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, object] = {}
    snapshot = write_checkpoint(tmp_path / "snapshots" / COMMIT)

    def download(source: str, **options: object) -> str:
        asked.update(options, source=source)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setenv("HF_API_TOKEN", "hf_old_name")
    assert locate_checkpoint("owner/name", revision="v9", cache_dir=tmp_path).folder == snapshot
    assert (asked["source"], asked["revision"], asked["cache_dir"]) == ("owner/name", "v9", tmp_path)
    assert asked["token"] == "hf_old_name"


@pytest.mark.parametrize(
    ("name", "is_wanted"),
    [
        ("config.json", True), ("model-00001-of-00002.safetensors", True), ("model.safetensors.index.json", True),
        ("chat_template.jinja", True), ("tokenizer.model", True), ("merges.txt", True),
        ("pytorch_model.bin", False), ("modelling_RW.py", False), ("onnx/config.json", False),
        ("original/model.safetensors", False), ("consolidated.safetensors", False), ("training_args.pt", False),
    ],
)  # fmt: skip
def test_of_a_repository_only_safe_files_in_use_are_fetched(name: str, is_wanted: bool) -> None:
    wanted = huggingface_hub.utils.filter_repo_objects(
        [name], allow_patterns=list(WANTED_FILES), ignore_patterns=list(UNWANTED_FILES)
    )
    assert list(wanted) == ([name] if is_wanted else [])


@pytest.mark.parametrize(
    ("model", "part"), [("falcon-7b", "tiiuae/falcon-7b"), ("owner/name", "owner/name"), ("eyas", "folder")]
)
def test_a_source_is_described_without_the_network(model: str, part: str) -> None:
    assert part in describe_source(model)
