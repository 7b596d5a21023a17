# SPDX-License-Identifier: Apache-2.0
"""A headless Chromium that is told what to do over two pipes (the DevTools protocol). Standard library only."""
import base64
import json
import os
import shutil
import struct
import subprocess
import time
import zlib


def path():
    """Where a browser is, or None."""
    return next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)


class Browser:
    """One page. `folder`: for its profile; `console`: what it complained about."""

    def __init__(self, folder):
        to_browser, self.commands = os.pipe()
        self.answers, from_browser = os.pipe()
        self.console, self.number, self.unread = [], 0, b""
        # The protocol's pipes are descriptors 3 and 4.
        def pipes():
            first, second = os.dup(to_browser), os.dup(from_browser)
            os.dup2(first, 3)
            os.dup2(second, 4)
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
                 "--remote-debugging-pipe", f"--user-data-dir={folder}", "about:blank"]
        self.process = subprocess.Popen([path(), *flags], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL, preexec_fn=pipes, close_fds=False)
        os.close(to_browser)
        os.close(from_browser)
        self.session = None
        page = next(target for target in self.do("Target.getTargets")["targetInfos"] if target["type"] == "page")
        self.session = self.do("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.do(domain + ".enable")

    def close(self):
        os.close(self.commands)   # it ends by itself
        os.close(self.answers)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def message(self):
        while b"\0" not in self.unread:
            more = os.read(self.answers, 1 << 20)
            if not more:
                raise RuntimeError("the browser has gone")
            self.unread += more
        text, self.unread = self.unread.split(b"\0", 1)
        message = json.loads(text)
        if message.get("method") in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.console.append(message["params"])
        return message

    def do(self, method, **parameters):
        """The result of one command."""
        self.number += 1
        command = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            command["sessionId"] = self.session
        os.write(self.commands, json.dumps(command).encode() + b"\0")
        while True:
            message = self.message()
            if message.get("id") == self.number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]

    def value(self, expression):
        return self.do("Runtime.evaluate", expression=expression, returnByValue=True)["result"]["value"]

    def show(self, address, width, dark, media="screen"):
        """Opens a page in a window of that width."""
        self.do("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.do("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self.do("Page.navigate", url=address)
        until = time.monotonic() + 60
        while self.value("document.readyState") != "complete" or self.value("location.href") != address:
            assert time.monotonic() < until, f"{address} does not come"
            time.sleep(0.05)

    def screenshot(self):
        """The whole page, as PNG."""
        size = self.do("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": self.value("innerWidth"), "height": size["height"], "scale": 1}
        shot = self.do("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        return base64.b64decode(shot["data"])

    def pdf(self):
        return base64.b64decode(self.do("Page.printToPDF", printBackground=False)["data"])


def png_size(png):
    return struct.unpack_from(">II", png, 16)


def png_first_pixel(png):
    """Red, green and blue of the upper left corner. Any filter leaves the first pixel of the first row as it is."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and png[24] == 8 and png[25] in (2, 6), "8 bits of RGB or RGBA"
    at, data = 8, b""
    while at < len(png):
        size, kind = struct.unpack_from(">I4s", png, at)
        if kind == b"IDAT":
            data += png[at + 8:at + 8 + size]
        at += 12 + size
    return tuple(zlib.decompress(data)[1:4])
