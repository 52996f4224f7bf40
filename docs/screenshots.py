"""Makes docs/screenshots and the pictures of example_workflows, by the real frontend and the bundled models.

python docs/screenshots.py DIRECTORY      a host that tests/host/make_host.py made; needs Chromium
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

from host.browser import Frontend, frontend, prepare  # noqa: E402
from host.server import Host  # noqa: E402

EXAMPLES, SCREENSHOTS = REPOSITORY / "example_workflows", REPOSITORY / "docs" / "screenshots"
PART = (112, 36, 304, 180)  # of docs/photo.jpg
CARD = 400  # side of a thumbnail; the frontend's cards are square
CHECKPOINT = "v1-5-pruned-emaonly-fp16.safetensors"


def main() -> None:
    home = Path(sys.argv[1]).resolve()
    SCREENSHOTS.mkdir(exist_ok=True)
    with Image.open(REPOSITORY / "docs" / "photo.jpg") as whole, tempfile.TemporaryDirectory() as folder:
        photo = whole.convert("RGB")
        base = Path(folder)
        prepare(base)
        make_checkpoint(home, base / "models" / "checkpoints")
        (base / "input").mkdir()
        photo.crop(PART).save(base / "input" / "example.png")
        pan(photo, base / "input" / "example.mp4")
        with Host(home, base, frontend=True) as host, frontend(host) as page:
            for example in sorted(EXAMPLES.glob("*.json")):
                shown = run(page, example)
                page.screenshot(SCREENSHOTS / f"{example.stem}.webp")
                thumbnail(example.stem, page, shown, photo.crop(PART)).save(example.with_suffix(".jpg"), quality=88)
            page.load(json.loads((EXAMPLES / "simple_upscale.json").read_text(encoding="utf-8")))
            page.help("PFTSRUpscale")
            page.screenshot(SCREENSHOTS / "help.webp")


def make_checkpoint(home: Path, folder: Path) -> None:
    """A generator to load. It knows no pictures and makes noise, so it is not run here."""
    folder.mkdir(parents=True)
    script = REPOSITORY / "tests" / "host" / "make_checkpoint.py"
    subprocess.run([home / "venv/bin/python", script, home / "ComfyUI", folder / CHECKPOINT], check=True)


def pan(photo: Image.Image, path: Path) -> None:
    """Three frames over the photo."""
    with av.open(path, "w") as file:
        stream = file.add_stream("libx264", 8, options={"crf": "10"})
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for shift in (0, 24, 48):
            frame = av.VideoFrame.from_image(photo.crop((124 + shift, 50, 252 + shift, 146)))
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


def run(page: Frontend, example: Path) -> dict[str, Any]:
    page.load(json.loads(example.read_text(encoding="utf-8")))
    return {} if example.stem == "generate_and_upscale" else page.run()


def results(page: Frontend, shown: dict[str, Any]) -> Iterator[Image.Image]:
    """The pictures that the output nodes show, of a video its frames."""
    for output in shown.values():
        for entry in output.get("images", ()):
            content = io.BytesIO(page.file(entry))
            if entry["type"] == "input":
                continue
            if entry["filename"].endswith(".mp4"):
                with av.open(content) as video:
                    yield from (frame.to_image() for frame in video.decode(video=0))
            else:
                yield Image.open(content).convert("RGB")


def thumbnail(name: str, page: Frontend, shown: dict[str, Any], photo: Image.Image) -> Image.Image:
    """A card of CARD x CARD with what the workflow gave."""
    card = Image.new("RGB", (CARD, CARD))
    if name == "generate_and_upscale":  # noise would mislead: the graph itself
        with Image.open(SCREENSHOTS / f"{name}.webp") as picture:
            card.paste(picture.crop((460, 80, 1260, 880)).resize((CARD, CARD), Image.Resampling.LANCZOS))
        return card
    found = list(results(page, shown))
    if name == "simple_upscale":  # pixels on the left, the result on the right
        half = (92, 60, 92 + CARD // 4, 60 + CARD // 2)
        coarse = photo.resize(found[0].size, Image.Resampling.NEAREST)
        for x, picture in enumerate((coarse, found[0])):
            part = picture.crop((half[0] + x * CARD // 4, half[1], half[2] + x * CARD // 4, half[3]))
            card.paste(part.resize((CARD // 2, CARD), Image.Resampling.NEAREST), (x * CARD // 2, 0))
    elif name == "attention_map":
        sheet = found[0].copy()
        sheet.thumbnail((CARD, CARD), Image.Resampling.LANCZOS)
        card.paste(sheet, ((CARD - sheet.width) // 2, (CARD - sheet.height) // 2))
    else:  # frames of the video, or the differences: as many stripes
        stripe = CARD // min(len(found), 3)
        for index, picture in enumerate(found[: CARD // stripe]):
            larger = picture.resize((CARD, round(picture.height * CARD / picture.width)), Image.Resampling.LANCZOS)
            card.paste(larger.crop((0, 40, CARD, 40 + stripe - 4)), (0, index * stripe))
    return card


if __name__ == "__main__":
    main()
