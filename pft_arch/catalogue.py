"""The catalogue: weights that can be had by name, as data.

`bundled/catalogue.json` lists what this project vouches for, one object per variant with the fields of `Variant`.
Users add their own in a `catalogue.toml` in the model folder, one table per variant. Nothing here needs torch.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .config import PRESETS, SCALES

SUFFIXES = (".safetensors", ".pth", ".pt")
BUNDLED = Path(__file__).parent / "bundled"
USER_FILE = "catalogue.toml"
SOURCES = ("bundled", "hub")
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)  # becomes a file name
_SHA256 = re.compile(r"[0-9a-f]{64}")

log = logging.getLogger("pft_sr")


class WeightsError(ValueError):
    """Weights cannot be had or used; the text names them, what is wrong, and what to do."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One entry of the catalogue.

    Args:
        name: what the user chooses; a download is kept as `<name>.safetensors`.
        preset: of `config.PRESETS`; "" where the file alone tells.
        scale: 2, 3 or 4.
        file: name within the package's `bundled` folder, or path within the Hub repo.
        source: "bundled" or "hub".
        repo_id, revision: the Hub repo, "" where there is none to vouch for, and the commit, tag or branch in it.
        size: in bytes; 0 where unknown.
        sha256: "" where unknown; the Hub's own checksum is then what a download has to match.
        licence: as an SPDX identifier.
        training: what it was trained on and how.
        citation: what to cite.
        origin: where a user finds weights that no known repo holds.

    Raises:
        ValueError: a value is of the wrong type or form; the text names it.
    """

    name: str
    scale: int
    file: str
    preset: str = ""
    source: str = "bundled"
    repo_id: str = ""
    revision: str = "main"
    size: int = 0
    sha256: str = ""
    licence: str = ""
    training: str = ""
    citation: str = ""
    origin: str = ""

    def __post_init__(self) -> None:
        for field in fields(self):
            value, kind = getattr(self, field.name), int if field.name in ("scale", "size") else str
            if type(value) is not kind:
                raise ValueError(f"{field.name} must be a {'whole number' if kind is int else 'text'}; got {value!r}")
        for name, right, expected in (
            ("name", _NAME.fullmatch(self.name), "letters, digits, . _ and -, the first a letter or digit"),
            ("scale", self.scale in SCALES, "2, 3 or 4"),
            ("preset", self.preset in ("", *PRESETS), f"one of {', '.join(PRESETS)}"),
            ("file", self.file.endswith(SUFFIXES), f"a name in {', '.join(SUFFIXES)}"),
            ("source", self.source in SOURCES, "bundled or hub"),
            ("repo_id", not self.repo_id or REPO_ID.fullmatch(self.repo_id), "user/repo"),
            ("revision", self.revision, "a commit, tag or branch"),
            ("size", self.size >= 0, "0 or more"),
            ("sha256", not self.sha256 or _SHA256.fullmatch(self.sha256), "64 small hexadecimal digits"),
        ):
            if not right:
                raise ValueError(f"{name} must be {expected}; got {getattr(self, name)!r}")


def _shipped() -> Mapping[str, Variant]:
    entries = json.loads((BUNDLED / "catalogue.json").read_text("utf-8"))
    return MappingProxyType({entry["name"]: Variant(**entry) for entry in entries})


CATALOGUE: Mapping[str, Variant] = _shipped()


def default_folder() -> Path:
    """Where downloads and catalogue.toml lie outside a host: the folder PFT_SR_MODELS, else the user's cache."""
    return Path(os.environ.get("PFT_SR_MODELS") or Path.home() / ".cache" / "pft_sr")


def catalogue(folder: str | Path | None = None) -> Mapping[str, Variant]:
    """The shipped variants, then those of the catalogue.toml in a model folder (default: `default_folder()`).

    What is wrong in a catalogue.toml is logged once and left out; it never keeps a host from starting.
    """
    path = Path(folder or default_folder(), USER_FILE)
    try:
        stat = path.stat()
    except OSError:
        return CATALOGUE
    return _with_user_file(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=16)
def _with_user_file(path: Path, *_version: int) -> Mapping[str, Variant]:
    """Read once per version of the file, as a host asks very often; so faults are told once, too."""
    try:
        tables = _read_toml(path)
    except (OSError, ValueError, RecursionError, ImportError) as error:
        log.warning("%s is left out, because it cannot be read: %s", path, error)
        return CATALOGUE
    variants = dict(CATALOGUE)
    for name, table in tables.items():
        try:
            variants[name] = _user_variant(name, table)
        except ValueError as error:
            log.warning("%s: [%s] is left out: %s", path, name, error)
    return MappingProxyType(variants)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        import tomllib  # type: ignore[import-not-found, unused-ignore]
    except ImportError:  # Python 3.10
        try:
            import tomli as tomllib  # type: ignore[import-not-found, no-redef, unused-ignore]
        except ImportError:
            raise ImportError("that needs Python 3.11 or newer, or the package tomli (pip install tomli)") from None
    return dict(tomllib.loads(path.read_text("utf-8-sig")))  # -sig: the Windows editor writes a mark in front


def _user_variant(name: str, table: Any) -> Variant:
    """A table of catalogue.toml; under the name of a shipped Hub variant it says only what differs."""
    known = {field.name for field in fields(Variant)} - {"name", "source"}
    if not isinstance(table, dict):
        raise ValueError(f"it must be a table of {', '.join(sorted(known))}")
    if unknown := table.keys() - known:
        raise ValueError(f"unknown {', '.join(sorted(unknown))}; known are {', '.join(sorted(known))}")
    shipped = CATALOGUE.get(name)
    if shipped and shipped.source == "bundled":
        raise ValueError("weights of that name come with the pack; choose another name")
    given: dict[str, Any] = asdict(shipped) if shipped else {"name": name, "source": "hub"}
    if missing := {"scale", "file", "repo_id"} - table.keys() - given.keys():
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    return Variant(**{**given, **table})
