"""The network: convolution, groups of transformer layers with two chains of attention, upsampling head.

Tokens are images (B, H, W, C) throughout the transformer and (B, C, H, W) in the convolutions. Module names are those
of the published code (CVL-UESTC/PFT-SR), so that state dicts interchange in both directions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Carry, get_backend
from .attention.windows import relative_position_index
from .config import PFTConfig, preset

RGB_MEAN = (0.4488, 0.4371, 0.4040)  # of DIV2K, subtracted from RGB images (published code)
HEAD_CHANNELS = 64

Maps = tuple[Carry, Carry]  # what the two chains hand on: unshifted, shifted


class PFTSR(nn.Module):
    """Progressive Focused Transformer for image super-resolution (arXiv 2503.20337).

    Maps (B, in_channels, H, W), any H and W from 1, values in [0, 1], to (B, in_channels, H * scale, W * scale) in the
    dtype of the input, not clamped. It computes in the dtype of its weights. Arguments: see `PFTConfig`.

    Raises:
        ValueError: an argument is out of range, or the input has the wrong number of dimensions or channels.
    """

    def __init__(
        self,
        scale: int = 2,
        in_channels: int = 3,
        embed_dim: int = 48,
        num_blocks: tuple[int, ...] = (4, 4, 4, 4),
        num_heads: int = 6,
        window_size: int = 8,
        mlp_ratio: float = 2.0,
        qkv_bias: bool = True,
        attention_dropout: float = 0.0,
        projection_dropout: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_type: str = "layer_norm",
        use_lepe: bool = True,
        upsampler: str = "pixelshuffle",
        top_k: tuple[int, ...] | int | None = None,
        kernel_size: int = 3,
        resi_connection: str = "1conv",
        img_range: float = 1.0,
    ) -> None:
        super().__init__()
        self.config = c = PFTConfig(
            scale=scale,
            in_channels=in_channels,
            embed_dim=embed_dim,
            num_blocks=num_blocks,
            num_heads=num_heads,
            window_size=window_size,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            attention_dropout=attention_dropout,
            projection_dropout=projection_dropout,
            drop_path_rate=drop_path_rate,
            norm_type=norm_type,
            use_lepe=use_lepe,
            upsampler=upsampler,
            top_k=top_k,
            kernel_size=kernel_size,
            resi_connection=resi_connection,
            img_range=img_range,
        )
        # not used here: a bias is a view of its table. The published state dict holds it, so ours does
        self.register_buffer("relative_position_index_SA", relative_position_index(c.window_size))
        self.conv_first = nn.Conv2d(c.in_channels, c.embed_dim, 3, padding=1)
        self.patch_embed = PatchNorm(c.embed_dim, c.norm_type)

        layers = list(c.layers())
        first = 0
        self.layers = nn.ModuleList()
        for depth in c.num_blocks:
            blocks = [
                PFTBlock(
                    c.embed_dim,
                    c.num_heads,
                    c.window_size,
                    shift_size=c.window_size // 2 if shifted else 0,
                    mlp_ratio=c.mlp_ratio,
                    drop_path=c.drop_path_rate * i / max(1, len(layers) - 1),
                    norm_type=c.norm_type,
                    use_lepe=c.use_lepe,
                    top_k=keep,
                    qkv_bias=c.qkv_bias,
                    kernel_size=c.kernel_size,
                    attention_dropout=c.attention_dropout,
                    projection_dropout=c.projection_dropout,
                )
                for i, (shifted, keep) in enumerate(layers[first : first + depth], first)
            ]
            self.layers.append(ResidualGroup(blocks, c.embed_dim, c.resi_connection))
            first += depth

        self.norm = _norm(c.norm_type, c.embed_dim)
        self.conv_after_body = _group_conv(c.embed_dim, c.resi_connection)
        self._make_head(c)
        self.apply(_init_weights)

    def _make_head(self, c: PFTConfig) -> None:
        if c.upsampler == "pixelshuffledirect":
            self.upsample = nn.Sequential(
                nn.Conv2d(c.embed_dim, c.in_channels * c.scale**2, 3, padding=1), nn.PixelShuffle(c.scale)
            )
            return
        self.conv_before_upsample = nn.Sequential(nn.Conv2d(c.embed_dim, HEAD_CHANNELS, 3, padding=1), nn.LeakyReLU())
        if c.upsampler == "pixelshuffle":
            steps: list[nn.Module] = []
            for factor in upsampling_steps(c.scale):
                steps += [nn.Conv2d(HEAD_CHANNELS, HEAD_CHANNELS * factor**2, 3, padding=1), nn.PixelShuffle(factor)]
            self.upsample = nn.Sequential(*steps)
        else:  # nearest+conv; the published code has it at x4 only
            for i, _ in enumerate(upsampling_steps(c.scale), 1):
                self.add_module(f"conv_up{i}", nn.Conv2d(HEAD_CHANNELS, HEAD_CHANNELS, 3, padding=1))
            self.conv_hr = nn.Conv2d(HEAD_CHANNELS, HEAD_CHANNELS, 3, padding=1)
        self.conv_last = nn.Conv2d(HEAD_CHANNELS, c.in_channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        c = self.config
        if image.dim() != 4 or image.shape[1] != c.in_channels:
            raise ValueError(f"expected an image of shape (B, {c.in_channels}, H, W), got {tuple(image.shape)}")
        height, width = image.shape[-2:]
        # filled on the image's device: a copy from the host would wait for all work before, and bar CUDA graphs
        means = RGB_MEAN if c.in_channels == 3 else (0.0,) * c.in_channels
        mean = torch.cat([image.new_full((1, 1, 1, 1), value) for value in means], 1)
        x = (_pad_mirrored(image, c.window_size) - mean) * c.img_range

        x = self.conv_first(x.to(self.conv_first.weight.dtype))
        x = self.conv_after_body(self._transform(x)) + x
        x = self._reconstruct(x)

        x = x.to(image.dtype) / c.img_range + mean
        return x[..., : height * c.scale, : width * c.scale]

    def _transform(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> same: all groups, H and W multiples of the window."""
        x = self.patch_embed(x.permute(0, 2, 3, 1).contiguous())  # B H W C
        maps: list[Carry] = [None, None]
        for group in self.layers:
            x = group(x, maps)
        return self.norm(x).permute(0, 3, 1, 2)

    def _reconstruct(self, x: Tensor) -> Tensor:
        """(B, C, H, W) features -> (B, in_channels, H * scale, W * scale)."""
        if self.config.upsampler == "pixelshuffledirect":
            return self.upsample(x)
        x = self.conv_before_upsample(x)
        if self.config.upsampler == "pixelshuffle":
            return self.conv_last(self.upsample(x))
        for i, factor in enumerate(upsampling_steps(self.config.scale), 1):
            conv = self.get_submodule(f"conv_up{i}")
            x = F.leaky_relu(conv(F.interpolate(x, scale_factor=factor, mode="nearest")), 0.2)
        return self.conv_last(F.leaky_relu(self.conv_hr(x), 0.2))

    def set_attention_backend(self, name: str) -> None:
        """Choose how attention is computed: "auto" or one of `attention.BACKENDS`; the picture is the same.

        Raises:
            ValueError: there is no backend of that name, or what it needs is missing.
        """
        attend = get_backend(name)
        for module in self.modules():
            if isinstance(module, ProgressiveFocusedAttention):
                module.attend = attend


class ProgressiveFocusedAttention(nn.Module):
    """Windowed self-attention whose map is multiplied onto the previous map of its chain, then cut to `top_k` entries.

    Called as `pfa(x, prev_attn_map) -> (x, attn_map)`: x (B, H, W, dim), H and W multiples of the window;
    prev_attn_map None or what the previous layer with the same shift returned, used up by the call where no gradients
    are recorded.

    Args:
        top_k: entries kept per query; None keeps all. The others as in `PFTConfig`.

    Raises:
        ValueError: when called, for an x of another shape, or a map used up before.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        shift_size: int = 0,
        top_k: int | None = None,
        use_lepe: bool = True,
        qkv_bias: bool = True,
        kernel_size: int = 3,
        attention_dropout: float = 0.0,
        projection_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads; got {dim} and {num_heads}")
        if not 0 <= shift_size < window_size:
            raise ValueError(f"shift_size must be from 0 to window_size - 1; got {shift_size} and {window_size}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1; got {top_k}")
        tokens = window_size**2
        self.dim, self.num_heads, self.window_size, self.shift_size = dim, num_heads, window_size, shift_size
        self.top_k = min(top_k or tokens, tokens)
        self.attention_dropout = attention_dropout
        self.attend = get_backend("auto")
        self.wqkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.v_LePE = DepthwiseConv(dim, kernel_size) if use_lepe else None
        # one column per head in classical networks, one for all in light ones (published code)
        self.attn_win = WindowParameters(dim, num_heads if dim > 100 else 1, window_size)
        self.projection_dropout = nn.Dropout(projection_dropout)

    def forward(self, x: Tensor, prev_attn_map: Carry = None) -> tuple[Tensor, Carry]:
        if x.dim() != 4 or x.shape[-1] != self.dim or x.shape[1] % self.window_size or x.shape[2] % self.window_size:
            raise ValueError(
                f"expected x of shape (B, H, W, {self.dim}) with H and W multiples of the window, {self.window_size}; "
                f"got {tuple(x.shape)}"
            )
        qkv = self.wqkv(x)
        out, attn_map = self.attend(
            qkv,
            self.attn_win.relative_position_bias_table,
            prev_attn_map,
            heads=self.num_heads,
            window=self.window_size,
            shift=self.shift_size,
            keep=self.top_k,
            dropout=self.attention_dropout if self.training else 0.0,
        )
        if self.v_LePE is not None:
            out = out + self.v_LePE(qkv[..., 2 * self.dim :])
        return self.projection_dropout(self.attn_win.proj(out)), attn_map


class PFTBlock(ProgressiveFocusedAttention):
    """One transformer layer: attention and convolutional feed-forward, each normalised before and added to x.

    Called as `block((x, attn_map)) -> (x, attn_map)`, so that blocks stand in an `nn.Sequential`: x (B, H, W, dim),
    H and W multiples of the window; attn_map None at first, else what the block before returned: the maps of both
    chains, of which a block replaces the one of its own shift.

    It extends the attention instead of holding one, because the published state dict has both in one module.
    Arguments as in `PFTConfig`; drop_path is this layer's probability to be skipped in training.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        shift_size: int = 0,
        mlp_ratio: float = 2.0,
        drop_path: float = 0.0,
        norm_type: str = "layer_norm",
        use_lepe: bool = True,
        top_k: int | None = None,
        qkv_bias: bool = True,
        kernel_size: int = 3,
        attention_dropout: float = 0.0,
        projection_dropout: float = 0.0,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            window_size,
            shift_size,
            top_k,
            use_lepe,
            qkv_bias,
            kernel_size,
            attention_dropout,
            projection_dropout,
        )
        self.norm1 = _norm(norm_type, dim)
        self.norm2 = _norm(norm_type, dim)
        self.convffn = ConvFFN(dim, int(dim * mlp_ratio), kernel_size)
        self.drop_path = drop_path

    def forward(self, state: tuple[Tensor, Maps | None]) -> tuple[Tensor, Maps]:  # type: ignore[override]
        x, maps = state
        unshifted, shifted = maps or (None, None)
        previous = shifted if self.shift_size else unshifted

        attended, attn_map = super().forward(self.norm1(x), previous)
        x = x + self._drop_path(attended)
        x = x + self._drop_path(self.projection_dropout(self.convffn(self.norm2(x))))
        return x, (unshifted, attn_map) if self.shift_size else (attn_map, shifted)

    def _drop_path(self, x: Tensor) -> Tensor:
        """Stochastic depth (arXiv 1603.09382): in training, zero for a whole sample at the given probability."""
        if not self.training or self.drop_path == 0:
            return x
        kept = torch.rand(x.shape[0], 1, 1, 1, device=x.device) >= self.drop_path
        return x * kept / (1 - self.drop_path)


class ConvFFN(nn.Module):
    """Feed-forward with a depthwise convolution between its two projections; (B, H, W, C) -> same."""

    def __init__(self, dim: int, hidden: int, kernel_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = DepthwiseConv(hidden, kernel_size)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.fc1(x))
        return self.fc2(x + self.dwconv(x))


class DepthwiseConv(nn.Module):
    """Depthwise convolution followed by GELU; (B, H, W, C) -> same."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.depthwise_conv = nn.Sequential(
            nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels), nn.GELU()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.depthwise_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class WindowParameters(nn.Module):
    """The attention's relative-position table and output projection, under their published names."""

    def __init__(self, dim: int, bias_columns: int, window: int) -> None:
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, bias_columns))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.proj = nn.Linear(dim, dim)


class ResidualGroup(nn.Module):
    """Layers, a convolution, and a residual around both; (B, H, W, C) -> same.

    The list of both chains' maps is changed in place, so that no caller holds on to maps that are used up.
    """

    def __init__(self, blocks: list[PFTBlock], dim: int, resi_connection: str) -> None:
        super().__init__()
        self.residual_group = nn.ModuleDict({"layers": nn.Sequential(*blocks)})
        self.conv = _group_conv(dim, resi_connection)

    def forward(self, x: Tensor, maps: list[Carry]) -> Tensor:
        deep = x
        for block in self.residual_group["layers"].children():
            deep, maps[:] = block((deep, (maps[0], maps[1])))
        return self.conv(deep.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) + x


class PatchNorm(nn.Module):
    """Norm of the tokens before the first layer, under its published name."""

    def __init__(self, dim: int, norm_type: str) -> None:
        super().__init__()
        self.norm = _norm(norm_type, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


def create_pft_sr(scale: int = 2, variant: str = "light") -> PFTSR:
    """A freshly initialised network: scale 2, 3 or 4, variant one of `PRESETS`.

    Raises:
        ValueError: there is no such variant or scale.
    """
    return from_config(preset(variant, scale))


def from_config(config: PFTConfig) -> PFTSR:
    """A freshly initialised network of that configuration."""
    values: dict[str, Any] = {name: getattr(config, name) for name in config.__dataclass_fields__}
    return PFTSR(**values)


def upsampling_steps(scale: int) -> tuple[int, ...]:
    """Factors of the head's steps, one after the other."""
    return (2, 2) if scale == 4 else (scale,)


def _norm(norm_type: str, dim: int) -> nn.Module:
    return nn.LayerNorm(dim) if norm_type == "layer_norm" else nn.RMSNorm(dim, eps=1e-5)


def _group_conv(dim: int, resi_connection: str) -> nn.Module:
    if resi_connection == "1conv":
        return nn.Conv2d(dim, dim, 3, padding=1)
    return nn.Sequential(
        nn.Conv2d(dim, dim // 4, 3, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(dim // 4, dim // 4, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(dim // 4, dim, 3, padding=1),
    )


def _init_weights(module: nn.Module) -> None:
    """As the published code: linear layers truncated normal, everything else as torch does."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _pad_mirrored(image: Tensor, window: int) -> Tensor:
    """Extends (B, C, H, W) at the bottom and right to multiples of the window by mirrored copies (edge repeated)."""
    for dim in (2, 3):
        size = image.shape[dim]
        padded = -(-size // window) * window
        if padded != size:
            place = torch.arange(padded, device=image.device) % (2 * size)
            image = image.index_select(dim, torch.minimum(place, 2 * size - 1 - place))
    return image
