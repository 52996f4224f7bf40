"""Image files to tensors and back: PNG, JPEG, WebP, TIFF, GIF and EXR.

`read_image` gives the upright picture with what belongs to it (colour profile, EXIF, resolution); `write_image`
writes all of it, or leaves what was there before untouched. `write_bands` does so for a picture that comes from the
top down, `read_frames` and `write_frames` are for animations.
"""

from __future__ import annotations

import errno
import io
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from . import deep_images
from .deep_images import EXR_MAGIC, PNG_MAGIC, TIFF_MAGIC, Array, Light, MissingLibraryError
from .files import replacing

log = logging.getLogger(__name__)


class ImageError(ValueError):
    """A problem with an image file. The text names the file, says what is wrong and what to do."""


@dataclass(frozen=True, eq=False)
class Picture:
    """An image and what its file said about it."""

    pixels: Tensor  # (H, W, C), float32 in [0, 1]; C is 1 (grey), 3 (RGB) or 4 (RGBA, alpha not premultiplied)
    grey: bool = False  # with 4 channels: the colours were one grey channel, and are written as one again
    depth: int = 8  # bits per channel in the file: 8, 16, or 32 for floating point of any width
    icc: bytes | None = None
    exif: bytes | None = None
    dpi: tuple[float, float] | None = None
    light: Light | None = None  # with depth 32: how its values were brought into [0, 1]


@dataclass(frozen=True)
class Format:
    """What a file format can hold, and how we write it."""

    name: str  # Pillow's name
    suffixes: tuple[str, ...]
    alpha: bool = True
    depths: tuple[int, ...] = (8,)  # bits per channel; 32 is floating point
    animated: bool = False
    max_side: int = 2**31 - 1
    options: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))


# Near-lossless settings: whoever enlarges a picture wants its detail, and can shrink the file afterwards.
FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "png": Format("PNG", (".png",), depths=(8, 16), animated=True),
        "jpg": Format(
            "JPEG", (".jpg", ".jpeg"), alpha=False, max_side=65500, options={"quality": 95, "subsampling": 0}
        ),
        "webp": Format("WEBP", (".webp",), max_side=16383, animated=True, options={"quality": 95}),
        "tiff": Format("TIFF", (".tiff", ".tif"), depths=(8, 16, 32)),  # uncompressed: else Pillow writes no EXIF
        "gif": Format("GIF", (".gif",), max_side=65535, animated=True),
        "exr": Format("EXR", (".exr",), depths=(32,)),
    }
)
PILLOW_FORMATS = [f.name for f in FORMATS.values() if f.name != "EXR"]
SUFFIXES: Mapping[str, Format] = MappingProxyType({s: f for f in FORMATS.values() for s in f.suffixes})

MAX_PIXELS = 5 * 10**8  # what a command line may set Pillow's limit to; Pillow refuses twice as many
BAND_ROWS = 64  # converted at a time, of a picture that comes in bands
MAX_EXIF_IN_JPEG = 65533  # one marker segment

# EXIF that describes the picture. The rest of its main directory describes the file it came from (sizes, strips,
# compression, orientation, thumbnail), and would be wrong in the file we write.
DESCRIBING_TAGS = (
    *(ExifTags.Base[name] for name in ("DocumentName", "ImageDescription", "Make", "Model", "PageName", "Software")),
    *(ExifTags.Base[name] for name in ("DateTime", "Artist", "HostComputer", "Rating", "RatingPercent", "Copyright")),
    *(ExifTags.Base[name] for name in ("XPTitle", "XPComment", "XPAuthor", "XPKeywords", "XPSubject")),
)
STALE_TAGS = (ExifTags.Base.ExifImageWidth, ExifTags.Base.ExifImageHeight, ExifTags.IFD.Interop)


# ------------------------------------------------------------------------------------------------- reading


def read_image(path: str | Path, *, levels: bool = False) -> Picture:
    """Read a PNG, JPEG, WebP, TIFF, GIF or EXR file, upright.

    - EXIF orientation is applied, and gone from the EXIF that is kept. A thumbnail and XMP are not kept.
    - Palette and 1-bit images become RGB(A) and grey, grey with alpha becomes RGBA with `grey` set.
    - CMYK becomes sRGB through the file's own profile, or by Pillow's plain formula where it has none.
    - 16 bits are read in full depth; of colours where the packages of 'pft-sr[images]' are there, else as 8.
    - Floating point (EXR, TIFF) is taken as light, may exceed 1, and is mapped to [0, 1] by `deep_images.compress`.
    - Animations (see `read_frames`), files of several pages, and whole numbers of 32 bits are refused.

    levels: leave the values whole, uint8 or uint16, instead of in [0, 1]: a fourth of the memory.
    """
    path = Path(path)
    try:
        picture = _read_deep(path)
        if picture is None:
            with Image.open(path, formats=PILLOW_FORMATS) as image:
                # The second frame of a JPEG is a preview or a depth map, and not a page.
                frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
                if frames > 1:
                    raise ImageError(
                        f"{path}: holds {frames} frames or pages. Save the ones you want as single images."
                    )
                image.load()
                picture = _picture(image, path)
    except ImageError:
        raise
    except MissingLibraryError as error:
        raise ImageError(f"{path}: {error}") from error
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        raise ImageError(f"{path}: {_why_unreadable(path, error)}") from error
    if not levels and not picture.pixels.is_floating_point():
        array = picture.pixels.numpy().astype(np.float32)
        array /= 2**picture.depth - 1
        picture = replace(picture, pixels=torch.from_numpy(array))
    return picture


def _read_deep(path: Path) -> Picture | None:
    """The picture if it is one that Pillow would make 8 bits of, or not read at all; else None."""
    with path.open("rb") as file:
        start = file.read(8)
    if start.startswith(EXR_MAGIC):
        values, header = deep_images.read_exr(path)
        array, light = deep_images.to_network(values, associated=True, header=header)
        return Picture(torch.from_numpy(array), depth=32, light=light)
    if start.startswith(PNG_MAGIC):
        return _read_deep_png(path)
    return _read_deep_tiff(path) if start.startswith(TIFF_MAGIC) else None


def _read_deep_png(path: Path) -> Picture | None:
    with Image.open(path, formats=["PNG"]) as image:
        deep_colours = str(image.tile[0][3]).endswith(";16B") and not image.mode.startswith("I")
        if not deep_colours or getattr(image, "n_frames", 1) > 1 or "transparency" in image.info:
            return None
        icc, dpi, exif = image.info.get("icc_profile") or None, _dpi(image), image.getexif()
    try:
        array = deep_images.read_png(path)
    except MissingLibraryError as error:
        log.warning("%s: read as 8 bits. To keep 16, it %s", path, error)
        return None
    return _deep_picture(array, icc, _kept_exif(exif), dpi, exif.get(ExifTags.Base.Orientation, 1))


def _read_deep_tiff(path: Path) -> Picture | None:
    exif = None
    try:
        with Image.open(path, formats=["TIFF"]) as image:
            bits = image.tag_v2.get(ExifTags.Base.BitsPerSample, (1,))
            if max(bits) <= 8 or image.mode in ("I", "CMYK", "LAB") or image.mode.startswith("I;16"):
                return None
            if image.n_frames == 1:
                exif = _kept_exif(image.getexif())
            pillow_can = image.mode != "F"
    except UnidentifiedImageError:
        pillow_can = False
    try:
        tiff = deep_images.read_tiff(path)
    except MissingLibraryError as error:
        if not pillow_can:
            raise
        log.warning("%s: read as 8 bits. To keep 16, it %s", path, error)
        return None
    if exif is None:
        texts = Image.Exif()
        for tag, text in tiff.texts.items():
            texts[tag] = text.encode()
        exif = _kept_exif(texts)
    return _deep_picture(tiff.array, tiff.icc, exif, tiff.dpi, tiff.orientation, associated=tiff.associated)


def _deep_picture(
    array: Array,
    icc: bytes | None,
    exif: bytes | None,
    dpi: tuple[float, float] | None,
    orientation: int,
    *,
    associated: bool = False,
) -> Picture:
    """(H, W, C) of a file, C of 1 to 4, as a picture."""
    if orientation >= 5:
        array = array.swapaxes(0, 1)
    array = array[:: -1 if orientation in (3, 4, 7, 8) else 1, :: -1 if orientation in (2, 3, 6, 7) else 1]
    grey = array.shape[2] == 2
    array = array[..., [0, 0, 0, 1]] if grey else array
    if array.dtype.kind == "f":
        values, light = deep_images.to_network(array, associated=associated)
        return Picture(torch.from_numpy(values), grey, 32, icc, exif, dpi, light)
    top = np.iinfo(array.dtype).max
    if associated and array.shape[2] == 4:
        alpha = np.maximum(array[..., 3:], 1)
        colours = np.minimum(array[..., :3].astype(np.float32) * top / alpha, top).round()
        array = np.concatenate((colours.astype(array.dtype), array[..., 3:]), axis=2)
    array = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
    return Picture(torch.from_numpy(array), grey, 8 * array.itemsize, icc, exif, dpi)


def read_size(path: str | Path) -> tuple[int, int] | None:
    """Width and height from a file's header, as stored; None where it cannot be read."""
    with suppress(Exception), Image.open(path, formats=PILLOW_FORMATS) as image:  # read_image says why
        return image.size
    return None


def _picture(image: Image.Image, path: Path) -> Picture:
    icc, dpi = image.info.get("icc_profile") or None, _dpi(image)
    exif = _make_upright(image)
    depth, grey = 8, False

    if image.mode == "CMYK":
        image, icc = _cmyk_to_rgb(image, icc), None
    elif image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # "I": Pillow before 11.3
        depth = 16
    elif image.mode in ("I", "F", "LAB"):
        raise ImageError(f"{path}: colour mode {image.mode} is not supported. Save it as 8-bit or 16-bit RGB or grey.")
    elif image.has_transparency_data:
        grey = image.mode in ("1", "L", "LA", "La")
        image = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
    else:
        image = image.convert("L" if image.mode in ("1", "L") else "RGB")

    pixels = torch.from_numpy(np.array(image, dtype=np.uint16 if depth == 16 else np.uint8))
    return Picture(pixels if pixels.ndim == 3 else pixels[..., None], grey, depth, icc, exif, dpi)


def _make_upright(image: Image.Image) -> bytes | None:
    """Turn the image as its EXIF says. Returns the EXIF worth keeping."""
    with suppress(Exception):  # broken EXIF makes Pillow raise nearly anything, and must not cost the picture
        ImageOps.exif_transpose(image, in_place=True)
        return _kept_exif(image.getexif())
    return None


def _kept_exif(exif: Image.Exif) -> bytes | None:
    with suppress(Exception):
        kept = Image.Exif()
        for tag in DESCRIBING_TAGS:
            if tag in exif:
                kept[tag] = exif[tag]
        for ifd in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo):
            tags = {tag: value for tag, value in exif.get_ifd(ifd).items() if tag not in STALE_TAGS}
            if tags:
                kept[ifd] = tags
        return _as_stored(kept).tobytes() if len(kept) else None
    return None


def _as_stored(exif: Image.Exif) -> Image.Exif:
    """Text as the bytes it was read from (UTF-8, most often): Pillow would write question marks.

    In the main directory only. In the others Pillow would not mark such bytes as text.
    """
    for tag, value in exif.items():
        if isinstance(value, str) and not value.isascii():
            exif[tag] = value.encode("latin-1", "replace")
    return exif


def _dpi(image: Image.Image) -> tuple[float, float] | None:
    x, y = image.info.get("dpi") or (0, 0)
    return (float(x), float(y)) if 1 <= x <= 65535 and 1 <= y <= 65535 else None


def _cmyk_to_rgb(image: Image.Image, icc: bytes | None) -> Image.Image:
    if icc:
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
            converted = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
            assert converted is not None  # only None when done in place
            return converted
        except (ImageCms.PyCMSError, ImportError, OSError):  # a damaged profile, or a Pillow without LittleCMS
            pass
    return image.convert("RGB")


def _why_unreadable(path: Path, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file."
    if path.is_dir():
        return "is a folder, not an image file."
    if isinstance(error, PermissionError):
        return "may not be read by this user. Change its permissions."
    if isinstance(error, MemoryError):
        return "does not fit in memory. Close other programs or cut the image into parts."
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"is larger than is sensible to open ({error}). Cut it into parts."
    if isinstance(error, UnidentifiedImageError):
        if path.stat().st_size == 0:
            return "is empty."
        return (
            "is not a PNG, JPEG, WebP, TIFF, GIF or EXR image, or is damaged at its start. Convert it, or get it again."
        )
    return f"is damaged or incomplete ({error}). Get the file again, or open and save it in an image editor."


# ------------------------------------------------------------------------------------------------- writing


def write_image(picture: Picture, path: str | Path, *, overwrite: bool = False) -> None:
    """Write in the format that the path's ending names. All or nothing: never half a file under this name.

    - Values are rounded to the nearest of 8 bits; 16 for a picture of depth 16 in PNG and TIFF.
    - Floating point goes to EXR and TIFF, as the values that came in, and is refused elsewhere.
    - JPEG has no alpha: the picture is laid on white, as a browser shows it.
    - WebP has no grey: it is stored as RGB, and a grey colour profile is left out. GIF has 256 colours.
    - JPEG and WebP are lossy, at quality 95; EXIF beyond JPEG's 64 KB is left out. A TIFF of more than 8 bits of colour
      keeps the texts of EXIF only.
    """
    path = Path(path)
    height, width, channels = picture.pixels.shape
    if channels not in (1, 3, 4):
        raise ImageError(f"{path}: not written, an image has 1, 3 or 4 channels and this one has {channels}.")
    if picture.pixels.is_floating_point() and not torch.isfinite(picture.pixels).all():
        raise ImageError(f"{path}: not written, it holds values that are no numbers. Try again in precision fp32.")
    with _written(path, overwrite, picture, width, height) as (temporary, format):
        array = _levels(picture, format)
        if format.name == "EXR":
            assert picture.light is not None  # else check_target has refused it
            deep_images.write_exr(temporary, array, picture.light.size, picture.light.header)
        elif array.dtype == np.uint8 or (array.dtype == np.uint16 and array.shape[2] == 1):
            temporary.write_bytes(_encode(array, picture, format, path))
        elif format.name == "PNG":
            with temporary.open("wb") as file:
                deep_images.write_png(file, [array], array.shape, icc=picture.icc, exif=picture.exif, dpi=picture.dpi)
        else:
            deep_images.write_tiff(temporary, array, _tiff_options(picture, array.shape))


def write_bands(
    picture: Picture, bands: Iterable[Tensor], height: int, width: int, path: str | Path, *, overwrite: bool = False
) -> None:
    """`write_image` for a large picture that comes from the top down, in bands of (h, W, C) float32 in [0, 1].

    PNG and TIFF are written as the bands come; of the other formats all rows are held, in 8 bits. What the bands
    raise passes through.

    picture: one like it, of any size, with what is to be kept.
    """
    path = Path(path)
    with _written(path, overwrite, picture, width, height) as (temporary, format):
        parts = (part for band in bands for part in band.split(BAND_ROWS))
        arrays = (_levels(replace(picture, pixels=part), format) for part in parts)
        channels = _stored_channels(picture, format)
        if format.name == "PNG":
            with temporary.open("wb") as file:
                shape = height, width, channels
                deep_images.write_png(file, arrays, shape, icc=picture.icc, exif=picture.exif, dpi=picture.dpi)
        elif format.name == "TIFF":
            dtype = np.uint16 if picture.depth == 16 else np.uint8
            shape = height, width, channels
            out, done = deep_images.mapped_tiff(temporary, shape, dtype, _tiff_options(picture, shape)), 0
            for array in arrays:
                out[done : done + len(array)] = array
                done += len(array)
        else:
            temporary.write_bytes(_encode(np.concatenate(list(arrays)), picture, format, path))


@contextmanager
def _written(path: Path, overwrite: bool, picture: Picture, width: int, height: int) -> Iterator[tuple[Path, Format]]:
    """A name to write under that becomes `path` when all has gone well, and errors for people."""
    check_target(path, picture, width, height)
    prepare_target(path, overwrite=overwrite)
    try:
        with replacing(path) as temporary:
            yield temporary, format_of(path)
    except MissingLibraryError as error:
        raise ImageError(f"{path}: not written, {error}") from error
    except OSError as error:
        raise ImageError(f"{path}: {_why_unwritable(error)}") from error


def format_of(path: str | Path) -> Format:
    """The format that a path's ending stands for."""
    found = SUFFIXES.get(Path(path).suffix.lower())
    if found is None:
        raise ImageError(f"{path}: the name must end in one of {', '.join(SUFFIXES)}, which decides the format.")
    return found


def prepare_target(path: str | Path, *, overwrite: bool) -> None:
    """Make sure, before any work is spent on it, that a file can be written here. Makes its folder."""
    path = Path(path)
    try:
        if path.is_dir():
            raise ImageError(f"{path}: is a folder. Give the name of a file in it.")
        if path.exists() and not overwrite:
            raise ImageError(f"{path}: exists already. Allow overwriting, or write elsewhere.")
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ImageError(f"{path}: cannot be written here ({error.strerror}). Write elsewhere.") from error
    if not os.access(path.parent, os.W_OK):
        raise ImageError(f"{path.parent}: this user may not write in this folder. Write elsewhere.")


def check_target(path: str | Path, picture: Picture, width: int, height: int) -> None:
    """Make sure that the path's format can hold a picture like this one at this size."""
    format = format_of(path)
    if max(width, height) > format.max_side:
        raise ImageError(
            f"{path}: {width}x{height} pixels are too many for {format.name}, whose sides end at {format.max_side}. "
            "Use PNG or TIFF."
        )
    if picture.depth == 32 and 32 not in format.depths:
        raise ImageError(f"{path}: {format.name} cannot hold light in floating point. Write .exr or .tiff.")
    if picture.depth != 32 and format.depths == (32,):
        raise ImageError(f"{path}: {format.name} holds light in floating point, and this is none. Write .png or .tiff.")


def _levels(picture: Picture, format: Format) -> Array:
    """(H, W, C) as the file stores it: uint8, uint16 or floating point, C of 1, 2 (grey and alpha), 3 or 4."""
    pixels = picture.pixels.detach().to("cpu")
    if not pixels.is_floating_point():
        pixels = pixels.float() / (2**picture.depth - 1)
    pixels = pixels.float()
    if picture.depth == 32:
        assert picture.light is not None
        values = deep_images.to_light(pixels.numpy(), picture.light)
        return values[..., [0, 3]] if picture.grey else values
    if pixels.shape[2] == 4:
        colour, alpha = pixels.split((3, 1), dim=2)
        if picture.grey:
            colour = colour.mean(dim=2, keepdim=True)
        pixels = torch.cat((colour, alpha), dim=2) if format.alpha else colour * alpha + (1 - alpha)
    depth = picture.depth if picture.depth in format.depths else 8
    whole = pixels.clamp(0, 1).mul_(2**depth - 1).round_()
    return whole.numpy().astype(np.uint16 if depth == 16 else np.uint8)


def _stored_channels(picture: Picture, format: Format) -> int:
    return _levels(replace(picture, pixels=picture.pixels[:1, :1]), format).shape[2]


def _encode(array: Array, picture: Picture, format: Format, path: Path) -> bytes:
    """The bytes of the file. Made in memory: writing them can then fail only as a disk fails."""
    image = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
    options = dict(format.options)
    if picture.icc and not (picture.icc[16:20] == b"GRAY" and (image.mode in ("RGB", "RGBA") or format.name == "WEBP")):
        options["icc_profile"] = picture.icc
    if picture.dpi:
        options["dpi"] = picture.dpi
    buffer = io.BytesIO()
    try:
        if picture.exif and not (format.name == "JPEG" and len(picture.exif) > MAX_EXIF_IN_JPEG):
            options["exif"] = _tiff_exif(picture.exif) if format.name == "TIFF" else picture.exif
        image.save(buffer, format.name, **options)
    except Exception as error:  # an encoder's limit, or metadata that it refuses
        raise ImageError(f"{path}: cannot be stored as {format.name} ({error}). Try another format.") from error
    return buffer.getvalue()


def _tiff_options(picture: Picture, shape: tuple[int, ...]) -> dict[str, Any]:
    """How tifffile is to write a picture of this shape."""
    texts: dict[int, bytes] = {}
    if picture.exif:
        for tag, value in _tiff_exif(picture.exif).items():
            if isinstance(value, str | bytes):
                texts[tag] = value.encode() if isinstance(value, str) else value
    associated = picture.light is not None and picture.light.associated
    return deep_images.tiff_options(shape[2], associated=associated, icc=picture.icc, dpi=picture.dpi, texts=texts)


def _tiff_exif(exif: bytes) -> Image.Exif:
    """EXIF for Pillow's TIFF writer, which takes it apart and would spoil text that is not ASCII."""
    loaded = Image.Exif()
    loaded.load(exif)
    return _as_stored(loaded)


# ------------------------------------------------------------------------------------------------- animations


@dataclass(frozen=True)
class Animation:
    """How long each frame of an animation is shown, and how often all of them."""

    durations: list[float]  # milliseconds
    plays: int  # 0 for ever


def read_animation(path: str | Path) -> Animation | None:
    """What an animated PNG, WebP or GIF says of its frames; None for everything else."""
    with suppress(Exception), Image.open(path, formats=["PNG", "WEBP", "GIF"]) as image:  # read_image says why
        if getattr(image, "n_frames", 1) > 1:
            durations = []
            for number in _frame_numbers(image):
                image.seek(number)
                image.load()
                durations.append(float(image.info.get("duration", 100)))
            return Animation(durations, int(image.info.get("loop", 1 if image.format == "GIF" else 0)))
    return None


def read_frames(path: str | Path) -> Iterator[Picture]:
    """The frames of an animation, whole and in RGBA, one after the other."""
    path = Path(path)
    try:
        with Image.open(path, formats=["PNG", "WEBP", "GIF"]) as image:
            icc = image.info.get("icc_profile") or None
            for number in _frame_numbers(image):
                image.seek(number)
                array = np.array(image.convert("RGBA")).astype(np.float32)
                array /= 255
                yield Picture(torch.from_numpy(array), icc=icc)
    except (OSError, SyntaxError) as error:
        raise ImageError(f"{path}: {_why_unreadable(path, error)}") from error


def _frame_numbers(image: Image.Image) -> range:
    """Without the picture that an animated PNG shows where it cannot be animated."""
    return range(1 if image.info.get("default_image") else 0, image.n_frames)  # type: ignore[attr-defined]


def write_frames(frames: Iterable[Picture], animation: Animation, path: str | Path, *, overwrite: bool = False) -> None:
    """Write an animation as PNG, WebP or GIF; all frames are held in 8 bits. What they raise passes through."""
    path, frames = Path(path), iter(frames)
    if not format_of(path).animated:
        name = format_of(path).name
        raise ImageError(f"{path}: {name} holds one picture, and this is an animation. Write .webp, .png or .gif.")
    first = next(frames)
    height, width, _ = first.pixels.shape
    with _written(path, overwrite, first, width, height) as (temporary, format):
        head, *others = (Image.fromarray(_levels(frame, format)) for frame in chain([first], frames))
        options: dict[str, Any] = dict(format.options)
        if format.name != "GIF" or animation.plays != 1:  # a GIF that says nothing is played once
            options["loop"] = animation.plays
        if format.name == "GIF":
            options["disposal"] = 2  # so that nothing shines through transparent places
        if first.icc:
            options["icc_profile"] = first.icc
        durations = [round(duration) for duration in animation.durations]
        with temporary.open("wb") as file:
            head.save(file, format.name, save_all=True, append_images=others, duration=durations, **options)


def _why_unwritable(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"not written, the disk is full ({error.strerror}). Free some space, or write elsewhere."
    if isinstance(error, PermissionError):
        return "not written, this user may not write here, or another program holds the file open."
    return f"not written ({error.strerror or error}). Write elsewhere."
