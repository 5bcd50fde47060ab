#!/usr/bin/env python3
"""The notes page in a real browser: what a reader sees, and what another origin's page can get.

    tests/browser/notes.py http://127.0.0.1:8000 [--metrics http://127.0.0.1:9090] [--screenshots DIR]

The page must be up (`lakebase-proxy demo` has it on port 8000). Whatever state it is in is checked: notes or a plain
message, on a phone and on a wide screen, light and dark. Exits with 1 and a list of what is wrong.
"""

import argparse
import http.server
import json
import pathlib
import sys
import threading
import time
import urllib.parse

from chromium import Chromium

DEVICES = {"phone": (390, 844, 2), "wide": (1440, 900, 1)}

# Every piece of text with the contrast that WCAG 2 computes for it.
CONTRASTS = """
(() => {
  const parse = (color) => (color.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => {
    const part = (value) => { value /= 255; return value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4; };
    return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
  };
  const ground = (element) => {
    for (; element; element = element.parentElement) {
      const color = parse(getComputedStyle(element).backgroundColor);
      if (color.length === 3 || color[3] > 0) return color;
    }
    return [255, 255, 255];
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.textContent.trim();
    if (!text) continue;
    const element = walker.currentNode.parentElement;
    const [a, b] = [light(parse(getComputedStyle(element).color)), light(ground(element))];
    found.push([text.slice(0, 40), (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)]);
  }
  return found;
})()
"""

FACTS = """
({
  title: document.title,
  h1: [...document.querySelectorAll('h1')].map((e) => e.textContent),
  h2: [...document.querySelectorAll('h2')].map((e) => e.textContent),
  notes: [...document.querySelectorAll('.notes li')].map((e) => ({
    text: e.querySelector('.content').textContent,
    markup: e.querySelector('.content').children.length,
    time: e.querySelector('time')?.dateTime ?? null,
  })),
  scripts: document.scripts.length,
  refresh: document.querySelectorAll('meta[http-equiv]').length,
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  ground: getComputedStyle(document.body).backgroundColor,
  bodySize: parseFloat(getComputedStyle(document.body).fontSize),
  icon: document.querySelector('.mark')?.naturalWidth ?? 0,
  column: document.querySelector('.content, .lede').getBoundingClientRect().width,
  targets: [...document.querySelectorAll('a')].map((e) => e.getBoundingClientRect().height),
})
"""

# What a page of another origin can try. Each answer is what it got, or "nothing".
ATTACK = """
(async (target) => {
  const attempt = async (make) => { try { return await make(); } catch { return "nothing"; } };
  const element = (name, attributes) => new Promise((resolve, reject) => {
    const made = document.createElement(name);
    made.onload = () => resolve(made);
    made.onerror = () => reject();
    Object.assign(made, attributes);
    document.body.append(made);
  });
  return {
    fetch: await attempt(async () => (await fetch(target)).text()),
    credentials: await attempt(async () => (await fetch(target, { credentials: "include" })).text()),
    opaque: await attempt(async () => (await fetch(target, { mode: "no-cors" })).type),
    post: await attempt(async () => (await fetch(target, { method: "POST", mode: "no-cors", body: "x" })).type),
    preflight: await attempt(async () => (await fetch(target, { method: "DELETE", headers: { "x-a": "b" } })).status),
    script: await attempt(async () => { await element("script", { src: target }); return "loaded"; }),
    image: await attempt(async () => { await element("img", { src: new URL("/icon.svg", target) }); return "loaded"; }),
    style: await attempt(async () => {
      await element("link", { rel: "stylesheet", href: new URL("/style.css", target) });
      return "loaded";
    }),
    frame: await attempt(async () => {
      const frame = await element("iframe", { src: target });
      return frame.contentDocument ? frame.contentDocument.body.textContent : "nothing";
    }),
  };
})
"""


class Checks:
    """What was found wrong."""

    def __init__(self):
        self.count = 0
        self.failures = []

    def expect(self, condition, what):
        self.count += 1
        if not condition:
            self.failures.append(what)


def check_page(browser, url, checks, screenshots):
    grounds = {}
    own = urllib.parse.urlsplit(url).netloc
    for device, (width, height, scale) in DEVICES.items():
        for scheme in ("light", "dark"):
            where = f"{url} {device} {scheme}"
            browser.look(width, height, scheme, scale)
            status = browser.open(url)
            facts = browser.evaluate(FACTS)
            if screenshots:
                name = f"{urllib.parse.urlsplit(url).port}-{device}-{scheme}.png"
                browser.screenshot(str(screenshots / name))

            checks.expect(status in (200, 503), f"{where}: status {status}")
            checks.expect(len(facts["h1"]) == 1, f"{where}: one h1, not {facts['h1']}")
            if status == 200:
                checks.expect(facts["h1"] == ["Hello from Lakebase!"], f"{where}: h1 {facts['h1']}")
                checks.expect(facts["h2"] == ["Recent Notes"], f"{where}: h2 {facts['h2']}")
                checks.expect(len(facts["notes"]) <= 5, f"{where}: {len(facts['notes'])} notes")
            for note in facts["notes"]:
                checks.expect(note["text"].strip(), f"{where}: a note without text")
                checks.expect(note["markup"] == 0, f"{where}: a note became markup: {note['text']}")
            checks.expect(facts["title"] == facts["h1"][0], f"{where}: title {facts['title']}")
            checks.expect(facts["scripts"] == 0 and facts["refresh"] == 0, f"{where}: scripts or a refresh")
            checks.expect(facts["overflow"] <= 0, f"{where}: {facts['overflow']} px too wide")
            checks.expect(facts["bodySize"] >= 16, f"{where}: text of {facts['bodySize']} px")
            checks.expect(facts["icon"] > 0, f"{where}: the image does not show")
            checks.expect(facts["column"] <= 720, f"{where}: lines of {facts['column']} px")
            checks.expect(all(target >= 40 for target in facts["targets"]), f"{where}: links too small to touch")
            for text, contrast in browser.evaluate(CONTRASTS):
                checks.expect(contrast >= 4.5, f"{where}: contrast {contrast:.2f} of {text!r}")
            # A status of 503 is itself reported as an error of the network.
            entries = [entry["entry"] for entry in browser.named("Log.entryAdded")]
            entries = [entry["text"] for entry in entries if entry["source"] != "network"]
            checks.expect(not entries, f"{where}: the console shows {entries}")
            requested = {urllib.parse.urlsplit(event["request"]["url"]) for event in browser.named("Network.requestWillBeSent")}
            checks.expect({part.netloc for part in requested} == {own}, f"{where}: requested others: {requested}")
            grounds.setdefault(scheme, set()).add(facts["ground"])
    checks.expect(not grounds["light"] & grounds["dark"], f"{url}: dark looks like light: {grounds}")


def check_form(browser, url, checks):
    """The page's own form adds a note, and a reload adds none."""
    if browser.open(url) != 200 or not browser.evaluate("document.forms.length"):
        return
    note = f"<b>by the form</b> {time.time()}"
    browser.evaluate(f"document.querySelector('#content').value = {json.dumps(note)}; 1")
    browser.submit("form")
    browser.open(url)
    texts = [found["text"] for found in browser.evaluate(FACTS)["notes"]]
    checks.expect(texts[:1] == [note], f"{url}: the form's note is not the first of {texts}")
    checks.expect(texts.count(note) == 1, f"{url}: the form's note is there {texts.count(note)} times")


def check_other_origins(browser, targets, checks):
    """A page from another port of this machine, then one whose name has been rebound to this machine."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stranger)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for target in targets:
        for host in ("127.0.0.1", "stranger.example"):
            origin = f"http://{host}:{server.server_port}/"
            browser.open(origin)
            got = browser.evaluate(f"({ATTACK})({json.dumps(target)})")
            for way, answer in got.items():
                checks.expect(answer == "nothing", f"{origin} got {answer!r} from {target} by {way}")
        parts = urllib.parse.urlsplit(target)
        status = browser.open(f"{parts.scheme}://rebound.example:{parts.port}{parts.path}")
        text = browser.evaluate("document.documentElement.textContent")
        checks.expect(status == 421, f"{target} under a rebound name: status {status}")
        checks.expect("Lakebase" not in text and "lakebase_proxy" not in text, f"{target} under a rebound name: {text}")
    server.shutdown()


class Stranger(http.server.BaseHTTPRequestHandler):
    """An empty page of another origin."""

    def do_GET(self):
        body = b"<!doctype html><title>stranger</title><body></body>"
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notes", help="address of the notes page")
    parser.add_argument("--metrics", help="address of health and metrics")
    parser.add_argument("--screenshots", type=pathlib.Path, help="where to put a picture of each state")
    options = parser.parse_args()
    if options.screenshots:
        options.screenshots.mkdir(parents=True, exist_ok=True)

    checks = Checks()
    notes = options.notes.rstrip("/") + "/"
    targets = [notes]
    if options.metrics:
        targets.append(options.metrics.rstrip("/") + "/metrics")
    rules = "MAP rebound.example 127.0.0.1, MAP stranger.example 127.0.0.1"
    with Chromium(f"--host-resolver-rules={rules}") as browser:
        check_page(browser, notes, checks, options.screenshots)
        check_form(browser, notes, checks)
        check_other_origins(browser, targets, checks)
    for failure in checks.failures:
        print(failure, file=sys.stderr)
    print(f"{checks.count - len(checks.failures)} of {checks.count} checks passed")
    return 1 if checks.failures else 0


if __name__ == "__main__":
    sys.exit(main())
