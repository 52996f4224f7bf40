"""The network against the published one, and what its arguments promise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from conftest import Golden, golden_files
from pft_arch import PFTSR, PRESETS, PFTBlock, ProgressiveFocusedAttention, create_pft_sr, load_model
from pft_arch.config import RESI_CONNECTIONS, SCALES, UPSAMPLERS
from pft_arch.network import from_config

PLAIN = ("reference", "torch")  # the backends of every dtype and of gradients
TINY = {"embed_dim": 12, "num_blocks": (2, 3), "num_heads": 2, "window_size": 4}


def golden_id(path: Path) -> str:
    return path.name.split(".")[0]


@pytest.fixture(params=golden_files(), ids=golden_id)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


@pytest.mark.parametrize("backend", PLAIN)
def test_equals_the_published_network_in_float64(golden: Golden, backend: str) -> None:
    model = load_model(golden.weights, dtype=torch.float64)
    model.set_attention_backend(backend)
    with torch.no_grad():
        out = model(golden.io["input"].double())
    assert (out - golden.io["output"]).abs().max() < 1e-6


@pytest.mark.parametrize("backend", [*PLAIN, "numba"])
def test_equals_the_published_network_in_float32_but_for_borderline_cuts(golden: Golden, backend: str) -> None:
    model = load_model(golden.weights)
    model.set_attention_backend(backend)
    with torch.no_grad():
        error = (model(golden.io["input"]) - golden.io["output"]).abs()
    assert error.mean() < 3e-5
    assert error.max() < 5e-3


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("path", golden_files("*.grad.safetensors"), ids=golden_id)
def test_gradients_equal_those_of_the_published_network(path: Path, backend: str) -> None:
    golden = Golden(path.with_name(path.name.replace(".grad.", ".weights.")))
    stored = golden.grad
    expected = {key.removeprefix("grad."): value for key, value in stored.items() if key.startswith("grad.")}
    probe = next(value for key, value in stored.items() if "probe" in key)
    model = load_model(golden.weights, dtype=torch.float64).train()
    model.set_attention_backend(backend)
    image = golden.io["input"].double().requires_grad_()

    (model(image) * probe).mean().backward()

    got = {name: parameter.grad for name, parameter in model.named_parameters()}
    got["input"] = image.grad
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(got[name], value) < 1e-5, name


def relative_error(got: Tensor | None, expected: Tensor) -> float:
    assert got is not None
    return float((got - expected).norm() / expected.norm().clamp_min(1e-30))


def test_state_dict_has_the_published_keys_and_shapes_in_both_directions(golden: Golden) -> None:
    published = load_file(golden.weights)
    model = load_model(golden.weights)
    ours = model.state_dict()
    index = ours.pop("relative_position_index_SA")  # a buffer of the published state dict, left out of these files
    published.pop("relative_position_index_SA", None)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in published.items()}
    assert index.shape == (golden.config["window_size"] ** 2,) * 2


# Counted from the published networks (DESIGN of the pack; the paper gives 19.6 M and 0.78 M at x2).
@pytest.mark.parametrize(
    ("variant", "scale", "millions"),
    [("pft", 2, 19.62), ("pft_light", 2, 0.776), ("pft_light", 3, 0.783), ("pft_light", 4, 0.792)],
)
def test_published_presets_have_the_published_number_of_parameters(variant: str, scale: int, millions: float) -> None:
    with torch.device("meta"):
        model = create_pft_sr(scale, variant)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize("variant", PRESETS)
def test_every_preset_builds_and_runs_at_every_scale(variant: str) -> None:
    for scale in SCALES:
        model = create_pft_sr(scale, variant).eval()
        assert model.config.scale == scale
    small = replace(PRESETS[variant], num_blocks=(2,), top_k=PRESETS[variant].top_k[:2])
    with torch.no_grad():
        assert from_config(small).eval()(torch.rand(1, 3, 20, 30)).shape == (1, 3, 40, 60)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("upsampler", UPSAMPLERS)
@pytest.mark.parametrize("resi_connection", RESI_CONNECTIONS)
def test_every_head_gives_the_promised_size(scale: int, upsampler: str, resi_connection: str) -> None:
    model = PFTSR(scale=scale, upsampler=upsampler, resi_connection=resi_connection, **TINY).eval()
    with torch.no_grad():
        assert model(torch.rand(2, 3, 5, 7)).shape == (2, 3, 5 * scale, 7 * scale)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (3, 2), (4, 4), (5, 8), (17, 6)])
@pytest.mark.parametrize("backend", PLAIN)
def test_any_size_of_at_least_one_pixel_works(size: tuple[int, int], backend: str) -> None:
    model = PFTSR(window_size=8, top_k=(64, 64, 20, 20, 7), embed_dim=12, num_blocks=(2, 3), num_heads=2).eval()
    model.set_attention_backend(backend)
    with torch.no_grad():
        out = model(torch.rand(1, 3, *size))
    assert out.shape[-2:] == (2 * size[0], 2 * size[1])
    assert out.isfinite().all()


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_images_of_other_channel_counts_come_back_with_as_many(channels: int) -> None:
    model = PFTSR(in_channels=channels, **TINY).eval()
    with torch.no_grad():
        assert model(torch.rand(1, channels, 8, 8)).shape == (1, channels, 16, 16)
    with pytest.raises(ValueError, match=rf"\(B, {channels}, H, W\)"):
        model(torch.rand(1, 3, 8, 8))


def test_rms_norm_replaces_every_layer_norm() -> None:
    model = PFTSR(norm_type="rms_norm", **TINY)
    assert not any(isinstance(module, nn.LayerNorm) for module in model.modules())
    assert any(isinstance(module, nn.RMSNorm) for module in model.modules())
    assert model(torch.rand(1, 3, 8, 8)).isfinite().all()


def test_without_lepe_the_positional_convolution_is_gone() -> None:
    model = PFTSR(use_lepe=False, **TINY)
    assert not any("LePE" in key for key in model.state_dict())
    assert model(torch.rand(1, 3, 8, 8)).isfinite().all()


@pytest.mark.parametrize("name", ["attention_dropout", "projection_dropout", "drop_path_rate"])
@pytest.mark.parametrize("backend", PLAIN)
def test_dropout_and_stochastic_depth_act_in_training_only(name: str, backend: str) -> None:
    torch.manual_seed(0)
    model = PFTSR(top_k=(16, 16, 8, 8, 8), **{name: 0.5}, **TINY)
    model.set_attention_backend(backend)
    image = torch.rand(1, 3, 8, 8)
    assert not torch.equal(model.train()(image), model(image))
    assert torch.equal(model.eval()(image), model(image))


def test_stochastic_depth_grows_from_nothing_to_the_given_rate() -> None:
    rates = [m.drop_path for m in PFTSR(drop_path_rate=0.2, **TINY).modules() if isinstance(m, PFTBlock)]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


def test_skipped_layers_keep_the_expectation() -> None:
    torch.manual_seed(0)
    block = PFTBlock(12, 2, 4, drop_path=0.5).train()
    x = torch.ones(4000, 1, 1, 12)
    assert block._drop_path(x).mean() == pytest.approx(1, abs=0.06)


def test_blocks_chain_in_a_sequential_and_keep_two_chains() -> None:
    blocks = nn.Sequential(*(PFTBlock(12, 2, 4, shift_size=2 * (i % 2), top_k=8 if i > 1 else None) for i in range(4)))
    x, (unshifted, shifted) = blocks((torch.rand(1, 8, 12, 12), None))
    assert x.shape == (1, 8, 12, 12)
    assert unshifted is not None and shifted is not None


def test_attention_alone_takes_the_map_of_the_layer_before() -> None:
    torch.manual_seed(0)
    first, second = (ProgressiveFocusedAttention(12, 2, 4, top_k=k) for k in (None, 5))
    x = torch.rand(2, 8, 8, 12)
    y, attn_map = first(x)
    z, cut = second(y, attn_map)
    assert z.shape == y.shape == x.shape
    assert not torch.allclose(z, second(y, None)[0])  # the map before matters
    assert second(z, cut)[0].shape == x.shape


def test_attention_refuses_images_that_are_no_whole_windows() -> None:
    with pytest.raises(ValueError, match="multiples of the window, 4"):
        ProgressiveFocusedAttention(12, 2, 4)(torch.rand(1, 6, 8, 12))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_take_and_return_float32_images(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = create_pft_sr(2, "light").eval()
    image = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        exact = model(image)
        half = model.to(dtype)(image)
    assert half.dtype == torch.float32
    assert (half - exact).abs().mean() < 5e-3


class NothingFromTheHost(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert function.__name__ not in ("tensor", "as_tensor", "asarray", "new_tensor", "from_numpy")
        return function(*args, **(kwargs or {}))


def test_a_device_can_run_ahead_of_the_host() -> None:
    """No value goes from the host or comes back: the device never waits, and CUDA graphs can hold the forward."""
    with torch.device("meta"):  # which refuses to be read
        model = PFTSR(top_k=(16, 16, 8, 8, 4), **TINY).eval()
        image = torch.rand(1, 3, 9, 14)
    model.set_attention_backend("torch")
    with torch.inference_mode(), NothingFromTheHost():
        assert model(image).shape == (1, 3, 18, 28)


def test_torch_compile_sees_one_graph() -> None:
    torch.manual_seed(0)
    model = PFTSR(top_k=(16, 16, 8, 8, 4), **TINY).eval()
    model.set_attention_backend("torch")
    image = torch.rand(1, 3, 9, 14)
    with torch.inference_mode():
        expected = model(image)
        traced = torch.compile(model, backend="eager", fullgraph=True)(image)
    torch.testing.assert_close(traced, expected)


def test_gradients_reach_every_parameter() -> None:
    model = PFTSR(top_k=(16, 16, 8, 8, 4), **TINY).train()
    model(torch.rand(1, 3, 8, 8)).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": 5}, "scale must be one of 2, 3, 4"),
        ({"embed_dim": 50, "num_heads": 6}, "multiple of num_heads"),
        ({"window_size": 100000}, "window_size must be a whole number from 2 to 64"),
        ({"top_k": (8, 8)}, "16 layers, 2 numbers"),
        ({"top_k": (8, 8, 16) + (8,) * 13}, "layer 2 keeps 16 of 8"),
        ({"upsampler": "bilinear"}, "upsampler must be one of"),
        ({"norm_type": "batch_norm"}, "norm_type must be one of"),
        ({"kernel_size": 4}, "kernel_size must be odd"),
        ({"drop_path_rate": 1.0}, "drop_path_rate"),
        ({"num_blocks": ()}, "num_blocks"),
    ],
)
def test_impossible_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PFTSR(**arguments)  # type: ignore[arg-type]


def test_unknown_variants_and_backends_are_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="pft_light"):
        create_pft_sr(2, "swinir")
    with pytest.raises(ValueError, match="reference, torch, numba, triton"):
        create_pft_sr(2, "light").set_attention_backend("cuda")
