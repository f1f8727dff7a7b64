"""The images: a Containerfile by the rules, an entry point that knows three conventions, and a start as in a pod."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gyrfalcon.deploy import objects
from gyrfalcon.testing.server import ServerProcess, free_port
from tests.deploy.container import can_contain, contained, interpreter_folders
from tools.deploy_files import plan

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "deploy" / "images"
MOST_BYTES = 1_200_000_000
needs_root = pytest.mark.skipif(not can_contain(), reason="needs the right to make mount namespaces")


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"(?m)^\s*#.*\n", "", (IMAGES / "Containerfile").read_text()).replace("\\\n", " ")
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in text.splitlines() if line.strip()]


def stages() -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for word, rest in instructions():
        if word == "FROM":
            name = rest.split()[-1]
            assert name not in found
            found[name] = []
        if found:
            found[list(found)[-1]].append((word, rest))
    return found


FINAL = ("cpu", "cuda", "cpu-with-weights", "cuda-with-weights")


def lineage(name: str) -> list[tuple[str, str]]:
    """A stage's instructions after those of the stages that it is built on."""
    parent = stages()[name][0][1].split()[0]
    return [*(lineage(parent) if parent in stages() else []), *stages()[name]]


def test_every_target_is_there_and_every_stage_is_named() -> None:
    assert set(FINAL) <= set(stages())
    assert all(" AS " in rest for word, rest in instructions() if word == "FROM")


def test_base_images_have_a_version_and_stages_exist() -> None:
    known: set[str] = set()
    for word, rest in instructions():
        if word == "FROM":
            image, _, name = rest.split()
            if image not in known:
                assert re.fullmatch(r"[\w./-]+:\S*\d\S*|[\w./-]+:\$\{PYTHON_VERSION\}-\S+", image), image
                assert not image.endswith(":latest")
            known.add(name)
        for stage in re.findall(r"--from=(\S+)", rest):
            assert stage in known, stage


@pytest.mark.parametrize("name", FINAL)
def test_an_image_ends_as_a_user_without_rights_and_can_be_told_to_end(name: str) -> None:
    last = dict(lineage(name))
    assert last["USER"] == "10001:10001"
    assert last["ENTRYPOINT"] == '["gyrfalcon-entrypoint"]'
    assert last["CMD"] == '["serve"]'
    assert (last["STOPSIGNAL"], last["VOLUME"], last["EXPOSE"]) == ("SIGTERM", "/data", "8080 5000")


def test_packages_are_installed_without_more_and_lists_are_removed() -> None:
    for word, rest in instructions():
        if word == "RUN" and "apt-get install" in rest:
            assert "--no-install-recommends" in rest
            assert "--yes" in rest
            assert rest.startswith("apt-get update")
            assert rest.rstrip().endswith("rm -rf /var/lib/apt/lists/*")


def test_nothing_is_fetched_by_other_means_and_no_secret_is_kept() -> None:
    for word, rest in instructions():
        assert word not in ("ADD", "MAINTAINER", "ONBUILD"), word
        if word == "RUN":
            assert not re.search(r"\b(sudo|curl|wget|ssh)\b", rest)
            assert not re.match(r"cd\s", rest)
        if word in ("ENV", "ARG"):
            assert not re.search(r"(?i)token|secret|password|api_key", rest)
        if word == "WORKDIR":
            assert rest.startswith("/")
        if word in ("CMD", "ENTRYPOINT"):
            assert rest.startswith("[")


def test_what_is_copied_exists_and_is_let_through() -> None:
    let_through = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for word, rest in instructions():
        if word == "COPY" and "--from" not in rest:
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert any(source == name or source.startswith(f"{name}/") for name in let_through), source


@pytest.mark.parametrize("script", ["install", "entrypoint"])
def test_a_script_is_correct_shell_and_ends_at_the_first_failure(script: str) -> None:
    path = IMAGES / script
    subprocess.run(["sh", "-n", str(path)], check=True)
    assert "set -eu" in path.read_text().splitlines()
    assert os.access(path, os.X_OK)


@pytest.fixture
def entrypoint(tmp_path: Path) -> Path:
    """A folder with the entry point under all its names, and a gyrfalcon that says how it was called."""
    (tmp_path / "gyrfalcon").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "gyrfalcon").chmod(0o755)
    for name in ("gyrfalcon-entrypoint", "text-generation-launcher", "accelerate"):
        (tmp_path / name).symlink_to(IMAGES / "entrypoint")
    return tmp_path


@pytest.mark.parametrize(
    ("command", "called"),
    [
        (["gyrfalcon-entrypoint", "serve", "eyas", "--port", "80"], ["serve", "eyas", "--port", "80"]),
        (["gyrfalcon-entrypoint", "--model-id", "a/b c"], ["launcher", "--model-id", "a/b c"]),
        (["gyrfalcon-entrypoint", "download", "falcon-7b"], ["download", "falcon-7b"]),
        (
            ["gyrfalcon-entrypoint", "inference_api.py", "--pipeline=text-generation"],
            ["kaito", "inference_api.py", "--pipeline=text-generation"],
        ),
        (["text-generation-launcher", "--model-id", "x"], ["launcher", "--model-id", "x"]),
        (
            ["accelerate", "launch", "--num_processes=1", "inference_api.py", "--torch_dtype=bfloat16"],
            ["kaito", "--torch_dtype=bfloat16"],
        ),
    ],
)
def test_the_entry_point_knows_who_calls(entrypoint: Path, command: list[str], called: list[str]) -> None:
    environ = {"PATH": f"{entrypoint}:/usr/bin:/bin"}
    said = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    assert said.stdout.splitlines() == called


def test_accelerate_runs_nothing_else(entrypoint: Path) -> None:
    environ = {"PATH": f"{entrypoint}:/usr/bin:/bin"}
    said = subprocess.run(["accelerate", "config"], env=environ, capture_output=True, text=True, check=False)
    assert said.returncode == 2
    assert said.stderr.startswith("error: accelerate: ")


def image_variables() -> dict[str, str]:
    """What ENV gives the cpu image."""
    text = " ".join(rest for word, rest in lineage("cpu") if word == "ENV")
    return dict(pair.split("=", 1) for pair in text.split())


def start_as_in_a_pod(
    root: Path, log: Path, programs: list[Path], readable: list[Path], *, shared_memory: bool = True
) -> ServerProcess:
    """The manifest's container of eyas on a free port: its arguments, environment, user and read-only tree."""
    port = free_port()
    pod = objects.pod_spec(plan("eyas", port=port), port)
    (container,) = pod["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    environ = image_variables() | {each["name"]: each["value"] for each in container["env"]}
    environ["PATH"] = ":".join([*map(str, programs), environ["PATH"]])
    command = ["sh", str(IMAGES / "entrypoint"), *container["args"]]
    user = pod["securityContext"]["runAsUser"]
    line = contained(command, environ=environ, root=root, readable=readable, shared_memory=shared_memory, user=user)
    with log.open("wb") as stream:
        process = subprocess.Popen(line, stdout=stream, stderr=subprocess.STDOUT)
    return ServerProcess(process, port, log)


def check_it_serves(server: ServerProcess) -> None:
    try:
        server.wait_until_healthy()
        assert server.generate("Return the number of", max_new_tokens=5).status == 200
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        assert re.search(r"(?m)^Uid:\s+10001\s+10001", status)
        assert re.search(r"(?m)^CapEff:\s+0+$", status)
        assert re.search(r"(?m)^NoNewPrivs:\s+1$", status)
        server.process.terminate()
        assert server.process.wait(timeout=20) == 0, server.log
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()
    assert "Traceback" not in server.log


@needs_root
def test_nothing_in_a_contained_tree_can_be_written_but_tmp(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    tried = (
        "for place in / /usr /etc /proc/sys /dev/shm /tmp; do touch $place/x 2>/dev/null && echo $place; done; id -u"
    )
    line = contained(
        ["sh", "-c", tried], environ={"PATH": "/usr/bin:/bin"}, root=tmp_path / "root", readable=[], shared_memory=False
    )
    said = subprocess.run(line, capture_output=True, text=True, check=True).stdout.split()
    assert said == ["/tmp", "10001"]


@needs_root
@pytest.mark.parametrize("shared_memory", [True, False], ids=["", "without-shared-memory"])
def test_the_server_starts_with_the_manifests_user_arguments_and_read_only_tree(
    tmp_path: Path, shared_memory: bool
) -> None:
    (tmp_path / "root").mkdir()
    programs = [Path(sys.prefix) / "bin"]
    server = start_as_in_a_pod(
        tmp_path / "root", tmp_path / "log", programs, interpreter_folders(), shared_memory=shared_memory
    )
    check_it_serves(server)


@needs_root
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(
    os.environ.get("GYRFALCON_TEST_IMAGE") != "1", reason="installs everything anew; set GYRFALCON_TEST_IMAGE=1"
)
def test_what_the_steps_install_is_small_and_starts(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Runs the install step of the Containerfile in an empty environment, with the index that pip is set up for."""
    prefix = tmp_path / "opt" / "gyrfalcon"
    assert any("deploy/images/install /opt/gyrfalcon" in rest for word, rest in stages()["build-cpu"] if word == "RUN")
    environ = {"PATH": "/usr/bin:/bin", "HOME": str(Path.home()), "PYTHON": f"{sys.base_prefix}/bin/python3"}
    subprocess.run(["sh", "deploy/images/install", str(prefix)], cwd=ROOT, env=environ, check=True)
    num_bytes = sum(path.lstat().st_size for path in prefix.rglob("*") if path.is_file() and not path.is_symlink())
    record_property("installed_bytes", num_bytes)
    assert num_bytes <= MOST_BYTES
    (tmp_path / "root").mkdir()
    readable = [Path(sys.base_prefix), prefix, IMAGES]
    check_it_serves(start_as_in_a_pod(tmp_path / "root", tmp_path / "log", [prefix / "bin"], readable))
