"""Weights files: what loads, what is told about them, and what happens with those that are wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import TINY, Golden, golden_files, same
from pft_arch import CATALOGUE, PFTSR, PFTConfig, WeightsError, create_pft_sr, load_model
from pft_arch.config import PRESETS
from pft_arch.weights import describe, is_pft_file, resolve, save_model

BUNDLED_NAMES = [name for name, variant in CATALOGUE.items() if variant.source == "bundled"]


@pytest.fixture
def file(model: PFTSR, tmp_path: Path) -> Path:
    save_model(model, tmp_path / "tiny.safetensors", {"licence": "none"})
    return tmp_path / "tiny.safetensors"


def test_a_saved_model_loads_as_it_was(model: PFTSR, file: Path) -> None:
    loaded = load_model(file)
    assert loaded.config == model.config
    assert not loaded.training
    assert same(loaded, model)


@pytest.mark.parametrize(
    ("variant", "scale"), [("pft_light", 2), ("pft_light", 3), ("light", 2), ("light", 3), *((v, 4) for v in PRESETS)]
)
def test_presets_are_recognised_by_their_shapes_alone(variant: str, scale: int, tmp_path: Path) -> None:
    state = create_pft_sr(scale, variant).half().state_dict()
    save_file(state, tmp_path / "bare.safetensors")
    config = load_model(tmp_path / "bare.safetensors").config
    assert (config.scale, config.num_blocks, config.top_k) == (
        scale,
        PRESETS[variant].num_blocks,
        PRESETS[variant].top_k,
    )


def test_shapes_that_fit_no_preset_ask_for_what_is_missing(model: PFTSR, tmp_path: Path) -> None:
    path = tmp_path / "bare.safetensors"
    save_file(model.state_dict(), path)
    with pytest.raises(WeightsError, match=r"bare.safetensors: .*embed_dim 12.*num_heads=.*top_k="):
        load_model(path)
    assert same(load_model(path, config=PFTConfig(**TINY)), model)


def test_published_argument_names_in_the_metadata_are_understood() -> None:
    golden = Golden(golden_files()[0])
    config = load_model(golden.weights).config
    assert config.scale == golden.config["upscale"]
    assert config.num_blocks == tuple(golden.config["depths"])
    assert config.kernel_size == golden.config["convffn_kernel_size"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_model_loads_in_the_asked_precision(file: Path, dtype: torch.dtype) -> None:
    assert {p.dtype for p in load_model(file, dtype=dtype).parameters()} == {dtype}


@pytest.mark.parametrize(
    "wrapper", ["params_ema", "params-ema", "params", "state_dict", "model_state_dict", "model", "net"]
)
@pytest.mark.parametrize("prefix", ["", "module.", "netG."])
def test_checkpoints_of_training_frameworks_load(model: PFTSR, tmp_path: Path, wrapper: str, prefix: str) -> None:
    state = {prefix + k: v for k, v in model.state_dict().items() if k != "relative_position_index_SA"}
    torch.save({wrapper: state, "epoch": 3}, tmp_path / "net.pth")
    assert same(load_model(tmp_path / "net.pth", config=model.config), model)


def in_a_lightning_checkpoint(state: dict[str, Tensor]) -> dict[str, Any]:
    others = {f"net.{key}": value + 1 for key, value in state.items()} | {"loss.weight": torch.ones(3)}
    return {"epoch": 3, "state_dict": others | {f"net_ema.{key}": value for key, value in state.items()}}


FRAMEWORKS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "torch.compile": lambda state: {f"_orig_mod.{key}": value for key, value in state.items()},
    "compiled in DDP": lambda state: {"model": {f"module._orig_mod.{key}": value for key, value in state.items()}},
    "torch AveragedModel": lambda state: {"n_averaged": torch.tensor(9)} | {f"module.{k}": v for k, v in state.items()},
    "Lightning": in_a_lightning_checkpoint,
    "nested": lambda state: {"ema": {"decay": 0.999, "shadow": state}, "optimizer": {"state": {0: {"step": 1}}}},
}


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("suffix", [".pth", ".ckpt", ".safetensors"])
def test_whatever_frameworks_put_around_and_before_the_keys_is_removed(
    model: PFTSR, tmp_path: Path, framework: str, suffix: str
) -> None:
    checkpoint = FRAMEWORKS[framework](model.state_dict())
    if suffix == ".safetensors":
        if not all(isinstance(value, Tensor) for value in checkpoint.values()):
            pytest.skip("a safetensors file holds tensors only")
        save_file(checkpoint, tmp_path / "net.safetensors")
    else:
        torch.save(checkpoint, tmp_path / f"net{suffix}")
    assert is_pft_file(tmp_path / f"net{suffix}")
    assert same(load_model(tmp_path / f"net{suffix}", config=model.config), model)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_arguments_that_a_framework_leaves_in_its_metadata_are_used(model: PFTSR, tmp_path: Path, suffix: str) -> None:
    arguments = {"upscale": 2, "depths": [2, 3], "num_topk": [9] * 5, "convffn_kernel_size": 3, "mlp_ratio": 2.0}
    arguments |= {"embed_dim": 12, "num_heads": 2, "window_size": 4, "img_size": 64, "upsampler": "pixelshuffle"}
    if suffix == ".pth":
        torch.save({"metadata": arguments, "params": model.state_dict()}, tmp_path / "net.pth")
    else:
        save_file(model.state_dict(), tmp_path / "net.safetensors", {"metadata": json.dumps(arguments)})
    assert load_model(tmp_path / f"net{suffix}").config == model.config


def test_metadata_of_another_kind_is_no_obstacle(tmp_path: Path) -> None:
    save_file(create_pft_sr(2, "light").state_dict(), tmp_path / "net.safetensors", {"metadata": '["notes"]'})
    assert load_model(tmp_path / "net.safetensors").config == replace(PRESETS["light"], scale=2)


def test_averaged_weights_are_preferred(model: PFTSR, tmp_path: Path) -> None:
    other = PFTSR(**TINY)
    torch.save({"params": other.state_dict(), "params_ema": model.state_dict()}, tmp_path / "net.pth")
    assert same(load_model(tmp_path / "net.pth", config=model.config), model)


def test_code_in_a_pth_is_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Bomb:
        def __reduce__(self) -> Any:
            return Path.touch, (marker,)

    torch.save({"params": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(WeightsError, match=r"bomb.pth: .*would run code.*safetensors"):
        load_model(tmp_path / "bomb.pth")
    assert not marker.exists()


def damaged(file: Path, how: str) -> Path:
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    state, path = load_file(file), file.with_name(f"{how}.safetensors")
    config = {"config": json.dumps(PFTConfig(**TINY).to_dict())}
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "huge-header":
        path.write_bytes((2**62).to_bytes(8, "little") + content[8:])
    elif how == "no-json":
        path.write_bytes(content[:8] + b"x" * length + content[8 + length :])
    elif how == "nan":
        state["conv_first.weight"][0, 0, 0, 0] = float("nan")
        save_file(state, path, config)
    elif how == "missing-key":
        del state["conv_last.bias"]
        save_file(state, path, config)
    elif how == "extra-key":
        state["surplus"] = torch.zeros(1)
        save_file(state, path, config)
    elif how == "wrong-shape":
        state["norm.weight"] = torch.zeros(13)
        save_file(state, path, config)
    elif how == "wrong-dtype":
        state["norm.weight"] = torch.zeros(12, dtype=torch.int32)
        save_file(state, path, config)
    elif how == "config-bomb":
        save_file(state, path, {"config": json.dumps({**PFTConfig(**TINY).to_dict(), "window_size": 100000})})
    elif how == "config-no-json":
        save_file(state, path, {"config": "window 8"})
    elif how == "config-list":
        save_file(state, path, {"config": "[1, 2]"})
    elif how == "other-architecture":
        save_file({"body.0.weight": torch.zeros(3)}, path)
    elif how == "atd":
        state["layers.0.residual_group.td"] = torch.zeros(3)
        save_file(state, path, config)
    return path


DAMAGE = {
    "cut": "cannot be read",
    "empty": "cannot be read",
    "huge-header": "cannot be read",
    "no-json": "cannot be read",
    "nan": "conv_first.weight holds values that are not finite",
    "missing-key": "missing conv_last.bias",
    "extra-key": "unexpected surplus",
    "wrong-shape": r"norm.weight is \(13,\), expected \(12,\)",
    "wrong-dtype": "norm.weight is torch.int32",
    "config-bomb": "window_size",
    "config-no-json": "configuration in its metadata",
    "config-list": "configuration in its metadata",
    "other-architecture": "no PFT-SR weights.*body.0.weight",
    "atd": "no PFT-SR weights",
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_and_foreign_files_are_refused_with_the_reason(file: Path, how: str) -> None:
    path = damaged(file, how)
    with pytest.raises(WeightsError, match=f"{how}.safetensors: .*{DAMAGE[how]}"):
        load_model(path)


@pytest.mark.parametrize(
    ("how", "listed"), [("cut", True), ("empty", False), ("huge-header", False), ("atd", False), ("no-json", False)]
)
def test_pft_files_are_told_by_their_table_of_contents(file: Path, how: str, listed: bool) -> None:
    assert is_pft_file(file)
    assert is_pft_file(damaged(file, how)) is listed


def test_pth_files_are_told_without_unpickling(model: PFTSR, tmp_path: Path) -> None:
    torch.save({"params_ema": model.state_dict()}, tmp_path / "pft.pth")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    (tmp_path / "noise.pth").write_bytes(b"noise")
    found = [is_pft_file(tmp_path / name) for name in ("pft.pth", "other.pth", "noise.pth", "absent.pth")]
    assert found == [True, False, False, False]


def test_a_failed_save_keeps_what_was_there(model: PFTSR, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        save_model(model, file)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_describe_tells_what_a_file_is(file: Path, model: PFTSR) -> None:
    facts = describe(file)
    assert facts["architecture"] == "PFT-SR"
    assert facts["scale"] == 2
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["metadata"] == {"licence": "none"}
    assert facts["preset"] is None


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    with pytest.raises(WeightsError, match=rf"no such variant\. Variants: {next(iter(CATALOGUE))}"):
        resolve("huge_x16")


@pytest.mark.parametrize("name", BUNDLED_NAMES)
def test_every_catalogue_entry_is_bundled_whole_and_says_what_it_is(name: str) -> None:
    variant = CATALOGUE[name]
    path = resolve(name)
    facts = describe(name)
    assert (facts["preset"], facts["scale"]) == (variant.preset, variant.scale)
    assert (facts["bytes"], facts["sha256"]) == (variant.size, variant.sha256)
    assert path.stat().st_size < 4_000_000
    assert variant.licence
    assert json.loads(facts["metadata"]["training"])["data_sha256"]
    assert load_model(name).config.scale == variant.scale


@pytest.mark.parametrize("name", BUNDLED_NAMES[:1])
def test_a_damaged_bundled_file_is_not_used(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / CATALOGUE[name].file).write_bytes(b"damaged")
    monkeypatch.setattr("pft_arch.weights.BUNDLED", tmp_path)
    with pytest.raises(WeightsError, match=f"{name} are missing or damaged; reinstall"):
        resolve(name)
