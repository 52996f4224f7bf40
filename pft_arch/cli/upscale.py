"""`pft-sr upscale`: which images, and where each is written; then one after the other."""

from __future__ import annotations

import argparse
import glob
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import (
    PROGRAM,
    Parser,
    UsageError,
    add_network_options,
    catalogue_text,
    open_model,
    pick_device,
    pick_dtype,
    whole_number,
)

if TYPE_CHECKING:
    from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

    from ..network import PFTSR


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
        choices=("png", "jpg", "webp", "tiff", "gif", "exr"),  # images.FORMATS, without importing it
        help="format of the files in OUT (default: that of each input); of a single file its name decides",
    )
    add_network_options(parser)
    parser.add_argument(
        "--overlap",
        type=whole_number,
        default=0,
        metavar="N",
        help="input pixels by which tiles overlap, so that no seam shows (default: 0, by the network's window)",
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    parser.set_defaults(run=run_upscale)


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
    from ..images import check_target, prepare_target, read_image, write_image
    from ..upscale import upscale

    prepare_target(job.target, overwrite=args.overwrite)
    picture = read_image(job.source)
    height, width, _ = picture.pixels.shape
    check_target(job.target, picture, width * model.config.scale, height * model.config.scale)
    pixels = upscale(picture.pixels[None], model, tile=args.tile, overlap=args.overlap, progress=progress)[0]
    write_image(replace(picture, pixels=pixels), job.target, overwrite=args.overwrite)


def tile_progress(bar: tqdm[Any], finished: int, weight: int) -> Callable[[int, int], None]:
    """A report of an image's tiles, as a part of the whole job's bar."""

    def progress(done: int, total: int) -> None:
        bar.set_postfix_str(f"tile {done}/{total}", refresh=False)
        bar.update(finished + weight * done / total - bar.n)

    return progress


def failure_text(job: Job, error: BaseException) -> str:
    from ..images import ImageError

    if isinstance(error, ImageError):  # names its file
        return str(error)
    return f"{job.source}: {error or 'not enough memory, try a smaller --tile'}"


# what goes where


def plan(inputs: list[str], output: str, *, format: str | None, recursive: bool) -> list[Job]:
    """All images and where each is written. Refuses what would be ambiguous or cost an input, before any work."""
    from ..images import FORMATS, SUFFIXES, read_size

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
    from ..images import SUFFIXES

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
