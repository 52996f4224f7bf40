"""Writes a Stable Diffusion 1.5 checkpoint of one level, with random weights:  make_checkpoint.py COMFYUI FILE

It stands in for the generator that no package registry has: the host's own nodes load it, encode a prompt, sample and
decode as with the real one, in seconds on a CPU, and coloured noise comes out. Runs in the host's Python.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

comfyui, target = sys.argv[1:]
sys.path.insert(0, comfyui)

import torch  # noqa: E402
from comfy.cli_args import args  # noqa: E402

args.cpu = True  # before anything of ComfyUI asks for a device
from comfy import clip_model, ops  # noqa: E402
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel  # noqa: E402
from comfy.taesd.taesd import TAESD  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

WIDTH, CONTEXT, HEADS = 320, 768, 8  # what the host knows this network by

layers = ops.disable_weight_init
network = UNetModel(
    image_size=32, in_channels=4, out_channels=4, model_channels=WIDTH, num_res_blocks=[1], channel_mult=[1],
    transformer_depth=[1], transformer_depth_output=[1, 1], transformer_depth_middle=1, use_spatial_transformer=True,
    context_dim=CONTEXT, num_heads=HEADS, operations=layers,
)  # fmt: skip
config = json.loads((Path(comfyui) / "comfy" / "sd1_clip_config.json").read_text())
parts = {
    "model.diffusion_model.": network,
    "cond_stage_model.transformer.": clip_model.CLIPTextModel(config, torch.float16, "cpu", layers),
    "first_stage_model.": TAESD(),
}
torch.manual_seed(0)
weights = {}
for prefix, part in parts.items():
    for name, tensor in part.state_dict().items():
        scale = 0.0 if "clip" in type(part).__module__ else tensor[0].numel() ** -0.5 if tensor.dim() > 1 else 0.1
        weights[prefix + name] = (torch.randn(tensor.shape) * scale if scale else torch.zeros(tensor.shape)).half()
save_file(weights, target)
