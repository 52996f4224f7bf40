"""Any target size: how many passes, what is cut, and what comes out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pft_arch import PFTSR, upscale
from pft_arch.target import MODES, Plan, plan, upscale_to
from pft_arch.upscale import upscale_ensemble


@pytest.fixture(scope="module")
def model() -> PFTSR:
    torch.manual_seed(0)
    return PFTSR(embed_dim=8, num_blocks=(2,), num_heads=2, window_size=8, upsampler="pixelshuffledirect").eval()


@pytest.mark.parametrize(
    ("scale", "mode", "values", "passes", "resized", "size"),
    [
        (2, "model scale", {}, 1, (200, 300), (200, 300)),
        (3, "model scale", {}, 1, (300, 450), (300, 450)),
        (2, "factor", {"factor": 3.0}, 2, (300, 450), (300, 450)),
        (4, "factor", {"factor": 3.0}, 1, (300, 450), (300, 450)),
        (2, "factor", {"factor": 1.5}, 1, (150, 225), (150, 225)),
        (2, "factor", {"factor": 1.0}, 0, (100, 150), (100, 150)),
        (2, "factor", {"factor": 16.0}, 4, (1600, 2400), (1600, 2400)),
        (2, "megapixels", {"megapixels": 0.06}, 1, (200, 300), (200, 300)),
        (2, "fit inside", {"width": 600, "height": 300}, 2, (300, 450), (300, 450)),
        (2, "fit inside", {"width": 300, "height": 900}, 1, (200, 300), (200, 300)),
        (2, "fit inside", {"width": 50, "height": 50}, 0, (33, 50), (33, 50)),
        (2, "fit inside", {"width": 450, "height": 0}, 2, (300, 450), (300, 450)),
        (2, "fill and crop", {"width": 300, "height": 300}, 2, (300, 450), (300, 300)),
        (4, "fill and crop", {"width": 600, "height": 100}, 1, (400, 600), (100, 600)),
        (2, "fill and crop", {"width": 0, "height": 200}, 1, (200, 300), (200, 300)),
        (2, "stretch", {"width": 301, "height": 50}, 2, (50, 301), (50, 301)),
        (2, "stretch", {"width": 0, "height": 101}, 1, (101, 152), (101, 152)),
    ],
)
def test_the_fewest_passes_that_reach_the_size(
    scale: int, mode: str, values: dict[str, float], passes: int, resized: tuple[int, int], size: tuple[int, int]
) -> None:
    assert plan((100, 150), scale, mode, **values) == Plan((100, 150), scale, passes, resized, size)  # type: ignore[arg-type]


@pytest.mark.parametrize("source", [(1, 1), (37, 45), (1080, 1919), (2, 3000)])
@pytest.mark.parametrize("mode", MODES[3:])
def test_a_box_is_kept_to_the_pixel(source: tuple[int, int], mode: str) -> None:
    box = source[0] * 3 - 1, source[1] * 2 + 1
    p = plan(source, 4, mode, height=box[0], width=box[1])
    assert all(a <= b for a, b in zip(p.size, box, strict=True))
    assert all(a <= b for a, b in zip(p.resized, p.enlarged, strict=True))  # nothing is enlarged by the resample
    assert p.size == box or mode == "fit inside"


@pytest.mark.parametrize(
    ("mode", "values", "what"),
    [
        ("factor", {"factor": 16.1}, "at most 16 times is possible. Lower factor"),
        ("factor", {"factor": float("nan")}, "factor must be positive"),
        ("megapixels", {"megapixels": 0.0}, "megapixels must be positive"),
        ("megapixels", {"megapixels": 1e4}, "Lower megapixels"),
        ("stretch", {"width": 9999, "height": 10}, "Lower width or height"),
        ("fit inside", {}, "width and height must be positive, or one of them 0"),
        ("double", {}, "choose one of model scale"),
    ],
)
def test_what_cannot_be_reached_names_what_to_change(mode: str, values: dict[str, float], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        plan((100, 150), 2, mode, **values)  # type: ignore[arg-type]


def test_one_pass_is_the_models_own_picture(model: PFTSR, photo: Tensor) -> None:
    image = photo[:, :40, :56].expand(2, -1, -1, -1)
    assert torch.equal(upscale_to(image, model, plan((40, 56), 2)), upscale(image, model))


def test_two_passes_are_shrunk_once(model: PFTSR, photo: Tensor) -> None:
    image = photo[:, :40, :56]
    twice = upscale(upscale(image, model), model)
    shrunk = F.interpolate(twice.permute(0, 3, 1, 2), (120, 168), mode="bicubic", antialias=True).clamp(0, 1)
    out = upscale_to(image, model, plan((40, 56), 2, "factor", factor=3.0))
    assert torch.equal(out, shrunk.permute(0, 2, 3, 1))
    cut = upscale_to(image, model, plan((40, 56), 2, "fill and crop", width=120, height=120))
    assert torch.equal(cut, out[:, :, 24:144])


def test_shrinking_leaves_no_moire(model: PFTSR) -> None:
    lines = torch.arange(200).remainder(2).float().view(1, 1, 200, 1).expand(1, 200, 200, 3)
    out = upscale_to(lines, model, plan((200, 200), 2, "fit inside", width=50, height=50))
    assert (out - 0.5).abs().max() < 0.1


def test_an_image_that_is_large_enough_does_not_pass_the_network(model: PFTSR, photo: Tensor) -> None:
    same = upscale_to(
        photo, model, plan((144, 192), 2, "factor", factor=1.0), progress=lambda *_: pytest.fail("a pass")
    )
    assert torch.equal(same, photo)


def test_ensemble_counts_in_every_pass(model: PFTSR, photo: Tensor) -> None:
    image = photo[:, :16, :24]
    out = upscale_to(image, model, plan((16, 24), 2, "factor", factor=4.0), ensemble=True)
    assert torch.equal(out, upscale_ensemble(upscale_ensemble(image, model), model))


def test_alpha_and_frames_reach_the_size_too(model: PFTSR, photo: Tensor) -> None:
    frames = torch.cat([photo, photo[..., :1]], -1)[:, :30, :40].repeat(2, 1, 1, 1)
    frames[1] = frames[1].flip(0)
    out = upscale_to(frames, model, plan((30, 40), 2, "stretch", width=100, height=90))
    assert out.shape == (2, 90, 100, 4)
    assert torch.allclose(out[:, :, :, 3], out[:, :, :, :3].mean(-1), atol=0.5)
    single = upscale_to(frames[1:], model, plan((30, 40), 2, "stretch", width=100, height=90))
    assert torch.equal(out[1:], single)


def test_progress_runs_over_frames_and_passes_and_previews_come_with_it(model: PFTSR) -> None:
    seen: list[tuple[int, int]] = []
    pictures: list[tuple[int, ...]] = []
    upscale_to(
        torch.rand(2, 40, 48, 3),
        model,
        plan((40, 48), 2, "factor", factor=3.0),
        tile=32,
        overlap=8,
        progress=lambda *now: seen.append(now),
        preview=lambda picture: pictures.append(tuple(picture.shape)),
    )
    assert [total for _, total in seen] == [seen[-1][0]] * len(seen)
    assert seen == sorted(seen) and len(set(seen)) == len(seen)
    assert len(pictures) == len(seen)
    assert set(pictures) == {(80, 96, 3), (160, 192, 3)}


def test_host_memory_is_counted_before_it_is_taken(model: PFTSR) -> None:
    assert plan((100, 150), 2).host_bytes(3, 3) == 4 * 3 * 3 * 200 * 300
    assert plan((100, 150), 2, "factor", factor=3.0).host_bytes(1, 3) == 4 * 3 * (300 * 450 + 2 * 400 * 600)
