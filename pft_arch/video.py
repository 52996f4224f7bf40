"""Videos through the network, frame by frame, with everything else of the file as it was.

The enlarged frames are encoded in segments of `SEGMENT_FRAMES`, each a file of its own in a work folder beside the
target. At the end the segments are joined, without encoding again, with the audio and subtitles of the source. So a
run that was stopped can go on at its last whole segment, and gives what an uninterrupted one gives.
"""

from __future__ import annotations

import errno
import heapq
import json
import logging
import secrets
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch

from .files import replacing
from .network import PFTSR
from .target import Plan, Size, plan, upscale_to
from .upscale import BATCH_PIXELS, auto_tile

if TYPE_CHECKING:
    from av import Packet, VideoFrame
    from av.container import InputContainer, OutputContainer
    from av.stream import Stream
    from av.video.codeccontext import VideoCodecContext
    from av.video.stream import VideoStream

log = logging.getLogger(__name__)

SEGMENT_FRAMES = 100  # what a stop can cost; each segment begins with a key frame, as players want every few seconds


class VideoError(ValueError):
    """A problem with a video file. The text names the file, says what is wrong and what to do."""


@dataclass(frozen=True)
class Codec:
    """How we ask FFmpeg for a codec."""

    encoder: str  # FFmpeg's name
    quality: int | None = None  # default constant rate factor, where it has one: near-lossless, as for images
    options: Mapping[str, str] = field(default_factory=dict)
    worst: int = 51  # the rate factors end here
    min_side: int = 1


CODECS: Mapping[str, Codec] = {
    "h264": Codec("libx264", 16),
    "h265": Codec("libx265", 18, {"x265-params": "log-level=error"}, min_side=64),  # below, x265 4.2 spoils the heap
    "av1": Codec("libsvtav1", 20, worst=63, min_side=64),
    "vp9": Codec("libvpx-vp9", 20, {"row-mt": "1"}, worst=63),
    "ffv1": Codec("ffv1"),  # lossless
    "prores": Codec("prores_ks", options={"profile": "3"}),
}
# FFmpeg's name of the container, and its codecs: the first that this FFmpeg can encode is the default.
CONTAINERS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    ".mp4": ("mp4", ("h264", "h265", "av1", "vp9")),
    ".mov": ("mov", ("h264", "h265", "prores")),
    ".mkv": ("matroska", ("h264", "h265", "av1", "vp9", "ffv1")),
    ".webm": ("webm", ("vp9", "av1")),
}
# Endings by which videos are known (not .ts, which is a program's as often); FFmpeg reads by content.
READ_SUFFIXES = (*CONTAINERS, ".m4v", ".avi", ".mpg", ".mpeg", ".m2ts", ".wmv", ".flv")

# FFmpeg's numbers for colour, from ITU-T H.273
UNSPECIFIED, BT709, BT470BG, SMPTE170M = 2, 1, 5, 6
LIMITED_RANGE, FULL_RANGE = 1, 2
GLOBAL_HEADER = 1 << 22  # AV_CODEC_FLAG_GLOBAL_HEADER: all our containers want the codec's header in their own
SWS_MATRICES = {BT709: 1, 4: 4, 7: 7, 9: 9, 10: 9}  # swscale's number for a matrix; 5, BT.601, for all others

# bicubic, chroma in full resolution, rounding rather than truncation: there and back again changes a level at most
SWS_CAREFUL = 0x4 | 0x2000 | 0x4000 | 0x40000
LAYOUTS = {1: "mono", 2: "stereo", 3: "3.0", 4: "4.0", 5: "5.0", 6: "5.1", 8: "7.1"}  # as AAC and Opus have them
NOT_COPIED_TAGS = {"major_brand", "minor_version", "compatible_brands", "encoder", "rotate", "vendor_id"}


def upscale_video(
    source: str | Path | BinaryIO,
    target: str | Path,
    model: PFTSR,
    *,
    tile: int = 0,
    overlap: int = 0,
    codec: str = "auto",
    quality: int | None = None,
    size: Callable[[Size], Plan] | None = None,
    resume: str = "",
    progress: Callable[[int, int], None] | None = None,
    check_cancel: Callable[[], None] | None = None,
    preview: Callable[[torch.Tensor], None] | None = None,
) -> None:
    """Enlarge the frames of a video, by the model's factor unless told; keep its timing, colours and other streams.

    Frames stream: memory does not grow with their number. Kept: timestamps (variable frame rates too, as fine as the
    container counts), colour matrix, range, primaries and transfer, pixel aspect, bit depth up to 10 (16 in ffv1)
    and chroma subsampling where the codec has them, all audio streams (copied, or encoded as AAC or Opus where the
    container cannot hold them), subtitles where the container can hold them, chapters, title and the like. Rotation
    is applied to the frames. An odd side becomes even, by one repeated row or column, where the codec needs it.
    Transparency is not kept.

    Args:
        source: a file that FFmpeg reads, or an open one that can seek.
        target: file to write; the ending, one of `CONTAINERS`, decides the container. Replaced if it exists, when the
            new one is whole.
        model, tile, overlap: as for `upscale`. tile 0 is decided once, for all frames.
        codec: one of `CODECS`, or "auto" for the container's first that this FFmpeg can encode.
        quality: constant rate factor, lower is better and larger; None for the codec's default.
        size: makes the plan for frames of a height and width, as `target.plan` does; None for the model's factor.
        resume: names what is made of what, with which settings. A run that is stopped leaves its segments, and one
            with the same name and target goes on from there. Empty: nothing is left and nothing is used.
        progress: called as progress(done, total) in frames; total is an estimate until the end.
        check_cancel: called before each pass through the network; what it raises stops the work and passes through.
        preview: as for `upscale`.

    Raises:
        VideoError: no PyAV, no video in the source, a source that cannot be read or a target that cannot be written.
        ValueError, MemoryError, RuntimeError: as `upscale` does.
    """
    av = _import_av()
    target = Path(target)
    container, encoder = pick_codec(target, codec, quality)
    name = str(source) if isinstance(source, str | Path) else getattr(source, "name", "the video")
    try:
        with _opened(source) as file, _work_folder(target, resume) as work:
            video = _video_stream(file, name)
            tile = _same_tile(work, tile, model, video)
            segments = _whole_segments(work)
            reader = _Reader(video, name)
            frames = reader.frames(file)
            head = next(frames, None)
            if head is None:
                raise VideoError(f"{name}: holds no frame that can be read. Get the file again.")
            rows, columns, _ = head.values.shape
            aim = size((rows, columns)) if size else plan((rows, columns), model.config.scale)
            picture = _picture(head, aim.size, encoder)
            done = len(segments) * SEGMENT_FRAMES
            frames = islice(chain([head], frames), done, None)
            while first := next(frames, None):
                segment = chain([first], islice(frames, SEGMENT_FRAMES - 1))
                segments.append(_segment(work, len(segments)))
                with replacing(segments[-1]) as path, path.open("wb") as out:
                    context = av.CodecContext.create(encoder.encoder, "w")
                    picture.set_up(context, encoder, video)
                    for frame in _larger(segment, model, aim, tile, overlap, check_cancel, preview):
                        _store(out, context.encode(picture.frame(frame, context)))
                        done += 1
                        if progress:
                            progress(done, max(done, reader.estimate))
                    _store(out, context.encode(None))
            with replacing(target) as path:
                try:
                    _join(segments, source, path, container, encoder, picture)
                except av.error.FFmpegError as error:
                    if error.errno != errno.EINVAL:
                        raise
                    # a stream that the container should hold, and then does not
                    _join(segments, source, path, container, encoder, picture, plain=True)
    except av.error.FFmpegError as error:
        raise VideoError(f"{name}: {_why(error)}") from error
    if progress:
        progress(reader.count, reader.count)


def pick_codec(target: Path, codec: str, quality: int | None) -> tuple[str, Codec]:
    """FFmpeg's name of the target's container, and the encoder to use, with its options."""
    av = _import_av()
    if target.suffix.lower() not in CONTAINERS:
        raise VideoError(f"{target}: the name must end in one of {', '.join(CONTAINERS)}, which decides the container.")
    container, possible = CONTAINERS[target.suffix.lower()]
    if codec != "auto" and codec not in possible:
        raise VideoError(f"{target}: {container} holds {', '.join(possible)}, not {codec}. Choose another ending.")
    wanted = possible if codec == "auto" else (codec,)
    usable = [c for c in wanted if CODECS[c].encoder in av.codec.codecs_available]
    if not usable:
        encoders = ", ".join(CODECS[c].encoder for c in wanted)
        raise VideoError(f"{target}: this PyAV has no encoder for it ({encoders}). Try another codec or ending.")
    chosen = CODECS[usable[0]]
    options = dict(chosen.options)
    if quality is not None and not 0 <= quality <= chosen.worst:
        raise VideoError(
            f"{target}: the quality of {usable[0]} goes from 0 to {chosen.worst}, and {quality} is outside."
        )
    if chosen.quality is not None:
        options["crf"] = str(chosen.quality if quality is None else quality)
    elif quality is not None:
        raise VideoError(f"{target}: {usable[0]} has no quality to choose. Leave it out, or choose another codec.")
    return container, replace(chosen, options=options)


def read_size(path: Path) -> tuple[int, int, int] | None:
    """Width, height and number of frames, as far as a video's header tells; None where it cannot be read."""
    with suppress(Exception), _opened(path) as file:  # upscale_video says why
        video = _video_stream(file, str(path))
        return video.width, video.height, max(1, _Reader(video, str(path)).estimate)
    return None


def _import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise VideoError(f"videos need PyAV ({error}): pip install 'pft-sr[video]', or pip install av") from error
    return av


def _why(error: Exception) -> str:
    text = getattr(error, "strerror", None) or error
    return f"{text}. Check the file, the free space of the disk, and whether this user may read and write there."


# ------------------------------------------------------------------------------------------------- work folder


@contextmanager
def _work_folder(target: Path, resume: str) -> Iterator[Path]:
    """A folder beside the target for the segments: that of a stopped run of the same name, or an empty one."""
    work = target.with_name(f".{target.name}.pft-work" if resume else f".pft-{secrets.token_hex(8)}.part")
    mark = work / "job"
    if work.exists() and not (mark.is_file() and mark.read_text("utf-8") == resume):
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    for half in work.glob("*.part"):
        half.unlink()
    mark.write_text(resume, "utf-8")
    try:
        yield work
    except BaseException:
        if not resume or not _whole_segments(work):
            shutil.rmtree(work, ignore_errors=True)
        raise
    shutil.rmtree(work)


def _whole_segments(work: Path) -> list[Path]:
    """The segments that are there, from the first without a gap. A file under its final name is whole."""
    segments: list[Path] = []
    while (path := _segment(work, len(segments))).exists():
        segments.append(path)
    return segments


def _segment(work: Path, number: int) -> Path:
    return work / f"{number:06}.packets"


def _same_tile(work: Path, tile: int, model: PFTSR, video: VideoStream) -> int:
    """The tile chosen when the work began: free memory may be another now, and the frames must not be."""
    chosen = work / "tile"
    if not chosen.exists():
        side = tile or auto_tile(model, max(video.height, video.width), min(video.height, video.width))
        with replacing(chosen) as path:
            path.write_text(json.dumps(side))
    return int(json.loads(chosen.read_text()))


# ------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Colour:
    """What the numbers of a frame mean, in FFmpeg's numbers (ITU-T H.273)."""

    matrix: int
    range: int
    primaries: int
    transfer: int


@dataclass(frozen=True)
class Frame:
    """A frame as (H, W, 3) values, upright, and what is to be kept of it."""

    values: np.ndarray[Any, Any]  # uint8, or uint16 over its full range
    pts: int  # in the stream's time base
    colour: Colour
    aspect: Fraction | None  # of a pixel, width by height
    chroma: str  # "420", "422" or "444"
    bits: int


@contextmanager
def _opened(source: str | Path | BinaryIO) -> Iterator[InputContainer]:
    import av

    if not isinstance(source, str | Path):
        source.seek(0)
    with av.open(source if not isinstance(source, Path) else str(source), "r") as file:
        yield file


def _video_stream(file: InputContainer, name: str) -> VideoStream:
    """The first stream of moving pictures; a cover is a video stream too, but none of those."""
    from av.stream import Disposition

    for stream in file.streams.video:
        if stream.codec_context is not None and not stream.disposition & Disposition.attached_pic:
            stream.thread_type = "AUTO"
            return stream
    raise VideoError(f"{name}: holds no video.")


class _Reader:
    """The frames of a video, in order, each with a timestamp later than that of the one before."""

    def __init__(self, video: VideoStream, name: str) -> None:
        self.video = video
        self.name = name
        self.count = 0
        self.size: tuple[int, int] | None = None
        seconds = float((video.duration or 0) * (video.time_base or 0))
        seconds = seconds or (video.container.duration or 0) / 1e6  # type: ignore[attr-defined]
        self.estimate = video.frames or round(seconds * float(video.average_rate or 0))

    def frames(self, file: InputContainer) -> Iterator[Frame]:
        rate = self.video.average_rate or Fraction(25)
        step = max(1, round(1 / rate / (self.video.time_base or 1 / rate)))
        last: int | None = None
        for frame in self._decoded(file):
            if self.size and self.size != (frame.width, frame.height):
                raise VideoError(
                    f"{self.name}: frame {self.count} is {frame.width}x{frame.height}, those before are "
                    f"{self.size[0]}x{self.size[1]}. Convert it to one size first."
                )
            if not self.size and frame.interlaced_frame:
                log.warning("%s: is interlaced, and enlarged as it is. Deinterlace it first", self.name)
            if not self.size and any(component.is_alpha for component in frame.format.components):
                log.warning("%s: its transparency is left out", self.name)
            self.size = frame.width, frame.height
            pts = frame.pts
            if last is not None:
                pts = last + step if pts is None else max(pts, last + 1)
            last = pts or 0
            self.count += 1
            yield _read(frame, last, self.video)

    def _decoded(self, file: InputContainer) -> Iterator[VideoFrame]:
        """As a player does, go on behind a damaged packet."""
        av = _import_av()
        damaged = 0
        for packet in file.demux(self.video):
            try:
                yield from packet.decode()
            except av.error.InvalidDataError:
                damaged += 1
        if damaged:
            log.warning("%s: %d damaged packets left out", self.name, damaged)


def _read(frame: VideoFrame, pts: int, video: VideoStream) -> Frame:
    bits = max(component.bits for component in frame.format.components)
    colour = _colour(frame, video)
    matrix = SWS_MATRICES.get(colour.matrix, 5)
    rgb = frame.reformat(
        format="rgb24" if bits <= 8 else "rgb48le",
        src_colorspace=matrix,
        dst_colorspace=_another(matrix),
        src_color_range=colour.range,
        dst_color_range=FULL_RANGE,
        interpolation=SWS_CAREFUL,
    )
    values, turned = _upright(rgb.to_ndarray(), frame)
    aspect = video.sample_aspect_ratio or None
    name = frame.format.name
    chroma = "444" if "444" in name else "422" if "422" in name or "yuyv" in name or "uyvy" in name else "420"
    return Frame(values, pts, colour, 1 / aspect if aspect and turned else aspect, chroma, bits)


def _another(matrix: int) -> int:
    """For the RGB side, which has none: PyAV before 17 leaves ranges alone where both sides say the same."""
    return 5 if matrix == 1 else 1


def _colour(frame: VideoFrame, video: VideoStream) -> Colour:
    """As the frame says. Where it says nothing, as players take it, which goes by size, and would change with it."""
    context = video.codec_context
    matrix, primaries = int(frame.colorspace), int(context.color_primaries)
    if matrix in (0, UNSPECIFIED, 3):  # 0: the frame is RGB
        matrix = BT709 if frame.width >= 1280 or frame.height > 576 else BT470BG if frame.height == 576 else SMPTE170M
        if primaries == UNSPECIFIED:
            primaries = matrix
    full = int(frame.color_range) == FULL_RANGE or frame.format.name.startswith("yuvj")
    return Colour(matrix, FULL_RANGE if full else LIMITED_RANGE, primaries, int(context.color_trc))


def _upright(values: np.ndarray[Any, Any], frame: VideoFrame) -> tuple[np.ndarray[Any, Any], bool]:
    """The picture as its display matrix wants it shown, and whether width and height have changed places."""
    stored: Any = frame.side_data.get("DISPLAYMATRIX")
    if stored is None:
        return values, False
    a, b, c, d = np.frombuffer(bytes(stored), np.int32)[[0, 1, 3, 4]] / 65536  # (x, y) goes to (ax + cy, bx + dy)
    turned = bool(abs(a) < abs(b))
    if turned:
        values, a, d = values.swapaxes(0, 1), c, b
    return values[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1], turned


# ------------------------------------------------------------------------------------------------- writing


def _larger(
    frames: Iterator[Frame],
    model: PFTSR,
    aim: Plan,
    tile: int,
    overlap: int,
    check_cancel: Callable[[], None] | None,
    preview: Callable[[torch.Tensor], None] | None,
) -> Iterator[Frame]:
    """The frames, enlarged; small ones several at a time."""
    for first in frames:
        height, width, _ = first.values.shape
        batch = [first, *islice(frames, max(1, BATCH_PIXELS // (height * width)) - 1)]
        top = np.iinfo(first.values.dtype).max
        images = torch.from_numpy(np.stack([frame.values for frame in batch]).astype(np.float32)).div_(top)
        larger = upscale_to(images, model, aim, tile=tile, overlap=overlap, check_cancel=check_cancel, preview=preview)
        for frame, values in zip(batch, (larger * top).round_().numpy(), strict=True):
            yield replace(frame, values=values.astype(frame.values.dtype))


@dataclass(frozen=True)
class Picture:
    """What the encoder is told of the frames: the same in every segment."""

    width: int
    height: int
    pixels: str  # FFmpeg's pixel format
    colour: Colour
    aspect: Fraction | None

    def set_up(self, context: VideoCodecContext, codec: Codec, video: VideoStream) -> None:
        context.width, context.height, context.pix_fmt = self.width, self.height, self.pixels
        context.framerate = video.average_rate or Fraction(25)
        context.time_base = video.time_base  # type: ignore[assignment]
        context.colorspace, context.color_range = self.colour.matrix, self.colour.range
        context.color_primaries, context.color_trc = self.colour.primaries, self.colour.transfer
        if self.aspect:
            context.sample_aspect_ratio = self.aspect
        context.options = dict(codec.options)
        context.flags |= GLOBAL_HEADER

    def frame(self, frame: Frame, context: VideoCodecContext) -> VideoFrame:
        """(H, W, 3) values as the encoder takes them."""
        import av

        values, (height, width, _) = frame.values, frame.values.shape
        matrix = SWS_MATRICES.get(self.colour.matrix, 5)
        values = np.pad(values, ((0, self.height - height), (0, self.width - width), (0, 0)), "edge")
        rgb = av.VideoFrame.from_ndarray(values, format="rgb24" if values.dtype == np.uint8 else "rgb48le")
        out = rgb.reformat(
            format=self.pixels,
            src_colorspace=_another(matrix),
            dst_colorspace=matrix,
            src_color_range=FULL_RANGE,
            dst_color_range=self.colour.range,
            interpolation=SWS_CAREFUL,
        )
        out.colorspace, out.color_range = self.colour.matrix, self.colour.range
        out.pts, out.time_base = frame.pts, context.time_base
        return out


def _picture(frame: Frame, size: Size, codec: Codec) -> Picture:
    """How to encode frames of this size that are made of ones like this."""
    height, width = size
    pixels = _pixel_format(frame, codec)
    if pixels.startswith(("yuv420", "yuv422")):
        width += width % 2
    if pixels.startswith("yuv420"):
        height += height % 2
    if min(width, height) < codec.min_side:
        raise VideoError(f"{codec.encoder} needs {codec.min_side} pixels a side, not {width}x{height}. Choose another.")
    return Picture(width, height, pixels, frame.colour, frame.aspect)


def _pixel_format(frame: Frame, codec: Codec) -> str:
    """The encoder's format nearest to the source's: its chroma and depth, else less chroma, else less depth."""
    import av

    possible = {f.name for f in av.Codec(codec.encoder, "w").video_formats or ()}
    deep = [f"{bits}le" for bits in (16, 12, 10) if bits <= max(10, frame.bits)]
    for bits in [*deep, ""] if frame.bits > 8 else ["", "10le"]:
        for chroma in (frame.chroma, "420", "422"):
            if f"yuv{chroma}p{bits}" in possible:
                return f"yuv{chroma}p{bits}"
    raise VideoError(f"{codec.encoder} takes none of the pixel formats known here. Choose another codec.")


PACKET = struct.Struct("<qqqBI")  # pts, dts, duration, key frame, bytes: what no container would keep exactly


def _store(file: BinaryIO, packets: list[Packet[Any]]) -> None:
    for packet in packets:
        assert packet.pts is not None and packet.dts is not None
        file.write(PACKET.pack(packet.pts, packet.dts, packet.duration or 0, packet.is_keyframe, packet.size))
        file.write(bytes(packet))


def _stored(path: Path) -> Iterator[Packet[Any]]:
    import av

    with path.open("rb") as file:
        while head := file.read(PACKET.size):
            pts, dts, duration, key, size = PACKET.unpack(head)
            packet: Packet[Any] = av.Packet(file.read(size))
            packet.pts, packet.dts, packet.duration, packet.is_keyframe = pts, dts, duration, bool(key)
            yield packet


# ------------------------------------------------------------------------------------------------- joining


def _join(
    segments: list[Path],
    source: str | Path | BinaryIO,
    path: Path,
    container: str,
    codec: Codec,
    picture: Picture,
    plain: bool = False,
) -> None:
    """Video from the segments and everything else from the source into one file, without encoding video again.

    plain: encode all audio anew and leave subtitles out, as any container can hold it.
    """
    import av

    options = {"movflags": "+faststart"} if container in ("mp4", "mov") else {}
    with _opened(source) as file, av.open(str(path), "w", format=container, options=options) as out:
        video = _video_stream(file, str(path))
        out.metadata.update(_tags(file.metadata))
        if hasattr(file, "chapters") and file.chapters():
            out.set_chapters(file.chapters())
        stream: VideoStream = out.add_stream(codec.encoder, rate=video.average_rate or 25)
        picture.set_up(stream.codec_context, codec, video)  # opened for the header that it writes
        if codec.encoder == "libx265" and container in ("mp4", "mov"):
            stream.codec_context.codec_tag = "hvc1"  # the name that Apple's players ask for
        stream.time_base = video.time_base
        stream.metadata.update(_tags(video.metadata))
        copies = {s: copy for s in file.streams if s.type in ("audio", "subtitle") if (copy := _copy(out, s, plain))}
        others = _other_packets(file, copies) if copies else iter(())
        for packet in heapq.merge(_video_packets(segments, stream, video), others, key=_when):
            try:
                out.mux(packet)
            except av.error.InvalidDataError:
                if packet.stream is stream:
                    raise
                log.warning("a damaged packet of %s is left out", packet.stream.type)


def _tags(metadata: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in metadata.items() if key.lower() not in NOT_COPIED_TAGS}


def _when(packet: Packet[Any]) -> float:
    ticks = packet.dts if packet.dts is not None else packet.pts or 0
    return float(ticks * packet.time_base)


def _video_packets(segments: list[Path], stream: VideoStream, video: VideoStream) -> Iterator[Packet[Any]]:
    last: int | None = None
    for packet in chain.from_iterable(map(_stored, segments)):
        # An encoder starts a segment with decoding times before those that the segment before has ended on. There is
        # room: with frames reordered over d places, that one ends on a decoding time d frames before its last.
        if last is not None and packet.dts is not None:
            packet.dts = max(packet.dts, last + 1)
        last = packet.dts
        packet.stream = stream
        packet.time_base = video.time_base  # type: ignore[assignment]
        yield packet


def _copy(out: OutputContainer, stream: Stream, plain: bool) -> Stream | None:
    """A place in the output for a stream of the source: as it is if the container can hold it, else encoded anew."""
    container = out.format.name
    pcm_in_mp4 = container == "mp4" and stream.name is not None and stream.name.startswith("pcm")  # few play that
    copy: Stream
    try:
        if not (plain or pcm_in_mp4):
            copy = out.add_stream_from_template(stream, opaque=True)
            copy.metadata.update(_tags(stream.metadata))
            return copy
    except ValueError:
        pass
    if stream.type != "audio" or stream.codec_context is None:
        log.warning("%s stream %d is left out: %s cannot hold it", stream.type, stream.index, container)
        return None
    log.warning("audio stream %d is encoded anew: %s cannot hold it as it is", stream.index, container)
    copy = out.add_stream("libopus" if container == "webm" else "aac", rate=48000, bit_rate=256_000)
    channels = stream.codec_context.layout.nb_channels  # type: ignore[attr-defined]
    copy.codec_context.layout = LAYOUTS.get(channels, "stereo")
    copy.metadata.update(_tags(stream.metadata))
    return copy


def _other_packets(file: InputContainer, copies: Mapping[Stream, Stream]) -> Iterator[Packet[Any]]:
    import av

    for packet in file.demux(list(copies)):
        copy = copies[packet.stream]
        if copy.codec_context.is_encoder:
            with suppress(av.error.InvalidDataError):  # damaged: as a player does, go on behind it
                for frame in packet.decode():
                    yield from copy.encode(frame)  # type: ignore[attr-defined]
            if packet.size == 0:  # the end of the stream
                yield from copy.encode(None)  # type: ignore[attr-defined]
        elif packet.size:
            packet.stream = copy
            yield packet
