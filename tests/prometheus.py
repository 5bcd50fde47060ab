#!/usr/bin/env python3
"""promtool accepts the metrics, and a real Prometheus scrapes them.

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
import urllib.parse
import urllib.request

from stage import ROOT, free_port

LIMIT = 60  # seconds for Prometheus to start and to scrape twice
CONFIG = ROOT / "config/prometheus.yml"


def main():
    metrics = os.environ["HTTP_URL"]
    # Something to count: a session, a refusal by the server, and one that comes to nothing.
    subprocess.run(["psql", "-U", "anyone", "-c", "select 1"], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["psql", "-d", "no_such_database", "-c", "select 1"], check=False, stderr=subprocess.DEVNULL)

    subprocess.run(["promtool", "check", "config", CONFIG], check=True)
    text = get(f"{metrics}/metrics")
    checked = subprocess.run(["promtool", "check", "metrics"], input=text, text=True, capture_output=True)
    if checked.returncode != 0 or checked.stdout.strip() or checked.stderr.strip():
        raise SystemExit(f"promtool complains: {checked.stdout}{checked.stderr}")
    names = sorted(set(re.findall(r"(?m)^# TYPE (\S+)", text)))
    print(f"promtool accepts {len(names)} metrics")

    with tempfile.TemporaryDirectory() as directory:
        # The shipped configuration, but for the port and the patience.
        config = CONFIG.read_text()
        for found, wanted in (("localhost:9090", metrics.removeprefix("http://")), ("scrape_interval: 15s", "scrape_interval: 1s"), ("scrape_timeout: 10s", "scrape_timeout: 1s")):
            if config.count(found) != 1:
                raise SystemExit(f"{CONFIG} no longer has `{found}`")
            config = config.replace(found, wanted)
        path = pathlib.Path(directory) / "prometheus.yml"
        path.write_text(config)
        address = f"127.0.0.1:{free_port()}"
        with (pathlib.Path(directory) / "log").open("w+") as log:
            server = subprocess.Popen(["prometheus", f"--config.file={path}", f"--storage.tsdb.path={directory}/data", f"--web.listen-address={address}", "--log.level=warn"],
                                      stdout=log, stderr=log)
            try:
                scraped(f"http://{address}", server, log)
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
