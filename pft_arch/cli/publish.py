"""`pft-sr publish`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import PROGRAM, CommandError, Parser

PUBLISH_EXAMPLES = f"""\
examples:
  {PROGRAM} publish --repo user/pft pft_x2.safetensors pft_x4.safetensors --licence apache-2.0
  {PROGRAM} publish --repo user/mine mine.safetensors --private --evaluation set5.json

Give all the files that the repo is to hold. A token that may write comes from HF_TOKEN or `hf auth login`.
"""


def add_publish(commands: argparse._SubParsersAction[Parser]) -> None:
    text = "Put weights into a repo on the Hugging Face Hub, with model card, configuration and checksums."
    parser = commands.add_parser("publish", help="put weights on the Hugging Face Hub", description=text)
    parser.closing = lambda: PUBLISH_EXAMPLES
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a .safetensors file")
    parser.add_argument("--repo", required=True, metavar="USER/NAME", help="the repo; made if it does not exist")
    parser.add_argument("--licence", default="", help="as the Hub names it (default: what the files say)")
    parser.add_argument("--private", action="store_true", help="if the repo is made, make it private")
    parser.add_argument(
        "--evaluation",
        action="append",
        default=[],
        type=Path,
        metavar="JSON",
        help=f"what `{PROGRAM} evaluate --json` wrote, for the model card; more than once if need be",
    )
    parser.set_defaults(run=run_publish)


def run_publish(args: argparse.Namespace) -> int:
    from ..publish import publish
    from ..weights import WeightsError

    try:
        done = publish(args.repo, args.files, licence=args.licence, private=args.private, evaluations=args.evaluation)
    except WeightsError as error:
        raise CommandError(str(error)) from error
    print(f"{done.url}\n\nFor catalogue.toml in the model folder:\n\n{done.toml()}")
    return 0
