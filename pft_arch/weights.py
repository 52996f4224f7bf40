"""Weights: names to files, and files to networks and back.

`.safetensors` is the format of this project; metadata holds the configuration. A `.pth` is read with
`weights_only=True`, so no code in it ever runs.
"""

from __future__ import annotations

import json
import math
import pickle
import zipfile
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as deserialize
from safetensors.torch import save as serialize
from torch import Tensor

from .attention.windows import relative_position_index
from .catalogue import BUNDLED, CATALOGUE, SUFFIXES, Variant, WeightsError, catalogue, default_folder
from .config import PRESETS, SCALES, PFTConfig, preset
from .errors import is_out_of_memory
from .files import digest, replacing
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
    "read_weights",
    "resolve",
    "save_model",
    "shapes_tell",
    "unwrap",
]

MAX_HEADER = 100_000_000  # bytes; the format's own limit

# What marks a PFT file, and what marks ATD, its nearest relative, which shares every other key.
_LEPE = "layers.0.residual_group.layers.0.v_LePE.depthwise_conv.0.weight"
_TABLE = "layers.0.residual_group.layers.0.attn_win.relative_position_bias_table"
_QKV = "layers.0.residual_group.layers.0.wqkv.weight"
_ATD = (".residual_group.td", ".attn_atd.", ".attn_aca.")

_RECOMPUTABLE = "relative_position_index_SA"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_DEEPEST = 8  # how far down in a checkpoint weights are looked for


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
    if not path.is_file() or digest(path) != variant.sha256:
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
        MemoryError: there is not memory enough for it.
    """
    path = resolve(path)
    try:
        state, metadata = read_weights(path)
        return from_state_dict(state, metadata, source=str(path), device=device, dtype=dtype, config=config)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    # outside the handler, so that what was read is no longer referenced
    raise MemoryError(
        f"{path}: not enough memory to load it. Close other programs or unload other models, and try again"
    )


def from_state_dict(
    state: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    source: str = "state dict",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    config: PFTConfig | None = None,
) -> PFTSR:
    """The network of a state dict with published keys, as `load_model`; `source` names it in errors.

    Raises:
        WeightsError: as `load_model`.
    """
    state = unwrap(state)
    config = config or _config_of(source, state, metadata or {})
    if sum(config.num_blocks) > len(state):  # said before a network of thousands of layers is built in vain
        raise WeightsError(
            f"{source}: its configuration asks for {sum(config.num_blocks)} layers, and it holds {len(state)} tensors"
        )
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
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(content)


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
    """Whether a state dict with these keys, prefixed or not, is one of PFT-SR; those of related networks are not."""
    text = list(map(str, keys))
    marked = all(any(key.endswith(mark) for key in text) for mark in (_QKV, _TABLE))
    return marked and not any(mark in key for key in text for mark in _ATD)


def _header(path: Path) -> dict[str, Any]:
    """The table of contents of a .safetensors file: 8 bytes of length, then JSON."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER, path.stat().st_size):
            raise ValueError(f"a header of {length} bytes")
        return dict(json.loads(file.read(length)))


def describe(path: str | Path) -> dict[str, Any]:
    """What a weights file is: path, bytes, sha256, architecture, preset, config, parameters, dtype, metadata.

    Raises:
        WeightsError: the file cannot be read or holds no PFT weights.
    """
    path = resolve(path)
    state, metadata = read_weights(path)
    config = _config_of(path, state, metadata)
    named = [name for name in PRESETS if preset(name, config.scale) == config]
    return {
        "path": str(path),
        "bytes": path.stat().st_size,
        "sha256": digest(path),
        "architecture": "PFT-SR",
        "preset": named[0] if named else None,
        "scale": config.scale,
        "parameters": sum(v.numel() for k, v in state.items() if k != _RECOMPUTABLE),
        "dtype": ", ".join(sorted({str(v.dtype).removeprefix("torch.") for v in state.values()})),
        "config": config.to_dict(),
        "metadata": {k: v for k, v in metadata.items() if k != "config"},
    }


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """State dict under the published keys, and metadata, of a file with PFT weights.

    Raises:
        WeightsError: the file cannot be read or holds no PFT weights.
        MemoryError, RuntimeError: there is not memory enough for it; `is_out_of_memory` tells.
    """
    try:
        if path.suffix == ".safetensors":
            content = path.read_bytes()  # not mapped: where a mapped file is cut while in use, the process dies
            loaded: Any = _deserialize(content)
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            metadata = dict(header.get("__metadata__") or {})
        else:
            loaded = _read_pth(path)
            metadata = _metadata_of(loaded)
    except pickle.UnpicklingError:
        raise WeightsError(
            f"{path}: not a plain weights file: reading it would run code, or it is no PyTorch file. Nothing was run. "
            "Get the weights as .safetensors"
        ) from None
    except Exception as error:  # whatever a damaged file makes a parser raise
        if is_out_of_memory(error):
            raise
        reason = _told(str(error).partition("\n")[0] or type(error).__name__)
        raise WeightsError(f"{path}: cannot be read ({reason}); it may be cut or damaged, so get it again") from None

    state = unwrap(loaded)
    if not is_pft(state):
        found = ", ".join(map(_told, sorted(state)[:3])) or "nothing"
        raise WeightsError(f"{path}: no PFT-SR weights. It holds {len(state)} entries ({found}, ...), not {_QKV}")
    return state, metadata


def _deserialize(content: bytes) -> dict[str, Tensor]:
    try:
        return deserialize(content)
    except BaseException as error:  # safetensors panics where memory ends, which no host's `except Exception` catches
        if type(error).__name__ == "PanicException":
            raise MemoryError from None
        raise


def _read_pth(path: Path) -> Any:
    """What torch.save has written, without running code, and without trusting the sizes that the file claims."""
    with zipfile.ZipFile(path) as archive:  # the older formats, which no PFT file has, are not zips
        records = Counter(entry.file_size for entry in archive.infolist())
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("torch.save compresses nothing, and this is compressed")  # and may unpack to terabytes
        if sum(size * count for size, count in records.items()) > path.stat().st_size:
            raise ValueError("it claims to be larger than it is")
        for order in (name for name in archive.namelist() if name.endswith("/byteorder")):
            if archive.read(order) != b"little":  # swapping would trust those sizes
                raise ValueError("its byte order is not this machine's")
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    tensors = [value for _, inner in _dicts(loaded) for value in inner.values() if _usable(value)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    if Counter(storages.values()) - records:  # older torch believes the sizes in the pickle, and would read beyond
        raise ValueError("its tensors are larger than its data")
    return loaded


def _dicts(loaded: Any) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """All nested dicts, outermost first, with the names that lead there. Each once: a hostile one may hold itself."""
    queue, seen = deque([("", loaded, 0)]), set()
    while queue:
        path, value, depth = queue.popleft()
        if isinstance(value, Mapping) and id(value) not in seen and depth < _DEEPEST:
            seen.add(id(value))
            yield path, value
            queue += [(f"{path}{name}/", inner, depth + 1) for name, inner in value.items()]


def _usable(value: Any) -> bool:
    """Whether something is a plain tensor with data: a file may hold sparse, quantized and data-less ones too."""
    plain = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized
    return plain and not value.is_nested and value.device.type != "meta"


def unwrap(loaded: Any) -> dict[str, Tensor]:
    """The plain state dict in a checkpoint, whatever training frameworks put around it and before its keys.

    Of several the averaged one is taken, which they call `params_ema` and the like, else the first. Without any, the
    tensors of the outermost dict, for the error message.
    """
    found = []
    for path, inner in _dicts(loaded):
        tensors = {key: value for key, value in inner.items() if isinstance(key, str) and _usable(value)}
        for prefix in [key.removesuffix(_QKV) for key in tensors if key.endswith(_QKV)]:
            state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            found.append((path + prefix, state))
    averaged = [state for path, state in found if "ema" in path.lower()]
    for state in averaged + [state for _, state in found]:
        return state
    return {str(key): value for key, value in loaded.items() if _usable(value)} if isinstance(loaded, Mapping) else {}


def _told(text: object) -> str:
    """A stranger's text as a part of an error message: one line that does nothing to a terminal, and an end to it."""
    line = "".join(character if character.isprintable() else "?" for character in str(text)[:300])
    return line if len(line) < 300 else line[:297] + "..."


def _metadata_of(loaded: Any) -> dict[str, str]:
    """What a training framework has put beside the weights in a .pth, as a safetensors file would hold it."""
    beside = loaded.get("metadata") if isinstance(loaded, Mapping) else None
    try:
        return {"metadata": json.dumps(beside)} if isinstance(beside, Mapping) else {}
    except (TypeError, ValueError):
        return {}


def _config_of(path: str | Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> PFTConfig:
    if "config" in metadata:
        try:
            return PFTConfig.from_dict(json.loads(metadata["config"]))
        except (ValueError, AttributeError, TypeError, RecursionError) as error:
            raise WeightsError(f"{path}: the configuration in its metadata is not usable: {_told(error)}") from None
    try:  # one training framework leaves the network's arguments there
        arguments = json.loads(metadata.get("metadata", "{}"))
        if "embed_dim" in arguments:
            return PFTConfig.from_dict(arguments)
    except (ValueError, AttributeError, TypeError, RecursionError):
        pass  # something else is there
    try:
        seen = shapes_tell(state)
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise WeightsError(
            f"{path}: PFT-SR weights of unknown layout ({_told(repr(error))}); pass config=PFTConfig(...)"
        ) from None
    for name in PRESETS if seen["scale"] in SCALES else ():
        candidate = preset(name, seen["scale"])
        if all(getattr(candidate, key) == value for key, value in seen.items()):
            return candidate
    raise UnknownConfigError(path, seen)


def shapes_tell(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The configuration's fields that tensor shapes tell."""
    width, channels = state["conv_first.weight"].shape[:2]
    paths = [key.split(".") for key in state if ".residual_group.layers." in key]
    layers = Counter(int(group) for group, _ in {(path[1], path[4]) for path in paths})
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
        "num_blocks": tuple(layers[group] for group in sorted(layers)),
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
    problems += [f"unexpected {_told(key)}" for key in sorted(state.keys() - expected.keys())]
    for key in sorted(expected.keys() & state.keys() - {_RECOMPUTABLE}):
        if expected[key].shape != state[key].shape:
            problems.append(f"{key} is {tuple(state[key].shape)}, expected {tuple(expected[key].shape)}")
        elif state[key].dtype not in _FLOATS:
            problems.append(f"{key} is {state[key].dtype}, expected floating point of 16, 32 or 64 bits")
        elif not torch.isfinite(state[key].float()).all():
            problems.append(f"{key} holds values that are not finite")
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise WeightsError(f"{path}: the weights do not fit their configuration or are damaged: {shown}")
