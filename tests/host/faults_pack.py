"""A pack for a ComfyUI under test: lets things go wrong in it at a chosen pass of a PFT-SR network.

The faults are put in from outside, by hooks that torch offers; what meets them is the pack as users have it.
"""

import gc
import os
import threading

import torch
from aiohttp import web
from comfy import model_management
from server import PromptServer


def out_of_memory(file):
    raise torch.OutOfMemoryError("Allocation on device 0 would exceed allowed memory. (out of memory)")


def cancel(file):
    model_management.interrupt_current_processing()


def unload_from_another_thread(file):
    thread = threading.Thread(target=model_management.unload_all_models)
    thread.start()
    thread.join()


def free_all_memory(file):
    model_management.free_memory(1e30, model_management.get_torch_device())


def replace_weights(file):
    os.replace(file + ".new", file)


def cut_weights(file):
    os.truncate(file, 1000)


FAULTS = {f.__name__: f for f in (out_of_memory, cancel, unload_from_another_thread, free_all_memory)}
FAULTS |= {f.__name__: f for f in (replace_weights, cut_weights)}


class PFTFault:
    """Passes model and image on; `fault` happens at the `at`-th pass from now on, or at each with `at` of -1."""

    CATEGORY = "testing"
    RETURN_TYPES = ("UPSCALE_MODEL", "IMAGE")
    FUNCTION = "arm"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        plain = {"fault": ("STRING", {}), "at": ("INT", {"min": -1}), "file": ("STRING", {})}
        return {"required": {"upscale_model": ("UPSCALE_MODEL",), "image": ("IMAGE",), **plain}}

    @classmethod
    def IS_CHANGED(cls, **_):  # noqa: N802
        return float("nan")  # never what it was: the host must not take an old result

    def arm(self, upscale_model, image, fault, at, file):
        network = upscale_model.model
        network._forward_pre_hooks.clear()
        passes = iter(range(10**6))

        def hook(*_):
            if next(passes) == at or at == -1:
                FAULTS[fault](file)

        if fault in FAULTS:
            network.register_forward_pre_hook(hook)
        if fault == "no_colours":
            image = image.clone()
            image[0, 0, 0] = torch.tensor([float("nan"), float("inf"), -float("inf")])
            image[0, 5, 5] = torch.tensor([3.0, -3.0, 0.5])
        return upscale_model, image


class PFTLoadFault:
    """Gives the name of a file on, whose loading then runs out of memory, once."""

    CATEGORY = "testing"
    RETURN_TYPES = ("STRING",)
    FUNCTION = "arm"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"file": ("STRING", {})}}

    @classmethod
    def IS_CHANGED(cls, **_):  # noqa: N802
        return float("nan")

    def arm(self, file):
        load = torch.nn.Module.load_state_dict

        def fail(*_, **__):
            torch.nn.Module.load_state_dict = load
            out_of_memory(file)

        torch.nn.Module.load_state_dict = fail
        return (file,)


@PromptServer.instance.routes.get("/tensors")
async def tensors(_):
    """Bytes of all tensors alive."""
    gc.collect()
    return web.json_response(sum(o.nbytes for o in gc.get_objects() if issubclass(type(o), torch.Tensor)))


NODE_CLASS_MAPPINGS = {"PFTFault": PFTFault, "PFTLoadFault": PFTLoadFault}
