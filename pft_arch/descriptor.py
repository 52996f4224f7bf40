"""PFT-SR for spandrel, through which ComfyUI's core nodes and many other programs open and run upscale models.

`register` makes spandrel open PFT files; `describe_network` wraps a network that is loaded already. spandrel is
imported by the functions that need it, and `register` costs next to nothing where it is loaded already.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from spandrel import Architecture, ArchRegistry, ImageModelDescriptor

    from .network import PFTSR

ID = "PFT-SR"  # not "PFT": a later spandrel may have one of its own, and then both have to fit into one registry


def register(registry: ArchRegistry | None = None) -> None:
    """Let a registry (default: spandrel's main one) open PFT weights, before any other architecture is asked."""
    from spandrel import MAIN_REGISTRY, ArchSupport

    if registry is None:
        registry = MAIN_REGISTRY
    known = tuple(entry.architecture.id for entry in registry)
    if ID not in known:
        registry.add(ArchSupport.from_architecture(architecture(), before=known))


@cache
def architecture() -> Architecture[PFTSR]:
    """How spandrel tells PFT weights from others, and loads them. It hands over tensors, and no metadata of a file."""
    from spandrel import Architecture

    class PFTArchitecture(Architecture):  # type: ignore[misc, unused-ignore]  # spandrel may be absent
        def load(self, state_dict: dict[str, Any]) -> ImageModelDescriptor[PFTSR]:
            from .weights import UnknownConfigError, WeightsError, from_state_dict

            try:
                return describe_network(from_state_dict(state_dict, source="PFT-SR weights"))
            except UnknownConfigError as error:
                raise WeightsError(
                    f"These PFT-SR weights fit no preset ({error.seen}), and this loader cannot see the configuration "
                    "that a file may carry: load them with the node PFT-SR Load Model"
                ) from None

    return PFTArchitecture(id=ID, name=ID, detect=detect)


def detect(state_dict: dict[str, Any]) -> bool:
    from .weights import is_pft

    return is_pft(state_dict)


def describe_network(network: PFTSR) -> ImageModelDescriptor[PFTSR]:
    """A network as spandrel's users expect one: BCHW in [0, 1] in and out, any size, any precision."""
    from spandrel import ImageModelDescriptor

    config = network.config
    return ImageModelDescriptor(
        network,
        network.state_dict(),
        architecture(),
        purpose="SR",
        tags=[f"{config.embed_dim}dim", f"{config.window_size}w"],
        supports_half=True,
        supports_bfloat16=True,
        scale=config.scale,
        input_channels=config.in_channels,
        output_channels=config.in_channels,
        call_fn=follow_the_image,
    )


def follow_the_image(network: PFTSR, image: torch.Tensor) -> torch.Tensor:
    """Some hosts (0.29 to 0.31) leave single weights behind when they load a model; nothing moves if all are there."""
    result: torch.Tensor = network.to(image.device)(image)
    return result
