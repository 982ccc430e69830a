"""A headless Chromium, spoken to by its DevTools protocol."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp

ANSWER = 30
"""Seconds that the browser may take for an answer."""


class Page:
    """A tab of the browser. ``messages`` has what pages write to the console, and their errors; ``addresses`` what the
    last one asks for."""

    def __init__(self, socket):
        self.socket, self.sent, self.messages, self.addresses = socket, 0, [], []

    async def call(self, method: str, **parameters) -> dict:
        self.sent += 1
        await self.socket.send_json({"id": self.sent, "method": method, "params": parameters})
        while True:
            answer = await asyncio.wait_for(self.socket.receive_json(), ANSWER)
            event, content = answer.get("method"), answer.get("params")
            if event in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
                self.messages.append(content)
            elif event == "Network.requestWillBeSent":
                self.addresses.append(content["request"]["url"])
            elif answer.get("id") == self.sent:
                assert "error" not in answer, answer
                return answer["result"]

    async def evaluate(self, script: str):
        """The value of a line of JavaScript."""
        return (await self.call("Runtime.evaluate", expression=script))["result"].get("value")

    async def press(self, key: str) -> None:
        """Press a key."""
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            await self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=13, **text)

    async def open(self, file: Path, width: int, scheme: str) -> None:
        """Show a file in a window of that width in pixels, in the ``light`` or ``dark`` scheme."""
        scheme = [{"name": "prefers-color-scheme", "value": scheme}]
        await self.call("Emulation.setEmulatedMedia", features=scheme)
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False
        )
        self.addresses.clear()
        await self.call("Page.navigate", url=file.as_uri())
        while await self.evaluate(f"document.readyState + location.href !== 'complete{file.as_uri()}'"):
            await asyncio.sleep(0.05)


def visit(program: str, profile: Path, use: Callable[[Page], Awaitable[None]]) -> None:
    """Start the browser, let ``use`` work with an empty tab, and end the browser."""
    command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-port=0"]
    process = subprocess.Popen(
        [*command, f"--user-data-dir={profile}", "about:blank"], stderr=subprocess.PIPE, text=True
    )
    try:
        (port,) = (line.split("//")[1].split("/")[0] for line in iter_until(process.stderr, "DevTools listening on"))
        asyncio.run(work(port, use))
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def iter_until(lines, word: str):
    """The first line with ``word`` in it."""
    for line in lines:
        if word in line:
            yield line
            return


async def work(port: str, use: Callable[[Page], Awaitable[None]]) -> None:
    async with aiohttp.ClientSession() as session:
        tabs = await (await session.get(f"http://{port}/json")).json()
        (tab,) = (tab for tab in tabs if tab["type"] == "page")
        async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            page = Page(socket)
            for domain in ("Page", "Runtime", "Log", "Network"):
                await page.call(f"{domain}.enable")
            await use(page)
