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

try:
    import av

    from test_video import make as make_video
    from test_video import sounds, times
except ImportError:  # the tests of videos are left out
    pass

ROOT = Path(__file__).parent.parent
cli_upscale = importlib.import_module("pft_arch.cli.upscale")
pytestmark = pytest.mark.usefixtures("one_thread")
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


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


@pytest.mark.parametrize(
    ("target", "expected"),
    [("30x0", (30, 20)), ("10x10", (10, 7)), ("300%", (27, 18)), ("0.0054MP", (90, 60)), ("50%", (4, 3))],
)
def test_a_target_size(run, target, expected):
    make("in.png", size=(9, 6))
    assert run("in.png", "-o", "out.png", "--target", target)[0] == 0
    assert size("out.png") == expected


def test_sixteen_bits_of_colour_arrive_in_the_result(run):
    pytest.importorskip("imagecodecs")
    images.write_image(images.Picture(torch.rand(5, 6, 3), depth=16), "in.png")
    assert run("in.png", "-o", "out.png")[0] == 0
    assert images.read_image("out.png").depth == 16


def test_an_animation_stays_one(run):
    frames = [Image.fromarray(np.full((6, 8, 3), level, np.uint8)) for level in (0, 90, 250)]
    frames[0].save("in.gif", save_all=True, append_images=frames[1:], duration=[100, 200, 300], loop=0)
    assert run("in.gif", "-o", "out/", "--format", "webp")[0] == 0
    animation = images.read_animation("out/in.webp")
    assert (animation.durations, animation.plays, size("out/in.webp")) == ([100, 200, 300], 0, (16, 12))
    code, _, err = run("in.gif", "-o", "out.jpg")
    assert code == 1 and "JPEG holds one picture" in err
    assert files() == ["in.gif", "out/in.webp"]


# ---------------------------------------------------------------------------------- going on


def manifest(folder: str = "out") -> list[tuple[str, str]]:
    lines = Path(folder, "pft-sr.jsonl").read_text("utf-8").splitlines()
    return [(line["target"], line["status"]) for line in map(json.loads, lines)]


def test_what_exists_is_skipped_when_told(run):
    make("in/a.png")
    make("in/b.png")
    Path("out").mkdir()
    Path("out/a.png").write_text("precious")
    code, out, _ = run("in", "-o", "out", "--skip-existing")
    assert (code, out.splitlines()[0]) == (0, f"{Path('in/a.png')}: {Path('out/a.png')} exists")
    assert Path("out/a.png").read_text() == "precious"
    assert size("out/b.png") == (18, 14)


def test_a_job_goes_on_with_what_is_new_changed_or_failed(run, model):
    for name in ("in/a.png", "in/b.png", "in/sub/ü.png"):
        make(name)
    Path("in/bad.png").write_text("no image")
    args = ("in", "-o", "out", "-r", "--resume")
    assert run(*args)[0] == 1
    done = [("a.png", "done"), ("b.png", "done"), ("bad.png", "failed"), ("sub/ü.png", "done")]
    assert manifest() == done
    line = json.loads(Path("out/pft-sr.jsonl").read_text("utf-8").splitlines()[0])
    assert line["source"] == str(Path("in/a.png")) and len(line["weights_sha256"]) == 64

    code, out, _ = run(*args)
    assert code == 1  # tries what failed again, and nothing else
    assert manifest() == [*done, ("bad.png", "failed")]
    assert out.count("done already") == 3

    make("in/bad.png")
    make("in/c.png")
    make("in/b.png", size=(4, 4))
    assert run(*args)[0] == 0
    assert manifest()[5:] == [("b.png", "done"), ("bad.png", "done"), ("c.png", "done")]
    assert size("out/b.png") == (8, 8)

    Path("out/a.png").unlink()
    assert run(*args)[0] == 0
    assert manifest()[8:] == [("a.png", "done")]
    assert run(*args, "--tile", "8")[0] == 0  # other settings: all again
    assert len(manifest()) == 9 + 5


def test_a_manifest_that_a_crash_cut_off_costs_its_last_line_only(run):
    make("in/a.png")
    make("in/b.png")
    args = ("in", "-o", "out", "--resume")
    assert run(*args)[0] == 0
    path = Path("out/pft-sr.jsonl")
    path.write_bytes(path.read_bytes()[:-40])
    Path("out/b.png").unlink()
    assert run(*args)[0] == 0
    assert size("out/b.png") == (18, 14)
    assert run(*args)[1].count("done already") == 2


def test_a_file_that_is_not_ours_is_kept_when_going_on(run):
    make("in/a.png")
    make("out/a.png")
    before = Path("out/a.png").read_bytes()
    code, _, err = run("in", "-o", "out", "--resume")
    assert code == 1 and "exists already" in err
    assert Path("out/a.png").read_bytes() == before


# ---------------------------------------------------------------------------------- large images


@pytest.mark.parametrize("name", ["in.png", "in.tiff"])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "opaque"])
def test_a_large_image_gives_the_same_file_in_bands(run, monkeypatch, name, mode):
    pytest.importorskip("tifffile")
    make(name, size=(45, 60), mode="RGB" if mode == "opaque" else mode, dpi=(300, 300))
    if mode == "opaque":
        Image.open(name).convert("RGBA").save(name, dpi=(300, 300))
    tiles = ("--tile", "16", "--overlap", "4")
    assert run(name, "-o", f"whole_{name}", *tiles)[0] == 0
    monkeypatch.setattr(cli_upscale, "STREAM_PIXELS", 100)
    assert run(name, "-o", f"bands_{name}", *tiles)[0] == 0
    whole, bands = images.read_image(f"whole_{name}"), images.read_image(f"bands_{name}")
    assert whole.pixels.shape == (120, 90, 4 if mode == "opaque" else len(mode))
    assert (whole.pixels - bands.pixels).abs().max() <= 1 / 255  # a rounding at most, where alpha is taken apart
    assert [round(x) for x in bands.dpi] == [300, 300]


@pytest.mark.skipif(sys.platform == "win32", reason="no ru_maxrss there")
def test_a_large_image_needs_no_floating_point_copy_of_it(tmp_path):
    """40 megapixels of result: 480 MB in floating point, beside 120 MB of the image itself."""
    Image.new("RGB", (4000, 2500), (90, 30, 200)).save(tmp_path / "in.png")
    code = (
        "import resource, sys, torch\n"
        "from pft_arch import cli, PFTSR\n"
        "from pft_arch.cli import upscale\n"
        "from pft_arch.weights import save_model\n"
        "torch.set_num_threads(1)\n"
        "class Nearest(torch.nn.Module):\n"
        "    def forward(self, x): return x.repeat_interleave(2, 2).repeat_interleave(2, 3)\n"
        "PFTSR.forward = Nearest.forward\n"
        "layers = dict(embed_dim=4, num_blocks=(1,), num_heads=1, window_size=4, upsampler='pixelshuffledirect')\n"
        "save_model(PFTSR(scale=2, **layers), sys.argv[1] + '/m.safetensors')\n"
        "upscale.STREAM_PIXELS = 10**7\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "where = sys.argv[1]\n"
        "args = ['upscale', where + '/in.png', '-o', where + '/out.png', '-m', where + '/m.safetensors']\n"
        "assert cli.main([*args, '--device', 'cpu', '--tile', '256', '-q']) == 0\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 400_000  # KB: the image in 8 bits, three times for a moment, and two bands of 50 MB
    with Image.open(tmp_path / "out.png") as image:
        assert image.size == (8000, 5000)
        assert image.crop((0, 4000, 8000, 4001)).getcolors() == [(8000, (90, 30, 200))]


def test_images_larger_than_is_sensible_are_refused(run, monkeypatch):
    make("in.png", size=(50, 50))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # put back afterwards
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    code, _, err = run("in.png", "-o", "out.png")
    assert code == 1 and "larger than is sensible" in err


# ---------------------------------------------------------------------------------- videos


def video(path: str | Path, frames: int = 12, size: tuple[int, int] = (32, 24)) -> None:
    make_video(Path(path), frames=frames, size=size, audio=("aac",), times=[3600 * n + n % 3 for n in range(frames)])


def test_a_video_to_a_file_and_in_a_folder(run):
    pytest.importorskip("av")
    Path("in/sub").mkdir(parents=True)
    video("in/clip.mp4")
    make_video(Path("in/sub/old.avi"), codec="mpeg4", frames=3)
    make("in/a.png")
    assert run("in/clip.mp4", "-o", "big.mov", "--codec", "h264", "--quality", "20")[0] == 0
    assert run("in", "-o", "out", "-r", "--target", "100%")[0] == 0
    assert files("out") == ["a.png", "clip.mp4", "sub/old.mkv"]
    for name, size in (("big.mov", (64, 48)), ("out/clip.mp4", (32, 24))):
        with av.open(name) as file:
            assert (file.streams.video[0].width, file.streams.video[0].height) == size
        assert (times(name), sounds(name)) == (times("in/clip.mp4"), sounds("in/clip.mp4"))


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ("clip.mp4 -o out.png", "is a video, and OUT, out.png, is none"),
        ("a.png -o out.mp4", "is an image, and OUT, out.mp4, is none"),
        ("clip.mp4 -o big.mp4 --resume", "A single video goes on without it"),
        ("clip.mp4 -o big.mp4 --codec gif", "invalid choice"),
        ("a.png -o big.png --target huge", "huge is no size"),
    ],
)
def test_wrong_usage_with_videos(run, args, reason):
    make("a.png")
    Path("clip.mp4").touch()
    code, _, err = run(*args.split())
    assert code == 2 and reason in err


def test_bad_videos_fail_alone(run):
    pytest.importorskip("av")
    Path("in").mkdir()
    Path("in/bad.mp4").write_text("no video")
    video("in/good.mp4", frames=2)
    code, _, err = run("in", "-o", "out")
    assert code == 1 and "bad.mp4: Invalid data" in err
    assert files("out") == ["good.mp4"]
    assert run("in/good.mp4", "-o", "out/good.mp4")[0] == 1  # exists already


@pytest.mark.skipif(sys.platform == "win32", reason="no such signal there")
def test_a_video_killed_in_the_middle_goes_on_to_the_same_file(tmp_path, monkeypatch, model):
    pytest.importorskip("av")
    video(tmp_path / "in.mp4", frames=40)
    code = (
        "import os, sys\n"
        "from pft_arch import cli, video\n"
        "video.SEGMENT_FRAMES, left, store = 5, int(sys.argv[2]), video._store\n"
        "def stopped(*args):\n"
        "    global left\n"
        "    left -= 1\n"
        "    if not left: os.kill(os.getpid(), int(sys.argv[1]))\n"
        "    store(*args)\n"
        "video._store = stopped\n"
        "video.CODECS['h264'].options['x264-params'] = 'mbtree=0'\n"  # as in test_video's short segments
        "sys.exit(cli.main(['upscale', *sys.argv[3:], '--device', 'cpu']))\n"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    job = [str(tmp_path / "in.mp4"), "-o", str(tmp_path / "out.mp4"), "-m", model]
    # six times a segment something is stored: after each frame, and at its end
    for number, times_stored, segments, code_of_exit in (
        (signal.SIGKILL, 9, 1, -signal.SIGKILL),
        (signal.SIGTERM, 15, 3, 143),
    ):
        line = [sys.executable, "-c", code, str(int(number)), str(times_stored), *job]
        done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == code_of_exit, done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "out.mp4").exists()
        assert len(list((tmp_path / ".out.mp4.pft-work").glob("*.packets"))) == segments
    module = importlib.import_module("pft_arch.video")
    monkeypatch.setattr(module, "SEGMENT_FRAMES", 5)
    monkeypatch.setitem(module.CODECS["h264"].options, "x264-params", "mbtree=0")
    for name in ("out.mp4", "whole.mp4"):
        source, target = str(tmp_path / "in.mp4"), str(tmp_path / name)
        assert main(["upscale", source, "-o", target, "-m", model, "--device", "cpu", "-q"]) == 0
    assert (tmp_path / "out.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    assert times(tmp_path / "out.mp4") == times(tmp_path / "in.mp4")
    assert files(tmp_path) == ["in.mp4", "out.mp4", "whole.mp4"]


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
        ("empty -o out", "holds no image and no video"),
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
    summary = err[err.index("3 of 5 files failed:") :]
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

    monkeypatch.setattr(importlib.import_module("pft_arch.target"), "upscale_to", work)
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
        [sys.executable, *args], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False, **options
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
@pytest.mark.parametrize(("stop", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_in_mid_job_leaves_whole_files_only(tmp_path, model, stop, exit_code):
    for number in range(200):
        make(tmp_path / "in" / f"{number:03}.png", size=(64, 64))
    args = ["-m", "pft_arch", "upscale", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--model", model]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, *args], cwd=ROOT, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    ) as job:
        deadline = time.monotonic() + 300
        while not (tmp_path / "out" / "001.png").exists():
            assert job.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        job.send_signal(stop)
        _, err = job.communicate(timeout=60)
    assert job.returncode == exit_code
    assert b"interrupted" in err
    assert b"Traceback" not in err
    written = files(tmp_path / "out")
    assert 2 <= len(written) < 200
    assert {size(tmp_path / "out" / name) for name in written} == {(128, 128)}
