"""The memory model against what torch allocates."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from pft_arch import PFTSR, create_pft_sr
from pft_arch.attention import get_backend
from pft_arch.benchmark import peak_memory
from pft_arch.memory import peak_bytes
from pft_arch.upscale import SHARE_OF_FREE, auto_tile

upscaling = import_module("pft_arch.upscale")  # the package's own `upscale` is the function
SPARSE = {"embed_dim": 24, "num_blocks": (2, 4), "num_heads": 3, "window_size": 16, "kernel_size": 5}


@pytest.mark.parametrize(
    ("backend", "dtype", "arguments", "size"),
    [
        ("torch", torch.float32, {"top_k": (256, 256, 100, 100, 40, 40), **SPARSE}, 64),
        ("numba", torch.float32, {"top_k": (256, 256, 100, 100, 40, 40), **SPARSE}, 64),
        ("torch", torch.bfloat16, {"num_blocks": (2, 4)}, 64),
        ("torch", torch.float32, {"num_blocks": (2,), "scale": 4, "upsampler": "nearest+conv"}, 60),  # the head's peak
    ],
)
def test_peak_is_predicted_within_15_percent(
    backend: str, dtype: torch.dtype, arguments: dict[str, object], size: int
) -> None:
    if backend == "numba":
        pytest.importorskip("numba")
    model = PFTSR(**arguments).eval().to(dtype)  # type: ignore[arg-type]
    model.set_attention_backend(backend)
    image = torch.rand(1, 3, size, size + 3)
    with torch.inference_mode():
        model(image)
        measured = peak_memory(lambda: model(image), torch.device("cpu"))
    assert peak_bytes(model, size, size + 3) == pytest.approx(measured, rel=0.15)


def test_automatic_tiles_fit_free_memory_and_no_larger_would(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        model = create_pft_sr(2, "pft")
    for free in (3 * 2**30, 8 * 2**30):
        monkeypatch.setattr(upscaling, "free_memory", lambda _, free=free: free)
        side = auto_tile(model, 4000, 3000)
        assert peak_bytes(model, side, side) <= SHARE_OF_FREE * free < peak_bytes(model, side + 32, side + 32)


def test_kernels_that_failed_are_counted_as_torch_which_works_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    model = PFTSR(top_k=(256, 256, 100, 100, 40, 40), **SPARSE)  # type: ignore[arg-type]
    peaks = []
    for backend in ("torch", "triton"):
        model.set_attention_backend(backend)
        peaks.append(peak_bytes(model, 64, 64))
    assert peaks[1] < peaks[0]
    monkeypatch.setattr("pft_arch.attention.triton_backend.failure", "no compiler")
    assert peak_bytes(model, 64, 64) == peaks[0]


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_a_map_is_let_go_when_it_is_used(backend: str) -> None:
    if backend == "numba":
        pytest.importorskip("numba")
    attend = get_backend(backend)
    qkv, table = torch.randn(1, 8, 8, 36), torch.zeros(49, 1)
    options = {"heads": 2, "window": 4, "shift": 0}
    with torch.inference_mode():
        _, first = attend(qkv, table, None, keep=6, **options)
        attend(qkv, table, first, keep=6, **options)
        with pytest.raises(ValueError, match="one layer only"):
            attend(qkv, table, first, keep=6, **options)
