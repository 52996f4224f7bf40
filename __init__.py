"""PFT-SR for ComfyUI: the entry point for the host, nothing else.

The nodes are imported only when the host asks for them, so that tools and tests may import this file anywhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .nodes import PFTSRExtension

WEB_DIRECTORY = "./web"  # docs/<node id>.md are the nodes' help pages

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]


async def comfy_entrypoint() -> PFTSRExtension:
    from .nodes import PFTSRExtension

    return PFTSRExtension()
