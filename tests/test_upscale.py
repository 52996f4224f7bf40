"""Tiles, alpha, batches, memory and faults."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pft_arch import PFTSR, create_pft_sr, upscale
from pft_arch.upscale import _Runner, auto_tile, tile_grid, upscale_ensemble


@pytest.fixture(scope="module")
def model() -> PFTSR:
    torch.manual_seed(0)
    model = PFTSR(
        embed_dim=12,
        num_blocks=(2, 2),
        num_heads=2,
        window_size=8,
        top_k=(64, 64, 24, 24),
        upsampler="pixelshuffledirect",
    )
    with torch.no_grad():
        model.get_submodule("upsample.0").weight *= 0.2  # type: ignore[operator]  # clear of the clamp
    return model.eval()


def whole(image: Tensor, model: PFTSR) -> Tensor:
    """What the network alone makes of (B, H, W, 3)."""
    with torch.inference_mode():
        return model(image.permute(0, 3, 1, 2).contiguous()).permute(0, 2, 3, 1).clamp(0, 1)


def test_untiled_output_is_the_networks_own(model: PFTSR, photo: Tensor) -> None:
    assert torch.equal(upscale(photo, model), whole(photo, model))


@pytest.mark.parametrize(("tile", "overlap"), [(32, 16), (48, 16), (64, 32), (1, 8), (130, 20)])
def test_tiles_leave_no_seam(model: PFTSR, photo: Tensor, tile: int, overlap: int) -> None:
    tiled = upscale(photo, model, tile=tile, overlap=overlap)
    error = (tiled - whole(photo, model)).abs()
    assert error.mean() < 2e-3
    assert error.max() < 0.03


def test_overlap_brings_tiles_closer_to_the_untiled_picture(model: PFTSR, photo: Tensor) -> None:
    errors = [
        float((upscale(photo, model, tile=48, overlap=overlap) - whole(photo, model)).abs().mean())
        for overlap in (8, 16, 32)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < errors[0] / 2


def test_the_automatic_overlap_follows_the_window(model: PFTSR, photo: Tensor) -> None:
    assert torch.equal(upscale(photo, model, tile=64), upscale(photo, model, tile=64, overlap=32))
    wide = PFTSR(embed_dim=4, num_blocks=(1,), num_heads=1, window_size=20, upsampler="pixelshuffledirect").eval()
    assert torch.equal(upscale(photo, wide, tile=80), upscale(photo, wide, tile=80, overlap=40))


def test_a_tile_that_covers_the_image_changes_nothing(model: PFTSR, photo: Tensor) -> None:
    assert torch.equal(upscale(photo, model, tile=192), whole(photo, model))


@pytest.mark.parametrize("size", [(1, 1), (1, 70), (33, 2), (64, 64), (65, 97)])
def test_any_size_is_tiled_to_the_promised_size(model: PFTSR, size: tuple[int, int]) -> None:
    out = upscale(torch.rand(1, *size, 3), model, tile=16, overlap=8)
    assert out.shape == (1, 2 * size[0], 2 * size[1], 3)
    assert out.isfinite().all()


@pytest.mark.parametrize(
    ("length", "side", "overlap"), [(100, 32, 16), (100, 32, 0), (31, 32, 8), (33, 32, 24), (97, 48, 40)]
)
def test_tiles_cover_every_pixel_once_in_sum_and_start_on_the_window_grid(length: int, side: int, overlap: int) -> None:
    total = torch.zeros(3 * length, 3 * 50, 1)
    for tile in tile_grid(length, 50, side, overlap, window=8, scale=3):
        assert tile.top % 8 == tile.left % 8 == 0
        assert tile.height >= min(16, length)
        tile.blend_into(total, torch.ones(1, 3 * tile.height, 3 * tile.width))
    assert torch.allclose(total, torch.ones_like(total))


def test_grey_comes_back_grey(model: PFTSR, photo: Tensor) -> None:
    grey = 0.25 + photo.mean(-1, keepdim=True) / 2
    out = upscale(grey, model, tile=64)
    assert out.shape[-1] == 1
    assert torch.allclose(out, upscale(grey.expand(-1, -1, -1, 3), model, tile=64).mean(-1, keepdim=True), atol=1e-6)


def test_alpha_is_upscaled_apart_from_the_colours(model: PFTSR, photo: Tensor) -> None:
    alpha = photo[..., :1].round()
    out = upscale(torch.cat([photo, alpha], -1), model)
    assert torch.equal(out[..., :3], upscale(photo, model))
    assert torch.equal(out[..., 3:], upscale(alpha, model))


def test_constant_alpha_stays_exactly_as_it_is(model: PFTSR, photo: Tensor) -> None:
    image = torch.cat([photo, torch.full_like(photo[..., :1], 0.25)], -1)
    passes: list[int] = []
    out = upscale(image, model, progress=lambda done, total: passes.append(total))
    assert (out[..., 3] == 0.25).all()
    assert passes[-1] == 1  # and costs no pass


def test_frames_of_a_batch_equal_single_images(model: PFTSR, photo: Tensor) -> None:
    frames = torch.cat([photo, photo.flip(1), photo.flip(2)])[:, :40, :56]
    out = upscale(frames, model)
    singles = torch.cat([upscale(frame[None], model) for frame in frames])
    assert torch.allclose(out, singles, atol=1e-6)


def test_models_of_other_channel_counts_take_their_own_images() -> None:
    one = PFTSR(in_channels=1, embed_dim=8, num_blocks=(1,), num_heads=1, window_size=4).eval()
    assert upscale(torch.rand(1, 9, 9, 1), one).shape == (1, 18, 18, 1)
    with pytest.raises(ValueError, match="the image has 3 channels; this model takes 1"):
        upscale(torch.rand(1, 9, 9, 3), one)


def test_progress_counts_all_tiles_of_all_frames(model: PFTSR) -> None:
    seen: list[tuple[int, int]] = []
    upscale(torch.rand(2, 128, 128, 3), model, tile=64, overlap=16, progress=lambda *now: seen.append(now))
    assert [total for _, total in seen] == [18] * len(seen)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (18, 18)


def test_cancel_passes_through_before_the_next_pass(model: PFTSR) -> None:
    class Cancelled(BaseException):
        pass

    calls = []

    def check() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        upscale(torch.rand(1, 300, 300, 3), model, tile=128, overlap=16, check_cancel=check)
    assert len(calls) == 3


def test_values_that_are_no_colours_are_made_so(model: PFTSR, photo: Tensor) -> None:
    image = photo.clone()
    image[0, 0, 0] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    image[0, 1, 1] = torch.tensor([2.0, -1.0, 0.5])
    clean = photo.clone()
    clean[0, 0, 0] = torch.tensor([0.0, 1.0, 0.0])
    clean[0, 1, 1] = torch.tensor([1.0, 0.0, 0.5])
    assert torch.equal(upscale(image, model), upscale(clean, model))


@pytest.mark.parametrize(
    "image",
    [torch.rand(9, 9, 3), torch.zeros(1, 9, 9, 3, dtype=torch.uint8), torch.rand(1, 0, 9, 3), torch.rand(0, 9, 9, 3)],
    ids=["no batch", "8 bit", "no rows", "no frames"],
)
def test_what_is_no_image_is_refused(model: PFTSR, image: Tensor) -> None:
    with pytest.raises(ValueError, match=r"floating-point images \(B, H, W, C\)"):
        upscale(image, model)


def test_negative_tiles_are_refused(model: PFTSR, photo: Tensor) -> None:
    with pytest.raises(ValueError, match="cannot be negative"):
        upscale(photo, model, tile=-1)


def out_of_memory_above(pixels: int, model: PFTSR, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let passes of more LR pixels fail as a full GPU fails; returns the sizes of those that went through."""
    passed: list[int] = []
    forward = PFTSR.forward

    def limited(self: PFTSR, image: Tensor) -> Tensor:
        size = image.shape[0] * image.shape[2] * image.shape[3]
        if size > pixels:
            raise torch.OutOfMemoryError("CUDA out of memory")
        passed.append(size)
        return forward(self, image)

    monkeypatch.setattr(PFTSR, "forward", limited)
    return passed


def test_out_of_memory_is_survived_with_smaller_tiles(
    model: PFTSR, photo: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = whole(photo, model)
    passed = out_of_memory_above(64 * 64, model, monkeypatch)
    seen: list[tuple[int, int]] = []
    out = upscale(photo, model, tile=96, overlap=16, progress=lambda *now: seen.append(now))
    assert (out - expected).abs().mean() < 1e-3
    assert max(passed) <= 64 * 64
    assert seen[-1][0] == seen[-1][1]


def test_what_does_not_fit_is_tried_once_only(model: PFTSR, photo: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    failed: list[int] = []
    forward = PFTSR.forward

    def limited(self: PFTSR, image: Tensor) -> Tensor:
        if image[0, 0].numel() > 50 * 50:
            failed.append(image[:, 0].numel())
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return forward(self, image)

    monkeypatch.setattr(PFTSR, "forward", limited)
    upscale(photo, model, tile=64, overlap=16)
    assert failed[:2] == [4 * 64 * 64, 64 * 64]
    assert failed == sorted(set(failed), reverse=True)


def test_no_room_for_the_smallest_tile_is_a_clear_error(
    model: PFTSR, photo: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    out_of_memory_above(10, model, monkeypatch)
    with pytest.raises(MemoryError, match="no room for even the smallest tile, 16 x 16"):
        upscale(photo, model)


def test_other_errors_are_not_taken_for_a_lack_of_memory(
    model: PFTSR, photo: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: PFTSR, image: Tensor) -> Tensor:
        raise RuntimeError("expected scalar type Half")

    monkeypatch.setattr(PFTSR, "forward", broken)
    with pytest.raises(RuntimeError, match="scalar type"):
        upscale(photo, model)


def test_tiles_beyond_half_precision_are_computed_again_in_float32(
    photo: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = PFTSR(embed_dim=8, num_blocks=(2,), num_heads=2, window_size=4).eval()
    with torch.no_grad():
        model.layers[0].conv.weight *= 2e5  # type: ignore[union-attr, operator]
        model.conv_before_upsample[0].weight *= 1e-4  # type: ignore[operator]
    half = model.half()
    assert not half(photo.permute(0, 3, 1, 2)).isfinite().all()
    out = upscale(photo, half, tile=64)
    exact = create_like(half)
    assert torch.equal(out, upscale(photo, exact, tile=64))
    assert [record.levelname for record in caplog.records] == ["WARNING"]  # said once, not per tile
    assert next(half.parameters()).dtype == torch.float16  # the caller's model is as it was


def test_output_that_is_never_finite_is_an_error(photo: Tensor) -> None:
    model = PFTSR(embed_dim=8, num_blocks=(2,), num_heads=2, window_size=4).eval()
    with torch.no_grad():
        model.conv_first.weight[0] = float("inf")
    with pytest.raises(RuntimeError, match="not finite, in float32 too"):
        upscale(photo, model)


def create_like(model: PFTSR) -> PFTSR:
    other = PFTSR(embed_dim=8, num_blocks=(2,), num_heads=2, window_size=4).eval()
    other.load_state_dict(model.state_dict())
    return other


def test_ensemble_is_the_mean_over_8_positions(model: PFTSR, photo: Tensor) -> None:
    image = photo[:, :20, :28]
    outs = []
    for turns in range(4):
        for mirror in (False, True):
            out = upscale(torch.rot90(image.flip(2) if mirror else image, turns, (1, 2)), model)
            out = torch.rot90(out, -turns, (1, 2))
            outs.append(out.flip(2) if mirror else out)
    together = upscale_ensemble(image, model)
    assert together.shape == (1, 40, 56, 3)
    assert torch.allclose(together, torch.stack(outs).mean(0), atol=1e-6)
    assert not torch.allclose(together, outs[0], atol=1e-3)
    # and so it turns with the image
    turned = upscale_ensemble(torch.rot90(image, 1, (1, 2)), model)
    assert torch.allclose(torch.rot90(turned, -1, (1, 2)), together, atol=1e-6)


def test_ensemble_reports_tiles_of_all_positions_and_passes_options_on(model: PFTSR, photo: Tensor) -> None:
    calls: list[tuple[int, int]] = []
    image = photo[:, :20, :28]
    upscale_ensemble(image, model, tile=8, overlap=4, progress=lambda done, total: calls.append((done, total)))
    total = calls[-1][1]
    assert total > 8
    assert calls[-1] == (total, total)
    assert calls == sorted(calls)
    with pytest.raises(ValueError, match="cannot be negative"):
        upscale_ensemble(image, model, tile=-1)


def test_previews_show_the_colours_as_far_as_they_are(model: PFTSR, photo: Tensor) -> None:
    image = torch.cat([photo, photo[..., :1]], -1)
    seen: list[float] = []

    def preview(picture: Tensor) -> None:
        assert picture.shape == (288, 384, 3)
        seen.append(float((picture > 0).any(-1).float().mean()))

    upscale(image, model, tile=64, overlap=16, preview=preview)
    assert 0.05 < seen[0] < 0.5
    assert max(seen) > 0.99


def test_automatic_tiles_are_whole_windows_and_at_least_two() -> None:
    for variant in ("light", "pft_light"):
        with torch.device("meta"):
            model = create_pft_sr(2, variant)
        side = auto_tile(model, 10_000, 10_000)
        assert side % model.config.window_size == 0
        assert side >= 2 * model.config.window_size
        assert auto_tile(model, 40, 50) >= 50  # a small image goes through whole


def test_device_memory_does_not_grow_with_the_batch(
    model: PFTSR, photo: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    run = _Runner.run

    def watched(self: _Runner, pictures: Tensor) -> Tensor:
        sizes.append(pictures.numel())
        return run(self, pictures)

    monkeypatch.setattr(_Runner, "run", watched)
    upscale(photo.expand(6, -1, -1, -1), model)
    assert max(sizes) == photo.numel()
