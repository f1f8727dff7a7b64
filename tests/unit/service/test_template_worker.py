"""Chat templates in processes: what they make, and how they are ended. 2.6 of docs/reliability.md."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gyrfalcon.errors import TemplateError
from gyrfalcon.service.chat import ChatTemplate
from gyrfalcon.service.interface import ChatMessage
from gyrfalcon.service.template_worker import TemplateThread, TemplateWorkers
from gyrfalcon.testing.text import CHAT_TEMPLATE

MESSAGES = [ChatMessage("user", "{{7*7}} déjà vu 北京 {% raw %}")]
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture
async def workers() -> AsyncIterator[TemplateWorkers]:
    workers = TemplateWorkers(timeout_s=0.5, num_workers=1)
    yield workers
    await workers.close()


async def test_2_6_a_process_renders_what_a_thread_renders(workers: TemplateWorkers) -> None:
    template = ChatTemplate(CHAT_TEMPLATE)
    assert await workers.render(template, MESSAGES) == await TemplateThread().render(template, MESSAGES)
    assert "{{7*7}}" in await workers.render(template, MESSAGES)  # a user's text is data
    assert len(workers.pids) == 1
    bos = ChatTemplate("{{ bos_token }}{{ eos_token }}", bos_token="<s>", eos_token="</s>")
    assert await workers.render(bos, MESSAGES) == "<s></s>"


async def test_2_6_a_template_that_does_not_end_is_killed_and_the_next_one_runs(workers: TemplateWorkers) -> None:
    await workers.render(ChatTemplate("warm"), MESSAGES)
    (before,) = workers.pids
    started = time.monotonic()
    with pytest.raises(TemplateError, match="took longer than 0.5 seconds"):
        await workers.render(ChatTemplate(ENDLESS), MESSAGES)
    assert time.monotonic() - started < 3
    with pytest.raises(ProcessLookupError):
        os.kill(before, 0)
    assert await workers.render(ChatTemplate("fine"), MESSAGES) == "fine"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ raise_exception('only users') }}", "refused the messages: only users"),
        ("{{ 1 / 0 }}", "failed on the messages"),
        ("{{ 'x' * 2000000 }}", "wrote more than 1048576 characters"),
        ("{% for a in range(99999) %}{{ 'x' * 99 }}{% endfor %}", "wrote more than 1048576 characters"),
        ("{{ messages.append(1) }}", "refused the messages"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refused the messages"),
        ("{{ cycler.__init__.__globals__.os.environ }}", "refused the messages"),
    ],
)
async def test_2_6_what_goes_wrong_is_said(workers: TemplateWorkers, source: str, said: str) -> None:
    with pytest.raises(TemplateError, match=said):
        await workers.render(ChatTemplate(source), MESSAGES)
    assert await workers.render(ChatTemplate("fine"), MESSAGES) == "fine"


async def test_2_6_a_template_that_takes_all_memory_takes_none_of_the_servers(workers: TemplateWorkers) -> None:
    slow = TemplateWorkers(timeout_s=20, num_workers=1)
    with pytest.raises(TemplateError):
        await slow.render(ChatTemplate("{{ (messages[0].content * 300000000) | length }}"), MESSAGES)
    assert await slow.render(ChatTemplate("fine"), MESSAGES) == "fine"
    await slow.close()


async def test_2_6_the_bound_on_what_is_written_is_the_templates(workers: TemplateWorkers) -> None:
    assert await workers.render(ChatTemplate("12345", max_chars=5), MESSAGES) == "12345"
    with pytest.raises(TemplateError, match="wrote more than 4 characters"):
        await workers.render(ChatTemplate("12345", max_chars=4), MESSAGES)


async def test_a_killed_process_is_started_again(workers: TemplateWorkers) -> None:
    await workers.render(ChatTemplate("warm"), MESSAGES)
    os.kill(workers.pids[0], signal.SIGKILL)
    await asyncio.sleep(0.2)
    assert await workers.render(ChatTemplate("fine"), MESSAGES) == "fine"


async def test_a_caller_that_leaves_does_not_confuse_the_next_one(workers: TemplateWorkers) -> None:
    await workers.render(ChatTemplate("warm"), MESSAGES)
    (before,) = workers.pids
    leaving = [asyncio.create_task(workers.render(ChatTemplate(f"old {n}"), MESSAGES)) for n in range(20)]
    await asyncio.sleep(0.002)
    for task in leaving:
        task.cancel()
    answers = await asyncio.gather(*(workers.render(ChatTemplate(f"new {n}"), MESSAGES) for n in range(8)))
    assert answers == [f"new {n}" for n in range(8)]
    assert workers.pids == [before]


async def test_many_at_a_time_take_turns(workers: TemplateWorkers) -> None:
    two = TemplateWorkers(timeout_s=5, num_workers=2)
    template = ChatTemplate("{{ messages[0].content }}")
    answers = await asyncio.gather(*(two.render(template, [ChatMessage("user", str(n))]) for n in range(50)))
    assert answers == [str(n) for n in range(50)]
    assert len(two.pids) == 2
    await two.close()
    assert two.pids == []


def test_processes_end_with_their_server() -> None:
    code = f"""
import asyncio, os
from gyrfalcon.service.chat import ChatTemplate
from gyrfalcon.service.interface import ChatMessage
from gyrfalcon.service.template_worker import TemplateWorkers

async def main():
    workers = TemplateWorkers(timeout_s=0.5)
    await workers.render(ChatTemplate("x"), [ChatMessage("user", "x")])
    asyncio.ensure_future(workers.render(ChatTemplate({ENDLESS!r}), [ChatMessage("user", "x")]))
    await asyncio.sleep(0.1)
    print(workers.pids[0], flush=True)
    os.kill(os.getpid(), 9)

asyncio.run(main())
"""
    ended = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=60, check=False)
    pid = int(ended.stdout)
    deadline = time.monotonic() + 10
    while _is_alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
