"""Weights from one kind of file to another: the result gets its name only once it gives what the original gives."""

from __future__ import annotations

import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .config import SCALES, PFTConfig, preset
from .files import digest
from .network import PFTSR
from .weights import WeightsError, from_state_dict, load_model, read_weights, resolve, save_model, shapes_tell

TARGETS = (".safetensors", ".pth")
SIDE = 48  # pixels of the test picture: one and a half of the published windows


@dataclass(frozen=True)
class Conversion:
    """What was written, and how well it gives what the original gives."""

    path: Path
    config: PFTConfig
    sha256: str
    psnr: float  # dB between the enlarged test pictures; infinite where they are equal bit for bit


def convert(
    source: str | Path,
    target: str | Path,
    *,
    config: PFTConfig | str | None = None,
    half: bool = False,
    overwrite: bool = False,
) -> Conversion:
    """Write a file's weights as .safetensors with all that loading needs, or as .pth as the published code reads it.

    Args:
        source: any weights file that `load_model` reads, or a name of the catalogue.
        target: its suffix decides.
        config: a configuration, or the name of a preset, where the file does not tell; default: as `load_model`.
        half: store numbers of 16 bits, half the size; what it costs is measured.
        overwrite: replace a target that exists.

    Raises:
        WeightsError: the source cannot be used, the target is there already or cannot be written, or the result does
            not give what the source gives. The target is then as it was.
    """
    source, target = resolve(source), Path(target)
    _check_target(source, target, overwrite)
    state, metadata = read_weights(source)
    if isinstance(config, str):
        config = _preset(source, config, state)
    network = from_state_dict(state, metadata, source=str(source), config=config)
    metadata |= {"source": source.name, "source_sha256": digest(source)}

    picture = sample_picture(network.config.in_channels)
    expected, psnr = _enlarge(network, picture), math.inf
    if half:
        exact, expected = expected, _enlarge(_round_to_half(network, source), picture)
        psnr = -10 * math.log10(max(float((expected - exact).square().mean()), 1e-30))
        metadata["fp16"] = f"{psnr:.1f} dB from the result in 32 bits, on a synthetic picture"
        network.half()
    try:
        # in a folder of its own: what lies in the models folder is offered, whole or not
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".converting-") as folder:
            unchecked = Path(folder, target.name)
            if target.suffix == ".safetensors":
                save_model(network, unchecked, metadata)
                written = load_model(unchecked)
            else:
                torch.save({"params_ema": network.state_dict()}, unchecked)
                written = load_model(unchecked, config=network.config)
            if written.config != network.config or not torch.equal(_enlarge(written, picture), expected):
                raise WeightsError(f"{target}: not written, as the result would differ from {source}. Please report it")
            sha256 = digest(unchecked)
            _check_target(source, target, overwrite)  # once more: this has taken a while
            os.replace(unchecked, target)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        raise WeightsError(f"{target}: not written ({getattr(error, 'strerror', None) or error})") from error
    return Conversion(target, network.config, sha256, psnr)


def sample_picture(channels: int) -> Tensor:
    """(1, channels, SIDE, SIDE) in [0, 1], always the same: waves of many lengths with a step across them."""
    y, x = torch.meshgrid(*[torch.arange(SIDE, dtype=torch.float32)] * 2, indexing="ij")
    waves = [0.5 + 0.25 * torch.sin(x * x / (9 + c) + y) * torch.cos(y / (2 + c)) for c in range(channels)]
    return torch.stack(waves)[None] + 0.25 * (x > y)


@torch.inference_mode()
def _enlarge(network: PFTSR, picture: Tensor) -> Tensor:
    return network(picture)


def _round_to_half(network: PFTSR, source: Path) -> PFTSR:
    """The network with its weights rounded to 16 bits, computing in 32."""
    largest = max(float(parameter.detach().abs().max()) for parameter in network.parameters())
    if largest > torch.finfo(torch.float16).max:
        raise WeightsError(f"{source}: it holds the number {largest:g}, too large for 16 bits; convert it without fp16")
    return network.half().float()


def _preset(source: Path, name: str, state: dict[str, Tensor]) -> PFTConfig:
    """A preset at the scale that the file has."""
    try:
        scale = shapes_tell(state)["scale"]
    except (KeyError, IndexError, ValueError, ZeroDivisionError):
        scale = 0
    if scale not in SCALES:
        raise WeightsError(f"{source}: its shapes do not tell the scale; give a whole configuration, not a preset")
    try:
        return preset(name, scale)
    except ValueError as error:
        raise WeightsError(str(error)) from None


def _check_target(source: Path, target: Path, overwrite: bool) -> None:
    if target.suffix not in TARGETS:
        raise WeightsError(f"{target}: the name must end in {' or '.join(TARGETS)}")
    if not target.parent.is_dir():
        raise WeightsError(f"{target.parent}: no such folder")
    if target.is_dir():
        raise WeightsError(f"{target}: is a folder; give the name of a file")
    if target.exists():
        if target.samefile(source):
            raise WeightsError(f"{target}: is the file to convert; give another name")
        if not overwrite:
            raise WeightsError(f"{target}: exists already; give another name, or allow overwriting")
