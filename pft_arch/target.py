"""A picture of any size: as many passes of the network as it takes, then one resample down, never one in between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .network import PFTSR
from .upscale import upscale, upscale_ensemble

Size = tuple[int, int]  # height, width

MODES = ("model scale", "factor", "megapixels", "fit inside", "fill and crop", "stretch")
MAX_FACTOR = 16  # per side: four passes at x2, two at x4. Beyond, a network enlarges its own artefacts
STEPS = 1000  # of progress in a pass over a frame of the source's size, so that its tiles show


@dataclass(frozen=True)
class Plan:
    """How pictures of one size become pictures of another."""

    source: Size
    scale: int  # of the network
    passes: int  # of the network, one after the other; 0 where nothing is to be enlarged
    resized: Size  # by the resample, no larger than what the passes give
    size: Size  # of the result, cut from the middle of that

    @property
    def enlarged(self) -> Size:
        """After the passes."""
        height, width = self.source
        return height * self.scale**self.passes, width * self.scale**self.passes

    @property
    def is_plain(self) -> bool:
        """Whether one pass is all."""
        return self.passes == 1 and self.enlarged == self.resized == self.size

    def host_bytes(self, frames: int, channels: int) -> int:
        """Main memory that `upscale_to` takes: all results, and one frame on its way through passes and resample."""
        (height, width), (tall, wide) = self.size, self.enlarged
        return 4 * channels * (frames * height * width + (0 if self.is_plain else 2 * tall * wide))


def plan(
    source: Size,
    scale: int,
    mode: str = "model scale",
    *,
    factor: float = 2.0,
    megapixels: float = 4.0,
    width: int = 0,
    height: int = 0,
) -> Plan:
    """The fewest passes that reach a size, so that all that is left is to make the picture smaller.

    Args:
        source: height and width of the pictures.
        scale: of the network.
        mode: one of `MODES`. Of the last three, which aim at width x height, "fit inside" keeps the proportions and
            the whole picture, "fill and crop" keeps the proportions and cuts off what stands out, "stretch" keeps the
            whole picture and gives up the proportions.
        factor, megapixels (millions of pixels), width, height: for the modes that use them. A width or height of 0
            follows from the other.

    Raises:
        ValueError: there is no such mode, a value is not positive, or the result would be more than `MAX_FACTOR` times
            as high or wide as the source.
    """
    rows, columns = source
    if mode == "model scale":
        resized = size = (rows * scale, columns * scale)
    elif mode == "factor":
        resized = size = _times(source, _positive(factor, "factor"))
    elif mode == "megapixels":
        resized = size = _times(source, (_positive(megapixels, "megapixels") * 1e6 / (rows * columns)) ** 0.5)
    elif mode in MODES:
        resized, size = _into_box(source, mode, width, height)
    else:
        raise ValueError(f"there is no mode {mode!r}; choose one of {', '.join(MODES)}")

    needed = max(resized[0] / rows, resized[1] / columns)
    if needed > MAX_FACTOR:
        what = mode if mode in ("factor", "megapixels") else "width or height"
        raise ValueError(
            f"{size[1]} x {size[0]} pixels are {needed:.4g} times as many on a side as the image has, {columns} x "
            f"{rows}; at most {MAX_FACTOR} times is possible. Lower {what}"
        )
    passes = 0
    while rows * scale**passes < resized[0] or columns * scale**passes < resized[1]:
        passes += 1
    return Plan(source, scale, passes, resized, size)


@torch.inference_mode()
def upscale_to(
    image: Tensor,
    model: PFTSR,
    plan: Plan,
    *,
    tile: int = 0,
    overlap: int = 0,
    ensemble: bool = False,
    progress: Callable[[int, int], None] | None = None,
    check_cancel: Callable[[], None] | None = None,
    preview: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Upscale a batch of images to the size of a plan made for their size and the model's scale.

    Args:
        image, model, tile, overlap, check_cancel, preview: as `upscale`.
        ensemble: every pass as `upscale_ensemble`.
        progress: called as progress(done, total): tiles where the plan is plain, else parts of the work.

    Returns:
        (B, height, width, C) float32 on the CPU, clamped to [0, 1].

    Raises:
        ValueError, MemoryError, RuntimeError: as `upscale`.
    """
    run = upscale_ensemble if ensemble else upscale
    if plan.is_plain:
        return run(
            image, model, tile=tile, overlap=overlap, progress=progress, check_cancel=check_cancel, preview=preview
        )

    # frame by frame: what is between source and result is the largest of the three
    out = torch.empty(len(image), *plan.size, image.shape[-1])
    shares = [plan.scale ** (2 * number) for number in range(plan.passes)]  # of the work, by pixels
    done, total = 0, len(image) * sum(shares)
    for frame, place in zip(image, out, strict=True):
        picture = frame[None]
        for share in shares:

            def report(tiles: int, of: int, done: int = done, share: int = share) -> None:
                if progress:
                    progress(STEPS * done + STEPS * share * tiles // of, STEPS * total)

            picture = run(
                picture, model, tile=tile, overlap=overlap, progress=report, check_cancel=check_cancel, preview=preview
            )
            done += share
        place.copy_(_resample(picture, plan))
    return out


def _resample(picture: Tensor, plan: Plan) -> Tensor:
    """(1, H, W, C) of any type -> (height, width, C) float32 in [0, 1]: bicubic, without aliasing."""
    picture = picture.permute(0, 3, 1, 2).float().nan_to_num(0.0, 1.0, 0.0).clamp(0, 1)
    if picture.shape[2:] != plan.resized:
        picture = F.interpolate(picture, plan.resized, mode="bicubic", antialias=True).clamp(0, 1)
    (height, width), (tall, wide) = plan.size, plan.resized
    top, left = (tall - height) // 2, (wide - width) // 2
    return picture[0, :, top : top + height, left : left + width].permute(1, 2, 0)


def _into_box(source: Size, mode: str, width: int, height: int) -> tuple[Size, Size]:
    """Resized and final size for a box of width x height, of which one may be 0: free."""
    if width < 0 or height < 0 or not (width or height):
        raise ValueError(f"width and height must be positive, or one of them 0; got {width} and {height}")
    if not (width and height):
        resized = _times(source, width / source[1] or height / source[0])
        resized = (height or resized[0], width or resized[1])
        return resized, resized
    if mode == "stretch":
        return (height, width), (height, width)
    factors = height / source[0], width / source[1]
    if mode == "fit inside":
        resized = _times(source, min(factors))
        return resized, resized
    resized = _times(source, max(factors))
    return resized, (height, width)


def _times(size: Size, factor: float) -> Size:
    height, width = (max(1, round(side * factor)) for side in size)
    return height, width


def _positive(value: float, name: str) -> float:
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be positive; got {value}")
    return value
