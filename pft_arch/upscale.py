"""Images through the network: tiles, alpha, batches, memory and faults. The only place where tiles are known.

Tiles start on the window grid of the whole image, so windows inside a tile are those of the untiled run. Neighbours
overlap; in an overlap the outer quarter of either tile, which lacks context most, is dropped, and the middle half is
blended linearly.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from .errors import is_out_of_memory
from .memory import peak_bytes
from .network import PFTSR, from_config

log = logging.getLogger(__name__)

T = TypeVar("T")
Plane = tuple[Tensor, Tensor]  # (H, W, C) picture, (H * scale, W * scale, C) place for the result

MIN_OVERLAP, WINDOWS_OVERLAP = 32, 2  # automatic overlap: LR pixels and windows, whichever is more (benchmarks/seams)
HOST_BYTES = 2**30  # for a pass on a CPU or a Mac: larger tiles are no faster there and take memory from others
SHARE_OF_FREE = 0.7  # for a pass: the rest is for what libraries take, and for others
BATCH_PIXELS = 2**14  # LR pixels per forward pass up to which small tiles and frames are taken together


@dataclass(frozen=True)
class Tile:
    """A rectangle of an image in LR pixels, and the weights of its output rows and columns in the blend."""

    top: int
    left: int
    height: int
    width: int
    weight_y: Tensor
    weight_x: Tensor

    @property
    def area(self) -> tuple[slice, slice]:
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)

    def blend_into(self, out: Tensor, picture: Tensor, first: int = 0) -> None:
        """Add the tile's output (C, h * scale, w * scale) to the image out (H * scale, W * scale, C), or to its rows
        from the first."""
        top, left = (start * len(self.weight_y) // self.height for start in (self.top, self.left))
        top -= first
        rows, columns = slice(top, top + len(self.weight_y)), slice(left, left + len(self.weight_x))
        out[rows, columns] += picture.permute(1, 2, 0) * (self.weight_y[:, None, None] * self.weight_x[:, None])


@torch.inference_mode()
def upscale(
    image: Tensor,
    model: PFTSR,
    *,
    tile: int = 0,
    overlap: int = 0,
    progress: Callable[[int, int], None] | None = None,
    check_cancel: Callable[[], None] | None = None,
    preview: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Upscale a batch of images by the model's factor, on the model's device and in its precision.

    Frames and tiles stream: device memory does not grow with B, and host memory holds the input and the output.
    When the device runs out of memory, the tile that failed is cut into smaller ones and work goes on from there.
    A tile that half precision cannot represent is computed again in float32.

    Args:
        image: (B, H, W, C) floating point in [0, 1], C of 1 (grey), 3 (RGB) or 4 (RGB and alpha), any device. Values
            outside are clamped, NaN counts as 0. Alpha goes through the network as a grey picture of its own. A model
            whose `in_channels` is not 3 takes images of just that many channels.
        model: a PFTSR in eval mode.
        tile: side of a tile in LR pixels, rounded up to whole windows, at least two; 0 chooses one from free memory.
        overlap: LR pixels that neighbouring tiles share, rounded up to whole windows; 0 chooses by the window.
        progress: called as progress(done, total) in units of tiles of the whole batch.
        check_cancel: called before each pass; what it raises stops the work and passes through.
        preview: called after each pass with the colours of the picture at work, (H * scale, W * scale, C), in which
            tiles to come are 0. To be looked at there and then: the next pass goes on in the same memory.

    Returns:
        (B, H * scale, W * scale, C) float32 on the CPU, clamped to [0, 1].

    Raises:
        ValueError: the image has another shape or type, or tile and overlap do not fit together.
        MemoryError: not even the smallest tile fits on the device.
        RuntimeError: the network's output is not finite even in float32.
    """
    if image.dim() != 4 or not image.is_floating_point() or 0 in image.shape:
        raise ValueError(f"expected floating-point images (B, H, W, C), got {image.dtype} {tuple(image.shape)}")
    channels, c = image.shape[-1], model.config
    if channels != c.in_channels and not (c.in_channels == 3 and channels in (1, 4)):
        raise ValueError(f"the image has {channels} channels; this model takes {c.in_channels}")
    batch, height, width, _ = image.shape
    tiles, overlap = _tiles(model, height, width, tile, overlap)
    runner = _Runner(model, overlap, check_cancel or (lambda: None))
    out = torch.zeros(batch, height * c.scale, width * c.scale, channels)
    planes = list(_planes(image, out, c.in_channels))
    done, total = 0, len(planes) * len(tiles)
    for group in _passes((plane, t) for plane in planes for t in tiles):
        pictures = runner.run(torch.stack([_crop(source[t.area], c.in_channels) for (source, _), t in group]))
        for ((_, target), t), picture in zip(group, pictures, strict=True):
            # a grey picture went in as RGB and comes back as its mean
            t.blend_into(target, picture if len(picture) == target.shape[-1] else picture.mean(0, keepdim=True))
        done += len(group)
        if preview and target.shape[-1] == min(channels, c.in_channels):  # colours, not alpha
            preview(target)
        if progress:
            progress(done, total)
    return out.clamp_(0, 1)


@torch.inference_mode()
def upscale_ensemble(
    image: Tensor,
    model: PFTSR,
    *,
    progress: Callable[[int, int], None] | None = None,
    preview: Callable[[Tensor], None] | None = None,
    **options: Any,
) -> Tensor:
    """The mean of an image upscaled in 8 positions, turned and mirrored: slightly better, in 8 times the time.

    Arguments and result are those of `upscale`; the preview is of the first position.
    """
    total: Tensor | None = None
    for number in range(8):
        turns, mirror = divmod(number, 2)

        def report(done: int, tiles: int, number: int = number) -> None:
            if progress:
                progress(number * tiles + done, 8 * tiles)

        turned = torch.rot90(image.flip(2) if mirror else image, turns, (1, 2))
        out = upscale(turned, model, progress=report, preview=None if number else preview, **options)
        out = torch.rot90(out, -turns, (1, 2))
        out = out.flip(2) if mirror else out
        total = out if total is None else total.add_(out)
    assert total is not None
    return total.div_(8)


def in_dtype(model: PFTSR, dtype: torch.dtype) -> PFTSR:
    """The network in another precision, on the same device, the model left as it is. Weights that need no change are
    shared."""
    # not a deep copy: hosts hang things on a module that must not be copied
    with torch.device("meta"):
        copy = from_config(model.config)
    state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in model.state_dict().items()}
    copy.load_state_dict(state, assign=True)
    return copy.eval()


@torch.inference_mode()
def upscale_bands(
    read: Callable[[slice, slice], Tensor],
    size: tuple[int, int, int],
    model: PFTSR,
    *,
    tile: int = 0,
    overlap: int = 0,
    progress: Callable[[int, int], None] | None = None,
    check_cancel: Callable[[], None] | None = None,
) -> Iterator[Tensor]:
    """The result of `upscale`, from the top down, for pictures too large to hold in floating point.

    Args:
        read: gives rows and columns of the picture, (h, w, C) floating point in [0, 1].
        size: height, width and channels of the picture: 1, or as many as the model takes. Alpha is a picture of its
            own: take it apart.
        model, tile, overlap, progress, check_cancel: as for `upscale`.

    Yields:
        (h, W * scale, C) float32 on the CPU in [0, 1]: the next rows of the result. No more than the rows of two tiles
        are in memory.
    """
    (height, width, channels), c = size, model.config
    tiles, overlap = _tiles(model, height, width, tile, overlap)
    runner = _Runner(model, overlap, check_cancel or (lambda: None))
    band, first = torch.zeros(0, width * c.scale, channels), 0  # rows at work, and which row of the result is the first
    done = 0
    for group in _passes((None, t) for t in tiles):
        crops = [_crop(read(*t.area), c.in_channels) for _, t in group]
        for (_, t), picture in zip(group, runner.run(torch.stack(crops)), strict=True):
            top, missing = t.top * c.scale - first, (t.top + t.height) * c.scale - first - len(band)
            if top > 0:  # tiles come row by row: what is above this one is finished
                yield band[:top].clamp_(0, 1)
                band, first = band[top:], first + top
            if missing > 0:
                band = torch.cat((band, torch.zeros(missing, *band.shape[1:])))
            t.blend_into(band, picture if len(picture) == channels else picture.mean(0, keepdim=True), first)
        done += len(group)
        if progress:
            progress(done, len(tiles))
    yield band.clamp_(0, 1)


def _tiles(model: PFTSR, height: int, width: int, tile: int, overlap: int) -> tuple[list[Tile], int]:
    """The tiles of an image, and the overlap in whole windows."""
    if tile < 0 or overlap < 0:
        raise ValueError(f"tile and overlap cannot be negative; got {tile} and {overlap}")
    window = model.config.window_size
    overlap = -(-(overlap or max(MIN_OVERLAP, WINDOWS_OVERLAP * window)) // window) * window
    side = max(2, -(-tile // window)) * window if tile else auto_tile(model, height, width)
    side = max(side, overlap + window)  # a tile must reach beyond what it shares
    return tile_grid(height, width, side, overlap, window, model.config.scale), overlap


def tile_grid(height: int, width: int, side: int, overlap: int, window: int, scale: int) -> list[Tile]:
    """The tiles of an image, row by row. All lengths in LR pixels; side, overlap in whole windows."""
    rows = _spans(height, side, overlap, window, scale)
    columns = _spans(width, side, overlap, window, scale)
    return [
        Tile(top, left, min(side, height - top), min(side, width - left), weight_y, weight_x)
        for top, weight_y in rows
        for left, weight_x in columns
    ]


def _spans(length: int, side: int, overlap: int, window: int, scale: int) -> list[tuple[int, Tensor]]:
    """Along one axis: first pixel of each tile, on the window grid, and the weights of its output pixels.

    The last tile ends where the image does. Weights of all tiles add up to 1 at every output pixel.
    """
    last = -(-max(0, length - side) // window) * window
    starts = [*range(0, last, side - overlap), last]
    total = torch.zeros(length * scale)
    spans: list[tuple[int, Tensor]] = []
    for start in starts:
        stop = min(start + side, length)
        place = (torch.arange((stop - start) * scale) + 0.5) / scale  # LR pixels from the tile's first edge
        ramp = torch.ones_like(place)
        for inside, distance in ((start > 0, place), (stop < length, stop - start - place)):
            if inside and overlap:
                ramp = torch.minimum(ramp, ((distance - overlap / 4) / (overlap / 2)).clamp(0, 1))
        total[start * scale : stop * scale] += ramp
        spans.append((start, ramp))
    return [(start, ramp / total[start * scale : start * scale + len(ramp)]) for start, ramp in spans]


def auto_tile(model: PFTSR, height: int, width: int) -> int:
    """Side of the largest tile, in LR pixels and whole windows, that free memory allows; the whole image if it fits."""
    window = model.config.window_size
    room = SHARE_OF_FREE * free_memory(_device(model))
    whole = -(-max(height, width) // window)
    if peak_bytes(model, height, width) <= room:
        return whole * window
    more = range(3, whole + 1)  # sides in windows beyond the smallest, 2
    return (2 + bisect_right(more, room, key=lambda side: peak_bytes(model, side * window, side * window))) * window


def free_memory(device: torch.device) -> int:
    """Bytes that a forward pass may take on the device."""
    if device.type != "cuda":
        return HOST_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _planes(image: Tensor, out: Tensor, in_channels: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(H, W, C) pictures for the network, each with its place in the output. Alpha is a picture of its own."""
    for frame, target in zip(image, out, strict=True):
        colours = min(frame.shape[-1], in_channels)
        yield frame[..., :colours], target[..., :colours]
        if frame.shape[-1] > colours:
            alpha = frame[..., colours:]
            if bool((alpha == alpha[0, 0]).all()):  # one opacity everywhere, as most have, needs no network
                target[..., colours:] = alpha[0, 0]
            else:
                yield alpha, target[..., colours:]


def _crop(crop: Tensor, in_channels: int) -> Tensor:
    """(h, w, C) of a tile -> (in_channels, h, w): in [0, 1], finite, grey repeated."""
    crop = crop.float().nan_to_num(0.0, 1.0, 0.0).clamp(0, 1)
    return crop.permute(2, 0, 1).expand(in_channels, -1, -1)


class _Runner:
    """Forward passes that survive running out of memory, half precision's range, and others who move the network."""

    def __init__(self, model: PFTSR, overlap: int, check_cancel: Callable[[], None]) -> None:
        self.model = model
        self.overlap = overlap
        self.check_cancel = check_cancel
        self.place = _place(model)
        self.precise: PFTSR | None = None
        self.limit = float("inf")  # LR pixels per pass known to be too many

    def run(self, pictures: Tensor) -> Tensor:
        """(N, C, h, w) on any device -> (N, C, h * scale, w * scale) float32 on the CPU."""
        count, _, height, width = pictures.shape
        if count * height * width < self.limit:
            self.check_cancel()
            try:
                return self._forward(pictures)
            except (MemoryError, RuntimeError) as error:
                moved = any((weight.device, weight.dtype) != self.place for weight in self.model.parameters())
                if not (moved or is_out_of_memory(error)):
                    raise
            # outside the handler, so that the failed pass's tensors are no longer referenced
            if moved:  # a host has evicted the network in mid-pass, or another thread has cast it
                self.model.to(*self.place)
                return self.run(pictures)
            self.limit = min(self.limit, count * height * width)
            _empty_cache(_device(self.model))
        if count > 1:
            return torch.cat([self.run(picture[None]) for picture in pictures])
        return self._run_in_parts(pictures)

    def _forward(self, pictures: Tensor) -> Tensor:
        out = self.model(pictures.to(_device(self.model))).float().cpu()
        if torch.isfinite(out).all():
            return out
        if next(self.model.parameters()).dtype != torch.float32:
            out = self._precise_model()(pictures.to(_device(self.model))).float().cpu()
        if not torch.isfinite(out).all():
            raise RuntimeError("the network gives values that are not finite, in float32 too; get its weights again")
        return out

    def _precise_model(self) -> PFTSR:
        if self.precise is None:
            log.warning("PFT-SR: values beyond the range of half precision; computing those tiles again in float32")
            self.precise = in_dtype(self.model, torch.float32)
        return self.precise

    def _run_in_parts(self, picture: Tensor) -> Tensor:
        """One picture too large for the device, in tiles of half its longer side."""
        c = self.model.config
        _, _, height, width = picture.shape
        side = -(-max(height, width) // (2 * c.window_size)) * c.window_size
        side = max(side, 2 * c.window_size)
        overlap = min(self.overlap, side - c.window_size)
        if side >= max(height, width):
            raise MemoryError(
                f"{_device(self.model)} has no room for even the smallest tile, {height} x {width} pixels. Free memory "
                "by closing other programs or unloading other models, use half precision, or run on the CPU"
            )
        log.warning("PFT-SR: out of memory at %d x %d pixels; going on with tiles of %d", height, width, side)
        out = torch.zeros(height * c.scale, width * c.scale, c.in_channels)
        for t in tile_grid(height, width, side, overlap, c.window_size, c.scale):
            rows, columns = t.area
            t.blend_into(out, self.run(picture[..., rows, columns])[0])
        return out.permute(2, 0, 1)[None]


def _passes(work: Iterable[tuple[T, Tile]]) -> Iterator[list[tuple[T, Tile]]]:
    """Consecutive tiles of one shape, together as long as they are small, each with what belongs to it."""
    group: list[tuple[T, Tile]] = []
    for plane, t in work:
        area = t.height * t.width
        if group:
            first = group[0][1]
            if (t.height, t.width) != (first.height, first.width) or (len(group) + 1) * area > BATCH_PIXELS:
                yield group
                group = []
        group.append((plane, t))
    if group:
        yield group


def _place(model: PFTSR) -> tuple[torch.device, torch.dtype]:
    weight = next(model.parameters())
    return weight.device, weight.dtype


def _device(model: PFTSR) -> torch.device:
    return next(model.parameters()).device


def _empty_cache(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
