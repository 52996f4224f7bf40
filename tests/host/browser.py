"""Drives the real frontend in a headless Chromium, as a user does: open it, load a workflow, press Run, look."""

from __future__ import annotations

import io
import json
import re
import shutil
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from host.server import RUN_LIMIT, Host

if TYPE_CHECKING:
    from playwright.sync_api import ConsoleMessage, Page

Workflow = dict[str, Any]

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
START_LIMIT = 120_000  # milliseconds; 6,000 on an idle machine
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Graph.CanvasInfo": False, "Comfy.Minimap.Visible": False}
READY = "() => window.app?.vueAppReady && window.app.graph && window.app.extensionManager"
LISTEN = """() => {
  window.endings = []
  for (const kind of ['execution_success', 'execution_error', 'execution_interrupted'])
    window.app.api.addEventListener(kind, (event) => window.endings.push({kind, ...event.detail}))
}"""
# what the frontend shows when all is not well: dialogs, messages, the card that tells of missing nodes, red frames
IN_THE_WAY = """() => [
  ...[...document.querySelectorAll('[role=dialog], .p-toast-message, [data-testid=error-overlay]')]
    .filter(element => element.checkVisibility()).map(element => element.innerText),
  ...window.app.graph.nodes.filter(node => node.has_errors).map(node => node.title),
]"""


class BrowserMissingError(RuntimeError):
    """There is no Chromium to drive."""


def browser_path() -> str:
    for name in BROWSERS:
        if path := shutil.which(name):
            return path
    raise BrowserMissingError(f"none of {', '.join(BROWSERS)} is installed (Debian: apt-get install chromium)")


@contextmanager
def frontend(host: Host, width: int = 1600, height: int = 900) -> Iterator[Frontend]:
    """The frontend of a running host (one with `frontend=True`), past its welcome."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=browser_path(), args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        try:
            page = browser.new_page(viewport={"width": width, "height": height})
            page.goto(f"http://{host.url}", wait_until="domcontentloaded", timeout=START_LIMIT)
            page.wait_for_function(READY, timeout=START_LIMIT)
            page.wait_for_load_state("networkidle")
            page.set_default_timeout(15_000)
            yield Frontend(page, host)
        finally:
            browser.close()


def prepare(base: Path, **settings: Any) -> None:
    """Make a base directory that of a user who has been here before: no tour, no empty folders to complain of."""
    user = base / "user" / "default"
    for folder in ("workflows", "subgraphs"):
        (user / folder).mkdir(parents=True, exist_ok=True)
    (user / "comfy.settings.json").write_text(json.dumps(SETTINGS | settings))


class Frontend:
    """An open page.

    `complaints` gathers what the console holds of errors since the page was ready.
    """

    def __init__(self, page: Page, host: Host) -> None:
        self.page = page
        self.host = host
        self.complaints: list[str] = []
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.evaluate(LISTEN)

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.complaints.append(f"{message.text} ({message.location['url']})")

    def load(self, workflow: Workflow) -> None:
        """As if its file had been dropped on the canvas; all of it is then in sight."""
        self.page.evaluate("workflow => window.app.loadGraphData(workflow)", workflow)
        self.page.wait_for_timeout(300)
        self.page.evaluate("() => window.app.extensionManager.command.execute('Comfy.Canvas.FitView')")
        self.page.wait_for_timeout(700)  # the view glides

    def in_the_way(self) -> list[str]:
        return list(self.page.evaluate(IN_THE_WAY))

    def saved(self) -> Workflow:
        """The workflow as the frontend would save it now."""
        return dict(json.loads(self.page.evaluate("() => JSON.stringify(window.app.graph.serialize())")))

    def set_widget(self, node_type: str, name: str, value: Any) -> None:
        self.page.evaluate(
            """([type, name, value]) => {
              for (const node of window.app.graph.nodes.filter(node => node.type === type))
                node.widgets.find(widget => widget.name === name).value = value
            }""",
            [node_type, name, value],
        )

    def run(self) -> dict[str, Any]:
        """Press Run, wait for the end, and return what the output nodes show, by the nodes' numbers.

        Raises:
            AssertionError: the workflow was refused or failed; the text says what the user reads.
        """
        page = self.page
        page.evaluate("() => { window.endings.length = 0 }")
        page.get_by_test_id("queue-button").click()
        end = time.monotonic() + RUN_LIMIT
        while not (endings := page.evaluate("() => window.endings")):
            assert time.monotonic() < end, f"no end within {RUN_LIMIT} s:\n{self.host.log[-2000:]}"
            assert not page.evaluate("() => window.app.lastNodeErrors"), f"refused: {self.in_the_way()}"
            page.wait_for_timeout(200)
        assert endings[-1]["kind"] == "execution_success", endings[-1].get("exception_message")
        page.wait_for_timeout(500)  # until the pictures are drawn
        return dict(page.evaluate("() => window.app.nodeOutputs"))

    def file(self, output: dict[str, str]) -> bytes:
        """The contents of one file that an output node names."""
        answer = self.page.request.get(f"http://{self.host.url}/view?{urllib.parse.urlencode(output)}")
        assert answer.ok, answer.status_text
        return answer.body()

    def screenshot(self, file: Path) -> None:
        self.page.mouse.move(700, 890)  # away from anything with a tooltip
        with Image.open(io.BytesIO(self.page.screenshot())) as picture:
            picture.convert("RGB").save(file, quality=80)

    def overlaps(self) -> list[tuple[str, str]]:
        """Pairs of nodes that lie upon each other, as drawn."""
        boxes = self.page.evaluate(
            """() => window.app.graph.nodes.map(node => {
              node.updateArea?.()
              return [node.title, [...node.boundingRect]]
            })"""
        )
        return [
            (one, other)
            for index, (one, (x, y, width, height)) in enumerate(boxes)
            for other, (left, top, across, down) in boxes[index + 1 :]
            if x < left + across and left < x + width and y < top + down and top < y + height
        ]

    def new_node(self, node_type: str) -> dict[str, Any]:
        """The values of the widgets of a node that was just made."""
        return dict(
            self.page.evaluate(
                "type => window.LiteGraph.createNode(type).widgets.map(widget => [widget.name, widget.value])",
                node_type,
            )
        )

    def help(self, node_type: str) -> str:
        """The text of the help page that the button above a selected node opens."""
        page = self.page
        place = """type => {
          const canvas = window.app.canvas, box = canvas.canvas.getBoundingClientRect()
          const node = window.app.graph.nodes.find(node => node.type === type)
          const [x, y] = canvas.ds.convertOffsetToCanvas([node.pos[0] + node.size[0] / 2, node.pos[1] - 15])
          return [box.x + x, box.y + y]
        }"""
        page.mouse.click(*page.evaluate(place, node_type))
        page.get_by_test_id("info-button").click()
        article = page.locator(".node-help-content")
        article.locator("table").first.wait_for()
        return article.inner_text()

    def templates(self, pack: str) -> dict[str, list[int]]:
        """The cards of a pack in the Templates dialog, each with the size of its picture, which is 0 if broken."""
        page = self.page
        page.get_by_role("button", name="Templates").click()
        dialog = page.get_by_role("dialog")
        dialog.get_by_text(pack, exact=True).click()
        cards = dialog.get_by_test_id(re.compile("^template-workflow-"))
        cards.first.wait_for()
        page.wait_for_load_state("networkidle")
        seen = "image => [image.naturalWidth, image.naturalHeight]"
        found = {
            card.get_by_role("heading").inner_text(): card.locator("img").first.evaluate(seen) for card in cards.all()
        }
        page.keyboard.press("Escape")
        return found
