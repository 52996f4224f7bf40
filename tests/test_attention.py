"""Attention backends against the reference, layer by layer, and the reference against the published maps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest
import torch
from einops import rearrange
from torch import Tensor

from conftest import Golden, golden_files
from pft_arch import attention, load_model
from pft_arch.attention import BACKENDS, get_backend, reference, torch_backend
from pft_arch.attention.windows import (
    from_windows,
    regions,
    relative_position_bias,
    relative_position_index,
    to_windows,
)
from pft_arch.network import PFTBlock

# name: (window, heads, head width, kept per layer); shifted or not; H, W
CHAINS = {
    "dense": (8, 2, 8, (64, 64, 64)),
    "dense-until-wide": (4, 3, 4, (16, 16, 16, 16, 16)),
    "cut-at-once": (4, 2, 5, (7, 7, 3)),
    "late-cut": (6, 1, 13, (36, 36, 11, 11, 5)),
    "keep-one": (4, 2, 10, (16, 1, 1)),
    "wide-window": (16, 2, 10, (256, 60, 60, 9)),
}


@pytest.mark.parametrize("shifted", [False, True], ids=["unshifted", "shifted"])
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize(  # in float32 a borderline entry may be kept or not
    ("backend", "dtype", "bound"),
    [("torch", torch.float64, 1e-9), ("numba", torch.float32, 2e-4)],
    ids=lambda x: str(x),
)
def test_chain_equals_the_reference_forward_and_backward(
    backend: str, dtype: torch.dtype, bound: float, chain: str, shifted: bool
) -> None:
    if backend == "numba":
        pytest.importorskip("numba")
    window, heads, width, kept = CHAINS[chain]
    torch.manual_seed(1)
    size = (2, 2 * window, 3 * window, 3 * heads * width)
    inputs = [torch.randn(size, dtype=torch.float64, requires_grad=True) for _ in kept]
    columns = heads if chain != "dense" else 1
    tables = [torch.randn((2 * window - 1) ** 2, columns, dtype=torch.float64, requires_grad=True) for _ in kept]

    def run(name: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        attend, carry, outs = get_backend(name), None, []
        for qkv, table, keep in zip(inputs, tables, kept, strict=True):
            shift = window // 2 if shifted else 0
            out, carry = attend(
                qkv.to(dtype), table.to(dtype), carry, heads=heads, window=window, shift=shift, keep=keep
            )
            outs.append(out)
        loss = torch.stack([(out * (i + 1)).square().mean() for i, out in enumerate(outs)]).sum()
        return outs, list(torch.autograd.grad(loss, inputs + tables))

    outs, gradients = run(backend, dtype)
    expected_outs, expected_gradients = run("reference", torch.float64)
    for got, expected in zip(outs + gradients, expected_outs + expected_gradients, strict=True):
        assert (got - expected).detach().norm() <= bound * (expected.detach().norm() + 1e-3)  # some are zero


# An interpreted kernel is slow: it meets the reference once here, and float64 in test_triton.py.
KERNELS = [
    *(pytest.param("numba", torch.float32, chain, id=f"numba-{chain}") for chain in CHAINS),
    pytest.param("triton", torch.float32, "cut-at-once", id="triton-cut-at-once"),
]


@pytest.mark.parametrize("columns", ["shared", "per head"])
@pytest.mark.parametrize("shifted", [False, True], ids=["unshifted", "shifted"])
@pytest.mark.parametrize(("backend", "dtype", "chain"), KERNELS)
def test_kernels_equal_the_reference(backend: str, dtype: torch.dtype, chain: str, shifted: bool, columns: str) -> None:
    pytest.importorskip(backend)
    window, heads, width, kept = CHAINS[chain]
    torch.manual_seed(2)
    carry, expected_carry = None, None
    for keep in kept:
        qkv = torch.randn(1, window, 2 * window, 3 * heads * width).to(dtype)
        table = torch.randn((2 * window - 1) ** 2, heads if columns == "per head" else 1).to(dtype)
        options = {"heads": heads, "window": window, "shift": window // 2 if shifted else 0, "keep": keep}
        with torch.inference_mode():
            out, carry = get_backend(backend)(qkv, table, carry, **options)
            expected, expected_carry = reference.attend(qkv.double(), table.double(), expected_carry, **options)
        # in half precision a borderline entry may be kept or not, and carries are rounded
        bound = 1e-6 if dtype == torch.float32 else 1e-2
        assert float((out - expected).norm() / expected.norm()) < bound


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "reference"])
def test_every_backend_hands_gradients_on(name: str) -> None:
    pytest.importorskip(name)
    qkv = torch.randn(1, 4, 8, 3 * 8, requires_grad=True)
    table = torch.randn(49, 1, requires_grad=True)
    out, _ = get_backend(name)(qkv, table, None, heads=2, window=4, shift=2, keep=5)
    expected, _ = reference.attend(qkv, table, None, heads=2, window=4, shift=2, keep=5)
    for got, want in zip(
        torch.autograd.grad(out.square().sum(), (qkv, table)),
        torch.autograd.grad(expected.square().sum(), (qkv, table)),
        strict=True,
    ):
        assert torch.allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_the_default_type_of_torch_changes_nothing(backend: str) -> None:
    if backend == "numba":
        pytest.importorskip("numba")
    torch.manual_seed(0)
    layers = [(torch.randn(1, 8, 8, 24, requires_grad=True), torch.randn(49, 1), keep) for keep in (16, 5, 3)]

    def gradient() -> Tensor:
        carry = None
        for qkv, table, keep in layers:
            out, carry = get_backend(backend)(qkv, table, carry, heads=2, window=4, shift=2, keep=keep)
        return torch.autograd.grad(out.square().sum(), layers[0][0])[0]

    expected = gradient()
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(gradient(), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_gradients_reach_what_learns_where_the_first_layers_are_frozen(backend: str) -> None:
    if backend == "numba":
        pytest.importorskip("numba")
    torch.manual_seed(0)
    layers = [(torch.randn(1, 8, 8, 24), torch.randn(49, 1), keep) for keep in (16, 16, 5, 3)]

    def gradients(first: int) -> list[Tensor]:
        carry, learning = None, []
        for i, (qkv, table, keep) in enumerate(layers):
            qkv, table = (x.clone().requires_grad_(i >= first) for x in (qkv, table))
            learning += [qkv, table]
            out, carry = get_backend(backend)(qkv, table, carry, heads=2, window=4, shift=2, keep=keep)
        return list(torch.autograd.grad(out.square().sum(), learning[2 * first :]))

    everything = gradients(0)
    for first in (1, 2, 3):
        for got, expected in zip(gradients(first), everything[2 * first :], strict=True):
            assert torch.equal(got, expected)


def test_compiled_kernels_need_no_folder_to_write_to(tmp_path: Path) -> None:
    pytest.importorskip("numba")
    copytree(Path(attention.__file__).parents[1], tmp_path / "pft_arch", ignore=ignore_patterns("__pycache__"))
    (tmp_path / "pft_arch" / "attention" / "__pycache__").touch()  # a file where the folder would be
    (tmp_path / "home").touch()
    home = {name: str(tmp_path / "home") for name in ("HOME", "USERPROFILE", "LOCALAPPDATA", "XDG_CACHE_HOME")}
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    run = [sys.executable, "-c", "from pft_arch.attention import get_backend; print(get_backend('numba'))"]
    got = subprocess.run(run, cwd=tmp_path, env=environment | home, capture_output=True, text=True, check=False)
    assert "function attend" in got.stdout, got.stderr


@pytest.mark.parametrize("limit", [1, 2**9, 2**12])
def test_the_size_of_groups_changes_nothing(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    torch.manual_seed(0)
    layers = [(torch.randn(2, 16, 24, 3 * 18), torch.randn(225, 3), keep) for keep in (64, 64, 20, 9)]

    def run() -> Tensor:
        carry = None
        for qkv, table, keep in layers:
            out, carry = torch_backend.attend(qkv, table, carry, heads=3, window=8, shift=4, keep=keep)
        return out

    whole = run()
    monkeypatch.setattr(torch_backend, "CPU_GROUP", limit)
    assert torch.allclose(run(), whole, atol=1e-6)


@pytest.mark.skipif(
    not golden_files("tiny_classical_x2.weights.safetensors"), reason="the maps' golden file is not in PFT_GOLDEN"
)
def test_reference_maps_are_the_published_ones() -> None:
    golden = Golden(golden_files("tiny_classical_x2.weights.safetensors")[0])
    model = load_model(golden.weights, dtype=torch.float64)
    model.set_attention_backend("reference")
    seen: list[reference.AttentionMap] = []
    for module in model.modules():
        if isinstance(module, PFTBlock):
            module.register_forward_hook(lambda block, _, out: seen.append(out[1][int(block.shift_size > 0)]))
    with torch.no_grad():
        model(golden.io["input"].double())

    n = model.config.window_size**2
    for i, got in enumerate(seen):
        values, indices = golden.io[f"maps.{i}.values"].double(), golden.io.get(f"maps.{i}.indices")
        assert torch.allclose(spread(got.values, got.indices, n), spread(values, indices, n), atol=1e-6), f"layer {i}"
        if indices is not None:
            assert got.indices is not None
            weighty = values > 1e-12  # below that, entries are tied at the published epsilon and any may be kept
            assert ((got.indices[..., None] == indices[..., None, :].long()).any(-2) | ~weighty).all(), f"layer {i}"


def spread(values: Tensor, indices: Tensor | None, n: int) -> Tensor:
    """Kept entries as rows of n, so that their order does not matter."""
    if indices is None:
        return values
    return torch.zeros(*values.shape[:-1], n, dtype=values.dtype).scatter(-1, indices.long(), values)


@pytest.mark.parametrize("shift", [0, 2])
def test_windows_and_back_is_the_identity(shift: int) -> None:
    image = torch.rand(2, 8, 12, 3)
    windows = to_windows(image, 4, shift)
    assert windows.shape == (2 * 2 * 3, 16, 3)
    assert torch.equal(from_windows(windows, 4, shift, 8, 12), image)


def test_windows_keep_neighbours_together() -> None:
    image = torch.arange(64).view(1, 8, 8, 1)
    assert to_windows(image, 4, 0)[1, :, 0].tolist() == image[0, :4, 4:, 0].flatten().tolist()
    assert to_windows(image, 4, 2)[0, :, 0].tolist() == image[0, 2:6, 2:6, 0].flatten().tolist()


def test_regions_split_only_windows_that_wrap_around() -> None:
    region = rearrange(regions(12, 8, 4, 2, torch.device("cpu")), "(y x) n -> y x n", y=3)
    assert (region[:2, 0] == 0).all()
    assert [len(set(region[y, x].tolist())) for y, x in ((0, 1), (2, 0), (2, 1))] == [2, 2, 4]


@pytest.mark.parametrize("window", [2, 5, 8])
def test_bias_views_equal_the_indexed_table(window: int) -> None:
    table = torch.randn((2 * window - 1) ** 2, 3)
    expected = table[relative_position_index(window)].permute(2, 0, 1)
    assert torch.equal(relative_position_bias(table, window), expected)


def test_golden_files_are_found() -> None:
    assert {Path(path).name.split(".")[0] for path in golden_files()} >= {"pft_light_x2", "tiny_3conv_x4"}
