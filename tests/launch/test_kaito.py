"""The whole server behind the command line of a KAITO manifest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gyrfalcon.presets import bundled_folder
from gyrfalcon.testing.server import ServerProcess, free_port, starting_server

TEMPLATE = "{% for message in messages %}Say {{ message.content }}\n{% endfor %}Return the"
MANIFEST = (
    "inference_api.py",
    "--pipeline=conversational",
    "--torch-dtype=bfloat16",
    "--trust_remote_code",
    "--device_map=cpu",
    f"--pretrained_model_name_or_path={bundled_folder()}",
    f"--chat_template={TEMPLATE}",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    port = free_port()
    with starting_server("kaito", *MANIFEST, environ={"GYRFALCON_PORT": str(port)}) as process:
        process.port = port  # the service has no --port
        process.wait_until_healthy()
        yield process


def test_a_manifests_command_serves_the_conversational_form(server: ServerProcess) -> None:
    body = {
        "prompt": "passed over",
        "messages": [{"role": "user", "content": "something"}],
        "generate_kwargs": {"max_new_tokens": 5, "do_sample": False},
    }
    answer = server.request("POST", "/chat", body)
    assert answer.status == 200, answer.body
    assert "'role': 'assistant'" in answer.json()["Result"]
    assert "passed over" not in answer.json()["Result"]
    assert server.request("POST", "/chat", {"prompt": "alone"}).status == 400


def test_the_given_chat_template_is_the_one_used(server: ServerProcess) -> None:
    body = {"messages": [{"role": "user", "content": "something"}]}
    answer = server.request("POST", "/chat_tokenize", body)
    assert answer.json()["templated_text"] == "Say something\nReturn the"


def test_the_probes_of_every_release_answer_and_the_model_is_named_by_its_path(server: ServerProcess) -> None:
    for path in ("/health", "/healthz"):
        assert server.request("GET", path).status == 200
    info = server.request("GET", "/info").json()
    assert (info["model_id"], info["model_dtype"]) == (str(bundled_folder()), "bfloat16")


def test_the_log_says_what_had_no_effect(server: ServerProcess) -> None:
    assert "--trust_remote_code: `true` (flag) has no effect and can be left out" in server.log
    assert "--port: no option of KAITO's service" in server.log


def test_a_file_that_holds_no_chat_template_keeps_the_server_from_starting(tmp_path: Path) -> None:
    missing = tmp_path / "falcon.jinja"
    arguments = ("--pretrained_model_name_or_path=eyas", f"--chat_template={missing}")
    with starting_server("kaito", *arguments, environ={"GYRFALCON_PORT": str(free_port())}) as failing:
        assert failing.process.wait(timeout=60) == 1
        assert "error: falcon.jinja: not readable as text" in failing.log
