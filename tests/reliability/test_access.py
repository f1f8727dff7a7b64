"""Section 3 of the checklist: who may come in, and what each may use."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from http.client import HTTPSConnection
from pathlib import Path
from typing import Any

import psutil
import pytest
from starlette.testclient import TestClient

from gyrfalcon.engine.core import CoreLimits, EngineCore, StepOutcome
from gyrfalcon.engine.interface import EngineRequest
from gyrfalcon.errors import SettingsError
from gyrfalcon.http.admin import create_admin_app
from gyrfalcon.http.app import OPEN_PATHS
from gyrfalcon.http.drain import Drain
from gyrfalcon.http.keys import KeyLimits, KeyStore
from gyrfalcon.service.interface import Caller, GenerateCall
from gyrfalcon.telemetry import setup_logging
from gyrfalcon.testing.engine import FakeEngine
from gyrfalcon.testing.executor import FakeExecutor
from gyrfalcon.testing.server import free_port, running_server, starting_server
from gyrfalcon.testing.text import text_service
from tests.reliability.house import ask, body_of, status_of, until

from .conftest import MakeClient, OpenHouse

GENERATE = {"inputs": "hello", "parameters": {"max_new_tokens": 2}}
ODD_FORMS = (
    *("//generate", "/generate/", "/GENERATE", "/./generate", "/x/../generate", "/%67enerate", "/generate%2f"),
    *(
        "/generate;x=1",
        "/generate?key=secret",
        "/health/../generate",
        "/health//",
        "/health/live/x",
        "/docs/../generate",
    ),
    *("/metrics/", "/%6detrics", "/openapi.json/", "/nothing", "/admin", "/cache/flush", "/keys/reload", "/drain"),
)
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW")


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
def guarded(make_client: MakeClient) -> TestClient:
    return make_client(api_keys=("secret", "other"))


# 3.1


def test_3_1_every_route_needs_a_key(guarded: TestClient) -> None:
    routes = [(method, route.path) for route in guarded.app.routes for method in route.methods]  # type: ignore[attr-defined]
    assert len(routes) > 20
    for method, path in routes:
        answer = guarded.request(method, path, json={})
        is_open = method in {"GET", "HEAD"} and path in OPEN_PATHS
        assert (answer.status_code == 401) != is_open, (method, path, answer.status_code)
        if not is_open:
            assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("method", METHODS)
def test_3_1_no_form_of_a_path_and_no_method_gets_past(guarded: TestClient, method: str) -> None:
    for path in ODD_FORMS:
        answer = guarded.request(method, f"http://testserver{path}", json=GENERATE)
        assert answer.status_code == 401, path


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "evil.example", "", "testserver:80@x", "x" * 300])
def test_3_1_the_host_header_does_not_matter(guarded: TestClient, host: str) -> None:
    assert guarded.post("/generate", json=GENERATE, headers={"Host": host}).status_code == 401


@pytest.mark.parametrize("name", ["X-Forwarded-For", "X-Original-URL", "X-Rewrite-URL", "X-HTTP-Method-Override"])
def test_3_1_headers_of_proxies_do_not_matter(guarded: TestClient, name: str) -> None:
    assert guarded.post("/generate", json=GENERATE, headers={name: "/health"}).status_code == 401


def test_3_1_metrics_are_open_by_flag_alone(make_client: MakeClient) -> None:
    assert make_client(api_keys=("k",)).get("/metrics").status_code == 401
    assert make_client(api_keys=("k",), open_metrics=True).get("/metrics").status_code == 200
    assert make_client().get("/metrics").status_code == 200


def test_3_1_a_file_without_keys_closes_everything(make_client: MakeClient, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# nobody yet\n")
    client = make_client(keys=KeyStore(file=file))
    assert client.post("/generate", json=GENERATE, headers=bearer("")).status_code == 401
    assert client.get("/health").status_code == 200


async def test_3_1_raw_forms_of_the_request_line_need_a_key(house: OpenHouse) -> None:
    async with house(keys=KeyStore(["secret"])) as server:
        for target in ("http://x/generate", "/generate#/health", "/health?/../generate", "*"):
            answer = await ask(server.port, target, GENERATE)
            assert status_of(answer) in {400, 401}, target
        assert server.engine.requests == []


# 3.2


@pytest.mark.parametrize(
    "wrong", ["Secret", "SECRET", "secre", "secret ,", "secretx", "", "s", "secret\xa0", "x" * 30_000]
)
def test_3_2_only_the_very_key_opens(guarded: TestClient, wrong: str) -> None:
    headers = {"Authorization": f"Bearer {wrong}".encode("latin-1")}
    assert guarded.post("/generate", json=GENERATE, headers=headers).status_code == 401  # type: ignore[arg-type]
    assert guarded.post("/generate", json=GENERATE, headers=bearer("secret")).status_code == 200


def test_3_2_all_keys_are_compared_by_digest_without_early_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(presented: bytes, known: bytes) -> bool:
        compared.append((presented, known))
        return presented == known

    monkeypatch.setattr("gyrfalcon.http.keys.hmac.compare_digest", compare)
    found = KeyStore(["a", "b", "c"]).find("a")
    assert found is not None
    assert compared == [(hashlib.sha256(b"a").digest(), hashlib.sha256(key).digest()) for key in (b"a", b"b", b"c")]


def test_3_2_keys_are_in_no_log_answer_or_description(
    guarded: TestClient, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.DEBUG)
    answers = [
        guarded.post("/generate", json=GENERATE, headers=bearer(key)).text for key in ("secret", "secret-but-wrong")
    ]
    file = tmp_path / "keys"
    for line in ("secret", "a b c secret", "? secret", "a secret nolimit=3", "a sha256:secret", "a secret\nb secret"):
        file.write_text(line)
        with pytest.raises(SettingsError) as refused:
            KeyStore(file=file)
        answers.append(str(refused.value))
    answers += [repr(KeyStore(["secret"]).find("secret")), caplog.text]
    assert not [text for text in answers if "secret" in text]


# Where keys come from


def test_a_file_holds_keys_in_plain_text_or_as_digests(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"hidden").hexdigest()
    file = tmp_path / "keys"
    file.write_text(f"# who\n\na plain\nb  sha256:{digest}  requests-per-minute=5 max-concurrent-requests=none\n")
    store = KeyStore(["given"], file=file, limits=KeyLimits(max_concurrent_requests=2, max_queued_tokens=9))
    names = [getattr(store.find(key), "name", None) for key in ("given", "plain", "hidden", digest)]
    assert names == ["key-1", "a", "b", None]
    plain, hidden = store.find("plain"), store.find("hidden")
    assert plain is not None
    assert hidden is not None
    assert plain.limits == KeyLimits(max_concurrent_requests=2, max_queued_tokens=9)
    assert hidden.limits == KeyLimits(requests_per_minute=5, max_queued_tokens=9)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("a", "line 1"),
        ("\n\nb", "line 3"),
        ("-a k", "a name has"),
        ("a k x=1", "a limit is one of"),
        ("a k requests-per-minute=0", "requests-per-minute"),
        ("a k requests-per-minute=1.5", "requests-per-minute"),
        ("a k requests-per-minute=-1", "requests-per-minute"),
        ("a sha256:12", "64 hexadecimal digits"),
        ("a sha256:" + "z" * 64, "64 hexadecimal digits"),
        ("a k\na j", "the name is given twice"),
        ("a k\nb k", "the key is given twice"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, content: str, named: str) -> None:
    file = tmp_path / "keys"
    file.write_text(content)
    with pytest.raises(SettingsError, match=named):
        KeyStore(file=file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="^--api-key-file: .*nowhere.* cannot be read"):
        KeyStore(file=tmp_path / "nowhere")


def test_what_cannot_be_read_again_leaves_what_was(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("a one")
    store = KeyStore(file=file)
    file.write_text("a one b")
    with pytest.raises(SettingsError):
        store.reload()
    assert store.find("one") is not None
    file.write_text("a two")
    store.reload()
    assert (store.find("one"), store.find("two") is not None) == (None, True)


def test_keys_are_read_again_when_the_file_changes_and_on_a_signal(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("a one\n")
    port = free_port()
    with running_server(
        "--api-key-file", str(file), "--admin-port", str(port), "--host", "0.0.0.0", "--open-metrics"
    ) as server:
        # 3.5: what an operator does is reached from this machine alone.
        assert sorted(_listening(server.process.pid)) == sorted([f"127.0.0.1:{port}", f"0.0.0.0:{server.port}"])

        def opens(key: str) -> bool:
            return server.request("POST", "/generate", GENERATE, headers=bearer(key)).status == 200

        def wait_for(key: str) -> None:
            deadline = time.monotonic() + 10
            while not opens(key):
                assert time.monotonic() < deadline, server.log
                time.sleep(0.1)

        assert (opens("one"), opens("two")) == (True, False)
        fresh = tmp_path / "fresh"  # as an orchestrator writes it: another file under the same name
        fresh.write_text("b two\n")
        fresh.replace(file)
        wait_for("two")
        assert not opens("one")
        file.write_text("b two\nc three x\n")  # not usable: what was goes on
        time.sleep(1.5)
        assert opens("two")
        assert "a limit is one of" in server.log
        assert "three" not in server.log
        # With its old times and size the file looks unchanged; a signal has it read all the same.
        before = file.stat()
        file.write_text("d four\n".ljust(before.st_size))
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        server.process.send_signal(signal.SIGHUP)
        wait_for("four")


# 3.3


def test_3_3_requests_per_minute(make_client: MakeClient) -> None:
    client = make_client(keys=KeyStore(["a", "b"], limits=KeyLimits(requests_per_minute=3)))
    answers = [client.post("/generate", json=GENERATE, headers=bearer("a")) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert 1 <= int(answers[3].headers["retry-after"]) <= 20
    assert answers[3].json() == {"error": "this API key may make 3 requests in a minute", "error_type": "overloaded"}
    assert client.post("/chat", json={"prompt": "x"}, headers=bearer("a")).json().keys() == {"detail"}
    assert client.post("/generate", json=GENERATE, headers=bearer("b")).status_code == 200


def test_3_3_the_rate_is_charged_before_the_body_is_read(make_client: MakeClient) -> None:
    client = make_client(keys=KeyStore(["a"], limits=KeyLimits(requests_per_minute=2)))
    statuses = [client.post("/generate", content=b"{" * 1000, headers=bearer("a")).status_code for _ in range(3)]
    assert statuses == [415, 415, 429]
    taken = 0

    def body() -> Any:
        nonlocal taken
        for _ in range(100):
            taken += 1
            yield b"x" * 1000

    assert client.post("/generate", content=body(), headers=bearer("a")).status_code == 429


async def test_3_3_concurrent_requests(house: OpenHouse) -> None:
    keys = KeyStore(["a", "b"], limits=KeyLimits(max_concurrent_requests=2))
    engine = FakeEngine(step_s=0.01)
    header = "Authorization: Bearer {}\r\n"
    async with house(engine, keys=keys) as server:
        long = {"inputs": "x", "parameters": {"max_new_tokens": 60}}
        running = [
            asyncio.create_task(ask(server.port, path, long, headers=header.format("a")))
            for path in ("/generate", "/generate_stream")
        ]
        await until(lambda: engine.stats().num_running == 2)
        refused = await ask(server.port, "/generate", GENERATE, headers=header.format("a"))
        assert status_of(refused) == 429
        assert b"retry-after: 1\r\n" in refused
        assert body_of(refused)["error"] == "this API key may have 2 requests at the same time"
        assert status_of(await ask(server.port, "/generate", GENERATE, headers=header.format("b"))) == 200
        assert [status_of(answer) for answer in await asyncio.gather(*running)] == [200, 200]
        assert status_of(await ask(server.port, "/generate", GENERATE, headers=header.format("a"))) == 200


async def test_3_3_queued_tokens(house: OpenHouse) -> None:
    keys = KeyStore(["a", "b"], limits=KeyLimits(max_queued_tokens=10))
    engine = FakeEngine(step_s=0.01, max_context=128)  # a cache of 1024 tokens, twice of which is handed out
    header = "Authorization: Bearer {}\r\n"
    async with house(engine, keys=keys) as server:
        filling = [
            asyncio.create_task(
                ask(
                    server.port,
                    "/generate",
                    {"inputs": "x", "parameters": {"max_new_tokens": 120}},
                    headers=header.format("b"),
                )
            )
            for _ in range(16)
        ]
        await until(lambda: engine.stats().num_running == 16)
        waiting = [
            asyncio.create_task(
                ask(
                    server.port,
                    "/generate",
                    {"inputs": text, "parameters": {"max_new_tokens": 100}},
                    headers=header.format(key),
                )
            )
            for key, text in (("a", "1 2 3"), ("a", "1 2 3 4 5 6"), ("b", "1 2 3 4"))
        ]
        answers = await asyncio.gather(*waiting)
        assert [status_of(answer) for answer in answers] == [200, 429, 200]
        assert body_of(answers[1])["error"] == "this API key may have 10 prompt tokens waiting at the same time"
        await asyncio.gather(*filling)


def test_3_3_a_refused_request_costs_nothing(make_client: MakeClient) -> None:
    keys = KeyStore(["a"], limits=KeyLimits(max_concurrent_requests=1, requests_per_minute=100))
    client = make_client(FakeEngine(fail_after=1), keys=keys)
    for _ in range(5):  # failures give their place back
        assert client.post("/generate", json=GENERATE, headers=bearer("a")).status_code == 424
    lines = client.get("/metrics", headers=bearer("a")).text.splitlines()
    assert 'gyrfalcon_rejected_total{cause="key_concurrency"} 0.0' in lines


# 3.4


def test_3_4_each_key_has_cached_prefixes_of_its_own(make_client: MakeClient) -> None:
    engine = FakeEngine()
    client = make_client(engine, keys=KeyStore(["a", "b"]))
    for key in ("a", "b", "a"):
        client.post("/generate", json=GENERATE, headers=bearer(key))
    client.post("/chat", json={"prompt": "x"}, headers=bearer("a"))
    salts = [request.cache_salt for request in engine.requests]
    assert salts[0] == salts[2] == salts[3] != salts[1]
    assert all(len(salt) > 64 for salt in salts)  # whole digests, not parts of them
    assert "a" not in {salt.partition("\0")[2] for salt in salts}


def test_3_4_another_salt_finds_nothing_of_what_is_cached() -> None:
    def hits(*salts: str) -> int:
        core = EngineCore(FakeExecutor(num_blocks=200, vocab_size=400), CoreLimits())
        for number, salt in enumerate(salts):
            outcome = StepOutcome()
            request = EngineRequest(
                request_id=str(number), prompt_ids=tuple(range(100)), max_new_tokens=1, cache_salt=salt
            )
            core.submit(request, outcome)
            while core.has_work:
                core.step(outcome)
        return core.stats().prefix_hit_tokens

    assert hits("a", "a") > 0
    assert hits("a", "b") == 0


# 3.5


async def test_3_5_flushing_the_cache_gives_later_calls_another_salt(tokenizer_folder: Path) -> None:
    engine = FakeEngine()
    service, _ = text_service(engine, tokenizer_folder)
    for flushes in (False, True):
        if flushes:
            service.flush_prefix_cache()
        await service.complete(GenerateCall(prompt="x", max_new_tokens=1))
    assert engine.requests[0].cache_salt != engine.requests[1].cache_salt


@pytest.fixture
def admin(tokenizer_folder: Path) -> TestClient:
    service, _ = text_service(FakeEngine(), tokenizer_folder)

    def reload_keys() -> None:
        raise SettingsError("--api-key-file", "line 3 is wrong")

    app = create_admin_app(service, KeyStore(["a"]), Drain(), reload_keys=reload_keys)
    return TestClient(app, base_url="http://127.0.0.1:9000", headers={"x-gyrfalcon-admin": "1"})


def test_3_5_admin_actions_answer_on_their_own_application_alone(admin: TestClient, guarded: TestClient) -> None:
    assert admin.get("/status").json() == {"ready": True, "takes_requests": True, "waiting": 0, "running": 0}
    assert admin.post("/cache/flush").json() == {"flushed": True}
    assert admin.post("/drain").json()["takes_requests"] is False
    assert admin.post("/keys/reload").status_code == 409
    for path in ("/cache/flush", "/keys/reload", "/drain", "/status"):
        assert guarded.post(path, headers=bearer("secret")).status_code == 404


@pytest.mark.parametrize(
    "headers",
    [{"x-gyrfalcon-admin": ""}, {"Host": "evil.example"}, {"Host": "evil.example:9000"}, {"Host": "[::1"}],
)
def test_3_5_a_browser_cannot_be_led_to_them(admin: TestClient, headers: dict[str, str]) -> None:
    plain = TestClient(admin.app, base_url="http://127.0.0.1:9000")
    assert plain.post("/drain").status_code == 403
    if "x-gyrfalcon-admin" not in headers:
        assert admin.post("/drain", headers=headers).status_code in {400, 403}
    assert admin.get("/status").json()["takes_requests"] is True


def _listening(pid: int) -> list[str]:
    found = psutil.Process(pid).net_connections(kind="tcp")
    return [f"{each.laddr.ip}:{each.laddr.port}" for each in found if each.status == psutil.CONN_LISTEN]


# 3.6


def test_3_6_security_checks_survive_python_without_assertions() -> None:
    code = (
        "from gyrfalcon.http.keys import KeyStore; store = KeyStore(['a']); "
        "print(store.find('b') is None and store.find('a') is not None)"
    )
    ended = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout == "True\n"


def test_3_6_code_of_checkpoints_and_pickles_is_never_loaded() -> None:
    forbidden = re.compile(
        r"^\s*(?:import|from) (?:pickle|marshal|shelve|dill)\b|\btorch\.load\(|trust_remote_code=True"
    )
    sources = Path(__file__).parents[2] / "src"
    found = [str(path) for path in sources.rglob("*.py") if any(map(forbidden.search, path.read_text().splitlines()))]
    assert found == []


# 3.7


@pytest.mark.parametrize("logs_prompts", [False, True])
async def test_3_7_prompts_are_logged_only_if_asked_for_and_as_one_line(
    tokenizer_folder: Path, capsys: pytest.CaptureFixture[str], logs_prompts: bool
) -> None:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    setup_logging(json_output=False)
    try:
        service, _ = text_service(FakeEngine(), tokenizer_folder, logs_prompts=logs_prompts)
        caller = Caller(name="team-a", cache_salt="a-salt")
        await service.complete(GenerateCall(prompt="Zebra\n\x1b[31mforged", max_new_tokens=1, caller=caller))
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    (line,) = capsys.readouterr().err.splitlines()
    assert "api_key=team-a" in line
    assert ("Zebra" in line) == logs_prompts
    assert "\x1b[31m" not in line
    assert "a-salt" not in line


# TLS


def test_tls_is_served_where_a_certificate_is_given(tmp_path: Path) -> None:
    certificate, key = _certificate(tmp_path)
    with starting_server("serve", "--tls-certificate", str(certificate), "--tls-key", str(key)) as server:
        context = ssl.create_default_context(cafile=str(certificate))
        context.check_hostname = False
        deadline = time.monotonic() + 60
        while True:
            try:
                connection = HTTPSConnection("127.0.0.1", server.port, context=context, timeout=10)
                connection.request("GET", "/health")
                break
            except OSError:
                assert time.monotonic() < deadline, server.log
                time.sleep(0.2)
        assert connection.getresponse().status == 200
        assert connection.sock.version() in {"TLSv1.2", "TLSv1.3"}  # type: ignore[attr-defined]
        with socket.create_connection(("127.0.0.1", server.port)) as plain:
            plain.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert not plain.recv(100).startswith(b"HTTP")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--tls-certificate", "{folder}/nothing.pem"), "nothing.pem` cannot be read"),
        (("--tls-certificate", "{folder}/text"), "text` cannot be used"),
        (("--tls-key", "{folder}/text"), "has no effect without --tls-certificate"),
    ],
)
def test_wrong_tls_files_are_named_before_the_model_is_loaded(
    tmp_path: Path, arguments: tuple[str, ...], named: str
) -> None:
    (tmp_path / "text").write_text("no certificate")
    with starting_server("serve", *(each.format(folder=tmp_path) for each in arguments)) as server:
        assert server.process.wait(timeout=30) == 1
        assert named in server.log
        assert "loading weights" not in server.log


def _certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate that signs itself."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    try:
        subprocess.run(
            [*command, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True, timeout=60
        )
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    return certificate, key
