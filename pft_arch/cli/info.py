"""`pft-sr info`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping

from .common import CommandError, Parser, catalogue_text


def add_info(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser("info", help="say what a weights file is", description="Say what a weights file is.")
    parser.closing = catalogue_text
    parser.add_argument("model", metavar="FILE", help="a weights file, a variant, or hf://user/repo[@revision]/file")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.set_defaults(run=run_info)


def run_info(args: argparse.Namespace) -> int:
    from ..weights import WeightsError, describe, resolve

    try:
        facts = describe(resolve(args.model))
    except WeightsError as error:
        raise CommandError(str(error)) from error
    print(json.dumps(facts, indent=2, default=str) if args.json else "\n".join(_lines(facts)))
    return 0


def _lines(facts: Mapping[str, object], indent: str = "") -> Iterator[str]:
    """Facts, one a line; a fact that holds others has them below it."""
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        if isinstance(value, Mapping) and value:
            yield f"{indent}{name}:"
            yield from _lines(value, indent + "  ")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
            yield f"{indent}{name:{width}}  {'-' if text in (None, '', {}) else text}"
