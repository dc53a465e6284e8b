"""Build hook: puts the built viewer into the wheel, building it with npm where that is at hand."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

INDEX = "index.html"


class ViewerHook(BuildHookInterface):  # type: ignore[type-arg]
    """Ships ``static/dist`` as ``geocentroids_tiler/static``; without Node.js the package installs without a viewer."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build the viewer if needed and add it to the wheel."""
        static = Path(self.root) / "static"
        dist = static / "dist"
        if not (dist / INDEX).is_file():
            self._build(static)
        if version != "editable" and (dist / INDEX).is_file():
            build_data["force_include"][str(dist)] = "geocentroids_tiler/static"

    def _build(self, static: Path) -> None:
        npm = shutil.which("npm")
        if npm is None or not (static / "package.json").is_file():
            self._say("npm was not found: the package is built without its web page; `make viewer` adds it later")
            return
        for command in (["ci", "--no-audit", "--no-fund"], ["run", "build"]):
            done = subprocess.run(  # noqa: S603 (fixed arguments)
                [npm, *command], cwd=static, capture_output=True, text=True, check=False
            )
            if done.returncode:
                self._say(f"npm {command[0]} failed, the package is built without its web page:\n{done.stderr[-2000:]}")
                return

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr)
