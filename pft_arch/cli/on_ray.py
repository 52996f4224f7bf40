"""`pft-sr upscale --engine ray`: many images on all GPUs, or CPUs, of a Ray cluster.

Each actor of a Ray Data pool holds the network and takes one image after the other. Ray starts a lost actor again and
repeats its image. What is done twice, because an actor was lost before it could tell, leaves the same file.
"""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import CommandError, UsageError
from .storage import download, exists_in, is_url, location, upload

if TYPE_CHECKING:
    import torch
    from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

    from .upscale import Engine, Job, Worker

Work = Callable[[str, str], str]  # from a path or URL to another; returns what went wrong

ATTEMPTS = 3  # at an image whose worker is lost
CHUNK = 10_000  # images that Ray is given at once: each is a block of its own
OBJECT_STORE_BYTES = 10**8  # of a Ray started here: names and the network pass through it


def refuse(args: argparse.Namespace, jobs: list[Job]) -> None:
    """What only the local engine does."""
    for job in jobs:
        if job.is_video:
            raise UsageError(f"{job.source} is a video, and --engine ray is for images. Run it without --engine.")
    if args.resume and any(map(is_url, [*args.inputs, args.output])):
        raise UsageError("--resume is for files on disks. --skip-existing works with URLs too.")
    if not args.worker_cpus:
        raise UsageError("--worker-cpus must be 1 at least.")
    if args.device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--engine ray takes no --device {args.device}, but auto, cpu, or cuda for all GPUs.")


@contextmanager
def cluster(args: argparse.Namespace) -> Iterator[tuple[torch.device, Engine]]:
    """The Ray cluster that RAY_ADDRESS names, or one on this machine: the device of its workers, and the engine."""
    import torch

    run = secrets.token_hex(4)
    folders: set[Path] = set()
    try:
        with _connected() as ray:
            gpus = args.device == "cuda" or (args.device == "auto" and "GPU" in ray.cluster_resources())
            device = torch.device("cuda" if gpus else "cpu")

            def engine(todo: Iterable[tuple[Job, bool]], worker: Worker, bar: tqdm[Any]) -> Iterator[tuple[Job, str]]:
                # Looked for here and now: a worker could not tell what was there before from what a lost one has left.
                exists = exists_in(location(args.output))
                jobs = []
                for job, overwrite in todo:
                    if not overwrite and exists(job.target):
                        yield job, f"{job.target}: exists already. Allow overwriting, or write elsewhere."
                    else:
                        jobs.append(job)
                folders.update(job.target.resolve().parent for job in jobs if not is_url(job.target))
                bar.set_description_str("ray")
                sides = [(_full(job.source), _full(job.target)) for job in jobs]
                open_work = Opener(worker, device, run)
                for number, error in run_on(ray, sides, open_work, gpus=gpus, cpus_per_worker=args.worker_cpus):
                    yield jobs[number], error

            yield device, engine
    finally:
        for folder in folders:
            for part in folder.glob(f".pft-{run}*.part"):  # of workers that were killed
                part.unlink(missing_ok=True)


def run_on(
    ray: Any, files: Sequence[tuple[str, str]], open_work: Callable[[], Work], *, gpus: bool, cpus_per_worker: int
) -> Iterator[tuple[int, str]]:
    """Work on all files, one actor for each GPU, or else for every `cpus_per_worker` CPUs, of a cluster.

    Returns, for each file and in any order: its number, and what went wrong.

    Raises:
        CommandError: there is no place for an actor, `open_work` fails, or Ray does.
    """
    has = ray.cluster_resources()
    places = int(has.get("CPU", 0)) // cpus_per_worker
    if gpus:
        places = min(places, int(has.get("GPU", 0)))
    if not places:
        wanted = f"{cpus_per_worker} CPUs" + (" and a GPU" if gpus else "")
        raise CommandError(f"no place for a worker: it needs {wanted}, and Ray has {dict(has)}.")
    for start in range(0, len(files), CHUNK):
        chunk = dict(enumerate(files[start : start + CHUNK], start))
        rows = [{"number": number, "source": source, "target": target} for number, (source, target) in chunk.items()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Ray will want the last two arguments by another way from 2.64 on
            done = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
                _Actor,
                fn_constructor_args=(open_work,),
                batch_size=None,
                # Not more than one in flight: a file that kills workers would take the next one along.
                compute=ray.data.ActorPoolStrategy(size=min(places, len(rows)), max_tasks_in_flight_per_actor=1),
                num_cpus=cpus_per_worker,
                num_gpus=int(gpus),
                max_restarts=-1,
                max_task_retries=ATTEMPTS - 1,
            )
        try:
            for row in done.iter_rows():
                del chunk[row["number"]]
                yield row["number"], row["error"]
        except ray.exceptions.RayError as error:
            raise CommandError(f"Ray gave up: {error}") from error
        for number, (source, _) in chunk.items():
            yield number, f"{source}: {ATTEMPTS} workers were lost over it. A smaller --tile needs less memory."


class _Actor:
    """What Ray Data gives blocks of files to."""

    def __init__(self, open_work: Callable[[], Work]) -> None:
        self.work = open_work()

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        sides = zip(rows["source"].tolist(), rows["target"].tolist(), strict=True)
        return {"number": rows["number"], "error": [self.work(source, target) for source, target in sides]}


class Opener:
    """Called in an actor: puts the network on its device, and gives what it does with a file."""

    def __init__(self, worker: Worker, device: torch.device, run: str) -> None:
        self.worker, self.device, self.run = worker, device, run

    def __call__(self) -> Work:
        from .. import files
        from .upscale import allow_large_images

        allow_large_images()
        files.run = self.run
        self.worker.model.to(self.device)
        return self.work

    def work(self, source: str, target: str) -> str:
        """By way of a local folder where the source or the target is in a storage."""
        from .upscale import Job

        with tempfile.TemporaryDirectory(prefix="pft-sr-") as folder:
            job = Job(_near(source, folder, "in"), _near(target, folder, "out"), weight=1, is_video=False)
            try:
                if is_url(source):
                    download(source, job.source)
                failure = self.worker.attempt(job, overwrite=True, progress=lambda done, total: None)
                if is_url(target) and not failure:
                    upload(job.target, target)
            except Exception as error:  # each storage has its own
                failure = f"{source} -> {target}: {error or type(error).__name__}"
            return failure.replace(str(job.source), source).replace(str(job.target), target)


def _near(place: str, folder: str, side: str) -> Path:
    return Path(folder, side, place.rpartition("/")[2]) if is_url(place) else Path(place)


def _full(path: Path) -> str:
    return str(path if is_url(path) else path.absolute())


@contextmanager
def _connected() -> Iterator[Any]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise CommandError(f"Ray is not installed ({error}). Install it: pip install 'pft-sr[ray]'") from error
    started = not ray.is_initialized()
    if started:
        before = signal.getsignal(signal.SIGTERM)
        here = {"address": "local", "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
        try:
            ray.init(logging_level="error", log_to_driver=False, **({} if os.environ.get("RAY_ADDRESS") else here))
        except Exception as error:  # it raises just that where a part of it does not come up
            raise CommandError(f"Ray cannot be started or reached: {error}") from error
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray puts its own there
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = -1  # a file that cost its workers must not cost the others
    context.max_consecutive_actor_init_deaths = ATTEMPTS - 1  # a worker may be lost while it starts, too
    context.execution_no_progress_timeout_s = -1  # one large image may take an hour
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # it tells of every lost actor by a traceback
    try:
        yield ray
    finally:
        if started:
            ray.shutdown()
