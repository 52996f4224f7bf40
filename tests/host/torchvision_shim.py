"""Makes a CUDA build of torchvision importable beside a CPU-only torch, in the test host only.

Such a torchvision cannot load its compiled half, and its Python half then stops at the two operators that it describes
without looking whether they exist. Declaring them is enough for all that needs no compiled operator.
`make_host.py` installs this, with a .pth file that imports it in every interpreter of the host; until somebody imports
torchvision it costs nothing.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from typing import Any

OPERATORS = ("nms", "qnms")
_declared: list[Any] = []  # a torch library forgets its operators when it is collected


class DeclareOperators(MetaPathFinder):
    """Finds nothing itself; declares the operators just before the real torchvision is looked for."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch

        make_library: Any = torch.library.Library
        library = make_library("torchvision", "DEF")
        for name in OPERATORS:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)


sys.meta_path.insert(0, DeclareOperators())
