"""A network measured on a folder of images beside bicubic interpolation: PSNR and SSIM, the field's table.

LR comes from a folder, or is made from HR by MATLAB's bicubic. What is measured, and how, `metrics` says.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from .data import SUFFIXES, Picture, files_by_name, find_images, read_pair, read_rgb
from .metrics import WINDOW, psnr_y, ssim_y
from .network import PFTSR
from .resize import crop_to_multiple, imresize
from .upscale import upscale, upscale_ensemble

METRICS = ("bicubic_psnr_y", "bicubic_ssim_y", "psnr_y", "ssim_y")


@dataclass(frozen=True)
class Result:
    """One image. PSNR in dB, infinite for equal pictures."""

    name: str
    bicubic_psnr_y: float
    bicubic_ssim_y: float
    psnr_y: float
    ssim_y: float
    tile: int | None  # longer side, in LR pixels, of the largest part the image was worked on in; None: as a whole
    seconds: float  # of upscaling alone


@dataclass(frozen=True)
class Evaluation:
    """A network's results on a folder, and how they were come by."""

    hr: str
    lr: str | None  # None: made from HR by MATLAB's bicubic
    scale: int
    tile: int  # as asked for; 0: the whole image, or the largest tile that fits in memory
    ensemble: bool
    precision: str
    device: str
    torch: str
    images: tuple[Result, ...]

    @property
    def mean(self) -> dict[str, float]:
        return {metric: fmean(getattr(image, metric) for image in self.images) for metric in METRICS}

    @property
    def seconds(self) -> float:
        return sum(image.seconds for image in self.images)


def evaluate(
    model: PFTSR,
    hr: Path,
    lr: Path | None = None,
    *,
    tile: int = 0,
    ensemble: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Measure a network on every image of a folder.

    Args:
        model: a PFTSR in eval mode; its device and precision are used.
        hr: folder of HR images, cropped to a multiple of the scale.
        lr: folder of their LR under the same names, any suffix; None makes them with MATLAB's bicubic.
        tile: as `upscale`.
        ensemble: as `upscale_ensemble`.
        progress: called as progress(done, total) in units of images.

    Raises:
        ValueError: there is no image, or an image cannot be used; the text names every such file. A mean over the
            others would be no figure to compare, so nothing is measured then.
    """
    scale, lows = model.config.scale, files_by_name(lr)
    files = find_images(hr)
    if not files:
        raise ValueError(f"{hr}: holds no image ({', '.join(SUFFIXES)})")
    if faults := [fault for path in files if (fault := _fault(path, lows, scale))]:
        raise ValueError("\n".join(faults))

    images = []
    for path in files:
        try:
            images.append(_measure(path.stem, *read_pair(path, lows, scale), model, tile=tile, ensemble=ensemble))
        except (ValueError, RuntimeError, MemoryError) as error:
            raise ValueError(f"{path}: {error}") from error
        if progress:
            progress(len(images), len(files))
    parameter = next(model.parameters())
    return Evaluation(
        hr=_folder_name(hr),
        lr=_folder_name(lr) if lr else None,
        scale=scale,
        tile=tile,
        ensemble=ensemble,
        precision=str(parameter.dtype).removeprefix("torch."),
        device=torch.cuda.get_device_name(parameter.device) if parameter.is_cuda else str(parameter.device),
        torch=torch.__version__,
        images=tuple(images),
    )


def format_table(evaluation: Evaluation) -> str:
    """The results as text, one image a line, their mean last."""
    rows = [(image.name, asdict(image)) for image in evaluation.images] + [("mean", evaluation.mean)]
    width = max(len(name) for name, _ in rows)
    lines = [
        f"{'':{width}}  {'bicubic':^16}  {'PFT-SR':^16}".rstrip(),
        f"{'image':{width}}  {'PSNR-Y':>8}{'SSIM-Y':>8}  {'PSNR-Y':>8}{'SSIM-Y':>8}",
    ]
    for name, row in rows:
        scores = [f"{row[psnr]:8.2f}{row[ssim]:8.4f}" for psnr, ssim in (METRICS[:2], METRICS[2:])]
        lines.append("  ".join([f"{name:{width}}", *scores]))
    lines.insert(-1, "-" * len(lines[-1]))

    tiled = [image.tile for image in evaluation.images if image.tile]
    parts = f"tiles up to {max(tiled)} for {len(tiled)} of {len(evaluation.images)} images" if tiled else "whole images"
    lines += [
        "",
        f"{evaluation.hr}, x{evaluation.scale}, LR {evaluation.lr or 'made by bicubic'}, {parts}, "
        f"{'8 positions averaged, ' if evaluation.ensemble else ''}"
        f"{evaluation.precision} on {evaluation.device}, {evaluation.seconds:.1f} s",
    ]
    return "\n".join(lines)


def to_json(evaluation: Evaluation) -> dict[str, Any]:
    """The results for programs. An infinite PSNR, which JSON cannot hold, is null."""
    facts = asdict(evaluation)
    images = [_finite(image) for image in facts.pop("images")]
    return {**facts, "seconds": evaluation.seconds, "mean": _finite(evaluation.mean), "images": images}


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(value, float) and math.isinf(value) else value for key, value in row.items()}


def _folder_name(folder: Path) -> str:
    """Enough to know a data set by, and nothing of the machine: "Set5/HR"."""
    return "/".join(folder.resolve().parts[-2:])


def _fault(path: Path, lows: Mapping[str, Path] | None, scale: int) -> str | None:
    """What is wrong with an image, said before hours are spent on the others."""
    try:
        high = crop_to_multiple(read_rgb(path), scale) if lows is None else read_pair(path, lows, scale)[1]
    except ValueError as error:
        return str(error)
    height, width = high.shape[:2]
    least = WINDOW + 2 * scale
    return f"{path}: {width}x{height} pixels are too few; SSIM needs {least}" if min(height, width) < least else None


def _measure(name: str, low: Picture, high: Picture, model: PFTSR, *, tile: int, ensemble: bool) -> Result:
    height, width = low.shape[:2]
    with _sizes_seen(model) as sizes:
        started = time.perf_counter()
        picture = (upscale_ensemble if ensemble else upscale)(_tensor(low)[None], model, tile=tile)[0]
        seconds = time.perf_counter() - started
    truth, bicubic, border = _tensor(high), _tensor(imresize(low, *high.shape[:2])), model.config.scale
    return Result(
        name,
        psnr_y(bicubic, truth, border),
        ssim_y(bicubic, truth, border),
        psnr_y(picture, truth, border),
        ssim_y(picture, truth, border),
        None if sizes <= {(height, width), (width, height)} else max(map(max, sizes)),
        seconds,
    )


@contextmanager
def _sizes_seen(model: PFTSR) -> Iterator[set[tuple[int, int]]]:
    """Heights and widths that pass the network: what `upscale` does when memory runs out is not known before."""
    sizes: set[tuple[int, int]] = set()
    hook = model.register_forward_hook(lambda _, inputs, __: sizes.add(tuple(inputs[0].shape[-2:])))
    try:
        yield sizes
    finally:
        hook.remove()


def _tensor(picture: Picture) -> Tensor:
    return torch.tensor(picture).float() / 255
