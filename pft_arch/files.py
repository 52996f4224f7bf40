"""Files that are whole or not there, and their checksums."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

run = ""  # of many processes that work together: what a killed one leaves half done is known by this


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write under, that becomes `path` in one step when the block ends well; else nothing of it is left."""
    path = path.resolve()  # a link goes on pointing at the file
    temporary = path.with_name(f".pft-{run}{secrets.token_hex(8)}.part")  # the same folder: a rename stays on one disk
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # so that a full disk is found before the old file is gone
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def digest(path: Path, algorithm: Any = None) -> str:
    """The checksum of a file, in hexadecimal: SHA-256, unless another of hashlib's algorithms is given."""
    algorithm = algorithm or hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            algorithm.update(chunk)
    return str(algorithm.hexdigest())
