#!/usr/bin/env python3
"""A page of another site in a real browser, which tries to end a proxy that runs with --quitquitquit.

    tests/browser/foreign.py

Starts a proxy of its own (LAKEBASE_PROXY names the program, default target/debug/lakebase-proxy), whose workspace does not
exist. Exits with 1 when the page has succeeded, or when a tool that may end the proxy does not.
"""

import http.server
import os
import pathlib
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from chromium import Chromium
from stage import ROOT, TARGET, clean_environment, free_port

TIMEOUT = 30  # seconds

# What a page can send without being allowed to; each is over when the browser has an answer, or none.
EMBEDDED = """
(async (url) => {
  const over = (element, start) => new Promise((done) => {
    element.onload = element.onerror = done;
    setTimeout(done, 2000);
    start(element);
    document.body.append(element);
  });
  await over(new Image(), (image) => { image.src = url; });
  await over(document.createElement('script'), (script) => { script.src = url; });
  await over(document.createElement('iframe'), (frame) => { frame.src = url; });
  for (const method of ['GET', 'POST']) {
    await fetch(url, { method, mode: 'no-cors' }).catch(() => {});
    await fetch(url, { method, headers: { 'X-Requested-With': 'page' } }).catch(() => {});
  }
  const frame = document.createElement('iframe');
  frame.name = 'sink';
  document.body.append(frame);
  const form = document.createElement('form');
  Object.assign(form, { action: url, method: 'POST', target: 'sink' });
  document.body.append(form);
  await over(frame, () => form.submit());
})
"""


class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>elsewhere</title><body>")

    def log_message(self, *_):
        pass


def main():
    admin, port = free_port(), free_port()
    program = os.environ.get("LAKEBASE_PROXY", TARGET / "debug/lakebase-proxy")
    variables = {
        "ENDPOINT_NAME": "projects/shop/branches/production/endpoints/primary",
        "PGHOST": "ep-quiet-night-a1b2c3.database.example",
        "PGUSER": "0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0",
        "DATABRICKS_HOST": f"http://127.0.0.1:{free_port()}",
        "DATABRICKS_TOKEN": "none",
    }
    flags = ["--port", port, "--http-port", "none", "--quitquitquit", "--admin-port", admin]
    command = [str(part) for part in [program, "serve", *flags]]
    proxy = subprocess.Popen(command, env=clean_environment() | variables, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        answers = None
        deadline = time.monotonic() + TIMEOUT
        while answers is None and time.monotonic() < deadline:
            try:
                answers = urllib.request.urlopen(f"http://127.0.0.1:{admin}/", timeout=TIMEOUT)
            except urllib.error.HTTPError as error:
                answers = error.code
            except OSError:
                time.sleep(0.1)
        page = f"http://localhost:{server.server_port}/"
        for host in ("127.0.0.1", "localhost", "0.0.0.0"):
            url = f"http://{host}:{admin}/quitquitquit"
            form = f"Object.assign(document.createElement('form'), {{action: {url!r}, method: 'POST'}})"
            for attempt, script in (
                ("something embedded", f"({EMBEDDED})({url!r})"),
                ("a link", f"void setTimeout(() => {{ location.href = {url!r}; }})"),
                ("a form", f"void setTimeout(() => {{ document.body.appendChild({form}).submit(); }})"),
            ):
                # A browser for each, so that no navigation is taken for another's.
                with Chromium() as browser:
                    browser.open(page)
                    browser.evaluate(script)
                    time.sleep(0.5)
                if proxy.poll() is not None:
                    raise SystemExit(f"{attempt} in a page has ended the proxy at {url}: {proxy.returncode}")
            print(f"no page ends it at {host}")
        request = urllib.request.Request(f"http://127.0.0.1:{admin}/quitquitquit", method="POST")
        urllib.request.urlopen(request, timeout=TIMEOUT).close()
        if (code := proxy.wait(TIMEOUT)) != 0:
            raise SystemExit(f"a tool's POST has not ended it: {code}")
        print("a tool's POST does")
    finally:
        server.shutdown()
        proxy.kill()
        proxy.wait()


if __name__ == "__main__":
    main()
