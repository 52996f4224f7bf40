"""The files of example_workflows; `test_browser.py` runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from pft_arch import CATALOGUE

EXAMPLES = sorted((Path(__file__).parents[1] / "example_workflows").glob("*.json"))


def test_there_is_one_for_every_purpose() -> None:
    names = {"attention_map", "compare", "generate_and_upscale", "simple_upscale", "upscale_video"}
    assert {path.stem for path in EXAMPLES} == names


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_each_works_at_first_start_and_says_what_to_do(path: Path) -> None:
    nodes = json.loads(path.read_text(encoding="utf-8"))["nodes"]
    models = [node["widgets_values"][0] for node in nodes if node["type"] == "PFTSRLoadModel"]
    assert models and all(CATALOGUE[model].source == "bundled" for model in models)
    (note,) = [node for node in nodes if node["type"] == "MarkdownNote"]
    assert note["widgets_values"][0].startswith("## ")
    assert {node["widgets_values"][0] for node in nodes if node["type"] == "LoadImage"} <= {"example.png"}  # ComfyUI's


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_each_has_a_small_square_picture(path: Path) -> None:
    picture = path.with_suffix(".jpg")
    assert picture.stat().st_size <= 100_000
    with Image.open(picture) as card:
        assert card.format == "JPEG" and card.width == card.height
