"""The nodes in a real ComfyUI, through its HTTP API and websocket, as the frontend uses them.

`python tests/host/make_host.py DIRECTORY` makes one; PFT_TEST_HOST=DIRECTORY tells these tests of it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from host.server import NODES, REPOSITORY, Graph, Host, Message, Run
from hub_server import HubServer, Repo
from pft_arch import CATALOGUE, cli, create_pft_sr, load_model, upscale
from pft_arch.target import plan, upscale_to
from pft_arch.weights import resolve, save_model

PACK_NAME = "PFT-SR größer"  # a dash, a space and letters beyond ASCII
BUNDLED = [name for name, variant in CATALOGUE.items() if variant.source == "bundled"]
FILES = ("pft_sr/light.safetensors", "upscale_models/light.safetensors", "pft_sr/elsewhere.safetensors")
WRAPPED = "upscale_models/light_wrapped.pth"
REPLACED = "pft_sr/replaced.safetensors"
BROKEN = "pft_sr/broken.safetensors"
OTHER = "another_architecture.safetensors"


def save_pft(path: Path, seed: int) -> None:
    """A small PFT-SR file with random weights, twice the size."""
    torch.manual_seed(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_model(create_pft_sr(2, "light"), path)


def save_other(path: Path) -> None:
    """A small file of another architecture that the host's own loader opens: three convolutions, twice the size."""
    shapes = {"body.0": (4, 3, 3, 3), "body.1": (4,), "body.2": (4, 4, 3, 3), "body.3": (4,), "body.4": (12, 4, 3, 3)}
    weights = {f"{name}.weight": torch.zeros(shape) for name, shape in shapes.items()}
    biases = {f"{name}.bias": torch.zeros(shape[0]) for name, shape in shapes.items() if len(shape) > 1}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights | biases, path)


@pytest.fixture(scope="module")
def home() -> Path:
    directory = os.environ.get("PFT_TEST_HOST")
    if not directory:
        pytest.skip("PFT_TEST_HOST does not name a directory that tests/host/make_host.py made")
    return Path(directory)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base directory of the host, with models in it."""
    base = tmp_path_factory.mktemp("host") / "Bäse dir"
    own, common, extra = base / "models" / "pft_sr", base / "models" / "upscale_models", base.parent / "extra"
    save_pft(own / "light.safetensors", seed=1)
    save_pft(common / "light.safetensors", seed=2)
    save_pft(extra / "elsewhere.safetensors", seed=3)
    save_pft(own / "replaced.safetensors", seed=4)
    torch.save({"params_ema": load_model(common / "light.safetensors").state_dict()}, common / "light_wrapped.pth")
    save_other(common / OTHER)
    save_other(own / OTHER)
    weights = load_file(own / "light.safetensors")
    weights["conv_first.weight"] = weights["conv_first.weight"][:1]
    save_file(weights, own / "broken.safetensors")
    (own / "notes.txt").write_text("not a model")
    (base / "paths.yaml").write_text(f"elsewhere:\n    base_path: {base.parent}\n    pft_sr: extra\n", encoding="utf-8")
    return base


@pytest.fixture(scope="module")
def host(home: Path, models: Path) -> Iterator[Host]:
    (models / "custom_nodes" / "other").mkdir(parents=True)
    (models / "custom_nodes" / "other" / "__init__.py").write_text(OTHER_PACK)
    arguments = (f"--extra-model-paths-config={models / 'paths.yaml'}",)
    with Host(home, models, pack_name=PACK_NAME, arguments=arguments) as running:
        yield running


@pytest.fixture(scope="module")
def bare_host(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """A host that lacks every package that the pack can start without."""
    base = tmp_path_factory.mktemp("bare")
    save_pft(base / "models" / FILES[0], seed=1)
    (base / "missing").mkdir()
    for name in ("numba", "triton", "spandrel"):
        error = f"raise ModuleNotFoundError(\"No module named '{name}'\", name='{name}')\n"
        (base / "missing" / f"{name}.py").write_text(error)
    with Host(home, base, environment={"PYTHONPATH": str(base / "missing")}) as running:
        yield running


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """A small photo, of a size that no window divides."""
    path = REPOSITORY / "tests" / "data" / "photo.png"
    if path.is_file():
        return Image.open(path).convert("RGB").crop((0, 0, 45, 37))
    y, x = np.mgrid[:37, :45]
    wave = np.stack([np.sin(x / 3 + y / 7), np.cos(x * y / 90), np.sin(y / 2)], axis=-1)
    return Image.fromarray((127.5 + 100 * wave).astype(np.uint8))


def file_of(models: Path, choice: str) -> Path:
    """Where the file behind a choice in the drop-down lies."""
    if choice in BUNDLED:
        return resolve(choice)
    return models.parent / "extra" / "elsewhere.safetensors" if "elsewhere" in choice else models / "models" / choice


def expected(image: Image.Image, path: Path) -> np.ndarray[Any, Any]:
    """What the library makes of it, in the 8 bits that SaveImage writes."""
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)[None]
    return (upscale(pixels, load_model(path))[0].numpy() * 255).astype(np.uint8)


def assert_same(got: Image.Image, want: np.ndarray[Any, Any]) -> None:
    """Equal within one of 255 levels, and a picture at all."""
    pixels = np.asarray(got)
    assert pixels.shape == want.shape
    assert np.abs(pixels.astype(int) - want.astype(int)).max() <= 1
    assert want[..., :3].std() > 1


def from_hub(workflow: Graph, repo_id: str, filename: str, revision: str = "main") -> Graph:
    """The same workflow with PFT-SR Load Model from Hub."""
    inputs = {"repo_id": repo_id, "filename": filename, "revision": revision, "precision": "auto"}
    return {**workflow, "model": {"class_type": "PFTSRLoadModelFromHub", "inputs": inputs}}


def graph(model: str, image: str, *, precision: str = "auto", tile: int = 0, overlap: int = 16) -> Graph:
    """Load Image, PFT-SR Load Model, PFT-SR Upscale, Save Image."""
    return {
        "image": {"class_type": "LoadImage", "inputs": {"image": image}},
        "model": {"class_type": "PFTSRLoadModel", "inputs": {"model": model, "precision": precision}},
        "upscale": {
            "class_type": "PFTSRUpscale",
            "inputs": {"upscale_model": ["model", 0], "image": ["image", 0], "tile": tile, "overlap": overlap},
        },
        "save": {"class_type": "SaveImage", "inputs": {"images": ["upscale", 0], "filename_prefix": "test"}},
    }


# a pack that does as others do with an UPSCALE_MODEL, and tells what room ours asks of the host
OTHER_PACK = """
import logging
from comfy import model_management
from comfy.utils import tiled_scale

load = model_management.load_models_gpu

def told(models, memory_required=0, **others):
    logging.info("room asked: %d", memory_required)
    return load(models, memory_required=memory_required, **others)

model_management.load_models_gpu = told

class Tiler:
    RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE",), "run", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"upscale_model": ("UPSCALE_MODEL",), "image": ("IMAGE",)}}

    def run(self, upscale_model, image):
        upscale_model.to(model_management.get_torch_device())
        pixels = image.movedim(-1, -3)
        out = tiled_scale(pixels, upscale_model, tile_x=32, tile_y=32, overlap=8, upscale_amount=upscale_model.scale)
        return (out.movedim(-3, -1).clamp(0, 1),)

NODE_CLASS_MAPPINGS = {"OtherTiler": Tiler}
"""


def test_the_entry_point_can_be_imported_outside_a_host() -> None:
    spec = importlib.util.spec_from_file_location("a pack of any name", REPOSITORY / "__init__.py")
    assert spec and spec.loader
    pack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
    assert callable(pack.comfy_entrypoint)
    assert (REPOSITORY / pack.WEB_DIRECTORY / "docs").is_dir()


def test_every_node_is_offered_with_help_for_every_input(host: Host) -> None:
    for node in NODES:
        info = host.object_info(node)
        assert info["description"] and info["category"] == "image/upscaling"
        assert info["display_name"].startswith("PFT-SR ")
        for name, (_, details) in inputs(info).items():
            assert details["tooltip"], name


def test_inputs_for_few_are_folded_away_where_the_host_can(host: Host) -> None:
    folded = {
        name for name, (_, details) in inputs(host.object_info("PFTSRUpscale")).items() if details.get("advanced")
    }
    assert folded == (set() if host.version < (0, 9, 2) else {"overlap", "ensemble", "precision"})


def test_starting_the_host_with_the_pack_costs_next_to_nothing(host: Host) -> None:
    times = re.findall(rf"([\d.]+) seconds: .*{re.escape(PACK_NAME)}", host.log)
    assert [float(seconds) < 1 for seconds in times] == [True]


def test_the_catalogue_comes_first_and_only_pft_files_follow(host: Host) -> None:
    offered = host.options("PFTSRLoadModel", "model")
    assert offered[: len(CATALOGUE)] == list(CATALOGUE)
    assert set(offered[len(CATALOGUE) :]) == {*FILES, WRAPPED, REPLACED, BROKEN}


@pytest.mark.parametrize("model", [*BUNDLED, *FILES])
def test_every_model_gives_what_the_library_gives(host: Host, models: Path, photo: Image.Image, model: str) -> None:
    run = host.run(graph(model, host.add_input("photo.png", photo)))
    assert run.ending == "execution_success", run.error
    assert_same(run.images[0], expected(photo, file_of(models, model)))


def test_the_command_line_gives_the_same_picture(host: Host, photo: Image.Image, tmp_path: Path) -> None:
    photo.save(tmp_path / "photo.png")
    arguments = ["upscale", str(tmp_path / "photo.png"), "-o", str(tmp_path / "large.png"), "--model", "light_x2"]
    assert cli.main(arguments) == 0
    run = host.run(graph("light_x2", host.add_input("photo.png", photo)))
    with Image.open(tmp_path / "large.png") as large:
        assert_same(run.images[0], np.asarray(large))


def test_a_file_anywhere_is_loaded_by_its_path(host: Host, models: Path, photo: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "größer here.safetensors"
    path.write_bytes(file_of(models, FILES[0]).read_bytes())
    workflow = graph(FILES[1], host.add_input("photo.png", photo))
    workflow["model"]["inputs"]["file"] = f'"{path}"'  # as a file manager copies it
    run = host.run(workflow)
    assert run.ending == "execution_success", run.error
    assert_same(run.images[0], expected(photo, path))

    workflow["model"]["inputs"]["file"] = str(tmp_path / "absent.safetensors")
    run = host.run(workflow)
    assert run.ending == "execution_error"
    assert "absent.safetensors: no such weights file" in run.error


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_close_to_full(host: Host, models: Path, photo: Image.Image, precision: str) -> None:
    small = photo.crop((0, 0, 16, 16))  # half precision is slow on a CPU
    run = host.run(graph(FILES[0], host.add_input("small.png", small), precision=precision))
    assert run.ending == "execution_success", run.error
    assert np.abs(np.asarray(run.images[0]).astype(int) - expected(small, file_of(models, FILES[0]))).mean() < 2


def test_the_core_upscale_node_takes_the_model(host: Host, models: Path, photo: Image.Image) -> None:
    workflow = graph(FILES[0], host.add_input("photo.png", photo))
    workflow["upscale"] = {
        "class_type": "ImageUpscaleWithModel",
        "inputs": {"upscale_model": ["model", 0], "image": ["image", 0]},
    }
    run = host.run(workflow)
    assert run.ending == "execution_success", run.error
    assert_same(run.images[0], expected(photo, file_of(models, FILES[0])))


def test_other_packs_tilers_take_the_model(host: Host, models: Path, photo: Image.Image) -> None:
    workflow = graph(FILES[0], host.add_input("photo.png", photo))
    inputs = {"upscale_model": ["model", 0], "image": ["image", 0]}
    workflow["upscale"] = {"class_type": "OtherTiler", "inputs": inputs}
    run = host.run(workflow)
    assert run.ending == "execution_success", run.error
    want = expected(photo, file_of(models, FILES[0]))
    got = np.asarray(run.images[0])
    assert got.shape == want.shape
    assert np.abs(got.astype(int) - want.astype(int)).mean() < 3  # its tiles are cut across the windows


@pytest.mark.parametrize("file", ["light.safetensors", "light_wrapped.pth"])
@pytest.mark.parametrize("upscaler", ["ImageUpscaleWithModel", "PFTSRUpscale"])
def test_the_core_loader_opens_our_files(
    host: Host, models: Path, photo: Image.Image, file: str, upscaler: str
) -> None:
    workflow = graph(FILES[1], host.add_input("photo.png", photo))
    workflow["model"] = {"class_type": "UpscaleModelLoader", "inputs": {"model_name": file}}
    if upscaler == "ImageUpscaleWithModel":
        inputs = {"upscale_model": ["model", 0], "image": ["image", 0]}
        workflow["upscale"] = {"class_type": upscaler, "inputs": inputs}
    run = host.run(workflow)
    assert run.ending == "execution_success", run.error
    assert_same(run.images[0], expected(photo, file_of(models, FILES[1])))


def test_transparency_is_upscaled_too(host: Host, models: Path, photo: Image.Image) -> None:
    transparent = photo.copy()
    transparent.putalpha(photo.convert("L").transpose(Image.Transpose.ROTATE_180))
    workflow = graph(FILES[0], host.add_input("transparent.png", transparent))
    workflow["joined"] = {
        "class_type": "JoinImageWithAlpha",
        "inputs": {"image": ["image", 0], "alpha": ["image", 1]},
    }
    workflow["upscale"]["inputs"]["image"] = ["joined", 0]
    run = host.run(workflow)
    assert run.ending == "execution_success", run.error
    assert run.images[0].mode == "RGBA"
    assert_same(run.images[0], expected(transparent, file_of(models, FILES[0])))


def test_a_batch_in_tiles_reports_progress_to_the_end(host: Host, photo: Image.Image) -> None:
    workflow = graph(FILES[0], host.add_input("photo.png", photo), tile=32, overlap=8)
    workflow["batch"] = {"class_type": "RepeatImageBatch", "inputs": {"image": ["image", 0], "amount": 3}}
    workflow["upscale"]["inputs"]["image"] = ["batch", 0]
    run = host.run(workflow)
    assert run.ending == "execution_success", run.error
    assert len(run.images) == 3
    last = progress(run)[-1]
    assert last["value"] == last["max"] > 3
    assert {picture.size for picture in run.previews} == {(90, 74)}
    assert np.asarray(run.previews[0]).std() > 1

    workflow["upscale"]["inputs"]["overlap"] = 16
    again = host.run(workflow)
    assert [message["data"]["node"] for message in again.messages if message["type"] == "executing"][:1] == ["upscale"]


def test_any_size_is_reached(host: Host, models: Path, photo: Image.Image) -> None:
    small = photo.crop((0, 0, 24, 16)).convert("RGB")
    network = load_model(file_of(models, FILES[0]))
    pixels = torch.from_numpy(np.asarray(small, dtype=np.float32) / 255)[None]
    workflow = graph(FILES[0], host.add_input("small.png", small))
    for resize, values, ensemble in (
        ("factor", {"factor": 2.5}, False),
        ("fill and crop", {"width": 30, "height": 30}, True),
    ):
        workflow["upscale"]["inputs"].update(values, resize=resize, ensemble=ensemble)
        run = host.run(workflow)
        assert run.ending == "execution_success", run.error
        want = upscale_to(pixels, network, plan((16, 24), 2, resize, **values), ensemble=ensemble)
        assert_same(run.images[0], (want[0].numpy() * 255).astype(np.uint8))

    workflow["upscale"]["inputs"].update(resize="stretch", width=3000)
    assert "Lower width or height" in host.run(workflow).error
    workflow["image"] = {
        "class_type": "EmptyImage",
        "inputs": {"width": 4096, "height": 4096, "batch_size": 1, "color": 0},
    }
    workflow["upscale"]["inputs"].update(resize="factor", factor=16.0)
    assert re.search(r"needs 144\.0 GB of main memory.*Choose a smaller size", host.run(workflow).error)


def test_where_the_network_looks_is_drawn(host: Host, photo: Image.Image) -> None:
    workflow = graph("light_x2", host.add_input("photo.png", photo))
    inputs = {"upscale_model": ["model", 0], "image": ["image", 0], "x": 0.3, "y": 1.0, "head": 0, "layout": "batch"}
    workflow["upscale"] = {"class_type": "PFTSRAttentionMap", "inputs": inputs}
    run = host.run(workflow)
    assert run.ending == "execution_success", run.error
    assert len(run.images) == 16
    assert all(np.asarray(picture).std() > 1 for picture in run.images)
    inputs.update(layout="sheet", head=7)
    assert "head must be from 1 to 6" in host.run(workflow).error
    inputs.update(head=6)
    (sheet,) = host.run(workflow).images
    assert sheet.width > 2 * run.images[0].width and sheet.height > 2 * run.images[0].height


def test_two_images_are_compared(host: Host, photo: Image.Image) -> None:
    workflow = graph("light_x2", host.add_input("photo.png", photo))
    other = {"class_type": "LoadImage", "inputs": {"image": host.add_input("other.png", photo.rotate(180))}}
    inputs = {"image": ["image", 0], "reference": ["other", 0], "border": 2, "gain": 4.0}
    workflow = {"image": workflow["image"], "other": other, "compare": {"class_type": "PFTSRCompare", "inputs": inputs}}
    run = host.run(workflow)  # nothing needs its outputs
    assert run.ending == "execution_success", run.error
    assert re.fullmatch(r"PSNR \d+\.\d\d dB, SSIM -?0\.\d{4}", run.outputs[0]["text"][0])
    other["inputs"]["image"] = host.add_input("narrow.png", photo.crop((0, 0, 20, 37)))
    assert "image has 45 x 37 pixels and reference 20 x 37" in host.run(workflow).error


def test_after_all_was_unloaded_the_same_bytes_come_out(host: Host, photo: Image.Image) -> None:
    workflow = graph(FILES[0], host.add_input("photo.png", photo))
    first = host.run(workflow).images[0]
    host.free()
    assert host.run(workflow).images[0].tobytes() == first.tobytes()


def test_no_more_room_is_asked_than_a_pass_may_take(host: Host, photo: Image.Image) -> None:
    """Room that is asked for and not needed has the host unload other models. The core node asks for 2.2 GiB here."""
    asked = len(re.findall("room asked", host.log))
    host.run(graph(FILES[1], host.add_input("room.png", photo.rotate(180))))
    (room,) = re.findall(r"room asked: (\d+)", host.log)[asked:]
    assert 2**20 < int(room) < 2**26


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory as Linux tells it")
def test_prompt_after_prompt_leaves_memory_as_the_first_did(host: Host, photo: Image.Image) -> None:
    """Each run makes a copy of the network in another precision, 2.4 MB, which must not stay."""
    workflow = graph(FILES[0], host.add_input("photo.png", photo), precision="fp16")
    workflow["upscale"]["inputs"].update(precision="fp32", resize="factor")
    memory = []
    for number in range(20):
        workflow["upscale"]["inputs"]["factor"] = 1.5 + number / 100
        run = host.run(workflow)
        assert run.ending == "execution_success", run.error
        memory.append(host.memory())
    assert memory[-1] - memory[4] < 8 * 2**20, memory  # 15 copies would be 36 MB
    assert "memory leak" not in host.log  # the host's own watch over models


@pytest.fixture(scope="module")
def clip(host: Host, photo: Image.Image) -> str:
    """The photo moving to the left, 8 frames of 0.1 s with the sound of a beep."""
    with av.open(str(host.base / "input" / "clip.mp4"), "w") as file:
        video, audio = file.add_stream("libx264", rate=10), file.add_stream("aac", rate=48000)
        video.width, video.height, video.pix_fmt, video.options = 44, 36, "yuv420p", {"crf": "5"}
        for number in range(8):
            picture = np.roll(np.asarray(photo)[:36, :44], -number, axis=1)
            file.mux(video.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        beep = np.sin(np.arange(38400) / 20).astype(np.float32)[None]
        sound = av.AudioFrame.from_ndarray(beep, format="fltp", layout="mono")
        sound.sample_rate, sound.pts = 48000, 0
        file.mux([*video.encode(None), *audio.encode(sound), *audio.encode(None)])
    return "clip.mp4"


def video_graph(clip: str, **inputs: Any) -> Graph:
    """Load Video, PFT-SR Load Model, PFT-SR Upscale Video, Save Video."""
    inputs = {"upscale_model": ["model", 0], "video": ["video", 0], "tile": 0, "overlap": 0, "quality": 10, **inputs}
    saved = {"video": ["upscale", 0], "filename_prefix": "clip", "format": "auto", "codec": "auto"}
    return {
        "video": {"class_type": "LoadVideo", "inputs": {"file": clip}},
        "model": {"class_type": "PFTSRLoadModel", "inputs": {"model": FILES[0], "precision": "auto"}},
        "upscale": {"class_type": "PFTSRUpscaleVideo", "inputs": inputs},
        "save": {"class_type": "SaveVideo", "inputs": saved},
    }


def frames_of(path: Path) -> list[tuple[float, np.ndarray[Any, Any]]]:
    with av.open(str(path)) as file:
        return [(float(frame.time or 0), frame.to_ndarray(format="rgb24")) for frame in file.decode(video=0)]


def saved(host: Host, run: Run) -> Path:
    assert run.ending == "execution_success", run.error
    (file,) = run.outputs[0]["images"]
    return host.base / "output" / file["subfolder"] / file["filename"]


def test_a_video_keeps_its_frames_timing_and_sound(host: Host, models: Path, clip: str) -> None:
    run = host.run(video_graph(clip))
    path = saved(host, run)
    before, after = frames_of(host.base / "input" / clip), frames_of(path)
    assert [time for time, _ in after] == pytest.approx([time for time, _ in before])
    for (_, small), (_, large) in list(zip(before, after, strict=True))[::7]:
        want = expected(Image.fromarray(small), file_of(models, FILES[0]))
        assert large.shape == want.shape
        assert np.abs((large - want.astype(float)) @ (0.299, 0.587, 0.114)).mean() < 3  # its colour is coarser
    with av.open(str(path)) as file:
        sound = np.concatenate([frame.to_ndarray() for frame in file.decode(audio=0)], axis=1)
    assert sound.shape[1] / 48000 == pytest.approx(0.8, abs=0.05)
    assert sound.std() > 0.1
    assert progress(run)[-1]["value"] == progress(run)[-1]["max"] == 8
    assert {picture.size for picture in run.previews} == {(88, 72)}


def test_a_part_of_a_video_and_one_made_of_images_are_videos_too(host: Host, clip: str, photo: Image.Image) -> None:
    workflow = video_graph(clip, video=["part", 0])
    if host.object_info("Video Slice"):
        inputs = {"video": ["video", 0], "start_time": 0.3, "duration": 0.2, "strict_duration": False}
        workflow["part"] = {"class_type": "Video Slice", "inputs": inputs}
        assert len(frames_of(saved(host, host.run(workflow)))) == 2

    workflow["image"] = {
        "class_type": "LoadImage",
        "inputs": {"image": host.add_input("e.png", photo.crop((0, 0, 44, 36)))},
    }
    workflow["images"] = {"class_type": "RepeatImageBatch", "inputs": {"image": ["image", 0], "amount": 3}}
    workflow["part"] = {"class_type": "CreateVideo", "inputs": {"images": ["images", 0], "fps": 5.0}}
    workflow["upscale"]["inputs"].update(resize="fill and crop", width=66, height=66)
    frames = frames_of(saved(host, host.run(workflow)))
    assert [time for time, _ in frames] == pytest.approx([0, 0.2, 0.4])
    assert frames[0][1].shape == (66, 66, 3)
    workflow["image"]["inputs"]["image"] = host.add_input("odd.png", photo)
    assert "45 x 37 pixels" in host.run(workflow).error


def test_a_cancelled_video_leaves_no_file(host: Host, clip: str) -> None:
    temporary = host.base / "temp"
    before = set(temporary.rglob("*"))

    def cancel(message: Message) -> None:
        if message["type"] == "executing" and message["data"]["node"] == "upscale":
            while set(temporary.rglob("*")) == before:  # at work from then on
                time.sleep(0.01)
            host.interrupt()

    run = host.run(video_graph(clip, tile=16, overlap=8), on_message=cancel)
    assert run.ending == "execution_interrupted"
    assert set(temporary.rglob("*")) == before


def test_a_file_replaced_under_its_name_is_loaded_anew(host: Host, models: Path, photo: Image.Image) -> None:
    workflow = graph(REPLACED, host.add_input("photo.png", photo))
    for seed in (5, 6):
        save_pft(models / "models" / REPLACED, seed)
        run = host.run(workflow)
        assert run.ending == "execution_success", run.error
        assert_same(run.images[0], expected(photo, models / "models" / REPLACED))


def test_a_broken_file_is_named_and_the_host_goes_on(host: Host, photo: Image.Image) -> None:
    name = host.add_input("photo.png", photo)
    run = host.run(graph(BROKEN, name))
    assert run.ending == "execution_error"
    assert "broken.safetensors" in run.error
    assert host.run(graph(FILES[1], name, precision="fp32")).ending == "execution_success"


def test_a_model_of_another_kind_is_sent_to_the_core_node(host: Host, photo: Image.Image) -> None:
    workflow = graph(FILES[0], host.add_input("photo.png", photo))
    workflow["model"] = {"class_type": "UpscaleModelLoader", "inputs": {"model_name": OTHER}}
    run = host.run(workflow)
    assert run.ending == "execution_error"
    assert "Upscale Image (using Model)" in run.error


def test_cancel_stops_between_tiles_and_the_host_goes_on(host: Host, photo: Image.Image) -> None:
    name = host.add_input("large.png", photo.resize((512, 512)))
    at: list[int] = []

    def cancel(message: Message) -> None:
        if message["type"] == "progress" and not at:
            host.interrupt()
            at.append(message["data"]["value"])

    run = host.run(graph(FILES[0], name, tile=32, overlap=8), on_message=cancel)
    assert run.ending == "execution_interrupted"
    last = progress(run)[-1]
    assert last["max"] > 10 * at[0]  # at[0]: the small tiles of one pass
    assert last["value"] <= 3 * at[0]  # the pass at work, and one more while the word travels
    assert host.run(graph(FILES[2], host.add_input("photo.png", photo), precision="fp32")).ending == "execution_success"


@pytest.mark.parametrize("name", ["attention_map", "compare", "simple_upscale"])
def test_the_example_workflows_run(host: Host, photo: Image.Image, name: str) -> None:
    """In the oldest host too, where no browser runs them; `test_browser.py` runs all of them in a newer one."""
    workflow = json.loads((REPOSITORY / "example_workflows" / f"{name}.json").read_text(encoding="utf-8"))
    api = as_api(host, workflow)
    for node in api.values():
        if node["class_type"] == "LoadImage":
            node["inputs"]["image"] = host.add_input("even.png", photo.crop((0, 0, 44, 36)))
        if node["class_type"] == "PFTSRLoadModel":
            assert node["inputs"]["model"] in BUNDLED
    run = host.run(api)
    assert run.ending == "execution_success", run.error
    assert run.images


def test_the_host_starts_without_what_is_optional(bare_host: Host, photo: Image.Image) -> None:
    assert all(bare_host.object_info(node) for node in NODES)
    run = bare_host.run(graph(FILES[0], bare_host.add_input("photo.png", photo)))
    assert run.ending == "execution_error"
    assert "pip install spandrel" in run.error


@pytest.mark.parametrize("node", NODES)
def test_each_node_has_a_help_page_where_the_frontend_looks(bare_host: Host, node: str) -> None:
    # The host serves no pack's pages from a folder whose name has a space in it, so this is not asked of `host`.
    page = bare_host.get_text(f"/extensions/{bare_host.pack_name}/docs/{node}.md")
    info = bare_host.object_info(node)
    assert page.startswith(f"# {info['display_name']}\n")
    assert all(f"| `{name}` |" in page for name in inputs(info))


def test_a_published_variant_says_how_to_get_it(host: Host, photo: Image.Image) -> None:
    run = host.run(graph("pft_x4", host.add_input("photo.png", photo)))
    assert run.ending == "execution_error"
    assert "003_PFT_SRx4_finetune.pth" in run.error and "PFT_SR_REPO" in run.error


def test_models_of_the_hub_arrive_once_and_work_offline_afterwards(
    home: Path, photo: Image.Image, tmp_path: Path
) -> None:
    save_pft(tmp_path / "a.safetensors", seed=7)
    save_pft(tmp_path / "b.safetensors", seed=8)
    contents = {name: (tmp_path / name).read_bytes() for name in ("a.safetensors", "b.safetensors")}
    base = tmp_path / "host"
    own = base / "models" / "pft_sr"
    own.mkdir(parents=True)
    (own / "catalogue.toml").write_text(
        '[on_the_hub_x2]\nscale = 2\nrepo_id = "someone/pft"\nfile = "a.safetensors"\n'
        f'sha256 = "{hashlib.sha256(contents["a.safetensors"]).hexdigest()}"\n[broken]\nscale = 7\n'
    )
    environment = {"HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "", "NO_PROXY": "127.0.0.1,localhost"}
    with HubServer({"someone/pft": Repo(contents)}) as hub:
        environment["HF_ENDPOINT"] = hub.url
        with Host(home, base, environment=environment) as online:
            offered = online.options("PFTSRLoadModel", "model")
            assert "on_the_hub_x2" in offered and "broken" not in offered
            by_name = graph("on_the_hub_x2", online.add_input("photo.png", photo))
            by_address = from_hub(by_name, "someone/pft", "b.safetensors")
            first = run_and_compare(online, by_name, photo, tmp_path / "a.safetensors")
            assert {"value": len(contents["a.safetensors"]), "node": "model"}.items() <= progress(first)[0].items()
            run_and_compare(online, by_address, photo, tmp_path / "b.safetensors")
            run_and_compare(online, by_name, photo, tmp_path / "a.safetensors")
            absent = online.run(from_hub(by_name, "someone/pft", "c.safetensors"))
            assert "the repo has no such file" in absent.error
            assert "give the Hub repo as user/repo" in online.run(from_hub(by_name, "", "c.safetensors")).error
            assert online.log.count("[broken] is left out") == 1
        assert [request.sent for request in hub.downloads] == [len(content) for content in contents.values()]

    with Host(home, base, environment={**environment, "HF_HUB_OFFLINE": "1"}) as offline:
        run_and_compare(offline, by_name, photo, tmp_path / "a.safetensors")
        run_and_compare(offline, by_address, photo, tmp_path / "b.safetensors")
        assert "offline mode is on" in offline.run(from_hub(by_name, "someone/pft", "c.safetensors")).error


def run_and_compare(host: Host, workflow: Graph, image: Image.Image, weights: Path) -> Run:
    run = host.run(workflow)
    assert run.ending == "execution_success", run.error
    assert_same(run.images[0], expected(image, weights))
    return run


def inputs(info: dict[str, Any]) -> dict[str, Any]:
    return {**info["input"]["required"], **info["input"].get("optional", {})}


def progress(run: Run) -> list[dict[str, int]]:
    return [message["data"] for message in run.messages if message["type"] == "progress"]


def as_api(host: Host, workflow: dict[str, Any]) -> Graph:
    """A workflow file as the frontend submits it: links by name, widgets in the order of the host's description."""
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    api: Graph = {}
    for node in workflow["nodes"]:
        if node["type"] == "MarkdownNote":  # the frontend's own
            continue
        info = host.object_info(node["type"])
        assert info, f"the host has no node {node['type']}"
        linked = {slot["name"]: links[slot["link"]] for slot in node["inputs"] if slot.get("link") is not None}
        names = [name for name in info["input"]["required"] if name not in linked]
        api[str(node["id"])] = {
            "class_type": node["type"],
            "inputs": linked | dict(zip(names, node.get("widgets_values", ()), strict=False)),
        }
    return api
