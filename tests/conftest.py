"""Data that several tests share."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

if TYPE_CHECKING:
    from pft_arch import PFTSR

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton: its kernels then run on this CPU

DATA = Path(__file__).parent / "data"
TINY: dict[str, Any] = {"embed_dim": 12, "num_blocks": (2, 3), "num_heads": 2, "window_size": 4, "top_k": 9}


class Golden:
    """One golden network: weights file, input, output, and further tensors where there are any."""

    def __init__(self, weights: Path) -> None:
        self.weights = weights
        self.name = weights.name.removesuffix(".weights.safetensors")
        self.io: dict[str, Tensor] = load_file(weights.with_name(f"{self.name}.io.safetensors"))

    @property
    def config(self) -> dict[str, Any]:
        with safe_open(self.weights, "pt") as file:
            return dict(json.loads(file.metadata()["config"]))

    @property
    def grad(self) -> dict[str, Tensor]:
        return load_file(self.weights.with_name(f"{self.name}.grad.safetensors"))


def golden_files(pattern: str = "*.weights.safetensors") -> list[Path]:
    """The golden files of the repository, and those of the folder PFT_GOLDEN where more of them are at hand."""
    folders = [DATA / "golden", *map(Path, filter(None, [os.environ.get("PFT_GOLDEN")]))]
    return sorted({path.name: path for folder in folders for path in folder.glob(pattern)}.values())


def same(a: PFTSR, b: PFTSR) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return a.config == b.config and left.keys() == right.keys() and all(map(torch.equal, left.values(), right.values()))


@pytest.fixture
def model() -> PFTSR:
    """Some network of no preset."""
    from pft_arch import PFTSR

    torch.manual_seed(0)
    return PFTSR(**TINY).eval()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Threads that wait for each other are most of the time of so small a network."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def photo() -> Tensor:
    """(1, 144, 192, 3) part of a photograph, with fine detail and a smooth sky."""
    import numpy as np
    from PIL import Image

    with Image.open(DATA / "photo.png") as image:
        return torch.tensor(np.asarray(image.convert("RGB")))[None].float() / 255


@pytest.fixture(scope="session")
def repository_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that git keeps, in a repository of their own."""
    from host.pack import copy_of_repository

    return copy_of_repository(tmp_path_factory.mktemp("registry") / "repository")


@pytest.fixture(scope="session")
def registry_pack(repository_copy: Path) -> Path:
    """The pack as the registry sends it to users."""
    from host.pack import unpacked

    return unpacked(repository_copy, repository_copy.parent / "pack")
