"""Downloads through the real huggingface_hub from a Hub on the loopback, and what the user is told when they fail.

After every fault: nothing under the final name, no remains, a sentence that says what to do (and that docs/weights.md
shows), and a later good try succeeds.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from hub_server import COMMIT, HubServer, Repo
from pft_arch.catalogue import CATALOGUE, Variant, WeightsError
from pft_arch.cli import main
from pft_arch.hub import STAGING, HubFile, fetch, fetch_variant, parse_uri
from pft_arch.network import PFTSR
from pft_arch.weights import save_model

ROOT = Path(__file__).resolve().parents[1]
CONTENT = random.Random(0).randbytes(1_000_000)
OTHER = random.Random(1).randbytes(1_000_000)
FILE = HubFile("someone/pft", "x4.safetensors")
PRIVATE = HubFile("someone/private", "x4.safetensors")
GATED = HubFile("someone/gated", "x4.safetensors")

# Fetches in a process of its own, without torch: the package's __init__ is stepped over.
SCRIPT = """
import json, sys, types
package = types.ModuleType("pft_arch")
package.__path__ = [sys.argv[1] + "/pft_arch"]
sys.modules["pft_arch"] = package
from pft_arch.catalogue import WeightsError
from pft_arch.hub import HubFile, fetch
assert "torch" not in sys.modules
try:
    print(json.dumps({"path": str(fetch(HubFile("someone/pft", "x4.safetensors"), sys.argv[2]))}))
except WeightsError as error:
    print(json.dumps({"error": str(error)}))
"""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The Hub that huggingface_hub talks to."""
    files = {"x4.safetensors": CONTENT}
    repos = {
        "someone/pft": Repo(files),
        "someone/private": Repo(files, token="hf_good"),
        "someone/gated": Repo(files, token="hf_good", gated=True),
    }
    with HubServer(repos) as server:
        timeouts = {"HF_HUB_DOWNLOAD_TIMEOUT": 0.5, "HF_HUB_ETAG_TIMEOUT": 0.5}
        server.stand_in(monkeypatch, tmp_path, **timeouts, DOWNLOAD_CHUNK_SIZE=1 << 16)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        monkeypatch.delenv("PFT_SR_REPO", raising=False)
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "models" / "pft_sr"


def files(folder: Path) -> list[str]:
    """All that lies in a model folder, without the locks."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock")


def start(hub: HubServer, folder: Path, **options: Any) -> subprocess.Popen[str]:
    """`fetch(FILE)` in another process."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(ROOT), str(folder)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, **options)


def result(process: subprocess.Popen[str]) -> dict[str, str]:
    return dict(json.loads(process.communicate(timeout=60)[0]))


def assert_told(error: WeightsError | str, hub: HubServer, folder: Path, match: str) -> None:
    """The message fits, is one line, and stands in the guide's table of faults word by word."""
    text = str(error)
    assert re.search(match, text) and "\n" not in text
    shown = text.replace(hub.url, "https://huggingface.co").replace(str(folder), "models/pft_sr").replace(os.sep, "/")
    told = os.environ.get("PFT_WRITE_FAULTS")  # a file to make the table from
    if told:
        with open(told, "a", encoding="utf-8") as out:
            out.write(f"{os.environ['PYTEST_CURRENT_TEST'].split('::')[1].removesuffix(' (call)')}\t{shown}\n")
    else:
        assert shown in (ROOT / "docs" / "weights.md").read_text("utf-8")


def assert_recovers(hub: HubServer, folder: Path, file: HubFile = FILE) -> None:
    """Nothing is there now, and the next try is good."""
    assert files(folder) == []
    hub.heal()
    assert fetch(file, folder).read_bytes() == CONTENT
    assert files(folder) == [file.path(folder).relative_to(folder).as_posix()]


# what works


def test_a_file_arrives_once_and_needs_no_network_afterwards(hub: HubServer, folder: Path) -> None:
    path = fetch(FILE, folder)
    assert path == folder / "someone--pft" / "main" / "x4.safetensors"
    assert path.read_bytes() == CONTENT
    assert [request.sent for request in hub.downloads] == [len(CONTENT)]
    hub.requests.clear()
    assert fetch(FILE, folder) == path
    assert hub.requests == []


def test_what_is_there_serves_offline(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fetch(FILE, folder)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch(FILE, folder) == path


def test_progress_reaches_the_end(hub: HubServer, folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    fetch(FILE, folder, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert len(seen) > 5 and seen == sorted(seen)


def test_cancel_in_the_progress_stops_the_download(hub: HubServer, folder: Path) -> None:
    class CancelledError(BaseException):
        pass

    def cancel(done: int, total: int) -> None:
        raise CancelledError

    with pytest.raises(CancelledError):
        fetch(FILE, folder, cancel)
    assert_recovers(hub, folder)


def test_a_cut_connection_is_resumed_where_it_broke(hub: HubServer, folder: Path) -> None:
    hub.cut_at = [400_000]
    assert fetch(FILE, folder).read_bytes() == CONTENT
    first, second = hub.downloads
    assert first.sent == 400_000
    assert 300_000 < int(second.range.removeprefix("bytes=").rstrip("-")) <= 400_000


def test_a_slow_connection_is_waited_for(hub: HubServer, folder: Path) -> None:
    hub.pause = 0.1  # longer in all than the timeout, which is for silence
    assert fetch(FILE, folder).read_bytes() == CONTENT


def test_a_small_file_is_checked_by_its_git_checksum(hub: HubServer, folder: Path) -> None:
    hub.small = True
    assert fetch(FILE, folder).read_bytes() == CONTENT


@pytest.mark.parametrize("file", [PRIVATE, GATED], ids=["private", "gated"])
def test_the_token_opens_a_repo_and_stays_with_the_hub(
    hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch, file: HubFile
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    fetch(file, folder)
    assert {request.token for request in hub.requests if "/resolve/" in request.path} == {"hf_good"}
    assert {request.token for request in hub.downloads} == {""}  # the storage is another host


def put_into_cache(content: bytes) -> None:
    """As another program leaves the file in huggingface_hub's own cache."""
    path = Path(constants.HF_HUB_CACHE, "models--someone--pft", "snapshots", COMMIT, "x4.safetensors")
    path.parent.mkdir(parents=True)
    path.write_bytes(content)


def test_what_another_program_has_fetched_is_not_fetched_again(hub: HubServer, folder: Path) -> None:
    put_into_cache(CONTENT)
    assert fetch(FILE, folder).read_bytes() == CONTENT
    assert hub.downloads == []


def test_damage_in_the_cache_of_another_program_does_no_harm(hub: HubServer, folder: Path) -> None:
    put_into_cache(OTHER)
    assert fetch(FILE, folder).read_bytes() == CONTENT
    assert len(hub.downloads) == 1


def test_revisions_are_kept_apart(hub: HubServer, folder: Path) -> None:
    hub.repos["someone/pft"].revisions = ("main", COMMIT, "refs/pr/1")
    paths = {fetch(HubFile("someone/pft", "x4.safetensors", r), folder) for r in ("main", COMMIT, "refs/pr/1")}
    assert [path.parent.name for path in sorted(paths)] == [COMMIT, "main", "refs--pr--1"]


def test_threads_that_ask_at_once_download_once(hub: HubServer, folder: Path) -> None:
    hub.pause = 0.02
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(fetch(FILE, folder))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 4 and len(set(paths)) == 1
    assert len(hub.downloads) == 1


def test_processes_that_ask_at_once_download_once(hub: HubServer, folder: Path) -> None:
    hub.pause = 0.05
    processes = [start(hub, folder) for _ in range(2)]
    assert {result(process)["path"] for process in processes} == {str(FILE.path(folder))}
    assert len(hub.downloads) == 1


def test_a_killed_download_leaves_nothing_in_the_way(hub: HubServer, folder: Path) -> None:
    hub.stall_at = 500_000
    process = start(hub, folder)
    while not any(request.sent >= 500_000 for request in hub.downloads):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    remains = files(folder)
    assert any(name.endswith(".incomplete") for name in remains)
    assert all(name.startswith(f"{STAGING}/") for name in remains)
    hub.heal()
    assert fetch(FILE, folder).read_bytes() == CONTENT
    assert files(folder) == ["someone--pft/main/x4.safetensors"]


# variants of the catalogue


def variant(**values: Any) -> Variant:
    return Variant(**{"name": "my_x4", "scale": 4, "file": "x4.safetensors", "source": "hub", **values})


def test_a_variant_gets_its_own_name(hub: HubServer, folder: Path) -> None:
    assert fetch_variant(variant(repo_id="someone/pft"), folder) == folder / "my_x4.safetensors"


@pytest.mark.parametrize("setting", ["someone/pft", f"someone/pft@{COMMIT}"])
def test_the_default_repo_serves_variants_without_one(
    hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    monkeypatch.setenv("PFT_SR_REPO", setting)
    assert fetch_variant(variant(), folder).read_bytes() == CONTENT


def test_a_variant_without_a_repo_says_how_to_get_it(hub: HubServer, folder: Path) -> None:
    with pytest.raises(WeightsError) as caught:
        fetch_variant(CATALOGUE["pft_x4"], folder)
    assert_told(caught.value, hub, folder, "003_PFT_SRx4_finetune.pth.*pft-sr convert.*PFT_SR_REPO")
    assert hub.requests == []
    folder.mkdir(parents=True)
    (folder / "pft_x4.safetensors").write_bytes(CONTENT)  # as the text says
    assert fetch_variant(CATALOGUE["pft_x4"], folder) == folder / "pft_x4.safetensors"


def test_a_damaged_file_is_fetched_anew_and_nothing_is_lost(hub: HubServer, folder: Path) -> None:
    entry = variant(repo_id="someone/pft", sha256=hashlib.sha256(CONTENT).hexdigest())
    folder.mkdir(parents=True)
    (folder / "my_x4.safetensors").write_bytes(OTHER)
    assert fetch_variant(entry, folder).read_bytes() == CONTENT
    assert (folder / "my_x4.safetensors.old").read_bytes() == OTHER


@pytest.mark.parametrize("wrong", [{"sha256": "0" * 64}, {"size": 5}], ids=["checksum", "size"])
def test_a_file_that_the_catalogue_does_not_know_is_refused(
    hub: HubServer, folder: Path, wrong: dict[str, Any]
) -> None:
    with pytest.raises(WeightsError, match="not the file that was asked for"):
        fetch_variant(variant(repo_id="someone/pft", **wrong), folder)
    assert files(folder) == []


@pytest.mark.parametrize(
    ("uri", "file"),
    [
        ("hf://someone/pft/x4.safetensors", FILE),
        ("hf://someone/pft@v1.0/a/x4.pth", HubFile("someone/pft", "a/x4.pth", "v1.0")),
    ],
)
def test_addresses_name_files(uri: str, file: HubFile) -> None:
    assert parse_uri(uri) == file


@pytest.mark.parametrize(
    "uri",
    [
        "hf://someone/x4.safetensors",
        "hf://someone/pft/x4.exe",
        "hf://someone/pft/../../x4.safetensors",
        "hf://someone/pft/C:/x4.safetensors",
        "hf://someone/pft/a\\..\\x4.safetensors",
        "hf://someone/pft//etc/x4.safetensors",
        "hf://someone/pft@../x4.safetensors",
        "hf://../pft/x4.safetensors",
    ],
)
def test_addresses_that_are_none_or_lead_elsewhere_are_refused(uri: str) -> None:
    with pytest.raises(WeightsError):
        parse_uri(uri)


def test_the_command_line_takes_names_and_addresses(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(PFTSR(embed_dim=12, num_blocks=(2,), num_heads=2, window_size=4), tmp_path / "tiny.safetensors")
    hub.repos["someone/pft"].files["tiny.safetensors"] = (tmp_path / "tiny.safetensors").read_bytes()
    monkeypatch.setenv("PFT_SR_MODELS", str(tmp_path / "models"))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "catalogue.toml").write_text(
        '[tiny_x2]\nscale = 2\nrepo_id = "someone/pft"\nfile = "tiny.safetensors"\n'
    )
    for model in ("tiny_x2", "hf://someone/pft/tiny.safetensors"):
        assert main(["info", "--json", model]) == 0
        assert json.loads(capsys.readouterr().out)["scale"] == 2
    assert files(tmp_path / "models") == ["catalogue.toml", "someone--pft/main/tiny.safetensors", "tiny_x2.safetensors"]
    assert main(["info", "hf://someone/pft/absent.safetensors"]) == 1
    assert "the repo has no such file" in capsys.readouterr().err


# what goes wrong at the Hub or on the way

Break = Callable[[HubServer], None]


def breaks(**settings: Any) -> Break:
    def apply(hub: HubServer) -> None:
        for name, value in settings.items():
            setattr(hub, name, value)

    return apply


FAULTS: dict[str, tuple[HubFile, Break, str]] = {
    "corrupted content": (FILE, breaks(content=OTHER), "sha256 .*thrown away"),
    "corrupted small file": (FILE, breaks(small=True, content=OTHER), "git checksum"),
    "wrong size": (FILE, breaks(claimed=7), "1000000 bytes, expected 1000007.*thrown away"),
    "connection cut again and again": (FILE, breaks(cut_at=[0] * 50), "Check connection"),
    "connection stalled": (FILE, breaks(stall_at=200_000), "HF_HUB_DOWNLOAD_TIMEOUT"),
    "no answer": (FILE, breaks(head_delay=2.0), "HF_HUB_ETAG_TIMEOUT"),
    "gated, no token (401)": (GATED, breaks(), "Ask for it at .*someone/gated.*HF_TOKEN"),
    "private or misspelt, no token (401)": (PRIVATE, breaks(), "Check the name.*HF_TOKEN"),
    "invalid token (401)": (FILE, breaks(status=401, code="Other"), "HF_TOKEN"),
    "token without the right (403)": (FILE, breaks(status=403), "Allow that token"),
    "no such repo (404)": (HubFile("someone/else", "x4.safetensors"), breaks(), "Check the name"),
    "no such file (404)": (HubFile("someone/pft", "x8.safetensors"), breaks(), "no such file.*/tree/main"),
    "no such revision (404)": (HubFile("someone/pft", "x4.safetensors", "v9"), breaks(), "no revision v9"),
    "too many requests (429)": (FILE, breaks(status=429), "Wait some minutes.*HF_TOKEN"),
    "the Hub fails (500)": (FILE, breaks(status=500), "Try again later.*HF_ENDPOINT"),
    "the Hub is overloaded (503)": (FILE, breaks(status=503), "Try again later.*HF_ENDPOINT"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault(hub: HubServer, folder: Path, fault: str) -> None:
    file, break_it, match = FAULTS[fault]
    break_it(hub)
    with pytest.raises(WeightsError, match=f"^hf://{file.repo_id}@") as caught:
        fetch(file, folder)
    assert_told(caught.value, hub, folder, match)
    assert_recovers(hub, folder)


def test_fault_gated_for_this_token(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    with pytest.raises(WeightsError) as caught:
        fetch(GATED, folder)
    assert_told(caught.value, hub, folder, "with the account of your token")
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert_recovers(hub, folder, GATED)


def test_fault_no_network(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with HubServer() as gone:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(hub.url, gone.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    with pytest.raises(WeightsError) as caught:
        fetch(FILE, folder)
    assert_told(caught.value, hub, folder, "Check connection, proxy")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template.replace(gone.url, hub.url))
    assert_recovers(hub, folder)


def test_fault_offline(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError) as caught:
        fetch(FILE, folder)
    assert_told(caught.value, hub, folder, "Unset HF_HUB_OFFLINE")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert hub.requests == []
    assert_recovers(hub, folder)


# what goes wrong here


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[Callable[[str], None]]:
    """A file system of its own in the folder; gives a function that changes its options."""
    folder.mkdir(parents=True, exist_ok=True)

    def mount(*options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", folder], check=True)

    try:
        mount(f"size={size}")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("nobody may mount here")
    try:
        yield lambda option: mount("remount", option)
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.filterwarnings("ignore:Not enough free disk space")
def test_fault_disk_full(hub: HubServer, folder: Path) -> None:
    with mounted(folder, "512k") as change:
        with pytest.raises(WeightsError) as caught:
            fetch(FILE, folder)
        assert_told(caught.value, hub, folder, "no room.*No space left.*Free some space")
        change("size=4m")
        assert_recovers(hub, folder)


def test_fault_quota(hub: HubServer, folder: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))

    assert_told(result(start(hub, folder, preexec_fn=limit))["error"], hub, folder, "no room.*Free some space")
    assert_recovers(hub, folder)


def test_fault_read_only_disk(hub: HubServer, folder: Path) -> None:
    with mounted(folder, "4m") as change:
        change("ro")
        with pytest.raises(WeightsError) as caught:
            fetch(FILE, folder)
        assert_told(caught.value, hub, folder, "cannot be written to.*Read-only")
        change("rw")
        assert_recovers(hub, folder)


def test_fault_read_only_folder(hub: HubServer, folder: Path) -> None:
    def heed_permissions() -> None:
        """Even for root: gives up the right to pass over them (PR_CAPBSET_DROP, CAP_DAC_OVERRIDE)."""
        import ctypes

        if os.geteuid() == 0 and ctypes.CDLL(None, use_errno=True).prctl(24, 1, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl")

    folder.mkdir(parents=True)
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    error = result(start(hub, folder, preexec_fn=heed_permissions))["error"]
    assert_told(error, hub, folder, "cannot be written to.*Permission denied")
    folder.chmod(stat.S_IRWXU)
    assert_recovers(hub, folder)
