"""A Hugging Face Hub on the loopback, as far as huggingface_hub needs one to download a file and to publish some.

`/{repo}/resolve/{revision}/{file}` answers HEAD with commit, ETag and size, and sends GET on to a storage host (the
same server under another name, as the Hub does), which knows ranges. Attributes of `HubServer` say what goes wrong.
Uploads come in the order that the Hub asks for: make the repo, say how each file goes, large ones into storage, commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Repo:
    """Files by path; a repo with a token is private, or gated for all without that token."""

    files: dict[str, bytes]
    revisions: tuple[str, ...] = ("main", COMMIT)
    token: str = ""
    gated: bool = False


@dataclass
class Request:
    method: str
    path: str
    token: str
    range: str
    sent: int = 0  # bytes of the body


@dataclass
class HubServer:
    """A context manager; `url` is what HF_ENDPOINT takes.

    Args:
        repos: by "user/name".
        small: ETags as for small files, which git holds itself, and no storage host.
    """

    repos: dict[str, Repo] = field(default_factory=dict)
    small: bool = False
    requests: list[Request] = field(default_factory=list)
    writer: str = "hf_writer"  # the token that may upload
    uploads: dict[str, bytes] = field(default_factory=dict)  # by sha256, as sent
    # What goes wrong, until `heal`:
    status: int = 0  # answer of every resolve
    code: str = ""  # its X-Error-Code
    content: bytes | None = None  # what comes instead of every file
    claimed: int = 0  # by how many bytes the size that the Hub tells is wrong
    cut_at: list[int] = field(default_factory=list)  # one entry per GET: bytes after which the connection breaks
    stall_at: int = -1  # bytes after which nothing more comes
    pause: float = 0.0  # seconds after each 64 KiB
    head_delay: float = 0.0
    url: str = field(init=False, default="")

    def __enter__(self) -> HubServer:
        self._end = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.storage = f"http://localhost:{self._server.server_port}/storage"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def stand_in(self, patch: pytest.MonkeyPatch, folder: Path, **settings: object) -> None:
        """Be the Hub to huggingface_hub, with its cache in a folder. It reads its environment on import, so what is set
        are its constants; settings: more of them."""
        settings |= {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": str(folder / "hf"),
            "HF_TOKEN_PATH": str(folder / "token"),
        }
        for name, value in settings.items():
            patch.setattr(constants, name, value)
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._server.shutdown()
        self._server.server_close()

    def heal(self) -> None:
        """From now on nothing goes wrong."""
        well = HubServer()
        for name in ("status", "code", "content", "claimed", "cut_at", "stall_at", "pause", "head_delay"):
            setattr(self, name, getattr(well, name))

    def wait(self, seconds: float) -> None:
        self._end.wait(seconds)

    @property
    def downloads(self) -> list[Request]:
        """Requests for content."""
        return [
            request for request in self.requests if request.method == "GET" and request.path.endswith(".safetensors")
        ]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        request = Request(self.command, path, token, self.headers.get("Range", ""))
        self.hub.requests.append(request)
        try:
            if path.startswith("/storage/"):
                repo, _, file = path.removeprefix("/storage/").partition("//")
                self._send_content(self.hub.repos[repo].files[file], request)
            else:
                self._resolve(path, request)
        except (BrokenPipeError, ConnectionResetError):  # the client has gone
            self.close_connection = True

    def do_PUT(self) -> None:
        self.hub.uploads[urlsplit(self.path).path.rpartition("/")[2]] = self._body()
        self._reply({})

    def do_POST(self) -> None:
        hub, path, body = self.hub, urlsplit(self.path).path, self._body()
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        hub.requests.append(Request("POST", path, token, ""))
        if hub.status or token != hub.writer:
            return self._reply({"error": "refused"}, hub.status or (403 if token else 401))
        if path == "/api/validate-yaml":
            return self._reply({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            known = name in hub.repos
            hub.repos.setdefault(name, Repo({}))
            return self._reply({"url": f"{hub.url}/{name}"}, 409 if known else 200)
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for item in objects:
                item["actions"] = {"upload": {"href": f"{hub.storage}/upload/{item['oid']}"}}
            return self._reply({"transfer": "basic", "objects": objects})
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            mode = {True: "lfs", False: "regular"}
            files = [{"path": n, "uploadMode": mode[n.endswith(".safetensors")], "shouldIgnore": False} for n in names]
            return self._reply({"files": files})
        name = path.removeprefix("/api/models/").partition("/commit/")[0]
        repo = hub.repos[name]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repo.files[value["path"]] = hub.uploads[value["oid"]]
        return self._reply({"commitUrl": f"{hub.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT})

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _reply(self, answer: object, status: int = 200) -> None:
        content = json.dumps(answer).encode()
        self._head(status, {"Content-Type": "application/json", "Content-Length": str(len(content))})
        self.wfile.write(content)

    def _resolve(self, path: str, request: Request) -> None:
        hub = self.hub
        hub.wait(hub.head_delay)
        name, _, rest = path.lstrip("/").partition("/resolve/")
        revision, _, file = (unquote(part) for part in rest.partition("/"))
        repo = hub.repos.get(name)
        if hub.status:
            return self._refuse(hub.status, hub.code)
        if repo is None or (repo.token and not repo.gated and request.token != repo.token):
            return self._refuse(404 if request.token else 401, "RepoNotFound")
        if repo.gated and request.token != repo.token:
            return self._refuse(403 if request.token else 401, "GatedRepo")
        if revision not in repo.revisions:
            return self._refuse(404, "RevisionNotFound")
        if file not in repo.files:
            return self._refuse(404, "EntryNotFound")

        content = repo.files[file]
        if hub.small:
            if self.command == "GET":
                return self._send_content(content, request)
            digest = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            headers = {"ETag": f'"{digest}"', "Content-Length": str(len(content) + hub.claimed)}
            return self._head(200, headers | {"X-Repo-Commit": COMMIT})
        return self._head(
            302,
            {
                "Location": f"{hub.storage}/{name}//{file}",
                "X-Repo-Commit": COMMIT,
                "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
                "X-Linked-Size": str(len(content) + hub.claimed),
                "Content-Length": "0",
            },
        )

    def _refuse(self, status: int, code: str) -> None:
        self._head(status, {"Content-Length": "0"} | ({"X-Error-Code": code} if code else {}))

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _send_content(self, content: bytes, request: Request) -> None:
        hub = self.hub
        content = content if hub.content is None else hub.content
        start = int(request.range.removeprefix("bytes=").rstrip("-")) if request.range else 0
        headers = {"Content-Length": str(len(content) - start)}
        if request.range:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._head(206 if request.range else 200, headers)
        if self.command == "HEAD":
            return
        cut = hub.cut_at.pop(0) if hub.cut_at else len(content)
        for at in range(start, len(content), 1 << 16):
            if hub.stall_at >= 0 and at >= hub.stall_at:
                hub.wait(60)
                self.close_connection = True
                return
            part = content[at : min(at + (1 << 16), cut)]
            self.wfile.write(part)
            request.sent += len(part)
            if at + (1 << 16) > cut:
                self.close_connection = True
                return
            if hub.pause:
                time.sleep(hub.pause)
