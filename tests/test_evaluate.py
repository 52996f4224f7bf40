"""`pft-sr evaluate`: the numbers, where they are written, and what is refused."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pft_arch.cli import main
from pft_arch.data import Picture, read_rgb
from pft_arch.evaluate import METRICS, evaluate, format_table, to_json
from pft_arch.metrics import psnr_y, ssim_y
from pft_arch.network import PFTSR
from pft_arch.resize import imresize, shrink
from pft_arch.train import interpolate_at_first
from pft_arch.upscale import upscale
from pft_arch.weights import save_model

PHOTO = read_rgb(Path(__file__).parent / "data" / "photo.png")
pytestmark = pytest.mark.usefixtures("one_thread")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model() -> PFTSR:
    """Doubles images in no time, at first by interpolation, so that its pictures can be told from noise."""
    torch.manual_seed(0)
    network = PFTSR(scale=2, embed_dim=12, num_blocks=(2,), num_heads=2, window_size=4)
    interpolate_at_first(network)
    return network.eval()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: PFTSR) -> Path:
    """The weights, and two images in set/hr: one in colour, of an odd size, and one in grey."""
    monkeypatch.chdir(tmp_path)
    save_model(model, "tiny.safetensors")
    Path("set/hr").mkdir(parents=True)
    Image.fromarray(PHOTO[:61, :83]).save("set/hr/b.png")
    Image.fromarray(PHOTO[40:104, 60:120, 1]).save("set/hr/a.png")
    return tmp_path


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """`pft-sr evaluate` in that folder: exit code, stdout, stderr."""

    def run_evaluate(*args: str, model: str = "tiny.safetensors", hr: str = "set/hr") -> tuple[int, str, str]:
        code = main(["evaluate", "--model", model, "--hr", hr, "--device", "cpu", *args])
        return code, *capsys.readouterr()

    return run_evaluate


def make_lr() -> None:
    Path("set/lr").mkdir()
    Image.fromarray(shrink(PHOTO[:60, :82], 2)).save("set/lr/bx2.png")
    Image.fromarray(shrink(PHOTO[40:104, 60:120, 1:2], 2)[..., 0]).save("set/lr/a.bmp")


def tensor(picture: Picture) -> Tensor:
    return torch.tensor(picture).float() / 255


# ---------------------------------------------------------------------------------- numbers


def test_table_and_json_hold_the_numbers(run: Run, model: PFTSR) -> None:
    code, out, err = run("--json", "out.json")
    assert (code, err) == (0, "")
    facts = json.loads(Path("out.json").read_text("utf-8"))
    images = facts.pop("images")

    # computed here once more, step by step
    high = PHOTO[:60, :82]
    low = shrink(high, 2)
    sr = upscale(tensor(low)[None], model)[0]
    bicubic = tensor(imresize(low, 60, 82))
    assert [image["name"] for image in images] == ["a", "b"]
    b = images[1]
    assert b["psnr_y"] == pytest.approx(psnr_y(sr, tensor(high), 2))
    assert b["ssim_y"] == pytest.approx(ssim_y(sr, tensor(high), 2))
    assert b["bicubic_psnr_y"] == pytest.approx(psnr_y(bicubic, tensor(high), 2))
    assert b["bicubic_ssim_y"] == pytest.approx(ssim_y(bicubic, tensor(high), 2))
    assert b["tile"] is None
    assert 15 < b["psnr_y"] < b["bicubic_psnr_y"] < 40

    mean, seconds = facts.pop("mean"), facts.pop("seconds")
    assert mean == {metric: pytest.approx((images[0][metric] + b[metric]) / 2) for metric in METRICS}
    assert seconds == pytest.approx(sum(image["seconds"] for image in images))
    assert facts == {
        "model": {
            "file": "tiny.safetensors",
            "sha256": hashlib.sha256(Path("tiny.safetensors").read_bytes()).hexdigest(),
        },
        "hr": "set/hr",
        "lr": None,
        "scale": 2,
        "tile": 0,
        "ensemble": False,
        "precision": "float32",
        "device": "cpu",
        "torch": torch.__version__,
    }

    lines = out.splitlines()
    assert lines[1].split() == ["image", "PSNR-Y", "SSIM-Y", "PSNR-Y", "SSIM-Y"]
    for line, name, row in ((lines[3], "b", b), (lines[5], "mean", mean)):
        assert line.split() == [name] + [f"{row[m]:.4f}" if "ssim" in m else f"{row[m]:.2f}" for m in METRICS]
    assert lines[-1].startswith("set/hr, x2, LR made by bicubic, whole images, float32 on cpu, ")


def test_lr_files_give_what_lr_made_by_bicubic_gives(run: Run) -> None:
    make_lr()
    assert run("--json", "made.json")[0] == 0
    code, out, _ = run("--lr", "set/lr", "--scale", "2", "--json", "given.json")
    made, given = (json.loads(Path(name).read_text("utf-8")) for name in ("made.json", "given.json"))
    assert code == 0
    assert given["mean"] == pytest.approx(made["mean"])
    assert (given["lr"], made["lr"]) == ("set/lr", None)
    assert "x2, LR set/lr, " in out


def test_tiles_are_used_when_asked_for_and_told(run: Run) -> None:
    code, out, _ = run("--tile", "18", "--json", "out.json")
    facts = json.loads(Path("out.json").read_text("utf-8"))
    assert code == 0
    assert facts["tile"] == 18
    assert [image["tile"] for image in facts["images"]] == [None, 36]  # 30 x 32 fits in a tile with its overlap
    assert "tiles up to 36 for 1 of 2 images" in out


def test_tiles_that_memory_forces_are_told(folder: Path, model: PFTSR, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: PFTSR, x: Tensor) -> Tensor:
        if x.shape[-2] * x.shape[-1] > 1000:  # more than a, less than b
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, x)

    original = PFTSR.forward
    monkeypatch.setattr(PFTSR, "forward", forward)
    images = {image.name: image.tile for image in evaluate(model, Path("set/hr"), tile=64).images}
    assert images["a"] is None
    assert images["b"] == 24
    assert not model._forward_hooks


def test_the_largest_tile_that_fits_is_the_default(folder: Path, model: PFTSR, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("pft_arch.upscale"), "free_memory", lambda _: 1)
    assert evaluate(model, Path("set/hr")).images[1].tile == 36


def test_half_precision_is_told(run: Run) -> None:
    assert "bfloat16 on cpu" in run("--precision", "bf16")[1]


def test_progress_counts_images(folder: Path, model: PFTSR) -> None:
    calls: list[tuple[int, int]] = []
    evaluate(model, Path("set/hr"), progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 2), (2, 2)]


def test_equal_pictures_are_valid_json(folder: Path, model: PFTSR) -> None:
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save("set/hr/c.png")
    evaluation = evaluate(model, Path("set/hr"))
    assert evaluation.images[2].bicubic_psnr_y == math.inf
    facts = to_json(evaluation)
    assert facts["images"][2]["bicubic_psnr_y"] is facts["mean"]["bicubic_psnr_y"] is None
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts | {"images": facts["images"]}
    assert format_table(evaluation).splitlines()[4].split()[:3] == ["c", "inf", "1.0000"]


def test_long_names_keep_the_columns(folder: Path, model: PFTSR) -> None:
    evaluation = evaluate(model, Path("set/hr"))
    first = replace(evaluation.images[0], name="a long name of an image")
    lines = format_table(replace(evaluation, images=(first, *evaluation.images[1:]))).splitlines()
    assert len({len(line) for line in lines[1:6]}) == 1


def test_benchmark(model: PFTSR) -> None:
    sets = Path(os.environ.get("PFT_BENCHMARKS", "nowhere"))
    if not (sets / "Set5").is_dir():
        pytest.skip("PFT_BENCHMARKS names no folder with Set5/HR/*.webp and Set5/LRbicx2/*.png")
    evaluation = evaluate(model, sets / "Set5/HR", sets / "Set5/LRbicx2")
    assert evaluation.mean["bicubic_psnr_y"] == pytest.approx(33.67, abs=0.005)
    assert evaluation.mean["bicubic_ssim_y"] == pytest.approx(0.930, abs=0.0005)


# ---------------------------------------------------------------------------------- ensemble


def test_ensemble_on_the_command_line(run: Run) -> None:
    code, out, _ = run("--ensemble", "--json", "out.json")
    facts = json.loads(Path("out.json").read_text("utf-8"))
    assert code == 0
    assert "8 positions averaged" in out
    assert facts["ensemble"] is True
    assert [image["tile"] for image in facts["images"]] == [None, None]
    assert run("--json", "plain.json")[0] == 0
    assert json.loads(Path("plain.json").read_text("utf-8"))["mean"]["psnr_y"] != facts["mean"]["psnr_y"]


# ---------------------------------------------------------------------------------- what is refused


def test_every_image_that_cannot_be_used_is_named_before_any_work(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    make_lr()
    Path("set/hr/alone.png").write_bytes(Path("set/hr/a.png").read_bytes())
    Path("set/hr/cut.png").write_bytes(Path("set/hr/b.png").read_bytes()[:2000])
    for name, size in (("c", (15, 20)), ("d", (14, 20)), ("small", (7, 7))):
        Image.fromarray(PHOTO[: 2 * size[0], : 2 * size[1]]).save(f"set/hr/{name}.png")
        Image.fromarray(PHOTO[: size[0], : size[1] + (name == "c")]).save(f"set/lr/{name}.png")
    monkeypatch.setattr(PFTSR, "forward", lambda *_: pytest.fail("work was done"))
    code, out, err = run("--lr", "set/lr", "--json", "out.json")
    assert (code, out) == (1, "")
    lines = err.splitlines()
    for line, name, reason in zip(
        lines,
        ("hr/alone.png", "lr/c.png", "hr/cut.png", "hr/small.png"),
        (
            "no LR image",
            "21x15 pixels, and the HR image is 40x30, not 2 times",
            "cannot be read",
            "14x14 pixels are too",
        ),
        strict=True,
    ):
        assert str(Path(name)) in line
        assert reason in line
    assert not Path("out.json").exists()


def test_unreadable_and_small_images_are_named_where_lr_is_made(run: Run) -> None:
    Path("set/hr/text.png").write_text("no image")
    Image.fromarray(PHOTO[:14, :40]).save("set/hr/thin.png")
    code, _, err = run()
    assert code == 1
    assert "text.png: cannot be read" in err
    assert "thin.png: 40x14 pixels are too few" in err


def test_what_goes_wrong_in_the_network_names_the_image(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*_: object) -> None:
        raise RuntimeError("device is gone")

    monkeypatch.setattr(PFTSR, "forward", forward)
    code, _, err = run()
    assert code == 1
    assert "a.png: device is gone" in err


@pytest.mark.parametrize(
    ("args", "code", "reason"),
    [
        (["--scale", "4"], 2, "tiny.safetensors enlarges 2 times, and --scale says 4"),
        (["--scale", "-2"], 2, "negative"),
        (["--lr", "nowhere"], 2, "nowhere: no such folder"),
        (["--json", "nowhere/out.json"], 2, "nowhere: no such folder"),
        (["--device", "none"], 2, "device none cannot be used"),
        (["--json", "set"], 1, "set: not written"),
    ],
)
def test_wrong_usage(run: Run, args: list[str], code: int, reason: str) -> None:
    found, out, err = run(*args)
    assert found == code
    assert reason in err
    assert bool(out) == (code == 1)  # the table is there even where the file cannot be written


def test_folders_without_images_and_models_that_are_none(run: Run) -> None:
    Path("empty").mkdir()
    assert run(hr="nowhere")[0::2] == (2, "pft-sr: nowhere: no such folder.\n")
    assert "empty: holds no image (.png" in run(hr="empty")[2]
    code, _, err = run(model="nothing.safetensors")
    assert code == 1
    assert "nothing.safetensors: no such weights file" in err
