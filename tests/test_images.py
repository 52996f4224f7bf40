"""Image files to tensors and back: what a user would notice if it went wrong."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageCms

from pft_arch import images
from pft_arch.deep_images import compress, expand
from pft_arch.images import FORMATS, ImageError, Picture, read_image, write_image

ROOT = Path(__file__).parent.parent
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def levels(picture: Picture) -> np.ndarray:
    """The picture in whole levels of its depth."""
    return np.rint(picture.pixels.numpy() * (2**picture.depth - 1)).astype(int)


# ---------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize(
    ("mode", "suffix", "channels"),
    [
        ("1", "png", 1),
        ("1", "tiff", 1),
        ("L", "png", 1),
        ("L", "jpg", 1),
        ("LA", "png", 4),
        ("LA", "tiff", 4),
        ("P", "png", 3),
        ("RGB", "png", 3),
        ("RGB", "jpg", 3),
        ("RGB", "webp", 3),
        ("RGBA", "webp", 4),
        ("RGBA", "tiff", 4),
        ("CMYK", "jpg", 3),
        ("CMYK", "tiff", 3),
    ],
)
def test_every_colour_mode_reads_as_grey_rgb_or_rgba(tmp_path, mode, suffix, channels):
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(noise(5, 7, 4 if mode in ("LA", "RGBA") else 3)).convert(mode).save(path)
    picture = read_image(path)
    assert picture.pixels.shape == (5, 7, channels)
    assert picture.pixels.dtype == torch.float32
    assert 0 <= picture.pixels.min() <= picture.pixels.max() <= 1


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3), (5, 7, 4)], ids=["grey", "rgb", "rgba"])
@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_lossless_formats_return_every_value(tmp_path, shape, suffix):
    values = noise(*shape)
    Image.fromarray(values).save(tmp_path / "in.png")
    write_image(read_image(tmp_path / "in.png"), tmp_path / f"out.{suffix}")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / f"out.{suffix}")), values)


def test_a_palette_with_transparency_keeps_colours_and_alpha(tmp_path):
    image = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8), "L").convert("P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.save(tmp_path / "p.png", transparency=bytes([0, 128, 255]))
    expected = [[[255, 0, 0, 0], [0, 255, 0, 128], [0, 0, 255, 255]]]
    np.testing.assert_array_equal(levels(read_image(tmp_path / "p.png")), expected)


def test_a_transparent_colour_of_an_rgb_png_becomes_alpha(tmp_path):
    Image.fromarray(np.array([[[9, 9, 9], [1, 2, 3]]], dtype=np.uint8)).save(tmp_path / "t.png", transparency=(9, 9, 9))
    np.testing.assert_array_equal(levels(read_image(tmp_path / "t.png"))[0, :, 3], [0, 255])


def test_grey_with_alpha_stays_grey_with_alpha(tmp_path):
    values = noise(4, 6, 2)
    Image.fromarray(values, "LA").save(tmp_path / "la.png")
    picture = read_image(tmp_path / "la.png")
    assert picture.grey
    write_image(picture, tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as image:
        assert image.mode == "LA"
        np.testing.assert_array_equal(np.asarray(image), values)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_sixteen_bit_grey_keeps_its_depth(tmp_path, suffix, order):
    values = np.array([[0, 1, 255, 256, 40001, 65535]], dtype=order)
    Image.fromarray(values).save(tmp_path / f"deep.{suffix}")
    picture = read_image(tmp_path / f"deep.{suffix}")
    assert picture.depth == 16
    np.testing.assert_array_equal(levels(picture)[..., 0], values)
    write_image(picture, tmp_path / "out.tiff")
    write_image(picture, tmp_path / "out.png")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out.tiff")), values)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out.png")), values)
    write_image(picture, tmp_path / "out.jpg")  # has 8 bits only
    assert Image.open(tmp_path / "out.jpg").mode == "L"


def test_pixels_without_an_agreed_white_are_refused(tmp_path):
    Image.fromarray(np.ones((2, 2), dtype=np.int32)).save(tmp_path / "f.tiff")
    with pytest.raises(ImageError, match=r"f\.tiff: colour mode . is not supported\. Save it as"):
        read_image(tmp_path / "f.tiff")


def test_several_frames_are_refused_rather_than_dropped(tmp_path):
    pages = [Image.fromarray(noise(4, 4, 3, seed=s)) for s in range(3)]
    for name in ("a.png", "a.webp", "a.tiff"):
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
        with pytest.raises(ImageError, match="holds 3 frames or pages"):
            read_image(tmp_path / name)


def test_a_phone_photo_with_a_second_picture_inside_reads_as_the_photo(tmp_path):
    photo, preview = Image.new("RGB", (8, 6), (200, 10, 10)), Image.new("RGB", (4, 3))
    photo.save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=[preview])
    picture = read_image(tmp_path / "phone.jpg")
    assert picture.pixels.shape == (6, 8, 3)
    assert picture.pixels[..., 0].mean() > 0.7


def test_the_content_decides_not_the_name(tmp_path):
    Image.fromarray(noise(4, 4, 3)).save(tmp_path / "really_jpeg.png", "JPEG")
    assert read_image(tmp_path / "really_jpeg.png").pixels.shape == (4, 4, 3)


# ---------------------------------------------------------------------------------- beyond 8 bits


def deep(*shape: int, dtype: str = "uint16") -> np.ndarray:
    values = np.random.default_rng(0).integers(0, 65536, shape, dtype=np.uint16)
    return values if dtype == "uint16" else (values / 20000).astype(dtype)  # light up to 3.3


def twice(picture: Picture) -> Picture:
    return replace(picture, pixels=picture.pixels.repeat_interleave(2, 0).repeat_interleave(2, 1))


@pytest.mark.parametrize("channels", [2, 3, 4])
@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bit_colours_keep_their_depth_profile_and_resolution(tmp_path, channels, suffix):
    codecs, tifffile = pytest.importorskip("imagecodecs"), pytest.importorskip("tifffile")
    values = deep(5, 7, channels)
    tifffile.imwrite(
        tmp_path / "in.tiff",
        values,
        photometric="rgb" if channels > 2 else "minisblack",
        planarconfig="contig",
        extrasamples=["unassalpha"] if channels in (2, 4) else [],
        iccprofile=SRGB,
        resolution=(300, 150),
        resolutionunit="INCH",
        compression="lzw",
        extratags=[(315, 2, 0, "Zoë".encode(), True)],
    )
    picture = read_image(tmp_path / "in.tiff")
    assert (picture.depth, picture.grey, picture.icc) == (16, channels == 2, SRGB)
    write_image(picture, tmp_path / f"out.{suffix}")
    again = read_image(tmp_path / f"out.{suffix}")
    assert torch.equal(again.pixels, picture.pixels)
    assert (again.depth, again.grey, again.icc) == (16, channels == 2, SRGB)
    assert [round(x) for x in again.dpi] == [300, 150]
    exif = Image.Exif()
    exif.load(again.exif)
    assert exif[ExifTags.Base.Artist].encode("latin-1").decode() == "Zoë"
    if suffix == "png":
        stored = codecs.png_decode((tmp_path / "out.png").read_bytes())
        np.testing.assert_array_equal(stored, values)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_deep_images_are_turned_upright_too(tmp_path, orientation):
    tifffile = pytest.importorskip("tifffile")
    values = deep(4, 6, 3)
    tifffile.imwrite(tmp_path / "in.tiff", values, photometric="rgb", extratags=[(274, 3, 1, orientation, True)])
    eight = Image.fromarray((values >> 8).astype(np.uint8))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    eight.save(tmp_path / "in.png", exif=exif)
    expected = read_image(tmp_path / "in.png").pixels
    assert torch.allclose(read_image(tmp_path / "in.tiff").pixels, expected, atol=1 / 255)


def test_without_the_packages_sixteen_bit_colours_are_read_as_eight_and_that_is_said(tmp_path, monkeypatch, caplog):
    pytest.importorskip("imagecodecs")
    write_image(Picture(torch.rand(4, 4, 3), depth=16), tmp_path / "in.png")
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    assert read_image(tmp_path / "in.png").depth == 8
    assert "pip install 'pft-sr[images]'" in caplog.text


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("suffix", ["exr", "tiff"])
def test_light_comes_back_as_it_was_highlights_and_negatives_too(tmp_path, dtype, channels, suffix):
    exr, tifffile = pytest.importorskip("OpenEXR"), pytest.importorskip("tifffile")
    values = deep(6, 8, channels, dtype=dtype)
    values[0, 0, 0], values[3, 3, 0] = 4000, -0.25
    if channels == 4:
        values[..., 3] = np.linspace(0, 1, 8)
    if suffix == "exr":
        name = {1: "Y", 3: "RGB", 4: "RGBA"}[channels]
        window = (np.array([2, 1], np.int32), np.array([9, 6], np.int32))
        header = {"compression": exr.PIZ_COMPRESSION, "dataWindow": window, "displayWindow": window, "owner": "Zoe"}
        exr.File(header, {name: values.squeeze()}).write(str(tmp_path / "in.exr"))
    else:
        options = {"extrasamples": ["assocalpha"]} if channels == 4 else {}
        kind = "rgb" if channels > 1 else "minisblack"
        tifffile.imwrite(tmp_path / "in.tiff", values.squeeze(), photometric=kind, **options)
    picture = read_image(tmp_path / f"in.{suffix}")
    assert picture.depth == 32
    assert 0 <= picture.pixels.min() <= picture.pixels.max() <= 1
    write_image(twice(picture), tmp_path / f"out.{suffix}")
    if suffix == "exr":
        with exr.File(str(tmp_path / "out.exr")) as file:
            out, header = file.channels()[name].pixels.reshape(12, 16, channels), dict(file.header())
        assert (header["compression"], header["owner"]) == (exr.PIZ_COMPRESSION, "Zoe")
        assert [list(corner) for corner in header["dataWindow"]] == [[4, 2], [19, 13]]
    else:
        out = tifffile.imread(tmp_path / "out.tiff").reshape(12, 16, channels)
    assert out.dtype == dtype
    wanted = values.repeat(2, 0).repeat(2, 1).astype(np.float32)
    far = np.ones(out.shape[:2], bool)
    far[4:10, 4:10] = False  # what is below 0 is enlarged smoothly
    np.testing.assert_allclose(out[far], wanted[far], rtol=2e-3 if dtype == "float16" else 1e-4, atol=1e-5)
    assert out[6:8, 6:8, 0].min() < -0.1


def test_light_up_to_one_is_what_an_srgb_image_would_be():
    light = np.linspace(0, 1, 256)
    np.testing.assert_allclose(compress(light, 1.0), srgb(light))
    for peak in (1.0, 3.0, 65504.0):
        x = np.geomspace(1e-6, peak, 100)
        y = compress(x, peak)
        assert (np.diff(y) > 0).all() and y[-1] == pytest.approx(1)
        np.testing.assert_allclose(expand(y, peak), x, rtol=1e-9)
    assert 0.3 < compress(np.array(0.18), 65504.0) < 0.5


def srgb(linear: np.ndarray) -> np.ndarray:
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def test_light_that_is_no_number_is_said_and_does_no_harm(tmp_path, caplog):
    tifffile = pytest.importorskip("tifffile")
    values = np.full((4, 4, 3), 0.5, np.float32)
    values[0, 0], values[1, 1] = np.nan, np.inf
    tifffile.imwrite(tmp_path / "in.tiff", values, photometric="rgb")
    picture = read_image(tmp_path / "in.tiff")
    assert torch.isfinite(picture.pixels).all()
    assert "6 values are infinite or no numbers" in caplog.text


def test_light_is_refused_where_it_would_be_clipped_and_pictures_where_light_is_held(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "in.tiff", deep(4, 4, 3, dtype="float32"), photometric="rgb")
    for name in ("out.png", "out.jpg"):
        with pytest.raises(ImageError, match=r"cannot hold light in floating point\. Write \.exr or \.tiff"):
            write_image(read_image(tmp_path / "in.tiff"), tmp_path / name)
    with pytest.raises(ImageError, match="and this is none"):
        write_image(Picture(torch.zeros(2, 2, 3)), tmp_path / "out.exr")


# ---------------------------------------------------------------------------------- large ones, from the top down


@pytest.mark.parametrize("suffix", ["png", "tiff", "jpg"])
@pytest.mark.parametrize(("channels", "grey"), [(1, False), (3, False), (4, False), (4, True)])
@pytest.mark.parametrize("depth", [8, 16])
def test_bands_make_the_file_that_the_whole_makes(tmp_path, suffix, channels, grey, depth):
    pytest.importorskip("imagecodecs"), pytest.importorskip("tifffile")
    values = torch.rand(130, 9, channels)
    if grey:
        values[..., :3] = values[..., :1]
    picture = Picture(values, grey=grey, depth=depth, icc=SRGB, dpi=(300, 300))
    write_image(picture, tmp_path / f"whole.{suffix}")
    small = replace(picture, pixels=values[:2, :2])
    images.write_bands(small, values.split(70), 130, 9, tmp_path / f"bands.{suffix}")
    whole, bands = read_image(tmp_path / f"whole.{suffix}"), read_image(tmp_path / f"bands.{suffix}")
    assert torch.equal(whole.pixels, bands.pixels)
    assert (whole.depth, whole.grey, whole.icc) == (bands.depth, bands.grey, bands.icc)
    assert [round(x) for x in bands.dpi] == [300, 300]


def test_a_fault_among_the_bands_leaves_nothing(tmp_path):
    def bands():
        yield torch.rand(4, 9, 3)
        raise RuntimeError("no more")

    for name in ("out.png", "out.jpg"):
        with pytest.raises(RuntimeError, match="no more"):
            images.write_bands(Picture(torch.rand(4, 4, 3)), bands(), 8, 9, tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("depth", [8, 16])
def test_whole_levels_are_the_same_picture_in_a_fourth_of_the_memory(tmp_path, depth):
    pytest.importorskip("imagecodecs")
    write_image(Picture(torch.rand(5, 7, 3), depth=depth), tmp_path / "in.png")
    picture = read_image(tmp_path / "in.png", levels=True)
    assert picture.pixels.dtype == (torch.uint16 if depth == 16 else torch.uint8)
    assert torch.equal(picture.pixels.float() / (2**depth - 1), read_image(tmp_path / "in.png").pixels)


# ---------------------------------------------------------------------------------- animations


@pytest.mark.parametrize("target", ["png", "webp", "gif"])
@pytest.mark.parametrize("source", ["png", "webp", "gif"])
def test_animations_keep_frames_durations_and_loop(tmp_path, source, target):
    frames = [Image.new("RGBA", (8, 6)) for _ in range(4)]
    for number, colour in enumerate(("red", "lime", "white", "blue")):
        frames[number].paste(colour, (number, 0, number + 4, 6))
    options = {"lossless": True} if source == "webp" else {"disposal": 2} if source == "gif" else {}
    times = [100, 250, 40, 500]
    frames[0].save(
        tmp_path / f"in.{source}", save_all=True, append_images=frames[1:], duration=times, loop=3, **options
    )
    animation = images.read_animation(tmp_path / f"in.{source}")
    assert (animation.durations, animation.plays) == (times, 3)
    larger = map(twice, images.read_frames(tmp_path / f"in.{source}"))
    images.write_frames(larger, animation, tmp_path / f"out.{target}")
    again = images.read_animation(tmp_path / f"out.{target}")
    assert (again.durations, again.plays) == (times, 3)
    for frame, wanted in zip(images.read_frames(tmp_path / f"out.{target}"), frames, strict=True):
        assert frame.pixels.shape == (12, 16, 4)
        shown = frame.pixels[..., :3] * frame.pixels[..., 3:]
        colours = torch.from_numpy(np.array(wanted.resize((16, 12), Image.Resampling.NEAREST))).float() / 255
        assert (shown - colours[..., :3] * colours[..., 3:]).abs().mean() < 0.02


def test_an_animation_is_refused_where_one_picture_is_held(tmp_path):
    with pytest.raises(ImageError, match="JPEG holds one picture"):
        images.write_frames([Picture(torch.rand(4, 4, 4))], images.Animation([100.0], 0), tmp_path / "out.jpg")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------- colour


def cmyk_profile() -> bytes:
    """A press on which full cyan ink prints red: no formula would do that, only the profile."""
    white, red, black = (255, 128, 128), (136, 208, 195), (0, 128, 128)  # L, a, b in 8 bits
    corners = [
        white if not (c or m or y or k) else red if c and not k else black for c, m, y, k in np.ndindex(2, 2, 2, 2)
    ]
    ramp = bytes(range(256))
    identity = b"".join(struct.pack(">I", 65536 if i in (0, 4, 8) else 0) for i in range(9))
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + ramp * 4 + bytes(sum(corners, ())) + ramp * 3
    lut += bytes(-len(lut) % 4)
    tags = {b"A2B0": lut, b"wtpt": b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)}
    table, data, offset = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += struct.pack(">4sII", name, offset + len(data), len(content))
        data += content
    size = offset + len(data)
    head = struct.pack(">I4sI4s4s4s12x4s", size, bytes(4), 0x02400000, b"prtr", b"CMYK", b"Lab ", b"acsp")
    head += bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return head + bytes(128 - len(head)) + table + data


@pytest.mark.parametrize("suffix", ["jpg", "tiff"])
def test_cmyk_is_converted_through_its_profile_which_then_goes(tmp_path, suffix):
    Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(tmp_path / f"press.{suffix}", icc_profile=cmyk_profile())
    picture = read_image(tmp_path / f"press.{suffix}")
    red, green, blue = picture.pixels.mean(dim=(0, 1))
    assert red > 0.9
    assert max(green, blue) < 0.3
    assert picture.icc is None


def test_cmyk_without_a_usable_profile_is_converted_plainly(tmp_path):
    for name, profile in (("none.tiff", b""), ("damaged.tiff", b"no profile" * 20)):
        Image.new("CMYK", (4, 4), (255, 0, 0, 0)).save(tmp_path / name, icc_profile=profile)
        picture = read_image(tmp_path / name)
        np.testing.assert_array_equal(levels(picture)[0, 0], [0, 255, 255])
        assert picture.icc is None


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff"])
def test_profile_and_resolution_are_kept(tmp_path, suffix):
    Image.fromarray(noise(4, 4, 3)).save(tmp_path / "in.png", icc_profile=SRGB, dpi=(300, 150))
    write_image(read_image(tmp_path / "in.png"), tmp_path / f"out.{suffix}")
    with Image.open(tmp_path / f"out.{suffix}") as image:
        assert image.info["icc_profile"] == SRGB
        if suffix != "webp":  # has no field for it
            assert [round(x) for x in image.info["dpi"]] == [300, 150]


def test_a_grey_profile_is_left_out_where_the_file_holds_colours(tmp_path):
    grey = SRGB[:16] + b"GRAY" + SRGB[20:]
    Image.fromarray(noise(4, 4)).save(tmp_path / "in.png", icc_profile=grey)
    picture = read_image(tmp_path / "in.png")
    for name, kept in (("out.png", True), ("out.jpg", True), ("out.webp", False)):
        write_image(picture, tmp_path / name)
        assert ("icc_profile" in Image.open(tmp_path / name).info) is kept


def test_transparency_is_laid_on_white_where_the_format_has_none(tmp_path):
    pixels = torch.tensor([0.0, 0.0, 0.0, 0.0]).expand(8, 8, 4).clone()
    pixels[:, 4:, 3] = 0.5
    write_image(Picture(pixels), tmp_path / "flat.jpg")
    values = np.asarray(Image.open(tmp_path / "flat.jpg"))
    assert abs(int(values[4, 1].mean()) - 255) < 3
    assert abs(int(values[4, 6].mean()) - 128) < 3


def test_values_are_rounded_to_the_nearest_level_and_clipped(tmp_path):
    pixels = torch.tensor([[[0.6 / 255], [1.4 / 255], [254.6 / 255], [-0.5], [1.5]]])
    write_image(Picture(pixels), tmp_path / "r.png")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "r.png")), [[1, 1, 255, 0, 255]])


# ---------------------------------------------------------------------------------- EXIF


def with_exif(path: Path, values: np.ndarray, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    exif[ExifTags.Base.Artist] = "Zoë".encode()
    tiff = path.suffix == ".tiff"
    if not tiff:  # there Pillow would believe it, and write a file of that width
        exif[ExifTags.Base.ImageWidth] = 4321
    exif[ExifTags.IFD.Exif] = {
        ExifTags.Base.ISOSpeedRatings: 200,
        ExifTags.Base.ExifImageWidth: 4321,
        ExifTags.Base.LensModel: "50 mm",
    }
    exif[ExifTags.IFD.GPSInfo] = {ExifTags.GPS.GPSLatitudeRef: "N"}
    Image.fromarray(values).save(path, exif=images._tiff_exif(exif.tobytes()) if tiff else exif.tobytes())


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_images_are_turned_upright_once(tmp_path, orientation, suffix):
    values = noise(4, 6, 3)
    with_exif(tmp_path / f"in.{suffix}", values, orientation)
    turned = {
        1: values,
        2: values[:, ::-1],
        3: values[::-1, ::-1],
        4: values[::-1],
        5: values.transpose(1, 0, 2),
        6: np.rot90(values, -1),
        7: np.rot90(values, 2).transpose(1, 0, 2),
        8: np.rot90(values),
    }[orientation]
    np.testing.assert_array_equal(levels(read_image(tmp_path / f"in.{suffix}")), turned)
    write_image(read_image(tmp_path / f"in.{suffix}"), tmp_path / "out.png")
    np.testing.assert_array_equal(levels(read_image(tmp_path / "out.png")), turned)


@pytest.mark.parametrize("target", ["png", "jpg", "webp", "tiff"])
@pytest.mark.parametrize("source", ["png", "jpg", "webp", "tiff"])
def test_exif_is_kept_but_for_what_is_no_longer_true(tmp_path, source, target):
    with_exif(tmp_path / f"in.{source}", noise(4, 6, 3), orientation=6)
    picture = read_image(tmp_path / f"in.{source}")
    larger = replace(picture, pixels=picture.pixels.repeat(2, 2, 1))
    write_image(larger, tmp_path / f"out.{target}")
    with Image.open(tmp_path / f"out.{target}") as image:
        exif = image.getexif()
        assert image.size == (8, 12)
        assert exif.get(ExifTags.Base.Orientation, 1) == 1
        assert exif[ExifTags.Base.Artist].encode("latin-1").decode() == "Zoë"
        assert exif.get(ExifTags.Base.ImageWidth, 8) == 8
        details = {ExifTags.Base.ISOSpeedRatings: 200, ExifTags.Base.LensModel: "50 mm"}
        assert exif.get_ifd(ExifTags.IFD.Exif) == details
        assert exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] == "N"


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_does_not_cost_the_picture(tmp_path):
    values = noise(4, 6, 3)
    Image.fromarray(values).save(tmp_path / "in.png", exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff" + b"\xff" * 40)
    np.testing.assert_array_equal(levels(read_image(tmp_path / "in.png")), values)


def test_exif_too_long_for_jpeg_is_left_out(tmp_path):
    picture = Picture(torch.zeros(2, 2, 3), exif=b"Exif\0\0" + bytes(70000))
    write_image(picture, tmp_path / "out.jpg")
    assert not Image.open(tmp_path / "out.jpg").getexif()


# ---------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_a_truncated_file_is_named_and_never_half_read(tmp_path, suffix):
    path = tmp_path / f"cut.{suffix}"
    Image.fromarray(noise(64, 64, 3)).save(path)
    whole = path.read_bytes()
    for length in (len(whole) // 10, len(whole) // 2, len(whole) - len(whole) // 10):
        path.write_bytes(whole[:length])
        with pytest.raises(ImageError, match=rf"cut\.{suffix}: is (damaged or incomplete|not a PNG, JPEG)"):
            read_image(path)


def test_each_unreadable_file_says_what_is_wrong(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").touch()
    for name, reason in (
        ("text.png", "is not a PNG, JPEG, WebP, TIFF, GIF or EXR image"),
        ("empty.png", "is empty"),
        ("missing.png", "no such file"),
        (".", "is a folder"),
    ):
        with pytest.raises(ImageError, match=reason) as caught:
            read_image(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    Image.new("1", (300, 300)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match="larger than is sensible"):
        read_image(tmp_path / "bomb.png")


@pytest.mark.parametrize(("name", "size"), [("wide.jpg", (65501, 1)), ("tall.webp", (1, 16384))])
def test_images_too_large_for_a_format_are_refused_with_advice(tmp_path, name, size):
    with pytest.raises(ImageError, match="Use PNG or TIFF"):
        write_image(Picture(torch.zeros(size[1], size[0], 1)), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_the_size_limits_are_the_formats_own(tmp_path):
    for format in FORMATS.values():
        if format.max_side < 2**20:
            write_image(Picture(torch.zeros(1, format.max_side, 1)), tmp_path / f"limit{format.suffixes[0]}")


def test_an_existing_file_is_replaced_only_when_told(tmp_path):
    path = tmp_path / "mine.png"
    path.write_text("precious")
    with pytest.raises(ImageError, match="exists already"):
        write_image(Picture(torch.zeros(2, 2, 3)), path)
    assert path.read_text() == "precious"
    write_image(Picture(torch.zeros(2, 2, 3)), path, overwrite=True)
    assert read_image(path).pixels.shape == (2, 2, 3)


def test_a_link_goes_on_pointing_at_the_file(tmp_path):
    write_image(Picture(torch.zeros(2, 2, 3)), tmp_path / "file.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "file.png")
    write_image(Picture(torch.ones(4, 4, 3)), tmp_path / "link.png", overwrite=True)
    assert (tmp_path / "link.png").is_symlink()
    assert read_image(tmp_path / "file.png").pixels.shape == (4, 4, 3)


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch, fault):
    path = tmp_path / "mine.png"
    path.write_text("precious")

    def fail(_: int) -> None:
        raise fault

    monkeypatch.setattr(images.os, "fsync", fail)
    with pytest.raises((ImageError, KeyboardInterrupt)) as caught:
        write_image(Picture(torch.zeros(2, 2, 3)), path, overwrite=True)
    if isinstance(fault, OSError):
        assert "disk is full" in str(caught.value)
        assert str(path) in str(caught.value)
    assert path.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(sys.platform == "win32", reason="no file size limits there")
@pytest.mark.parametrize("name", ["out.png", "out.tiff"])
def test_a_disk_that_fills_up_among_the_bands_leaves_nothing(tmp_path, name):
    pytest.importorskip("tifffile")
    code = (
        "import resource, signal, sys, torch\n"
        "from pft_arch.images import ImageError, Picture, write_bands\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))\n"
        "bands = (torch.rand(100, 200, 3) for _ in range(9))\n"
        "try: write_bands(Picture(torch.rand(4, 4, 3)), bands, 900, 200, sys.argv[1])\n"
        "except ImageError as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, tmp_path / name], cwd=ROOT, capture_output=True, text=True)
    assert "the disk is full" in run.stdout, run.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="no file size limits there")
def test_a_disk_that_fills_up_for_real_leaves_what_was_there(tmp_path):
    path = tmp_path / "mine.png"
    path.write_text("precious")
    code = (
        "import resource, signal, sys, torch\n"
        "from pft_arch.images import ImageError, Picture, write_image\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))\n"
        "try: write_image(Picture(torch.rand(200, 200, 3)), sys.argv[1], overwrite=True)\n"
        "except ImageError as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "the disk is full" in run.stdout
    assert path.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [path]


def test_a_target_that_cannot_be_written_is_an_error_with_its_name(tmp_path):
    (tmp_path / "file").touch()
    for name, reason in (
        ("file/out.png", "cannot be written here"),
        ("out.bmp", "must end in one of"),
        ("out", "must end in one of"),
        ("x" * 300 + ".png", "cannot be written here"),
    ):
        with pytest.raises(ImageError, match=reason):
            write_image(Picture(torch.zeros(2, 2, 3)), tmp_path / name)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ImageError, match="is a folder"):
        write_image(Picture(torch.zeros(2, 2, 3)), tmp_path / "folder.png", overwrite=True)
    assert not [p for p in tmp_path.iterdir() if p.suffix == ".part"]


def test_pixels_that_are_no_numbers_or_no_image_are_not_written(tmp_path):
    with pytest.raises(ImageError, match=r"n\.png.*no numbers"):
        write_image(Picture(torch.full((2, 2, 3), float("nan"))), tmp_path / "n.png")
    with pytest.raises(ImageError, match=r"n\.png.*1, 3 or 4 channels"):
        write_image(Picture(torch.zeros(2, 2, 5)), tmp_path / "n.png")


def test_folders_and_names_with_spaces_and_other_scripts(tmp_path):
    path = tmp_path / "neue Bilder 写真" / "été ☀.png"
    write_image(Picture(torch.zeros(2, 2, 3)), path)
    assert read_image(path).pixels.shape == (2, 2, 3)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_files_get_the_permissions_that_any_new_file_gets(tmp_path):
    (tmp_path / "any").touch()
    write_image(Picture(torch.zeros(2, 2, 3)), tmp_path / "ours.png")
    assert os.stat(tmp_path / "ours.png").st_mode == os.stat(tmp_path / "any").st_mode


def test_reading_the_size_needs_only_the_header(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(noise(40, 60, 3)).save(buffer, "PNG")
    (tmp_path / "cut.png").write_bytes(buffer.getvalue()[:100])
    (tmp_path / "none.png").touch()
    assert images.read_size(tmp_path / "cut.png") == (60, 40)
    assert images.read_size(tmp_path / "none.png") is None
