"""What CUDA graphs and torch.compile do for a network: time to its first picture, and of later ones.

python benchmarks/graphs.py [--device cuda] [--backend triton] [--preset light pft_light] [--size 256]
                            [--precision fp16] [--repeat 10] --json FILE

The first picture takes what tracing, compiling and capturing take. Compilers keep their results on disk, so another run
shows the start of a later process. Whatever would split a compiled network into several graphs is an error here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pft_arch import PRESETS
from pft_arch.attention import get_backend, serving
from pft_arch.benchmark import PRECISIONS, SEED, error_text, in_precision, machine, timed
from pft_arch.config import preset
from pft_arch.network import PFTSR, from_config

Run = Callable[[], Tensor]
Record = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", type=torch.device)
    parser.add_argument("--backend", nargs="+")
    parser.add_argument("--preset", nargs="+", choices=PRESETS, default=["light", "pft_light"])
    parser.add_argument("--size", nargs="+", type=int, default=[256])
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS)
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()

    cuda = given.device.type == "cuda"
    precisions = given.precision or ["fp16" if cuda else "fp32"]
    backends = given.backend or ["triton" if cuda else "torch"]
    facts = {"machine": machine(given.device)}
    results: list[Record] = []

    def told(record: Record) -> None:
        print(record, flush=True)
        given.json.write_text(json.dumps({**facts, "results": results}, indent=1) + "\n", "utf-8")

    for name, size, precision, backend in product(given.preset, given.size, precisions, backends):
        case = {"preset": name, "scale": 2, "size": size, "precision": precision, "backend": backend}
        records = [{**case, "way": way} for way in WAYS if cuda or way not in ON_CUDA]
        results += records
        with in_precision(precision), torch.inference_mode():
            torch.manual_seed(SEED)
            dtype = PRECISIONS[precision][0]
            model = from_config(preset(name, 2)).eval().requires_grad_(False).to(given.device, dtype)
            model.set_attention_backend(backend)
            image = torch.rand(1, 3, size, size).to(given.device, dtype)
            measure(model, image, records, given.repeat, told)
        torch._dynamo.reset()  # lets go of compiled networks and their graphs


def measure(model: PFTSR, image: Tensor, records: list[Record], repeat: int, told: Callable[[Record], None]) -> None:
    """Fill in the records of one network at one case, a way each, eager first. All take turns."""
    runs: list[tuple[Record, Run]] = []
    pictures: list[Tensor] = []
    for record in records:
        with failures_told(record):
            started = time.perf_counter()
            run = WAYS[record["way"]](model, image)
            pictures.append(run().float().cpu())
            record["first_seconds"] = round(time.perf_counter() - started, 3)
            record["difference"] = float((pictures[-1] - pictures[0]).abs().max())
            if serving(get_backend(record["backend"]), image.device, image.dtype) != record["backend"]:
                raise RuntimeError("this backend leaves the work to torch's")
            run()  # "reduce-overhead" captures at its second call
            runs.append((record, run))
        told(record)
        if "error" in records[0]:
            return  # there is nothing to compare with

    for _ in range(repeat):
        for record, run in runs:
            if "error" not in record:
                with failures_told(record):
                    started = time.process_time()
                    record.setdefault("seconds", []).append(timed(run, image.device))
                    record.setdefault("processor_seconds", []).append(time.process_time() - started)
    for record in records:
        if "error" not in record:
            record["median_seconds"] = statistics.median(record["seconds"])
            record["times_as_fast_as_eager"] = records[0]["median_seconds"] / record["median_seconds"]
            told(record)


@contextmanager
def failures_told(record: Record) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of compilers, drivers, memory
        record["error"] = error_text(error)


def eager(model: PFTSR, image: Tensor) -> Run:
    return lambda: model(image)


def graph(model: PFTSR, image: Tensor) -> Run:
    """The eager pass as one CUDA graph: it launches all its kernels at once, always on the same memory."""
    given = image.clone()
    side = torch.cuda.Stream()  # what libraries set up at their first call must not be captured
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        model(given)
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        picture = model(given)

    def run() -> Tensor:
        given.copy_(image)
        captured.replay()
        return picture.clone()

    return run


def compiled(model: PFTSR, image: Tensor) -> Run:
    network = torch.compile(model, dynamic=False, fullgraph=True)
    return lambda: network(image)


def reduce_overhead(model: PFTSR, image: Tensor) -> Run:
    network = torch.compile(model, dynamic=False, fullgraph=True, mode="reduce-overhead")
    return lambda: network(image).clone()  # the next call writes over the picture


WAYS = {"eager": eager, "graph": graph, "compile": compiled, "reduce-overhead": reduce_overhead}
ON_CUDA = ("graph", "reduce-overhead")


if __name__ == "__main__":
    main()
