"""What a container runtime does, as far as it matters here: a tree that cannot be written, a user without rights."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc")


def can_contain() -> bool:
    """Whether this process may make mount namespaces and become another user."""
    if os.geteuid() != 0 or shutil.which("unshare") is None or shutil.which("setpriv") is None:
        return False
    probe = ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


def contained(
    command: Sequence[str],
    *,
    environ: dict[str, str],
    root: Path,
    readable: Sequence[Path],
    shared_memory: bool = True,
    user: int = 10001,
) -> list[str]:
    """A command line that runs `command` in a tree of the system's folders and of `readable`, all of them read-only.

    Writable are /tmp and, with shared_memory, /dev/shm, both new and empty. root: an empty folder to mount the tree
    at. The process has no capabilities, can get none, and keeps its process id to the end.
    """
    lines = [
        "set -e",
        f"mount -t tmpfs tmpfs {root}",
        f"mkdir -p {root}/proc {root}/dev {root}/tmp",
        # Before what is mounted below: a folder of `readable` may lie in /tmp.
        f"mount -t tmpfs -o mode=1777 tmpfs {root}/tmp",
        f"mount --rbind /proc {root}/proc",
        f"mount --rbind /dev {root}/dev",
        # Not the machine's: without a mount of its own a container has none.
        f"mount -t tmpfs tmpfs {root}/dev/shm" + ("" if shared_memory else " -o ro"),
    ]
    for path in dict.fromkeys([*SYSTEM, *map(str, readable)]):
        if not Path(path).exists():
            continue
        place = f"{root}{path}"
        lines += [f"mkdir -p {place}", f"mount --bind {path} {place}", f"mount -o remount,bind,ro {place}"]
    variables = " ".join(shlex.quote(f"{name}={value}") for name, value in environ.items())
    limits = f"--reuid {user} --regid {user} --clear-groups --no-new-privs --inh-caps=-all --bounding-set=-all"
    lines += [
        f"mount -o remount,ro {root}",
        f"exec chroot {root} setpriv {limits} env -i {variables} {shlex.join(command)}",
    ]
    return ["unshare", "--mount", "sh", "-c", "\n".join(lines)]


def interpreter_folders() -> list[Path]:
    """What this interpreter needs of the disk: itself, its packages, this project's source."""
    source = Path(__file__).parents[2]
    return [Path(sys.base_prefix), Path(sys.prefix), source / "src", source / "deploy"]
