"""The package's build compiles the CPU kernels where it can; where it cannot, the package installs without them."""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Adds the library to a wheel, also to the one that an editable install makes."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, then say that the wheel fits any Python 3 on this kind of machine.

        version: "standard", or "editable", which finds the library in the source tree.
        """
        native = _load(Path(self.root) / "tools" / "build_native.py")
        library = native.build_or_explain()
        included = native.NOTICE if library is None else library
        if included.exists():
            build_data["artifacts"].append(included.relative_to(self.root).as_posix())
        if library is not None:
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"


def _load(path: Path) -> Any:
    """The script as a module: it is no part of a package."""
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[path.stem] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module
