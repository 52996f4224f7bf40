"""Progressive focused attention of one layer: one interface, several backends.

A backend is a function `attend(qkv, table, carry, *, heads, window, shift, keep, dropout)`:

    qkv      (B, H, W, 3C) queries, keys, values of the whole image; H and W are multiples of `window`
    table    ((2w-1)^2, heads) or ((2w-1)^2, 1) relative-position bias
    carry    what the previous layer of the same chain handed on, None for the first layer
    heads    attention heads; window: side w; shift: cyclic shift of the windows, 0 or w // 2
    keep     entries kept per query after this layer; w * w cuts nothing
    dropout  probability for the attention weights; 0 outside training

and returns (out (B, H, W, C), carry). The carry belongs to the backend that made it: nobody else looks inside.
The mathematics: paper (arXiv 2503.20337) section 3.2, and the log-domain form in `torch_backend`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from . import reference, torch_backend

Carry = Any
Attend = Callable[..., tuple[Tensor, Carry]]

BACKENDS: dict[str, Attend] = {"reference": reference.attend, "torch": torch_backend.attend}


def get_backend(name: str) -> Attend:
    """The attention function of that name; "auto" is the fastest one that runs here.

    Raises:
        ValueError: there is no backend of that name.
    """
    if name == "auto":
        return BACKENDS["torch"]
    if name not in BACKENDS:
        raise ValueError(f"there is no attention backend {name!r}; choose one of auto, {', '.join(BACKENDS)}")
    return BACKENDS[name]
