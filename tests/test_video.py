"""Videos: the frames enlarged, and everything else of the file as it was."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from pft_arch import PFTSR, upscale, video
from pft_arch.target import plan
from pft_arch.video import CODECS, VideoError, pick_codec, upscale_video

av = pytest.importorskip("av")

ROOT = Path(__file__).parent.parent
RATE = 48000


@pytest.fixture(scope="module")
def model(one_thread: None) -> PFTSR:
    torch.manual_seed(0)
    return PFTSR(scale=2, embed_dim=8, num_blocks=(2,), num_heads=2, window_size=4).eval()


def drawing(number: int, width: int, height: int) -> np.ndarray:
    """(H, W, 3) a moving gradient with a bright upper left corner."""
    y, x = np.mgrid[:height, :width]
    values = np.stack([x * 3 + number * 2, y * 4 + number, (x + y) * 2], -1) % 200
    values[: height // 4, : width // 4] = 255
    return values.astype(np.uint8)


def make(
    path: Path,
    *,
    frames: int = 12,
    size: tuple[int, int] = (48, 32),
    codec: str = "libx264",
    pixels: str = "yuv420p",
    times: list[int] | None = None,
    base: Fraction = Fraction(1, 25),
    audio: tuple[str, ...] = (),
    rotation: int = 0,
    **context: object,
) -> Path:
    with av.open(str(path), "w") as out:
        out.metadata["title"] = "Ein Titel"
        stream = out.add_stream(codec, rate=25)
        c = stream.codec_context
        c.width, c.height, c.pix_fmt, c.time_base = *size, pixels, base
        if codec == "libx264":
            c.options = {"crf": "4"}
        for name, value in context.items():
            setattr(c, name, value)
        if rotation:
            stream.set_display_rotation(rotation)
        sounds = [out.add_stream(name, rate=RATE) for name in audio]
        for number, sound in enumerate(sounds):
            sound.metadata["language"] = ("eng", "fra")[number]
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(drawing(number, *size)).reformat(format=pixels)
            frame.pts, frame.time_base = times[number] if times else number, base
            out.mux(stream.encode(frame))
            samples = RATE // 25
            for sound in sounds:
                wave = np.random.default_rng(number).normal(0, 0.1, (2, samples)).astype(np.float32)
                piece = av.AudioFrame.from_ndarray(wave, "fltp", "stereo")
                piece.rate, piece.pts, piece.time_base = RATE, number * samples, Fraction(1, RATE)
                out.mux(sound.encode(piece))
        out.mux(stream.encode(None))
        for sound in sounds:
            out.mux(sound.encode(None))
    return path


def decoded(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as file:
        return [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]


def times(path: Path) -> list[Fraction]:
    with av.open(str(path)) as file:
        return [frame.pts * frame.time_base for frame in file.decode(video=0)]


def sounds(path: Path) -> list[list[tuple[float, bytes]]]:
    """Times and bytes of the packets of each audio stream."""
    with av.open(str(path)) as file:
        packets = [p for p in file.demux(*file.streams.audio) if p.size] if file.streams.audio else []
        return [
            [(float(p.pts * p.time_base), bytes(p)) for p in packets if p.stream_index == stream.index]
            for stream in file.streams.audio
        ]


def pooled(image: torch.Tensor) -> torch.Tensor:
    """Means of 8 x 8 pixels, which 4:2:0 does not change."""
    return torch.nn.functional.avg_pool2d(image.movedim(2, 0), 8)


VARIABLE = [0, 3600, 7201, 7300, 20000, 21000, 30000, 30400, 50000, 90000, 93600, 99999]


# ---------------------------------------------------------------------------------- what is kept


def test_frames_are_those_of_upscale(tmp_path, model):
    source = make(tmp_path / "in.mkv", codec="ffv1", pixels="yuv444p")
    upscale_video(source, tmp_path / "out.mkv", model, codec="ffv1")
    images = torch.from_numpy(np.stack(decoded(source)).astype(np.float32)) / 255
    expected = (upscale(images, model) * 255).round().numpy()
    difference = np.abs(np.stack(decoded(tmp_path / "out.mkv")) - expected)
    assert difference.shape == (12, 64, 96, 3)
    assert difference.max() <= 3 and difference.mean() < 0.5  # RGB to YUV and back, in whole levels


@pytest.mark.parametrize(
    ("source", "target", "audio"),
    [
        ("in.mp4", "out.mp4", ("aac",)),
        ("in.mp4", "out.mov", ("aac", "aac")),
        ("in.mkv", "out.mkv", ("pcm_s16le", "libopus")),
        ("in.webm", "out.webm", ("libopus",)),
        ("in.mkv", "out.mp4", ()),
    ],
)
def test_timestamps_and_audio_are_kept_to_the_byte(tmp_path, model, source, target, audio):
    matroska = source != "in.mp4"
    codec = "libvpx-vp9" if source == "in.webm" else "libx264"
    make(tmp_path / source, codec=codec, times=VARIABLE, base=Fraction(1, 90000), audio=audio)
    upscale_video(tmp_path / source, tmp_path / target, model)
    assert times(tmp_path / target) == times(tmp_path / source)
    assert sounds(tmp_path / target) == sounds(tmp_path / source)
    if not matroska:
        assert times(tmp_path / target) == [Fraction(t, 90000) for t in VARIABLE]
    with av.open(str(tmp_path / target)) as file:
        assert file.metadata["title"] == "Ein Titel"
        assert [s.metadata.get("language") for s in file.streams.audio] == ["eng", "fra"][: len(audio)]
        assert (file.streams.video[0].width, file.streams.video[0].height) == (96, 64)


def test_audio_is_encoded_anew_where_the_container_cannot_hold_it(tmp_path, model, caplog):
    make(tmp_path / "in.mkv", audio=("pcm_s16le", "aac"))
    for target, codec in (("out.webm", "opus"), ("out.mp4", "aac")):
        upscale_video(tmp_path / "in.mkv", tmp_path / target, model)
        with av.open(str(tmp_path / target)) as file:
            assert [s.codec_context.name for s in file.streams.audio] == [codec, codec]
            for stream in file.streams.audio:
                seconds = sum(f.samples for f in av.open(str(tmp_path / target)).decode(audio=stream.index - 1)) / RATE
                assert seconds == pytest.approx(12 / 25, abs=0.05)
    assert "audio stream 1 is encoded anew: webm cannot hold it" in caplog.text


@pytest.mark.parametrize("damaged", [False, True])
def test_a_transport_stream_keeps_sound_and_picture_together(tmp_path, model, damaged):
    make(tmp_path / "in.ts", audio=("aac",))
    if damaged:  # damage in the middle, as from a bad aerial
        data = bytearray((tmp_path / "in.ts").read_bytes())
        data[len(data) // 2 : len(data) // 2 + 500] = bytes(500)
        (tmp_path / "in.ts").write_bytes(data)
    upscale_video(tmp_path / "in.ts", tmp_path / "out.mp4", model)
    assert times(tmp_path / "out.mp4") == times(tmp_path / "in.ts")
    before, after = sounds(tmp_path / "in.ts")[0], sounds(tmp_path / "out.mp4")[0]
    if damaged:
        assert len(after) == pytest.approx(len(before), abs=3)
    else:
        assert [t for t, _ in after] == pytest.approx([t for t, _ in before], abs=0.001)


def test_colour_tags_pixel_aspect_and_depth_are_kept(tmp_path, model):
    hdr = {"colorspace": 9, "color_range": 1, "color_primaries": 9, "color_trc": 16}
    source = make(
        tmp_path / "in.mp4",
        frames=3,
        pixels="yuv420p10le",
        sample_aspect_ratio=Fraction(4, 3),
        **hdr,
    )
    upscale_video(source, tmp_path / "out.mp4", model)
    with av.open(str(tmp_path / "out.mp4")) as file:
        stream = file.streams.video[0]
        assert {name: int(getattr(stream.codec_context, name)) for name in hdr} == hdr
        assert (stream.sample_aspect_ratio, stream.codec_context.pix_fmt) == (Fraction(4, 3), "yuv420p10le")


def test_colours_without_tags_are_tagged_as_players_took_them_at_the_old_size(tmp_path, model):
    upscale_video(make(tmp_path / "in.mp4", frames=2), tmp_path / "out.mp4", model)
    with av.open(str(tmp_path / "out.mp4")) as file:
        context = file.streams.video[0].codec_context
        assert (int(context.colorspace), int(context.color_range)) == (video.SMPTE170M, video.LIMITED_RANGE)


@pytest.mark.parametrize("bits", [8, 10])
@pytest.mark.parametrize("limited", [True, False], ids=["limited", "full"])
@pytest.mark.parametrize(("matrix", "kr", "kb"), [(1, 0.2126, 0.0722), (6, 0.299, 0.114), (9, 0.2627, 0.0593)])
def test_colours_are_converted_as_h273_has_it(bits, limited, matrix, kr, kb):
    unit, dtype = 2 ** (bits - 8), np.uint8 if bits == 8 else np.uint16
    stored = 120 * unit, 90 * unit, 160 * unit
    frame = av.VideoFrame(32, 32, "yuv444p" if bits == 8 else "yuv444p10le")
    for plane, value in zip(frame.planes, stored, strict=True):
        plane.update(np.full(plane.buffer_size // dtype().itemsize, value, dtype).tobytes())
    frame.colorspace, frame.color_range = matrix, 1 if limited else 2
    luma, blue, red = stored[0], stored[1] - 128 * unit, stored[2] - 128 * unit
    top = 2**bits - 1
    y, cb, cr = (
        ((luma - 16 * unit) / (219 * unit), blue / (224 * unit), red / (224 * unit))
        if limited
        else (luma / top, blue / top, red / top)
    )
    r, b = y + 2 * (1 - kr) * cr, y + 2 * (1 - kb) * cb
    expected = [r, (y - kr * r - kb * b) / (1 - kr - kb), b]

    class Stream:
        sample_aspect_ratio = None
        codec_context = av.CodecContext.create("libx264", "w")
        time_base = Fraction(1, 25)

    read = video._read(frame, 0, Stream)
    np.testing.assert_allclose(read.values[0, 0] / np.iinfo(read.values.dtype).max, expected, atol=1 / 255)
    picture = video.Picture(32, 32, frame.format.name, read.colour, None)
    back = picture.frame(read, Stream)
    assert (int(back.colorspace), int(back.color_range)) == (matrix, 1 if limited else 2)
    for plane, value in zip(back.planes, stored, strict=True):
        assert abs(int(np.frombuffer(plane, dtype)[0]) - value) <= 1


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_rotation_is_applied(tmp_path, model, rotation):
    if not hasattr(av.VideoFrame, "rotation") or not hasattr(av.video.stream.VideoStream, "set_display_rotation"):
        pytest.skip("this PyAV cannot make such a file")
    make(tmp_path / "in.mp4", rotation=rotation, frames=2, sample_aspect_ratio=Fraction(4, 3))
    upscale_video(tmp_path / "in.mp4", tmp_path / "out.mp4", model)
    with av.open(str(tmp_path / "in.mp4")) as file:
        stored = next(file.decode(video=0))
    shown = np.rot90(stored.to_ndarray(format="rgb24"), stored.rotation // 90).astype(np.float32)  # counter-clockwise
    expected = upscale(torch.from_numpy(shown / 255)[None], model)[0] * 255
    with av.open(str(tmp_path / "out.mp4")) as file:
        frame = next(file.decode(video=0))
        assert file.streams.video[0].sample_aspect_ratio == (Fraction(4, 3) if rotation == 180 else Fraction(3, 4))
    assert frame.rotation == 0
    got = torch.from_numpy(frame.to_ndarray(format="rgb24").astype(np.float32))
    right, wrong = ((pooled(got) - pooled(e)).abs().mean() for e in (expected, expected.flip(0, 1)))
    assert right < 3 < wrong


def test_an_odd_side_becomes_even_by_a_repeated_row(tmp_path):
    torch.manual_seed(0)
    triple = PFTSR(scale=3, embed_dim=8, num_blocks=(2,), num_heads=2, window_size=4).eval()
    make(tmp_path / "in.webm", codec="libvpx-vp9", size=(15, 21), frames=2)
    upscale_video(tmp_path / "in.webm", tmp_path / "out.mp4", triple)
    assert decoded(tmp_path / "out.mp4")[0].shape == (64, 46, 3)


@pytest.mark.parametrize(
    ("codec", "target", "name"),
    [
        ("h265", "out.mp4", "hevc"),
        ("av1", "out.mkv", "av1"),
        ("vp9", "out.webm", "vp9"),
        ("prores", "out.mov", "prores"),
    ],
)
def test_every_codec_gives_a_file_that_plays(tmp_path, model, codec, target, name):
    if CODECS[codec].encoder not in av.codec.codecs_available:
        pytest.skip(f"this PyAV has no {CODECS[codec].encoder}")
    make(tmp_path / "in.mp4", size=(64, 64), frames=8, times=VARIABLE, base=Fraction(1, 90000))
    upscale_video(tmp_path / "in.mp4", tmp_path / target, model, codec=codec)
    with av.open(str(tmp_path / target)) as file:
        assert name in (file.streams.video[0].codec.canonical_name, file.streams.video[0].codec_context.name)
        frames = [f.to_ndarray(format="rgb24") for f in file.decode(video=0)]
    assert [round(t, 3) for t in times(tmp_path / target)] == [round(t, 3) for t in times(tmp_path / "in.mp4")]
    reference = np.repeat(np.repeat(decoded(tmp_path / "in.mp4")[7], 2, 0), 2, 1)
    assert frames[7].shape == reference.shape


def test_frames_of_any_size(tmp_path, model):
    make(tmp_path / "in.mp4", frames=2)
    aim = partial(plan, scale=2, mode="fit inside", width=150, height=1000)
    upscale_video(tmp_path / "in.mp4", tmp_path / "out.mp4", model, size=aim)
    assert decoded(tmp_path / "out.mp4")[0].shape == (100, 150, 3)


def test_quality_is_the_encoders_rate_factor(tmp_path, model):
    source = make(tmp_path / "in.mp4")
    for quality in (4, 40):
        upscale_video(source, tmp_path / f"{quality}.mp4", model, quality=quality)
    assert (tmp_path / "40.mp4").stat().st_size < (tmp_path / "4.mp4").stat().st_size / 2


# ---------------------------------------------------------------------------------- stops and faults


class StoppedError(Exception):
    pass


def stop_after(passes: int):
    left = iter(range(passes))

    def check() -> None:
        if next(left, None) is None:
            raise StoppedError

    return check


@pytest.fixture
def short_segments(monkeypatch):
    monkeypatch.setattr(video, "SEGMENT_FRAMES", 5)
    monkeypatch.setattr(video, "BATCH_PIXELS", 1)  # a pass for each frame
    # with it, x264 on AVX-512 gives other bits now and then where the width is no multiple of 128
    monkeypatch.setitem(CODECS["h264"].options, "x264-params", "mbtree=0")


def test_a_resumed_run_gives_the_bytes_of_an_uninterrupted_one(tmp_path, model, short_segments):
    source = make(tmp_path / "in.mp4", times=VARIABLE, base=Fraction(1, 90000), audio=("aac",))
    upscale_video(source, tmp_path / "whole.mp4", model)
    target = tmp_path / "out.mp4"
    with pytest.raises(StoppedError):
        upscale_video(source, target, model, resume="job", check_cancel=stop_after(7))
    assert not target.exists()
    seen: list[tuple[int, int]] = []
    upscale_video(source, target, model, resume="job", progress=lambda *p: seen.append(p))
    assert [done for done, _ in seen] == [*range(6, 13), 12]
    assert target.read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.mp4", "out.mp4", "whole.mp4"]


def test_segments_of_another_job_are_not_used(tmp_path, model, short_segments):
    source = make(tmp_path / "in.mp4")
    with pytest.raises(StoppedError):
        upscale_video(source, tmp_path / "out.mp4", model, resume="a", check_cancel=stop_after(11))
    seen: list[int] = []
    upscale_video(source, tmp_path / "out.mp4", model, resume="b", progress=lambda done, _: seen.append(done))
    assert seen[0] == 1


def test_a_stop_leaves_what_was_there_and_nothing_else(tmp_path, model, short_segments):
    source = make(tmp_path / "in.mp4")
    (tmp_path / "out.mp4").write_text("precious")
    with pytest.raises(StoppedError):
        upscale_video(source, tmp_path / "out.mp4", model, check_cancel=stop_after(7))
    assert (tmp_path / "out.mp4").read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.mp4", "out.mp4"]


@pytest.mark.skipif(sys.platform == "win32", reason="no file size limits there")
def test_a_disk_that_fills_up_leaves_what_was_there(tmp_path):
    make(tmp_path / "in.mp4", size=(64, 64))
    (tmp_path / "out.mp4").write_text("precious")
    code = (
        "import resource, signal, sys\n"
        "from pft_arch import PFTSR\n"
        "from pft_arch.video import upscale_video\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
        "layers = dict(embed_dim=4, num_blocks=(1,), num_heads=1, window_size=4, upsampler='pixelshuffledirect')\n"
        "try: upscale_video(sys.argv[1] + '/in.mp4', sys.argv[1] + '/out.mp4', PFTSR(scale=2, **layers).eval())\n"
        "except (ValueError, OSError) as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert "File too large" in run.stdout, run.stderr
    assert (tmp_path / "out.mp4").read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.mp4", "out.mp4"]


def test_that_transparency_is_left_out_is_said(tmp_path, model, caplog):
    make(tmp_path / "alpha.mkv", codec="ffv1", pixels="yuva420p", frames=1)
    upscale_video(tmp_path / "alpha.mkv", tmp_path / "out.mkv", model)
    assert "its transparency is left out" in caplog.text


def test_an_open_file_will_do_and_progress_ends_at_the_number_of_frames(tmp_path, model):
    make(tmp_path / "in.mp4", audio=("aac",))
    seen: list[tuple[int, int]] = []
    with open(tmp_path / "in.mp4", "rb") as file:
        upscale_video(file, tmp_path / "out.mp4", model, progress=lambda *p: seen.append(p))
    assert seen == [(n, 12) for n in range(1, 13)] + [(12, 12)]
    assert sounds(tmp_path / "out.mp4") == sounds(tmp_path / "in.mp4")


def test_what_cannot_be_done_is_said_before_the_work(tmp_path, model, monkeypatch):
    make(tmp_path / "in.mp4")
    (tmp_path / "text.mp4").write_text("no video")
    with av.open(str(tmp_path / "sound.mka"), "w") as out:
        sound = out.add_stream("pcm_s16le", rate=RATE)
        piece = av.AudioFrame.from_ndarray(np.zeros((1, 2000), np.int16), "s16", "stereo")
        piece.rate = RATE
        out.mux(sound.encode(piece))
    make(tmp_path / "tiny.mp4", size=(16, 16), frames=1)

    def work(*_: object, **__: object) -> None:
        raise AssertionError("began to work")

    monkeypatch.setattr(video, "upscale_to", work)
    for source, target, codec, reason in (
        ("in.mp4", "out.gif", "auto", "must end in one of .mp4"),
        ("in.mp4", "out.webm", "h264", "webm holds vp9, av1, not h264"),
        ("text.mp4", "out.mp4", "auto", "text.mp4: Invalid data"),
        ("missing.mp4", "out.mp4", "auto", "missing.mp4: No such file"),
        ("sound.mka", "out.mp4", "auto", "holds no video"),
        ("tiny.mp4", "out.mp4", "h265", "needs 64 pixels a side"),
    ):
        with pytest.raises(VideoError, match=reason):
            upscale_video(tmp_path / source, tmp_path / target, model, codec=codec, resume="job")
    with pytest.raises(VideoError, match="no quality to choose"):
        upscale_video(tmp_path / "in.mp4", tmp_path / "out.mkv", model, codec="ffv1", quality=3)
    with pytest.raises(VideoError, match="quality of h264 goes from 0 to 51, and 52 is outside"):
        upscale_video(tmp_path / "in.mp4", tmp_path / "out.mp4", model, quality=52)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith((".", "out"))]


def test_another_encoder_is_taken_where_the_first_is_missing(monkeypatch):
    monkeypatch.setattr(av.codec, "codecs_available", {"libsvtav1", "libvpx-vp9"})
    assert pick_codec(Path("out.mp4"), "auto", None)[1].encoder == "libsvtav1"
    with pytest.raises(VideoError, match=r"no encoder for it \(libx264\)"):
        pick_codec(Path("out.mp4"), "h264", None)


def test_without_pyav_it_says_how_to_get_it(tmp_path, model, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(VideoError, match=r"pip install 'pft-sr\[video\]'"):
        upscale_video("in.mp4", tmp_path / "out.mp4", model)


@pytest.mark.skipif(sys.platform == "win32", reason="no ru_maxrss there")
def test_memory_does_not_grow_with_the_number_of_frames(tmp_path):
    make(tmp_path / "20.mkv", frames=20, size=(160, 120), codec="ffv1")
    make(tmp_path / "200.mkv", frames=200, size=(160, 120), codec="ffv1")
    code = (
        "import resource, sys, torch\n"
        "from pft_arch import PFTSR\n"
        "from pft_arch.video import upscale_video\n"
        "torch.set_num_threads(1)\n"
        "layers = dict(embed_dim=4, num_blocks=(1,), num_heads=1, window_size=4, upsampler='pixelshuffledirect')\n"
        "model = PFTSR(scale=2, **layers).eval()\n"
        "for frames in (20, 200):\n"
        "    upscale_video(f'{sys.argv[1]}/{frames}.mkv', f'{sys.argv[1]}/out.mkv', model, codec='ffv1')\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    few, many = map(int, run.stdout.split())
    assert many - few < 15_000  # KB; 180 frames of 320 x 240 are 41 MB in 8 bits, 166 MB in float32
