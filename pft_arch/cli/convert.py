"""`pft-sr convert`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from .common import PROGRAM, CommandError, Parser, UsageError

if TYPE_CHECKING:
    from ..config import PFTConfig


CONVERT_EXAMPLES = f"""\
examples:
  {PROGRAM} convert 003_PFT_SRx4_finetune.pth pft_x4.safetensors
  {PROGRAM} convert pft_x4.safetensors pft_x4_half.safetensors --fp16
  {PROGRAM} convert runs/mine/net_g_latest.pth mine.safetensors --config network.json
  {PROGRAM} convert mine.safetensors mine.pth         (for the published code: params_ema)

IN may be a checkpoint of a training framework: of several sets of weights the averaged one is taken. No code in it is
run. A small picture is enlarged with both files before OUT gets its name, and has to come out equal to the last bit.
"""


def add_convert(commands: argparse._SubParsersAction[Parser]) -> None:
    text = "Turn a .pth or a training checkpoint into a .safetensors file that loads anywhere, or back into a .pth."
    parser = commands.add_parser("convert", help="turn a .pth into .safetensors, or back", description=text)
    parser.closing = lambda: CONVERT_EXAMPLES
    parser.add_argument("input", metavar="IN", help="a weights file (.safetensors, .pth, .ckpt, ...), or a variant")
    parser.add_argument("output", type=Path, metavar="OUT", help="the file to write, .safetensors or .pth")
    parser.add_argument("--fp16", action="store_true", help="store 16-bit numbers: half the size, and its cost is told")
    config = parser.add_mutually_exclusive_group()
    config.add_argument("--preset", metavar="NAME", help="the preset that IN was trained with, where it does not tell")
    config.add_argument(
        "--config",
        metavar="JSON",
        help="its network arguments, published names or ours: a JSON file, or the JSON itself",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists (never IN)")
    parser.set_defaults(run=run_convert)


def run_convert(args: argparse.Namespace) -> int:
    from ..convert import convert
    from ..weights import WeightsError

    config = _read_config(args.config) if args.config else args.preset
    try:
        done = convert(args.input, args.output, config=config, half=args.fp16, overwrite=args.overwrite)
    except WeightsError as error:
        raise CommandError(str(error)) from error
    print(f"{args.input} -> {done.path}\nsha256 {done.sha256}")
    if args.fp16:
        print(f"16 bits: {done.psnr:.1f} dB from the result in 32 bits, on a small test picture")
    return 0


def _read_config(text: str) -> PFTConfig:
    from ..config import PFTConfig

    try:
        return PFTConfig.from_dict(json.loads(text if text.lstrip().startswith("{") else Path(text).read_bytes()))
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise UsageError(f"--config {text}: not a network's arguments ({error})") from error
