"""The Triton kernels in Triton's interpreter, against the torch backend in float64; what happens where they fail."""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
from importlib import reload
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import Golden, golden_files
from pft_arch import load_model
from pft_arch.attention import get_backend, torch_backend

pytest.importorskip("triton")
import check_triton
import interpreter
import triton
import triton.language as tl

from pft_arch.attention import triton_backend

ROOT = Path(__file__).parent.parent
Chain = check_triton.Chain


@pytest.fixture(autouse=True)
def _kernels_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure is kept for the process: no test may leave one behind, or pass on the torch backend unnoticed."""
    monkeypatch.setattr(triton_backend, "failure", "")


@pytest.mark.parametrize("name", check_triton.SMALL)
def test_outputs_and_gradients_equal_float64(name: str) -> None:
    result = check_triton.check(check_triton.SMALL[name], "fp32", gradients=True)
    assert result["passed"], result


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
def test_half_precision_is_close_to_float64(precision: str, gradients: bool) -> None:
    result = check_triton.check(Chain(4, 2, 10, (16, 16, 7, 7, 3), down=1), precision, gradients)
    assert result["passed"], result


def test_dense_layers_are_close_to_float64_in_bfloat16() -> None:
    result = check_triton.check(check_triton.SMALL["dense, then a map"], "bf16", gradients=True)
    assert result["passed"], result


def test_three_products_of_tf32_are_as_good_as_one_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries and keys of two layers of the widest heads side by side, a map, a cut; "tf32" alone would lose 1e-3."""
    monkeypatch.setattr(triton_backend, "SPARSE_TILE", 2**14)
    result = check_triton.check(Chain(16, 1, 40, (256, 256, 60), down=1, across=1), "fp32", gradients=False)
    assert max(result["outputs"]) < 1e-6, result


@pytest.mark.parametrize("seed", range(4))
def test_random_shapes_and_schedules(seed: int) -> None:
    """Windows 2 to 6, any head width and any falling schedule, odd numbers of windows, both kinds of tables."""
    draw = random.Random(seed)
    window, heads = draw.randint(2, 6), draw.randint(1, 2)
    kept = sorted((draw.randint(1, window**2) for _ in range(2)), reverse=True)
    chain = Chain(
        window,
        heads,
        width=draw.choice((1, 3, 8, 10, 13, 17, 40)),
        kept=(*[window**2] * draw.randint(0, 1), *kept),
        shifted=draw.random() < 0.5,
        bias_per_head=draw.random() < 0.5,
        down=draw.randint(1, 2),
        across=1,
    )
    result = check_triton.check(chain, "fp32", gradients=True, seed=seed)
    assert result["passed"], (chain, result)


def test_first_cut_of_the_published_window() -> None:
    """A quarter of the entries is kept, so that the cut falls where they lie close together."""
    result = check_triton.check(Chain(32, 1, 13, (256,), shifted=False, down=1, across=1), "fp16", gradients=False)
    assert max(result["outputs"]) < 2e-3, result


def test_a_network_and_its_gradients_equal_the_published_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SPARSE_TILE", "BACKWARD_TILE"):
        monkeypatch.setattr(triton_backend, name, 2**14)
    path = golden_files("tiny_3conv_x4.weights.safetensors")[0]
    golden = Golden(path)
    expected = {k.removeprefix("grad."): v for k, v in golden.grad.items() if k.startswith("grad.")}
    probe = next(value for key, value in golden.grad.items() if "probe" in key)
    model = load_model(path).train()
    model.set_attention_backend("triton")
    image = golden.io["input"].requires_grad_()

    picture = model(image)
    (picture * probe).mean().backward()

    assert not triton_backend.failure
    assert (picture - golden.io["output"]).abs().max() < 5e-3
    got = {"input": image.grad, **{name: parameter.grad for name, parameter in model.named_parameters()}}
    for name, value in expected.items():
        assert check_triton.relative_error(got[name], value) < 1e-3, name  # borderline cuts in float32


@triton.jit
def faulty(read_ptr, write_ptr, fault: tl.constexpr):
    """Two programs copy four numbers each."""
    i = tl.program_id(0) * 4 + tl.arange(0, 4)
    beyond = i + 1
    numbers = tl.load(read_ptr + (beyond if fault == "reads beyond" else i))
    if fault == "overlaps":
        i = tl.arange(0, 4)
    elif fault == "writes beyond":
        i = beyond
    tl.store(write_ptr + i, numbers)
    if fault == "reads again":
        numbers += tl.load(write_ptr + i)
    if fault == "adds to what it wrote":
        tl.atomic_add(write_ptr + i, numbers)


@pytest.mark.parametrize(
    "fault", ["", "reads beyond", "writes beyond", "overlaps", "reads again", "adds to what it wrote", "in place"]
)
def test_the_interpreter_watches_memory(fault: str) -> None:
    """None of these faults passes; copying does, and so does writing where the same program has read before."""
    numbers, copied = torch.arange(8.0), torch.zeros(8)
    found = False
    with interpreter.like_a_gpu():
        try:
            triton_backend._launch(faulty, 2, numbers, numbers if fault == "in place" else copied, fault=fault)
        except (AssertionError, triton_backend.KernelError):
            found = True
    assert found == (fault not in ("", "in place"))


def layers(count: int, **options: Any) -> list[Tensor]:
    """Images of queries, keys and values of 1 x 2 windows of side 4, 2 heads of width 5."""
    torch.manual_seed(0)
    return [torch.randn(1, 4, 8, 30, **options) for _ in range(count)]


OPTIONS = {"heads": 2, "window": 4, "shift": 2}
TABLE = torch.linspace(-1, 1, 49)[:, None]


@pytest.mark.parametrize(
    ("dtype", "gradients", "expected"),
    [
        (torch.float32, False, torch.float32),
        (torch.float16, False, torch.float16),
        (torch.float16, True, torch.float32),  # gradients flow through the carry
    ],
)
def test_carries_are_as_small_as_the_precision_allows(
    dtype: torch.dtype, gradients: bool, expected: torch.dtype
) -> None:
    carry = None
    for qkv, keep in zip(layers(2, dtype=dtype), (7, 3), strict=True):
        with torch.set_grad_enabled(gradients):
            _, carry = triton_backend.attend(qkv, TABLE, carry, keep=keep, **OPTIONS)
        assert carry.logits.dtype == expected
        assert carry.indices.dtype == torch.int16
        assert carry.logits.shape == carry.indices.shape == (4, 16, keep)


def test_an_image_that_is_not_finite_leaves_no_index_unwritten() -> None:
    carry = None
    for qkv, keep in zip(layers(2), (7, 3), strict=True):
        with torch.inference_mode():
            _, carry = triton_backend.attend(qkv * float("nan"), TABLE, carry, keep=keep, **OPTIONS)
        kept = carry.indices.long()
        assert kept.min() >= 0 and kept.max() < 16
        assert (kept.diff(dim=-1) > 0).all()  # no key twice


def test_a_map_serves_one_layer_unless_gradients_are_recorded() -> None:
    qkv = layers(1)[0]
    with torch.inference_mode():
        _, carry = triton_backend.attend(qkv, TABLE, None, keep=7, **OPTIONS)
        room = carry.logits.data_ptr()
        _, new = triton_backend.attend(qkv, TABLE, carry, keep=7, **OPTIONS)
        assert new.logits.data_ptr() == room  # written over, as inference needs no second one
        with pytest.raises(ValueError, match="serves one layer"):
            triton_backend.attend(qkv, TABLE, carry, keep=7, **OPTIONS)
    _, carry = triton_backend.attend(qkv, TABLE, None, keep=7, **OPTIONS)
    first, _ = triton_backend.attend(qkv, TABLE, carry, keep=7, **OPTIONS)
    again, _ = triton_backend.attend(qkv, TABLE, carry, keep=7, **OPTIONS)
    assert torch.equal(first, again)


@pytest.mark.parametrize("failing", [1, 2, 3], ids=["after dense", "after a dense map", "after a cut"])
def test_a_chain_goes_on_in_torch_wherever_the_kernels_fail(
    failing: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """From layer `failing` on a kernel does not start: it is called with the arguments of another."""
    torch.manual_seed(0)
    options = {"heads": 2, "window": 8, "shift": 4}
    table = torch.randn(225, 2)
    carry, expected_carry = None, None
    with torch.inference_mode(), caplog.at_level(logging.WARNING):
        for i, keep in enumerate((64, 64, 20, 20, 9)):
            qkv = torch.randn(1, 8, 16, 3 * 8)
            if i == failing:
                monkeypatch.setattr(triton_backend.triton_kernels, "pack", triton_backend.triton_kernels.dense)
            out, carry = triton_backend.attend(qkv, table, carry, keep=keep, **options)
            expected, expected_carry = torch_backend.attend(qkv, table, expected_carry, keep=keep, **options)
            assert torch.allclose(out, expected, atol=1e-5), f"layer {i}"
    assert triton_backend.failure
    assert len([r for r in caplog.records if "plain torch" in r.getMessage()]) == 1


def test_after_a_backward_kernel_failed_training_can_go_on_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"heads": 2, "window": 8, "shift": 0, "keep": 64}
    qkv, table = torch.randn(1, 8, 8, 3 * 8, requires_grad=True), torch.randn(225, 2)
    out, _ = triton_backend.attend(qkv, table, None, **options)
    monkeypatch.setattr(triton_backend.triton_kernels, "keys_backward", triton_backend.triton_kernels.dense)
    with pytest.raises(triton_backend.KernelError, match="does not run here"):
        out.sum().backward()
    triton_backend.attend(qkv, table, None, **options)[0].sum().backward()
    assert qkv.grad is not None


def test_without_a_gpu_the_compiled_kernels_hand_over_to_torch_with_one_line_of_log() -> None:
    code = """
import torch
from pft_arch import create_pft_sr
from pft_arch.attention import triton_backend
triton_backend.serves = lambda device, dtype: not triton_backend.failure  # start them, GPU or not
model = create_pft_sr(2, "light").eval()
model.set_attention_backend("triton")
image = torch.rand(1, 3, 8, 8)
with torch.inference_mode():
    first, again = model(image), model(image)
    model.set_attention_backend("torch")
    assert torch.equal(first, model(image)) and torch.equal(again, first)
assert triton_backend.failure
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("plain torch") == 1, done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_compiled_is_compared_with_torch_before_use(dtype: torch.dtype) -> None:
    triton_backend.agrees.cache_clear()
    assert triton_backend.agrees(torch.device("cpu"), dtype)
    assert not triton_backend.failure


def test_kernels_that_compute_something_else_are_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def miscompiled(kernel: Any, programs: int, *arguments: Tensor, **constants: Any) -> None:
        launch(kernel, programs, *arguments, **constants)
        if kernel is triton_backend.triton_kernels.sparse:
            arguments[6].mul_(0.9)  # its output

    launch = triton_backend._launch
    monkeypatch.setattr(triton_backend, "_launch", miscompiled)
    triton_backend.agrees.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert not triton_backend.agrees(torch.device("cpu"), torch.float32)
    triton_backend.agrees.cache_clear()
    assert not triton_backend.serves(torch.device("cpu"), torch.float32)
    assert [r.getMessage() for r in caplog.records if "plain torch" in r.getMessage() and "10.0%" in r.getMessage()]


@pytest.mark.parametrize(("capability", "served"), [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_kernels_serve_gpus_from_ampere_on(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], served: bool
) -> None:
    monkeypatch.setattr(triton_backend, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert triton_backend.serves(torch.device("cuda"), torch.float16) is served


def test_the_automatic_backend_on_a_cpu_does_not_import_triton() -> None:
    code = """
import sys, torch
from pft_arch.attention import get_backend
get_backend("auto")(torch.rand(1, 4, 8, 30), torch.rand(49, 1), None, heads=2, window=4, shift=2, keep=3)
assert "triton" not in sys.modules
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_a_triton_that_ends_the_process_on_these_kernels_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling the first cut in float32, 3.2 calls abort()."""
    monkeypatch.setattr(triton, "__version__", "3.2.0")
    with pytest.raises(ImportError, match=r"3\.3"):
        reload(triton_backend)


def test_what_the_kernels_do_not_serve_is_the_torch_backends() -> None:
    qkv = layers(1, dtype=torch.float64)[0]
    out, _ = get_backend("triton")(qkv, TABLE.double(), None, keep=5, **OPTIONS)
    expected, _ = torch_backend.attend(qkv, TABLE.double(), None, keep=5, **OPTIONS)
    assert torch.equal(out, expected)


def test_what_the_compiler_makes_of_the_kernels_is_right_too() -> None:
    """Code for two GPUs, run by `ptx`: every kernel, every kind of product, forward and backward."""
    pytest.importorskip("triton.backends.nvidia")
    code = """
import check_triton as c
for label, precision, capability in (
    ("dense, then a map", "bf16", 90), ("cut at once", "fp16", 80), ("all kinds of layers", "fp32", 80)
):
    result = c.check(c.SMALL[label], precision, gradients=True, capability=capability)
    assert result["passed"], (label, result)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "benchmarks")))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    if "ptxas" in done.stderr or "NotImplementedError" in done.stderr:
        pytest.skip(f"Triton comes without an assembler, or makes what ptx does not know: {done.stderr[-200:]}")
    assert done.returncode == 0, done.stderr


def test_kernels_compile_for_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    """The cut 64 -> 32 of `pft_light` in float16 for an H100: registers and no spills."""
    pytest.importorskip("triton.backends.nvidia")
    only = "sparse d=13 n=1024 kept=64 keep=32 rows"
    command = [sys.executable, str(ROOT / "benchmarks" / "triton_aot.py"), "--json", str(tmp_path / "aot.json")]
    command += ["--presets", "pft_light", "--dtypes", "fp16", "--capabilities", "90", "--only", only]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if "ptxas" in done.stdout and "error=" in done.stdout:
        pytest.skip("Triton comes without an assembler here")
    assert done.returncode == 0, done.stderr
    assert "spills=0" in done.stdout and "error=" not in done.stdout, done.stdout
