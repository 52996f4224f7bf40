"""What the commands share: how they fail, how they ask for a network, and how they open it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ..network import PFTSR

PROGRAM = "pft-sr"


class CommandError(Exception):
    """Ends a command with this message and exit code 1."""

    code = 1


class UsageError(CommandError):
    """The same for what was asked for, with exit code 2."""

    code = 2


class Parser(argparse.ArgumentParser):
    """A parser that keeps the lines of its help, whose end is made only when somebody asks for it."""

    closing: Callable[[], str] | None = None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)

    def format_help(self) -> str:
        if self.closing:
            self.epilog = self.closing()
        return super().format_help()


def add_network_options(parser: Parser) -> None:
    """Which network, and how it is run."""
    parser.add_argument(
        "-m",
        "--model",
        required=True,
        help="a variant of the list below, a weights file (.safetensors, .pth), or hf://user/repo[@revision]/file",
    )
    parser.add_argument(
        "--tile",
        type=whole_number,
        default=0,
        metavar="N",
        help="side of the parts an image is worked on in, in input pixels; smaller needs less memory "
        "(default: 0, as free memory allows)",
    )
    parser.add_argument(
        "--device", default="auto", help="auto (default: GPU where there is one), cpu, cuda, mps, cuda:1, ..."
    )
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="of the arithmetic: half is faster on GPUs (default: auto, fp16 on CUDA and fp32 elsewhere)",
    )


def whole_number(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return number


def pick_device(name: str) -> torch.device:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device {name} cannot be used here ({reason}). Try --device auto or cpu.") from error
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    import torch

    if name == "auto":
        return default_dtype(device)
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def default_dtype(device: torch.device) -> torch.dtype:
    """The precision that is fastest on a device without a cost that shows."""
    import torch

    return torch.float16 if device.type == "cuda" else torch.float32


def open_model(model: str, device: torch.device, dtype: torch.dtype) -> PFTSR:
    from ..weights import WeightsError, load_model, resolve

    try:
        return load_model(resolve(model), device=device, dtype=dtype)
    except (WeightsError, MemoryError) as error:
        raise CommandError(str(error)) from error


def catalogue_text() -> str:
    """The variants, as the help lists them."""
    from ..catalogue import catalogue
    from ..hub import has_repo

    variants = catalogue()
    width = max(map(len, variants), default=0)
    lines = ["variants:"]
    for name, variant in variants.items():
        hub = "downloaded on first use" if has_repo(variant) else "from its authors, choose it to read how"
        where = "comes with this version" if variant.source == "bundled" else hub
        lines.append(f"  {name:{width}}  enlarges {variant.scale} times, {where}")
    return "\n".join(lines)
