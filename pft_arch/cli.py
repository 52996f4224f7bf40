"""The command line, `pft-sr`.

One function per command adds its parser and names the function that runs it; `COMMANDS` lists them. Whatever is slow
to import (torch, Pillow) is imported by the functions that run, so that `pft-sr --help` answers at once.

Exit codes: 0 done, 1 something failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

    from .config import PFTConfig
    from .network import PFTSR

PROGRAM = "pft-sr"


class CommandError(Exception):
    """Ends a command with this message and exit code 1."""

    code = 1


class UsageError(CommandError):
    """The same for what was asked for, with exit code 2."""

    code = 2


class Parser(argparse.ArgumentParser):
    """A parser that keeps the lines of its help, whose end is made only when somebody asks for it."""

    closing: Callable[[], str] | None = None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)

    def format_help(self) -> str:
        if self.closing:
            self.epilog = self.closing()
        return super().format_help()


def main(argv: list[str] | None = None) -> int:
    """Run a command line; returns its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name that the terminal cannot show
    parser = Parser(prog=PROGRAM, description="Enlarge images with PFT-SR.", epilog=f"{PROGRAM} COMMAND --help: more")
    parser.add_argument("--version", action=Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add_command in COMMANDS:
        add_command(commands)
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:  # argparse has printed the help or what is wrong
        return stop.code if isinstance(stop.code, int) else 2
    try:
        return args.run(args)
    except CommandError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print(f"\n{PROGRAM}: interrupted. What was finished is kept, and no half file is left.", file=sys.stderr)
        return 130


class Version(argparse.Action):
    """Prints the version, and looks it up only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from . import __version__

        print(f"{PROGRAM} {__version__}")
        parser.exit()


# ------------------------------------------------------------------------------------------------- upscale

UPSCALE_EXAMPLES = f"""\
examples:
  {PROGRAM} upscale photo.jpg -o photo_x2.png --model light_x2
  {PROGRAM} upscale holiday/ -o holiday_x2/ --model light_x2 --recursive
  {PROGRAM} upscale a.png b.webp -o large/ --model light_x2 --format jpg
  {PROGRAM} upscale photo.jpg -o photo_x4.png --model my_weights.safetensors --tile 256

Colour profile, EXIF (turned upright) and resolution are kept. JPEG has no transparency: it is laid on white.
"""


def add_upscale(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser("upscale", help="enlarge images", description="Enlarge images and folders of images.")
    parser.closing = lambda: f"{UPSCALE_EXAMPLES}\n{catalogue_text()}"
    parser.add_argument("inputs", nargs="+", metavar="IN", help="an image (PNG, JPEG, WebP, TIFF) or a folder of them")
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="OUT",
        help="the file to write, for one image; else a folder, made if need be, where images keep their names",
    )
    parser.add_argument("-r", "--recursive", action="store_true", help="go into sub-folders, and keep them in OUT")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist (never an input)")
    parser.add_argument(
        "--format",
        choices=("png", "jpg", "webp", "tiff"),  # images.FORMATS, without importing it
        help="format of the files in OUT (default: that of each input); of a single file its name decides",
    )
    _add_network_options(parser)
    parser.add_argument(
        "--overlap",
        type=_whole_number,
        default=0,
        metavar="N",
        help="input pixels by which tiles overlap, so that no seam shows (default: 0, by the network's window)",
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    parser.set_defaults(run=run_upscale)


def _add_network_options(parser: Parser) -> None:
    """Which network, and how it is run."""
    parser.add_argument(
        "-m",
        "--model",
        required=True,
        help="a variant of the list below, a weights file (.safetensors, .pth), or hf://user/repo[@revision]/file",
    )
    parser.add_argument(
        "--tile",
        type=_whole_number,
        default=0,
        metavar="N",
        help="side of the parts an image is worked on in, in input pixels; smaller needs less memory "
        "(default: 0, as free memory allows)",
    )
    parser.add_argument(
        "--device", default="auto", help="auto (default: GPU where there is one), cpu, cuda, mps, cuda:1, ..."
    )
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="of the arithmetic: half is faster on GPUs (default: auto, fp16 on CUDA and fp32 elsewhere)",
    )


def _whole_number(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return number


@dataclass(frozen=True)
class Job:
    """One image to enlarge."""

    source: Path
    target: Path
    weight: int  # pixels: its share of the progress bar


def run_upscale(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    jobs = plan(args.inputs, args.output, format=args.format, recursive=args.recursive)
    device = pick_device(args.device)
    model = open_model(args.model, device, pick_dtype(args.precision, device))

    failures: list[str] = []
    with tqdm(
        total=sum(job.weight for job in jobs),
        bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
        dynamic_ncols=True,
        disable=args.quiet or not sys.stderr.isatty(),
    ) as bar:
        finished = 0
        for number, job in enumerate(jobs, 1):
            bar.set_postfix_str("", refresh=False)  # the tile of the image before
            bar.set_description_str(f"{number}/{len(jobs)} {job.source.name}")
            try:
                upscale_file(job, model, args, tile_progress(bar, finished, job.weight))
                if not args.quiet:
                    bar.write(f"{job.source} -> {job.target}", file=sys.stdout)
            except (ValueError, RuntimeError, OSError, MemoryError) as error:  # one bad file must not cost the others
                failures.append(failure_text(job, error))
                bar.write(f"{PROGRAM}: {failures[-1]}", file=sys.stderr)
            finished += job.weight
            bar.update(finished - bar.n)

    if failures and len(jobs) > 1:
        print(f"{PROGRAM}: {len(failures)} of {len(jobs)} images failed:", *failures, sep="\n  ", file=sys.stderr)
    return 1 if failures else 0


def upscale_file(job: Job, model: PFTSR, args: argparse.Namespace, progress: Callable[[int, int], None]) -> None:
    """One image from file to file. Whatever can be refused is refused before the work begins."""
    from .images import check_size, prepare_target, read_image, write_image
    from .upscale import upscale

    prepare_target(job.target, overwrite=args.overwrite)
    picture = read_image(job.source)
    height, width, _ = picture.pixels.shape
    check_size(job.target, width * model.config.scale, height * model.config.scale)
    pixels = upscale(picture.pixels[None], model, tile=args.tile, overlap=args.overlap, progress=progress)[0]
    write_image(replace(picture, pixels=pixels), job.target, overwrite=args.overwrite)


def tile_progress(bar: tqdm[Any], finished: int, weight: int) -> Callable[[int, int], None]:
    """A report of an image's tiles, as a part of the whole job's bar."""

    def progress(done: int, total: int) -> None:
        bar.set_postfix_str(f"tile {done}/{total}", refresh=False)
        bar.update(finished + weight * done / total - bar.n)

    return progress


def failure_text(job: Job, error: BaseException) -> str:
    from .images import ImageError

    if isinstance(error, ImageError):  # names its file
        return str(error)
    return f"{job.source}: {error or 'not enough memory, try a smaller --tile'}"


# ------------------------------------------------------------------------------------------------- what goes where


def plan(inputs: list[str], output: str, *, format: str | None, recursive: bool) -> list[Job]:
    """All images and where each is written. Refuses what would be ambiguous or cost an input, before any work."""
    from .images import FORMATS, SUFFIXES, read_size

    paths = [path for text in inputs for path in _matches(text)]
    out = Path(output)
    if len(paths) == 1 and not paths[0].is_dir() and _names_a_file(output, SUFFIXES):
        if format and SUFFIXES.get(out.suffix.lower()) != FORMATS[format]:
            raise UsageError(f"OUT is {out}, but --format says {format}. Leave one of them out.")
        targets = {paths[0]: out}
    else:
        if out.is_file() or (_names_a_file(output, SUFFIXES) and out.suffix.lower() in SUFFIXES):
            raise UsageError(f"OUT is the name of a file ({out}), and IN needs a folder. End it in / if it is one.")
        suffix = FORMATS[format].suffixes[0] if format else None
        targets = {
            source: out / (name.with_suffix(suffix) if suffix else name)
            for path in paths
            for source, name in _images(path, out, recursive)
        }
    _refuse_clashes(targets)
    sizes = {source: read_size(source) or (1, 1) for source in targets}
    return [Job(source, target, sizes[source][0] * sizes[source][1]) for source, target in targets.items()]


def _matches(text: str) -> list[Path]:
    """The path, or the files of a pattern where the shell has left one as it is, as on Windows."""
    path = Path(text)
    return [path] if path.exists() else [Path(match) for match in sorted(glob.glob(text))] or [path]


def _names_a_file(output: str, suffixes: Mapping[str, object]) -> bool:
    """Whether OUT is meant as a file: it looks like one, and is no folder."""
    path = Path(output)
    if path.is_dir() or output.endswith(("/", os.sep)):
        return False
    if path.suffix[1:].isalpha() and path.suffix.lower() not in suffixes:
        raise UsageError(
            f"cannot write {path.suffix} files ({path}). The name must end in one of {', '.join(suffixes)}, "
            "or in / for a folder."
        )
    return path.suffix.lower() in suffixes


def _images(path: Path, out: Path, recursive: bool) -> Iterator[tuple[Path, Path]]:
    """The images that an IN stands for, each with its name inside OUT."""
    from .images import SUFFIXES

    if not path.is_dir():
        yield path, Path(path.name)
        return
    found = False
    for folder, folders, files in os.walk(path):
        # Hidden files are no pictures (macOS writes "._name.png"), and the last run's results are no input.
        folders[:] = sorted(f for f in folders if recursive and f[0] != "." and not _same(Path(folder, f), out))
        for name in sorted(files):
            if name[0] != "." and Path(name).suffix.lower() in SUFFIXES:
                found = True
                yield Path(folder, name), Path(folder, name).relative_to(path)
    if not found:
        hint = "" if recursive else " --recursive looks into its sub-folders."
        raise UsageError(f"{path} holds no image ({', '.join(SUFFIXES)}).{hint}")


def _same(a: Path, b: Path) -> bool:
    return b.exists() and a.samefile(b)


def _refuse_clashes(targets: dict[Path, Path]) -> None:
    # Compared without case: on Windows and macOS names that differ only in case are one file.
    sources = {str(source.resolve()).casefold() for source in targets}
    taken: dict[str, Path] = {}
    for source, target in targets.items():
        if str(target.resolve()).casefold() in sources:
            raise UsageError(f"{target} is an input, and would be overwritten. Choose another OUT.")
        first = taken.setdefault(str(target).casefold(), source)
        if first != source:
            raise UsageError(f"{first} and {source} would both be written to {target}. Rename one, or run them apart.")


# ------------------------------------------------------------------------------------------------- device, precision


def pick_device(name: str) -> torch.device:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device {name} cannot be used here ({reason}). Try --device auto or cpu.") from error
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    import torch

    if name == "auto":
        return default_dtype(device)
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def default_dtype(device: torch.device) -> torch.dtype:
    """The precision that is fastest on a device without a cost that shows."""
    import torch

    return torch.float16 if device.type == "cuda" else torch.float32


def open_model(model: str, device: torch.device, dtype: torch.dtype) -> PFTSR:
    from .weights import WeightsError, load_model, resolve

    try:
        return load_model(resolve(model), device=device, dtype=dtype)
    except WeightsError as error:
        raise CommandError(str(error)) from error


# ------------------------------------------------------------------------------------------------- evaluate

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
    parser.add_argument("--scale", type=_whole_number, metavar="S", help="refuse a model of another scale")
    parser.add_argument("--ensemble", action="store_true", help="average 8 turned and mirrored runs (8 times as long)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results, and how they were made, here too")
    _add_network_options(parser)
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

    from .evaluate import evaluate, format_table, to_json
    from .weights import resolve

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
        facts = {"file": weights.name, "sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}
        try:
            args.json.write_text(json.dumps({"model": facts, **to_json(evaluation)}, indent=2) + "\n", "utf-8")
        except OSError as error:
            raise CommandError(f"{args.json}: not written ({error.strerror}).") from error
    return 0


# ------------------------------------------------------------------------------------------------- train

TRAIN_EXAMPLES = f"""\
examples:
  {PROGRAM} train --preset light --scale 2 --hr images/ --out runs/light_x2 --val-hr Set5/HR --val-lr Set5/LRbicx2
  {PROGRAM} train --preset light --scale 3 --hr images/ --out runs/light_x3 --init runs/light_x2/best.safetensors
  accelerate launch -m pft_arch train --hr images/ --out runs/light_x2      (several GPUs or machines)

A run that was stopped, by whatever, goes on with the same command. Its folder holds best.safetensors and
last.safetensors (for {PROGRAM} upscale --model), log.csv, strips/ (LR | SR | HR of the validation images), state-N.
"""


def add_train(commands: argparse._SubParsersAction[Parser]) -> None:
    from .recipe import Recipe

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
    from .recipe import Recipe

    try:
        recipe = Recipe(**{option.name: getattr(args, option.name) for option in fields(Recipe)})
    except ValueError as error:
        raise UsageError(str(error)) from error
    for folder in (recipe.hr, recipe.lr, recipe.val_hr, recipe.val_lr):
        if folder and not folder.is_dir():
            raise UsageError(f"{folder}: no such folder.")
    try:
        from .train import train
    except ImportError as error:
        raise CommandError(f"training needs more packages ({error}): pip install 'pft-sr[train]'") from error
    try:
        print(train(recipe))
    except ValueError as error:  # images, or weights to start from; each names the file
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(f"{recipe.out}: {error}. The state saved before is whole; free space and go on.") from error
    return 0


# ------------------------------------------------------------------------------------------------- convert

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
    from .convert import convert
    from .weights import WeightsError

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
    from .config import PFTConfig

    try:
        return PFTConfig.from_dict(json.loads(text if text.lstrip().startswith("{") else Path(text).read_bytes()))
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise UsageError(f"--config {text}: not a network's arguments ({error})") from error


# ------------------------------------------------------------------------------------------------- publish

PUBLISH_EXAMPLES = f"""\
examples:
  {PROGRAM} publish --repo user/pft pft_x2.safetensors pft_x4.safetensors --licence apache-2.0
  {PROGRAM} publish --repo user/mine mine.safetensors --private --evaluation set5.json

Give all the files that the repo is to hold. A token that may write comes from HF_TOKEN or `hf auth login`.
"""


def add_publish(commands: argparse._SubParsersAction[Parser]) -> None:
    text = "Put weights into a repo on the Hugging Face Hub, with model card, configuration and checksums."
    parser = commands.add_parser("publish", help="put weights on the Hugging Face Hub", description=text)
    parser.closing = lambda: PUBLISH_EXAMPLES
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a .safetensors file")
    parser.add_argument("--repo", required=True, metavar="USER/NAME", help="the repo; made if it does not exist")
    parser.add_argument("--licence", default="", help="as the Hub names it (default: what the files say)")
    parser.add_argument("--private", action="store_true", help="if the repo is made, make it private")
    parser.add_argument(
        "--evaluation",
        action="append",
        default=[],
        type=Path,
        metavar="JSON",
        help=f"what `{PROGRAM} evaluate --json` wrote, for the model card; more than once if need be",
    )
    parser.set_defaults(run=run_publish)


def run_publish(args: argparse.Namespace) -> int:
    from .publish import publish
    from .weights import WeightsError

    try:
        done = publish(args.repo, args.files, licence=args.licence, private=args.private, evaluations=args.evaluation)
    except WeightsError as error:
        raise CommandError(str(error)) from error
    print(f"{done.url}\n\nFor catalogue.toml in the model folder:\n\n{done.toml()}")
    return 0


# ------------------------------------------------------------------------------------------------- info


def add_info(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser("info", help="say what a weights file is", description="Say what a weights file is.")
    parser.closing = catalogue_text
    parser.add_argument("model", metavar="FILE", help="a weights file, a variant, or hf://user/repo[@revision]/file")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.set_defaults(run=run_info)


def run_info(args: argparse.Namespace) -> int:
    from .weights import WeightsError, describe, resolve

    try:
        facts = describe(resolve(args.model))
    except WeightsError as error:
        raise CommandError(str(error)) from error
    print(json.dumps(facts, indent=2, default=str) if args.json else "\n".join(_lines(facts)))
    return 0


def _lines(facts: Mapping[str, object], indent: str = "") -> Iterator[str]:
    """Facts, one a line; a fact that holds others has them below it."""
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        if isinstance(value, Mapping) and value:
            yield f"{indent}{name}:"
            yield from _lines(value, indent + "  ")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
            yield f"{indent}{name:{width}}  {'-' if text in (None, '', {}) else text}"


def catalogue_text() -> str:
    """The variants, as the help lists them."""
    from .catalogue import catalogue
    from .hub import has_repo

    variants = catalogue()
    width = max(map(len, variants), default=0)
    lines = ["variants:"]
    for name, variant in variants.items():
        hub = "downloaded on first use" if has_repo(variant) else "from its authors, choose it to read how"
        where = "comes with this version" if variant.source == "bundled" else hub
        lines.append(f"  {name:{width}}  enlarges {variant.scale} times, {where}")
    return "\n".join(lines)


COMMANDS = (add_upscale, add_evaluate, add_train, add_convert, add_publish, add_info)

if __name__ == "__main__":
    sys.exit(main())
