"""Publishing through the real huggingface_hub to a Hub on the loopback, and loading what was published."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hub_server import COMMIT, HubServer, Repo
from pft_arch import WeightsError, create_pft_sr, load_model
from pft_arch.catalogue import catalogue
from pft_arch.cli import main
from pft_arch.publish import publish
from pft_arch.weights import resolve, save_model


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as server:
        # the server speaks the older protocol for large files
        server.stand_in(monkeypatch, tmp_path, HF_HUB_DISABLE_XET=True)
        monkeypatch.setenv("HF_TOKEN", server.writer)
        yield server


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    torch.manual_seed(0)
    training = json.dumps({"reached": {"iteration": 2250, "psnr_y": 35.8}})
    paths = [tmp_path / f"light_x{scale}.safetensors" for scale in (2, 3)]
    for scale, path in zip((2, 3), paths, strict=True):
        save_model(create_pft_sr(scale, "light"), path, {"licence": "Apache-2.0", "training": training})
    return paths


def test_what_is_published_loads_by_its_catalogue_entry(hub: HubServer, files: list[Path], tmp_path: Path) -> None:
    done = publish("someone/light", files)
    repo = hub.repos["someone/light"]
    assert set(repo.files) == {*(path.name for path in files), "README.md", "config.json", "SHA256SUMS"}
    assert all(repo.files[path.name] == path.read_bytes() for path in files)
    sums = {line.split()[1]: line.split()[0] for line in repo.files["SHA256SUMS"].decode().splitlines()}
    assert sums == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    assert json.loads(repo.files["config.json"])["files"]["light_x3.safetensors"]["scale"] == 3

    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "catalogue.toml").write_text(
        done.toml().replace("light_x", "published_x").replace('file = "published', 'file = "light')
    )
    entry = catalogue(folder)["published_x3"]
    assert (entry.revision, entry.preset, entry.scale) == (COMMIT, "light", 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = resolve("published_x3", folder)
    assert path.read_bytes() == files[1].read_bytes()
    assert load_model(path).config.scale == 3


def test_the_card_tells_what_the_files_are(hub: HubServer, files: list[Path], tmp_path: Path) -> None:
    sha256 = hashlib.sha256(files[0].read_bytes()).hexdigest()
    result = {
        "model": {"sha256": sha256},
        "hr": "data/Set5",
        "images": [{}] * 5,
        "mean": {"psnr_y": 35.8012, "ssim_y": None},
    }
    (tmp_path / "set5.json").write_text(json.dumps(result))
    publish("someone/light", files, evaluations=[tmp_path / "set5.json"])
    card = hub.repos["someone/light"].files["README.md"].decode()
    assert card.startswith("---\nlicense: apache-2.0\n")
    assert "| `light_x2.safetensors` | 2 times | light | 612,611 | float32 | 2,250 iterations, 35.80 dB PSNR-Y" in card
    assert "| `light_x2.safetensors` | Set5 | 5 | 35.80 | - |" in card
    assert "hf://someone/light/light_x2.safetensors" in card


def test_an_edited_card_is_kept(hub: HubServer, files: list[Path]) -> None:
    hub.repos["someone/light"] = Repo({"README.md": b"my own words"})
    publish("someone/light", files[:1])
    assert hub.repos["someone/light"].files["README.md"] == b"my own words"
    assert "light_x2.safetensors" in hub.repos["someone/light"].files


@pytest.mark.parametrize(("token", "message"), [("hf_reader", "may write"), ("", "HF_TOKEN")])
def test_without_the_right_nothing_happens_and_the_way_is_told(
    hub: HubServer, files: list[Path], token: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(WeightsError, match=f"someone/light: the Hub does not let you write there.*{message}"):
        publish("someone/light", files)
    assert not hub.repos


def test_trouble_of_the_hub_is_told_in_one_line(hub: HubServer, files: list[Path]) -> None:
    hub.status = 500
    with pytest.raises(WeightsError, match=r"^someone/light: not published \(.*500.*\).*try again$"):
        publish("someone/light", files)


def test_only_whole_safetensors_with_a_licence_are_published(hub: HubServer, files: list[Path], tmp_path: Path) -> None:
    torch.save({}, tmp_path / "net.pth")
    (tmp_path / "cut.safetensors").write_bytes(files[0].read_bytes()[:100_000])
    save_model(create_pft_sr(2, "light"), tmp_path / "bare.safetensors")
    for name, message in (
        ("net.pth", "pft-sr convert"),
        ("cut.safetensors", "cannot be read"),
        ("bare.safetensors", "licence"),
    ):
        with pytest.raises(WeightsError, match=rf"{name}.*{message}"):
            publish("someone/light", [tmp_path / name])
    with pytest.raises(WeightsError, match="repo_id must be user/repo"):
        publish("nobody", files)
    with pytest.raises(WeightsError, match="two files of one name"):
        publish("someone/light", [files[0], files[0]])
    with pytest.raises(WeightsError, match="not a licence"):
        publish("someone/light", files, licence="mine\ntags: [x]")
    (tmp_path / "other.json").write_text('{"model": {"sha256": "00"}, "hr": "x", "images": [], "mean": {"psnr_y": 1}}')
    for evaluation, message in ((files[0], "not the results"), (tmp_path / "other.json", "results of another file")):
        with pytest.raises(WeightsError, match=message):
            publish("someone/light", files, evaluations=[evaluation])
    assert not hub.requests


def test_the_command_prints_the_entry(hub: HubServer, files: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["publish", "--repo", "someone/light", str(files[0])]) == 0
    assert f'repo_id = "someone/light"\nrevision = "{COMMIT}"' in capsys.readouterr().out
    assert main(["publish", "--repo", "someone/light", "absent.safetensors"]) == 1
    assert "absent.safetensors" in capsys.readouterr().err
