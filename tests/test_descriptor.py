"""PFT-SR through spandrel: its files are opened by everything built on spandrel, and no other file is taken for one."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pft_arch import PFTSR, WeightsError, create_pft_sr
from pft_arch.config import PRESETS
from pft_arch.descriptor import ID, describe_network, register
from pft_arch.weights import is_pft, save_model

# It needs a torchvision that fits torch; tests/host/torchvision_shim.py helps beside a CPU-only torch.
spandrel = pytest.importorskip("spandrel", exc_type=ImportError)

REPOSITORY = Path(__file__).resolve().parents[1]
# What spandrel's constructors need where they have no defaults, or none that work.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "AuraSR": {
        "dim": 8, "image_size": 32, "input_image_size": 8, "style_network": {"dim_in": 3, "dim_out": 8, "depth": 1},
    },
    "MMRealSR": {"num_in_ch": 3, "num_out_ch": 3},
    "NAFNet": {"middle_blk_num": 1, "enc_blk_nums": [1], "dec_blk_nums": [1]},
    "SAFMN": {"dim": 8},
    "SAFMNBCIE": {"dim": 8},
    "SPAN": {"num_in_ch": 3, "num_out_ch": 3},
    "SRFormer": {"img_size": 64, "window_size": 8},
    "Swin2SR": {"window_size": 8},
    "SwinIR": {"window_size": 8},
}  # fmt: skip


def registry() -> Any:
    """All that spandrel knows, its non-commercial companion included where it is installed, and PFT-SR."""
    full = spandrel.MAIN_REGISTRY.copy()
    try:
        from spandrel_extra_arches import EXTRA_REGISTRY  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError:
        pass
    else:
        full.add(*EXTRA_REGISTRY, ignore_duplicates=True)
    register(full)
    return full


FULL = registry()
OTHERS = [entry for entry in FULL if entry.architecture.id != ID]


def networks(architecture: Any) -> Iterator[nn.Module]:
    """Every network class of one of spandrel's architectures, made with its defaults."""
    for made in vars(sys.modules[type(architecture).__module__]).values():
        if inspect.isclass(made) and issubclass(made, nn.Module):
            arguments = ARGUMENTS.get(architecture.id, {})
            try:
                with torch.device("meta"):
                    yield made(**arguments)
            except (RuntimeError, NotImplementedError):  # computes with its weights while it is made
                yield made(**arguments)


@pytest.mark.parametrize("entry", OTHERS, ids=lambda entry: entry.architecture.id)
@pytest.mark.filterwarnings("ignore")
def test_no_file_of_another_architecture_is_taken_for_ours(entry: Any) -> None:
    found = list(networks(entry.architecture))
    assert found
    for network in found:
        state = network.state_dict()
        assert entry.detect(state), "the test has not made what spandrel would detect"
        assert not is_pft(state)


@pytest.mark.parametrize("variant", PRESETS)
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_no_other_architecture_takes_our_files(variant: str, scale: int) -> None:
    with torch.device("meta"):
        state = create_pft_sr(scale, variant).state_dict()
    assert [entry.architecture.id for entry in FULL if entry.detect(state)] == [ID]


def test_we_are_asked_first() -> None:
    assert FULL.architectures("detection")[0].architecture.id == ID


def test_registering_twice_changes_nothing() -> None:
    before = FULL.architectures("detection")
    register(FULL)
    assert FULL.architectures("detection") == before


@pytest.mark.parametrize("kind", ["safetensors", "pth", "wrapped", "prefixed"])
def test_spandrel_opens_our_files_and_gives_what_the_network_gives(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = create_pft_sr(2, "light").eval()
    path, state = tmp_path / "light.pth", network.state_dict()
    if kind == "safetensors":
        path = tmp_path / "light.safetensors"
        save_model(network, path)
    elif kind == "pth":
        torch.save(state, path)
    elif kind == "wrapped":
        torch.save({"params_ema": state}, path)
    else:
        torch.save({"params": {f"module.{key}": value for key, value in state.items()}}, path)

    model = spandrel.ModelLoader(registry=FULL).load_from_file(path)
    assert (model.architecture.id, model.scale, model.input_channels, model.purpose) == (ID, 2, 3, "SR")
    assert isinstance(model.model, PFTSR)
    image = torch.rand(1, 3, 13, 22)
    with torch.inference_mode():
        assert torch.equal(model(image), network(image).clamp(0, 1))


def test_weights_that_fit_no_preset_are_sent_to_our_own_loader(model: PFTSR, tmp_path: Path) -> None:
    save_model(model, tmp_path / "tiny.safetensors")
    with pytest.raises(WeightsError, match=r"embed_dim 12.*cannot see the configuration.*PFT-SR Load Model$"):
        spandrel.ModelLoader(registry=FULL).load_from_file(tmp_path / "tiny.safetensors")


def test_damaged_weights_are_refused_with_the_reason(tmp_path: Path) -> None:
    state: dict[str, Tensor] = create_pft_sr(2, "light").state_dict()
    del state["conv_last.bias"]
    save_file(state, tmp_path / "damaged.safetensors")
    with pytest.raises(WeightsError, match=r"missing conv_last\.bias"):
        spandrel.ModelLoader(registry=FULL).load_from_file(tmp_path / "damaged.safetensors")


def test_a_descriptor_follows_precision() -> None:
    model = describe_network(create_pft_sr(2, "light").eval()).bfloat16()
    assert model(torch.rand(1, 3, 8, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_importing_the_library_imports_no_spandrel() -> None:
    code = "import sys, pft_arch, pft_arch.descriptor; assert 'spandrel' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_registering_costs_nothing_beside_a_loaded_spandrel() -> None:
    code = (
        "import time, spandrel; start = time.perf_counter(); from pft_arch.descriptor import register; register(); "
        "print(time.perf_counter() - start)"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    took = subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=REPOSITORY, env=environment, capture_output=True
    )
    assert float(took.stdout) < 0.3  # seconds; 0.03 on an idle machine
