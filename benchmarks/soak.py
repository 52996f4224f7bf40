"""Many images through a real ComfyUI, one after the other: does its memory grow, do handles leak, do results change?

python benchmarks/soak.py HOST [--images 2000] [--output benchmarks/soak.json]

HOST is what tests/host/make_host.py made. Twelve small pictures (RGB, grey, with alpha; tiled and whole) go round and
round with light_x2; every twenty-fifth image is made with light_x4, so that models come and go as well.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

from host.server import REPOSITORY, Graph, Host  # noqa: E402

RUN_LIMIT = 1800  # seconds for an image, on a machine that has other work as well
OTHER_MODEL_EVERY = 25
BLOCK = 50  # images whose mean is one point of the regression: neighbours are not independent of each other


@dataclass(frozen=True)
class Sample:
    """The host's process after one image."""

    megabytes: float  # resident
    handles: int
    threads: int
    seconds: float  # that the image took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("host", type=Path)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--output", type=Path, default=HERE / "soak.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as base, Host(arguments.host, Path(base), run_limit=RUN_LIMIT) as host:
        for result in soak(host, arguments.images):  # written as it grows: a run that is stopped has measured, too
            arguments.output.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
            print(result["images"], result["MB every 100 images"][-1], flush=True)


def soak(host: Host, images: int) -> Iterator[dict[str, Any]]:
    """Run them and sum up, every hundred images and at the end. Raises RuntimeError where an image fails."""
    workflows = list(make_workflows(host))
    first: dict[str, str] = {}
    samples: list[Sample] = []
    changed = 0
    for number in range(images):
        workflow = workflows[number % len(workflows)]
        if number % OTHER_MODEL_EVERY == OTHER_MODEL_EVERY - 1:
            workflow = {**workflow, "model": loader("light_x4")}
        start = time.monotonic()
        digest = picture_of(host, workflow)
        samples.append(look_at(host.pid, time.monotonic() - start))
        changed += first.setdefault(json.dumps(workflow), digest) != digest
        if number % 100 == 99 or number == images - 1:
            yield summary(samples) | {"pictures": len(first), "pictures that changed": changed}


def make_workflows(host: Host) -> Iterator[Graph]:
    """Pictures that differ in size, channels and tiling, each with the workflow that enlarges it."""
    with Image.open(REPOSITORY / "tests" / "data" / "photo.png") as file:
        photo = file.convert("RGB")
    for number, (width, height) in enumerate([(24, 24), (21, 19), (32, 16)] * 4):
        picture = photo.crop((8 * number, 8 * number, 8 * number + width, 8 * number + height))
        joined = number % 4 == 3
        if number % 4 == 2:
            picture = picture.convert("L")
        if joined:
            picture.putalpha(picture.convert("L"))
        name = host.add_input(f"{number}.png", picture)
        workflow: Graph = {
            "image": {"class_type": "LoadImage", "inputs": {"image": name}},
            "model": loader("light_x2"),
            "upscale": {
                "class_type": "PFTSRUpscale",
                "inputs": {
                    "upscale_model": ["model", 0],
                    "image": ["joined" if joined else "image", 0],
                    "tile": 16 if number % 2 else 0,
                    "overlap": 8,
                },
            },
            "save": {"class_type": "SaveImage", "inputs": {"images": ["upscale", 0], "filename_prefix": "soak"}},
        }
        if joined:
            inputs = {"image": ["image", 0], "alpha": ["image", 1]}
            workflow["joined"] = {"class_type": "JoinImageWithAlpha", "inputs": inputs}
        yield workflow


def loader(model: str) -> dict[str, Any]:
    return {"class_type": "PFTSRLoadModel", "inputs": {"model": model, "precision": "fp32"}}


def picture_of(host: Host, workflow: Graph) -> str:
    """The SHA-256 of the file that the workflow writes; the file and the host's record of it are deleted."""
    run = host.run(workflow)
    files = list((host.base / "output").glob("soak*.png"))
    if run.ending != "execution_success" or len(files) != 1:
        raise RuntimeError(f"{len(files)} files, {run.ending}: {run.error}")
    content = files[0].read_bytes()
    files[0].unlink()
    host.forget()
    return hashlib.sha256(content).hexdigest()


def look_at(pid: int, seconds: float) -> Sample:
    """By Linux's /proc."""
    process = Path("/proc", str(pid))
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    return Sample(
        megabytes=int(status["VmRSS"].split()[0]) / 1024,
        handles=len(list((process / "fd").iterdir())),
        threads=int(status["Threads"]),
        seconds=seconds,
    )


def summary(samples: Sequence[Sample]) -> dict[str, Any]:
    """Memory's slope over the images after the first tenth, with its 95 % confidence interval, and the extremes."""
    settled = samples[len(samples) // 10 :]
    size = min(BLOCK, max(1, len(settled) // 6))
    blocks = [settled[start : start + size] for start in range(0, len(settled) - size + 1, size)]
    slope, margin = regression([sum(s.megabytes for s in block) / size for block in blocks])
    per_100 = 100 / size
    quarter = max(1, len(settled) // 4)
    return {
        "images": len(samples),
        "machine": platform.processor() or platform.machine(),
        "seconds": round(sum(s.seconds for s in samples)),
        "seconds per image": round(sum(s.seconds for s in samples) / len(samples), 2),
        "MB per 100 images": round(slope * per_100, 4),
        "95 % confidence, +-": round(margin * per_100, 4),
        "blocks": len(blocks),
        "images per block": size,
        "MB at the start": round(samples[0].megabytes, 1),
        "MB in the first quarter after warm-up": round(sum(s.megabytes for s in settled[:quarter]) / quarter, 1),
        "MB in the last quarter": round(sum(s.megabytes for s in settled[-quarter:]) / quarter, 1),
        "handles after warm-up, least and most": [f(s.handles for s in settled) for f in (min, max)],
        "handles at the end": samples[-1].handles,
        "threads after warm-up, least and most": [f(s.threads for s in settled) for f in (min, max)],
        "MB every 100 images": [round(s.megabytes, 1) for s in samples[::100]],
    }


def regression(values: Sequence[float]) -> tuple[float, float]:
    """Least-squares slope per step, and half its 95 % confidence interval by Student's t with n - 2 degrees."""
    from scipy.stats import linregress, t

    if len(values) < 3:
        return math.nan, math.nan
    line = linregress(range(len(values)), values)
    return float(line.slope), float(line.stderr * t.ppf(0.975, len(values) - 2))


if __name__ == "__main__":
    main()
