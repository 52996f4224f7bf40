"""The command line: what it writes, what it refuses, and the exit codes that scripts rely on."""

from __future__ import annotations

import importlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from pft_arch import images
from pft_arch.cli import main
from pft_arch.cli.common import default_dtype
from pft_arch.network import PFTSR
from pft_arch.weights import CATALOGUE, save_model

ROOT = Path(__file__).parent.parent
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Threads that wait for each other are most of the time of so small a network."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A weights file of a network that doubles images in no time."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("models") / "tiny.safetensors"
    save_model(PFTSR(scale=2, embed_dim=12, num_blocks=(2,), num_heads=2, window_size=4), path)
    return str(path)


@pytest.fixture
def run(tmp_path, monkeypatch, model, capsys):
    """Runs `pft-sr upscale` with the tiny network in the test's folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run_upscale(*args: str) -> tuple[int, str, str]:
        code = main(["upscale", "--model", model, "--device", "cpu", *args])
        return code, *capsys.readouterr()

    return run_upscale


def make(path: str | Path, size: tuple[int, int] = (9, 7), mode: str = "RGB", **options: object) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], len(mode)), dtype=np.uint8)
    Image.fromarray(values.squeeze()).save(path, **options)


def size(path: str | Path) -> tuple[int, int]:
    with Image.open(path) as image:
        image.load()
        return image.size


def files(folder: str | Path = ".") -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file())


# ---------------------------------------------------------------------------------- what is written where


def test_one_image_to_one_file(run):
    make("in.png")
    code, out, err = run("in.png", "-o", "out.png")
    assert (code, out, err) == (0, "in.png -> out.png\n", "")
    assert size("out.png") == (18, 14)


def test_one_image_into_a_folder_that_is_made(run):
    make("in.png")
    assert run("in.png", "-o", "new/folder")[0] == 0
    assert files("new") == ["folder/in.png"]


@pytest.mark.parametrize("out", ["v1.2", "large.png/"])
def test_a_folder_may_have_a_dot_in_its_name(run, out):
    make("in.png")
    assert run("in.png", "-o", out)[0] == 0
    assert files(out) == ["in.png"]


def test_a_folder_gives_its_images_and_nothing_else(run):
    for name in ("in/b.jpg", "in/a.png", "in/sub/c.png", "in/._a.png"):
        make(name)
    Path("in/notes.txt").touch()
    code, out, _ = run("in", "-o", "out")
    assert (code, out.splitlines()) == (
        0,
        [f"{Path('in/a.png')} -> {Path('out/a.png')}", f"{Path('in/b.jpg')} -> {Path('out/b.jpg')}"],
    )
    assert files("out") == ["a.png", "b.jpg"]


def test_recursion_keeps_the_sub_folders(run):
    for name in ("in/a.png", "in/x/a.png", "in/x/y/Ä ö.webp"):
        make(name)
    assert run("in", "-o", "out", "--recursive")[0] == 0
    assert files("out") == ["a.png", "x/a.png", "x/y/Ä ö.webp"]


def test_results_inside_the_input_folder_are_not_enlarged_again(run):
    make("a.png")
    assert run(".", "-o", "out", "-r")[0] == 0
    assert run(".", "-o", "out", "-r", "--overwrite")[0] == 0
    assert files() == ["a.png", "out/a.png"]
    assert size("out/a.png") == (18, 14)


def test_several_inputs_with_spaces_other_scripts_and_a_pattern(run):
    make("写真/été 1.png")
    make("写真/été 2.png")
    make("b b.jpg")
    assert run("写真/*.png", "b b.jpg", "-o", "große Bilder")[0] == 0
    assert files("große Bilder") == ["b b.jpg", "été 1.png", "été 2.png"]


def test_format_names_all_files_in_out(run):
    make("a.png")
    make("b.JPG")
    assert run("a.png", "b.JPG", "-o", "out", "--format", "webp")[0] == 0
    assert files("out") == ["a.webp", "b.webp"]
    assert Image.open("out/b.webp").format == "WEBP"


def test_the_formats_offered_are_those_that_can_be_written(run):
    make("a.png")
    for name in images.FORMATS:
        assert run("a.png", "-o", f"{name}/", "--format", name)[0] == (1 if name == "exr" else 0)  # holds light only
    assert run("a.png", "-o", "x/", "--format", "bmp")[0] == 2


def test_transparency_profile_and_grey_arrive_in_the_result(run):
    make("rgba.png", mode="RGBA", icc_profile=SRGB)
    make("grey.png", mode="L")
    assert run("rgba.png", "grey.png", "-o", "out")[0] == 0
    with Image.open("out/rgba.png") as image:
        assert (image.mode, image.size, image.info["icc_profile"]) == ("RGBA", (18, 14), SRGB)
    with Image.open("out/grey.png") as image:
        assert (image.mode, image.size) == ("L", (18, 14))


def test_tiles_give_the_size_of_the_whole(run):
    make("in.png", size=(40, 25))
    assert run("in.png", "-o", "out.png", "--tile", "16", "--overlap", "4")[0] == 0
    assert size("out.png") == (80, 50)


# ---------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ("a.png -o", "expected one argument"),
        ("a.png", "required: -o"),
        ("a.png -o out.bmp", "cannot write .bmp"),
        ("a.png b.png -o out.png", "name of a file"),
        ("a.png b.png -o notes", "name of a file"),
        ("in -o out.png", "name of a file"),
        ("empty -o out", "holds no image"),
        ("a.png -o out.png --format jpg", "--format says jpg"),
        ("a.png -o out.png --tile -1", "-1 is negative"),
        ("a.png -o out.png --tile many", "invalid"),
        ("a.png -o out.png --device none", "device none cannot be used"),
        ("a.png -o out.png --device cuda:99", "device cuda:99 cannot be used"),
        ("a.png a.jpg -o out --format png", "would both be written"),
        ("a.png in/a.png -o out", "would both be written"),
        ("a.png in/A.png -o out", "would both be written"),
        ("a.png -o a.png --overwrite", "is an input"),
        ("in -o in --overwrite", "is an input"),
    ],
)
def test_wrong_usage_is_exit_code_2_before_any_work(run, args, reason):
    for name in ("a.png", "a.jpg", "b.png", "in/a.png", "in/A.png" if "A" in args else "in/c.png"):
        make(name)
    Path("notes").touch()
    Path("empty").mkdir()
    before = {name: Path(name).read_bytes() for name in files()}
    code, out, err = run(*args.split())
    assert (code, out) == (2, "")
    assert reason in err
    assert {name: Path(name).read_bytes() for name in files()} == before


def test_what_exists_is_kept_and_the_others_are_done(run):
    make("in/a.png")
    make("in/b.png")
    Path("out").mkdir()
    Path("out/a.png").write_text("precious")
    code, _, err = run("in", "-o", "out")
    assert code == 1
    assert "exists already" in err
    assert Path("out/a.png").read_text() == "precious"
    assert size("out/b.png") == (18, 14)
    assert run("in", "-o", "out", "--overwrite")[0] == 0
    assert size("out/a.png") == (18, 14)


def test_bad_files_are_listed_and_the_others_are_done(run):
    for name in ("in/a.png", "in/b.jpg", "in/c.png"):
        make(name, size=(64, 64))
    Path("in/b.jpg").write_bytes(Path("in/b.jpg").read_bytes()[:900])
    Path("in/d.png").write_text("no image")
    code, out, err = run("in", "missing.png", "-o", "out")
    assert code == 1
    assert len(out.splitlines()) == 2
    summary = err[err.index("3 of 5 images failed:") :]
    for name, reason in (("b.jpg", "damaged or incomplete"), ("d.png", "not a PNG"), ("missing.png", "no such file")):
        assert any(name in line and reason in line for line in summary.splitlines())
    assert files("out") == ["a.png", "c.png"]


@pytest.mark.parametrize("fault", ["a file for a folder", "disk full", "too large for the format"])
def test_a_result_that_cannot_be_written_leaves_nothing_behind(run, monkeypatch, fault):
    make("in.png")
    target = "out/in.png"
    if fault == "a file for a folder":
        Path("out").touch()
        target, reason = "out/sub/in.png", "cannot be written here"
    elif fault == "disk full":

        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(images.os, "fsync", full)
        reason = "the disk is full"
    else:
        make("in.png", size=(8200, 1))
        target, reason = "out/in.webp", "Use PNG or TIFF"
    code, out, err = run("in.png", "-o", target)
    assert (code, out) == (1, "")
    assert reason in err
    assert set(files()) <= {"in.png", "out"}


@pytest.mark.parametrize("fault", ["exists", "damaged", "too large for the format"])
def test_what_can_be_refused_is_refused_before_the_long_work(run, monkeypatch, fault):
    make("in.png", size=(8200, 1) if fault == "too large for the format" else (9, 7))
    if fault == "exists":
        Path("out.webp").touch()
    if fault == "damaged":
        Path("in.png").write_bytes(Path("in.png").read_bytes()[:-60])

    def work(*_: object, **__: object) -> None:
        raise AssertionError("began to work")

    monkeypatch.setattr(importlib.import_module("pft_arch.upscale"), "upscale", work)
    assert run("in.png", "-o", "out.webp")[0] == 1


@pytest.mark.parametrize("command", [["upscale", "a.png", "-o", "b.png", "--model"], ["info"]])
def test_an_unknown_model_is_an_error_that_names_the_known_ones(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    make("a.png")
    assert main([*command, "light_x9"]) == 1
    err = capsys.readouterr().err
    assert "light_x9" in err
    assert all(name in err for name in CATALOGUE)
    assert files() == ["a.png"]


# ---------------------------------------------------------------------------------- what is said


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_shows_file_tile_and_the_whole_job(run, monkeypatch):
    make("in/a.png", size=(40, 25))
    make("in/b.png", size=(40, 25))
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert run("in", "-o", "out", "--tile", "16")[0] == 0
    shown = sys.stderr.getvalue()
    assert "1/2 a.png" in shown
    assert "2/2 b.png 100%" in shown
    assert ", tile " in shown


def test_quiet_says_nothing_but_errors(run, monkeypatch):
    make("a.png")
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert run("a.png", "missing.png", "-o", "out", "--quiet")[:2] == (1, "")
    assert sys.stderr.getvalue().count("missing.png: no such file") == 2  # when it happens, and at the end


def test_half_precision_only_where_it_is_fast():
    assert default_dtype(torch.device("cuda:1")) is torch.float16
    assert default_dtype(torch.device("cpu")) is torch.float32
    assert default_dtype(torch.device("mps")) is torch.float32


def test_info_describes_a_file_for_people_and_programs(model, capsys):
    assert main(["info", model]) == 0
    assert "scale" in capsys.readouterr().out
    assert main(["info", model, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


def test_help_teaches(capsys):
    assert main(["upscale", "--help"]) == 0
    out = capsys.readouterr().out
    assert "examples:" in out
    assert all(name in out for name in CATALOGUE)
    assert main([]) == 2


# ---------------------------------------------------------------------------------- as a program of its own


def program(*args: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *args], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False, **options
    )


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_the_program_answers(option):
    done = program("-m", "pft_arch", option)
    assert done.returncode == 0
    assert done.stdout.startswith(("usage: pft-sr", "pft-sr "))


def test_a_name_that_the_terminal_cannot_show_costs_nothing(tmp_path, model):
    make(tmp_path / "写真.png")
    done = program(
        *("-m", "pft_arch", "upscale", str(tmp_path / "写真.png"), "-o", str(tmp_path / "out"), "--model", model),
        env={**os.environ, "PYTHONIOENCODING": "ascii:strict", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "\\u5199\\u771f.png" in done.stdout
    assert files(tmp_path / "out") == ["写真.png"]


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C cannot be sent to one process there")
def test_an_interrupt_in_mid_job_leaves_whole_files_only(tmp_path, model):
    for number in range(200):
        make(tmp_path / "in" / f"{number:03}.png", size=(64, 64))
    args = ["-m", "pft_arch", "upscale", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--model", model]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, *args], cwd=ROOT, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    ) as job:
        deadline = time.monotonic() + 60
        while not (tmp_path / "out" / "001.png").exists():
            assert job.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        job.send_signal(signal.SIGINT)
        _, err = job.communicate(timeout=60)
    assert job.returncode == 130
    assert b"interrupted" in err
    assert b"Traceback" not in err
    written = files(tmp_path / "out")
    assert 2 <= len(written) < 200
    assert {size(tmp_path / "out" / name) for name in written} == {(128, 128)}
