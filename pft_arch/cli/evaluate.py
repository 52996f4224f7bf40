"""`pft-sr evaluate`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from .common import (
    PROGRAM,
    CommandError,
    Parser,
    UsageError,
    add_network_options,
    catalogue_text,
    open_model,
    pick_device,
    pick_dtype,
    whole_number,
)

EVALUATE_EXAMPLES = f"""\
examples:
  {PROGRAM} evaluate --model light_x2 --hr Set5/HR
  {PROGRAM} evaluate --model my_weights.safetensors --hr Set5/HR --lr Set5/LR_x4 --precision fp32 --json set5.json

As published code does: luma (BT.601) of 8-bit images without a border of as many pixels as the scale, HR cropped to a
multiple of it. Published figures are of whole images in fp32; the last line says what yours are of. Where memory is
scarce, images are tiled; a --tile as large as the largest image insists on whole ones.
"""


def add_evaluate(commands: argparse._SubParsersAction[Parser]) -> None:
    text = "PSNR and SSIM of a network on a folder of images, beside bicubic interpolation."
    parser = commands.add_parser("evaluate", help="measure a network on a folder of images", description=text)
    parser.closing = lambda: f"{EVALUATE_EXAMPLES}\n{catalogue_text()}"
    parser.add_argument("--hr", required=True, type=Path, metavar="DIR", help="the images that should come out")
    parser.add_argument(
        "--lr",
        type=Path,
        metavar="DIR",
        help="the images to enlarge, under the same names (default: made from --hr as MATLAB's bicubic does)",
    )
    parser.add_argument("--scale", type=whole_number, metavar="S", help="refuse a model of another scale")
    parser.add_argument("--ensemble", action="store_true", help="average 8 turned and mirrored runs (8 times as long)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results, and how they were made, here too")
    add_network_options(parser)
    parser.set_defaults(run=run_evaluate)


def run_evaluate(args: argparse.Namespace) -> int:
    for folder in (args.hr, args.lr, args.json and args.json.parent):
        if folder and not folder.is_dir():
            raise UsageError(f"{folder}: no such folder.")
    device = pick_device(args.device)
    model = open_model(args.model, device, pick_dtype(args.precision, device))
    if args.scale not in (None, model.config.scale):
        raise UsageError(f"{args.model} enlarges {model.config.scale} times, and --scale says {args.scale}.")

    from tqdm import tqdm

    from ..evaluate import evaluate, format_table, to_json
    from ..files import digest
    from ..weights import resolve

    with tqdm(unit="image", dynamic_ncols=True, disable=not sys.stderr.isatty()) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        try:
            evaluation = evaluate(model, args.hr, args.lr, tile=args.tile, ensemble=args.ensemble, progress=progress)
        except ValueError as error:
            raise CommandError(str(error)) from error
    print(format_table(evaluation))
    if args.json:
        weights = resolve(args.model)
        facts = {"file": weights.name, "sha256": digest(weights)}
        try:
            args.json.write_text(json.dumps({"model": facts, **to_json(evaluation)}, indent=2) + "\n", "utf-8")
        except OSError as error:
            raise CommandError(f"{args.json}: not written ({error.strerror}).") from error
    return 0
