"""Training: what a run leaves, that it goes on exactly where it stopped, and what it survives."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from pft_arch import PFTSR, load_model
from pft_arch import train as trainer
from pft_arch.config import PRESETS
from pft_arch.metrics import psnr_y
from pft_arch.recipe import Recipe
from pft_arch.train import initial_model, interpolate_at_first, train
from pft_arch.weights import describe, save_model

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def images(tmp_path: Path, photo: Tensor) -> Path:
    folder = tmp_path / "hr"
    folder.mkdir()
    pixels = (photo[0] * 255).byte().numpy()
    Image.fromarray(pixels[:96, :96]).save(folder / "a.png")
    Image.fromarray(pixels[40:140, 60:190]).save(folder / "b.png")
    return folder


@pytest.fixture
def recipe(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    tiny = replace(PRESETS["light"], embed_dim=12, num_heads=2, num_blocks=(2,), top_k=16, window_size=4)
    monkeypatch.setitem(PRESETS, "light", tiny)  # type: ignore[misc]
    return Recipe(
        preset="light",
        scale=2,
        hr=images,
        out=tmp_path / "run",
        iterations=6,
        batch=2,
        patch=8,
        warmup=0.3,
        every=2,
        schedule="cosine",
    )


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "log.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_weights_log_strips_and_one_state(recipe: Recipe, images: Path) -> None:
    best = train(replace(recipe, val_hr=images))
    assert sorted(path.name for path in recipe.out.iterdir()) == [
        "best.safetensors",
        "last.safetensors",
        "log.csv",
        "state-00000006",
        "strips",
    ]
    assert [row["iteration"] for row in rows(recipe.out)] == ["2", "4", "6"]
    assert all(float(row["psnr_y"]) > 10 for row in rows(recipe.out))
    with Image.open(recipe.out / "strips" / "a.png") as strip:
        assert strip.size == (3 * 96, 96)
    training = json.loads(describe(best)["metadata"]["training"])
    assert training["recipe"]["batch"] == 2
    assert training["reached"]["psnr_y"] == pytest.approx(max(float(row["psnr_y"]) for row in rows(recipe.out)))
    assert len(training["data_sha256"]) == 64


def test_training_lowers_the_loss(recipe: Recipe) -> None:
    train(replace(recipe, iterations=60, every=20, rate=2e-3))
    losses = [float(row["loss"]) for row in rows(recipe.out)]
    assert losses[-1] < 0.8 * losses[0]


COMMAND = """
import sys
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from pft_arch.config import PRESETS
from pft_arch.recipe import Recipe
from pft_arch.train import train
PRESETS["light"] = replace(PRESETS["light"], embed_dim=12, num_heads=2, num_blocks=(2,), top_k=16, window_size=4)
train(Recipe(preset="light", scale=2, hr=Path(sys.argv[1]), out=Path(sys.argv[2]), iterations=int(sys.argv[3]),
             batch=2, patch=8, warmup=0.1, every=2, schedule="cosine"))
"""


def start(images: Path, out: Path, iterations: int, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    script = out.with_suffix(".py")
    script.write_text(COMMAND)
    return subprocess.Popen(
        [sys.executable, *launcher, str(script), str(images), str(out), str(iterations)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_killed_run_goes_on_to_the_very_same_weights(images: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    first = start(images, whole, 40)
    second = start(images, killed, 40)
    while not list(killed.glob("state-*[0-9]")):
        assert second.poll() is None, second.stderr and second.stderr.read()
        time.sleep(0.02)
    second.send_signal(signal.SIGKILL)
    second.communicate()
    assert (killed / "last.safetensors").exists()
    reached = rows(killed) if (killed / "log.csv").exists() else []
    assert len(reached) < 20, "the run ended before it could be killed"

    resumed = start(images, killed, 40)
    for job in (first, resumed):
        _, errors = job.communicate()
        assert job.returncode == 0, errors
    got, expected = load_file(killed / "last.safetensors"), load_file(whole / "last.safetensors")
    assert all(torch.equal(got[key], expected[key]) for key in expected)
    assert got.keys() == expected.keys()


def test_two_processes_train_the_same_curve_as_one(images: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    # --multi_gpu is the launcher's word for several processes on one machine; on a CPU they speak by gloo
    launcher = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
    for job in (start(images, one, 8), start(images, two, 8, launcher)):
        _, errors = job.communicate()
        assert job.returncode == 0, errors
    training = json.loads(describe(two / "last.safetensors")["metadata"]["training"])
    assert training["processes"] == 2
    losses = [[float(row["loss"]) for row in rows(run)] for run in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    got, expected = load_file(two / "last.safetensors"), load_file(one / "last.safetensors")
    assert all(torch.allclose(got[key], expected[key], atol=1e-5) for key in expected)


def test_a_state_that_was_cut_short_is_not_taken(recipe: Recipe) -> None:
    train(recipe)
    (recipe.out / "state-00000099.part").mkdir()
    train(replace(recipe, iterations=8))
    assert rows(recipe.out)[-1]["iteration"] == "8"
    assert [path.name for path in recipe.out.glob("state-*")] == ["state-00000008"]


def test_a_full_disk_leaves_the_previous_state_whole(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    train(recipe)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(trainer.Accelerator, "save_state", full)
        with pytest.raises(OSError, match="No space"):
            train(replace(recipe, iterations=10))
    assert [path.name for path in recipe.out.glob("state-*") if path.suffix != ".part"] == ["state-00000006"]
    train(replace(recipe, iterations=10))
    assert rows(recipe.out)[-1]["iteration"] == "10"


def test_a_step_that_is_not_finite_is_skipped_and_counted(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([1.0, math.nan])
    l1_loss = torch.nn.functional.l1_loss

    def sometimes_nan(*arguments: Any) -> Tensor:
        return l1_loss(*arguments) * next(losses, 1.0)

    monkeypatch.setattr(torch.nn.functional, "l1_loss", sometimes_nan)
    best = train(recipe)
    assert rows(recipe.out)[-1]["skipped"] == "1"
    assert all(value.isfinite().all() for value in load_file(best).values())


def test_minutes_end_a_run_and_its_schedule(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(monotonic=count().__next__)  # a second for each look at it, whatever the machine does
    monkeypatch.setattr(trainer, "time", clock)
    train(replace(recipe, iterations=100_000, minutes=0.5, every=100_000))
    [row] = rows(recipe.out)
    assert 20 < int(row["iteration"]) < 40
    assert float(row["rate"]) < 0.2 * recipe.rate


def test_other_scales_start_from_trained_weights_with_a_new_head(recipe: Recipe, tmp_path: Path) -> None:
    source = train(recipe)
    model = initial_model(replace(recipe, scale=3, init=source))
    trained = load_model(source).state_dict()
    own = model.state_dict()
    new = {key for key in own if key not in trained or not torch.equal(own[key], trained[key])}
    assert new == {"upsample.0.weight", "upsample.0.bias"}
    save_model(PFTSR(embed_dim=8, num_blocks=(2,), num_heads=2, window_size=4), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other.safetensors: not the weights of another scale of light"):
        initial_model(replace(recipe, init=tmp_path / "other.safetensors"))


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_a_new_network_begins_as_interpolation(scale: int, photo: Tensor) -> None:
    torch.manual_seed(0)
    model = PFTSR(scale=scale).eval()
    interpolate_at_first(model)
    small = torch.nn.functional.interpolate(photo.permute(0, 3, 1, 2), scale_factor=1 / scale, mode="area")
    with torch.no_grad():
        out = model(small)[0].permute(1, 2, 0)
    plain = torch.nn.functional.interpolate(small, scale_factor=scale, mode="bilinear")[0].permute(1, 2, 0)
    assert psnr_y(out, photo[0], scale) > psnr_y(plain, photo[0], scale) - 3


def test_schedules_follow_the_recipe() -> None:
    multistep = Recipe(rate=1.0)
    assert [multistep.rate_at(done) for done in (0.01, 0.04, 0.5, 0.85, 0.99)] == [0.25, 1, 0.5, 0.25, 1 / 32]
    assert Recipe(rate=1.0, init=Path("x")).rate_at(0.5) == 1
    cosine = Recipe(rate=1.0, schedule="cosine")
    assert [cosine.rate_at(done) for done in (0.5, 1.0)] == pytest.approx([0.5, 0])
    assert Recipe(rate=1.0, schedule="constant").rate_at(0.7) == 1


def test_what_is_left_open_takes_the_published_values() -> None:
    assert (Recipe().iterations, Recipe().batch, Recipe().rate) == (500_000, 16, 5e-4)
    assert (Recipe(preset="pft").batch, Recipe(preset="pft").rate) == (32, 2e-4)
    finetune = Recipe(init=Path("x2.safetensors"))
    assert (finetune.iterations, finetune.rate) == (250_000, 2e-4)


@pytest.mark.parametrize("wrong", [{"schedule": "linear"}, {"batch": -1}, {"minutes": -1}, {"ema": 1.0}])
def test_senseless_recipes_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Recipe(**wrong)


def test_the_plateau_schedule_halves_the_rate_when_nothing_improves(
    recipe: Recipe, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "validate", lambda *_: 20.0)
    train(replace(recipe, schedule="plateau", val_hr=images, iterations=20))
    assert float(rows(recipe.out)[-1]["rate"]) < recipe.rate
