"""`pft-sr benchmark`."""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path

from .common import PROGRAM, CommandError, Parser, UsageError, pick_device, whole_number

BENCHMARK_EXAMPLES = f"""\
examples:
  {PROGRAM} benchmark --preset light
  {PROGRAM} benchmark --preset pft_light --size 256 512 --precision fp16 fp32 --device cuda --json gpu.json
  {PROGRAM} benchmark --preset pft_light --published ../PFT-SR --spandrel

Weights are random, the same for all implementations of a preset. The networks take turns, and the medians of their
times are compared; ms/MP are milliseconds per megapixel of output. GMACs are billions of multiply-adds. "of matmul" is
the share of the rate that a large matrix product reaches on this machine, "of roofline" the share of what it allows if
every layer reads and writes memory just once. "difference" is the largest from the published code's picture.

--published: a checkout of github.com/CVL-UESTC/PFT-SR. Its CUDA extension has to be built for a GPU, in ops_smm by
python setup.py build_ext --inplace; on a CPU plain torch stands in for it. It runs in float32 only.
"""


def add_benchmark(commands: argparse._SubParsersAction[Parser]) -> None:
    text = "Speed and memory on this machine, beside the authors' code and other upscalers."
    parser = commands.add_parser("benchmark", help="measure speed and memory", description=text)
    parser.closing = lambda: BENCHMARK_EXAMPLES
    parser.add_argument("--preset", nargs="+", default=["light"], metavar="NAME", help="networks (default: light)")
    parser.add_argument("--scale", nargs="+", type=whole_number, default=[2], metavar="S", help="2, 3, 4 (default: 2)")
    parser.add_argument(
        "--size", nargs="+", type=whole_number, default=[128], metavar="N", help="side of the input (default: 128)"
    )
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=("fp32", "tf32", "bf16", "fp16"),
        default=["fp32"],
        help="of the arithmetic (default: fp32)",
    )
    parser.add_argument(
        "--backend", nargs="+", metavar="NAME", help="of the attention (default: those made for the device)"
    )
    parser.add_argument("--repeat", type=whole_number, default=5, metavar="N", help="timed runs of each (default: 5)")
    parser.add_argument("--device", default="auto", help="auto (default: GPU where there is one), cpu, cuda, mps, ...")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured, and on what, here too")
    parser.add_argument("--published", type=Path, metavar="DIR", help="compare with the authors' code in this checkout")
    parser.add_argument(
        "--spandrel", nargs="*", metavar="NAME", help="compare with networks of spandrel (without a NAME: all it knows)"
    )
    parser.set_defaults(run=run_benchmark)


def run_benchmark(args: argparse.Namespace) -> int:
    from ..attention import BACKENDS
    from ..config import PRESETS, SCALES
    from ..rivals import SPANDREL

    for option, given, known in (
        ("--preset", args.preset, list(PRESETS)),
        ("--scale", args.scale, list(SCALES)),
        ("--backend", args.backend or [], ["auto", *BACKENDS]),
        ("--spandrel", args.spandrel or [], list(SPANDREL)),
    ):
        for name in given:
            if name not in known:
                raise UsageError(f"{option} {name}: choose from {', '.join(map(str, known))}.")
    if min(args.size) < 1 or args.repeat < 1:
        raise UsageError("--size and --repeat must be at least 1.")
    if args.json and not args.json.parent.is_dir():
        raise UsageError(f"{args.json.parent}: no such folder.")
    if args.published and not args.published.is_dir():
        raise UsageError(f"{args.published}: no such folder.")
    device = pick_device(args.device)
    if "tf32" in args.precision and device.type != "cuda":
        raise UsageError(f"--precision tf32 is a matter of NVIDIA GPUs, and the device is {device}.")

    from .. import benchmark as b

    facts = b.machine(device)
    say(b.describe_machine(facts))
    peaks: dict[str, b.Peak] = {}
    for name in dict.fromkeys(args.precision):
        peaks[name] = b.measure_peak(device, name)
        say(f"{name}: {peaks[name].flops / 1e9:.4g} GFLOP/s in a matrix product, "
            f"{peaks[name].bytes_per_second / 1e9:.4g} GB/s in a copy")  # fmt: skip

    results: list[b.Result] = []
    backends = args.backend or b.default_backends(device)
    rivals = list(SPANDREL) if args.spandrel == [] else args.spandrel or []
    for scale, size, precision in product(args.scale, args.size, peaks):
        networks = b.contenders(args.preset, scale, backends, device, args.published, rivals)
        results += b.compare(b.Case(scale, size, precision), networks, device, peaks[precision], args.repeat, say)
        if args.json:  # after every case: what was measured stays, whatever becomes of the rest
            write_json(args.json, b.to_json(facts, peaks, results))
    print(f"\n{b.format_table(results)}")
    return 0 if any(result.code == "pft-sr" and not result.error for result in results) else 1


def say(line: str) -> None:
    print(line, flush=True)


def write_json(path: Path, content: dict[str, object]) -> None:
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
        part.replace(path)
    except OSError as error:
        raise CommandError(f"{path}: not written ({error.strerror}).") from error
