"""The pack as the Comfy registry sends it to users."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from host.server import REPOSITORY


def comfy_cli(folder: Path, *command: str) -> str:
    """What the registry's own tool says, run in a folder; its settings and its statistics stay out of it."""
    home = folder.parent / "home"
    home.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "comfy_cli", "--skip-prompt", "--no-enable-telemetry", *command],
        cwd=folder, env={**os.environ, "HOME": str(home), "DO_NOT_TRACK": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def copy_of_repository(folder: Path) -> Path:
    """The files that git keeps, or would keep, in a repository of their own: the tool leaves its archive in it."""
    listed = ["git", "-C", str(REPOSITORY), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in filter(None, subprocess.check_output(listed, text=True).split("\0")):
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, folder / name)
    for command in (["init", "-q"], ["add", "--all"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


def unpacked(repository: Path, target: Path) -> Path:
    """Pack that repository as for the registry, and unpack it as ComfyUI Manager does."""
    comfy_cli(repository, "node", "pack")
    with zipfile.ZipFile(repository / "node.zip") as archive:
        archive.extractall(target)
    return target
