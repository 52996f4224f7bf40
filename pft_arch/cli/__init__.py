"""The command line, `pft-sr`.

One module per command adds its parser and names the function that runs it; `COMMANDS` lists them. What only
some commands need (Pillow, PyAV, Ray) is imported by the functions that run: `pft-sr --help` waits for torch alone.

Exit codes: 0 done, 1 something failed, 2 wrong usage, 130 interrupted, 143 terminated (SIGTERM).
"""

from __future__ import annotations

import argparse
import io
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from .benchmark import add_benchmark
from .common import PROGRAM, CommandError, Parser
from .convert import add_convert
from .evaluate import add_evaluate
from .info import add_info
from .publish import add_publish
from .train import add_train
from .upscale import add_upscale

COMMANDS = (add_upscale, add_evaluate, add_train, add_benchmark, add_convert, add_publish, add_info)


def main(argv: list[str] | None = None) -> int:
    """Run a command line; returns its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name that the terminal cannot show
    parser = Parser(prog=PROGRAM, description="Enlarge images with PFT-SR.", epilog=f"{PROGRAM} COMMAND --help: more")
    parser.add_argument("--version", action=Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add_command in COMMANDS:
        add_command(commands)
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:  # argparse has printed the help or what is wrong
        return stop.code if isinstance(stop.code, int) else 2
    try:
        with _terminable():
            return args.run(args)
    except CommandError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt as stop:
        print(f"\n{PROGRAM}: interrupted. What was finished is kept, and no half file is left.", file=sys.stderr)
        return 143 if isinstance(stop, TerminatedError) else 130


class TerminatedError(KeyboardInterrupt):
    """SIGTERM, handled as Ctrl-C is."""


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the work as Ctrl-C does, tidily."""

    def stop(*_: object) -> None:
        raise TerminatedError

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread, which alone is told of signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Version(argparse.Action):
    """Prints the version, and looks it up only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from .. import __version__

        print(f"{PROGRAM} {__version__}")
        parser.exit()
