"""Conversion of weights files: what goes in from the wild, what comes out, and what must never happen on the way."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conftest import TINY, Golden, golden_files, same
from pft_arch import PFTSR, PFTConfig, WeightsError, create_pft_sr, load_model
from pft_arch.cli import main
from pft_arch.convert import convert, sample_picture
from pft_arch.weights import save_model


@pytest.fixture
def checkpoint(model: PFTSR, tmp_path: Path) -> Path:
    """As a training framework leaves it: prefixed, beside an averaged copy, without what can be recomputed."""
    state = {f"module.{k}": v for k, v in model.state_dict().items() if k != "relative_position_index_SA"}
    torch.save({"params": {k: v + 1 for k, v in state.items()}, "params_ema": state}, tmp_path / "net.pth")
    return tmp_path / "net.pth"


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


@pytest.mark.parametrize("golden", [*map(Golden, golden_files())], ids=lambda golden: golden.name)
def test_published_weights_survive_both_ways(golden: Golden, tmp_path: Path) -> None:
    """.pth as published -> .safetensors -> .pth: the same keys and bits, and the outputs of the published code."""
    published = load_file(golden.weights)
    torch.save({"params_ema": published}, tmp_path / "published.pth")
    config = PFTConfig.from_dict(golden.config)
    convert(tmp_path / "published.pth", tmp_path / "ours.safetensors", config=config)
    convert(tmp_path / "ours.safetensors", tmp_path / "back.pth")

    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert back.keys() == {"params_ema"}
    state = back["params_ema"]
    index = PFTSR(**TINY).state_dict()["relative_position_index_SA"]
    assert state.keys() == published.keys() | {"relative_position_index_SA"}
    assert state["relative_position_index_SA"].dtype == index.dtype == torch.int64
    assert all(torch.equal(state[key], published[key]) for key in published)
    assert load_model(tmp_path / "ours.safetensors").config == config


def test_a_training_checkpoint_becomes_a_file_that_loads_without_questions(
    checkpoint: Path, model: PFTSR, tmp_path: Path
) -> None:
    done = convert(checkpoint, tmp_path / "out.safetensors", config=model.config)
    assert same(load_model(done.path), model)
    assert done.psnr == math.inf
    assert done.sha256 == hashlib.sha256(done.path.read_bytes()).hexdigest()
    told = metadata(done.path)
    assert json.loads(told["config"]) == model.config.to_dict()
    assert (told["source"], told["source_sha256"]) == ("net.pth", hashlib.sha256(checkpoint.read_bytes()).hexdigest())


def test_what_the_source_says_about_itself_is_kept(model: PFTSR, tmp_path: Path) -> None:
    save_file(model.state_dict(), tmp_path / "in.safetensors", {"metadata": '{"notes": 1}', "licence": "MIT"})
    convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", config=model.config)
    told = metadata(tmp_path / "out.safetensors")
    assert (told["metadata"], told["licence"]) == ('{"notes": 1}', "MIT")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_16_bits_halve_the_file_and_tell_their_cost(model: PFTSR, tmp_path: Path, suffix: str) -> None:
    save_model(model, tmp_path / "in.safetensors")
    done = convert(tmp_path / "in.safetensors", tmp_path / f"half{suffix}", half=True)
    half = load_model(done.path, config=model.config)
    picture = sample_picture(3)
    with torch.inference_mode():
        error = (half(picture) - model(picture)).square().mean()
    assert done.psnr == pytest.approx(-10 * math.log10(error), abs=0.01)
    assert 50 < done.psnr < 120
    if suffix == ".safetensors":
        assert done.path.stat().st_size < 0.7 * (tmp_path / "in.safetensors").stat().st_size
        assert f"{done.psnr:.1f} dB" in metadata(done.path)["fp16"]


def test_numbers_too_large_for_16_bits_are_refused(model: PFTSR, tmp_path: Path) -> None:
    with torch.no_grad():
        model.conv_first.weight[0, 0, 0, 0] = 1e5
    save_model(model, tmp_path / "in.safetensors")
    with pytest.raises(WeightsError, match=r"in\.safetensors: it holds the number 100000, too large for 16 bits"):
        convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", half=True)
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


@pytest.mark.parametrize("when", ["existing", "the source itself", "no folder", "other suffix", "a folder"])
def test_nothing_is_overwritten_or_guessed(model: PFTSR, tmp_path: Path, when: str) -> None:
    save_model(model, tmp_path / "in.safetensors")
    (tmp_path / "existing.pth").write_bytes(b"precious")
    (tmp_path / "folder.pth").mkdir()
    target, overwrite, message = {
        "existing": ("existing.pth", False, "exists already"),
        "the source itself": ("in.safetensors", True, "is the file to convert"),
        "no folder": ("nowhere/out.pth", False, "no such folder"),
        "other suffix": ("out.onnx", False, r"must end in \.safetensors or \.pth"),
        "a folder": ("folder.pth", True, "is a folder"),
    }[when]
    before = (tmp_path / "in.safetensors").read_bytes()
    with pytest.raises(WeightsError, match=message):
        convert(tmp_path / "in.safetensors", tmp_path / target, overwrite=overwrite)
    assert (tmp_path / "existing.pth").read_bytes() == b"precious"
    assert (tmp_path / "in.safetensors").read_bytes() == before


@pytest.mark.parametrize("fault", ["full disk", "wrong result"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    model: PFTSR, tmp_path: Path, fault: str, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(model, tmp_path / "in.safetensors")
    target = tmp_path / f"out{suffix}"
    target.write_bytes(b"precious")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    if fault == "full disk":
        monkeypatch.setattr("pft_arch.convert.os.replace", full)
    else:
        monkeypatch.setattr("pft_arch.convert.load_model", lambda *_, **__: PFTSR(**TINY).eval())
    with pytest.raises(WeightsError, match=rf"out{suffix}: not written"):
        convert(tmp_path / "in.safetensors", target, overwrite=True)
    assert target.read_bytes() == b"precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["in.safetensors", target.name])


def test_overwriting_replaces(checkpoint: Path, model: PFTSR, tmp_path: Path) -> None:
    (tmp_path / "out.safetensors").write_bytes(b"old")
    convert(checkpoint, tmp_path / "out.safetensors", config=model.config, overwrite=True)
    assert same(load_model(tmp_path / "out.safetensors"), model)


def test_code_in_the_source_is_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"params": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(WeightsError, match="would run code"):
        convert(tmp_path / "bomb.pth", tmp_path / "out.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["bomb.pth"]


def test_a_preset_takes_its_scale_from_the_file(tmp_path: Path) -> None:
    light = create_pft_sr(3, "light")
    torch.save(light.state_dict(), tmp_path / "in.pth")
    assert convert(tmp_path / "in.pth", tmp_path / "out.safetensors", config="light").config == light.config
    with pytest.raises(WeightsError, match="no variant 'lite'"):
        convert(tmp_path / "in.pth", tmp_path / "out2.safetensors", config="lite")
    with pytest.raises(WeightsError, match="do not fit"):
        convert(tmp_path / "in.pth", tmp_path / "out2.safetensors", config="base")


def test_the_command_converts_and_tells(
    checkpoint: Path, model: PFTSR, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["convert", str(checkpoint), str(tmp_path / "out.safetensors"), "--fp16"]
    assert main(arguments) == 1
    assert "net.pth: the file fits no preset" in capsys.readouterr().err
    (tmp_path / "network.json").write_text(json.dumps(model.config.to_dict()))
    assert main([*arguments, "--config", str(tmp_path / "network.json")]) == 0
    told = capsys.readouterr().out
    assert "out.safetensors" in told and "dB from the result in 32 bits" in told
    assert load_model(tmp_path / "out.safetensors").config == model.config
    assert main([*arguments, "--config", json.dumps(model.config.to_dict())]) == 1
    assert "exists already" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "--config", json.dumps(model.config.to_dict())]) == 0
    assert main([*arguments, "--config", "[1]"]) == 2
    assert main([*arguments, "--config", "{}", "--preset", "light"]) == 2
