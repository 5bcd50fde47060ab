#!/usr/bin/env python3
"""The status page in a real browser: what an operator sees when all is well and when it is not.

    tests/stage.py tests/browser/status.py [--screenshots DIR]

Needs PGHOST, PGPORT and HTTP_URL of a proxy with `--admin-console` or without; starts a second proxy of its own, whose
workspace does not exist, for the failing state (LAKEBASE_PROXY names the program, default target/debug/lakebase-proxy).
Each state is looked at on a wide screen and on a phone, light and dark, at 320 px, and with scripts off. Exits with 1 and
a list of what is wrong.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import time
import urllib.error
import urllib.request

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from chromium import Chromium
from notes import CONTRASTS, Checks
from stage import ROOT, TARGET, clean_environment, free_port

DEVICES = {"wide": (1280, 900, 1), "phone": (390, 844, 2), "narrow": (320, 640, 2)}
TIMEOUT = 30  # seconds

FACTS = """
({
  title: document.title,
  state: document.querySelector('#state')?.textContent ?? '',
  live: document.querySelector('#live')?.textContent ?? '',
  h1: document.querySelectorAll('h1').length,
  landmarks: ['header', 'main', 'footer'].map((name) => document.querySelectorAll(name).length),
  unlabeled: [...document.querySelectorAll('section')].filter((e) => {
    const by = e.getAttribute('aria-labelledby');
    return !e.getAttribute('aria-label') && !(by && document.getElementById(by)?.textContent);
  }).length,
  status: document.querySelector('[role=status]')?.getAttribute('aria-live') ?? '',
  bars: [...document.querySelectorAll('svg.bar')].map((e) => e.getAttribute('aria-label')),
  sessions: [...document.querySelectorAll('#sessions + table tbody tr')].map((row) =>
    Object.fromEntries([...row.cells].map((cell) => [cell.dataset.label, cell.textContent.trim()]))),
  failures: [...document.querySelectorAll('.failures li')].map((e) => e.textContent),
  hints: [...document.querySelectorAll('.hint')].map((e) => e.textContent),
  refreshes: document.querySelectorAll('#refreshes + table tbody tr').length,
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  inline: document.querySelectorAll('[style], script:not([src]), style').length,
  links: [...document.querySelectorAll('footer a')].map((e) => e.getBoundingClientRect().height),
  ground: getComputedStyle(document.body).backgroundColor,
  signs: [...document.querySelectorAll('.sign, .state > span')].every((e) => e.textContent.trim() && e.ariaHidden === 'true'),
})
"""


def look(browser, url, name, checks, screenshots):
    """The page in every shape; returns its content."""
    grounds, facts = {}, None
    for device, (width, height, scale) in DEVICES.items():
        for scheme in ("light", "dark"):
            where = f"{name} {device} {scheme}"
            browser.look(width, height, scheme, scale)
            status = browser.open(url)
            facts = browser.evaluate(FACTS)
            if screenshots:
                whole = browser.evaluate("document.documentElement.scrollHeight")
                browser.look(width, min(whole, 4000), scheme, scale)
                browser.screenshot(str(screenshots / f"status-{name}-{device}-{scheme}.png"))
            checks.expect(status == 200, f"{where}: status {status}")
            checks.expect(facts["h1"] == 1 and facts["landmarks"] == [1, 1, 1], f"{where}: landmarks {facts}")
            checks.expect(facts["unlabeled"] == 0, f"{where}: sections without a name")
            checks.expect(facts["status"] == "polite", f"{where}: no live region")
            checks.expect(facts["overflow"] <= 0, f"{where}: {facts['overflow']} px too wide")
            checks.expect(facts["inline"] == 0, f"{where}: inline style or script")
            checks.expect(facts["signs"], f"{where}: a state without a sign, or one that is read out")
            checks.expect(all(link >= 32 for link in facts["links"]), f"{where}: links too small to touch")
            for text, contrast in browser.evaluate(CONTRASTS):
                checks.expect(contrast >= 4.5, f"{where}: contrast {contrast:.2f} of {text!r}")
            entries = [entry["entry"]["text"] for entry in browser.named("Log.entryAdded")]
            checks.expect(not entries, f"{where}: the console shows {entries}")
            requested = {event["request"]["url"] for event in browser.named("Network.requestWillBeSent")}
            checks.expect(all(address.startswith(url) for address in requested), f"{where}: requested others: {requested}")
            grounds.setdefault(scheme, set()).add(facts["ground"])
    checks.expect(not grounds["light"] & grounds["dark"], f"{name}: dark looks like light: {grounds}")
    return facts


def until(browser, what, condition, checks):
    """Waits until the page updates itself, without a reload."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        if condition(browser.evaluate(FACTS)):
            return
        time.sleep(0.2)
    checks.expect(False, f"the page never showed {what}: {browser.evaluate(FACTS)}")


def psql(script):
    """A session that stays until stopped."""
    client = subprocess.Popen(
        ["psql", "-X", "-q", "-d", "databricks_postgres", "-U", "operator"],
        env=os.environ | {"PGAPPNAME": "<b>night shift</b>"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    client.stdin.write(script + "\\echo begun\n")
    client.stdin.flush()
    while client.stdout.readline().strip() not in ("begun", ""):
        pass
    return client


def check_well(browser, url, checks, screenshots):
    clients = [psql("BEGIN; SELECT 1;\n"), psql("SELECT 1;\n"), psql("SELECT 1;\n")]
    facts = look(browser, url, "well", checks, screenshots)
    checks.expect("Ready" in facts["state"] and "Not" not in facts["state"], f"state {facts['state']!r}")
    checks.expect(facts["title"].startswith("Ready"), f"title {facts['title']!r}")
    checks.expect(len(facts["bars"]) == 1 and "credential" in facts["bars"][0], f"bars {facts['bars']}")
    checks.expect(facts["refreshes"] >= 1, "no refresh is shown")
    result = [(row["Application"], row["State"].split(" ", 1)[-1].strip()) for row in facts["sessions"]]
    checks.expect(("<b>night shift</b>", "idle in transaction") == (result or [("", "")])[0], f"sessions {result}")
    checks.expect(len(result) == 3, f"{len(result)} sessions")

    # Live, without a reload: what is focused stays so, and what is gone goes.
    browser.look(1280, 900, "light")
    browser.open(url)
    browser.evaluate("window.same = document.querySelector('footer a'); window.same.focus(); document.querySelector('#sessions').kept = 1")
    for client in clients:
        client.stdin.close()
        client.wait()
    until(browser, "that the sessions have gone", lambda facts: not facts["sessions"], checks)
    kept = browser.evaluate("document.activeElement === window.same && document.querySelector('#sessions').kept === 1")
    checks.expect(kept, "an update took the focus away, or loaded the page again")
    checks.expect(browser.evaluate("document.querySelector('#live').textContent") == "Live", "the page does not show that it is live")

    # With scripts off it is whole, and comes again by itself.
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    status = browser.open(url)
    browser.call("Emulation.setScriptExecutionDisabled", value=False)
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Accept": "text/html"}), timeout=TIMEOUT) as answer:
        text, policy = answer.read().decode(), answer.headers["Content-Security-Policy"]
    checks.expect(status == 200 and "<noscript><meta http-equiv=\"refresh\"" in text, "without scripts it does not come again")
    checks.expect("unsafe" not in policy and "default-src 'none'" in policy, f"policy {policy}")
    try:
        urllib.request.urlopen(urllib.request.Request(url, headers={"Accept": "text/html", "Host": "rebound.example"}), timeout=TIMEOUT)
        checks.expect(False, "a rebound name is answered")
    except urllib.error.HTTPError as error:
        checks.expect(error.code == 421, f"a rebound name gets {error.code}")


def check_failing(browser, checks, screenshots):
    """A proxy whose workspace cannot be reached, and whose clients are refused."""
    port, http = free_port(), free_port()
    program = os.environ.get("LAKEBASE_PROXY", TARGET / "debug/lakebase-proxy")
    variables = {
        "ENDPOINT_NAME": "projects/shop/branches/production/endpoints/primary",
        "PGHOST": "ep-quiet-night-a1b2c3.database.example",
        "PGUSER": "0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0",
        "DATABRICKS_HOST": f"http://127.0.0.1:{free_port()}",
        "DATABRICKS_TOKEN": "none",
    }
    flags = ["--port", port, "--http-port", http, "--connect-timeout", "1s", "--address", "127.0.0.1"]
    command = [str(part) for part in [program, "serve", *flags]]
    proxy = subprocess.Popen(command, env=clean_environment() | variables, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    try:
        url = f"http://127.0.0.1:{http}/"
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(url, timeout=TIMEOUT).close()
                break
            except OSError:
                time.sleep(0.1)
        environment = clean_environment() | {"PGHOST": "127.0.0.1", "PGPORT": str(port), "PGUSER": "x"}
        # With its default, `prefer`, libpq connects again without TLS after any refusal.
        environment["PGSSLMODE"] = "disable"
        for _ in range(3):
            subprocess.run(["psql", "-X", "-c", "select 1"], env=environment, stderr=subprocess.DEVNULL)
        facts = look(browser, url, "failing", checks, screenshots)
        checks.expect("Not ready" in facts["state"], f"state {facts['state']!r}")
        checks.expect(len(facts["failures"]) == 1 and "3 times" in facts["failures"][0], f"failures {facts['failures']}")
        checks.expect("28000" in facts["failures"][0], f"failures {facts['failures']}")
        checks.expect(len(facts["hints"]) >= 2, f"hints {facts['hints']}")
        checks.expect(not facts["bars"], "a credential that is not there has a life")
        # An open page shows that there is no answer any more.
        proxy.terminate()
        proxy.wait(TIMEOUT)
        until(browser, "that there is no answer", lambda facts: facts["live"].startswith("No answer since"), checks)
    finally:
        proxy.kill()
        proxy.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--screenshots", type=pathlib.Path, help="where to put a picture of each state")
    options = parser.parse_args()
    if options.screenshots:
        options.screenshots.mkdir(parents=True, exist_ok=True)
    checks = Checks()
    with Chromium("--host-resolver-rules=MAP *.example 127.0.0.1") as browser:
        check_well(browser, os.environ["HTTP_URL"].rstrip("/") + "/", checks, options.screenshots)
        check_failing(browser, checks, options.screenshots)
    for failure in checks.failures:
        print(failure)
    print(f"{checks.count - len(checks.failures)} of {checks.count} checks passed")
    return 1 if checks.failures else 0


if __name__ == "__main__":
    sys.exit(main())
