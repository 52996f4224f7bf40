"""`pft-sr upscale`: which images and videos, and where each is written; then one after the other."""

from __future__ import annotations

import argparse
import glob
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
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
from .manifest import NAME as MANIFEST
from .manifest import Manifest, identity
from .storage import exists_in, is_url, location, stored_names

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

    from ..images import Animation, Picture
    from ..network import PFTSR
    from ..target import Plan


STREAM_PIXELS = 10**8  # of the result: from here on an image goes through in bands

UPSCALE_EXAMPLES = f"""\
examples:
  {PROGRAM} upscale photo.jpg -o photo_x2.png --model light_x2
  {PROGRAM} upscale clip.mp4 -o clip_4k.mp4 --model light_x2 --target 3840x2160 --codec h265
  {PROGRAM} upscale holiday/ -o holiday_x2/ --model light_x2 --recursive --resume
  {PROGRAM} upscale a.png b.webp -o large/ --model light_x2 --format jpg

Colour profile, EXIF (turned upright) and resolution are kept. JPEG has no transparency: it is laid on white. A video
that was stopped goes on with the same command. docs/command_line.md tells what is kept of each kind of file.
"""


def add_upscale(commands: argparse._SubParsersAction[Parser]) -> None:
    text = "Enlarge images, animations, videos and folders of them."
    parser = commands.add_parser("upscale", help="enlarge images and videos", description=text)
    parser.closing = lambda: f"{UPSCALE_EXAMPLES}\n{catalogue_text()}"
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="IN",
        help="an image (PNG, JPEG, WebP, TIFF, GIF, EXR), a video (what FFmpeg reads), or a folder of them",
    )
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="OUT",
        help="the file to write, for one input; else a folder, made if need be, where files keep their names",
    )
    parser.add_argument("-r", "--recursive", action="store_true", help="go into sub-folders, and keep them in OUT")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist (never an input)")
    parser.add_argument("--skip-existing", action="store_true", help="leave out what has a file in OUT already")
    parser.add_argument(
        "--resume",
        action="store_true",
        help=f"note what is done in OUT/{MANIFEST}, and do what is not done there: new, changed, failed",
    )
    parser.add_argument(
        "--format",
        choices=("png", "jpg", "webp", "tiff", "gif", "exr"),  # images.FORMATS, without importing it
        help="format of the images in OUT (default: that of each input); of a single file its name decides",
    )
    parser.add_argument(
        "--target",
        type=target_size,
        default={},
        metavar="SIZE",
        help="size of the results: 3840x2160 (to fit inside; 0 for a free side), 300%%, or 12MP (megapixels) "
        "(default: the network's factor)",
    )
    parser.add_argument(
        "--codec",
        choices=("auto", "h264", "h265", "av1", "vp9", "ffv1", "prores"),  # video.CODECS, likewise
        default="auto",
        help="of videos (default: auto, H.264, or VP9 in .webm)",
    )
    parser.add_argument(
        "--quality",
        type=whole_number,
        metavar="N",
        help="of videos: constant rate factor, lower is better and larger (default: 16 for h264, 18 to 20 for others)",
    )
    add_network_options(parser)
    parser.add_argument(
        "--overlap",
        type=whole_number,
        default=0,
        metavar="N",
        help="input pixels by which tiles overlap, so that no seam shows (default: 0, by the network's window)",
    )
    parser.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="ray: images on all GPUs, or all CPUs, of a Ray cluster (RAY_ADDRESS) or of this machine; IN and OUT may "
        "be URLs then, such as s3://bucket/folder (default: local, one file after the other)",
    )
    parser.add_argument(
        "--worker-cpus",
        type=whole_number,
        default=1,
        metavar="N",
        help="with --engine ray: CPUs of each worker (default: 1)",
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    parser.set_defaults(run=run_upscale)


def target_size(text: str) -> dict[str, Any]:
    """3840x2160, 300% or 12MP, as arguments of `target.plan`."""
    if box := re.fullmatch(r"(\d+)x(\d+)", text):
        return {"mode": "fit inside", "width": int(box[1]), "height": int(box[2])}
    if share := re.fullmatch(r"([\d.]+)%", text):
        return {"mode": "factor", "factor": float(share[1]) / 100}
    if pixels := re.fullmatch(r"([\d.]+)MP", text, re.IGNORECASE):
        return {"mode": "megapixels", "megapixels": float(pixels[1])}
    raise argparse.ArgumentTypeError(f"{text} is no size; write it as 3840x2160, 300% or 12MP")


@dataclass(frozen=True)
class Job:
    """One file to enlarge."""

    source: Path
    target: Path
    weight: int  # pixels: its share of the progress bar
    is_video: bool


# Enlarges files (each with whether its target may be replaced), and tells of each what went wrong, or nothing.
Engine = Callable[[Iterable[tuple[Job, bool]], "Worker", "tqdm[Any]"], Iterator[tuple[Job, str]]]


def run_upscale(args: argparse.Namespace) -> int:
    allow_large_images()
    if args.engine == "local" and (urls := list(filter(is_url, [*args.inputs, args.output]))):
        raise UsageError(f"{urls[0]} is a URL, and needs --engine ray.")
    jobs = plan_jobs(args.inputs, args.output, format=args.format, recursive=args.recursive)
    if args.resume and _is_one_file(jobs, args.output):
        raise UsageError("--resume goes with a folder as OUT. A single video goes on without it.")
    if args.engine == "ray":
        from .on_ray import cluster, refuse

        refuse(args, jobs)
        with cluster(args) as (device, engine):
            return upscale_all(args, jobs, device, engine)
    return upscale_all(args, jobs, pick_device(args.device), one_by_one)


def allow_large_images() -> None:
    from PIL import Image

    from ..images import MAX_PIXELS

    Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # a million images are not fetched from strangers: large ones are meant


def upscale_all(args: argparse.Namespace, jobs: list[Job], device: torch.device, engine: Engine) -> int:
    import torch
    from tqdm import tqdm

    from ..files import digest
    from ..weights import resolve

    dtype = pick_dtype(args.precision, device)
    model = open_model(args.model, device if engine is one_by_one else torch.device("cpu"), dtype)
    common = {"weights_sha256": digest(resolve(args.model)), "settings": settings(args, str(dtype))}
    worker = Worker(model, args, common)
    manifest = Manifest(Path(args.output), worker.common) if args.resume else None
    exists = exists_in(location(args.output)) if args.skip_existing else None

    failures: list[str] = []
    with tqdm(
        total=sum(job.weight for job in jobs),
        bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
        dynamic_ncols=True,
        disable=args.quiet or not sys.stderr.isatty(),
    ) as bar:
        finished = 0

        def settle(job: Job, said: str, failure: str = "") -> None:
            nonlocal finished
            if failure:
                failures.append(failure)
                bar.write(f"{PROGRAM}: {failure}", file=sys.stderr)
            elif not args.quiet:
                bar.write(said, file=sys.stdout)
            finished += job.weight
            bar.update(finished - bar.n)

        def todo() -> Iterator[tuple[Job, bool]]:
            for number, job in enumerate(jobs, 1):
                bar.set_postfix_str("", refresh=False)  # the tile of the file before
                bar.set_description_str(f"{number}/{len(jobs)} {job.source.name}")
                if manifest and manifest.is_done(job.source, job.target):
                    settle(job, f"{job.source}: done already")
                elif exists and exists(job.target):
                    settle(job, f"{job.source}: {job.target} exists")
                else:
                    yield job, args.overwrite or (manifest is not None and manifest.made(job.target))

        for job, failure in engine(todo(), worker, bar):
            settle(job, f"{job.source} -> {job.target}", failure)
            if manifest:
                manifest.add(job.source, job.target, failure)

    if failures and len(jobs) > 1:
        print(f"{PROGRAM}: {len(failures)} of {len(jobs)} files failed:", *failures, sep="\n  ", file=sys.stderr)
    return 1 if failures else 0


def one_by_one(todo: Iterable[tuple[Job, bool]], worker: Worker, bar: tqdm[Any]) -> Iterator[tuple[Job, str]]:
    """The engine of one process."""
    for job, overwrite in todo:
        yield job, worker.attempt(job, overwrite, progress_of(bar, bar.n, job))


def settings(args: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """What a result depends on, beside its source and the weights."""
    from .. import __version__

    names = ("tile", "overlap", "format", "target", "codec", "quality")
    return {**{name: getattr(args, name) for name in names}, "precision": dtype, "version": __version__}


class Worker:
    """Enlarges one file after the other. Whatever can be refused is refused before the work begins."""

    def __init__(self, model: PFTSR, args: argparse.Namespace, common: dict[str, Any]) -> None:
        self.model = model
        self.args = args
        self.common = common

    def attempt(self, job: Job, overwrite: bool, progress: Callable[[int, int], None]) -> str:
        """Enlarge a file; returns what went wrong: it must not cost the others."""
        try:
            self.run(job, overwrite, progress)
        except (ValueError, RuntimeError, OSError, MemoryError) as error:
            return failure_text(job, error)
        return ""

    def run(self, job: Job, overwrite: bool, progress: Callable[[int, int], None]) -> None:
        from ..images import prepare_target, read_animation

        prepare_target(job.target, overwrite=overwrite)
        if job.is_video:
            self._video(job, progress)
        elif animation := read_animation(job.source):
            self._animation(job, animation, overwrite, progress)
        else:
            self._image(job, overwrite, progress)

    def size(self, size: tuple[int, int]) -> Plan:
        """The plan for pictures of a height and width."""
        from ..target import plan

        return plan(size, self.model.config.scale, **self.args.target)

    def _image(self, job: Job, overwrite: bool, progress: Callable[[int, int], None]) -> None:
        from ..images import check_target, read_image, read_size, write_bands, write_image
        from ..target import upscale_to

        width, height = read_size(job.source) or (1, 1)
        aim = self.size((height, width))
        large = aim.is_plain and aim.size[0] * aim.size[1] > STREAM_PIXELS
        picture = read_image(job.source, levels=large)
        height, width, _ = picture.pixels.shape
        aim = self.size((height, width))
        tall, wide = aim.size
        check_target(job.target, picture, wide, tall)
        tiles = {"tile": self.args.tile, "overlap": self.args.overlap, "progress": progress}
        if large and picture.depth != 32:
            bands = bands_of(picture, self.model, **tiles)
            write_bands(picture, bands, tall, wide, job.target, overwrite=overwrite)
        else:
            pixels = upscale_to(picture.pixels[None], self.model, aim, **tiles)[0]
            write_image(replace(picture, pixels=pixels), job.target, overwrite=overwrite)

    def _animation(self, job: Job, animation: Animation, overwrite: bool, progress: Callable[[int, int], None]) -> None:
        from ..images import read_frames, write_frames
        from ..target import upscale_to

        def larger() -> Iterator[Picture]:
            for number, frame in enumerate(read_frames(job.source), 1):
                height, width, _ = frame.pixels.shape
                aim = self.size((height, width))
                pixels = upscale_to(
                    frame.pixels[None], self.model, aim, tile=self.args.tile, overlap=self.args.overlap
                )[0]
                yield replace(frame, pixels=pixels)
                progress(number, len(animation.durations))

        write_frames(larger(), animation, job.target, overwrite=overwrite)

    def _video(self, job: Job, progress: Callable[[int, int], None]) -> None:
        from ..video import upscale_video

        args = self.args
        upscale_video(
            job.source,
            job.target,
            self.model,
            tile=args.tile,
            overlap=args.overlap,
            codec=args.codec,
            quality=args.quality,
            size=self.size,
            resume=json.dumps({"source": str(job.source.resolve()), **identity(job.source), **self.common}),
            progress=progress,
        )


def bands_of(picture: Picture, model: PFTSR, progress: Callable[[int, int], None], **tiles: Any) -> Iterator[Tensor]:
    """A picture of whole levels, enlarged from the top down, never whole in floating point."""
    import torch

    from ..upscale import upscale_bands

    values, top = picture.pixels, 2**picture.depth - 1
    height, width, channels = values.shape

    def plane(first: int, last: int, **report: Any) -> Iterator[Tensor]:
        def read(rows: slice, columns: slice) -> Tensor:
            return values[rows, columns, first:last].float() / top

        return upscale_bands(read, (height, width, last - first), model, **tiles, **report)

    if channels < 4:
        return plane(0, channels, progress=progress)
    colours, stored = plane(0, 3, progress=progress), values[..., 3:].numpy()
    if stored.min() == stored.max():  # one opacity everywhere, as most have, needs no network
        level = float(stored.max()) / top
        return (torch.cat((band, torch.full_like(band[..., :1], level)), dim=2) for band in colours)
    alpha = plane(3, 4)
    return (torch.cat(parts, dim=2) for parts in zip(colours, alpha, strict=True))


def progress_of(bar: tqdm[Any], finished: int, job: Job) -> Callable[[int, int], None]:
    """A report of a file's tiles or frames, as a part of the whole job's bar."""
    what = "frame" if job.is_video else "tile"

    def progress(done: int, total: int) -> None:
        bar.set_postfix_str(f"{what} {done}/{total}", refresh=False)
        bar.update(finished + job.weight * done / total - bar.n)

    return progress


def failure_text(job: Job, error: BaseException) -> str:
    from ..images import ImageError
    from ..video import VideoError

    if isinstance(error, ImageError | VideoError):  # names its file
        return str(error)
    return f"{job.source}: {error or 'not enough memory, try a smaller --tile'}"


# what goes where


def plan_jobs(inputs: list[str], output: str, *, format: str | None, recursive: bool) -> list[Job]:
    """All files and where each is written. Refuses what would be ambiguous or cost an input, before any work."""
    from ..images import FORMATS, SUFFIXES
    from ..video import CONTAINERS, READ_SUFFIXES

    paths = [path for text in inputs for path in _matches(text)]
    out, written = location(output), (*SUFFIXES, *CONTAINERS)
    if len(paths) == 1 and not paths[0].is_dir() and _names_a_file(output, written):
        if format and SUFFIXES.get(out.suffix.lower()) != FORMATS[format]:
            raise UsageError(f"OUT is {out}, but --format says {format}. Leave one of them out.")
        targets = {paths[0]: out}
        if paths[0].suffix.lower() in READ_SUFFIXES and out.suffix.lower() not in CONTAINERS:
            raise UsageError(f"{paths[0]} is a video, and OUT, {out}, is none. End it in {', '.join(CONTAINERS)}.")
        if paths[0].suffix.lower() in SUFFIXES and out.suffix.lower() not in SUFFIXES:
            raise UsageError(f"{paths[0]} is an image, and OUT, {out}, is none. End it in {', '.join(SUFFIXES)}.")
    else:
        if out.is_file() or (_names_a_file(output, written) and out.suffix.lower() in written):
            raise UsageError(f"OUT is the name of a file ({out}), and IN needs a folder. End it in / if it is one.")
        targets = {
            source: out / _target_name(name, format).as_posix()
            for path in paths
            for source, name in _files(path, out, recursive, (*SUFFIXES, *READ_SUFFIXES))
        }
    _refuse_clashes(targets)
    return [_job(source, target) for source, target in targets.items()]


def _target_name(name: Path, format: str | None) -> Path:
    """A file's name in OUT: its own, unless told, or unless it is one of the containers that are read only."""
    from ..images import FORMATS
    from ..video import CONTAINERS, READ_SUFFIXES

    suffix = name.suffix.lower()
    if suffix in READ_SUFFIXES:
        return name if suffix in CONTAINERS else name.with_suffix(".mp4" if suffix == ".m4v" else ".mkv")
    return name.with_suffix(FORMATS[format].suffixes[0]) if format else name


def _job(source: Path, target: Path) -> Job:
    from .. import images, video

    if is_url(source):
        return Job(source, target, 1, is_video=target.suffix.lower() in video.CONTAINERS)
    if target.suffix.lower() in video.CONTAINERS:
        width, height, frames = video.read_size(source) or (1, 1, 1)
        return Job(source, target, width * height * frames, is_video=True)
    width, height = images.read_size(source) or (1, 1)
    return Job(source, target, width * height, is_video=False)


def _is_one_file(jobs: list[Job], output: str) -> bool:
    return len(jobs) == 1 and jobs[0].target == location(output)


def _matches(text: str) -> list[Path]:
    """The path, or the files of a pattern where the shell has left one as it is, as on Windows."""
    path = location(text)
    return [path] if path.exists() else [Path(match) for match in sorted(glob.glob(text))] or [path]


def _names_a_file(output: str, suffixes: tuple[str, ...]) -> bool:
    """Whether OUT is meant as a file: it looks like one, and is no folder."""
    path = location(output)
    if path.is_dir() or output.endswith(("/", os.sep)):
        return False
    if path.suffix[1:].isalpha() and path.suffix.lower() not in suffixes:
        raise UsageError(
            f"cannot write {path.suffix} files ({path}). The name must end in one of {', '.join(suffixes)}, "
            "or in / for a folder."
        )
    return path.suffix.lower() in suffixes


def _files(path: Path, out: Path, recursive: bool, suffixes: tuple[str, ...]) -> Iterator[tuple[Path, Path]]:
    """The images and videos that an IN stands for, each with its name inside OUT."""
    if not path.is_dir():
        yield path, Path(path.name)
        return
    names = stored_names(path, out, recursive) if is_url(path) else _names(path, out, recursive)
    # Hidden files are no pictures (macOS writes "._name.png").
    found = [n for n in names if n.suffix.lower() in suffixes and not any(part[0] == "." for part in n.parts)]
    if not found:
        hint = "" if recursive else " --recursive looks into its sub-folders."
        raise UsageError(f"{path} holds no image and no video ({', '.join(suffixes)}).{hint}")
    yield from ((path / name.as_posix(), name) for name in found)


def _names(path: Path, out: Path, recursive: bool) -> Iterator[Path]:
    """The files in a folder, by their names inside it."""
    for folder, folders, files in os.walk(path):
        # The last run's results are no input.
        folders[:] = sorted(f for f in folders if recursive and f[0] != "." and not _same(Path(folder, f), out))
        yield from (Path(folder, name).relative_to(path) for name in sorted(files))


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
