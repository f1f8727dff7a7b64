"""Chat templates rendered in processes that can be killed.

A template comes with the model and works on what a client sends: that it ends, and ends soon, nobody can promise. A
thread cannot be stopped; a process can. The process reads one JSON line a conversation and writes one with what came
of it; it has neither the server's memory nor its sockets nor its environment.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

from gyrfalcon.errors import GenerationFailed, TemplateError
from gyrfalcon.service.chat import ChatTemplate
from gyrfalcon.service.interface import ChatMessage

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 30.0  # for an interpreter to start on a machine that is busy with the model
MAX_LINE_BYTES = 2**28
# Many times what the interpreter and a conversation within the server's limits take.
WORKER_MEMORY_BYTES = 2**30
# Encoding fewer characters takes a fraction of a millisecond.
SHORT_CHARS = 32_768
# What a template may depend on: where the package is, and the local time and language.
PASSED_ON = ("PATH", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ")
READY = b"ready\n"


class TemplateRenderer(Protocol):
    """Makes a conversation into text."""

    async def render(self, template: ChatTemplate, messages: Sequence[ChatMessage]) -> str:
        """What the template writes. Raises TemplateError where it refuses, fails, writes too much or takes too long."""
        ...

    async def close(self) -> None:
        """Free what rendering takes; idempotent."""
        ...


class TemplateThread:
    """Renders in a thread of this process, for templates that are trusted to end."""

    async def render(self, template: ChatTemplate, messages: Sequence[ChatMessage]) -> str:
        return await asyncio.to_thread(template.render, messages)

    async def close(self) -> None:
        pass


class TemplateWorkers:
    """A few processes that render templates; each is started when it is first needed, and again after a kill."""

    def __init__(self, *, timeout_s: float = 1.0, num_workers: int = 2) -> None:
        """timeout_s: how long a template may take for one conversation, once its process is there."""
        self._timeout_s = timeout_s
        self._workers = [_Worker() for _ in range(num_workers)]
        self._idle: asyncio.LifoQueue[_Worker] = asyncio.LifoQueue()
        for worker in reversed(self._workers):
            self._idle.put_nowait(worker)

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that run."""
        return [worker.pid for worker in self._workers if worker.pid is not None]

    async def render(self, template: ChatTemplate, messages: Sequence[ChatMessage]) -> str:
        job = {
            "template": [template.source, template.bos_token, template.eos_token, template.max_chars],
            "messages": [[message.role, message.content] for message in messages],
            "timeout_s": self._timeout_s,
        }
        is_short = sum(len(message.content) for message in messages) < SHORT_CHARS
        line = _line(job) if is_short else await asyncio.to_thread(_line, job)
        worker = await self._idle.get()  # callers wait here for as long as the templates of others take
        # To its end also when the caller leaves: what the process then answers must not be taken for the next one's.
        answer = await asyncio.shield(asyncio.ensure_future(self._run(worker, line)))
        if "prompt" in answer:
            return answer["prompt"]
        if "failure" in answer:
            raise GenerationFailed(answer["failure"])
        raise TemplateError(answer["refusal"])

    async def close(self) -> None:
        for worker in self._workers:
            await worker.kill()

    async def _run(self, worker: _Worker, line: bytes) -> dict[str, str]:
        try:
            return await worker.run(line, self._timeout_s)
        finally:
            self._idle.put_nowait(worker)


class _Worker:
    """One process, started on demand."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def run(self, line: bytes, timeout_s: float) -> dict[str, str]:
        """The process's answer: `prompt`, or what went wrong."""
        try:
            process = await self._started()
        except (OSError, TimeoutError) as error:
            logger.error("the chat template's process could not be started: %s", error)
            await self.kill()
            return {"failure": "the chat template's process could not be started"}
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            async with asyncio.timeout(timeout_s):
                process.stdin.write(line)
                await process.stdin.drain()
                answer = await process.stdout.readline()
            if answer.endswith(b"\n"):
                return dict(json.loads(answer))
            refusal = "the chat template took too much memory"
        except TimeoutError:
            refusal = f"the chat template took longer than {timeout_s:g} seconds"
        except OSError:
            refusal = "the chat template ended its process"
        await self.kill()
        logger.warning("%s; its process was ended", refusal)
        return {"refusal": refusal}

    async def kill(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()

    async def _started(self) -> asyncio.subprocess.Process:
        if self._process is not None and self._process.returncode is None:
            return self._process
        await self.kill()
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-P", "-m", "gyrfalcon.service.template_worker"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=MAX_LINE_BYTES,
            env={name: os.environ[name] for name in PASSED_ON if name in os.environ},
        )
        assert self._process.stdout is not None
        async with asyncio.timeout(START_TIMEOUT_S):
            if await self._process.stdout.readline() != READY:
                raise OSError("it ended at once")
        return self._process


def _line(value: object) -> bytes:
    return json.dumps(value).encode("ascii") + b"\n"


# What runs in the process


def main() -> None:
    """Render what standard input asks for until it ends, as it does when the server is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's interrupt is the server's to heed
    resource.setrlimit(resource.RLIMIT_AS, (WORKER_MEMORY_BYTES, WORKER_MEMORY_BYTES))
    _template("", "", "", 1).render([ChatMessage("user", "")])  # loads what rendering takes, before time counts
    sys.stdout.buffer.write(READY)
    sys.stdout.buffer.flush()
    for line in sys.stdin.buffer:
        job = json.loads(line)
        # Ends the process where the server is no longer there to do it.
        signal.setitimer(signal.ITIMER_REAL, job["timeout_s"] + 1)
        try:
            answer = _line(_answer(job))
        except MemoryError:
            os._exit(1)
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.buffer.write(answer)
        sys.stdout.buffer.flush()


def _answer(job: dict[str, Any]) -> dict[str, str]:
    messages = [ChatMessage(role, content) for role, content in job["messages"]]
    try:
        return {"prompt": _template(*job["template"]).render(messages)}
    except TemplateError as error:
        return {"refusal": str(error)}


@lru_cache(maxsize=8)
def _template(source: str, bos_token: str, eos_token: str, max_chars: int) -> ChatTemplate:
    return ChatTemplate(source, bos_token=bos_token, eos_token=eos_token, max_chars=max_chars)


if __name__ == "__main__":
    main()
