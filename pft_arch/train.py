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
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from .config import preset
from .data import Patches, files_by_name, find_images, read_pair
from .metrics import psnr_y
from .network import PFTSR, from_config
from .recipe import Recipe
from .resize import imresize
from .upscale import upscale
from .weights import load_model, save_model

log = logging.getLogger(__name__)


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
    """Run or resume a training; returns the file with the best averaged weights, the last ones without validation.

    Raises:
        ValueError: no usable images, or weights to start from that do not fit.
    """
    return _Run(recipe).go()


class _Run:
    """One training in one process of perhaps several."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.accelerator = Accelerator(
            mixed_precision=recipe.precision,
            dataloader_config=DataLoaderConfiguration(split_batches=True),  # `batch` is that of all processes together
        )
        set_seed(recipe.seed)
        recipe.out.mkdir(parents=True, exist_ok=True)
        names = recipe.names.read_text("utf-8").split() if recipe.names else None
        self.data = Patches(
            recipe.hr, recipe.lr, recipe.scale, recipe.patch, recipe.iterations * recipe.batch, recipe.seed, names
        )
        model = initial_model(recipe)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=recipe.rate, betas=(0.9, 0.99), weight_decay=recipe.weight_decay
        )
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=3)
        self.ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema)).to(self.accelerator.device)
        self.progress = Progress()
        self.net, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.accelerator.register_for_checkpointing(self.ema, self.progress, self.plateau)
        if state := newest_state(recipe.out):
            self.accelerator.load_state(str(state))
            log.info("going on from %s", state)

    def go(self) -> Path:
        recipe, progress = self.recipe, self.progress
        rest = Subset(self.data, range(progress.iteration * recipe.batch, len(self.data)))
        loader = self.accelerator.prepare(DataLoader(rest, batch_size=recipe.batch))
        started = time.monotonic() - progress.seconds
        losses: list[float] = []
        saved = progress.iteration
        with tqdm(
            total=recipe.iterations,
            initial=progress.iteration,
            disable=not self.accelerator.is_main_process,
            mininterval=5,
        ) as bar:
            for lr, hr in loader:
                progress.seconds = time.monotonic() - started
                done = max(progress.iteration / recipe.iterations, progress.seconds / 60 / recipe.minutes)
                if done >= 1:
                    break
                self.set_rate(done)
                losses.append(self.step(lr, hr))
                bar.update()
                if progress.iteration % recipe.every == 0:
                    bar.set_postfix(self.checkpoint(losses))
                    losses, saved = [], progress.iteration
            if saved != progress.iteration:
                bar.set_postfix(self.checkpoint(losses))
        self.accelerator.end_training()
        return recipe.out / ("best.safetensors" if recipe.val_hr else "last.safetensors")

    def set_rate(self, done: float) -> None:
        if self.recipe.schedule == "plateau" and done >= self.recipe.warmup:
            return  # from here the plateau scheduler has it
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate_at(done)

    def step(self, lr: Tensor, hr: Tensor) -> float:
        """One optimiser step; returns the loss over all processes."""
        self.net.train()
        loss = nn.functional.l1_loss(self.net(lr).float(), hr)
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.net.parameters(), self.recipe.clip)
        if norm is not None and not torch.isfinite(norm):
            self.progress.skipped += 1  # the gradient of this step is of no use; the next one's may be
        else:
            self.optimizer.step()
            self.ema.update_parameters(self.accelerator.unwrap_model(self.net))
        self.optimizer.zero_grad()
        self.progress.iteration += 1
        return float(self.accelerator.reduce(loss.detach(), "mean"))

    def checkpoint(self, losses: list[float]) -> dict[str, str]:
        """Validate, log, and save weights and state; the previous state goes only when the new one is whole."""
        recipe, progress, main = self.recipe, self.progress, self.accelerator.is_main_process
        model: Any = self.ema.module
        psnr = validate(model, recipe) if recipe.val_hr else math.nan
        if recipe.schedule == "plateau" and not math.isnan(psnr):
            self.plateau.step(psnr)
        is_best = psnr > progress.best
        progress.best = psnr if is_best else progress.best
        row = {
            "iteration": progress.iteration,
            "minutes": round(progress.seconds / 60, 2),
            "loss": float(np.mean(losses)),
            "rate": self.optimizer.param_groups[0]["lr"],
            "psnr_y": psnr,
            "skipped": progress.skipped,
        }
        final = recipe.out / f"state-{progress.iteration:08d}"
        part = final.with_suffix(".part")
        if main:
            metadata = {"training": json.dumps(self.provenance(row))}
            save_model(model, recipe.out / "last.safetensors", metadata)
            if is_best:
                save_model(model, recipe.out / "best.safetensors", metadata)
            shutil.rmtree(part, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(part))
        self.accelerator.wait_for_everyone()
        if main:
            os.replace(part, final)
            write_row(recipe.out / "log.csv", row)
            for old in recipe.out.glob("state-*"):
                if old != final:
                    shutil.rmtree(old)
        return {"loss": f"{row['loss']:.4f}", "psnr": f"{psnr:.2f}"}

    def provenance(self, row: dict[str, Any]) -> dict[str, Any]:
        """Where weights come from, as JSON types: recipe, what it reached, data, software."""
        values = {k: v.name if isinstance(v, Path) else v for k, v in asdict(self.recipe).items()}
        values["minutes"] = None if math.isinf(self.recipe.minutes) else self.recipe.minutes
        return {
            "recipe": values,
            "reached": {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()},
            "data_sha256": self.data.digest,
            "processes": self.accelerator.num_processes,
            "torch": torch.__version__,
        }


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


def write_row(path: Path, row: dict[str, Any]) -> None:
    """Append to a CSV file; the first row writes the head."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)


def validate(model: PFTSR, recipe: Recipe) -> float:
    """Mean PSNR-Y over the validation folder; writes a strip LR | SR | HR of each image."""
    assert recipe.val_hr
    model.eval()
    scores = []
    lows = files_by_name(recipe.val_lr)
    strips = recipe.out / "strips"
    strips.mkdir(exist_ok=True)
    for path in find_images(recipe.val_hr):
        low, high = read_pair(path, lows, recipe.scale)
        sr = upscale(torch.tensor(low)[None].float() / 255, model)[0]
        scores.append(psnr_y(sr, torch.tensor(high).float() / 255, recipe.scale))
        picture = [imresize(low, *high.shape[:2]), (sr * 255).round().byte().numpy(), high]
        Image.fromarray(np.concatenate(picture, 1)).save(strips / f"{path.stem}.png")
    return float(np.mean(scores))
