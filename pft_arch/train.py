"""Training: the published recipe on Hugging Face accelerate, resumable at any moment.

    pft-sr train --preset light --scale 2 --hr images/ --out runs/light_x2
    pft-sr train --preset light --scale 3 --hr images/ --out runs/light_x3 --init runs/light_x2/best.safetensors
    accelerate launch -m pft_arch train ...          several processes, GPUs or machines

A run folder holds `last.safetensors` and `best.safetensors` (averaged weights), `log.csv`, `strips/`, and `state-N`,
the newest complete state; the same command goes on from there. Patches depend on seed and iteration only.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from PIL import Image
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from .config import preset
from .data import Patches, find_images, read_rgb
from .metrics import psnr_y
from .network import PFTSR, from_config
from .resize import crop_to_multiple, imresize, shrink
from .upscale import upscale
from .weights import load_model, save_model

log = logging.getLogger(__name__)

# Halvings of the published multi-step schedule as parts of the whole: 250, 400, 450, 475, 490 of 500 thousand.
MILESTONES = (0.5, 0.8, 0.9, 0.95, 0.98)


@dataclass(frozen=True)
class Recipe:
    """What a run does. Defaults are the published recipe for a light network from scratch, but for the batch.

    hr, lr: folders of training images; without lr, MATLAB's bicubic makes it. out: run folder.
    val_hr, val_lr: validation images, likewise; None for none.
    init: weights to start from; the head is made new where they are of another scale.
    iterations: optimiser steps; minutes: ends earlier at that time. The schedule follows whichever is nearer its end.
    batch: patches of one step over all processes; patch: side of an LR patch.
    schedule: "multistep", "cosine", "plateau" or "constant", after `warmup` steps of linear increase.
    clip: largest norm of the gradient. ema: decay of the averaged weights. every: steps between validations and states.
    """

    preset: str
    scale: int
    hr: Path
    out: Path
    lr: Path | None = None
    names: Path | None = None
    val_hr: Path | None = None
    val_lr: Path | None = None
    init: Path | None = None
    iterations: int = 500_000
    minutes: float = math.inf
    batch: int = 32
    patch: int = 64
    rate: float = 5e-4
    weight_decay: float = 0.0
    schedule: str = "multistep"
    warmup: int = 20_000
    clip: float = 1.0
    ema: float = 0.999
    every: int = 5_000
    precision: str = "no"
    seed: int = 0


class Progress:
    """Counters of a run that are saved with its state."""

    def __init__(self) -> None:
        self.iteration = 0
        self.seconds = 0.0
        self.skipped = 0
        self.best = -math.inf

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def train(recipe: Recipe) -> Path:
    """Run or resume a training; returns the file with the best averaged weights.

    Raises:
        ValueError: no usable images, or weights to start from that do not fit.
    """
    accelerator = Accelerator(
        mixed_precision=recipe.precision,
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )
    set_seed(recipe.seed)
    recipe.out.mkdir(parents=True, exist_ok=True)
    model = initial_model(recipe)
    names = recipe.names.read_text("utf-8").split() if recipe.names else None
    data = Patches(
        recipe.hr, recipe.lr, recipe.scale, recipe.patch, recipe.iterations * recipe.batch, recipe.seed, names
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.rate, betas=(0.9, 0.99), weight_decay=recipe.weight_decay
    )
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=3)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema)).to(accelerator.device)
    progress = Progress()
    net, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(ema, progress, plateau)
    if state := newest_state(recipe.out):
        accelerator.load_state(str(state))
        log.info("going on from %s", state)

    loader = accelerator.prepare(
        DataLoader(Subset(data, range(progress.iteration * recipe.batch, len(data))), batch_size=recipe.batch)
    )
    started = time.monotonic() - progress.seconds
    sums, bar = np.zeros(2), tqdm(
        total=recipe.iterations, initial=progress.iteration, disable=not accelerator.is_main_process, mininterval=5
    )  # fmt: skip
    for lr, hr in loader:
        progress.seconds = time.monotonic() - started
        done = max(progress.iteration / recipe.iterations, progress.seconds / 60 / recipe.minutes)
        if done >= 1:
            break
        if recipe.schedule != "plateau" or progress.iteration < recipe.warmup:
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate * rate_factor(recipe.schedule, done, progress.iteration, recipe.warmup)
        net.train()
        loss = nn.functional.l1_loss(net(lr).float(), hr)
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(net.parameters(), recipe.clip)
        if norm is not None and not torch.isfinite(norm):
            progress.skipped += 1  # the gradient of this step is of no use; the next may be
        else:
            optimizer.step()
            ema.update_parameters(accelerator.unwrap_model(net))
        optimizer.zero_grad()
        progress.iteration += 1
        sums += float(loss.detach()), 1
        bar.update()

        if progress.iteration % recipe.every == 0:
            _checkpoint(accelerator, recipe, ema.module, optimizer, plateau, progress, data.digest, sums, bar)
            sums[:] = 0
    if progress.iteration % recipe.every:
        _checkpoint(accelerator, recipe, ema.module, optimizer, plateau, progress, data.digest, sums, bar)
    bar.close()
    accelerator.end_training()
    return recipe.out / ("best.safetensors" if recipe.val_hr else "last.safetensors")


def rate_factor(schedule: str, done: float, iteration: int, warmup: int) -> float:
    """Learning rate as a part of the full one, `done` of the run being over (0 to 1)."""
    # 1) linear increase
    if iteration < warmup:
        return (iteration + 1) / warmup
    # 2) half a cosine
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    # 3) halvings
    if schedule == "multistep":
        return 0.5 ** sum(done >= milestone for milestone in MILESTONES)
    return 1.0


def initial_model(recipe: Recipe) -> PFTSR:
    """A new network that begins as plain interpolation, or the given weights, with a new head where it does not fit."""
    model = from_config(preset(recipe.preset, recipe.scale))
    if recipe.init is None:
        interpolate_at_first(model)
        return model
    source = load_model(recipe.init).state_dict()
    own = model.state_dict()
    fitting = {key: value for key, value in source.items() if key in own and own[key].shape == value.shape}
    unfit = sorted(key for key in own.keys() - fitting.keys() if not key.startswith("upsample."))
    if unfit:
        raise ValueError(f"{recipe.init}: not the weights of another scale of {recipe.preset}; {unfit[0]} does not fit")
    if own.keys() != fitting.keys() and "conv_before_upsample.0.weight" in own:
        interpolate_at_first(model)  # gives the new head something to begin with
        fitting = {key: value for key, value in fitting.items() if not key.startswith("upsample.")}
    model.load_state_dict(fitting, strict=False)
    return model


@torch.no_grad()
def interpolate_at_first(model: PFTSR) -> None:
    """Set the convolutions around the transformer so that a new network is close to quadratic interpolation.

    Saves a short training the time in which a network learns to copy. Each colour travels as a pair of channels,
    +x and -x, because only the positive half passes a LeakyReLU unharmed: x = (lrelu(x) - lrelu(-x)) / 1.01.
    Heads other than "pixelshuffle" are left as they are.
    """
    c = model.config
    if c.upsampler != "pixelshuffle" or c.embed_dim < 2 * c.in_channels:
        return
    pairs = 2 * c.in_channels
    first: Any = model.conv_first
    before: Any = model.conv_before_upsample[0]
    last: Any = model.conv_last
    for conv in (first, before, last):
        conv.bias.zero_()
    first.weight[:pairs] = 0
    before.weight[:pairs] = 0
    for parameter in model.conv_after_body.parameters():
        parameter.mul_(0.1)
    last.weight.mul_(0.1)
    last.weight[:, :pairs] = 0
    for i in range(pairs):
        sign = 1 - 2 * (i % 2)
        first.weight[i, i // 2, 1, 1] = sign
        before.weight[i, i, 1, 1] = 1
        last.weight[i // 2, i, 1, 1] = sign / 1.01
    for conv in model.upsample:
        if not isinstance(conv, nn.Conv2d) or conv.bias is None:
            continue
        factor = math.isqrt(conv.out_channels // conv.in_channels)
        offset = (torch.arange(factor) + 0.5) / factor - 0.5
        taps = torch.stack([offset * (offset - 1) / 2, 1 - offset**2, offset * (offset + 1) / 2], 1)  # Lagrange
        kernels = torch.einsum("yi,xj->yxij", taps, taps).flatten(0, 1)
        conv.bias.zero_()
        conv.weight[: pairs * factor**2] = 0
        for i in range(pairs):
            conv.weight[i * factor**2 : (i + 1) * factor**2, i] = kernels


def newest_state(out: Path) -> Path | None:
    """The newest complete state of a run folder; one that was cut short still bears its temporary name."""
    states = [path for path in out.glob("state-*") if path.suffix != ".part"]
    return max(states, key=lambda path: int(path.name.removeprefix("state-")), default=None)


def _checkpoint(
    accelerator: Accelerator,
    recipe: Recipe,
    model: Any,
    optimizer: Any,
    plateau: torch.optim.lr_scheduler.ReduceLROnPlateau,
    progress: Progress,
    digest: str,
    sums: Any,
    bar: Any,
) -> None:
    """Validate, log, and save weights and state; the previous state goes only when the new one is whole."""
    final = recipe.out / f"state-{progress.iteration:08d}"
    part = final.with_suffix(".part")
    psnr = validate(model, recipe) if recipe.val_hr else math.nan
    if recipe.schedule == "plateau" and not math.isnan(psnr):
        plateau.step(psnr)
    is_best = psnr > progress.best
    progress.best = max(progress.best, psnr) if not math.isnan(psnr) else progress.best
    if accelerator.is_main_process:
        row = {
            "iteration": progress.iteration,
            "minutes": round(progress.seconds / 60, 2),
            "loss": float(sums[0] / max(1, sums[1])),
            "rate": optimizer.param_groups[0]["lr"],
            "psnr_y": psnr,
            "skipped": progress.skipped,
        }
        bar.set_postfix(loss=f"{row['loss']:.4f}", psnr=f"{psnr:.2f}")
        write_row(recipe.out / "log.csv", row)
        metadata = {"training": json.dumps(_provenance(recipe, row, digest))}
        save_model(model, recipe.out / "last.safetensors", metadata)
        if is_best:
            save_model(model, recipe.out / "best.safetensors", metadata)
        shutil.rmtree(part, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(part))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        os.replace(part, final)
        for old in recipe.out.glob("state-*"):
            if old != final:
                shutil.rmtree(old)


def write_row(path: Path, row: dict[str, Any]) -> None:
    """Append to a CSV file; the first row writes the head."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)


def _provenance(recipe: Recipe, row: dict[str, Any], digest: str) -> dict[str, Any]:
    values = {k: v.name if isinstance(v, Path) else v for k, v in asdict(recipe).items()}
    values["minutes"] = None if math.isinf(recipe.minutes) else recipe.minutes
    return {"recipe": values, "reached": row, "data_sha256": digest, "torch": torch.__version__}


def validate(model: PFTSR, recipe: Recipe) -> float:
    """Mean PSNR-Y over the validation folder; writes a strip LR | SR | HR of each image."""
    assert recipe.val_hr
    model.eval()
    scores = []
    lows = {path.stem: path for path in find_images(recipe.val_lr)} if recipe.val_lr else {}
    for path in find_images(recipe.val_hr):
        high = crop_to_multiple(read_rgb(path), recipe.scale)
        low = read_rgb(lows[path.stem]) if recipe.val_lr else shrink(high, recipe.scale)
        sr = upscale(torch.tensor(low)[None].float() / 255, model)[0]
        scores.append(psnr_y(sr, torch.tensor(high).float() / 255, recipe.scale))
        strips = recipe.out / "strips"
        strips.mkdir(exist_ok=True)
        enlarged = imresize(low, *high.shape[:2])
        picture = np.concatenate([enlarged, (sr * 255).round().byte().numpy(), high], 1)
        Image.fromarray(picture).save(strips / f"{path.stem}.png")
    return float(np.mean(scores))
