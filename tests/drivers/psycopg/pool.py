"""psycopg_pool: ten connections that stay open while the compute suspends, and requests that work after that."""

import concurrent.futures
import json
import os
import time
import urllib.request

import psycopg_pool

SIZE = 10
ROUNDS = 5
WAIT = 30  # seconds that anything here may take before it counts as hung


def suspend():
    """Suspends the compute, and waits until the proxy knows that its connections are gone."""
    # A login that is under way would wake it.
    until_none('{state="opening"')
    event = urllib.request.Request(os.environ["EMULATOR_URL"] + "/emulator/events", json.dumps({"event": "suspend"}).encode(), method="POST")
    urllib.request.urlopen(event, timeout=WAIT).close()
    until_none("{")


def until_none(labels):
    deadline = time.monotonic() + WAIT
    while True:
        with urllib.request.urlopen(os.environ["METRICS_URL"], timeout=WAIT) as answer:
            lines = answer.read().decode().splitlines()
        found = [line for line in lines if line.startswith(f"lakebase_proxy_pool_servers{labels}") and not line.endswith(" 0")]
        if not found:
            return
        assert time.monotonic() < deadline, found
        time.sleep(0.05)


def work(pool, number):
    with pool.connection(timeout=WAIT) as conn:
        # From the sixth time on a prepared statement.
        for turn in range(8):
            assert conn.execute("select %s::int + %s", (number, turn)).fetchone() == (number + turn,)
        conn.execute("insert into pool_rows values (%s)", (number,))
    return conn


with psycopg_pool.ConnectionPool("", min_size=SIZE, max_size=SIZE, open=True) as pool, concurrent.futures.ThreadPoolExecutor(SIZE) as threads:
    pool.wait(WAIT)
    with pool.connection() as conn:
        conn.execute("drop table if exists pool_rows; create table pool_rows (a int)")
    used = set()
    for round in range(ROUNDS):
        if round:
            suspend()
        used |= set(threads.map(lambda number: work(pool, number), range(SIZE)))
    with pool.connection() as conn:
        rows = conn.execute("select count(*) from pool_rows").fetchone()[0]
        conn.execute("drop table pool_rows")
    stats = pool.get_stats()
    assert rows == SIZE * ROUNDS, rows
    # None was replaced.
    assert len(used) <= SIZE and stats.get("connections_lost", 0) == 0 and stats["connections_num"] == SIZE, stats
print("end = of the job")
