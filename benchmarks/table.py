"""The measurements in benchmarks/*.json and benchmarks/gpu/ as tables of docs/benchmarks.md, beside the targets, and
what the compiler says of the Triton kernels as a table of docs/kernels.md.

python benchmarks/table.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DOCUMENTS = HERE.parent / "docs"
BEGIN, END = "<!-- begin: written by benchmarks/table.py -->\n", "<!-- end -->\n"

Row = dict[str, Any]  # a result of pft-sr benchmark


def main() -> None:
    runs = read("cpu.json", "gpu/*_[0-9]*.json")
    parts = [targets(runs, read("gpu/large.json")), *map(measurements, runs)]
    parts += [
        *map(training, read("training.json", "gpu/training.json")),
        *map(memory, read("memory.json", "gpu/memory.json")),
        *graphs(read("gpu/graphs_*light.json"), read("gpu/graphs_*again.json")),
    ]
    write("benchmarks.md", parts)
    write("kernels.md", [*map(kernels, read("triton_aot.json"))])


def read(*patterns: str) -> list[dict[str, Any]]:
    """The files there are."""
    return [json.loads(file.read_text("utf-8")) for pattern in patterns for file in sorted(HERE.glob(pattern))]


def write(name: str, parts: Sequence[str]) -> None:
    """Put tables between the marks of a document."""
    document = DOCUMENTS / name
    head, _, rest = document.read_text("utf-8").partition(BEGIN)
    _, found, tail = rest.partition(END)
    if not found:
        raise SystemExit(f"{document} has lost the lines {BEGIN.strip()} and {END.strip()}, between which tables go")
    document.write_text(f"{head}{BEGIN}\n{chr(10).join(parts)}\n{END}{tail}", "utf-8")


# targets


@dataclass(frozen=True)
class Target:
    """A line of the table: what to look at, on which device, and what is wanted of it."""

    text: str
    wanted: str
    device: str
    choose: Callable[[Row], bool]
    value: Callable[[Row, Sequence[Row]], float | None]  # of a row among those of its run
    met: Callable[[float], bool]
    show: str = "{:.2f} times"


def faster_than_published(row: Row, _: Sequence[Row]) -> float | None:
    return row["times_as_fast_as_published"]


def memory_of_published(row: Row, _: Sequence[Row]) -> float | None:
    return row["memory_of_published"]


def faster_than_swinir(row: Row, rows: Sequence[Row]) -> float | None:
    rival = "SwinIR" if row["network"] == "pft" else "SwinIR light"
    for other in rows:
        if other["network"] == rival and case(other) == case(row) and other["ms_per_megapixel"]:
            return other["ms_per_megapixel"] / row["ms_per_megapixel"]
    return None


def ours(networks: Sequence[str], precisions: Sequence[str], backend: str = "") -> Callable[[Row], bool]:
    def choose(row: Row) -> bool:
        fits = row["network"] in networks and row["precision"] in precisions and backend in ("", row["backend"])
        return fits and row["code"] == "pft-sr" and row["ms_per_megapixel"] is not None

    return choose


PUBLISHED = ("pft_light", "pft")
ALL = ("fp16", "bf16", "fp32", "tf32")
TARGETS = (
    Target("CPU, `pft_light` x2 128x128, `torch` backend, speed against the published steps", "at least 2.5 times",
           "cpu", ours(["pft_light"], ["fp32"], "torch"), faster_than_published, lambda x: x >= 2.5),
    Target("the same, `numba` backend", "at least 5 times",
           "cpu", ours(["pft_light"], ["fp32"], "numba"), faster_than_published, lambda x: x >= 5),
    Target("the same, memory, `torch` backend", "at most 1/4",
           "cpu", ours(["pft_light"], ["fp32"], "torch"), memory_of_published, lambda x: x <= 1 / 4, "{:.2f}"),
    Target("the same, memory, `numba` backend", "at most 1/4",
           "cpu", ours(["pft_light"], ["fp32"], "numba"), memory_of_published, lambda x: x <= 1 / 4, "{:.2f}"),
    Target("GPU, `pft_light` and `pft`, fp16 and bf16, speed against the published code", "at least 8 times",
           "cuda", ours(PUBLISHED, ["fp16", "bf16"]), faster_than_published, lambda x: x >= 8),
    Target("the same, fp32 and tf32", "at least 3 times",
           "cuda", ours(PUBLISHED, ["fp32", "tf32"]), faster_than_published, lambda x: x >= 3),
    Target("GPU, memory against the published code", "at most 1/6",
           "cuda", ours(PUBLISHED, ALL), memory_of_published, lambda x: x <= 1 / 6, "{:.3f}"),
    Target("GPU, speed against SwinIR of the same class", "faster",
           "cuda", ours(PUBLISHED, ALL), faster_than_swinir, lambda x: x > 1),
)  # fmt: skip


def targets(runs: Sequence[dict[str, Any]], large: Sequence[dict[str, Any]]) -> str:
    """The range of each target's value over presets, sizes and precisions, of the fastest backend chosen each."""
    lines = [("measure", "target", "measured", "")]
    for target in TARGETS:
        values = [
            target.value(row, run["results"])
            for run in runs
            if run["machine"]["device"] == target.device
            for row in fastest(filter(target.choose, run["results"]))
        ]
        lines.append((target.text, target.wanted, *verdict(target, [value for value in values if value is not None])))
    lines.append(("GPU, `pft` x2 on 1024x1024, memory", "below 8 GB", *large_verdict(large)))
    return table(lines)


def fastest(rows: Iterable[Row]) -> Iterable[Row]:
    """One row per network and case."""
    best: dict[Any, Row] = {}
    for row in rows:
        key = (row["network"], *case(row))
        best[key] = min(best.get(key, row), row, key=lambda r: r["ms_per_megapixel"])
    return best.values()


def verdict(target: Target, values: Sequence[float]) -> tuple[str, str]:
    if not values:
        return "", "not measured"
    low, high = (target.show.format(f(values)) for f in (min, max))
    return low if low == high else f"{low} to {high}", "met" if all(map(target.met, values)) else "**missed**"


def large_verdict(large: Sequence[dict[str, Any]]) -> tuple[str, str]:
    runs = [run for one in large if one["size"] == 1024 for run in one["runs"] if "peak_bytes" in run]
    if not runs:
        return "", "not measured"
    best = min(runs, key=lambda run: (run["peak_bytes"] >= 8e9, -run["tile"]))  # the largest tile that meets it
    text = f"{best['peak_bytes'] / 1e9:.2f} GB in tiles of {best['tile']} ({best['backend']})"
    return text, "met" if best["peak_bytes"] < 8e9 else "**missed**"


# measurements


def measurements(run: dict[str, Any]) -> str:
    """All that one run measured: its machine, and one table per case."""
    text = [f"## Measured on {name_of(run['machine'])}\n", *circumstances(run)]
    for precision, peak in run["peak"].items():
        text.append(
            f"Peak, {precision}: {peak['flops'] / 1e9:,.0f} GFLOP/s in a matrix product, "
            f"{peak['bytes_per_second'] / 1e9:,.1f} GB/s in a copy."
        )
    for key in dict.fromkeys(map(case, run["results"])):
        scale, size, precision = key
        rows = [cells(row, run["results"]) for row in run["results"] if case(row) == key]
        text += ["", f"x{scale}, {size}x{size}, {precision}:", "", table([HEADINGS, *rows])]
    return "\n".join(text)


def name_of(machine: dict[str, Any]) -> str:
    cpu = f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores"
    return f"{machine['gpu']} ({cpu})" if "gpu" in machine else cpu


def circumstances(run: dict[str, Any]) -> Iterable[str]:
    machine = run["machine"]
    yield f"torch {machine['torch']}. Load of the machine at the start: {machine['load_at_start']}."
    if machine["device"] == "cpu":
        yield f"The networks had {100 * processor_share(run):.0f} % of these threads' time to themselves."


def processor_share(run: dict[str, Any]) -> float:
    seconds = sum(sum(row["seconds"]) for row in run["results"])
    return sum(sum(row["processor_seconds"]) for row in run["results"]) / (seconds * run["machine"]["threads"])


HEADINGS = (
    "network", "ms per MP", "times the published", "times SwinIR", "memory", "of the published", "GMACs",
    "of matrix rate", "of roofline", "difference", "runs",
)  # fmt: skip


def cells(row: Row, rows: Sequence[Row]) -> tuple[str, ...]:
    how = row["backend"] or row["code"]
    name = f"{row['network']} ({how})" + ("" if row["computed_in"] == row["precision"] else f" in {row['computed_in']}")
    if row["error"]:
        return (name, f"failed: {row['error']}", *[""] * 9)
    of_swinir = faster_than_swinir(row, rows) if row["code"] == "pft-sr" else None
    return (
        name,
        number(row["ms_per_megapixel"], "{:,.0f}" if row["ms_per_megapixel"] >= 100 else "{:.2f}"),
        number(row["times_as_fast_as_published"], "{:.2f}"),
        number(of_swinir, "{:.2f}"),
        number(row["peak_bytes"] and row["peak_bytes"] / 1e6, "{:,.0f} MB"),
        number(row["memory_of_published"], "{:.2f}"),
        number(row["macs"] and row["macs"] / 1e9, "{:.1f}"),
        number(row["share_of_matmul"], "{:.1%}"),
        number(row["share_of_roofline"], "{:.1%}"),
        number(row["difference"], "{:.0e}"),
        str(len(row["seconds"])),
    )


# training, memory, graphs, kernels


def training(run: dict[str, Any]) -> str:
    """A training step by each backend."""
    lines = [
        ("network", "precision", "by", "s per step", "times the published", "memory", "of the published", "gradients")
    ]
    published: Row = {}
    for row in run["results"]:
        name = (row["network"], row["precision"], row["code"])
        if "error" in row:
            lines.append((*name, f"failed: {row['error']}", "", "", "", ""))
            continue
        published = row if row["code"] == "published" else published
        compared = published.get("network") == row["network"] != published.get("code") and row is not published
        faster = published["median_seconds"] / row["median_seconds"] if compared else None
        smaller = row["peak_bytes"] / published["peak_bytes"] if compared else None
        lines.append(
            (
                *name,
                f"{row['median_seconds']:.2f}",
                number(faster, "{:.2f}"),
                f"{row['peak_bytes'] / 1e6:,.0f} MB",
                number(smaller, "{:.2f}"),
                f"{row['gradient_difference']:.0e}",
            )
        )
    what = f"x{run['scale']}, {run['batch']} patches of {run['patch']}x{run['patch']}"
    head = f"## A training step, {what}, on {name_of(run['machine'])}\n"
    return "\n".join([head, *circumstances(run), "", table(lines)])


def memory(run: dict[str, Any]) -> str:
    """Peak memory as predicted, of the largest images measured."""
    size, scale = max(row["size"] for row in run["results"]), min(row["scale"] for row in run["results"])
    lines = [("preset", "precision", "backend", "measured", "predicted", "of measured")]
    for row in run["results"]:
        if (row["size"], row["scale"]) == (size, scale) and row.get("measured"):
            of = row["predicted"] / row["measured"]
            sizes = (f"{row[name] / 1e6:,.1f} MB" for name in ("measured", "predicted"))
            lines.append((row["preset"], row["precision"], row["backend"], *sizes, f"{of:.0%}"))
    count = sum("measured" in row for row in run["results"])
    head = f"## The memory model, on {name_of(run['machine'])}\n\nLargest error of {count} predictions: "
    return f"{head}{run['largest_error']:.1%}. Those for x{scale}, {size}x{size}:\n\n{table(lines)}"


def graphs(runs: Sequence[dict[str, Any]], again: Sequence[dict[str, Any]]) -> Iterable[str]:
    """What CUDA graphs and torch.compile do; `again`: the same in a later process."""
    heads = ("", "first picture, s", "in a later process", "later pictures, ms", "times eager", "difference")
    second = {way(row): row for run in again for row in run["results"]}
    for run in runs:
        lines = [heads]
        for row in run["results"]:
            if "error" in row:
                lines.append((way(row), f"failed: {row['error']}", *[""] * 4))
            elif "median_seconds" in row:  # else the run was cut off
                lines.append(
                    (
                        way(row),
                        f"{row['first_seconds']:.1f}",
                        number(second.get(way(row), {}).get("first_seconds"), "{:.1f}"),
                        f"{1000 * row['median_seconds']:.2f}",
                        f"{row['times_as_fast_as_eager']:.2f}",
                        f"{row['difference']:.0e}",
                    )
                )
        yield f"## CUDA graphs and torch.compile, on {name_of(run['machine'])}\n\n{table(lines)}"


def way(row: Row) -> str:
    size = f"{row['size']}x{row['size']}"
    return f"{row['preset']} ({row['backend']}) x{row['scale']} {size} {row['precision']}: {row['way']}"


def kernels(run: dict[str, Any]) -> str:
    """What the compiler says, by preset, precision and kernel; for each compute capability."""
    rows: list[Row] = run["kernels"]
    capabilities = sorted({row["capability"] for row in rows})
    lines = [("preset", "precision", "kernel", "variants", *(f"sm_{c}" for c in capabilities))]
    names = dict.fromkeys((row["preset"], row["dtype"], row["kernel"].split()[0]) for row in rows)
    for name in names:
        of_name = [row for row in rows if (row["preset"], row["dtype"], row["kernel"].split()[0]) == name]
        columns = [[row for row in of_name if row["capability"] == c] for c in capabilities]
        lines.append((*name[:2], f"`{name[2]}`", str(len(columns[0])), *map(resources, columns)))
    failed = sum("error" in row for row in rows)
    return f"Triton {run['triton']}: {len(rows)} compilations, {failed} failed.\n\n{table(lines)}"


def resources(rows: Sequence[Row]) -> str:
    """The most of each that one variant takes, and the fewest warps that a multiprocessor holds."""
    good = [row for row in rows if "error" not in row]
    if not good:
        return "failed" if rows else ""
    registers, spills, shared = (max(row[name] for row in good) for name in ("registers", "spills", "shared"))
    warps = min(row["resident"] * row["warps"] for row in good)
    return f"{registers}, {spills}, {shared / 1024:.0f} KB, {warps}"


def case(row: Row) -> tuple[int, int, str]:
    return row["scale"], row["size"], row["precision"]


def number(value: float | None, pattern: str) -> str:
    return "" if value is None else pattern.format(value)


def table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body, ""])


if __name__ == "__main__":
    main()
