"""Speed and memory of networks, side by side on one machine: ours, the authors' code, and those of spandrel.

All networks of a case (scale, size, precision) take turns, A B C A B C ..., so that whatever else the machine does
meets all of them alike; what is reported are medians, and ratios between medians of one case.

The physical limit beside it is measured in the same run: the rate of a large matrix product in the same precision, and
of a large copy. `bound` counts a PFT-SR network's parts (a layer's attention, its feed-forward, each convolution), each
as long as its multiply-adds take at the first rate, or reading its input and writing its output once, carries included,
at the second, whichever is longer.
"""

from __future__ import annotations

import gc
import importlib.metadata
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .attention import get_backend, serving
from .config import PFTConfig, preset
from .network import HEAD_CHANNELS, from_config, upsampling_steps
from .rivals import SPANDREL, published_network, spandrel_network

SEED = 0
TURNS, ENOUGH_SECONDS = 3, 20.0  # a network that has had so many turns and so much time takes no further ones
BUSY = 0.5  # load per core from which times mean little
# Precision: dtype of weights and image, and whether matrix products and convolutions may use TF32. In half precision
# that concerns only what stays in float32, the published code, which gets torch's defaults.
PRECISIONS: dict[str, tuple[torch.dtype, bool, bool]] = {
    "fp32": (torch.float32, False, False),
    "tf32": (torch.float32, True, True),
    "bf16": (torch.bfloat16, False, True),
    "fp16": (torch.float16, False, True),
}


@dataclass(frozen=True)
class Case:
    """What all networks are compared at; size is the side of the square input in pixels."""

    scale: int
    size: int
    precision: str

    def __str__(self) -> str:
        return f"x{self.scale} {self.size}x{self.size} {self.precision}"


@dataclass(frozen=True)
class Contender:
    """A network in one implementation. code: "pft-sr", "published" or "spandrel"; config and backend: PFT-SR's."""

    network: str
    code: str
    build: Callable[[], nn.Module]
    backend: str | None = None
    config: PFTConfig | None = None

    @property
    def half(self) -> bool:
        """Whether it runs in half precision; the published CUDA extension takes float32 only."""
        return self.code != "published"


@dataclass
class Result:
    """One network at one case. What could not be measured is None, and `error` says why.

    seconds: of each timed run, on the clock; processor_seconds: of all the process's threads meanwhile. On a CPU their
    sum is far below threads times seconds where other work disturbed the measurement.
    macs: multiply-adds of one image, `macs_by` "formula" or "counter" (torch's FlopCounterMode).
    peak_bytes: most memory held at once by one pass: weights, image, and all that torch allocates.
    bound_seconds: see the module's docstring. difference: largest from the published code's picture.
    """

    network: str
    code: str
    backend: str | None
    scale: int
    size: int
    precision: str
    computed_in: str
    parameters: int | None = None
    seconds: list[float] = field(default_factory=list)
    processor_seconds: list[float] = field(default_factory=list)
    ms_per_megapixel: float | None = None
    peak_bytes: int | None = None
    macs: int | None = None
    macs_by: str | None = None
    share_of_matmul: float | None = None
    bound_seconds: float | None = None
    share_of_roofline: float | None = None
    times_as_fast_as_published: float | None = None
    memory_of_published: float | None = None
    difference: float | None = None
    error: str | None = None

    def __str__(self) -> str:
        return f"{self.network} ({self.backend or self.code}) x{self.scale} {self.size}x{self.size} {self.precision}"


@dataclass(frozen=True)
class Peak:
    """What this machine was seen to do: multiply-adds count as two operations, a copied byte as one read, one write."""

    flops: float
    bytes_per_second: float


def contenders(
    presets: Iterable[str],
    scale: int,
    backends: Sequence[str],
    device: torch.device,
    published: Path | None = None,
    spandrel: Iterable[str] = (),
) -> list[Contender]:
    """The networks of a case. All of one preset have the same seeded weights."""
    found: list[Contender] = []
    for name in presets:
        config = preset(name, scale)
        if published:
            found.append(Contender(name, "published", _build_published(published, config, device), None, config))
        found += [Contender(name, "pft-sr", _build_ours(config, backend), backend, config) for backend in backends]
    for name in spandrel:
        found.append(Contender(name, "spandrel", _build_spandrel(name, scale)))
    return found


def default_backends(device: torch.device) -> list[str]:
    """Those that have something of their own to offer on a device."""
    return ["torch", *{"cpu": ["numba"], "cuda": ["triton"]}.get(device.type, [])]


def _build_ours(config: PFTConfig, backend: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        get_backend(backend)  # fails before any work where a package is missing
        network = from_config(config)
        network.set_attention_backend(backend)
        return network

    return build


def _build_published(checkout: Path, config: PFTConfig, device: torch.device) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        weights = from_config(config).state_dict()
        network = published_network(checkout, config, device)
        network.load_state_dict(weights)
        return network

    return build


def _build_spandrel(name: str, scale: int) -> Callable[[], nn.Module]:
    return lambda: spandrel_network(name, scale)


def compare(
    case: Case,
    networks: Sequence[Contender],
    device: torch.device,
    peak: Peak,
    repeat: int,
    say: Callable[[str], None] = lambda line: None,
) -> list[Result]:
    """Measure networks at one case, taking turns. One that fails says so in its result, and the others go on."""
    results: list[Result] = []
    runs: list[tuple[Result, Callable[[], Tensor]]] = []
    pictures: dict[str, Tensor] = {}
    with in_precision(case.precision), torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a torch newer than the networks
        for contender in networks:
            result = _empty_result(case, contender)
            results.append(result)
            with _recorded(result, say):
                started = time.perf_counter()
                run, picture = _prepare(case, contender, device, result)
                if contender.config:
                    if contender.code == "published":
                        pictures[contender.network] = picture
                    elif contender.network in pictures:
                        result.difference = float((picture - pictures[contender.network]).abs().max())
                runs.append((result, run))
                say(f"{result}: ready after {time.perf_counter() - started:.1f} s{_memory_text(result)}")

        for turn in range(repeat):
            for result, run in runs:
                if result.error or _had_enough(result):
                    continue
                with _recorded(result, say):
                    processor = time.process_time()
                    result.seconds.append(timed(run, device))
                    result.processor_seconds.append(time.process_time() - processor)
                    if turn == repeat - 1 or _had_enough(result):
                        _summarise(result, peak)
                        say(f"{result}: {result.ms_per_megapixel:.4g} ms/MP, median of {len(result.seconds)}")
    runs.clear()
    _release(device)
    _add_ratios(results)
    return results


def _empty_result(case: Case, contender: Contender) -> Result:
    computed_in = case.precision if contender.half or case.precision in ("fp32", "tf32") else "fp32"
    return Result(contender.network, contender.code, contender.backend, **asdict(case), computed_in=computed_in)


def _had_enough(result: Result) -> bool:
    return len(result.seconds) >= TURNS and sum(result.seconds) > ENOUGH_SECONDS


@contextmanager
def _recorded(result: Result, say: Callable[[str], None]) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # anybody's code, on anybody's machine
        result.error = error_text(error)
        say(f"{result}: FAILED, {result.error}")
    if result.error:
        gc.collect()


def error_text(error: BaseException) -> str:
    """Kind and first line of an error, for a result that is one."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def _prepare(
    case: Case, contender: Contender, device: torch.device, result: Result
) -> tuple[Callable[[], Tensor], Tensor]:
    """Build a network, run it once to warm up, and fill in what is measured once. Returns a run, and its picture."""
    dtype = PRECISIONS[case.precision][0] if contender.half else torch.float32
    if not _is_itself(contender.backend, device, dtype):
        raise RuntimeError(f"on {device} in {case.precision} this backend leaves the work to torch's")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        image = torch.rand(1, 3, case.size, case.size).to(device, dtype)
        # frozen, because torch's counter trips over parameters that are arguments where gradients are off
        network = contender.build().eval().requires_grad_(False).to(device, dtype)

    def run() -> Tensor:
        out: Tensor = network(image)
        return out

    result.parameters = sum(p.numel() for p in network.parameters())
    if contender.config:
        parts = count(contender.config, case.size, case.size, dtype.itemsize)
        result.macs, result.macs_by = sum(macs for macs, _ in parts), "formula"
    counter = None if contender.config else _flop_counter()
    pictures: list[Tensor] = []

    def first() -> None:
        with counter or nullcontext():
            pictures.append(run())

    if device.type == "cpu":
        working = peak_memory(first, device)
    else:
        first()  # compiles, and fills caches that would count as memory
        working = peak_memory(run, device)
    if not _is_itself(contender.backend, device, dtype):
        raise RuntimeError(f"on {device} in {case.precision} this backend leaves the work to torch's")
    if counter:
        result.macs, result.macs_by = counter.get_total_flops() // 2, "counter"
    if working is not None:
        held = [*network.parameters(), *network.buffers(), image]
        result.peak_bytes = working + sum(tensor.nbytes for tensor in held)
    picture = pictures[0].float().cpu()
    expected = (1, 3, case.size * case.scale, case.size * case.scale)
    if picture.shape != expected:
        raise RuntimeError(f"its picture is {tuple(picture.shape)} and not {expected}")
    return run, picture


def _is_itself(backend: str | None, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a backend has kernels of its own for that, and does not hand over to another."""
    return backend in (None, "auto") or serving(get_backend(backend), device, dtype) == backend


def _flop_counter() -> Any:
    from torch.utils.flop_counter import FlopCounterMode

    return FlopCounterMode(display=False)


def _summarise(result: Result, peak: Peak) -> None:
    median = statistics.median(result.seconds)
    result.ms_per_megapixel = 1e9 * median / (result.size * result.scale) ** 2
    if result.macs:
        result.share_of_matmul = 2 * result.macs / peak.flops / median
    if result.network not in SPANDREL:
        item = 4 if result.computed_in in ("fp32", "tf32") else 2
        parts = count(preset(result.network, result.scale), result.size, result.size, item)
        result.bound_seconds = bound(parts, peak)
        result.share_of_roofline = result.bound_seconds / median


def _add_ratios(results: list[Result]) -> None:
    published = {result.network: result for result in results if result.code == "published"}
    for result in results:
        other = published.get(result.network)
        if other and result.code == "pft-sr" and result.ms_per_megapixel and other.ms_per_megapixel:
            result.times_as_fast_as_published = other.ms_per_megapixel / result.ms_per_megapixel
            if result.peak_bytes and other.peak_bytes:
                result.memory_of_published = result.peak_bytes / other.peak_bytes


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def in_precision(name: str) -> Iterator[None]:
    _, matmul, convolution = PRECISIONS[name]
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, convolution
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


# measuring


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds on the clock of one run, the device's work included."""
    _synchronise(device)
    started = time.perf_counter()
    run()
    _synchronise(device)
    return time.perf_counter() - started


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type != "cpu":
        getattr(torch, device.type).synchronize()


def peak_memory(run: Callable[[], object], device: torch.device) -> int | None:
    """Most bytes that torch holds at once during a run beyond those before it; None where torch cannot tell.

    On a CPU from the profiler's record of every allocation, so buffers inside operations count too; what libraries
    allocate past torch (oneDNN's scratch, say) does not.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        run()
        return None
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it announces every start on stderr
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler and profiler.profiler.kineto_results
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


def measure_peak(device: torch.device, precision: str) -> Peak:
    """The rates of a large matrix product and a large copy: the best of several runs, after one to warm up."""
    on_cpu = device.type == "cpu"
    dtype = PRECISIONS[precision][0]
    side, length = (1024, 2**25) if on_cpu else (8192, 2**29)
    a = torch.rand(side, side, device=device).to(dtype)
    source = torch.zeros(length, dtype=torch.float32 if on_cpu else dtype, device=device)
    target = torch.empty_like(source)
    with in_precision(precision):
        product = _best_time(lambda: a @ a, device)
    copy = _best_time(lambda: target.copy_(source), device)
    return Peak(2 * side**3 / product, 2 * source.nbytes / copy)


def _best_time(run: Callable[[], object], device: torch.device, seconds: float = 0.5) -> float:
    timed(run, device)
    times = [timed(run, device)]
    while sum(times) < seconds:
        times.append(timed(run, device))
    return min(times)


# counting


def count(config: PFTConfig, height: int, width: int, item: int = 4) -> list[tuple[int, int]]:
    """(multiply-adds, bytes read and written at least) of each part of a network, for one image of that many pixels.

    Matrix products and convolutions only, as papers count. Scores are needed at the entries that the layer before of
    the same chain kept, products with the values at those that the layer itself keeps; kernels may do more. item: bytes
    of a number. A carried entry takes a logit (2 bytes in half precision, else 4) and an index of 2 bytes; while a
    chain is dense, its queries and keys are carried.
    """
    c = config.embed_dim
    window, kernel = config.window_size, config.kernel_size**2
    tokens, entry = window * window, (2 if item == 2 else 4) + 2
    per_pixel: list[tuple[float, float]] = [(9 * config.in_channels * c, (config.in_channels + c) * item)]
    kept, dense_layers = [tokens, tokens], [0, 0]
    group_macs = 9 * c * c if config.resi_connection == "1conv" else 2 * 9 * c * (c // 4) + (c // 4) ** 2
    layers = config.layers()
    for depth in config.num_blocks:
        for _ in range(depth):
            shifted, keep = next(layers)
            before = kept[shifted]
            attention = 3 * c * c + before * c + keep * c + c * c + (kernel * c if config.use_lepe else 0)
            carry = 0.0
            if before == tokens:  # queries and keys of all layers so far, and of this one if it is handed on
                carry += dense_layers[shifted] * 2 * c * item
                carry += 2 * c * item if keep == tokens else 0
                dense_layers[shifted] += 1
            else:
                carry += before * config.num_heads * entry
            carry += keep * config.num_heads * entry if keep < tokens else 0
            kept[shifted] = keep
            feed_forward = 2 * c * config.hidden_dim + kernel * config.hidden_dim
            per_pixel += [(attention, 2 * c * item + carry), (feed_forward, 2 * c * item)]
        per_pixel.append((group_macs, 3 * c * item))
    per_pixel.append((group_macs, 3 * c * item))
    per_pixel += _count_head(config, item)
    pixels = (-(-height // window) * window) * (-(-width // window) * window)
    return [(round(macs * pixels), round(size * pixels)) for macs, size in per_pixel]


def _count_head(config: PFTConfig, item: int) -> list[tuple[float, float]]:
    """The same for the upsampling head, per input pixel."""
    c, h, colours, s = config.embed_dim, HEAD_CHANNELS, config.in_channels, config.scale
    if config.upsampler == "pixelshuffledirect":
        return [(9 * c * colours * s * s, (c + colours * s * s) * item)]
    parts: list[tuple[float, float]] = [(9 * c * h, (c + h) * item)]
    area = 1  # output pixels so far per input pixel
    for factor in upsampling_steps(s):
        larger = area * factor * factor
        # pixelshuffle convolves before it enlarges, nearest+conv after: as many multiply-adds
        parts.append((9 * h * h * larger, (area + larger) * h * item))
        area = larger
    if config.upsampler == "nearest+conv":
        parts.append((9 * h * h * area, 2 * area * h * item))
    parts.append((9 * h * colours * area, area * (h + colours) * item))
    return parts


def bound(parts: Iterable[tuple[int, int]], peak: Peak) -> float:
    """Seconds that the parts take at least, one after the other, on a machine that can do no more than `peak`."""
    return sum(max(2 * macs / peak.flops, size / peak.bytes_per_second) for macs, size in parts)


# telling


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    facts: dict[str, Any] = {
        "device": device.type,
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_at_start": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"gpu": properties.name, "gpu_bytes": properties.total_memory, "cuda": torch.version.cuda}
    for package in ("numba", "triton", "spandrel"):
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = None
    return facts


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def describe_machine(facts: dict[str, Any]) -> str:
    cpu = f"{facts['cpu']}, {facts['threads']} of {facts['cores']} cores, torch {facts['torch']}"
    text = f"{facts['gpu']} ({cpu})" if "gpu" in facts else cpu
    if (facts["load_at_start"] or 0) > BUSY * facts["cores"]:
        text += f"\nOther work keeps this machine busy (load {facts['load_at_start']}): times will be too long."
    return text


def to_json(facts: dict[str, Any], peaks: dict[str, Peak], results: Iterable[Result]) -> dict[str, Any]:
    """All of a run as plain JSON types."""
    return {
        "machine": facts,
        "peak": {precision: asdict(peak) for precision, peak in peaks.items()},
        "results": [asdict(result) for result in results],
    }


def format_table(results: Sequence[Result]) -> str:
    """One table per case, for a terminal."""
    blocks = []
    for key in dict.fromkeys((r.scale, r.size, r.precision) for r in results):
        rows = [HEADINGS, *(_cells(r) for r in results if (r.scale, r.size, r.precision) == key)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [str(Case(*key))]
        for name, *cells in rows:
            columns = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
            lines.append("  ".join([name.ljust(widths[0]), *columns]).rstrip())
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


HEADINGS = ("", "ms/MP", "x published", "memory", "of published", "GMACs", "of matmul", "of roofline", "difference")


def _cells(r: Result) -> tuple[str, ...]:
    name = f"{r.network} ({r.backend or r.code})" + ("" if r.computed_in == r.precision else f" in {r.computed_in}")
    if r.error:
        return (name, "failed", *[""] * 7)
    return (
        name,
        _number(r.ms_per_megapixel, "{:.4g}"),
        _number(r.times_as_fast_as_published, "{:.2f}"),
        _number(r.peak_bytes and r.peak_bytes / 1e6, "{:.0f} MB"),
        _number(r.memory_of_published, "{:.3f}"),
        _number(r.macs and r.macs / 1e9, "{:.1f}"),
        _number(r.share_of_matmul, "{:.1%}"),
        _number(r.share_of_roofline, "{:.1%}"),
        _number(r.difference, "{:.1e}"),
    )


def _number(value: float | None, pattern: str) -> str:
    return "" if value is None else pattern.format(value)


def _memory_text(result: Result) -> str:
    return "" if result.peak_bytes is None else f", {result.peak_bytes / 1e6:.0f} MB"
