"""What a training does: every number of it, with the published values as defaults."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCHEDULES = ("multistep", "cosine", "plateau", "constant")
PRECISIONS = ("no", "bf16", "fp16")

# Published training options (CVL-UESTC/PFT-SR, options/train/*.yml). Rates halve at these parts of the iterations.
SCRATCH_ITERATIONS, SCRATCH_MILESTONES = 500_000, (0.5, 0.8, 0.9, 0.95, 0.98)
FINETUNE_ITERATIONS, FINETUNE_MILESTONES = 250_000, (0.6, 0.8, 0.9, 0.96)
WARMUP = 0.04  # 20 of 500, and 10 of 250 thousand
LIGHT_RATE, RATE = 5e-4, 2e-4  # light networks from scratch; classical ones and all fine-tuning
LIGHT_BATCH, BATCH = 16, 32
LIGHT = ("light", "pft_light")


def _option(text: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run. Iterations, batch and rate of 0 stand for the published ones of the preset and start.

    Raises:
        ValueError: a value makes no sense; the text names it.
    """

    preset: str = _option("network: pft, pft_light, light, base or large", "light")
    scale: int = _option("factor: 2, 3 or 4", 2)
    hr: Path = _option("folder of HR images", Path())
    out: Path = _option("folder of the run; one that holds a run is gone on with", Path())
    lr: Path | None = _option("folder of LR images under the same names (default: made by MATLAB's bicubic)")
    names: Path | None = _option("text file with the names of the images to take (default: all)")
    val_hr: Path | None = _option("folder of HR images to validate on (default: no validation)")
    val_lr: Path | None = _option("folder of their LR images (default: made by MATLAB's bicubic)")
    init: Path | None = _option("weights to start from, of this or another scale (default: new weights)")
    iterations: int = _option("optimiser steps (default: 500000, or 250000 with --init)", 0)
    minutes: float = _option("end, and let the schedule end, after so many minutes if that is sooner", math.inf)
    batch: int = _option("patches of a step, over all processes (default: 16 light, 32 others)", 0)
    patch: int = _option("side of an LR patch in pixels", 64)
    rate: float = _option("learning rate (default: 5e-4 light from scratch, else 2e-4)", 0.0)
    weight_decay: float = _option("of AdamW; the paper has 0, 1e-4 is worth a try", 0.0)
    schedule: str = _option(f"of the learning rate: {', '.join(SCHEDULES)}", "multistep")
    warmup: float = _option("part of the run in which the rate grows from 0", WARMUP)
    clip: float = _option("largest norm of the gradient", 1.0)
    ema: float = _option("decay of the averaged weights, which are those that count", 0.999)
    every: int = _option("steps between validations and saved states", 5_000)
    precision: str = _option(f"of the arithmetic: {', '.join(PRECISIONS)}", "no")
    seed: int = _option("of weights and patches", 0)

    def __post_init__(self) -> None:
        light, scratch = self.preset in LIGHT, self.init is None
        for name, published in (
            ("iterations", SCRATCH_ITERATIONS if scratch else FINETUNE_ITERATIONS),
            ("batch", LIGHT_BATCH if light else BATCH),
            ("rate", LIGHT_RATE if light and scratch else RATE),
        ):
            if not getattr(self, name):
                object.__setattr__(self, name, published)
        for name, allowed in (("schedule", SCHEDULES), ("precision", PRECISIONS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")
        for name in ("iterations", "minutes", "batch", "patch", "rate", "clip", "every"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be more than 0; got {getattr(self, name)!r}")
        for name in ("warmup", "ema", "weight_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and less than 1; got {getattr(self, name)!r}")

    @property
    def milestones(self) -> Sequence[float]:
        return SCRATCH_MILESTONES if self.init is None else FINETUNE_MILESTONES

    def rate_at(self, done: float) -> float:
        """Learning rate when `done` of the run is over, 0 to 1."""
        # 1) linear increase
        if done < self.warmup:
            return self.rate * done / self.warmup
        # 2) half a cosine
        if self.schedule == "cosine":
            return self.rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        # 3) halvings; a plateau's are made by its scheduler
        if self.schedule == "multistep":
            return self.rate * 0.5 ** sum(done >= milestone for milestone in self.milestones)
        return self.rate
