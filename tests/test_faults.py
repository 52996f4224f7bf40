"""What goes wrong in a long night, made to go wrong: in the library, at the command line, and in a real ComfyUI.

After every fault the picture is right or the error is clear, no tensor is left over, and the next run is as good as
the first. Each case is a row of the table in docs/reliability.md, which `python benchmarks/faults.py` makes.
"""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from host.server import REPOSITORY, Graph, Host, Run
from pft_arch import PFTSR, load_model, upscale
from pft_arch.cli import main
from pft_arch.weights import save_model

CONFIG: dict[str, Any] = {"embed_dim": 12, "num_blocks": (2, 2), "num_heads": 2, "window_size": 8}
OPTIONS = {"tile": 48, "overlap": 16}
pytestmark = pytest.mark.usefixtures("one_thread")
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of a process as Linux has them")


def fault(where: str, what: str, end: str) -> pytest.MarkDecorator:
    """What the test's row in the table says."""
    return pytest.mark.fault(where, what, end)


@pytest.fixture(autouse=True)
def _row(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> None:
    for mark in request.node.iter_markers("fault"):
        for name, text in zip(("where", "fault", "end"), mark.args, strict=True):
            record_property(name, text)


@pytest.fixture(autouse=True)
def _a_tile_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["pft_arch.upscale"], "BATCH_PIXELS", 1)  # the package's upscale is the function


def network(seed: int = 0) -> PFTSR:
    torch.manual_seed(seed)
    model = PFTSR(**CONFIG, top_k=(64, 64, 24, 24), upsampler="pixelshuffledirect")
    with torch.no_grad():
        model.get_submodule("upsample.0").weight *= 0.2  # type: ignore[operator]  # clear of the clamp
    return model.eval()


@pytest.fixture(scope="module")
def model() -> PFTSR:
    return network()


@contextmanager
def at_pass(module: nn.Module, number: int, happens: Callable[[], object]) -> Iterator[list[int]]:
    """`happens` before the number-th call of a module, counted from 0, or before each with -1. Gives all calls."""
    calls: list[int] = []

    def hook(*_: object) -> None:
        calls.append(len(calls))
        if calls[-1] == number or number == -1:
            happens()

    handle = module.register_forward_pre_hook(hook)
    try:
        yield calls
    finally:
        handle.remove()


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


def error_of(act: Callable[[], object]) -> str:
    """What is raised, as text: the error itself would keep the failed pass's tensors."""
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    pytest.fail("no error")


def passes(model: PFTSR, image: Tensor, options: dict[str, int] = OPTIONS) -> int:
    with at_pass(model, -2, lambda: None) as calls:
        upscale(image, model, **options)
    return len(calls)


def alive() -> int:
    """Bytes of all tensors there are."""
    gc.collect()
    return sum(o.nbytes for o in gc.get_objects() if issubclass(type(o), Tensor))


@contextmanager
def unharmed(model: PFTSR, image: Tensor) -> Iterator[Tensor]:
    """Gives the right picture; asserts afterwards that no tensor is left over, and that the next run makes it too."""
    right = upscale(image, model, **OPTIONS)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    before = alive()
    yield right
    assert alive() == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(upscale(image, model, **OPTIONS), right)


# the library


@pytest.mark.parametrize(
    "place",
    [
        pytest.param(place, marks=fault("library", f"out of memory at the {place} tile", "right picture"))
        for place in ("first", "middle", "last")
    ],
)
def test_out_of_memory_at_a_tile(model: PFTSR, photo: Tensor, place: str) -> None:
    last = passes(model, photo) - 1
    with unharmed(model, photo) as right:
        with at_pass(model, {"first": 0, "middle": last // 2, "last": last}[place], out_of_memory) as calls:
            out = upscale(photo, model, **OPTIONS)
        assert len(calls) > last + 1  # the tile was done again, in parts
        assert (out - right).abs().mean() < 1e-3
        del out


@fault("library", "out of memory inside a layer, with attention maps carried", "right picture")
def test_out_of_memory_inside_the_network(model: PFTSR, photo: Tensor) -> None:
    with unharmed(model, photo) as right:
        with at_pass(model.layers[1], 3, out_of_memory):
            out = upscale(photo, model, **OPTIONS)
        assert (out - right).abs().mean() < 1e-3
        del out


@fault("library", "out of memory at every size of tile", "clear error")
def test_out_of_memory_everywhere(model: PFTSR, photo: Tensor) -> None:
    with unharmed(model, photo):
        with at_pass(model, -1, out_of_memory):
            told = error_of(lambda: upscale(photo, model, **OPTIONS))
        assert "MemoryError: cpu has no room for even the smallest tile" in told


def limited(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script that limits itself."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", LIMIT + script, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


LIMIT = """
import os, resource, sys, torch
from pft_arch import PFTSR, load_model, upscale

def leave(megabytes):
    "Let this process have so much memory more; with None as much as there is."
    size = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    limit = resource.RLIM_INFINITY if megabytes is None else size + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
"""


@LINUX
@fault("library", "the operating system refuses memory for a pass (RLIMIT_AS)", "right picture")
def test_memory_that_the_system_refuses() -> None:
    done = limited(
        """
torch.manual_seed(0)
model = PFTSR(embed_dim=48, num_blocks=(1,), num_heads=2, window_size=8, upsampler="pixelshuffledirect").eval()
image = torch.rand(1, 256, 256, 3)
right = upscale(image, model, tile=64)
upscale(image[:, :128, :128], model, tile=128)
leave(24)
out = upscale(image, model, tile=256)
leave(None)
assert (out - right).abs().mean() < 1e-3, (out - right).abs().mean()
assert (upscale(image, model, tile=64) - right).abs().max() < 1e-6
"""
    )
    assert done.returncode == 0, done.stderr
    assert "out of memory at 256 x 256 pixels; going on with tiles of 128" in done.stderr


@LINUX
@pytest.mark.parametrize(
    "suffix",
    [
        pytest.param(s, marks=fault("library", f"no memory while loading a {s} file (RLIMIT_AS)", "clear error"))
        for s in (".safetensors", ".pth")
    ],
)
def test_no_memory_while_loading(tmp_path: Path, suffix: str) -> None:
    large, path = PFTSR(embed_dim=240, num_blocks=(6,), num_heads=6, window_size=16), tmp_path / f"large{suffix}"
    if suffix == ".pth":
        torch.save(large.state_dict(), path)
    else:
        save_model(large, path)
    done = limited(
        """
from pft_arch import PFTConfig
config = PFTConfig(embed_dim=240, num_blocks=(6,), num_heads=6, window_size=16)
load_model(sys.argv[1], config=config)  # what torch imports on first use is not what is tried
for megabytes in (2, 12, 30):
    leave(megabytes)
    try:
        load_model(sys.argv[1], config=config)
    except MemoryError as error:
        print(error)
    leave(None)
load_model(sys.argv[1], config=config)
""",
        path,
    )
    assert done.returncode == 0, done.stderr
    assert f"{path}: not enough memory to load it" in done.stdout


def wild() -> PFTSR:
    """Weights whose values fit half precision, and whose features do not."""
    model = network(1)
    with torch.no_grad():
        model.layers[0].conv.weight *= 2e5  # type: ignore[union-attr, operator]
        model.conv_after_body.weight *= 1e-4  # type: ignore[operator]
    return model


@fault("library", "values beyond half precision", "right picture")
def test_values_beyond_half_precision(photo: Tensor) -> None:
    half, exact = wild().half(), wild().half().float()
    assert not half(photo.permute(0, 3, 1, 2)).isfinite().all()
    with unharmed(half, photo) as out:
        assert torch.equal(out, upscale(photo, exact, **OPTIONS))
    assert next(half.parameters()).dtype == torch.float16


@fault("library", "weights whose output is never finite", "clear error")
def test_never_finite(model: PFTSR, photo: Tensor) -> None:
    broken = network()
    with torch.no_grad():
        broken.conv_first.weight[0] = float("inf")
    with unharmed(model, photo):
        assert "not finite, in float32 too" in error_of(lambda: upscale(photo, broken, **OPTIONS))


class Cancelled(BaseException):
    """As hosts and Ctrl-C have it: no Exception."""


@fault("library", "cancel before each tile in turn", "stops there")
def test_cancel_at_each_tile(model: PFTSR, photo: Tensor) -> None:
    small = photo[:, :80, :100]
    total = passes(model, small)
    assert total > 4
    with unharmed(model, small):
        for number in range(total):
            checks = iter(range(total))

            def check(number: int = number, checks: Iterator[int] = checks) -> None:
                if next(checks) == number:
                    raise Cancelled

            try:
                with at_pass(model, -2, lambda: None) as calls:
                    upscale(small, model, check_cancel=check, **OPTIONS)
            except Cancelled:
                assert len(calls) == number
            else:
                pytest.fail("not cancelled")


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(v, marks=fault("library", f"{v} in the image, in one tile", "right picture elsewhere"))
        for v in (float("nan"), float("inf"), -float("inf"), 7.0, -7.0)
    ],
)
def test_values_that_are_no_colours(model: PFTSR, photo: Tensor, value: float) -> None:
    spoilt = photo.clone()
    spoilt[0, 3, 3] = value
    clean = photo.clone()
    clean[0, 3, 3] = float(value > 0)
    with unharmed(model, photo) as right:
        out = upscale(spoilt, model, **OPTIONS)
        assert torch.equal(out, upscale(clean, model, **OPTIONS))
        assert torch.equal(out[:, 200:, 300:], right[:, 200:, 300:])
        del out


@pytest.mark.parametrize(
    "how",
    [
        pytest.param("replaced", marks=fault("library", "weights file replaced while running", "right picture")),
        pytest.param("cut", marks=[LINUX, fault("library", "weights file cut short while running", "right picture")]),
    ],
)
def test_weights_that_change_while_running(tmp_path: Path, how: str) -> None:
    save_model(network(), tmp_path / "a.safetensors")
    save_model(network(5), tmp_path / "b.safetensors")
    done = limited(  # a program of its own: where a file is mapped into memory, cutting it kills
        """
torch.manual_seed(0)
a, b, how = sys.argv[1:]
image = torch.rand(1, 90, 90, 3)
model = load_model(a)
right = upscale(image, model, tile=32)
def spoil(done, total):
    if done == 1 and how == "replaced":
        os.replace(b, a)
    if done == 1 and how == "cut":
        os.truncate(a, 3000)
sys.modules["pft_arch.upscale"].BATCH_PIXELS = 1
assert torch.equal(upscale(image, model, tile=32, progress=spoil), upscale(image, model, tile=32))
assert (upscale(image, model, tile=32) - right).abs().max() < 1e-5
if how == "replaced":
    assert not torch.equal(upscale(image, load_model(a), tile=32), right)
else:
    try:
        load_model(a)
    except ValueError as error:
        assert "cut or damaged" in str(error), error
    else:
        raise SystemExit("a cut file was loaded")
""",
        tmp_path / "a.safetensors",
        tmp_path / "b.safetensors",
        how,
    )
    assert done.returncode == 0, (done.returncode, done.stderr)


@LINUX
@fault("library", "weights file cut short while it is loaded", "right picture")
def test_weights_that_are_cut_while_they_are_loaded(tmp_path: Path) -> None:
    save_model(network(), tmp_path / "a.safetensors")
    done = limited(
        """
import pft_arch.weights as weights
image = torch.rand(1, 20, 20, 3)
right = upscale(image, load_model(sys.argv[1]))
is_pft = weights.is_pft
def cut(keys):  # asked when the file was opened, before its data is looked at
    os.truncate(sys.argv[1], 3000)
    return is_pft(keys)
weights.is_pft = cut
assert torch.equal(upscale(image, load_model(sys.argv[1])), right)
""",
        tmp_path / "a.safetensors",
    )
    assert done.returncode == 0, (done.returncode, done.stderr)


@pytest.mark.parametrize(
    "place",
    [
        pytest.param("between", marks=fault("library", "network cast by a thread between tiles", "right picture")),
        pytest.param("within", marks=fault("library", "network cast by a thread within a tile", "right picture")),
    ],
)
def test_a_network_that_others_move(model: PFTSR, photo: Tensor, place: str) -> None:
    """As a host that evicts models does; to another precision, for want of a second device."""

    def cast() -> None:
        thread = threading.Thread(target=moved.half)
        thread.start()
        thread.join()

    moved = network()
    right = upscale(photo, model, **OPTIONS)
    with at_pass(moved if place == "between" else moved.layers[1], 3, cast):
        out = upscale(photo, moved, **OPTIONS)
    # in half precision from there on, or brought back, its weights rounded once
    assert (out - right).abs().max() < (2e-2 if place == "between" else 1e-3)
    moved.float()
    assert (upscale(photo, moved, **OPTIONS) - right).abs().max() < 2e-2


# the command line


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with four images in in/ and weights, to work in."""
    monkeypatch.chdir(tmp_path)
    save_model(network(), tmp_path / "weights.safetensors")
    random = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for number in range(4):
        Image.fromarray(random.integers(0, 256, (60, 50, 3), dtype=np.uint8)).save(tmp_path / "in" / f"{number}.png")
    return tmp_path


UPSCALE = ("upscale", "in", "-m", "weights.safetensors", "--device", "cpu", "--tile", "32", "-o")


def contents(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())} if Path(folder).is_dir() else {}


@pytest.fixture
def right(work: Path) -> dict[str, bytes]:
    """What comes of the four where nothing goes wrong."""
    assert main([*UPSCALE, "right"]) == 0
    return contents("right")


@contextmanager
def at_image(number: int, happens: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`happens` at the passes of the number-th image that is read, from 0."""
    from pft_arch import images

    read, forward = images.read_image, PFTSR.forward
    count: list[Path] = []

    def reading(path: Path, **options: Any) -> Any:
        count.append(path)
        return read(path, **options)

    def working(self: PFTSR, image: Tensor) -> Tensor:
        if len(count) == number + 1:
            happens()
        return forward(self, image)

    with monkeypatch.context() as patch:
        patch.setattr(images, "read_image", reading)
        patch.setattr(PFTSR, "forward", working)
        yield


@fault("command line", "out of memory for one image of four", "listed, others done")
def test_one_image_without_memory(
    work: Path, right: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with at_image(1, out_of_memory, monkeypatch):
        assert main([*UPSCALE, "out"]) == 1
    assert contents("out") == {name: data for name, data in right.items() if name != "1.png"}
    assert "1 of 4 files failed" in (told := capsys.readouterr().err)
    assert "1.png: cpu has no room for even the smallest tile" in told
    assert main([*UPSCALE, "out", "--overwrite"]) == 0
    assert contents("out") == right


@fault("command line", "images deleted and cut short before they are read", "listed, others done")
def test_images_that_vanish(
    work: Path, right: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoil() -> None:
        Path("in/1.png").unlink(missing_ok=True)
        os.truncate("in/2.png", 500)

    with at_image(0, spoil, monkeypatch):
        assert main([*UPSCALE, "out"]) == 1
    assert contents("out") == {name: right[name] for name in ("0.png", "3.png")}
    told = capsys.readouterr().err
    assert "1.png: no such file" in told and "2.png: is damaged or incomplete" in told


@fault("command line", "output folder deleted while an image is at work", "made again")
def test_a_folder_that_vanishes(work: Path, right: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    with at_image(1, lambda: shutil.rmtree("out", ignore_errors=True), monkeypatch):
        assert main([*UPSCALE, "out"]) == 0
    assert contents("out") == {name: data for name, data in right.items() if name != "0.png"}


@fault("command line", "weights file replaced while running", "right pictures")
def test_weights_replaced_in_mid_job(work: Path, right: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    with at_image(1, lambda: save_model(network(5), "weights.safetensors"), monkeypatch):
        assert main([*UPSCALE, "out"]) == 0
    assert contents("out") == right


def program(*arguments: str, before: Callable[[], None] | None = None) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "pft_arch", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, text=True, stdout=pipe, stderr=pipe, preexec_fn=before)


@LINUX
@fault("command line", "no space for a file (RLIMIT_FSIZE)", "clear error, the old file kept")
def test_a_full_disk(work: Path, right: dict[str, bytes]) -> None:
    import resource

    Path("out").mkdir()
    Path("out/1.png").write_bytes(b"was there before")
    small = 500  # bytes
    job = program(
        *UPSCALE, "out", "--overwrite", before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (small, small))
    )
    _, told = job.communicate(timeout=300)
    assert job.returncode == 1
    assert "out/1.png: not written, the disk is full" in told and "Traceback" not in told
    assert contents("out") == {"1.png": b"was there before"}
    assert main([*UPSCALE, "out", "--overwrite"]) == 0
    assert contents("out") == right


@LINUX
@fault("command line", "killed in mid-job (SIGKILL)", "whole files only, the next run does the rest")
def test_killed_in_mid_job(work: Path, right: dict[str, bytes]) -> None:
    for number in range(4, 60):
        shutil.copy("in/0.png", f"in/{number}.png")
    job = program(*UPSCALE, "out")
    end = time.monotonic() + 300
    while sum(name[0] != "." for name in contents("out")) < 2:
        assert job.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    job.send_signal(signal.SIGKILL)
    job.communicate(timeout=60)
    done = {name: data for name, data in contents("out").items() if not name.startswith(".")}
    assert 2 <= len(done) < 60
    assert all(data == right.get(name, right["0.png"]) for name, data in done.items())
    for name in done:
        Path("in", name).unlink()
    assert main([*UPSCALE, "out"]) == 0
    whole = {name: data for name, data in contents("out").items() if not name.startswith(".")}
    assert len(whole) == 60 and all(data == right.get(name, right["0.png"]) for name, data in whole.items())


# a real ComfyUI


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    home = os.environ.get("PFT_TEST_HOST")
    if not home:
        pytest.skip("PFT_TEST_HOST does not name a directory that tests/host/make_host.py made")
    base = tmp_path_factory.mktemp("host")
    pack = base / "custom_nodes" / "faults"
    pack.mkdir(parents=True)
    shutil.copy(REPOSITORY / "tests" / "host" / "faults_pack.py", pack / "__init__.py")
    with Host(Path(home), base) as running:
        with Image.open(REPOSITORY / "tests" / "data" / "photo.png") as photo:
            running.add_input("photo.png", photo.convert("RGB"))
        yield running


def graph(file: Path, fault: str = "", at: int = 0, precision: str = "fp32") -> Graph:
    """The four nodes of every day, with a fault between loading and upscaling."""
    inputs = {"upscale_model": ["model", 0], "image": ["image", 0], "fault": fault, "at": at, "file": str(file)}
    upscaling = {"upscale_model": ["fault", 0], "image": ["fault", 1], **OPTIONS}
    loading = {"model": "light_x2", "precision": precision, "file": str(file)}
    return {
        "image": {"class_type": "LoadImage", "inputs": {"image": "photo.png"}},
        "model": {"class_type": "PFTSRLoadModel", "inputs": loading},
        "fault": {"class_type": "PFTFault", "inputs": inputs},
        "upscale": {"class_type": "PFTSRUpscale", "inputs": upscaling},
        "save": {"class_type": "SaveImage", "inputs": {"images": ["upscale", 0], "filename_prefix": "fault"}},
    }


def picture(run: Run) -> np.ndarray[Any, Any]:
    assert run.ending == "execution_success", run.error
    return np.asarray(run.images[0]).astype(int)


@contextmanager
def host_unharmed(host: Host, file: Path) -> Iterator[np.ndarray[Any, Any]]:
    """Gives the right picture; asserts afterwards that the next run makes it, and that no tensor is left over."""
    right = picture(host.run(graph(file)))
    before = host.get("/tensors")
    yield right
    assert (picture(host.run(graph(file))) == right).all()
    assert host.get("/tensors") == before


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    save_model(network(), path)
    return path


@pytest.fixture
def host_passes(photo: Tensor, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.undo()  # the host takes many tiles to a pass
    return passes(network(), photo)


def test_the_hosts_picture_is_the_librarys(host: Host, file: Path, photo: Tensor) -> None:
    want = (upscale(photo, load_model(file), **OPTIONS)[0].numpy() * 255).astype(np.uint8)
    assert np.abs(picture(host.run(graph(file))) - want).max() <= 1


@pytest.mark.parametrize(
    "place",
    [
        pytest.param(place, marks=fault("ComfyUI", f"out of memory at the {place} pass", "right picture"))
        for place in ("first", "middle", "last")
    ],
)
def test_the_host_out_of_memory(host: Host, file: Path, host_passes: int, place: str) -> None:
    at = {"first": 0, "middle": host_passes // 2, "last": host_passes - 1}[place]
    with host_unharmed(host, file) as right:
        got = picture(host.run(graph(file, "out_of_memory", at)))
        assert np.abs(got - right).mean() < 0.5


@fault("ComfyUI", "out of memory at every size of tile", "clear error")
def test_the_host_without_any_memory(host: Host, file: Path) -> None:
    with host_unharmed(host, file):
        run = host.run(graph(file, "out_of_memory", -1))
        assert run.ending == "execution_error"
        assert "no room for even the smallest tile" in run.error


@fault("ComfyUI", "out of memory while loading", "clear error")
def test_the_host_without_memory_to_load(host: Host, file: Path, tmp_path: Path) -> None:
    other = shutil.copy(file, tmp_path / "other.safetensors")
    with host_unharmed(host, file):
        workflow = graph(other)
        workflow["arm"] = {"class_type": "PFTLoadFault", "inputs": {"file": str(other)}}
        workflow["model"]["inputs"]["file"] = ["arm", 0]
        run = host.run(workflow)
        assert run.ending == "execution_error"
        assert "memory" in run.error
        assert host.run(graph(other)).ending == "execution_success"


@fault("ComfyUI", "cancel in each pass in turn", "stops there")
def test_the_host_cancelled(host: Host, file: Path, host_passes: int) -> None:
    with host_unharmed(host, file):
        for at in range(host_passes - 1):
            assert host.run(graph(file, "cancel", at)).ending == "execution_interrupted"


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(how, marks=fault("ComfyUI", f"{text} within a pass", "right picture"))
        for how, text in (
            ("unload_from_another_thread", "all models unloaded by another thread"),
            ("free_all_memory", "the host told to free all memory"),
        )
    ],
)
def test_the_host_evicts_the_model(host: Host, file: Path, host_passes: int, how: str) -> None:
    with host_unharmed(host, file) as right:
        for at in range(host_passes):
            assert (picture(host.run(graph(file, how, at))) == right).all()


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(how, marks=fault("ComfyUI", f"weights file {text} while running", "right picture"))
        for how, text in (("replace_weights", "replaced"), ("cut_weights", "cut short"))
    ],
)
def test_the_host_loses_the_weights_file(host: Host, file: Path, tmp_path: Path, how: str) -> None:
    mine = Path(shutil.copy(file, tmp_path / "mine.safetensors"))
    save_model(network(5), tmp_path / "mine.safetensors.new")
    with host_unharmed(host, file) as right:
        assert (picture(host.run(graph(mine, how, 1))) == right).all()
        after = host.run(graph(mine))
        if how == "replace_weights":
            assert (picture(after) != right).any()
        else:
            assert after.ending == "execution_error" and "cut or damaged" in after.error


@fault("ComfyUI", "NaN, infinities and values outside [0, 1] in the image", "right picture")
def test_the_host_gives_no_colours(host: Host, file: Path, photo: Tensor) -> None:
    clean = photo.clone()
    clean[0, 0, 0] = torch.tensor([0.0, 1.0, 0.0])
    clean[0, 5, 5] = torch.tensor([1.0, 0.0, 0.5])
    want = (upscale(clean, load_model(file), **OPTIONS)[0].numpy() * 255).astype(np.uint8)
    with host_unharmed(host, file):
        assert np.abs(picture(host.run(graph(file, "no_colours"))) - want).max() <= 1


@fault("ComfyUI", "values beyond half precision", "right picture")
def test_the_host_beyond_half_precision(host: Host, file: Path, photo: Tensor, tmp_path: Path) -> None:
    save_model(wild(), tmp_path / "wild.safetensors")
    want = (upscale(photo, wild().half().float(), **OPTIONS)[0].numpy() * 255).astype(int)
    with host_unharmed(host, file):
        got = picture(host.run(graph(tmp_path / "wild.safetensors", precision="fp16")))
        assert np.abs(got - want).max() <= 1


def test_a_soak_in_short(host: Host) -> None:
    """benchmarks/soak.py is the long form."""
    from benchmarks.soak import soak

    *_, result = soak(host, 30)
    assert result["pictures that changed"] == 0
    least, most = result["handles after warm-up, least and most"]
    assert most - least < 10
