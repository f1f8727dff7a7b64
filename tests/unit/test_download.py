"""Fetching a checkpoint from a hub that runs here: progress, checksums, and files that were damaged."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from gyrfalcon.download import ProgressLines, fetch
from gyrfalcon.errors import ModelLoadError
from gyrfalcon.presets import bundled_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SOURCE = "owner/name"
JSON_TYPE = {"Content-Type": "application/json"}


def git_hash(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


class Hub:
    """The routes of the Hub that a download asks for. Large files are named by SHA-256, the others as Git does."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.sent = dict(files)  # what is sent in place of the files: a hub whose disk is damaged sends other bytes
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(with_body=False)

            def do_GET(self) -> None:
                self.answer(with_body=True)

            def answer(self, *, with_body: bool) -> None:
                if self.path.startswith(f"/api/models/{SOURCE}/tree/"):
                    self.reply(200, json.dumps(hub.tree()).encode(), JSON_TYPE, with_body=with_body)
                    return
                if self.path.startswith(f"/api/models/{SOURCE}"):
                    listed = [{"rfilename": name} for name in hub.files]
                    body = json.dumps({"id": SOURCE, "sha": COMMIT, "siblings": listed}).encode()
                    self.reply(200, body, JSON_TYPE, with_body=with_body)
                    return
                name = self.path.rpartition("/")[2].partition("?")[0]
                if name not in hub.files:
                    self.reply(404, b"", {"X-Error-Code": "EntryNotFound"}, with_body=with_body)
                    return
                headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{git_hash(hub.files[name])}"'}
                if name.endswith(".safetensors"):
                    headers["X-Linked-Etag"] = f'"{hashlib.sha256(hub.files[name]).hexdigest()}"'
                    headers["X-Linked-Size"] = str(len(hub.files[name]))
                self.reply(200, hub.sent[name], headers, with_body=with_body)

            def reply(self, status: int, body: bytes, headers: dict[str, str], *, with_body: bool) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if with_body:
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def tree(self) -> list[dict[str, object]]:
        """The repository's files as the Hub lists them."""
        listed: list[dict[str, object]] = []
        for name, data in self.files.items():
            entry: dict[str, object] = {"type": "file", "path": name, "size": len(data), "oid": git_hash(data)}
            if name.endswith(".safetensors"):
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            listed.append(entry)
        return listed


@pytest.fixture
def hub() -> Iterator[Hub]:
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
    running = Hub({name: (bundled_folder() / name).read_bytes() for name in names})
    yield running
    running.server.shutdown()
    running.server.server_close()


def download(hub: Hub, cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command as a pod's init container runs it."""
    environ = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "gyrfalcon", "download", SOURCE, "--huggingface-hub-cache", str(cache), *arguments]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=90, check=False)


def test_a_checkpoint_is_fetched_and_compared(hub: Hub, tmp_path: Path) -> None:
    said = download(hub, tmp_path)
    assert said.returncode == 0, said.stderr
    assert re.search(r"owner/name is complete: 4 files, [\d.]+ MiB, checksums as expected", said.stdout)
    again = fetch(SOURCE, cache_dir=tmp_path, offline=True)
    assert again.num_files == 4
    assert again.num_bytes == sum(map(len, hub.files.values()))
    assert (again.checkpoint.folder / "model.safetensors").read_bytes() == hub.files["model.safetensors"]


def test_bytes_that_changed_on_the_way_are_found_and_fetched_anew(hub: Hub, tmp_path: Path) -> None:
    good = hub.files["model.safetensors"]
    hub.sent["model.safetensors"] = good[:-1] + bytes([good[-1] ^ 1])
    said = download(hub, tmp_path)
    assert said.returncode == 1
    last = said.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert "model.safetensors" in last
    assert "has been removed: run the download again" in last
    hub.sent["model.safetensors"] = good
    assert download(hub, tmp_path).returncode == 0


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_bytes_that_changed_on_the_disk_are_found(hub: Hub, tmp_path: Path, name: str) -> None:
    blobs = tmp_path / "models--owner--name" / "blobs"
    snapshot = tmp_path / "models--owner--name" / "snapshots" / COMMIT
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (tmp_path / "models--owner--name" / "refs").mkdir()
    (tmp_path / "models--owner--name" / "refs" / "main").write_text(COMMIT)
    for each, data in hub.files.items():
        digest = hashlib.sha256(data).hexdigest() if each.endswith(".safetensors") else git_hash(data)
        (blobs / digest).write_bytes(data if each != name else data[:-1] + b"?")
        (snapshot / each).symlink_to(f"../../blobs/{digest}")
    done: list[int] = []
    with pytest.raises(ModelLoadError, match=rf"{name}: its \d+ bytes have the checksum"):
        fetch(SOURCE, cache_dir=tmp_path, offline=True, on_checked=done.append)
    assert not (snapshot / name).exists()
    assert done
    assert done == sorted(done)


def test_of_a_folder_nothing_is_fetched() -> None:
    fetched = fetch("eyas")
    assert (fetched.num_files, fetched.checkpoint.folder) == (0, bundled_folder())


def test_lines_come_at_intervals_with_the_rate_since_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter((0.0, 0.0, 1.0, 5.0, 6.0, 10.0))  # when it is made, and at each report
    monkeypatch.setattr("time.monotonic", lambda: next(times))
    lines: list[tuple[int, float]] = []
    progress = ProgressLines(lambda done, rate: lines.append((done, rate)), interval_s=5)
    for done in (100, 200, 600, 700, 1600):
        progress(done)
    assert lines == [(600, 100.0), (1600, 200.0)]
