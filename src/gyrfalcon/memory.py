"""How much memory this process may still take: the machine's, or less where a container has a limit of its own."""

from __future__ import annotations

from pathlib import Path

import psutil

# A limit of cgroup v1 that is none: the largest multiple of a page.
_UNLIMITED = 1 << 62


def free_bytes(root: Path = Path("/")) -> int:
    """Memory to be had now. In a container with a limit the machine may have plenty, and the kernel ends the process.

    root: of the file systems in which the kernel tells about groups and processes.
    """
    room = [limit - used for limit, used in _group_limits(root)]
    return max(0, min([int(psutil.virtual_memory().available), *room]))


def total_bytes(root: Path = Path("/")) -> int:
    """All memory that this process could have if nothing else ran in its container, or on its machine."""
    return min([int(psutil.virtual_memory().total), *(limit for limit, _ in _group_limits(root))])


def _group_limits(root: Path) -> list[tuple[int, int]]:
    """Limit and use of this process's memory group and of each group it lies in, where there is a limit."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if not controllers:
            mount, limit_file, use_file, cache_key = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            mount, limit_file, use_file = "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache_key = "total_inactive_file"
        else:
            continue
        group = Path(name.lstrip("/"))
        for each in (group, *group.parents):
            folder = root / mount / each
            limit = _read_number(folder / limit_file)
            used = _read_number(folder / use_file)
            if limit is not None and used is not None and limit < _UNLIMITED:
                found.append((limit, max(0, used - _read_statistic(folder / "memory.stat", cache_key))))
    return found


def _read_number(path: Path) -> int | None:
    """The number in a file; None where there is no such file, and where it says `max`."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _read_statistic(path: Path, key: str) -> int:
    """Pages of files that the kernel gives back before it ends anyone: read weights stay in memory as such."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{key} ")), 0)
