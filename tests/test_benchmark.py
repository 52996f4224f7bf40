"""The benchmark: what it counts, what it measures, and that one network's failure costs only that network."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import statistics
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pft_arch import rivals
from pft_arch.benchmark import Peak, bound, count, peak_memory
from pft_arch.cli import main
from pft_arch.config import PFTConfig
from pft_arch.network import from_config

CPU = torch.device("cpu")

# What the adapter needs of the authors' file: the imports that it has to answer, and a class with their arguments.
CHECKOUT = """
import smm_cuda
from basicsr.archs.arch_util import to_2tuple, trunc_normal_
from basicsr.utils.registry import ARCH_REGISTRY
from fairscale.nn import checkpoint_wrapper
from pft_arch import PFTConfig, PFTSR
assert to_2tuple(3) == (3, 3) and callable(smm_cuda.SMM_AmV_forward_cuda)

@ARCH_REGISTRY.register()
class PFT(PFTSR):
    def __init__(self, **arguments):
        config = PFTConfig.from_dict(arguments)
        super().__init__(**{name: getattr(config, name) for name in config.__dataclass_fields__})
        self.set_attention_backend("reference")
"""


@pytest.fixture
def checkout(tmp_path) -> Path:
    file = tmp_path / "checkout" / rivals.PUBLISHED_FILE
    file.parent.mkdir(parents=True)
    file.write_text(CHECKOUT, "utf-8")
    return tmp_path / "checkout"


@pytest.fixture
def run(tmp_path, capsys):
    """Runs `pft-sr benchmark` on the smallest image: exit code, results, what it printed."""

    def run_benchmark(*args: str) -> tuple[int, list[dict], str]:
        file = tmp_path / "results.json"
        options = ["--preset", "light", "--size", "8", "--device", "cpu", "--repeat", "2", "--json", str(file)]
        code = main(["benchmark", *options, *args])
        out = capsys.readouterr()
        results = json.loads(file.read_text("utf-8"))["results"] if file.exists() else []
        return code, results, out.out + out.err

    return run_benchmark


def test_command_compares_with_the_published_code(run, checkout):
    code, results, text = run("--backend", "torch", "reference", "--published", str(checkout))

    assert code == 0
    published, *ours = results
    assert [r["code"] for r in results] == ["published", "pft-sr", "pft-sr"]
    for r in results:
        assert len(r["seconds"]) == 2 and r["error"] is None
        assert r["ms_per_megapixel"] == pytest.approx(1e9 * statistics.median(r["seconds"]) / 16**2)
        assert r["peak_bytes"] > 4 * r["parameters"] and r["macs"] == published["macs"] > 0
        assert r["share_of_roofline"] > 0 and r["share_of_matmul"] <= r["share_of_roofline"] * 1.0001
        assert f"{r['ms_per_megapixel']:.4g}" in text
    for r in ours:
        assert r["times_as_fast_as_published"] == pytest.approx(published["ms_per_megapixel"] / r["ms_per_megapixel"])
        assert r["memory_of_published"] == pytest.approx(r["peak_bytes"] / published["peak_bytes"])
        assert r["difference"] < 1e-5  # the same weights, image and function
    assert "smm_cuda" not in sys.modules and "basicsr" not in sys.modules


def test_what_fails_is_told_and_the_rest_goes_on(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "spandrel.architectures.OmniSR.__arch.OmniSR", None)
    code, results, text = run("--backend", "torch", "--published", str(tmp_path), "--spandrel", "OmniSR")

    assert code == 0
    published, ours, spandrel = results
    assert ours["error"] is None and ours["ms_per_megapixel"] > 0 and ours["difference"] is None
    assert "no checkout of CVL-UESTC/PFT-SR" in published["error"] and published["error"] in text
    assert "pip install spandrel" in spandrel["error"]
    assert re.search(r"^light \(published\) +failed$", text, re.M) and re.search(r"^OmniSR .* +failed$", text, re.M)


def test_a_backend_without_kernels_for_the_device_is_not_measured_under_its_name(run):
    code, results, _ = run("--precision", "bf16", "--backend", "numba")
    assert code == 1 and "leaves the work to torch" in results[0]["error"]


def test_networks_of_spandrel_are_built_as_published_and_counted(run):
    pytest.importorskip("spandrel")
    code, results, _ = run("--backend", "torch", "--size", "16", "--spandrel", "ATD light", "SwinIR light")
    assert code == 0 and [r["error"] for r in results] == [None] * 3
    _, atd, swinir = results
    assert atd["parameters"] == 753_204  # 753 K in its paper, arXiv 2401.08209
    assert swinir["parameters"] == 910_152  # 910 K in its paper, arXiv 2108.10257
    assert swinir["macs_by"] == "counter" and swinir["macs"] > 16 * 16 * 24 * 8 * 60 * 60  # its linear layers alone


def test_document_says_met_missed_or_not_measured(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("table", Path(__file__).parent.parent / "benchmarks" / "table.py")
    table = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "table", table)
    spec.loader.exec_module(table)

    def row(precision: str, backend: str, ms: float, times: float, memory: float) -> dict:
        values = {"ms_per_megapixel": ms, "times_as_fast_as_published": times, "memory_of_published": memory}
        return {"network": "pft", "code": "pft-sr", "backend": backend, "scale": 2, "size": 256,
                "precision": precision, **values}  # fmt: skip

    rows = [
        row("fp16", "triton", 10, 9.0, 0.1),
        row("fp16", "torch", 40, 2.25, 0.2),
        row("fp32", "triton", 30, 2.5, 0.1),
    ]
    text = table.targets([{"machine": {"device": "cuda"}, "results": rows}], [])
    verdicts = [line.split(" | ")[2:] for line in text.splitlines()[2:]]
    assert verdicts == [
        *[["", "not measured |"]] * 4,
        ["9.00 times", "met |"],  # the faster backend's
        ["2.50 times", "**missed** |"],
        ["0.100", "met |"],
        *[["", "not measured |"]] * 2,
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preset", "huge"], "choose from pft"),
        (["--scale", "5"], "choose from 2, 3, 4"),
        (["--backend", "fast"], "choose from auto"),
        (["--spandrel", "ESRGAN"], "choose from SwinIR light"),
        (["--size", "0"], "at least 1"),
        (["--published", "nowhere"], "no such folder"),
        (["--precision", "tf32"], "NVIDIA"),
    ],
)
def test_wrong_usage_is_refused_before_any_work(run, options, message):
    code, results, text = run(*options)
    assert code == 2 and not results and message in text


def test_multiply_adds_of_one_layer_by_hand():
    config = PFTConfig(embed_dim=8, num_heads=2, window_size=4, num_blocks=(4,), top_k=(16, 16, 4, 3), kernel_size=3,
                       mlp_ratio=2, upsampler="pixelshuffledirect")  # fmt: skip
    parts = count(config, 5, 4, item=4)  # padded to 8 x 4
    pixels, c = 32, 8
    linear, lepe = 3 * c * c + c * c, 9 * c
    dense, cut = linear + lepe + 16 * c + 16 * c, linear + lepe + 16 * c + 4 * c
    feed_forward = 2 * c * 16 + 9 * 16
    assert [macs // pixels for macs, _ in parts] == [
        9 * 3 * c, dense, feed_forward, dense, feed_forward, cut, feed_forward, linear + lepe + 16 * c + 3 * c,
        feed_forward, 9 * c * c, 9 * c * c, 9 * c * 3 * 4,
    ]  # fmt: skip
    carried_after_the_cut = 4 * 2 * (4 + 2)  # entries, heads, logit and index
    assert parts[5][1] // pixels == 2 * c * 4 + 2 * c * 4 + carried_after_the_cut  # tokens, dense q and k, new carry


@pytest.mark.parametrize("upsampler", ["pixelshuffle", "pixelshuffledirect", "nearest+conv"])
@pytest.mark.parametrize("scale", [3, 4])
def test_multiply_adds_are_those_that_torch_counts(upsampler, scale):
    config = PFTConfig(scale=scale, embed_dim=8, num_heads=2, window_size=4, num_blocks=(2, 1), mlp_ratio=1.5,
                       resi_connection="3conv" if scale == 4 else "1conv", upsampler=upsampler)  # fmt: skip
    network = from_config(config).eval()
    network.set_attention_backend("reference")  # which multiplies whole maps
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.rand(1, 3, 7, 12))
    assert 2 * sum(macs for macs, _ in count(config, 7, 12)) == counter.get_total_flops()


def test_no_machine_is_faster_than_its_rates():
    assert bound([(50, 10), (1, 40)], Peak(flops=100, bytes_per_second=20)) == pytest.approx(1 + 2)


def test_peak_memory_counts_what_is_held_at_once():
    def run() -> None:
        first = torch.zeros(300_000)
        second = torch.zeros(200_000)
        del first
        torch.zeros(100_000)
        del second

    assert peak_memory(run, CPU) == 500_000 * 4


@pytest.mark.parametrize("kept", [1, 20])  # on either side of rivals.GATHER_BELOW
def test_plain_sparse_products_are_the_products_at_the_kept_entries(kept):
    n, d = 64, 5
    torch.manual_seed(0)
    queries, keys, values = torch.rand(2, n, d), torch.rand(2, d, n), torch.rand(2, n, d)
    index = torch.rand(2, n, n).topk(kept).indices.int()
    weights = torch.rand(2, n, kept)
    scores, out = torch.empty(2, n, kept), torch.zeros(2, n, d)
    for b in range(2):
        for i in range(n):
            for e, j in enumerate(index[b, i].tolist()):
                scores[b, i, e] = math.fsum((queries[b, i] * keys[b, :, j]).tolist())
                out[b, i] += weights[b, i, e] * values[b, j]
    torch.testing.assert_close(rivals.plain_query_key_product(queries, keys, index), scores)
    torch.testing.assert_close(rivals.plain_weights_value_product(weights, values, index), out)
