"""Files at URLs, such as s3://bucket/folder: in whatever storage fsspec knows."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from .common import UsageError


def is_url(place: str | Path) -> bool:
    return "://" in str(place)


def location(text: str) -> Path:
    """The path, or for a URL a UPath, which has the methods of one."""
    return _upath(text) if is_url(text) else Path(text)


def _upath(url: str) -> Any:
    try:
        from upath import UPath
    except ImportError as error:
        raise UsageError(f"{url} needs a package ({error}). Install it: pip install 'pft-sr[ray]'") from error
    try:
        place = UPath(url)
        return Path(place.path) if "file" in place.fs.protocol else place
    except (ImportError, ValueError) as error:  # s3fs, gcsfs, ... are packages of their own
        raise UsageError(f"{url}: {error}") from error


def stored_names(folder: Any, out: Path, recursive: bool) -> Iterator[Path]:
    """What is in a folder of a storage, by the names inside it, but for what is in `out`."""
    for file in folder.fs.find(folder.path, maxdepth=None if recursive else 1):
        name = Path(PurePosixPath(file).relative_to(folder.path))
        if not str(folder / name.as_posix()).startswith(f"{out}/"):
            yield name


def exists_in(out: Any) -> Callable[[Any], bool]:
    """Tells whether a target in `out` exists; a storage is asked once for all of them."""
    if not is_url(out):
        return Path.exists
    there = set(out.fs.find(out.path))
    return lambda target: target.path in there


def download(url: str, path: Path) -> None:
    place = _upath(url)
    path.parent.mkdir(parents=True, exist_ok=True)
    place.fs.get_file(place.path, str(path))


def upload(path: Path, url: str) -> None:
    """The file appears whole under its name, or not at all, where the storage has transactions: s3 and gs do."""
    place = _upath(url)
    place.fs.makedirs(place.fs._parent(place.path), exist_ok=True)
    with place.fs.transaction, path.open("rb") as source, place.fs.open(place.path, "wb") as target:
        shutil.copyfileobj(source, target)
