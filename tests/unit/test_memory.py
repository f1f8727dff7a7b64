"""Free memory: the machine's, or what a container's limit leaves of it."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from gyrfalcon.memory import free_bytes, total_bytes

MIB = 1024**2


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_without_groups_it_is_the_machines(tmp_path: Path) -> None:
    assert free_bytes(tmp_path) == pytest.approx(psutil.virtual_memory().available, rel=0.3)
    assert total_bytes(tmp_path) == psutil.virtual_memory().total


def test_a_limit_of_the_group_counts_and_file_pages_do_not(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/pod/server\n",
            "sys/fs/cgroup/pod/server/memory.max": f"{100 * MIB}\n",
            "sys/fs/cgroup/pod/server/memory.current": f"{70 * MIB}\n",
            "sys/fs/cgroup/pod/server/memory.stat": f"anon 1\ninactive_file {40 * MIB}\n",
        },
    )
    assert free_bytes(root) == 70 * MIB
    assert total_bytes(root) == 100 * MIB


def test_the_tightest_limit_above_counts(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/pod/server\n",
            "sys/fs/cgroup/pod/server/memory.max": "max\n",
            "sys/fs/cgroup/pod/server/memory.current": "5\n",
            "sys/fs/cgroup/pod/memory.max": f"{50 * MIB}\n",
            "sys/fs/cgroup/pod/memory.current": f"{30 * MIB}\n",
        },
    )
    assert free_bytes(root) == 20 * MIB


def test_a_container_that_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": "1000\n",
        "sys/fs/cgroup/memory.current": "900\n",
    }
    assert free_bytes(write(tmp_path, files)) == 100


def test_the_older_kind_of_groups(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/a\n4:memory:/a\n",
            "sys/fs/cgroup/memory/a/memory.limit_in_bytes": f"{10 * MIB}\n",
            "sys/fs/cgroup/memory/a/memory.usage_in_bytes": f"{11 * MIB}\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "1\n",
        },
    )
    assert free_bytes(root) == 0
    assert total_bytes(root) == 10 * MIB
