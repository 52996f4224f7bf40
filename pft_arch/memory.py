"""How much memory a forward pass takes: counted from what is alive at once, checked by benchmarks/memory.py."""

from __future__ import annotations

import torch

from .attention import serving, torch_backend
from .attention.chain import dense_pays
from .config import PFTConfig
from .network import HEAD_CHANNELS, PFTSR, ProgressiveFocusedAttention


def peak_bytes(model: PFTSR, height: int, width: int) -> float:
    """Bytes alive at the peak of an inference pass over one image of height x width pixels, beyond the weights.

    That is the largest of a layer's attention (with what both chains carry), its feed-forward, and the head. Libraries'
    own scratch memory is not counted.
    """
    c, weight = model.config, next(model.parameters())
    item = weight.element_size()
    tokens = c.window_size**2
    pixels = -(-height // c.window_size) * -(-width // c.window_size) * tokens
    backend = _backend(model)
    limit = torch_backend.CPU_GROUP if weight.device.type == "cpu" else torch_backend.GPU_GROUP
    scores = min(limit, pixels * c.num_heads * tokens)
    unfolds = weight.device.type == "cpu" and weight.dtype == torch.float16
    return max(_layers(c, item, backend, pixels, scores), pixels * _head(c, unfolds) * item)


def _backend(model: PFTSR) -> str:
    """What will compute the attention: torch, numba or triton. The reference is counted as torch."""
    weight = next(model.parameters())
    attend = next(module.attend for module in model.modules() if isinstance(module, ProgressiveFocusedAttention))
    name = serving(attend, weight.device, weight.dtype)
    return "torch" if name == "reference" else name


def _layers(c: PFTConfig, item: int, backend: str, pixels: int, scores: int) -> float:
    """Bytes in the layer that needs most; scores: of a group of the torch backend."""
    n, heads = c.window_size**2, c.num_heads
    tokens = c.embed_dim * item  # one tensor as wide as the tokens
    alive = 4 * tokens  # first features, input of the group and of the layer, the latter's norm
    packed = 3 * heads * -(-c.head_dim // 8) * 8 * item  # Triton's queries, keys and values of all windows
    bias = (heads if c.embed_dim > 100 else 1) * n * n * item
    never_cut = all(keep == n for _, keep in c.layers())
    # of one group: scores in float32, and beside them weights, or what is converted or cut
    group = scores * (4 if never_cut and item == 4 else 8)
    widths, carries, peak = [0, 0], [0.0, 0.0], 0.0  # of either chain: channels of queries while dense; bytes carried
    for shifted, keep in c.layers():
        old, new = carries[shifted], float(heads * keep * (item + (2 if keep < n else 0)))
        # output, and copies by windows
        work = {"numba": tokens, "torch": 6 * tokens, "triton": tokens}[backend]
        fixed = bias + group if backend == "torch" else 0
        if widths[shifted] >= 0:
            widths[shifted] += c.head_dim + 4 * shifted if backend != "triton" else packed // (3 * heads * item)
            product = heads * widths[shifted] * item  # queries, or keys, of all layers so far
            if dense_pays(widths[shifted], n, keep):
                new = 2.0 * product
                dense = {"numba": 4 * tokens, "torch": 4 * tokens + 2 * product, "triton": tokens + packed}
                work, fixed = dense[backend], bias if backend == "torch" else 0
                both = old + new
            else:
                work += packed if backend == "triton" else 0
                both = old + 2 * product + new
                widths[shifted] = -1
        elif backend == "numba":
            both = new = old  # in place
        elif backend == "triton" and new == old:
            both = new  # likewise
        else:
            both = max(old, new) if backend == "torch" else old + new  # torch: group by group
        others = carries[not shifted] + alive + 3 * tokens
        carries[shifted] = new
        convolution = 4 * tokens  # output, and the position encoding's input, convolution and result
        feed_forward = alive + tokens + 4 * c.hidden_dim * item
        after = max(others + new + convolution, sum(carries) + feed_forward)
        peak = max(peak, pixels * (others + both + work) + fixed, pixels * after)
    return peak


def _head(c: PFTConfig, unfolds: bool) -> float:
    """Numbers per pixel of the widest step after the layers.

    unfolds: whether a convolution lays its 3 x 3 patches side by side, as torch's do in float16 on most CPUs.
    """
    if c.upsampler == "pixelshuffledirect":
        return 2 * c.embed_dim + 2.0 * c.in_channels * c.scale**2
    images = 3 if c.upsampler == "nearest+conv" else 2  # of 64 channels, in the size of the result
    return c.embed_dim + max(images, 10 * unfolds) * HEAD_CHANNELS * c.scale**2
