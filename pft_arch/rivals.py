"""Other networks to be measured beside: the authors' own code, and what a user would load through spandrel.

Nothing of theirs is part of this package: the authors' code is imported from a checkout that the user names, spandrel
from where it is installed. Weights are random, or ours.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .config import PFTConfig

PUBLISHED_FILE = "basicsr/archs/pft_arch.py"
GATHER_BELOW = (
    32  # plain torch is quicker with gathered rows than with a whole map once k is less than n / GATHER_BELOW
)


class RivalError(RuntimeError):
    """A network cannot be had; the text says what to do."""


@dataclass(frozen=True)
class SpandrelNetwork:
    """Where spandrel has the class, the published arguments, and the file that they were read from."""

    module: str
    cls: str
    arguments: Mapping[str, Any]
    source: str
    scale: str = "upscale"  # name of the argument


# Arguments that equal the published ones in all files are left to spandrel's defaults: qkv_bias, img_range, 1conv, ...
SPANDREL: Mapping[str, SpandrelNetwork] = {
    "SwinIR light": SpandrelNetwork(
        "SwinIR.__arch.SwinIR", "SwinIR",
        {"embed_dim": 60, "depths": [6] * 4, "num_heads": [6] * 4, "window_size": 8, "mlp_ratio": 2,
         "upsampler": "pixelshuffledirect"},
        "JingyunLiang/SwinIR main_test_swinir.py, lightweight_sr",
    ),
    "SwinIR": SpandrelNetwork(
        "SwinIR.__arch.SwinIR", "SwinIR",
        {"embed_dim": 180, "depths": [6] * 6, "num_heads": [6] * 6, "window_size": 8, "mlp_ratio": 2,
         "upsampler": "pixelshuffle"},
        "JingyunLiang/SwinIR main_test_swinir.py, classical_sr",
    ),
    "HAT": SpandrelNetwork(
        "HAT.__arch.HAT", "HAT",
        {"embed_dim": 180, "depths": [6] * 6, "num_heads": [6] * 6, "window_size": 16, "compress_ratio": 3,
         "squeeze_factor": 30, "conv_scale": 0.01, "overlap_ratio": 0.5, "mlp_ratio": 2, "upsampler": "pixelshuffle"},
        "XPixelGroup/HAT options/test/HAT_SRx2.yml",
    ),
    "ATD light": SpandrelNetwork(
        "ATD.__arch.atd_arch", "ATD",
        {"embed_dim": 48, "depths": [6] * 4, "num_heads": [4] * 4, "window_size": 16, "category_size": 128,
         "num_tokens": 64, "reducted_dim": 8, "convffn_kernel_size": 7, "mlp_ratio": 1,
         "upsampler": "pixelshuffledirect"},
        "LabShuHangGU/Adaptive-Token-Dictionary options/train/101_ATD_light_SRx2_scratch.yml",
    ),
    "ATD": SpandrelNetwork(
        "ATD.__arch.atd_arch", "ATD",
        {"embed_dim": 210, "depths": [6] * 6, "num_heads": [6] * 6, "window_size": 16, "category_size": 256,
         "num_tokens": 128, "reducted_dim": 20, "convffn_kernel_size": 5, "mlp_ratio": 2,
         "upsampler": "pixelshuffle"},
        "LabShuHangGU/Adaptive-Token-Dictionary options/train/001_ATD_SRx2_finetune.yml",
    ),
    "DAT light": SpandrelNetwork(
        "DAT.__arch.DAT", "DAT",
        {"embed_dim": 60, "depth": [18], "num_heads": [6], "split_size": [8, 32], "expansion_factor": 2,
         "resi_connection": "3conv", "upsampler": "pixelshuffledirect"},
        "zhengchen1999/DAT options/Train/train_DAT_light_x2.yml",
    ),
    "OmniSR": SpandrelNetwork(
        "OmniSR.__arch.OmniSR", "OmniSR",
        {"num_feat": 64, "res_num": 5, "block_num": 1, "window_size": 8, "pe": True, "bias": True},
        "Francis0625/Omni-SR train_yamls/train_OmniSR_X2_DIV2K.yaml",
        scale="up_scale",
    ),
    "RealPLKSR": SpandrelNetwork(
        "PLKSR.__arch.RealPLKSR", "RealPLKSR",
        {"dim": 64, "n_blocks": 28, "kernel_size": 17, "split_ratio": 0.25, "use_ea": True, "norm_groups": 4},
        "neosr-project/neosr neosr/archs/realplksr_arch.py, defaults",
        scale="upscaling_factor",
    ),
}  # fmt: skip


def spandrel_network(name: str, scale: int) -> nn.Module:
    """A freshly initialised network of the table above.

    Raises:
        RivalError: spandrel is missing, or its classes have moved.
    """
    known = SPANDREL[name]
    try:
        module = importlib.import_module(f"spandrel.architectures.{known.module}")
        network: nn.Module = getattr(module, known.cls)(**{**known.arguments, known.scale: scale})
    except ModuleNotFoundError as error:
        raise RivalError(f"needs spandrel ({error}): pip install spandrel") from error
    except (ImportError, RuntimeError, AttributeError, TypeError) as error:  # a torchvision that does not fit, say
        raise RivalError(f"this spandrel cannot build it ({error})") from error
    return network


def published_network(checkout: Path, config: PFTConfig, device: torch.device) -> nn.Module:
    """The authors' network (CVL-UESTC/PFT-SR) with a configuration of ours.

    checkout: their repository. On CUDA their extension must have been built (`python setup.py build_ext --inplace` in
    its folder `ops_smm`, or installed); elsewhere plain torch stands in for it.

    Raises:
        RivalError: it is not such a checkout, the extension is missing, or the network is none of theirs.
    """
    if config.norm_type != "layer_norm" or not config.use_lepe:
        raise RivalError("the published code has layer norm and LePE only")
    module = _import_published(checkout, plain=device.type != "cuda")
    network: nn.Module = module.PFT(
        upscale=config.scale,
        in_chans=config.in_channels,
        embed_dim=config.embed_dim,
        depths=config.num_blocks,
        num_heads=config.num_heads,
        num_topk=config.top_k,
        window_size=config.window_size,
        convffn_kernel_size=config.kernel_size,
        mlp_ratio=config.mlp_ratio,
        qkv_bias=config.qkv_bias,
        img_range=config.img_range,
        upsampler=config.upsampler,
        resi_connection=config.resi_connection,
    )
    return network


def _import_published(checkout: Path, *, plain: bool) -> ModuleType:
    """Their one file, with stand-ins for what it imports and a forward pass does not need (a whole training framework).

    The stand-ins are gone from `sys.modules` afterwards.
    """
    file = checkout / PUBLISHED_FILE
    if not file.is_file():
        raise RivalError(f"{checkout} is no checkout of CVL-UESTC/PFT-SR: it has no {PUBLISHED_FILE}")
    stand_ins: dict[str, dict[str, Any]] = {
        "basicsr": {},
        "basicsr.archs": {},
        "basicsr.archs.arch_util": {"to_2tuple": lambda x: (x, x), "trunc_normal_": nn.init.trunc_normal_},
        "basicsr.utils": {},
        "basicsr.utils.registry": {"ARCH_REGISTRY": _Registry()},
        "fairscale": {},
        "fairscale.nn": {"checkpoint_wrapper": None},
    }
    if plain:
        stand_ins["smm_cuda"] = {
            "SMM_QmK_forward_cuda": plain_query_key_product,
            "SMM_AmV_forward_cuda": plain_weights_value_product,
            "SMM_QmK_backward_cuda": _backward_of(plain_query_key_product),
            "SMM_AmV_backward_cuda": _backward_of(plain_weights_value_product),
        }
    spec = importlib.util.spec_from_file_location("published_pft", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    with _modules(stand_ins), _on_path(checkout / "ops_smm"):
        try:
            spec.loader.exec_module(module)
        except ImportError as error:
            hint = "build it in ops_smm of the checkout: python setup.py build_ext --inplace"
            raise RivalError(f"{file}: {error}" + (f"; {hint}" if "smm_cuda" in str(error) else "")) from error
    return module


class _Registry:
    """Stands in for BasicSR's, of which the file uses a decorator."""

    def register(self) -> Any:
        return lambda cls: cls


@contextmanager
def _modules(contents: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    before = {name: sys.modules.get(name) for name in contents}
    for name, values in contents.items():
        module = ModuleType(name)
        vars(module).update(values)
        sys.modules[name] = module
    try:
        yield
    finally:
        for name, original in before.items():
            if original is None:
                del sys.modules[name]
            else:
                sys.modules[name] = original


@contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def plain_query_key_product(queries: Tensor, keys: Tensor, index: Tensor) -> Tensor:
    """queries (B, n, d), keys (B, d, n), index (B, n, k) -> (B, n, k): the products at the kept entries."""
    if index.shape[-1] <= keys.shape[-1] // GATHER_BELOW:
        return (queries[:, :, None] @ _rows(keys.mT, index).mT).squeeze(2)
    return (queries @ keys).gather(-1, index.long())


def plain_weights_value_product(weights: Tensor, values: Tensor, index: Tensor) -> Tensor:
    """weights, index (B, n, k), values (B, n, d) -> (B, n, d): the sum of the kept values by their weights."""
    if index.shape[-1] <= values.shape[1] // GATHER_BELOW:
        return (weights[:, :, None] @ _rows(values, index)).squeeze(2)
    whole = weights.new_zeros(*weights.shape[:2], values.shape[1])
    return whole.scatter_(-1, index.long(), weights) @ values


def _backward_of(product: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """(gradient of a product, its arguments) -> gradients of its first two arguments."""

    def backward(gradient: Tensor, a: Tensor, b: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        gradients: tuple[Tensor, Tensor] = torch.func.vjp(lambda a, b: product(a, b, index), a, b)[1](gradient)
        return gradients

    return backward


def _rows(tokens: Tensor, index: Tensor) -> Tensor:
    """tokens (B, n, d), index (B, n, k) -> (B, n, k, d)."""
    first = torch.arange(len(tokens), device=tokens.device)[:, None, None] * tokens.shape[1]
    rows: Tensor = tokens.reshape(-1, tokens.shape[-1])[(index.long() + first).flatten()]
    return rows.view(*index.shape, -1)
