"""Image files to tensors and back: PNG, JPEG, WebP and TIFF.

`read_image` gives the upright picture with what belongs to it (colour profile, EXIF, resolution); `write_image`
writes all of it, or leaves what was there before untouched.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from .files import replacing


class ImageError(ValueError):
    """A problem with an image file. The text names the file, says what is wrong and what to do."""


@dataclass(frozen=True, eq=False)
class Picture:
    """An image and what its file said about it."""

    pixels: Tensor  # (H, W, C), float32 in [0, 1]; C is 1 (grey), 3 (RGB) or 4 (RGBA, alpha not premultiplied)
    grey: bool = False  # with 4 channels: the colours were one grey channel, and are written as one again
    depth: int = 8  # bits per channel in the file; 16 only for grey
    icc: bytes | None = None
    exif: bytes | None = None
    dpi: tuple[float, float] | None = None


@dataclass(frozen=True)
class Format:
    """What a file format can hold, and how we write it."""

    name: str  # Pillow's name
    suffixes: tuple[str, ...]
    alpha: bool = True
    deep_grey: bool = False  # 16-bit grey
    max_side: int = 2**31 - 1
    options: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))


# Near-lossless settings: whoever enlarges a picture wants its detail, and can shrink the file afterwards.
FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "png": Format("PNG", (".png",), deep_grey=True),
        "jpg": Format(
            "JPEG", (".jpg", ".jpeg"), alpha=False, max_side=65500, options={"quality": 95, "subsampling": 0}
        ),
        "webp": Format("WEBP", (".webp",), max_side=16383, options={"quality": 95}),
        "tiff": Format("TIFF", (".tiff", ".tif"), deep_grey=True),  # uncompressed: else Pillow cannot write EXIF
    }
)
PILLOW_FORMATS = [f.name for f in FORMATS.values()]
SUFFIXES: Mapping[str, Format] = MappingProxyType({s: f for f in FORMATS.values() for s in f.suffixes})

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


def read_image(path: str | Path) -> Picture:
    """Read a PNG, JPEG, WebP or TIFF file, upright.

    - EXIF orientation is applied, and gone from the EXIF that is kept. A thumbnail and XMP are not kept.
    - Palette and 1-bit images become RGB(A) and grey, grey with alpha becomes RGBA with `grey` set.
    - CMYK becomes sRGB through the file's own profile, or by Pillow's plain formula where it has none.
    - 16-bit grey is read in full depth. 16-bit RGB is not: Pillow reads it as 8 bit.
    - Animations, files of several pages, and 32-bit pixels are refused.
    """
    path = Path(path)
    try:
        with Image.open(path, formats=PILLOW_FORMATS) as image:
            # The second frame of a JPEG is a preview or a depth map, and not a page.
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            if frames > 1:
                raise ImageError(f"{path}: holds {frames} frames or pages. Save the ones you want as single images.")
            image.load()
            return _picture(image, path)
    except ImageError:
        raise
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        raise ImageError(f"{path}: {_why_unreadable(path, error)}") from error


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
        raise ImageError(f"{path}: colour mode {image.mode} is not supported. Save it as 8-bit RGB or 16-bit grey.")
    elif image.has_transparency_data:
        grey = image.mode in ("1", "L", "LA", "La")
        image = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
    else:
        image = image.convert("L" if image.mode in ("1", "L") else "RGB")

    array = np.asarray(image).astype(np.float32)
    array /= 2**depth - 1
    pixels = torch.from_numpy(array)
    return Picture(pixels if pixels.ndim == 3 else pixels[..., None], grey, depth, icc, exif, dpi)


def _make_upright(image: Image.Image) -> bytes | None:
    """Turn the image as its EXIF says. Returns the EXIF worth keeping."""
    with suppress(Exception):  # broken EXIF makes Pillow raise nearly anything, and must not cost the picture
        ImageOps.exif_transpose(image, in_place=True)
        exif, kept = image.getexif(), Image.Exif()
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
        return "is not a PNG, JPEG, WebP or TIFF image, or is damaged at its start. Convert it, or get it again."
    return f"is damaged or incomplete ({error}). Get the file again, or open and save it in an image editor."


# ------------------------------------------------------------------------------------------------- writing


def write_image(picture: Picture, path: str | Path, *, overwrite: bool = False) -> None:
    """Write in the format that the path's ending names. All or nothing: never half a file under this name.

    - Values are rounded to the nearest of 8 bits; 16 for a picture of depth 16 in PNG and TIFF.
    - JPEG has no alpha: the picture is laid on white, as a browser shows it.
    - WebP has no grey: it is stored as RGB, and a grey colour profile is left out.
    - JPEG and WebP are lossy, at quality 95; EXIF beyond JPEG's 64 KB is left out.
    """
    path = Path(path)
    prepare_target(path, overwrite=overwrite)
    height, width, channels = picture.pixels.shape
    if channels not in (1, 3, 4):
        raise ImageError(f"{path}: not written, an image has 1, 3 or 4 channels and this one has {channels}.")
    if not torch.isfinite(picture.pixels).all():
        raise ImageError(f"{path}: not written, it holds values that are no numbers. Try again in precision fp32.")
    check_size(path, width, height)
    encoded = _encode(picture, format_of(path), path)
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(encoded)
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
    format_of(path)
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


def check_size(path: str | Path, width: int, height: int) -> None:
    """Make sure that the path's format can hold an image of this size."""
    limit = format_of(path).max_side
    if max(width, height) > limit:
        raise ImageError(
            f"{path}: {width}x{height} pixels are too many for {format_of(path).name}, whose sides end at {limit}. "
            "Use PNG or TIFF."
        )


def _encode(picture: Picture, format: Format, path: Path) -> bytes:
    """The bytes of the file. Made in memory: writing them can then fail only as a disk fails."""
    image = _pillow_image(picture, format)
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


def _tiff_exif(exif: bytes) -> Image.Exif:
    """EXIF for Pillow's TIFF writer, which takes it apart and would spoil text that is not ASCII."""
    loaded = Image.Exif()
    loaded.load(exif)
    return _as_stored(loaded)


def _pillow_image(picture: Picture, format: Format) -> Image.Image:
    pixels = picture.pixels.detach().to("cpu", torch.float32)
    if pixels.shape[2] == 4:
        colour, alpha = pixels.split((3, 1), dim=2)
        if picture.grey:
            colour = colour.mean(dim=2, keepdim=True)
        pixels = torch.cat((colour, alpha), dim=2) if format.alpha else colour * alpha + (1 - alpha)

    depth = 16 if picture.depth == 16 and format.deep_grey and pixels.shape[2] == 1 else 8
    values = (pixels.clamp(0, 1) * (2**depth - 1)).round()
    array = values.numpy().astype(np.uint16 if depth == 16 else np.uint8)
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def _why_unwritable(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"not written, the disk is full ({error.strerror}). Free some space, or write elsewhere."
    if isinstance(error, PermissionError):
        return "not written, this user may not write here, or another program holds the file open."
    return f"not written ({error.strerror or error}). Write elsewhere."
