"""Image files beyond 8 bits of colour, which Pillow cannot keep: 16-bit PNG and TIFF, floating-point TIFF and EXR.

Arrays here are (H, W, C), of uint8, uint16, float16 or float32. Pixels are read and written by imagecodecs, tifffile
and OpenEXR, imported when used; PNG is written row by row, so that a picture need not be in memory.
"""

from __future__ import annotations

import importlib
import logging
import os
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

log = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
EXR_MAGIC = b"\x76\x2f\x31\x01"
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
PNG_ROWS = 64  # filtered at a time
# EXR attributes that follow from the picture
OWN_ATTRIBUTES = {"channels", "dataWindow", "displayWindow", "type", "lineOrder", "chunkCount", "tiles"}


class MissingLibraryError(Exception):
    """The text says how to get it."""


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingLibraryError(f"needs the package {name}: pip install 'pft-sr[images]'") from error


# ------------------------------------------------------------------------------------------------- light


@dataclass(frozen=True, eq=False)
class Light:
    """How floating-point values were brought into [0, 1] for the network, and the rest of what their file said."""

    peak: float  # the largest value, at least 1
    below: Array | None  # (H, W, C) what was below 0, where anything was
    half: bool  # 16 bits
    associated: bool  # colours are multiplied by alpha
    size: tuple[int, int]  # height, width
    header: Mapping[str, Any] = field(default_factory=dict)  # of EXR


def to_network(values: Array, *, associated: bool, header: Mapping[str, Any] | None = None) -> tuple[Array, Light]:
    """Floating-point values, (H, W, C), as the network takes them: float32 in [0, 1]. `to_light` is the way back."""
    light = values.astype(np.float32)
    colours = light[..., : 3 if light.shape[2] > 2 else 1]
    finite = np.isfinite(colours)
    peak = max(1.0, float(colours.max(where=finite, initial=1.0)))
    if not finite.all():
        log.warning("%d values are infinite or no numbers; they count as the largest value, or as 0", (~finite).sum())
        np.nan_to_num(colours, copy=False, nan=0.0, posinf=peak, neginf=0.0)
    below = np.minimum(colours, 0.0) if colours.min() < 0 else None
    colours[:] = compress(np.maximum(colours, 0.0), peak)
    return light, Light(peak, below, values.dtype == np.float16, associated, values.shape[:2], header or {})


def to_light(pixels: Array, light: Light) -> Array:
    """The network's result, of any size, in the values that went in; what was below 0 is enlarged by itself."""
    values = pixels.astype(np.float32)
    colours = values[..., : 3 if values.shape[2] > 2 else 1]
    colours[:] = expand(colours, light.peak)
    if light.below is not None:
        colours += _resized(light.below, values.shape[:2])
    return values.astype(np.float16) if light.half else values


def _resized(values: Array, size: tuple[int, int]) -> Array:
    planes = torch.from_numpy(values).movedim(2, 0)[None]
    return torch.nn.functional.interpolate(planes, size, mode="bilinear", antialias=True)[0].movedim(0, 2).numpy()


def _srgb(linear: Array) -> Array:
    """The sRGB curve (IEC 61966-2-1), continued above 1."""
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 0.0031308) ** (1 / 2.4) - 0.055)


def _linear(srgb: Array) -> Array:
    return np.where(srgb <= 0.04045, srgb / 12.92, ((np.maximum(srgb, 0.04045) + 0.055) / 1.055) ** 2.4)


def compress(light: Array, peak: float) -> Array:
    """Linear light of [0, peak] to [0, 1]: the sRGB curve, and above it a logarithm the stronger the higher the peak.

    With s = sRGB(light) and S = sRGB(peak): log(1 + (S - 1) s) / log(1 + (S - 1) S), which for a peak of 1 is s itself.
    A white of 1 thus comes to about the middle under any high peak. `expand` is the inverse.
    """
    s, top = _srgb(light), float(_srgb(np.float64(peak)))
    return s if top <= 1 else np.log1p((top - 1) * s) / np.log1p((top - 1) * top)


def expand(values: Array, peak: float) -> Array:
    top = float(_srgb(np.float64(peak)))
    return _linear(values if top <= 1 else np.expm1(values * np.log1p((top - 1) * top)) / (top - 1))


# ------------------------------------------------------------------------------------------------- PNG


def read_png(path: Path) -> Array:
    """A PNG of 16 bits per channel: uint16."""
    array: Array = _library("imagecodecs").png_decode(path.read_bytes())
    return array if array.ndim == 3 else array[..., None]


def write_png(
    file: BinaryIO,
    bands: Iterable[Array],
    shape: tuple[int, int, int],
    *,
    icc: bytes | None,
    exif: bytes | None,
    dpi: tuple[float, float] | None,
) -> None:
    """Write rows as they come, uint8 or uint16, to a PNG of this shape (PNG specification, third edition)."""
    height, width, channels = shape
    packer, above = zlib.compressobj(6), None
    for band in bands:
        if above is None:
            file.write(PNG_MAGIC)
            colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
            file.write(_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8 * band.itemsize, colour, 0, 0, 0)))
            if icc:
                file.write(_chunk(b"iCCP", b"ICC Profile\0\0" + zlib.compress(icc)))
            if dpi:
                x, y = (round(value / 0.0254) for value in dpi)  # per metre
                file.write(_chunk(b"pHYs", struct.pack(">IIB", x, y, 1)))
            if exif:
                file.write(_chunk(b"eXIf", exif.removeprefix(b"Exif\0\0")))
            above = np.zeros((1, width * channels * band.itemsize), np.uint8)
        for start in range(0, len(band), PNG_ROWS):
            part = band[start : start + PNG_ROWS]
            rows = np.ascontiguousarray(part, part.dtype.newbyteorder(">")).view(np.uint8).reshape(len(part), -1)
            data = packer.compress(_filtered(rows, above, channels * band.itemsize).tobytes())
            if data:
                file.write(_chunk(b"IDAT", data))
            above = rows[-1:]
    file.write(_chunk(b"IDAT", packer.flush()) + _chunk(b"IEND", b""))


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _filtered(rows: Array, above: Array, pixel: int) -> Array:
    """Each row as its difference from the left, the upper or the likeliest neighbour, whichever is smallest.

    (rows, bytes) uint8 -> (rows, 1 + bytes), the filter's number first; pixel: bytes per pixel.
    """
    b = np.concatenate((above, rows[:-1]))  # up
    a, c = (np.pad(side, ((0, 0), (pixel, 0)))[:, :-pixel] for side in (rows, b))  # left, and left of up
    estimate = b.astype(np.int16) - c, a.astype(np.int16) - c
    near_a, near_b, near_c = abs(estimate[0]), abs(estimate[1]), abs(estimate[0] + estimate[1])
    paeth = np.where((near_a <= near_b) & (near_a <= near_c), a, np.where(near_b <= near_c, b, c))
    choices = np.stack((rows - a, rows - b, rows - paeth))  # (3, rows, bytes), modulo 256
    cost = np.abs(choices.view(np.int8).astype(np.int16)).sum(2)
    best = cost.argmin(0)
    numbers = np.array([1, 2, 4], np.uint8)[best]
    return np.concatenate((numbers[:, None], choices[best, np.arange(len(rows))]), axis=1)


# ------------------------------------------------------------------------------------------------- TIFF


@dataclass(frozen=True)
class Tiff:
    """A TIFF file's picture, as stored, and what it says about it."""

    array: Array
    associated: bool
    orientation: int
    icc: bytes | None
    dpi: tuple[float, float] | None
    texts: Mapping[int, str]  # tags of the main directory


def read_tiff(path: Path) -> Tiff:
    """A TIFF of grey, RGB or RGBA values.

    Raises:
        ValueError: it holds something else; the text says what.
    """
    tifffile = _library("tifffile")
    with tifffile.TiffFile(path) as file:
        if len(file.pages) > 1:
            raise ValueError(f"holds {len(file.pages)} frames or pages. Save the ones you want as single images.")
        page = file.pages[0]
        photometric = getattr(page.photometric, "name", str(page.photometric))
        if photometric not in ("RGB", "MINISBLACK", "MINISWHITE"):
            raise ValueError(f"colours of the kind {photometric} are not supported in this depth. Save it as RGB.")
        array: Array = page.asarray()
        if "S" in page.axes:
            array = np.moveaxis(array, page.axes.index("S"), -1)
        array = array.reshape(*array.shape[:2], -1)
        if array.dtype == np.float64:
            array = array.astype(np.float32)
        kinds = (np.uint8, np.uint16, np.float16, np.float32)
        if array.dtype not in kinds or array.shape[2] > 4 or (photometric == "MINISWHITE" and array.dtype.kind == "f"):
            raise ValueError(
                f"{array.shape[2]} channels of {array.dtype} are not supported. Save it as 8-bit or 16-bit RGB."
            )
        if photometric == "MINISWHITE":
            array = np.iinfo(array.dtype).max - array
        tags = page.tags
        associated = any(int(kind) == 1 for kind in page.extrasamples)
        dpi = tuple(float(value) for value in page.get_resolution("INCH")) if 282 in tags and 283 in tags else None
        texts = {tag.code: tag.value for tag in tags if isinstance(tag.value, str)}
        orientation = int(tags.valueof(274, 1))
        return Tiff(array, associated, orientation, page.iccprofile, dpi, texts)  # type: ignore[arg-type]


def tiff_options(
    channels: int,
    *,
    associated: bool,
    icc: bytes | None,
    dpi: tuple[float, float] | None,
    texts: Mapping[int, bytes],
) -> dict[str, Any]:
    """How tifffile is to write grey, grey with alpha, RGB or RGBA. texts: tags of the main directory."""
    options: dict[str, Any] = {"photometric": "rgb" if channels > 2 else "minisblack", "metadata": None}
    options["extratags"] = [(tag, 2, 0, text, True) for tag, text in texts.items()]
    if channels in (2, 4):
        options["extrasamples"] = ["assocalpha" if associated else "unassalpha"]
    if channels > 1:
        options["planarconfig"] = "contig"
    if icc:
        options["iccprofile"] = icc
    if dpi:
        options["resolution"], options["resolutionunit"] = dpi, "INCH"
    return options


def write_tiff(path: Path, array: Array, options: Mapping[str, Any]) -> None:
    _library("tifffile").imwrite(path, array[..., 0] if array.shape[2] == 1 else array, **options)


def mapped_tiff(path: Path, shape: tuple[int, int, int], dtype: Any, options: Mapping[str, Any]) -> Array:
    """The pixels of a new TIFF file, to be filled in; in memory are those that are being written only."""
    large = np.prod(shape) * np.dtype(dtype).itemsize > 2**32 - 2**20
    stored = shape if shape[2] > 1 else shape[:2]
    array: Array = _library("tifffile").memmap(path, shape=stored, dtype=dtype, bigtiff=bool(large), **options)
    if hasattr(os, "posix_fallocate"):  # a disk that fills up is an error now; in mapped memory it would be a crash
        with path.open("rb+") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array.reshape(shape)


# ------------------------------------------------------------------------------------------------- EXR


def read_exr(path: Path) -> tuple[Array, Mapping[str, Any]]:
    """The colours of an EXR file's first part, (H, W, C) float16 or float32, and its attributes.

    Raises:
        ValueError: it has no RGB, RGBA or Y channels.
    """
    with _library("OpenEXR").File(str(path)) as file:
        channels, header = file.channels(), dict(file.header())
        name = next((name for name in ("RGBA", "RGB", "Y") if name in channels), None)
        if name is None:
            raise ValueError(f"has no RGB or Y channels, but {', '.join(channels)}. Name the ones to enlarge so.")
        if len(channels) > 1 or len(file.parts) > 1:
            log.warning("%s: only its %s is enlarged; other channels and parts are left out", path, name)
        array: Array = np.array(channels[name].pixels)
    if array.dtype.kind != "f":
        raise ValueError(f"its {name} holds whole numbers ({array.dtype}), and no light. Save it as half or float.")
    return array.reshape(*array.shape[:2], -1), header


def write_exr(path: Path, array: Array, size: tuple[int, int], header: Mapping[str, Any]) -> None:
    """Write colours with the attributes of a file of another size; its windows are scaled."""
    exr = _library("OpenEXR")
    attributes = {name: value for name, value in header.items() if name not in OWN_ATTRIBUTES}
    attributes["type"] = exr.scanlineimage
    height, width, channels = array.shape
    scale = np.array([width / size[1], height / size[0]])
    for name in ("dataWindow", "displayWindow"):
        if name in header:
            low, high = header[name]
            attributes[name] = tuple(
                np.rint(corner).astype(np.int32) for corner in (low * scale, (np.asarray(high) + 1) * scale - 1)
            )
    name = {1: "Y", 3: "RGB", 4: "RGBA"}[channels]
    pixels = np.ascontiguousarray(array[..., 0] if channels == 1 else array)
    exr.File(attributes, {name: pixels}).write(str(path))
