"""Weights: names to files, and files to networks and back.

`.safetensors` is the format of this project; metadata holds the configuration. A `.pth` is read with
`weights_only=True`, so no code in it ever runs.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from .attention.windows import relative_position_index
from .catalogue import BUNDLED, CATALOGUE, SUFFIXES, Variant, WeightsError, catalogue, default_folder
from .config import PRESETS, PFTConfig, preset
from .hub import Progress, fetch, fetch_variant, parse_uri
from .network import PFTSR, from_config

__all__ = [
    "CATALOGUE",
    "SUFFIXES",
    "UnknownConfigError",
    "Variant",
    "WeightsError",
    "describe",
    "from_state_dict",
    "is_pft",
    "is_pft_file",
    "load_model",
    "resolve",
    "save_model",
]

MAX_HEADER = 100_000_000  # bytes; the format's own limit

# What marks a PFT file, and what marks ATD, its nearest relative, which shares every other key.
_LEPE = "layers.0.residual_group.layers.0.v_LePE.depthwise_conv.0.weight"
_TABLE = "layers.0.residual_group.layers.0.attn_win.relative_position_bias_table"
_QKV = "layers.0.residual_group.layers.0.wqkv.weight"
_ATD = (".residual_group.td", ".attn_atd.", ".attn_aca.")

# How checkpoints in the wild are wrapped, in the order in which one is preferred to another.
_WRAPPERS = ("params_ema", "params-ema", "params", "state_dict", "model_state_dict", "model", "net")
_PREFIXES = ("module.", "netG.")
_RECOMPUTABLE = "relative_position_index_SA"


class UnknownConfigError(WeightsError):
    """PFT-SR weights that fit no preset and carry no configuration; `seen` is what their shapes tell."""

    def __init__(self, source: str | Path, seen: Mapping[str, Any]) -> None:
        self.seen = ", ".join(f"{name} {value}" for name, value in seen.items())
        super().__init__(
            f"{source}: the file fits no preset ({self.seen}), and shapes do not tell the number of heads and the "
            "top-k schedule. Pass config=PFTConfig(num_heads=..., top_k=..., ...), or make it a safetensors file with "
            "its configuration inside by `pft-sr convert --config`"
        )


def resolve(model: str | Path, folder: str | Path | None = None, progress: Progress | None = None) -> Path:
    """The weights file that a catalogue name, "hf://user/repo[@revision]/file" or a path stands for, verified.

    Args:
        folder: where downloads and catalogue.toml lie; default: `catalogue.default_folder()`.
        progress: as for `hub.fetch`.

    Raises:
        WeightsError: there is no such name or file, the bundled file is damaged, or the download fails.
    """
    folder = Path(folder or default_folder())
    if str(model).startswith("hf://"):
        return fetch(parse_uri(str(model)), folder, progress)
    variants = catalogue(folder)
    variant = variants.get(str(model))
    if variant is None:
        path = Path(model)
        if not path.is_file():
            raise WeightsError(f"{model}: no such weights file, and no such variant. Variants: {', '.join(variants)}")
        return path
    if variant.source == "hub":
        return fetch_variant(variant, folder, progress)
    path = BUNDLED / variant.file
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != variant.sha256:
        raise WeightsError(f"{path}: the bundled weights of {variant.name} are missing or damaged; reinstall the pack")
    return path


def load_model(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    config: PFTConfig | None = None,
) -> PFTSR:
    """The network in a weights file, in eval mode.

    The configuration is `config` if given, else the metadata's (key `config`, JSON, with the published argument names
    or ours), else that of the preset whose shapes the file has.

    Args:
        path: a .safetensors or .pth file, or a name of the catalogue.

    Raises:
        WeightsError: the file cannot be read, is no PFT file, does not fit the configuration, holds values that are
            not finite, or leaves open what the configuration is.
    """
    path = resolve(path)
    state, metadata = _read(path)
    return from_state_dict(state, metadata, source=str(path), device=device, dtype=dtype, config=config)


def from_state_dict(
    state: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    source: str = "state dict",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    config: PFTConfig | None = None,
) -> PFTSR:
    """The network of a plain state dict with published keys, as `load_model`; `source` names it in errors.

    Raises:
        WeightsError: as `load_model`.
    """
    config = config or _config_of(source, state, metadata or {})
    with torch.device("meta"):
        model = from_config(config)
    _check_fit(source, model, state)
    model.to_empty(device="cpu").to(dtype)
    model.load_state_dict({**state, _RECOMPUTABLE: relative_position_index(config.window_size)})
    return model.to(device).eval()


def save_model(model: PFTSR, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a network as .safetensors, configuration included; the file appears whole or not at all."""
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items() if k != _RECOMPUTABLE}
    content = serialize(state, {**(metadata or {}), "config": json.dumps(model.config.to_dict())})
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def is_pft_file(path: str | Path) -> bool:
    """Whether a file holds PFT weights, from its table of contents alone, even where its data is cut. Never raises."""
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return is_pft(_header(path))
        with zipfile.ZipFile(path) as archive:
            [table] = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            content = archive.read(table)
        return all(mark.encode() in content for mark in (_QKV, _TABLE)) and not any(
            mark.encode() in content for mark in _ATD
        )
    except Exception:  # whatever a foreign or damaged file makes a parser raise
        return False


def is_pft(keys: Iterable[str]) -> bool:
    """Whether a state dict with these keys is one of PFT-SR; those of related networks are not."""
    keys = set(keys)
    return _QKV in keys and _TABLE in keys and not any(mark in str(key) for key in keys for mark in _ATD)


def _header(path: Path) -> dict[str, Any]:
    """The table of contents of a .safetensors file: 8 bytes of length, then JSON."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= MAX_HEADER:
            raise ValueError(f"a header of {length} bytes")
        return dict(json.loads(file.read(length)))


def describe(path: str | Path) -> dict[str, Any]:
    """What a weights file is: path, bytes, sha256, architecture, preset, config, parameters, dtype, metadata.

    Raises:
        WeightsError: the file cannot be read or holds no PFT weights.
    """
    path = resolve(path)
    state, metadata = _read(path)
    config = _config_of(path, state, metadata)
    named = [name for name in PRESETS if preset(name, config.scale) == config]
    return {
        "path": str(path),
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "architecture": "PFT-SR",
        "preset": named[0] if named else None,
        "scale": config.scale,
        "parameters": sum(v.numel() for k, v in state.items() if k != _RECOMPUTABLE),
        "dtype": ", ".join(sorted({str(v.dtype).removeprefix("torch.") for v in state.values()})),
        "config": config.to_dict(),
        "metadata": {k: v for k, v in metadata.items() if k != "config"},
    }


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """State dict under the published keys, and metadata; only files with PFT weights pass."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                metadata = dict(file.metadata() or {})
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        else:
            state, metadata = torch.load(path, map_location="cpu", weights_only=True), {}
    except pickle.UnpicklingError:
        raise WeightsError(
            f"{path}: not a plain weights file: reading it would run code, or it is no PyTorch file. Nothing was run. "
            "Get the weights as .safetensors"
        ) from None
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"{path}: cannot be read ({reason}); it may be cut or damaged, so get it again") from None

    state = _unwrap(state)
    if not is_pft(state):
        found = ", ".join(sorted(map(str, state))[:3]) or "nothing"
        raise WeightsError(f"{path}: no PFT-SR weights. It holds {len(state)} entries ({found}, ...), not {_LEPE}")
    return state, metadata


def _unwrap(loaded: Any) -> dict[str, Tensor]:
    """The plain state dict in a checkpoint: wrapper keys and prefixes of training frameworks removed."""
    for wrapper in _WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            return _unwrap(loaded[wrapper])
    state = {k: v for k, v in loaded.items() if isinstance(v, Tensor)} if isinstance(loaded, Mapping) else {}
    for prefix in _PREFIXES:
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _config_of(path: str | Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> PFTConfig:
    if "config" in metadata:
        try:
            return PFTConfig.from_dict(json.loads(metadata["config"]))
        except (ValueError, AttributeError, TypeError) as error:
            raise WeightsError(f"{path}: the configuration in its metadata is not usable: {error}") from None
    try:
        seen = _shapes(state)
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise WeightsError(
            f"{path}: PFT-SR weights of unknown layout ({error!r}); pass config=PFTConfig(...)"
        ) from None
    for name in PRESETS:
        candidate = preset(name, seen["scale"])
        if all(getattr(candidate, key) == value for key, value in seen.items()):
            return candidate
    raise UnknownConfigError(path, seen)


def _shapes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The configuration's fields that tensor shapes tell."""
    width, channels = state["conv_first.weight"].shape[:2]
    groups = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("layers."))
    layers = [
        {key.split(".")[4] for key in state if key.startswith(f"layers.{g}.residual_group.layers.")}
        for g in range(groups)
    ]
    first = "layers.0.residual_group.layers.0."
    fc1 = state[first + "convffn.fc1.weight"]
    if "conv_hr.weight" in state:
        upsampler, scale = "nearest+conv", 4 if "conv_up2.weight" in state else 0
    elif "conv_last.weight" in state:
        upsampler = "pixelshuffle"
        scale = math.isqrt(state["upsample.0.weight"].shape[0] // state["upsample.0.weight"].shape[1])
        scale *= 2 if "upsample.2.weight" in state else 1
    else:
        upsampler, scale = "pixelshuffledirect", math.isqrt(state["upsample.0.weight"].shape[0] // channels)
    return {
        "scale": scale,
        "in_channels": channels,
        "embed_dim": width,
        "num_blocks": tuple(len(group) for group in layers),
        "window_size": (math.isqrt(state[_TABLE].shape[0]) + 1) // 2,
        "kernel_size": state[first + "convffn.dwconv.depthwise_conv.0.weight"].shape[-1],
        "mlp_ratio": fc1.shape[0] / fc1.shape[1],
        "qkv_bias": first + "wqkv.bias" in state,
        "use_lepe": _LEPE in state,
        "upsampler": upsampler,
        "resi_connection": "1conv" if "conv_after_body.weight" in state else "3conv",
        "norm_type": "layer_norm" if "norm.bias" in state else "rms_norm",
    }


def _check_fit(path: str | Path, model: PFTSR, state: Mapping[str, Tensor]) -> None:
    """Everything that does not fit, in one message; nothing is loaded by halves."""
    expected = model.state_dict()
    problems = [f"missing {key}" for key in sorted(expected.keys() - state.keys() - {_RECOMPUTABLE})]
    problems += [f"unexpected {key}" for key in sorted(state.keys() - expected.keys())]
    for key in sorted(expected.keys() & state.keys() - {_RECOMPUTABLE}):
        if expected[key].shape != state[key].shape:
            problems.append(f"{key} is {tuple(state[key].shape)}, expected {tuple(expected[key].shape)}")
        elif not state[key].is_floating_point():
            problems.append(f"{key} is {state[key].dtype}, expected floating point")
        elif not torch.isfinite(state[key].float()).all():
            problems.append(f"{key} holds values that are not finite")
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise WeightsError(f"{path}: the weights do not fit their configuration or are damaged: {shown}")
