#!/usr/bin/env python3
"""promtool accepts the metrics and the alerts, a real Prometheus scrapes them, and the dashboard's queries have answers.

    tests/stage.py tests/prometheus.py

The proxy is found in HTTP_URL, PGHOST and PGPORT. Needs promtool, prometheus and psql.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request

from stage import ROOT, free_port

LIMIT = 60  # seconds for Prometheus to start and to scrape twice
CONFIG = ROOT / "config/prometheus.yml"
RULES = ROOT / "deploy/prometheus/lakebase-proxy.rules.yml"
RULES_TEST = ROOT / "deploy/prometheus/lakebase-proxy.rules.test.yml"
DASHBOARD = ROOT / "deploy/grafana/lakebase-proxy.json"


def main():
    metrics = os.environ["HTTP_URL"]
    # Something to count: a session, a refusal by the server, and one that fails.
    subprocess.run(["psql", "-U", "anyone", "-c", "select 1"], check=True, stdout=subprocess.DEVNULL)
    # Once: with its default, `prefer`, libpq connects again without TLS after any refusal.
    subprocess.run(["psql", "sslmode=disable dbname=no_such_database", "-c", "select 1"], check=False, stderr=subprocess.DEVNULL)

    for arguments in (["check", "config", CONFIG], ["check", "rules", RULES], ["test", "rules", RULES_TEST]):
        subprocess.run(["promtool", *arguments], check=True)
    text = get(f"{metrics}/metrics")
    checked = subprocess.run(["promtool", "check", "metrics"], input=text, text=True, capture_output=True)
    if checked.returncode != 0 or checked.stdout.strip() or checked.stderr.strip():
        raise SystemExit(f"promtool complains: {checked.stdout}{checked.stderr}")
    names = sorted(set(re.findall(r"(?m)^# TYPE (\S+)", text)))
    print(f"promtool accepts {len(names)} metrics")
    for path in (RULES, RULES_TEST, DASHBOARD, ROOT / "tests/prometheus.py"):
        used = {re.sub("_(bucket|count|sum)$", "", name) for name in re.findall(r"lakebase_proxy_\w+", path.read_text())}
        if missing := {name for name in used if name not in names}:
            raise SystemExit(f"{path} uses unknown metrics: {', '.join(sorted(missing))}")

    with tempfile.TemporaryDirectory() as directory:
        # The shipped configuration, but for the port and the timeout.
        config = CONFIG.read_text()
        # Alerts are evaluated once a minute by default, at a second of the minute that is Prometheus' own choice.
        faster = "scrape_interval: 1s\n  evaluation_interval: 1s"
        for found, wanted in (("localhost:9090", metrics.removeprefix("http://")), ("scrape_interval: 15s", faster), ("scrape_timeout: 10s", "scrape_timeout: 1s")):
            if config.count(found) != 1:
                raise SystemExit(f"{CONFIG} no longer has `{found}`")
            config = config.replace(found, wanted)
        config += f"rule_files: [{json.dumps(str(RULES))}]\n"
        path = pathlib.Path(directory) / "prometheus.yml"
        path.write_text(config)
        address = f"127.0.0.1:{free_port()}"
        with (pathlib.Path(directory) / "log").open("w+") as log:
            server = subprocess.Popen(["prometheus", f"--config.file={path}", f"--storage.tsdb.path={directory}/data", f"--web.listen-address={address}", "--log.level=warn"],
                                      stdout=log, stderr=log)
            try:
                scraped(f"http://{address}", server, log)
                evaluated(f"http://{address}")
                drawn(f"http://{address}")
            finally:
                server.terminate()
                server.wait(LIMIT)


def scraped(prometheus, server, log):
    """Waits until Prometheus has what it should of our numbers."""
    wanted = {
        "up": 1,
        "sum(lakebase_proxy_client_connections_opened_total) >= bool 2": 1,
        "sum(lakebase_proxy_upstream_connects_total{outcome=\"ok\"}) >= bool 1": 1,
        "sum(lakebase_proxy_client_connections_refused_total{reason=\"permission\"})": 1,
        "min(lakebase_proxy_credential_expiry_timestamp_seconds) > bool time()": 1,
        "sum(lakebase_proxy_relay_bytes_total) > bool 0": 1,
        "histogram_quantile(0.99, sum by (le) (lakebase_proxy_upstream_connect_duration_seconds_bucket{phase=\"total\"})) > bool 0": 1,
    }
    deadline = time.monotonic() + LIMIT
    missing = wanted
    while missing and time.monotonic() < deadline:
        if server.poll() is not None:
            log.seek(0)
            raise SystemExit(f"prometheus ended with code {server.returncode}: {log.read()[-2000:]}")
        time.sleep(0.2)
        missing = {query: value for query, value in wanted.items() if answer(prometheus, query) != value}
    if missing:
        raise SystemExit("Prometheus has not:\n" + "\n".join(f"  {query}: {answer(prometheus, query)}, not {value}" for query, value in missing.items()))
    print(f"Prometheus scrapes them: {len(wanted)} queries answered as they should be")


def evaluated(prometheus):
    """Waits until each alert's expression has been evaluated without an error."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        groups = json.loads(get(f"{prometheus}/api/v1/rules"))["data"]["groups"]
        rules = [rule for group in groups for rule in group["rules"]]
        if wrong := [rule["name"] for rule in rules if rule["health"] == "err"]:
            raise SystemExit(f"alerts that cannot be evaluated: {', '.join(wrong)}")
        if rules and all(rule["health"] == "ok" for rule in rules):
            print(f"{len(rules)} alerts evaluated")
            return
        time.sleep(0.2)
    raise SystemExit("the alerts were not evaluated in time")


def drawn(prometheus):
    """Every panel of the dashboard has something to draw, once there are the two scrapes that a rate needs."""
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [(panel["title"], target["expr"]) for panel in dashboard["panels"] for target in panel.get("targets", [])]
    for title, query in queries:
        # A panel that leaves zeros out may be empty; its numbers may not.
        shown = re.sub(r"\$(job|instance|endpoint)\b", ".*", query).replace("$__rate_interval", "1m").removesuffix(" > 0")
        deadline = time.monotonic() + LIMIT
        while not vector(prometheus, shown):
            if time.monotonic() > deadline:
                raise SystemExit(f"panel `{title}` is empty: {shown}")
            time.sleep(0.2)
    for variable in dashboard["templating"]["list"]:
        if requested := re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]):
            series = re.sub(r"\$(job|instance)\b", ".*", requested[1])
            if not all(requested[2] in found["metric"] for found in vector(prometheus, series) or [{"metric": {}}]):
                raise SystemExit(f"variable `{variable['name']}` has no value")
    print(f"{len(queries)} queries of the dashboard have answers")


def vector(prometheus, query):
    try:
        return json.loads(get(f"{prometheus}/api/v1/query?{urllib.parse.urlencode({'query': query})}"))["data"]["result"]
    except urllib.error.HTTPError as error:
        raise SystemExit(f"Prometheus does not take `{query}`: {error.read().decode()}") from None


def answer(prometheus, query):
    try:
        result = json.loads(get(f"{prometheus}/api/v1/query?{urllib.parse.urlencode({'query': query})}"))["data"]["result"]
    except OSError:
        return None
    return float(result[0]["value"][1]) if result else None


def get(url):
    with urllib.request.urlopen(url, timeout=10) as response:
        return response.read().decode()


if __name__ == "__main__":
    sys.exit(main())
