"""Starts a real ComfyUI with this pack in it, and talks to it as the frontend does."""

from __future__ import annotations

import io
import json
import os
import socket
import struct
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from websocket import WebSocket, create_connection

REPOSITORY = Path(__file__).resolve().parents[2]
NODES = (  # of this pack
    "PFTSRLoadModel",
    "PFTSRLoadModelFromHub",
    "PFTSRUpscale",
    "PFTSRUpscaleVideo",
    "PFTSRAttentionMap",
    "PFTSRCompare",
)
START_LIMIT = 600  # seconds; 15 on an idle machine
RUN_LIMIT = 300
ENDINGS = ("execution_success", "execution_error", "execution_interrupted")

Graph = dict[str, dict[str, Any]]
Message = dict[str, Any]


class HostError(RuntimeError):
    """The host did not do what a healthy one does; the text carries the end of its log."""


@dataclass
class Run:
    """What came of one workflow."""

    messages: list[Message]  # of the websocket, in order, for this workflow only
    images: list[Image.Image]  # of all its output nodes
    outputs: list[dict[str, Any]] = field(default_factory=list)  # what these told the frontend
    previews: list[Image.Image] = field(default_factory=list)
    refused: dict[str, Any] | None = None  # the host's answer to a workflow that it did not accept

    @property
    def ending(self) -> str:
        return self.messages[-1]["type"] if self.messages else "refused"

    @property
    def error(self) -> str:
        """What the user reads."""
        return str(self.messages[-1]["data"].get("exception_message", "")) if self.messages else str(self.refused)


@dataclass
class Host:
    """A running ComfyUI; a context manager that stops it again.

    Args:
        home: what `make_host.py` made.
        base: its own base directory, with models, inputs, outputs and the pack in custom_nodes; made if missing.
        pack_name: the name of the pack's folder.
        arguments: further command-line arguments of ComfyUI.
        environment: further environment variables.
        pack: the pack itself, the whole repository unless a test says otherwise.
        frontend: whether to serve the real frontend, for a browser.
        run_limit: seconds that a workflow may take.
    """

    home: Path
    base: Path
    pack_name: str = "pft-sr"
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    pack: Path = REPOSITORY
    frontend: bool = False
    run_limit: float = RUN_LIMIT
    url: str = field(init=False, default="")
    _process: subprocess.Popen[bytes] | None = field(init=False, default=None)

    def __enter__(self) -> Host:
        for folder in ("custom_nodes", "models", "input", "output", "user"):
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        pack = self.base / "custom_nodes" / self.pack_name
        if not pack.is_symlink():
            pack.symlink_to(self.pack, target_is_directory=True)
        arguments = self.arguments
        if not self.frontend:
            blank = self.base / "front"
            blank.mkdir(exist_ok=True)
            (blank / "index.html").write_text("<html></html>")
            arguments = (f"--front-end-root={blank}", *arguments)
        port = free_port()
        self.url = f"127.0.0.1:{port}"
        with open(self.base / "host.log", "wb") as log:
            self._process = subprocess.Popen(
                [
                    self.home / "venv" / "bin" / "python", "main.py", "--cpu", "--listen=127.0.0.1", f"--port={port}",
                    "--disable-auto-launch", "--disable-api-nodes", "--database-url=sqlite:///:memory:",
                    f"--base-directory={self.base}", *arguments,
                ],
                cwd=self.home / "ComfyUI", stdout=log, stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUTF8": "1", **self.environment},
            )  # fmt: skip
        try:
            self._await_start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _await_start(self) -> None:
        end = time.monotonic() + START_LIMIT
        while time.monotonic() < end:
            assert self._process is not None
            if self._process.poll() is not None:
                raise HostError(f"the host stopped while starting:\n{self.log[-4000:]}")
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
        raise HostError(f"the host did not start within {START_LIMIT} s:\n{self.log[-4000:]}")

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(15)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    @property
    def log(self) -> str:
        return (self.base / "host.log").read_text(encoding="utf-8", errors="replace")

    def get(self, path: str) -> Any:
        return json.loads(self._request(path))

    def get_text(self, path: str) -> str:
        return self._request(path).decode()

    @property
    def version(self) -> tuple[int, ...]:
        return tuple(map(int, self.get("/system_stats")["system"]["comfyui_version"].split(".")))

    def object_info(self, node: str) -> dict[str, Any]:
        """The host's description of a node; empty if it has no such node."""
        return dict(self.get(f"/object_info/{urllib.parse.quote(node)}").get(node, {}))

    def options(self, node: str, widget: str) -> list[str]:
        """What a drop-down offers."""
        return list(self.object_info(node)["input"]["required"][widget][1]["options"])

    def add_input(self, name: str, image: Image.Image) -> str:
        """Put an image where LoadImage finds it; returns the name to give to LoadImage."""
        image.save(self.base / "input" / name)
        return name

    def interrupt(self) -> None:
        """What the cancel button does."""
        self._request("/interrupt", {})

    def free(self) -> None:
        """What the button for unloading models and emptying the cache does; takes effect before the next run."""
        self._request("/free", {"unload_models": True, "free_memory": True})

    def forget(self) -> None:
        """Delete the records of workflows that have ended, which the host keeps in memory."""
        self._request("/history", {"clear": True})

    @property
    def pid(self) -> int:
        """The running host's process."""
        assert self._process is not None
        return self._process.pid

    def memory(self) -> int:
        """Bytes that the process holds, on Linux."""
        assert self._process is not None
        pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def run(self, graph: Graph, on_message: Callable[[Message], None] | None = None) -> Run:
        """Submit a workflow in API format and wait for its end; `on_message` sees every message as it comes."""
        client = uuid.uuid4().hex
        connection = create_connection(f"ws://{self.url}/ws?clientId={client}", timeout=self.run_limit)
        try:
            try:
                answer = json.loads(self._request("/prompt", {"prompt": graph, "client_id": client}))
            except urllib.error.HTTPError as error:
                return Run([], [], refused=json.loads(error.read()))
            prompt = answer["prompt_id"]
            previews: list[Image.Image] = []
            messages = self._listen(connection, prompt, previews, on_message)
        finally:
            connection.close()
        outputs = self._outputs(prompt)
        files = [file for output in outputs for file in output.get("images", ())]  # videos are among them
        images = [self._view(file) for file in files if file["filename"].endswith((".png", ".webp"))]
        return Run(messages, images, outputs, previews)

    def _listen(
        self,
        connection: WebSocket,
        prompt: str,
        previews: list[Image.Image],
        on_message: Callable[[Message], None] | None,
    ) -> list[Message]:
        messages: list[Message] = []
        end = time.monotonic() + self.run_limit
        while time.monotonic() < end:
            frame = connection.recv()
            if not isinstance(frame, str):
                event, kind = struct.unpack(">II", frame[:8])
                if (event, kind) == (1, 1):  # a preview, as JPEG
                    previews.append(Image.open(io.BytesIO(frame[8:])))
                continue
            message = json.loads(frame)
            if message.get("data", {}).get("prompt_id") != prompt:
                continue
            messages.append(message)
            if on_message is not None:
                on_message(message)
            if message["type"] in ENDINGS:
                return messages
        raise HostError(f"the workflow did not end within {self.run_limit} s:\n{self.log[-4000:]}")

    def _outputs(self, prompt: str) -> list[Any]:
        """What the output nodes made. The host writes it down a moment after it has told of the end."""
        for _ in range(100):
            history = self.get(f"/history/{prompt}")
            if prompt in history:
                return list(history[prompt]["outputs"].values())
            time.sleep(0.1)
        raise HostError(f"the host keeps no history of a workflow that ended:\n{self.log[-4000:]}")

    def _view(self, image: Mapping[str, str]) -> Image.Image:
        return Image.open(io.BytesIO(self._request(f"/view?{urllib.parse.urlencode(image)}")))

    def _request(self, path: str, body: Any = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://{self.url}{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            content: bytes = answer.read()
        return content


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
