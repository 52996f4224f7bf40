"""The nodes: what they are called, what they take, and which functions of `pft_arch` do their work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comfy_api.latest import ComfyExtension, Input, InputImpl, io, ui
from server import PromptServer

from .comfy_host import (
    AS_LOADED,
    PRECISIONS,
    Display,
    bring_to_device,
    check_cancel,
    check_host_memory,
    download_progress,
    for_others,
    hub_file,
    known_path,
    load,
    local_path,
    model_names,
    model_path,
    own_folder,
    pft_model,
    register_architecture,
    register_folder,
    temporary_file,
    tile_room,
    version,
    video_source,
)

if TYPE_CHECKING:
    import torch
    from spandrel import ImageModelDescriptor

CATEGORY = "image/upscaling"
LAYOUTS = ("sheet", "batch")
SEARCH_WORDS = ["super resolution", "superres", "enlarge", "hires", "resize"]


class PFTSRExtension(ComfyExtension):
    """The pack as the host sees it."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        # not in on_load, which the oldest hosts never call
        register_folder()
        register_architecture()
        return [PFTSRLoadModel, PFTSRLoadModelFromHub, PFTSRUpscale, PFTSRUpscaleVideo, PFTSRAttentionMap, PFTSRCompare]


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
        schema = io.Schema(
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
                ensemble_input(),
                precision_override(),
            ],
            outputs=[io.Image.Output(tooltip="The enlarged images.")],
        )
        schema.search_aliases = SEARCH_WORDS  # no keyword, as in `advanced`
        return schema

    @classmethod
    def execute(
        cls,
        upscale_model: ImageModelDescriptor[Any],
        image: torch.Tensor,
        tile: int,
        overlap: int,
        resize: str = "model scale",
        ensemble: bool = False,
        precision: str = AS_LOADED,
        **size: Any,
    ) -> io.NodeOutput:
        from .pft_arch.target import plan, upscale_to

        model = pft_model(upscale_model, precision)
        frames, rows, columns, channels = image.shape
        how = plan((rows, columns), model.scale, resize, **size)
        check_host_memory(how.host_bytes(frames, channels))
        if how.passes:
            bring_to_device(model, tile_room(model.model, rows, columns, tile))
        display = Display()
        result = upscale_to(
            image,
            model.model,
            how,
            tile=tile,
            overlap=overlap,
            ensemble=ensemble,
            progress=display.progress,
            check_cancel=check_cancel,
            preview=display.preview,
        )
        return io.NodeOutput(for_others(result))


class PFTSRUpscaleVideo(io.ComfyNode):
    """`pft_arch.video` between the host's VIDEO files."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        schema = io.Schema(
            node_id="PFTSRUpscaleVideo",
            display_name="PFT-SR Upscale Video",
            category=CATEGORY,
            description="Enlarges a video to any size with a PFT-SR model, frame by frame, so that a long video "
            "takes no more memory than a short one. Sound, subtitles and timing are kept.",
            inputs=[
                upscale_model_input(),
                io.Video.Input("video", tooltip="The video, for example from Load Video."),
                *tile_inputs(),
                io.Int.Input(
                    "quality",
                    default=16,
                    min=0,
                    max=51,
                    tooltip="Constant rate factor of the H.264 encoder: lower is better and makes a larger file. 16 "
                    "can hardly be told from the frames themselves, 23 is common for the web, 0 loses nothing.",
                ),
                precision_override(),
                *target_inputs(),
            ],
            outputs=[io.Video.Output(tooltip="The enlarged video, for Save Video. Its file is a temporary one.")],
        )
        schema.search_aliases = [f"{words} video" for words in SEARCH_WORDS]
        return schema

    @classmethod
    def execute(
        cls,
        upscale_model: ImageModelDescriptor[Any],
        video: Input.Video,
        tile: int,
        overlap: int,
        quality: int,
        precision: str = AS_LOADED,
        resize: str = "model scale",
        **size: Any,
    ) -> io.NodeOutput:
        from .pft_arch.target import plan
        from .pft_arch.video import upscale_video

        model = pft_model(upscale_model, precision)
        width, height = video.get_dimensions()
        bring_to_device(model, tile_room(model.model, height, width, tile))
        target = temporary_file()
        display = Display()
        with video_source(video) as source:
            upscale_video(
                source,
                target,
                model.model,
                tile=tile,
                overlap=overlap,
                quality=quality,
                size=lambda source: plan(source, model.scale, resize, **size),
                progress=display.progress,
                check_cancel=check_cancel,
                preview=display.preview,
            )
        return io.NodeOutput(InputImpl.VideoFromFile(str(target)))


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
        from .pft_arch.attention_map import attention_at, bytes_needed, draw_batch, draw_sheet

        model = pft_model(upscale_model)
        rows, columns = image.shape[1:3]
        row, column = min(rows - 1, int(y * rows)), min(columns - 1, int(x * columns))
        bring_to_device(model, bytes_needed(model.model))
        draw = draw_sheet if layout == LAYOUTS[0] else draw_batch
        layers = attention_at(image[0], model.model, row, column, Display().progress)
        return io.NodeOutput(for_others(draw(image[0], layers, row, column, head)))


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
        return io.NodeOutput(report, for_others(difference), ui=ui.PreviewText(report))


# inputs that nodes share


def advanced(widget: Any) -> Any:
    """Folded away where the host can. As a keyword of the input, older hosts would not know it, and load no node."""
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


def ensemble_input() -> io.Boolean.Input:
    return advanced(
        io.Boolean.Input(
            "ensemble",
            default=False,
            optional=True,
            tooltip="The mean over 8 positions of the image, turned and mirrored. Slightly better, and takes 8 times "
            "as long.",
        )
    )


def precision_input() -> io.Combo.Input:
    return io.Combo.Input(
        "precision",
        options=list(PRECISIONS),
        default="auto",
        tooltip="Number format of the calculation. auto: fp16 on an NVIDIA or AMD GPU, else fp32. fp16 and "
        "bf16 need half the memory; fp32 is the most exact, and on a CPU the fastest.",
    )


def precision_override() -> io.Combo.Input:
    return advanced(
        io.Combo.Input(
            "precision",
            options=[AS_LOADED, *PRECISIONS],
            default=AS_LOADED,
            optional=True,
            tooltip="Number format of the calculation, where it is to differ from the loader's. The core node Load "
            "Upscale Model always loads in fp32: auto lets the model run in fp16 where the GPU is good at it.",
        )
    )
