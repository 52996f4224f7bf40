"""The nodes, and all that this pack knows of ComfyUI: its folders, its model management, its upscale models.

Torch, spandrel and the networks are imported when a node runs; nothing here slows the host's start.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import folder_paths
from comfy import model_management, model_patcher
from comfy.utils import ProgressBar
from comfy_api.latest import ComfyExtension, io, ui
from server import PromptServer

if TYPE_CHECKING:
    import torch
    from spandrel import ImageModelDescriptor

    from .pft_arch import PFTSR
    from .pft_arch.hub import HubFile

CATEGORY = "image/upscaling"
OWN_FOLDER = "pft_sr"
FOLDERS = (OWN_FOLDER, "upscale_models")  # under the host's models; a choice outside the catalogue is "folder/file"
TYPICAL_SIDE = 512  # pixels of an image's side that the host is asked to make room for where the tile is automatic
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
AS_LOADED = "as loaded"
LAYOUTS = ("sheet", "batch")
PREVIEW_SIDE, PREVIEW_SECONDS = 512, 0.4  # longer side of the live preview, and the time between two


class PFTSRExtension(ComfyExtension):
    """The pack as the host sees it."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        # not in on_load, which the oldest hosts never call
        register_folder()
        register_architecture()
        return [PFTSRLoadModel, PFTSRLoadModelFromHub, PFTSRUpscale, PFTSRAttentionMap, PFTSRCompare]


def precision_input() -> io.Combo.Input:
    return io.Combo.Input(
        "precision",
        options=list(PRECISIONS),
        default="auto",
        tooltip="Number format of the calculation. auto: fp16 on an NVIDIA or AMD GPU, else fp32. fp16 and "
        "bf16 need half the memory; fp32 is the most exact, and on a CPU the fastest.",
    )


class PFTSRLoadModel(io.ComfyNode):
    """A name from the catalogue, or a PFT file in the host's folders, as the host's UPSCALE_MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PFTSRLoadModel",
            display_name="PFT-SR Load Model",
            category=CATEGORY,
            description="Loads a PFT-SR super-resolution model. The result also works in every other node that takes "
            "an upscale model, such as Upscale Image (using Model).",
            inputs=[
                io.Combo.Input(
                    "model",
                    options=model_names(),
                    tooltip="A model of the catalogue, which is downloaded into models/pft_sr when it is first used "
                    "unless it comes with this pack, or a PFT-SR file (.safetensors or .pth) of your own in "
                    "models/pft_sr or models/upscale_models. Files of other architectures are not listed.",
                ),
                precision_input(),
                io.String.Input(
                    "file",
                    default="",
                    optional=True,
                    tooltip="Path of a PFT-SR file anywhere on ComfyUI's machine, taken in place of the model above. "
                    "Leave it empty to choose by name.",
                ),
            ],
            outputs=[io.UpscaleModel.Output(tooltip="The model, for PFT-SR Upscale or any other upscale node.")],
        )

    @classmethod
    def fingerprint_inputs(cls, model: str, precision: str, file: str = "") -> str:
        return version(local_path(file) if file.strip() else known_path(model))

    @classmethod
    def execute(cls, model: str, precision: str, file: str = "") -> io.NodeOutput:
        return io.NodeOutput(load(local_path(file) if file.strip() else model_path(model), precision))


class PFTSRLoadModelFromHub(io.ComfyNode):
    """Any PFT file on the Hugging Face Hub, downloaded once, as the host's UPSCALE_MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PFTSRLoadModelFromHub",
            display_name="PFT-SR Load Model from Hub",
            category=CATEGORY,
            description="Loads a PFT-SR model from the Hugging Face Hub. The file is downloaded into models/pft_sr "
            "once, and then works without network.",
            inputs=[
                io.String.Input("repo_id", default="", tooltip="The repo on the Hub, as user/repo."),
                io.String.Input(
                    "filename", default="model.safetensors", tooltip="The file in the repo, .safetensors or .pth."
                ),
                io.String.Input(
                    "revision",
                    default="main",
                    tooltip="Branch, tag or commit. Of a branch the file is fetched once; a commit says exactly which.",
                ),
                precision_input(),
            ],
            outputs=[io.UpscaleModel.Output(tooltip="The model, for PFT-SR Upscale or any other upscale node.")],
        )

    @classmethod
    def fingerprint_inputs(cls, repo_id: str, filename: str, revision: str, precision: str) -> str:
        return version(hub_file(repo_id, filename, revision).path(own_folder()))

    @classmethod
    def execute(cls, repo_id: str, filename: str, revision: str, precision: str) -> io.NodeOutput:
        from .pft_arch.hub import fetch

        path = fetch(hub_file(repo_id, filename, revision), own_folder(), download_progress())
        return io.NodeOutput(load(path, precision))


class PFTSRUpscale(io.ComfyNode):
    """`pft_arch.target` under the host's memory management, progress bar, preview and cancel button."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PFTSRUpscale",
            display_name="PFT-SR Upscale",
            category=CATEGORY,
            description="Enlarges images to any size with a PFT-SR model, in tiles that follow the model's own "
            "windows. Transparency and greyscale are kept.",
            inputs=[
                upscale_model_input(),
                io.Image.Input("image", tooltip="The image, or a batch of images such as the frames of a video."),
                *tile_inputs(),
                *target_inputs(),
                *quality_inputs(),
            ],
            outputs=[io.Image.Output(tooltip="The enlarged images.")],
        )

    @classmethod
    def execute(
        cls,
        upscale_model: ImageModelDescriptor[Any],
        image: torch.Tensor,
        tile: int,
        overlap: int,
        resize: str = "model scale",
        factor: float = 2.0,
        megapixels: float = 4.0,
        width: int = 1920,
        height: int = 1080,
        ensemble: bool = False,
        precision: str = AS_LOADED,
    ) -> io.NodeOutput:
        from .pft_arch.target import plan, upscale_to

        model = pft_model(upscale_model, precision)
        frames, rows, columns, channels = image.shape
        how = plan(
            (rows, columns), model.scale, resize, factor=factor, megapixels=megapixels, width=width, height=height
        )
        check_host_memory(how.host_bytes(frames, channels))
        bring_to_device(model, image, tile)
        display = Display()
        result = upscale_to(
            image,
            model.model,
            how,
            tile=tile,
            overlap=overlap,
            ensemble=ensemble,
            progress=display.progress,
            check_cancel=model_management.throw_exception_if_processing_interrupted,
            preview=display.preview,
        )
        return io.NodeOutput(result.to(model_management.intermediate_device(), image.dtype))


class PFTSRAttentionMap(io.ComfyNode):
    """Where the network looks from one pixel, layer by layer."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PFTSRAttentionMap",
            display_name="PFT-SR Attention Map",
            category=CATEGORY,
            description="Shows from where in an image a PFT-SR model takes what it needs to enlarge one pixel: layer "
            "by layer, the attention focuses on fewer places.",
            inputs=[
                upscale_model_input(),
                io.Image.Input("image", tooltip="The image, before upscaling. Of a batch the first is taken."),
                io.Float.Input(
                    "x",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    round=0.0001,
                    tooltip="The pixel's place across the image: 0 is the left edge, 1 the right edge.",
                ),
                io.Float.Input(
                    "y",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    round=0.0001,
                    tooltip="The pixel's place down the image: 0 is the upper edge, 1 the lower edge.",
                ),
                io.Int.Input(
                    "head",
                    default=0,
                    min=0,
                    max=256,
                    tooltip="Which of the attention heads to show, from 1 on. 0 shows their mean.",
                ),
                io.Combo.Input(
                    "layout",
                    options=list(LAYOUTS),
                    default=LAYOUTS[0],
                    tooltip="One sheet with all layers, or a batch with an image for each.",
                ),
            ],
            outputs=[io.Image.Output(tooltip="The picture of the window around the pixel, under the attention.")],
        )

    @classmethod
    def execute(
        cls, upscale_model: ImageModelDescriptor[Any], image: torch.Tensor, x: float, y: float, head: int, layout: str
    ) -> io.NodeOutput:
        from .pft_arch.attention_map import attention_at, draw_batch, draw_sheet

        model = pft_model(upscale_model)
        rows, columns = image.shape[1:3]
        row, column = min(rows - 1, int(y * rows)), min(columns - 1, int(x * columns))
        bring_to_device(model, image[:1, :TYPICAL_SIDE, :TYPICAL_SIDE], 0)
        draw = draw_sheet if layout == LAYOUTS[0] else draw_batch
        layers = attention_at(image[0], model.model, row, column)
        return io.NodeOutput(draw(image[0], layers, row, column, head))


class PFTSRCompare(io.ComfyNode):
    """`pft_arch.metrics` of two images, and a picture of their difference."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PFTSRCompare",
            display_name="PFT-SR Compare",
            category=CATEGORY,
            description="Measures how close an image is to a reference of the same size: PSNR and SSIM as in the "
            "papers on super-resolution, and a picture of the difference.",
            inputs=[
                io.Image.Input("image", tooltip="The image to judge, or a batch."),
                io.Image.Input(
                    "reference", tooltip="What it should look like: as many images of the same size, or one."
                ),
                io.Int.Input(
                    "border",
                    default=0,
                    min=0,
                    max=256,
                    tooltip="Pixels to leave out on every side. Papers leave out as many as the upscaling factor.",
                ),
                io.Float.Input(
                    "gain",
                    default=4.0,
                    min=1.0,
                    max=100.0,
                    step=0.5,
                    tooltip="How much brighter than it is the difference is shown. Black is no difference.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="PSNR in dB and SSIM, of each image and on average."),
                io.Image.Output(
                    display_name="difference", tooltip="The absolute difference, made brighter by the gain."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, image: torch.Tensor, reference: torch.Tensor, border: int, gain: float) -> io.NodeOutput:
        from .pft_arch.metrics import compare

        report, difference = compare(image, reference, border, gain)
        PromptServer.instance.send_progress_text(report, cls.hidden.unique_id)  # into the node itself
        return io.NodeOutput(report, difference, ui=ui.PreviewText(report))


# inputs that nodes share


def advanced(widget: Any) -> Any:
    """Folded away where the host can. As a keyword, which older hosts do not know, it would stop the pack there."""
    widget.advanced = True
    return widget


def upscale_model_input() -> io.UpscaleModel.Input:
    return io.UpscaleModel.Input("upscale_model", tooltip="A model from PFT-SR Load Model.")


def tile_inputs() -> list[io.Int.Input]:
    return [
        io.Int.Input(
            "tile",
            default=0,
            min=0,
            max=8192,
            step=32,
            tooltip="Side of a tile in pixels of the original image. 0 chooses it from the free memory, and takes the "
            "whole image at once where it fits. Smaller tiles need less memory.",
        ),
        advanced(
            io.Int.Input(
                "overlap",
                default=0,
                min=0,
                max=512,
                step=8,
                tooltip="How far neighbouring tiles overlap, in pixels of the original image. 0 chooses it by the "
                "model's windows, such that no seam shows. More takes longer.",
            )
        ),
    ]


def target_inputs() -> list[Any]:
    """Optional, as all inputs that came later: workflows saved before have no value for them."""
    from .pft_arch.target import MODES

    return [
        io.Combo.Input(
            "resize",
            options=list(MODES),
            default=MODES[0],
            optional=True,
            tooltip="The size of the result. model scale: as the model enlarges, by 2, 3 or 4. factor, megapixels: see "
            "below. fit inside: as large as width x height allows, whole. fill and crop: exactly width x height, what "
            "stands out is cut off. stretch: exactly width x height, proportions given up. The model runs as often as "
            "it takes, at most to 16 times the size, and then the picture is made smaller once.",
        ),
        io.Float.Input(
            "factor",
            default=2.0,
            min=1.0,
            max=16.0,
            step=0.05,
            optional=True,
            tooltip="Where resize is factor: how many times as wide and as high.",
        ),
        io.Float.Input(
            "megapixels",
            default=4.0,
            min=0.01,
            max=1000.0,
            step=0.05,
            optional=True,
            tooltip="Where resize is megapixels: width times height of the result, in millions.",
        ),
        io.Int.Input(
            "width",
            default=1920,
            min=0,
            max=32768,
            optional=True,
            tooltip="Where resize is fit inside, fill and crop, or stretch. 0 lets it follow from the height.",
        ),
        io.Int.Input(
            "height",
            default=1080,
            min=0,
            max=32768,
            optional=True,
            tooltip="Where resize is fit inside, fill and crop, or stretch. 0 lets it follow from the width.",
        ),
    ]


def quality_inputs() -> list[Any]:
    return [
        advanced(
            io.Boolean.Input(
                "ensemble",
                default=False,
                optional=True,
                tooltip="The mean over 8 positions of the image, turned and mirrored. Slightly better, and takes 8 "
                "times as long.",
            )
        ),
        advanced(
            io.Combo.Input(
                "precision",
                options=[AS_LOADED, *PRECISIONS],
                default=AS_LOADED,
                optional=True,
                tooltip="Number format of the calculation, where it is to differ from the loader's. The core node "
                "Load Upscale Model always loads in fp32: auto lets the model run in fp16 where the GPU is good at it.",
            )
        ),
    ]


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
        model_management.throw_exception_if_processing_interrupted()
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


class Display:
    """What a node shows while it works: its progress, and now and then the picture so far."""

    def __init__(self) -> None:
        self.bar: ProgressBar | None = None
        self.picture: tuple[str, Any, int] | None = None
        self.shown = 0.0

    def preview(self, picture: torch.Tensor) -> None:
        """(H, W, C): kept until the next report of progress, which it travels with."""
        from PIL import Image

        if time.monotonic() - self.shown < PREVIEW_SECONDS:
            return
        step = -(-max(picture.shape[:2]) // PREVIEW_SIDE)
        small = (picture[::step, ::step].clamp(0, 1) * 255).byte().cpu()
        self.picture = ("JPEG", Image.fromarray(small.expand(-1, -1, 3).numpy()), PREVIEW_SIDE)
        self.shown = time.monotonic()

    def progress(self, done: int, total: int) -> None:
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


def bring_to_device(model: ImageModelDescriptor[PFTSR], image: torch.Tensor, tile: int) -> None:
    """Let the host make room and load the network, and see to it that every weight has arrived."""
    if getattr(model, "patcher", None) is None:  # loaded by a host before 0.28
        model.patcher = make_patcher(model.model)
    room = memory_required(model.model, image, tile)
    model_management.load_models_gpu([model.patcher], memory_required=room, force_full_load=True)
    model.model.to(model.patcher.load_device)


def memory_required(network: PFTSR, image: torch.Tensor, tile: int) -> float:
    """Bytes worth unloading other models for. With more the tiles grow, with less they shrink; both work."""
    from .pft_arch.upscale import bytes_per_pixel

    height, width = (min(side, tile or TYPICAL_SIDE) for side in image.shape[1:3])
    return 1.5 * bytes_per_pixel(network) * height * width
