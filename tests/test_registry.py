"""What the Comfy registry asks of a pack, and what it sends to users."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tomlkit

from host.pack import comfy_cli
from host.server import REPOSITORY

PARTS = (".", "pft_arch", "pft_arch/attention", "pft_arch/cli", "pft_arch/bundled", "web/docs", "example_workflows")


def files(root: Path, folder: str) -> set[str]:
    return {path.name for path in (root / folder).iterdir() if path.is_file() and path.suffix != ".pyc"}


def test_the_registrys_own_tool_has_nothing_to_object(repository_copy: Path) -> None:
    said = comfy_cli(repository_copy, "node", "validate")
    assert "All validation checks passed" in said
    assert "Warning" not in said


def test_the_archive_holds_what_the_pack_needs_and_nothing_else(registry_pack: Path) -> None:
    for folder in PARTS:
        left_out = {".gitignore", ".comfyignore", ".git"} if folder == "." else set()
        assert files(registry_pack, folder) == files(REPOSITORY, folder) - left_out, folder
    folders = {path.relative_to(registry_pack).parts[0] for path in registry_pack.rglob("*/*")}
    assert folders == {"pft_arch", "web", "example_workflows"}
    assert sum(path.stat().st_size for path in registry_pack.rglob("*")) < 10e6


def test_nothing_starts_a_program_or_installs_anything_at_run_time(registry_pack: Path) -> None:
    """The registry forbids it, and ruff's rules in `tests/run` (S102, S307) see `exec` and `eval` only."""
    for file in registry_pack.rglob("*.py"):
        assert not re.search(r"subprocess|os\.system|os\.popen|os\.exec", file.read_text(encoding="utf-8")), file


def test_the_description_says_what_the_registry_wants() -> None:
    project = tomlkit.parse((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")).unwrap()
    name, comfy = project["project"]["name"], project["tool"]["comfy"]
    assert re.fullmatch(r"[a-z][a-z0-9-]{0,99}", name) and "comfyui" not in name
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["project"]["version"])
    assert comfy["DisplayName"] and re.fullmatch(r">=\d+\.\d+\.\d+", comfy["requires-comfyui"])
    asked = (REPOSITORY / "requirements.txt").read_text(encoding="utf-8").split()
    assert sorted(asked) == sorted(project["project"]["dependencies"])


@pytest.mark.parametrize("package", ["torch", "torchvision", "opencv-python"])
def test_no_package_of_the_hosts_is_asked_for(package: str) -> None:
    assert package not in (REPOSITORY / "requirements.txt").read_text(encoding="utf-8").lower()
