"""`pft-sr train`: every number of a recipe is an option."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from .common import PROGRAM, CommandError, Parser, UsageError

TRAIN_EXAMPLES = f"""\
examples:
  {PROGRAM} train --preset light --scale 2 --hr images/ --out runs/light_x2 --val-hr Set5/HR --val-lr Set5/LRbicx2
  {PROGRAM} train --preset light --scale 3 --hr images/ --out runs/light_x3 --init runs/light_x2/best.safetensors
  accelerate launch -m pft_arch train --hr images/ --out runs/light_x2      (several GPUs or machines)

A run that was stopped, by whatever, goes on with the same command. Its folder holds best.safetensors and
last.safetensors (for {PROGRAM} upscale --model), log.csv, strips/ (LR | SR | HR of the validation images), state-N.
"""


def add_train(commands: argparse._SubParsersAction[Parser]) -> None:
    from ..recipe import Recipe

    parser = commands.add_parser("train", help="train a network", description="Train a network on a folder of images.")
    parser.closing = lambda: TRAIN_EXAMPLES
    for option in fields(Recipe):
        text = str(option.metadata["help"])
        required = option.default == Path()
        if option.default and not required:
            text += f" (default: {option.default})"
        parser.add_argument(
            f"--{option.name.replace('_', '-')}",
            type=_RECIPE_TYPES[str(option.type).split(" | ")[0]],
            default=option.default,
            required=required,
            metavar=option.name.split("_")[-1].upper(),
            help=text,
        )
    parser.set_defaults(run=run_train)


_RECIPE_TYPES: dict[str, Callable[[str], object]] = {"str": str, "int": int, "float": float, "Path": Path}


def run_train(args: argparse.Namespace) -> int:
    from ..recipe import Recipe

    try:
        recipe = Recipe(**{option.name: getattr(args, option.name) for option in fields(Recipe)})
    except ValueError as error:
        raise UsageError(str(error)) from error
    for folder in (recipe.hr, recipe.lr, recipe.val_hr, recipe.val_lr):
        if folder and not folder.is_dir():
            raise UsageError(f"{folder}: no such folder.")
    try:
        from ..train import train
    except ImportError as error:
        raise CommandError(f"training needs more packages ({error}): pip install 'pft-sr[train]'") from error
    try:
        print(train(recipe))
    except ValueError as error:  # images, or weights to start from; each names the file
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(f"{recipe.out}: {error}. The state saved before is whole; free space and go on.") from error
    return 0
