"""Drives a headless Chromium over its debugging pipe; needs nothing but the standard library and the browser."""

import json
import os
import select
import shutil
import subprocess
import tempfile
import time


class BrowserError(Exception):
    """The browser refused, or did not answer in time."""


class Chromium:
    """One browser with one page, and what it reported since `events` was last emptied."""

    def __init__(self, *flags, timeout=60):
        self.timeout = timeout
        self.events = []
        self._next_id = 0
        self._buffer = b""
        self._profile = tempfile.TemporaryDirectory(prefix="browser-")
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()

        def place():  # The protocol wants descriptors 3 (to read) and 4 (to write).
            reading, writing = os.dup(theirs_in), os.dup(theirs_out)
            os.dup2(reading, 3)
            os.dup2(writing, 4)

        self._process = subprocess.Popen(
            [
                shutil.which("chromium") or "chromium-browser",
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--disable-background-networking",
                "--no-first-run",
                "--hide-scrollbars",
                f"--user-data-dir={self._profile.name}",
                "--remote-debugging-pipe",
                *flags,
                "about:blank",
            ],
            preexec_fn=place,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Page.setLifecycleEventsEnabled", enabled=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self._session = None
            self.call("Browser.close")
        except (BrowserError, OSError):
            self._process.kill()
        self._process.wait()
        self._profile.cleanup()

    def call(self, method, **params):
        """One command and its result."""
        self._next_id += 1
        message = {"id": self._next_id, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        wanted = self._next_id
        answer = self._until(lambda message: message.get("id") == wanted, method)
        if "error" in answer:
            raise BrowserError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def open(self, url):
        """Goes to a page and waits until it has loaded; returns the status of the page itself."""
        self.events.clear()
        loader = self.call("Page.navigate", url=url).get("loaderId")
        # A load event alone could be the one of the page that stood there before.
        self.await_load(lambda loaded: loaded == loader, url)
        for event in self.named("Network.responseReceived"):
            if event["loaderId"] == loader and event["type"] == "Document":
                return event["response"]["status"]
        raise BrowserError(f"no response for {url}")

    def submit(self, form):
        """Submits the form of that selector as a click would, and waits until the page that answers has loaded."""
        self.events.clear()
        before = self.call("Page.getFrameTree")["frameTree"]["frame"]["loaderId"]
        self.evaluate(f"document.querySelector({json.dumps(form)}).requestSubmit(); 1")
        self.await_load(lambda loaded: loaded != before, form)

    def await_load(self, wanted, what):
        """Waits until the page of a loader that is wanted has loaded."""

        def loaded(message):
            params = message.get("params", {})
            return message.get("method") == "Page.lifecycleEvent" and params["name"] == "load" and wanted(params["loaderId"])

        if not any(map(loaded, self.events)):
            self._until(loaded, what)

    def named(self, name):
        """The parameters of every event of that name."""
        return [event["params"] for event in self.events if event.get("method") == name]

    def evaluate(self, expression):
        """The value of an expression, awaited if it is a promise."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise BrowserError(result["exceptionDetails"])
        return result["result"].get("value")

    def look(self, width, height, scheme, scale=1):
        """Takes the shape of a device."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=width < 600
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, path):
        """A PNG of what is seen."""
        import base64

        data = self.call("Page.captureScreenshot", format="png")["data"]
        with open(path, "wb") as file:
            file.write(base64.b64decode(data))

    def _until(self, wanted, what):
        deadline = time.monotonic() + self.timeout
        while True:
            while b"\0" in self._buffer:
                raw, self._buffer = self._buffer.split(b"\0", 1)
                message = json.loads(raw)
                if "method" in message:
                    self.events.append(message)
                if wanted(message):
                    return message
            ready, _, _ = select.select([self._in], [], [], max(0, deadline - time.monotonic()))
            chunk = os.read(self._in, 1 << 16) if ready else b""
            if not chunk:
                raise BrowserError(f"the browser did not answer: {what}")
            self._buffer += chunk
