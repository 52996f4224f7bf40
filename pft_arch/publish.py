"""Weights to the Hugging Face Hub, in the form in which this package, and a person, finds all that they need."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from .catalogue import Variant, WeightsError
from .weights import describe, load_model

LINK = "https://arxiv.org/abs/2503.20337"


@dataclass(frozen=True)
class Published:
    """What now stands on the Hub."""

    url: str
    entries: tuple[Variant, ...]

    def toml(self) -> str:
        """The entries as catalogue.toml takes them."""
        return "\n".join(_table(entry) for entry in self.entries)


def publish(
    repo_id: str,
    files: Iterable[str | Path],
    *,
    licence: str = "",
    private: bool = False,
    evaluations: Iterable[str | Path] = (),
) -> Published:
    """Put weights into a Hub repo in one commit: the files, a model card, config.json and SHA256SUMS.

    The repo is made if need be. A model card that it has already is left as it is; it may have been edited.

    Args:
        files: all the weights that the repo is to hold, as .safetensors.
        licence: as the Hub names it (apache-2.0); default: what the files say.
        private: of a repo that is made.
        evaluations: results of `pft-sr evaluate --json` for the model card.

    Raises:
        WeightsError: a file is no whole PFT-SR file, the licence is not known, or the Hub refuses.
    """
    facts: dict[str, dict[str, Any]] = {}
    for path in map(Path, files):
        if path.name in facts:
            raise WeightsError(f"{path}: two files of one name; rename one")
        facts[path.name] = _facts(path)
    licence = licence or _licence(facts)
    if not re.fullmatch(r"[a-z0-9.+-]+", licence):
        raise WeightsError(f"{licence}: not a licence as the Hub names it, such as apache-2.0 or cc-by-4.0")
    entries = [_entry(repo_id, name, fact, licence) for name, fact in facts.items()]
    contents = {
        "config.json": json.dumps(
            {"architecture": "PFT-SR", "files": {name: fact["config"] for name, fact in facts.items()}}, indent=2
        ),
        "SHA256SUMS": "".join(f"{fact['sha256']}  {name}\n" for name, fact in facts.items()),
        "README.md": model_card(repo_id, facts, licence, [_evaluation(Path(path), facts) for path in evaluations]),
    }
    try:
        from huggingface_hub import CommitOperationAdd, HfApi
    except ImportError as error:
        raise WeightsError(f"publishing needs {error.name}. Install it: pip install huggingface_hub") from None
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if api.file_exists(repo_id, "README.md"):
            del contents["README.md"]
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(name, fact["path"]) for name, fact in facts.items()]
            + [CommitOperationAdd(name, text.encode()) for name, text in contents.items()],
            commit_message=f"PFT-SR: {', '.join(facts)}",
        )
    except Exception as error:  # of whichever HTTP library lies underneath
        raise WeightsError(f"{repo_id}: {_explain(error)}") from error
    return Published(commit.commit_url, tuple(replace(entry, revision=commit.oid) for entry in entries))


def model_card(
    repo_id: str, facts: Mapping[str, Mapping[str, Any]], licence: str, evaluations: list[Mapping[str, Any]]
) -> str:
    """README.md of a repo: what the Hub reads at its head, then what a person reads."""
    lines = [
        "---",
        f"license: {licence}",
        "pipeline_tag: image-to-image",
        "tags: [super-resolution, image-upscaling, pft-sr, comfyui]",
        "---",
        "",
        f"# {repo_id.partition('/')[2]}",
        "",
        f"Image upscaling with PFT-SR, the Progressive Focused Transformer ([paper]({LINK})).",
        "",
        "| File | Enlarges | Preset | Parameters | Numbers | Training |",
        "|---|---|---|---|---|---|",
    ]
    for name, fact in facts.items():
        reached = _reached(fact)
        lines.append(
            f"| `{name}` | {fact['scale']} times | {fact['preset'] or 'of its own'} | {fact['parameters']:,} | "
            f"{fact['dtype']} | {reached} |"
        )
    rows = [
        f"| `{name}` | {Path(result['hr']).name or result['hr']} | {len(result['images'])} | "
        f"{_number(result['mean'].get('psnr_y'), 2)} | {_number(result['mean'].get('ssim_y'), 4)} |"
        for name, fact in facts.items()
        for result in evaluations
        if result["model"]["sha256"] == fact["sha256"]
    ]
    if rows:
        lines += ["", "Measured with `pft-sr evaluate`, on luma:", ""]
        lines += ["| File | Images | Number | PSNR (dB) | SSIM |", "|---|---|---|---|---|", *rows]
    first = next(iter(facts))
    lines += [
        "",
        "In ComfyUI, with the pack PFT-SR: node *PFT-SR Load Model from Hub*, "
        f"repo `{repo_id}`, file `{first}`. On the command line:",
        "",
        "```",
        f"pft-sr upscale photo.jpg -o large.png --model hf://{repo_id}/{first}",
        "```",
        "",
        "`SHA256SUMS` holds the checksums of the files.",
    ]
    return "\n".join(lines) + "\n"


def _facts(path: Path) -> dict[str, Any]:
    if path.suffix != ".safetensors":
        raise WeightsError(f"{path}: only .safetensors files are published; `pft-sr convert` makes one of it")
    load_model(path)  # the whole of it, so that no damaged file is handed on
    return describe(path)


def _entry(repo_id: str, name: str, fact: Mapping[str, Any], licence: str) -> Variant:
    try:
        return Variant(
            name=Path(name).stem,
            preset=fact["preset"] or "",
            scale=fact["scale"],
            source="hub",
            repo_id=repo_id,
            file=name,
            size=fact["bytes"],
            sha256=fact["sha256"],
            licence=licence,
        )
    except ValueError as error:
        raise WeightsError(f"{name} in {repo_id}: {error}") from None


def _licence(facts: Mapping[str, Mapping[str, Any]]) -> str:
    """The licence that the files agree on, in the Hub's lower case."""
    if not facts:
        raise WeightsError("no file to publish")
    found = {fact["metadata"].get("licence", "").lower() for fact in facts.values()}
    if len(found) != 1 or "" in found:
        raise WeightsError(f"{', '.join(facts)}: the files name no common licence; say which holds, as apache-2.0")
    return found.pop()


def _reached(fact: Mapping[str, Any]) -> str:
    """What a file says of its training, as a cell of a table."""
    try:
        reached = json.loads(fact["metadata"]["training"])["reached"]
        return f"{reached['iteration']:,} iterations, {reached['psnr_y']:.2f} dB PSNR-Y while training"
    except (KeyError, ValueError, TypeError):
        return str(fact["metadata"].get("source", "")).replace("|", " ")


def _evaluation(path: Path, facts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Results of `pft-sr evaluate --json`, by its shape, for one of the files."""
    try:
        result: dict[str, Any] = json.loads(path.read_bytes())
        digest, _ = result["model"]["sha256"], (Path(result["hr"]), len(result["images"]), result["mean"]["psnr_y"])
    except (OSError, ValueError, KeyError, TypeError):
        raise WeightsError(f"{path}: not the results of `pft-sr evaluate --json`") from None
    if digest not in {fact["sha256"] for fact in facts.values()}:
        raise WeightsError(f"{path}: the results of another file (sha256 {digest:.12}...)")
    return result


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _table(entry: Variant) -> str:
    """An entry as a table of TOML; JSON's strings and numbers are TOML's too."""
    values = {f.name: getattr(entry, f.name) for f in fields(entry) if f.name not in ("name", "source")}
    lines = [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in values.items() if value]
    return "\n".join([f"[{json.dumps(entry.name)}]", *lines, ""])


def _explain(error: Exception) -> str:
    """Why the Hub did not take it, and what to do."""
    from huggingface_hub import constants, errors

    status = getattr(getattr(error, "response", None), "status_code", 0)
    if status in (401, 403) or isinstance(error, errors.LocalTokenNotFoundError):
        return (
            f"the Hub does not let you write there. Give a token of yours that may write ({constants.ENDPOINT}"
            "/settings/tokens) as HF_TOKEN or by `hf auth login`"
        )
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"not published ({reason}). What was uploaded shows only once all of it is there; try again"
