"""Make the small environments in which tests/clients runs real clients: python tools/client_environments.py [NAME ...]

Each client has its own, .venv-clients/NAME, because some cannot be installed together. It holds exactly what
tests/clients/requirements/NAME.txt lists: packages without looking at their dependencies, so that what a client names
but our calls never import stays out. Nothing is installed twice: a stamp in the environment says what it was made from.

python tools/client_environments.py --pin [NAME ...] chooses the versions anew and writes the lists.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENTS = ROOT / ".venv-clients"
REQUIREMENTS = ROOT / "tests" / "clients" / "requirements"
STAMP = ".ready"


@dataclass(frozen=True, slots=True)
class Client:
    """A client and what its environment holds.

    wants: what pip is asked for; the rest of the list is what these need. without: what they name as needed although
    a text generation over plain HTTP never imports it.
    """

    name: str
    wants: tuple[str, ...]
    without: tuple[str, ...] = ()


CLIENTS = (
    Client("text-generation", ("text-generation==0.7.0",), ("hf-xet",)),
    # The last of the 0.x line. Its asynchronous client is made of aiohttp.
    Client("hub-0", ("huggingface_hub==0.36.2", "aiohttp"), ("hf-xet",)),
    Client("hub-2", ("huggingface_hub==2.4.0",), ("hf-xet",)),
    Client("langchain", ("langchain-huggingface==1.2.3",), ("hf-xet",)),
    Client(
        "langchain-community",
        ("langchain-community==0.4.2", "text-generation==0.7.0"),
        ("hf-xet", "langchain-classic", "langchain-text-splitters", "numpy", "pydantic-settings", "SQLAlchemy"),
    ),
    # The last release with HuggingFaceAPIGenerator, which calls the hub's client in a way that ended with its 2.0.
    Client(
        "haystack",
        ("haystack-ai==2.31.0", "huggingface_hub<2"),
        ("haystack-experimental", "hf-xet", "jiter", "openai"),
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make the environments of tests/clients.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these: " + ", ".join(c.name for c in CLIENTS))
    parser.add_argument("--pin", action="store_true", help="choose the versions anew and write the lists")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.names) - {client.name for client in CLIENTS})
    if unknown:
        parser.error(f"no client is called {', '.join(unknown)}")
    chosen = [client for client in CLIENTS if not options.names or client.name in options.names]
    failed = [client.name for client in chosen if not (pin(client) if options.pin else install(client))]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def install(client: Client) -> bool:
    """Make the client's environment unless it is there; say whether it is now."""
    folder = ENVIRONMENTS / client.name
    wanted = list_hash(client.name)
    if is_ready(client.name):
        print(f"{client.name}: ready")
        return True
    start = time.monotonic()
    # pip stays outside: it takes longer to install than most clients.
    venv.create(folder, clear=True, with_pip=False, symlinks=True)
    command = ["--python", str(folder), "install", "--quiet", "--no-deps", "--no-compile", "--requirement"]
    if pip(*command, str(requirements_file(client.name))).returncode != 0:
        return False
    (folder / STAMP).write_text(wanted)
    print(f"{client.name}: installed in {time.monotonic() - start:.0f} s")
    return True


def pin(client: Client) -> bool:
    """Write the client's list from what pip chooses today; say whether it could."""
    resolved = pip(
        "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-", *client.wants, capture=True
    )
    if resolved.returncode != 0:
        return False
    without = {_normal(name) for name in client.without}
    found = {_normal(item["metadata"]["name"]): item["metadata"] for item in json.loads(resolved.stdout)["install"]}
    gone = without - found.keys()
    if gone:
        print(f"{client.name}: no longer needs {', '.join(sorted(gone))}: drop it from `without`", file=sys.stderr)
        return False
    lines = [
        f"# {', '.join(client.wants)} and what it needs. Written by tools/client_environments.py --pin.",
        *([f"# Left out, as never imported here: {', '.join(client.without)}."] if client.without else []),
        *(f"{found[name]['name']}=={found[name]['version']}" for name in sorted(found.keys() - without)),
    ]
    requirements_file(client.name).write_text("\n".join(lines) + "\n")
    print(f"{client.name}: {len(found) - len(without)} packages")
    return True


def python_of(name: str) -> Path:
    """The client's interpreter; it may not be there."""
    return ENVIRONMENTS / name / "bin" / "python"


def is_ready(name: str) -> bool:
    """Whether the client's environment holds what its list says now."""
    stamp = ENVIRONMENTS / name / STAMP
    return stamp.is_file() and stamp.read_text() == list_hash(name)


def list_hash(name: str) -> str:
    """What an environment was made from: the list, and the Python that it is for."""
    content = requirements_file(name).read_bytes() + sys.version.encode()
    return hashlib.sha256(content).hexdigest()


def requirements_file(name: str) -> Path:
    return REQUIREMENTS / f"{name}.txt"


def pip(*arguments: str, capture: bool = False) -> subprocess.CompletedProcess[str]:
    """Run this interpreter's pip, 22.3 or newer, which installs into other environments too."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE if capture else None, text=True, check=False)


def _normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


if __name__ == "__main__":
    sys.exit(main())
