"""Weights from the Hugging Face Hub: one file, fetched once, verified, then given its final name.

`huggingface_hub` does the transport (tokens, mirrors, offline mode, retries, xet), whichever version the host has. This
file adds what it leaves open: checksums, a place that no half file ever shows itself in, and faults told in a sentence.
"""

from __future__ import annotations

import errno
import hashlib
import inspect
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from .catalogue import REPO_ID, SUFFIXES, Variant, WeightsError
from .files import digest

REPO_VARIABLE = "PFT_SR_REPO"
STAGING = ".downloading"  # in the model folder, so that a finished file needs no second copy to get its name
_URI = re.compile(r"hf://(?P<repo_id>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?/(?P<filename>.+)")
_PART = re.compile(r'[^\\/:*?"<>|\x00-\x1f]+')  # of a path, on every system

log = logging.getLogger("pft_sr")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class HubFile:
    """A weights file on the Hub.

    Args:
        repo_id: "user/repo".
        filename: path within the repo.
        revision: commit, tag or branch.
        size, sha256: what it must have, in bytes and as 64 hexadecimal digits; 0 and "" where only the Hub knows.
        name: path that it gets in the model folder; "" makes one of repo, revision and file.

    Raises:
        WeightsError: repo_id, filename or revision cannot be one.
    """

    repo_id: str
    filename: str
    revision: str = "main"
    size: int = 0
    sha256: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        if not REPO_ID.fullmatch(self.repo_id) or ".." in self.repo_id:
            raise WeightsError(f"{self.repo_id or 'no repo'}: give the Hub repo as user/repo")
        if not self.filename.endswith(SUFFIXES) or not _is_plain(self.filename):
            expected = f"the path of a {', '.join(SUFFIXES)} file in the repo"
            raise WeightsError(f"{self.filename or 'no file'}: give {expected} {self.repo_id}")
        if not _is_plain(self.revision):
            raise WeightsError(f"{self.revision or 'no revision'}: give a commit, tag or branch of {self.repo_id}")

    def __str__(self) -> str:
        return f"hf://{self.repo_id}@{self.revision}/{self.filename}"

    def path(self, folder: str | Path) -> Path:
        """Where it lies once it is there."""
        revision = self.revision.replace("/", "--")
        return Path(folder, self.name or f"{self.repo_id.replace('/', '--')}/{revision}/{self.filename}")


def _is_plain(path: str) -> bool:
    """Whether a path from a stranger stays inside the folder that it is put into, on every system."""
    return all(_PART.fullmatch(part) and part.strip(". ") for part in path.split("/"))


def parse_uri(text: str) -> HubFile:
    """The file that "hf://user/repo[@revision]/path" names.

    Raises:
        WeightsError: it is not of that form.
    """
    match = _URI.fullmatch(text)
    if not match:
        raise WeightsError(f"{text}: give a file of the Hub as hf://user/repo/file or hf://user/repo@revision/file")
    return HubFile(match["repo_id"], match["filename"], match["revision"] or "main")


def hub_file(variant: Variant) -> HubFile:
    """Where a variant of the catalogue lies on the Hub; in PFT_SR_REPO if it names no repo itself.

    Raises:
        WeightsError: PFT_SR_REPO is not of the form user/repo or user/repo@revision.
    """
    repo_id, revision = variant.repo_id, variant.revision
    if not repo_id:
        repo_id, _, at = os.environ.get(REPO_VARIABLE, "").partition("@")
        revision = at or revision
    name = variant.name + PurePosixPath(variant.file).suffix
    return HubFile(repo_id, variant.file, revision, variant.size, variant.sha256, name)


def has_repo(variant: Variant) -> bool:
    """Whether a Hub variant can be downloaded."""
    return bool(variant.repo_id or os.environ.get(REPO_VARIABLE))


def variant_path(variant: Variant, folder: str | Path) -> Path:
    """Where a Hub variant lies in a model folder once it is there."""
    return Path(folder, variant.name + PurePosixPath(variant.file).suffix)


def fetch_variant(variant: Variant, folder: str | Path, progress: Progress | None = None) -> Path:
    """`fetch` for a Hub variant of the catalogue; one that no known repo holds is found if the user has put it there.

    Raises:
        WeightsError: as `fetch`, or nobody is known to have it; the text tells how to get it.
    """
    path = variant_path(variant, folder)
    if has_repo(variant):
        return fetch(hub_file(variant), folder, progress)
    if _is_right(path, variant.size, variant.sha256):
        return path
    raise WeightsError(
        f"{variant.name}: no Hub repo is known to hold these weights. Get {variant.origin}; turn it into {path.name} "
        f"by `pft-sr convert` and put that into {path.parent}. Or set {REPO_VARIABLE}=user/repo to a Hub repo that has "
        f"{variant.file}"
    )


def fetch(file: HubFile, folder: str | Path, progress: Progress | None = None) -> Path:
    """The file in a model folder, downloaded if it is not there; threads and processes that ask at once download once.

    What is there and right costs no network. It is right if it has the size and sha256 that `file` names; without
    them its name is enough, for nothing gets that name before it was verified.

    Args:
        progress: called with (bytes done, bytes in all); what it raises stops the download and comes out here. Without
            it, huggingface_hub shows its own bar on a terminal.

    Raises:
        WeightsError: the file cannot be had; nothing new lies under its name, and the text says what to do.
    """
    path = file.path(folder)
    if _is_right(path, file.size, file.sha256):
        return path
    try:
        with _staging(path, Path(folder)) as staging:
            if not _is_right(path, file.size, file.sha256):  # nobody else has fetched it while this one waited
                part = _download(file, staging, progress)
                path.parent.mkdir(parents=True, exist_ok=True)
                if path.exists():
                    log.warning("%s is not the file of the catalogue; it is kept as %s.old", path, path.name)
                    os.replace(path, f"{path}.old")
                os.replace(part, path)
    except _Stopped as stop:
        raise stop.reason from None
    except WeightsError:
        raise
    except ImportError as error:
        raise WeightsError(f"{file}: a download needs {error.name}. Install it: pip install huggingface_hub") from None
    except Exception as error:  # of whichever HTTP library and version lies underneath
        raise WeightsError(_explain(error, file, path)) from error
    return path


def _is_right(path: Path, size: int, sha256: str) -> bool:
    if not path.is_file() or (size and path.stat().st_size != size):
        return False
    return not sha256 or digest(path) == sha256


@contextmanager
def _staging(path: Path, folder: Path) -> Iterator[Path]:
    """An empty folder for one download, held against all others; what a killed one left in it is swept away."""
    from filelock import FileLock

    staging = folder / STAGING / "--".join(path.relative_to(folder).parts)
    staging.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{staging}.lock"):
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _download(file: HubFile, staging: Path, progress: Progress | None) -> Path:
    """The verified file, somewhere in `staging`."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url

    url = hf_hub_url(file.repo_id, file.filename, revision=file.revision)
    facts = get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    size, checksum = file.size or facts.size or 0, file.sha256 or facts.etag or ""
    if file.size and facts.size and file.size != facts.size:  # known before a byte is spent
        raise WeightsError(_not_the_one(file, f"{facts.size} bytes, expected {file.size}"))

    options: dict[str, Any] = {}
    if progress and "tqdm_class" in inspect.signature(hf_hub_download).parameters:  # from huggingface_hub 1.1 on
        options["tqdm_class"] = _bar(progress)
    wrong = ""
    # A second time past huggingface_hub's own cache, where a damaged file would otherwise stay in the way for ever.
    for force in (False, True):
        part = Path(
            hf_hub_download(
                file.repo_id,
                file.filename,
                revision=facts.commit_hash or file.revision,
                local_dir=staging,
                force_download=force,
                **options,
            )
        )
        wrong = _fault(part, size, checksum)
        if not wrong:
            return part
    raise WeightsError(_not_the_one(file, wrong))


def _fault(part: Path, size: int, checksum: str) -> str:
    """What is wrong with a downloaded file; "" if nothing. A checksum is a sha256, or git's own for small files."""
    found = part.stat().st_size
    if size and found != size:
        return f"{found} bytes, expected {size}"
    if re.fullmatch("[0-9a-f]{64}", checksum):
        got, kind = digest(part), "sha256"
    elif re.fullmatch("[0-9a-f]{40}", checksum):
        got, kind = digest(part, hashlib.sha1(b"blob %d\0" % found, usedforsecurity=False)), "git checksum"
    else:  # a mirror with ETags of its own
        return ""
    return "" if got == checksum else f"{kind} {got[:12]}..., expected {checksum[:12]}..."


def _not_the_one(file: HubFile, difference: str) -> str:
    return (
        f"{file}: what the Hub sends is not the file that was asked for ({difference}), so it was thrown away. "
        "Try again; if it stays so, the catalogue entry, the mirror (HF_ENDPOINT) or the repo itself is wrong"
    )


class _Stopped(BaseException):
    """Carries what a progress callback raised past all handlers in between."""

    def __init__(self, reason: BaseException) -> None:
        self.reason = reason


def _bar(progress: Progress) -> type:
    """A progress bar class for huggingface_hub that draws nothing and reports instead."""
    from huggingface_hub import utils

    class Bar(utils.tqdm):  # type: ignore[misc, name-defined, unused-ignore]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            try:
                progress(int(self.n), int(self.total or self.n))
            except BaseException as reason:
                raise _Stopped(reason) from None

        def update_transfer(self, n: float) -> None:
            """xet counts the same bytes twice, as they travel and as they are written: once is enough."""

    return Bar


def _explain(error: Exception, file: HubFile, path: Path) -> str:
    """What went wrong and what to do, in a sentence."""
    from huggingface_hub import constants, errors, get_token

    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) and cause not in causes:
        causes.append(cause)

    def find(*kinds: type[BaseException]) -> Any:
        return next((cause for cause in causes if isinstance(cause, kinds)), None)

    hub = constants.ENDPOINT
    give_token = f"give a token of yours ({hub}/settings/tokens) as HF_TOKEN or by `hf auth login`"
    status = next((s for cause in causes if (s := getattr(getattr(cause, "response", None), "status_code", 0))), 0)
    failed = next((cause for cause in causes if isinstance(cause, OSError) and cause.errno), OSError())

    if find(errors.OfflineModeIsEnabled):
        return f"{file}: not at {path} yet, and offline mode is on. Unset HF_HUB_OFFLINE once, or put the file there"
    if find(errors.GatedRepoError):
        todo = "with the account of your token" if get_token() else f"then {give_token}"
        return f"{file}: its owner has to grant access. Ask for it at {hub}/{file.repo_id}, {todo}"
    if find(errors.RepositoryNotFoundError):
        return f"{file}: the Hub has no such repo, or it is private. Check the name; if it is private, {give_token}"
    if find(errors.RevisionNotFoundError):
        return f"{file}: the repo has no revision {file.revision}. Give one of {hub}/{file.repo_id}/commits/main"
    if status == 404:
        return f"{file}: the repo has no such file. Give one of {hub}/{file.repo_id}/tree/{file.revision}"
    if status == 401:
        return f"{file}: the Hub does not accept the token, or wants one: {give_token}"
    if status == 403:
        return f"{file}: the Hub forbids it to the token in use. Allow that token to read the repo, or {give_token}"
    if status == 429:
        more = "" if get_token() else f"; to be allowed more, {give_token}"
        return f"{file}: the Hub has had too many requests from here. Wait some minutes{more}"
    if status >= 500:
        return f"{file}: the Hub is in trouble (HTTP {status}). Try again later, or set HF_ENDPOINT to a mirror"
    if failed.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{file}: no room for it in {path.parent} ({failed.strerror}). Free some space there and try again"
    if failed.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and failed.filename:  # without: a firewall's refusal
        return (
            f"{file}: {path.parent} cannot be written to ({failed.strerror}). Allow it, or put the file there by hand"
        )
    if any("Timeout" in type(cause).__name__ for cause in causes):  # of requests, httpx, httpx2 alike
        return (
            f"{file}: no answer from {hub} for too long. Check the connection and try again; on a slow one set "
            "HF_HUB_DOWNLOAD_TIMEOUT and HF_HUB_ETAG_TIMEOUT to more seconds"
        )
    if sizes := re.search(
        r"should be of size (\d+) but has size (\d+)", str(causes[-1])
    ):  # huggingface_hub's own check
        return _not_the_one(file, f"{sizes[2]} bytes, expected {sizes[1]}")
    reason = next((line for line in str(causes[-1]).splitlines() if line), type(error).__name__)
    return f"{file}: download from {hub} failed ({reason}). Check connection, proxy and HF_ENDPOINT, and try again"
