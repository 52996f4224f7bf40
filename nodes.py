"""The nodes, and all that this pack knows of ComfyUI: its folders, its model management, its upscale models.

Torch, spandrel and the networks are imported when a node runs; nothing here slows the host's start.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import folder_paths
from comfy import model_management, model_patcher
from comfy.utils import ProgressBar
from comfy_api.latest import ComfyExtension, io

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


class PFTSRExtension(ComfyExtension):
    """The pack as the host sees it."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        # not in on_load, which the oldest hosts never call
        register_folder()
        register_architecture()
        return [PFTSRLoadModel, PFTSRLoadModelFromHub, PFTSRUpscale]


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
    """`pft_arch.upscale` under the host's memory management, progress bar and cancel button."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PFTSRUpscale",
            display_name="PFT-SR Upscale",
            category=CATEGORY,
            description="Enlarges images with a PFT-SR model, in tiles that follow the model's own windows. "
            "Transparency and greyscale are kept.",
            inputs=[
                io.UpscaleModel.Input("upscale_model", tooltip="A model from PFT-SR Load Model."),
                io.Image.Input("image", tooltip="The image, or a batch of images such as the frames of a video."),
                io.Int.Input(
                    "tile",
                    default=0,
                    min=0,
                    max=8192,
                    step=32,
                    tooltip="Side of a tile in pixels of the original image. 0 chooses it from the free memory, and "
                    "takes the whole image at once where it fits. Smaller tiles need less memory.",
                ),
                io.Int.Input(
                    "overlap",
                    default=0,
                    min=0,
                    max=512,
                    step=8,
                    tooltip="How far neighbouring tiles overlap, in pixels of the original image. 0 chooses it by the "
                    "model's windows, such that no seam shows. More takes longer.",
                ),
            ],
            outputs=[io.Image.Output(tooltip="The enlarged images.")],
        )

    @classmethod
    def execute(
        cls, upscale_model: ImageModelDescriptor[Any], image: torch.Tensor, tile: int, overlap: int
    ) -> io.NodeOutput:
        from .pft_arch import PFTSR, upscale

        network = getattr(upscale_model, "model", upscale_model)
        if not isinstance(network, PFTSR):
            raise TypeError(
                f"PFT-SR Upscale works with PFT-SR models only, and this is a {type(network).__name__} model. "
                "Connect it to the node 'Upscale Image (using Model)', or choose a model in PFT-SR Load Model."
            )
        bring_to_device(upscale_model, image, tile)
        bar = ProgressBar(image.shape[0])
        result = upscale(
            image,
            network,
            tile=tile,
            overlap=overlap,
            progress=bar.update_absolute,
            check_cancel=model_management.throw_exception_if_processing_interrupted,
        )
        return io.NodeOutput(result.to(model_management.intermediate_device(), image.dtype))


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
