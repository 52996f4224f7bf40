"""The numbers of a network: one frozen record, checked when it is made, and the presets as a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

SCALES = (2, 3, 4)
UPSAMPLERS = ("pixelshuffle", "pixelshuffledirect", "nearest+conv")
RESI_CONNECTIONS = ("1conv", "3conv")
NORM_TYPES = ("layer_norm", "rms_norm")
MAX_WINDOW = 64  # four times the tokens of the published window; keeps a hostile file from asking for terabytes


@dataclass(frozen=True, kw_only=True)
class PFTConfig:
    """Everything that a PFT-SR network is built from.

    Names in brackets are the published code's arguments (CVL-UESTC/PFT-SR, ``basicsr/archs/pft_arch.py``).

    Args:
        scale: upscaling factor: 2, 3 or 4 (``upscale``).
        in_channels: channels of the image (``in_chans``); the published RGB mean is subtracted only when it is 3.
        embed_dim: channels C of the tokens; a multiple of `num_heads`.
        num_blocks: transformer layers in each residual group (``depths``).
        num_heads: attention heads h.
        window_size: side w of a window in pixels, even or odd, 2 to 64.
        top_k: attention entries kept per query after each layer (``num_topk``): one number per layer, one for all, or
            None for none cut. w * w or more means dense. Within a chain (the layers of one shift) it may not grow.
        kernel_size: odd side of the depthwise convolutions in LePE and in the feed-forward (``convffn_kernel_size``).
        mlp_ratio: hidden width of the feed-forward divided by `embed_dim`.
        qkv_bias: whether the query, key, value projection has a bias.
        attention_dropout, projection_dropout: dropout probability on attention weights and on each sublayer's output.
        drop_path_rate: stochastic depth of the last layer; grows linearly from 0 at the first.
        norm_type: "layer_norm" or "rms_norm".
        use_lepe: whether the locally enhanced position encoding of the values is added to the attention's output.
        upsampler: "pixelshuffle", "pixelshuffledirect" or "nearest+conv".
        resi_connection: convolution at the end of a group, "1conv" or "3conv".
        img_range: factor on the image after the mean is subtracted.

    Raises:
        ValueError: a value is outside what is said above; the text names it.
    """

    scale: int = 2
    in_channels: int = 3
    embed_dim: int = 48
    num_blocks: tuple[int, ...] = (4, 4, 4, 4)
    num_heads: int = 6
    window_size: int = 8
    top_k: tuple[int, ...] | int | None = None
    kernel_size: int = 3
    mlp_ratio: float = 2.0
    qkv_bias: bool = True
    attention_dropout: float = 0.0
    projection_dropout: float = 0.0
    drop_path_rate: float = 0.0
    norm_type: str = "layer_norm"
    use_lepe: bool = True
    upsampler: str = "pixelshuffle"
    resi_connection: str = "1conv"
    img_range: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_blocks", tuple(self.num_blocks))
        tokens = self.window_size**2
        for name, allowed in (
            ("scale", SCALES),
            ("upsampler", UPSAMPLERS),
            ("resi_connection", RESI_CONNECTIONS),
            ("norm_type", NORM_TYPES),
        ):
            if isinstance(getattr(self, name), float) or getattr(self, name) not in allowed:  # 2.0 is in (2, 3, 4)
                raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}; got {getattr(self, name)!r}")
        for name, low, high in (
            ("in_channels", 1, 64),
            ("embed_dim", 1, 4096),
            ("num_heads", 1, 256),
            ("window_size", 2, MAX_WINDOW),
            ("kernel_size", 1, 31),
        ):
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:  # True is an int too
                raise ValueError(f"{name} must be a whole number from {low} to {high}; got {value!r}")
        if (
            not self.num_blocks
            or len(self.num_blocks) > 64
            or not all(type(d) is int and 1 <= d <= 64 for d in self.num_blocks)
        ):
            raise ValueError(f"num_blocks must list 1 to 64 groups of 1 to 64 layers; got {self.num_blocks!r}")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads; got {self.embed_dim} and {self.num_heads}")
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd; got {self.kernel_size}")
        if not 0 < self.embed_dim * self.mlp_ratio < 65536 or int(self.embed_dim * self.mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio must give 1 to 65535 hidden channels; got {self.mlp_ratio!r}")
        for name in ("attention_dropout", "projection_dropout", "drop_path_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and less than 1; got {getattr(self, name)!r}")
        if not 0 < self.img_range < 1e6:
            raise ValueError(f"img_range must be positive; got {self.img_range!r}")

        depth = sum(self.num_blocks)
        top_k = tokens if self.top_k is None else self.top_k
        top_k = (top_k,) * depth if isinstance(top_k, int) else tuple(top_k)
        if len(top_k) != depth:
            raise ValueError(f"top_k must have one number per layer: {depth} layers, {len(top_k)} numbers")
        if not all(type(k) is int and k >= 1 for k in top_k):
            raise ValueError(f"top_k must be whole numbers of at least 1; got {top_k!r}")
        object.__setattr__(self, "top_k", tuple(min(k, tokens) for k in top_k))
        kept = [tokens, tokens]
        for i, (shifted, keep) in enumerate(self.layers()):
            if keep > kept[shifted]:
                raise ValueError(f"top_k may not grow along a chain: layer {i} keeps {keep} of {kept[shifted]} entries")
            kept[shifted] = keep

    def layers(self) -> Iterator[tuple[bool, int]]:
        """(shifted, entries kept) of every layer from first to last; shifts alternate within each group."""
        assert isinstance(self.top_k, tuple)
        top_k = iter(self.top_k)
        for depth in self.num_blocks:
            for i in range(depth):
                yield i % 2 == 1, next(top_k)

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def hidden_dim(self) -> int:
        """Channels inside the feed-forward, rounded down as the published code does."""
        return int(self.embed_dim * self.mlp_ratio)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types, under our own names."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> PFTConfig:
        """From our names or from the published constructor's, defaults of either filled in accordingly.

        Raises:
            ValueError: an argument is unknown, of the wrong type, or asks for what the network cannot do.
        """
        ours = {f.name for f in fields(cls)}
        published = bool(set(given) & (_PUBLISHED_NAMES.keys() | _PUBLISHED_FIXED.keys()))
        values: dict[str, Any] = dict(_PUBLISHED_DEFAULTS) if published else {}
        for name, value in given.items():
            target = _PUBLISHED_NAMES.get(name, name)
            if name in _PUBLISHED_FIXED:
                if value not in _PUBLISHED_FIXED[name]:
                    raise ValueError(f"{name}={value!r} is not supported, only {_PUBLISHED_FIXED[name][0]!r}")
            elif target in ours:
                values[target] = value
            elif name not in _PUBLISHED_IGNORED:
                raise ValueError(f"unknown network argument {name!r}; known: {', '.join(sorted(ours))}")
        heads = values.get("num_heads")
        if isinstance(heads, (list, tuple)) and len(set(heads)) == 1:  # other networks of this family list them
            values["num_heads"] = heads[0]
        for name in ("num_blocks", "top_k"):
            if isinstance(values.get(name), list):
                values[name] = tuple(values[name])
        try:
            return cls(**values)
        except TypeError as error:  # a string where a number belongs, say
            raise ValueError(f"a network argument has the wrong type: {error}") from None


_PUBLISHED_NAMES = {
    "upscale": "scale",
    "in_chans": "in_channels",
    "depths": "num_blocks",
    "num_topk": "top_k",
    "convffn_kernel_size": "kernel_size",
}
_PUBLISHED_DEFAULTS: dict[str, Any] = {
    "embed_dim": 90,
    "num_blocks": (6, 6, 6, 6),
    "num_heads": 6,
    "top_k": (256,) * 2 + (128,) * 4 + (64,) * 6 + (32,) * 6 + (16,) * 6,
    "kernel_size": 5,
    "upsampler": "",
}
_PUBLISHED_FIXED: dict[str, tuple[Any, ...]] = {"ape": (False,), "patch_norm": (True,), "patch_size": (1, [1, 1])}
_PUBLISHED_IGNORED = ("type", "img_size", "use_checkpoint", "norm_layer")  # of no consequence to the function computed


def _schedule(*pairs: tuple[int, int]) -> tuple[int, ...]:
    """Top-k per layer from (k, number of layers) pairs."""
    return tuple(k for k, count in pairs for _ in range(count))


# `pft` and `pft_light` are the published networks (options/train/001_*.yml and 101_*.yml); the others are ours.
PRESETS: Mapping[str, PFTConfig] = {
    "pft": PFTConfig(
        embed_dim=240, num_blocks=(4, 4, 4, 6, 6, 6), num_heads=6, window_size=32, kernel_size=7, mlp_ratio=2,
        top_k=_schedule((1024, 4), (256, 4), (128, 4), (64, 6), (32, 6), (16, 6)), upsampler="pixelshuffle",
    ),
    "pft_light": PFTConfig(
        embed_dim=52, num_blocks=(2, 4, 6, 6, 6), num_heads=4, window_size=32, kernel_size=7, mlp_ratio=1,
        top_k=_schedule((1024, 2), (256, 4), (128, 6), (64, 6), (32, 6)), upsampler="pixelshuffledirect",
    ),
    "light": PFTConfig(embed_dim=48, num_blocks=(4, 4, 4, 4), num_heads=6),
    "base": PFTConfig(embed_dim=60, num_blocks=(4, 4, 4, 6, 6, 6), num_heads=6),
    "large": PFTConfig(embed_dim=80, num_blocks=(6, 6, 6, 8, 8, 8), num_heads=8, drop_path_rate=0.1),
}  # fmt: skip


def preset(name: str, scale: int) -> PFTConfig:
    """The configuration of a preset at a scale.

    Raises:
        ValueError: there is no such preset or scale.
    """
    if name not in PRESETS:
        raise ValueError(f"there is no variant {name!r}; choose one of {', '.join(PRESETS)}")
    return replace(PRESETS[name], scale=scale)
