"""What was done in a folder: one line of JSON for each result, so that a job goes on where it ended."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAME = "pft-sr.jsonl"


class Manifest:
    """The file `NAME` in the folder of the results. The last line about a target counts.

    A line holds the target's path in the folder, the source with its size and time of change, the checksum of the
    weights, the settings, and the status: "done", or "failed" with the error.
    """

    def __init__(self, folder: Path, common: Mapping[str, Any]) -> None:
        """common: what all results of this run depend on, as JSON has it."""
        self.folder = folder
        self.path = folder / NAME
        self.common = common
        self.lines: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            for text in self.path.read_text("utf-8", "replace").splitlines():
                line = _parsed(text)
                if line:
                    self.lines[line["target"]] = line

    def is_done(self, source: Path, target: Path) -> bool:
        """Whether this target was made of this very source with these weights and settings, and is still there."""
        line = self.lines.get(self._name(target), {})
        return line.get("status") == "done" and target.exists() and self._job(source, target).items() <= line.items()

    def made(self, target: Path) -> bool:
        """Whether the target was written by a job of this manifest: what is ours may be replaced."""
        return self.lines.get(self._name(target), {}).get("status") == "done"

    def add(self, source: Path, target: Path, error: str = "") -> None:
        """Note a result, or why there is none. One write of one line: a crash can spoil no line but its own."""
        status = {"status": "failed", "error": error} if error else {"status": "done"}
        line = {**self._job(source, target), **status}
        self.lines[line["target"]] = line
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            end = file.seek(0, 2)
            file.seek(max(0, end - 1))
            new_line = b"\n" if end and file.read() != b"\n" else b""  # behind a line that a crash cut off
            file.write(new_line + json.dumps(line, ensure_ascii=False).encode() + b"\n")

    def _name(self, target: Path) -> str:
        return target.relative_to(self.folder).as_posix()

    def _job(self, source: Path, target: Path) -> dict[str, Any]:
        return {"target": self._name(target), "source": str(source), **identity(source), **self.common}


def identity(source: Path) -> dict[str, int]:
    """What tells a file from its later versions, without reading it."""
    try:
        stat = source.stat()
    except OSError:
        return {"bytes": 0, "changed_ns": 0}
    return {"bytes": stat.st_size, "changed_ns": stat.st_mtime_ns}


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("target"), str) else None
