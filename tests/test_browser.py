"""The example workflows in the real frontend, in a headless Chromium, as a user meets them.

The pack in the host is the one that the registry would send, and the host may not reach the network.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from host.browser import BrowserMissingError, Frontend, Workflow, browser_path, frontend, prepare
from host.server import NODES, REPOSITORY, Host

EXAMPLES = sorted((REPOSITORY / "example_workflows").glob("*.json"))
WIDGETS = ("BOOLEAN", "COMBO", "FLOAT", "INT", "STRING")
HERE = Path(__file__).parent
CHECKPOINT = "v1-5-pruned-emaonly-fp16.safetensors"
WIDTH, HEIGHT, FRAMES = 96, 72, 4  # of the picture and the video: the host calculates on a CPU


@pytest.fixture(scope="module")
def host(registry_pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    home = Path(os.environ.get("PFT_TEST_HOST", ""))
    if not list(home.glob("venv/lib/*/site-packages/comfyui_frontend_package")):
        pytest.skip("PFT_TEST_HOST names no host with a frontend: see tests/host/make_host.py")
    try:
        browser_path()
    except BrowserMissingError as error:
        pytest.skip(str(error))
    base = tmp_path_factory.mktemp("browser")
    prepare(base)
    checkpoints = base / "models" / "checkpoints"
    checkpoints.mkdir(parents=True)
    making = subprocess.Popen(
        [home / "venv/bin/python", HERE / "host/make_checkpoint.py", home / "ComfyUI", checkpoints / CHECKPOINT]
    )
    environment = {"PYTHONPATH": str(HERE / "host" / "no_network")}
    with Host(home, base, pack=registry_pack, frontend=True, environment=environment) as running:
        with Image.open(HERE / "data" / "photo.png") as photo:
            running.add_input("example.png", photo.convert("RGB").crop((0, 0, WIDTH, HEIGHT)))
        save_video(base / "input" / "example.mp4")
        assert making.wait() == 0
        yield running
    shutil.rmtree(checkpoints)  # 300 MB


@pytest.fixture(scope="module")
def page(host: Host) -> Iterator[Frontend]:
    with frontend(host) as opened:
        yield opened


def save_video(path: Path) -> None:
    """The photo moving to the left, with a tone."""
    import av

    with Image.open(HERE / "data" / "photo.png") as photo, av.open(path, "w") as file:
        video, audio = file.add_stream("libx264", 8), file.add_stream("aac", 8000)
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for shift in range(FRAMES):
            picture = photo.convert("RGB").crop((8 * shift, 0, 8 * shift + WIDTH, HEIGHT))
            file.mux(video.encode(av.VideoFrame.from_image(picture)))
        tone = (8000 * np.sin(np.arange(8000 * FRAMES // 8) * 0.3)).astype(np.int16)[None]
        samples = av.AudioFrame.from_ndarray(tone, "s16", "mono")
        samples.sample_rate = 8000
        for stream, frame in ((audio, samples), (audio, None), (video, None)):
            file.mux(stream.encode(frame))


def workflow(name: str) -> Workflow:
    return dict(json.loads((REPOSITORY / "example_workflows" / f"{name}.json").read_text(encoding="utf-8")))


def contents(workflow: Workflow) -> list[tuple[int, str, list[Any]]]:
    return [(node["id"], node["type"], node.get("widgets_values") or []) for node in workflow["nodes"]]


# what each workflow is to give


def enlarged(page: Frontend, outputs: list[dict[str, Any]]) -> None:
    """The photo, twice as large."""
    (picture,) = pictures(page, outputs)
    with Image.open(HERE / "data" / "photo.png") as photo:
        plain = photo.convert("RGB").crop((0, 0, WIDTH, HEIGHT)).resize((2 * WIDTH, 2 * HEIGHT))
    assert picture.size == plain.size
    assert np.abs(np.asarray(picture).astype(int) - np.asarray(plain)).mean() < 10  # of 255


def generated(page: Frontend, outputs: list[dict[str, Any]]) -> None:
    (picture,) = pictures(page, outputs)
    assert picture.size == (128, 128) and np.asarray(picture).std() > 5


def video(page: Frontend, outputs: list[dict[str, Any]]) -> None:
    import av

    (saved,) = [entry for output in outputs for entry in output.get("images", ()) if entry["type"] == "output"]
    with av.open(io.BytesIO(page.file(saved))) as file:
        assert [stream.type for stream in file.streams] == ["video", "audio"]
        frames = list(file.decode(video=0))
    assert [(frame.width, frame.height) for frame in frames] == [(2 * WIDTH, 2 * HEIGHT)] * FRAMES


def attention(page: Frontend, outputs: list[dict[str, Any]]) -> None:
    (sheet,) = pictures(page, outputs)
    assert sheet.width > 2 * WIDTH and len(np.unique(np.asarray(sheet.convert("RGB")).reshape(-1, 3), axis=0)) > 100


def compared(page: Frontend, outputs: list[dict[str, Any]]) -> None:
    reports = [text for output in outputs for text in output.get("text", ())]
    decibels = [float(figure) for report in reports for figure in re.findall(r"([\d.]+) dB", report)]
    assert len(reports) == len(decibels) == 2
    assert min(decibels) > 20 and abs(decibels[0] - decibels[1]) < 0.1
    assert len(pictures(page, outputs)) == 2


def pictures(page: Frontend, outputs: list[dict[str, Any]]) -> list[Image.Image]:
    """What Save Image and Preview Image show."""
    entries = [entry for output in outputs for entry in output.get("images", ()) if entry["type"] != "input"]
    return [Image.open(io.BytesIO(page.file(entry))) for entry in entries]


GIVES: dict[str, Callable[[Frontend, list[dict[str, Any]]], None]] = {
    "simple_upscale": enlarged,
    "generate_and_upscale": generated,
    "upscale_video": video,
    "attention_map": attention,
    "compare": compared,
}


@pytest.mark.parametrize("name", [path.stem for path in EXAMPLES])
def test_an_example_is_drawn_and_runs(page: Frontend, name: str) -> None:
    page.complaints.clear()
    file = workflow(name)
    page.load(file)
    assert page.in_the_way() == []
    saved = page.saved()
    kept = [
        [(node["id"], node["type"], node.get("widgets_values") or []) for node in it["nodes"]] for it in (saved, file)
    ]
    assert kept[0] == kept[1]  # no widget has come, gone or moved since the file was made
    assert saved["links"] == file["links"]
    assert page.overlaps() == []

    page.set_widget("KSampler", "steps", 2)  # of noise, for the sake of time
    for side in ("width", "height"):
        page.set_widget("EmptyLatentImage", side, 64)
    outputs = page.run()
    GIVES[name](page, list(outputs.values()))
    assert page.in_the_way() == []
    assert page.complaints == []


def test_every_node_comes_with_the_defaults_of_its_description(page: Frontend, host: Host) -> None:
    for node in NODES:
        described = host.object_info(node)["input"]
        inputs = {**described["required"], **described.get("optional", {})}
        widgets = page.new_node(node)
        assert set(widgets) <= set(inputs)
        for name, value in widgets.items():
            kind, details = inputs[name]
            first = details.get("options", [None])[0] if kind == "COMBO" else None
            assert value == details.get("default", first), f"{node}.{name}"
        assert len(widgets) == sum(kind in WIDGETS for kind, _ in inputs.values())


@pytest.mark.parametrize("name", ["simple_upscale", "upscale_video", "attention_map", "compare"])
def test_help_opens_beside_the_node(page: Frontend, host: Host, name: str) -> None:
    page.load(workflow(name))
    for node in {node["type"] for node in workflow(name)["nodes"]} & set(NODES):
        title = host.object_info(node)["display_name"]
        assert page.help(node).startswith(title)


def test_the_examples_are_among_the_templates_with_their_pictures(page: Frontend, host: Host) -> None:
    cards = {name.replace(" ", "_"): picture for name, picture in page.templates(host.pack_name).items()}
    for path in EXAMPLES:
        with Image.open(path.with_suffix(".jpg")) as thumbnail:
            assert cards.pop(path.stem) == list(thumbnail.size)
    assert not cards


def test_the_pack_never_reaches_for_the_network(page: Frontend, host: Host) -> None:
    """Neither when it is imported, nor when bundled models run. Comes last, when all of that has happened."""
    assert "Import times for custom nodes" in host.log
    assert "NETWORK FORBIDDEN" not in host.log
