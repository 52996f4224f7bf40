"""Progressive focused attention of one layer: one interface, several backends.

A backend is a function `attend(qkv, table, carry, *, heads, window, shift, keep, dropout)`:

    qkv      (B, H, W, 3C) queries, keys, values of the whole image; H and W are multiples of `window`
    table    ((2w-1)^2, heads) or ((2w-1)^2, 1) relative-position bias
    carry    what the previous layer of the same chain handed on, None for the first layer
    heads    attention heads; window: side w; shift: cyclic shift of the windows, 0 or w // 2
    keep     entries kept per query after this layer; w * w cuts nothing
    dropout  probability for the attention weights; 0 outside training

and returns (out (B, H, W, C), carry). The carry belongs to the backend that made it: nobody else looks inside.
Where no gradients are recorded, the carry handed in is used up: its memory is let go or written over.
The mathematics: paper (arXiv 2503.20337) section 3.2, and the log-domain form in `chain`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

Carry = Any
Attend = Callable[..., tuple[Tensor, Carry]]

# Name and module of each; modules are imported when asked for, since some need a package that may be absent.
BACKENDS = {
    "reference": "reference",
    "torch": "torch_backend",
    "numba": "numba_backend",
    "triton": "triton_backend",
}

log = logging.getLogger("pft_sr")


def get_backend(name: str) -> Attend:
    """The attention function of that name; "auto" is the fastest that serves the device of the picture.

    Raises:
        ValueError: there is no backend of that name, or a package that it needs is missing.
    """
    if name == "auto":
        return _automatic
    module = BACKENDS.get(name)
    if module is None:
        raise ValueError(f"there is no attention backend {name!r}; choose one of auto, {', '.join(BACKENDS)}")
    try:
        attend: Attend = import_module(f".{module}", __name__).attend
    except ImportError as error:
        raise ValueError(f"the attention backend {name!r} needs a package that is missing: {error}") from error
    return attend


def serving(attend: Attend, device: torch.device, dtype: torch.dtype) -> str:
    """Name of the backend that does the work there: "auto" chooses one, and torch does what another does not serve."""
    module = import_module((_fastest(device.type) if attend is _automatic else attend).__module__)
    if hasattr(module, "serves") and not module.serves(device, dtype):
        return "torch"
    return module.__name__.rpartition(".")[2].removesuffix("_backend")


def _automatic(qkv: Tensor, table: Tensor, carry: Carry, **options: Any) -> tuple[Tensor, Carry]:
    """The attention function that suits the device, which is known only now."""
    return _fastest(qkv.device.type)(qkv, table, carry, **options)


@lru_cache
def _fastest(device: str) -> Attend:
    """numba on a CPU, where it is installed; Triton on a GPU of NVIDIA's likewise, whose absence is told once (it hands
    over to torch itself, should it not run); else torch."""
    if device == "cpu":
        try:
            return get_backend("numba")
        except Exception as error:  # a broken install may raise anything
            log.debug("attention runs in plain torch: %s", error)
    if device == "cuda" and torch.version.hip is None:
        try:
            return get_backend("triton")
        except Exception as error:
            log.warning("attention runs in plain torch, which is slower: %s", error)
    return get_backend("torch")
