"""What the nodes ask of the host: its folders, its upscale models and their memory, its display, its videos.

Torch, spandrel and the networks are imported when a node runs.
"""

from __future__ import annotations

import inspect
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import folder_paths
from comfy import model_management, model_patcher
from comfy.utils import ProgressBar
from comfy_api.latest import Input, InputImpl

if TYPE_CHECKING:
    import torch
    from spandrel import ImageModelDescriptor

    from .pft_arch import PFTSR
    from .pft_arch.hub import HubFile

OWN_FOLDER = "pft_sr"
FOLDERS = (OWN_FOLDER, "upscale_models")  # under the host's models; a choice outside the catalogue is "folder/file"
ROOM_SIDE = 256  # of an automatic tile that other models are unloaded for; larger ones are hardly faster, and free
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
AS_LOADED = "as loaded"
PREVIEW_SIDE, PREVIEW_SECONDS = 512, 0.4  # longer side of the live preview, and the time between two

# files


def register_folder() -> None:
    """Make models/pft_sr known to the host, beside whatever extra_model_paths.yaml has named so before."""
    from .pft_arch.weights import SUFFIXES

    folder_paths.add_model_folder_path(OWN_FOLDER, str(own_folder()))
    paths, _ = folder_paths.folder_names_and_paths[OWN_FOLDER]
    folder_paths.folder_names_and_paths[OWN_FOLDER] = (paths, set(SUFFIXES))  # as it is: files of any kind


def register_architecture() -> None:
    """Let the core's own loader open PFT files. It has imported spandrel by now, unless the host lacks it."""
    if "spandrel" in sys.modules:
        from .pft_arch.descriptor import register

        register()


def own_folder() -> Path:
    """models/pft_sr, where downloads and the user's catalogue.toml lie."""
    return Path(folder_paths.models_dir, OWN_FOLDER)


def model_names() -> list[str]:
    """What the user may choose: the names of the catalogue, then every PFT file as "folder/file"."""
    from .pft_arch.catalogue import catalogue
    from .pft_arch.hub import STAGING

    names = list(catalogue(own_folder()))
    for folder in FOLDERS:
        for file in folder_paths.get_filename_list(folder):
            path = folder_paths.get_full_path(folder, file)
            if path is not None and STAGING not in Path(file).parts and is_pft(path):
                names.append(f"{folder}/{file}")
    return names


def model_path(choice: str) -> Path:
    """The file behind one of `model_names`, downloaded if need be."""
    from .pft_arch.weights import resolve

    folder, _, file = choice.partition("/")
    if folder in FOLDERS:
        return Path(folder_paths.get_full_path_or_raise(folder, file))
    return resolve(choice, own_folder(), download_progress())


def local_path(text: str) -> Path:
    """A path as users paste it: quoted by a file manager, or from their home."""
    return Path(text.strip().strip("\"'")).expanduser()


def known_path(choice: str) -> Path:
    """Where that file lies, or will lie once it has been downloaded."""
    from .pft_arch.catalogue import catalogue
    from .pft_arch.hub import variant_path

    variant = catalogue(own_folder()).get(choice)
    return variant_path(variant, own_folder()) if variant and variant.source == "hub" else model_path(choice)


def version(path: Path) -> str:
    """Changes when a file is replaced under its old name, so that it is loaded anew."""
    stat = path.stat() if path.is_file() else None
    return f"{stat.st_mtime_ns} {stat.st_size}" if stat else ""


def hub_file(repo_id: str, filename: str, revision: str) -> HubFile:
    from .pft_arch.hub import HubFile

    return HubFile(repo_id.strip(), filename.strip(), revision.strip() or "main")


def download_progress() -> Callable[[int, int], None]:
    """Shows a download in the node, and stops it on cancel."""
    bars: list[ProgressBar] = []  # made with the first report: a bar before it would clear another node's

    def progress(done: int, total: int) -> None:
        check_cancel()
        if not bars:
            bars.append(ProgressBar(total))
        bars[0].update_absolute(done, total)

    return progress


def is_pft(path: str) -> bool:
    """`weights.is_pft_file`, asked once per version of a file: the host asks for the names very often."""
    try:
        stat = Path(path).stat()
    except OSError:  # deleted since it was listed
        return False
    return _is_pft(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=4096)
def _is_pft(path: str, *_version: int) -> bool:
    from .pft_arch.weights import is_pft_file

    return is_pft_file(path)


# the host's upscale models and its memory


def load(path: Path, precision: str) -> ImageModelDescriptor[PFTSR]:
    from .pft_arch import load_model

    device = model_management.unet_offload_device()
    return as_upscale_model(load_model(path, device=device, dtype=choose_dtype(precision)))


def choose_dtype(precision: str) -> torch.dtype:
    """The number format of a choice; auto is fp16 where the host computes by CUDA or ROCm on a GPU good at it."""
    import torch

    if precision == "auto":
        device = model_management.get_torch_device()
        half = model_management.is_device_cuda(device) and model_management.should_use_fp16(device)
        precision = "fp16" if half else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def as_upscale_model(network: PFTSR) -> ImageModelDescriptor[PFTSR]:
    """What the host and other packs expect of an UPSCALE_MODEL, with the patcher that newer hosts read off it."""
    from .pft_arch.descriptor import describe_network

    try:
        import spandrel  # noqa: F401 (tells whether it is there)
    except ImportError as error:
        raise ImportError(
            "PFT-SR Load Model needs the package spandrel, which ComfyUI's own requirements.txt lists. "
            "Install it into ComfyUI's Python: pip install spandrel"
        ) from error

    model = describe_network(network)
    model.patcher = make_patcher(network)
    return model


def pft_model(upscale_model: ImageModelDescriptor[Any], precision: str = AS_LOADED) -> ImageModelDescriptor[PFTSR]:
    """The model that a node was given if it is one of ours, in another precision if need be."""
    from .pft_arch import PFTSR
    from .pft_arch.upscale import in_dtype

    network = getattr(upscale_model, "model", upscale_model)
    if not isinstance(network, PFTSR):
        raise TypeError(
            f"PFT-SR nodes work with PFT-SR models only, and upscale_model is a {type(network).__name__} model. "
            "Connect it to the node 'Upscale Image (using Model)', or choose a model in PFT-SR Load Model."
        )
    dtype = next(network.parameters()).dtype if precision == AS_LOADED else choose_dtype(precision)
    return upscale_model if next(network.parameters()).dtype == dtype else as_upscale_model(in_dtype(network, dtype))


def check_host_memory(needed: float) -> None:
    """Refuse what would have the system end the host, and all unsaved work with it."""
    import torch

    free = model_management.get_free_memory(torch.device("cpu"))
    if needed > free:
        raise MemoryError(
            f"The result needs {needed / 2**30:.1f} GB of main memory, and {free / 2**30:.1f} GB are free. Choose a "
            "smaller size by resize, or give fewer images at once."
        )


def for_others(images: torch.Tensor) -> torch.Tensor:
    """Images where, and as, the host wants them between nodes."""
    dtype = getattr(model_management, "intermediate_dtype", lambda: images.dtype)()  # since 0.17
    return images.to(model_management.intermediate_device(), dtype)


def check_cancel() -> None:
    """Raises what the host stops a node by, if the user has cancelled."""
    model_management.throw_exception_if_processing_interrupted()


class Display:
    """What a node shows while it works: its progress, and now and then the picture so far."""

    def __init__(self) -> None:
        self.bar: ProgressBar | None = None
        self.picture: tuple[str, Any, None] | None = None
        self.shown = 0.0

    def preview(self, picture: torch.Tensor) -> None:
        """(H, W, C): kept until the next report of progress, which it travels with."""
        from PIL import Image

        if time.monotonic() - self.shown < PREVIEW_SECONDS:
            return
        step = -(-max(picture.shape[:2]) // PREVIEW_SIDE)
        small = (picture[::step, ::step].clamp(0, 1) * 255).byte().cpu()
        self.picture = ("JPEG", Image.fromarray(small.expand(-1, -1, 3).numpy()), None)
        self.shown = time.monotonic()

    def progress(self, done: int, total: int) -> None:
        check_cancel()
        self.bar = self.bar or ProgressBar(total)
        self.bar.update_absolute(done, total, self.picture)
        self.picture = None


def make_patcher(network: PFTSR) -> Any:
    """The host's handle on a model's memory. Its class is looked up now: the host replaces it while it starts."""
    patcher = getattr(model_patcher, "CoreModelPatcher", model_patcher.ModelPatcher)
    return patcher(
        network,
        load_device=model_management.get_torch_device(),
        offload_device=model_management.unet_offload_device(),
    )


def bring_to_device(model: ImageModelDescriptor[PFTSR], room: float) -> None:
    """Let the host make room, in bytes, and load the network, and see to it that every weight has arrived."""
    if getattr(model, "patcher", None) is None:  # loaded by a host before 0.28
        model.patcher = make_patcher(model.model)
    model_management.load_models_gpu([model.patcher], memory_required=room, force_full_load=True)
    model.model.to(model.patcher.load_device)


def tile_room(network: PFTSR, height: int, width: int, tile: int) -> float:
    """Bytes worth unloading other models for. With more the tiles grow, with less they shrink; both work."""
    from .pft_arch.memory import peak_bytes

    side = tile or ROOM_SIDE
    return 1.5 * peak_bytes(network, min(side, height), min(side, width))


@contextmanager
def video_source(video: Input.Video) -> Iterator[str | BytesIO]:
    """A video as FFmpeg may read it. What is not a whole file is written to one, of high quality, for that long."""
    if isinstance(video, InputImpl.VideoFromFile):
        source = video.get_stream_source()
        if video.get_duration() == InputImpl.VideoFromFile(source).get_duration():  # not trimmed
            yield source
            return
    width, height = video.get_dimensions()
    if width % 2 or height % 2:
        raise ValueError(
            f"The frames of video are {width} x {height} pixels, and H.264, which is to hold them, needs even numbers. "
            "Enlarge the images by PFT-SR Upscale before Create Video, or crop them"
        )
    path = temporary_file()
    newer = {"crf": 8} if "crf" in inspect.signature(video.save_to).parameters else {}
    try:
        video.save_to(str(path), **newer)
        yield str(path)
    finally:
        path.unlink(missing_ok=True)


def temporary_file() -> Path:
    """A name for a video in the host's temporary folder, which the host empties when it starts."""
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"pft_sr_{uuid.uuid4().hex}.mp4"
