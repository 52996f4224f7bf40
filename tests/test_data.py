"""Training patches: which images are used, that LR and HR show the same place, and that item n is always the same."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from pft_arch.data import Patches, Picture, files_by_name, find_images, read_pair, read_rgb
from pft_arch.resize import shrink

PHOTO = Path(__file__).parent / "data" / "photo.png"
SCALE, PATCH = 2, 8


def noise(height: int, width: int, seed: int = 0) -> Picture:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path: Path, picture: Picture) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)


def enlarged(low: Picture) -> Picture:
    """An HR in which every LR pixel is a block of its colour, so that a patch tells where it comes from."""
    return low.repeat(SCALE, 0).repeat(SCALE, 1)


@pytest.fixture
def paired(tmp_path: Path) -> Path:
    """hr/ and lr/ of two images, of which no two pixels are alike."""
    for seed, name in enumerate("ab"):
        low = noise(24, 20 + 4 * seed, seed)
        save(tmp_path / "lr" / f"{name}.png", low)
        save(tmp_path / "hr" / f"{name}.png", enlarged(low))
    return tmp_path


def items(data: Patches) -> list[tuple[Tensor, Tensor]]:
    return [data[n] for n in range(len(data))]


def patches(folder: Path, *, length: int = 64, seed: int = 0, lr: bool = True, patch: int = PATCH) -> Patches:
    return Patches(folder / "hr", folder / "lr" if lr else None, SCALE, patch, length, seed)


# ---------------------------------------------------------------------------------- items


def test_items_are_pairs_in_0_to_1(paired: Path) -> None:
    data = patches(paired)
    low, high = data[0]
    assert len(data) == 64
    assert (low.shape, high.shape) == ((3, PATCH, PATCH), (3, PATCH * SCALE, PATCH * SCALE))
    assert low.dtype == high.dtype == torch.float32
    assert 0 <= float(low.min()) < 0.1
    assert 0.9 < float(low.max()) <= 1


def test_item_n_depends_on_seed_and_n_alone(paired: Path) -> None:
    data, again, longer = patches(paired), patches(paired), patches(paired, length=1000)
    forwards = items(data)
    backwards = [again[n] for n in reversed(range(64))][::-1]
    for n, (low, high) in enumerate(forwards):
        for other in (backwards[n], data[n], longer[n]):
            assert torch.equal(low, other[0])
            assert torch.equal(high, other[1])


def test_workers_and_a_later_start_change_nothing(paired: Path) -> None:
    data = patches(paired, length=12)
    loaded = [low for lows, _ in DataLoader(data, batch_size=3, num_workers=2) for low in lows]
    assert all(torch.equal(low, data[n][0]) for n, low in enumerate(loaded))
    assert len(loaded) == 12


def test_another_seed_and_other_items_differ(paired: Path) -> None:
    data, other = patches(paired), patches(paired, seed=1)
    assert len({low.numpy().tobytes() for low, _ in items(data)}) > 60
    assert sum(torch.equal(data[n][0], other[n][0]) for n in range(64)) < 4


def test_a_plain_loop_ends(paired: Path) -> None:
    data = patches(paired, length=3)
    assert len(list(data)) == 3  # type: ignore[call-overload]  # by __getitem__ until IndexError
    with pytest.raises(IndexError, match="item 3 of 3"):
        data[3]


def test_lr_and_hr_show_the_same_place_in_the_same_position(paired: Path) -> None:
    for low, high in items(patches(paired)):
        assert torch.equal(low.repeat_interleave(SCALE, 1).repeat_interleave(SCALE, 2), high)


def test_all_images_places_and_positions_occur(paired: Path) -> None:
    pictures = [torch.tensor(read_rgb(paired / "lr" / f"{name}.png")).permute(2, 0, 1) for name in "ab"]
    seen = set()
    for low, _ in items(patches(paired, length=4000)):
        for position in range(8):
            turns, mirror = divmod(position, 2)
            back = torch.rot90((low * 255).round().byte(), -turns, (1, 2))
            found = [(n, *place) for n, picture in enumerate(pictures) for place in _find(back, picture, bool(mirror))]
            seen |= {(*place, position) for place in found}
    corners = [(0, 0, 0), (0, 16, 12), (1, 0, 0), (1, 16, 16)]
    assert {(n, top, left) for n, top, left, _ in seen} >= set(corners)
    assert len({position for *_, position in seen}) == 8


def _find(patch: Tensor, picture: Tensor, mirror: bool) -> list[tuple[int, int]]:
    patch = patch.flip(2) if mirror else patch
    corner = (picture[:, : 1 - PATCH, : 1 - PATCH] == patch[:, :1, :1]).all(0).nonzero().tolist()
    return [(y, x) for y, x in corner if torch.equal(picture[:, y : y + PATCH, x : x + PATCH], patch)]


def test_lr_is_made_by_bicubic_where_none_is_given(tmp_path: Path) -> None:
    high = read_rgb(PHOTO)[:61, :83]  # cropped to 60 x 82
    save(tmp_path / "hr" / "photo.png", high)
    data = patches(tmp_path, lr=False, patch=30, length=20)
    assert (data.pairs[0][0] == shrink(high[:60, :82], SCALE)).all()
    for low, hr in items(data):
        # Inside a patch its own bicubic is the image's, but for a step where it is turned and width is rounded first.
        made = shrink((hr * 255).round().byte().permute(1, 2, 0).numpy(), SCALE).astype(int)
        difference = np.abs(made - (low * 255).permute(1, 2, 0).numpy())[2:-2, 2:-2]
        assert difference.max() < 1.01


# ---------------------------------------------------------------------------------- which images


def test_images_that_cannot_be_used_are_reported_and_left_out(paired: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(paired / "hr" / "alone.png", noise(40, 40))
    save(paired / "hr" / "small.png", noise(14, 40))
    save(paired / "lr" / "small.png", noise(7, 20))
    save(paired / "hr" / "speck.png", noise(1, 1))
    save(paired / "hr" / "large.png", noise(40, 40))
    save(paired / "lr" / "large.png", noise(21, 20))
    save(paired / "hr" / "other_scale.png", noise(48, 48))
    save(paired / "lr" / "other_scale.png", noise(12, 12))
    (paired / "hr" / "broken.png").write_bytes(PHOTO.read_bytes()[:5000])
    (paired / "hr" / "text.png").write_text("no image")
    (paired / "hr" / "notes.txt").write_text("no image")
    (paired / "hr" / "._a.png").write_text("what macOS leaves behind")
    (paired / "hr" / "folder.png").mkdir()
    with caplog.at_level(logging.WARNING):
        data = patches(paired)
    reasons = {
        "alone": "no LR image of that name",
        "small": "LR of 20x7 is smaller than a patch",
        "speck": "smaller than 2 x 2",
        "large": "20x21 pixels, and the HR image is 40x40, not 2 times that",
        "other_scale": "12x12 pixels, and the HR image is 48x48, not 2 times that",
        "broken": "cannot be read",
        "text": "cannot be read",
        "folder": "cannot be read",
    }
    assert len(data.pairs) == 2
    assert len(caplog.messages) == len(reasons)
    for name, reason in reasons.items():
        assert any(f"{name}.png" in line and reason in line and "left out" in line for line in caplog.messages), name


def test_what_is_left_out_changes_no_item(paired: Path) -> None:
    before = items(patches(paired))
    (paired / "hr" / "aa.png").write_text("no image")
    after = items(patches(paired))
    assert all(torch.equal(before[n][0], after[n][0]) for n in range(64))


def test_no_usable_image_is_an_error(tmp_path: Path) -> None:
    save(tmp_path / "hr" / "small.png", noise(8, 8))
    with pytest.raises(ValueError, match=r"no image to train on .*1 found"):
        patches(tmp_path, lr=False)


def test_only_the_named_files(paired: Path) -> None:
    one = Patches(paired / "hr", paired / "lr", SCALE, PATCH, 4, names=["b.png"])
    assert len(one.pairs) == 1
    assert one.pairs[0][0].shape == (24, 24, 3)
    with pytest.raises(ValueError, match="no image"):
        Patches(paired / "hr", paired / "lr", SCALE, PATCH, 4, names=["c.png"])


def test_the_digest_tells_data_sets_apart(paired: Path) -> None:
    first = patches(paired).digest
    assert patches(paired, seed=1, length=2).digest == first
    save(paired / "hr" / "b.png", enlarged(noise(24, 24, 9)))
    assert patches(paired).digest != first


# ---------------------------------------------------------------------------------- files


def test_images_are_found_by_name_case_and_folders_aside(tmp_path: Path) -> None:
    for name in ("b.png", "a.WEBP", "B.jpg", ".hidden.png", "c.txt", "sub/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.name for path in find_images(tmp_path)] == ["B.jpg", "a.WEBP", "b.png"]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_kind_of_image_is_read_as_rgb(tmp_path: Path, mode: str) -> None:
    grey = read_rgb(PHOTO)[..., 1]
    if mode == "I;16":
        image = Image.fromarray((grey.astype(np.uint32) * 257 + 100).clip(0, 65535).astype(np.uint16))
    else:
        image = Image.fromarray(grey).convert(mode)
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    image.save(path)
    picture = read_rgb(path)
    assert picture.shape == (*grey.shape, 3)
    assert picture.dtype == np.uint8
    if mode != "1":
        assert np.abs(picture.astype(int) - grey[..., None]).max() <= 1


def test_lr_files_may_have_another_suffix_and_the_scale_at_their_end(tmp_path: Path) -> None:
    low = noise(5, 6)
    save(tmp_path / "hr" / "a.png", enlarged(low))
    for name in ("ax2.png", "a.bmp"):
        save(tmp_path / name / name, low)
        assert (read_pair(tmp_path / "hr" / "a.png", files_by_name(tmp_path / name), 2)[0] == low).all()
    with pytest.raises(ValueError, match="no LR image"):
        read_pair(tmp_path / "hr" / "a.png", files_by_name(tmp_path / "ax2.png"), 3)
