"""`--engine ray`: a real local cluster of two workers, which get killed; and files in a storage."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from pft_arch.cli import main
from pft_arch.cli.common import open_model
from pft_arch.cli.on_ray import Opener, Work, run_on
from pft_arch.cli.storage import download, exists_in, location, upload
from pft_arch.cli.upscale import Worker, plan_jobs
from pft_arch.network import PFTSR
from pft_arch.weights import save_model

ray = pytest.importorskip("ray")
fsspec = pytest.importorskip("fsspec")


@pytest.fixture(scope="module")
def two_workers(one_thread: None) -> Iterator[None]:
    """A cluster with room for two workers, each of one thread, as the tests are then."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # on a busy machine too it must get on
        ray.init("local", num_cpus=2, object_store_memory=100_000_000, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("models") / "tiny.safetensors"
    save_model(PFTSR(scale=2, embed_dim=12, num_blocks=(2, 2), num_heads=2, window_size=8), path)
    return str(path)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of twelve small images in a tree, and a file that is none."""
    folder = tmp_path / "in"
    random = np.random.default_rng(0)
    for number in range(12):
        path = folder / ("sub" if number % 4 == 0 else ".") / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (160 + number, 200, 3), dtype=np.uint8)).save(path)
    (folder / "broken.png").write_bytes(b"no image")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def kill_a_worker(out: Path, killed: list[int]) -> None:
    """Kill a process of this test's own cluster that is at work, once there is a result."""
    while not killed:
        time.sleep(0.02)
        if any((out / "sub").glob("0[48].png")) or any(out.glob("*.png")):
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    if process.name().startswith("ray::MapWorker") and ".submit" in "".join(process.cmdline()):
                        process.send_signal(signal.SIGKILL)
                        killed.append(process.pid)
                        return


def test_a_killed_worker_costs_nothing(
    two_workers: None, pictures: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    alone, out = pictures.parent / "alone", pictures.parent / "out"
    arguments = ["upscale", str(pictures), "-r", "--model", model, "--device", "cpu"]
    # A process of its own, after one that has left the kernels compiled, as workers find them: in the process that
    # compiles them, numba's can differ in their last bits.
    for folder in (alone.with_name("compiling"), alone):
        done = subprocess.run([sys.executable, "-m", "pft_arch", *arguments, "-o", str(folder)], check=False)
        assert done.returncode == 1
    (out / "sub").mkdir(parents=True)
    (out / "sub" / "00.png").write_bytes(b"was there before")
    (out / f".pft-{'0' * 24}.part").write_bytes(b"of another run")
    capsys.readouterr()

    killed: list[int] = []
    killer = threading.Thread(target=kill_a_worker, args=(out, killed), daemon=True)
    killer.start()
    code = main([*arguments, "-o", str(out), "--engine", "ray", "--resume"])
    killer.join(10)
    told = capsys.readouterr()

    assert killed
    files = contents(out)
    manifest = files.pop("pft-sr.jsonl").decode().splitlines()
    expected = contents(alone) | {"sub/00.png": b"was there before", f".pft-{'0' * 24}.part": b"of another run"}
    assert files == expected  # every picture, once, with the bytes of the one process; and nothing else
    assert code == 1 and told.out.count(" -> ") == 11
    assert "2 of 13 files failed" in told.err and "broken.png: is not" in told.err
    assert "00.png: exists already" in told.err
    assert len(manifest) == 13 and sum('"status": "done"' in line for line in manifest) == 11


def test_a_file_that_costs_every_worker_its_life_is_named_and_the_others_are_done(
    two_workers: None, tmp_path: Path
) -> None:
    def open_work() -> Work:
        def work(source: str, target: str) -> str:
            if source == "deadly":
                os.kill(os.getpid(), signal.SIGKILL)
            Path(target).write_text(source)
            return "is odd" if source == "odd" else ""

        return work

    files = [(name, str(tmp_path / name)) for name in ("a", "b", "deadly", "odd", "c")]
    ray.data.DataContext.get_current().max_errored_blocks = -1
    errors = dict(run_on(ray, files, open_work, gpus=False, cpus_per_worker=1))
    assert errors.pop(2).startswith("deadly: 3 workers were lost over it")
    assert errors == {0: "", 1: "", 3: "is odd", 4: ""}
    assert sorted(contents(tmp_path)) == ["a", "b", "c", "odd"]


def test_no_place_for_a_worker_is_said(
    two_workers: None, pictures: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["upscale", str(pictures / "01.png"), "-o", str(pictures / "out.png"), "--model", model]
    assert main([*arguments, "--engine", "ray", "--worker-cpus", "64"]) == 1
    assert "no place for a worker: it needs 64 CPUs" in capsys.readouterr().err


# ---------------------------------------------------------------------------------- without a cluster


def test_without_ray_the_way_to_get_it_is_told(
    pictures: Path, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    arguments = ["upscale", str(pictures / "01.png"), "-o", str(pictures / "out.png"), "--model", model]
    assert main([*arguments, "--engine", "ray"]) == 1
    assert "pip install 'pft-sr[ray]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["memory://in/a.png", "-o", "out.png"], "memory://in/a.png is a URL, and needs --engine ray"),
        (["clip.mp4", "-o", "big.mp4", "--engine", "ray"], "clip.mp4 is a video, and --engine ray is for images"),
        (["a.png", "-o", "memory://out/", "--engine", "ray", "--resume"], "--resume is for files on disks"),
        (["a.png", "-o", "b.png", "--engine", "ray", "--device", "cuda:1"], "takes no --device cuda:1"),
        (["a.png", "-o", "nosuch://out/", "--engine", "ray"], "nosuch://out/: "),
    ],
)
def test_what_an_engine_does_not_do_is_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["upscale", *arguments, "--model", "light_x2"]) == 2
    assert said in capsys.readouterr().err


@pytest.fixture
def storage() -> Iterator[object]:
    """What is at memory:// URLs, which has transactions as s3 and gs have them."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    yield memory
    memory.store.clear()


def test_names_in_a_storage(storage) -> None:
    for name in ("in/b.png", "in/a.JPG", "in/sub/c.png", "in/sub/.d.png", "in/notes.txt", "in/out/a.JPG", "out/b.png"):
        storage.pipe_file(f"/{name}", b"")

    def planned(source: str, out: str, recursive: bool) -> dict[str, str]:
        jobs = plan_jobs([source], out, format=None, recursive=recursive)
        return {str(job.source).removeprefix("memory:/"): str(job.target) for job in jobs}

    assert planned("memory://in", "memory://out", False) == {
        "/in/a.JPG": "memory://out/a.JPG",
        "/in/b.png": "memory://out/b.png",
    }
    assert planned("memory://in", "memory://in/out/", True) == {
        "/in/a.JPG": "memory://in/out/a.JPG",
        "/in/b.png": "memory://in/out/b.png",
        "/in/sub/c.png": "memory://in/out/sub/c.png",
    }
    assert planned("memory://in/b.png", "one.png", False) == {"/in/b.png": "one.png"}
    exists = exists_in(location("memory://out"))
    assert [exists(location(f"memory://out/{name}")) for name in ("a.JPG", "b.png")] == [False, True]


def test_from_storage_to_storage(storage, pictures: Path, model: str) -> None:
    def named(name: str) -> str:
        return f"memory://in/{name}"

    storage.put_file(str(pictures / "01.png"), "/in/01.png")
    storage.put_file(str(pictures / "broken.png"), "/in/broken.png")
    args = argparse.Namespace(tile=0, overlap=0, target={})
    worker = Worker(open_model(model, torch.device("cpu"), torch.float32), args, {})
    work = Opener(worker, torch.device("cpu"), "run")()
    assert work(named("01.png"), "memory://out/new/01.png") == ""
    local = pictures.parent / "local.png"
    assert work(str(pictures / "01.png"), str(local)) == ""
    assert storage.cat_file("/out/new/01.png") == local.read_bytes()
    assert work(named("broken.png"), "memory://out/broken.png").startswith("memory://in/broken.png: is not")
    assert "memory://in/none.png -> " in work(named("none.png"), "memory://out/none.png")
    assert storage.find("/out") == ["/out/new/01.png"]


def test_an_upload_that_fails_leaves_what_was_there(storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.pipe_file("/folder/picture.png", b"old")
    (tmp_path / "new").write_bytes(b"new")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfileobj", lambda source, target: target.write(b"n") and 1 / 0)
        with pytest.raises(ZeroDivisionError):
            upload(tmp_path / "new", "memory://folder/picture.png")
    assert storage.cat_file("/folder/picture.png") == b"old"
    upload(tmp_path / "new", "memory://folder/picture.png")
    download("memory://folder/picture.png", tmp_path / "copy" / "back")
    assert (tmp_path / "copy" / "back").read_bytes() == b"new"
