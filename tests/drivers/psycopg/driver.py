"""psycopg 3 (libpq): one broad job over one server, reported as a transcript of `key = value` lines.

The server is named by libpq's own variables alone, so the same script runs direct and through the proxy.
"""

import os
import re
import threading
import time
import uuid

import psycopg
from psycopg import sql
from psycopg.rows import dict_row

# libpq sends these as startup parameters of their own.
os.environ["PGTZ"] = "Pacific/Auckland"
os.environ["PGDATESTYLE"] = "SQL, DMY"
os.environ["PGAPPNAME"] = "psycopg's job"
os.environ["PGOPTIONS"] = r"-c search_path=public,pg_catalog -c statement_timeout=54321 -c extra_float_digits=2"
WAIT = 20  # seconds that anything here may take before it counts as hung


def report(key, value):
    print(f"{key} = {value!r}" if not isinstance(value, str) else f"{key} = {value}", flush=True)


def failure(key, error):
    diag = error.diag
    for field in ("severity", "severity_nonlocalized", "sqlstate", "message_primary", "message_detail", "message_hint",
                  "statement_position", "schema_name", "table_name", "column_name", "datatype_name", "constraint_name",
                  "context", "source_function"):
        value = getattr(diag, field)
        if value is not None:
            # The number of a backend's temporary schema may differ.
            report(f"{key}.{field}", re.sub(r"pg_temp_\d+", "pg_temp_N", value))


def connect(**parameters):
    return psycopg.connect("", connect_timeout=WAIT, **parameters)


def startup():
    with connect() as conn:
        info = conn.info
        report("startup.server_version", info.server_version)
        report("startup.pid is pg_backend_pid", conn.execute("select pg_backend_pid()").fetchone()[0] == info.backend_pid)
        for name in ("server_encoding", "client_encoding", "DateStyle", "TimeZone", "IntervalStyle", "application_name",
                     "integer_datetimes", "standard_conforming_strings", "is_superuser", "session_authorization",
                     "default_transaction_read_only", "in_hot_standby"):
            report(f"startup.status.{name}", info.parameter_status(name))
        report("startup.current_database", conn.execute("select current_database()").fetchone()[0])
        report("startup.current_user", conn.execute("select current_user, session_user").fetchone())
    shown = ("application_name", "TimeZone", "DateStyle", "client_encoding", "search_path", "statement_timeout", "extra_float_digits")
    with connect(client_encoding="LATIN1", autocommit=True) as conn:
        def show(key):
            for name in shown:
                report(f"{key}.{name}", conn.execute(f"show {name}").fetchone()[0])
        show("startup.show")
        conn.execute("set application_name = 'changed'; set timezone = 'UTC'; set search_path = pg_catalog")
        report("startup.status after SET", conn.info.parameter_status("application_name"))
        conn.execute("reset all")
        show("startup.after RESET ALL")
        conn.execute("set datestyle = 'ISO'; set statement_timeout = 1")
        conn.execute("discard all")
        show("startup.after DISCARD ALL")
    with connect(application_name="it's a \\ 'quoted' name, with  spaces", options="-c geqo=off -c work_mem=1234kB") as conn:
        report("startup.odd application_name", conn.execute("show application_name").fetchone()[0])
        report("startup.geqo", conn.execute("show geqo").fetchone()[0])
        report("startup.work_mem", conn.execute("show work_mem").fetchone()[0])
    for key, wrong in (("startup.no such database", {"dbname": "no_such_database"}),
                       ("startup.bad option", {"options": "-c no_such_setting=1"})):
        try:
            connect(**wrong).close()
            report(key, "connected")
        except psycopg.OperationalError as error:
            text = str(error)
            report(key, "does not exist" in text or "no_such_setting" in text)


def types(conn):
    row = conn.execute(
        """select 42::int2, -7::int4, 9007199254740993::int8, 1.5::float4, 2.25::float8, 123456789.123456789::numeric, true, false,
                  'text'::text, 'x'::char(3), '\\xdeadbeef'::bytea, date '2026-02-28', time '23:59:59.999999',
                  timestamp '2026-02-28 12:34:56.789', timestamptz '2026-02-28 12:34:56+00' at time zone 'UTC',
                  interval '1 day 02:03:04', '{"a": [1, null]}'::jsonb, array[1, null, 3], array[['a', 'b'], ['c', 'd']],
                  int4range(1, 5), '10.0.0.0/8'::cidr, 'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'::uuid, 'infinity'::float8, null::int4"""
    ).fetchone()
    for number, value in enumerate(row):
        report(f"types.{number:02}", value)
    with conn.cursor(binary=True) as cur:
        cur.execute("select %b::int8, %b::bytea, %b::text, %b::uuid, %b::float8[]",
                    (1 << 40, b"\0\x01\xff", "naïve – 漢字 🐘", uuid.UUID(int=7), [1.5, None, float("inf")]))
        report("types.binary", cur.fetchone())
    report("types.nulls", conn.execute("select null::text, ''::text, array[null]::text[]").fetchone())
    report("types.unicode", conn.execute("select %s, length(%s)", ("żółć 🐘\t\n'\"\\", "👩‍👩‍👧‍👦")).fetchone())
    report("types.empty query", conn.execute("").description)
    report("types.no columns", conn.execute("select").fetchall())
    report("types.1600 columns", sum(conn.execute("select " + ",".join(str(n) for n in range(1600))).fetchone()))


def large(conn):
    text = "0123456789abcdef" * (1 << 20)
    report("large.sent", conn.execute("select md5(%s), length(%s)", (text, text)).fetchone())
    received = conn.execute("select repeat('0123456789abcdef', 1 << 20)").fetchone()[0]
    report("large.received", received == text)
    report("large.binary", len(conn.execute("select decode(repeat('ff', 1 << 23), 'hex')").fetchone()[0]))
    rows = conn.execute("select g, md5(g::text) from generate_series(1, 100000) g").fetchall()
    report("large.rows", (len(rows), rows[-1]))
    report("large.long statement", conn.execute("select length('" + "x" * 3_000_000 + "')").fetchone())


def prepared(conn):
    for number in range(7):
        row = conn.execute("select %s::int * 2, (select count(*) from pg_prepared_statements)", (number,), prepare=True).fetchone()
        report(f"prepared.{number}", row)
    conn.execute("prepare by_hand as select $1::int + 1")
    report("prepared.by hand", conn.execute("execute by_hand(41)").fetchone())
    conn.execute("deallocate by_hand")


def pipeline(conn):
    with conn.pipeline():
        cursors = [conn.execute("select %s::int", (number,)) for number in range(50)]
        report("pipeline.sum", sum(cur.fetchone()[0] for cur in cursors))
    try:
        with conn.pipeline() as pipe:
            conn.execute("select 1")
            conn.execute("select 1 / (%s::int)", (0,))
            conn.execute("select 2")
            pipe.sync()
    except psycopg.Error as error:
        failure("pipeline.error", error)
    conn.rollback()
    report("pipeline.usable", conn.execute("select 'yes'").fetchone())
    conn.rollback()
    with conn.cursor() as cur:
        cur.execute("create temp table pipelined (n int primary key, t text)")
        cur.executemany("insert into pipelined values (%s, %s) returning n", [(n, f"row {n}") for n in range(200)], returning=True)
        report("pipeline.executemany", cur.fetchone())
        cur.execute("select count(*), sum(n) from pipelined")
        report("pipeline.inserted", cur.fetchone())
    conn.rollback()


def errors(conn):
    conn.execute("create temp table strict (id int primary key, positive int constraint must_be_positive check (positive > 0), label text not null)")
    conn.commit()
    for key, statement in (
        ("unique", "insert into strict values (1, 1, 'a'), (1, 2, 'b')"),
        ("check", "insert into strict values (2, -1, 'a')"),
        ("not null", "insert into strict values (3, 1, null)"),
        ("syntax", "selec 1"),
        ("no table", "select * from no_such_table"),
        ("division", "select 1 / 0"),
        ("cast", "select 'x'::int"),
        ("raised", "do $$ begin raise exception 'own words %', 7 using errcode = 'LB001', detail = 'a detail', hint = 'a hint', table = 'strict'; end $$"),
        ("unicode", "do $$ begin raise exception 'żółć 🐘'; end $$"),
    ):
        try:
            conn.execute(statement)
        except psycopg.Error as error:
            failure(f"errors.{key}", error)
        report(f"errors.{key}.state", conn.info.transaction_status.name)
        try:
            conn.execute("select 1")
        except psycopg.Error as error:
            report(f"errors.{key}.after", error.sqlstate)
        conn.rollback()
    with conn.transaction():
        conn.execute("insert into strict values (1, 1, 'kept')")
        try:
            with conn.transaction("inner_point"):
                conn.execute("insert into strict values (2, 2, 'dropped')")
                raise psycopg.Rollback("inner_point")
        except psycopg.Rollback:
            pass
    report("errors.savepoint", conn.execute("select id, label from strict").fetchall())
    conn.commit()
    report("errors.idle", conn.info.transaction_status.name)


def copy(conn):
    conn.execute("create temp table copied (id int, t text, b bytea)")
    with conn.cursor() as cur:
        with cur.copy("copy copied from stdin") as copy_in:
            for number in range(20000):
                copy_in.write_row((number, f"row {number} żółć\t\\", bytes([number % 256]) * 3))
        report("copy.in", cur.statusmessage)
        digest = 0
        with cur.copy("copy (select * from copied order by id) to stdout") as copy_out:
            for block in copy_out:
                digest += len(block)
        report("copy.out bytes", digest)
        with cur.copy("copy copied to stdout (format binary)") as copy_out:
            copy_out.set_types(["int4", "text", "bytea"])
            report("copy.binary rows", sum(1 for _ in copy_out.rows()))
        report("copy.checksum", cur.execute("select md5(string_agg(t, ',' order by id)) from copied").fetchone())
        conn.commit()
        try:
            with cur.copy("copy copied from stdin") as copy_in:
                copy_in.write("not a number\tx\t\\\\x00\n")
        except psycopg.Error as error:
            failure("copy.bad row", error)
        conn.rollback()
        try:
            with cur.copy("copy copied from stdin") as copy_in:
                copy_in.write("1\tx\t\\\\x00\n")
                raise RuntimeError("changed my mind")
        except RuntimeError:
            report("copy.given up", conn.info.transaction_status.name)
        conn.rollback()
        try:
            with cur.copy("copy (select 1 / (50000 - g) from generate_series(1, 60000) g) to stdout") as copy_out:
                for _ in copy_out:
                    pass
        except psycopg.Error as error:
            report("copy.out fails midway", error.sqlstate)
        conn.rollback()
        report("copy.left", cur.execute("select count(*) from copied").fetchone())
    conn.rollback()


def notifications():
    with connect(autocommit=True) as listener, connect(autocommit=True) as speaker:
        listener.execute("listen drivers_psycopg")
        speaker.execute("notify drivers_psycopg, 'one'")
        speaker.execute("select pg_notify('drivers_psycopg', %s)", ("two 🐘",))
        pid = backend(speaker)
        received = [(n.channel, n.payload, n.pid == pid) for n in listener.notifies(timeout=WAIT, stop_after=2)]
        report("notify.received", received)
        listener.execute("unlisten *")
        speaker.execute("notify drivers_psycopg")
        report("notify.after UNLISTEN", [n.payload for n in listener.notifies(timeout=0.2)])


def notices(conn):
    seen = []
    conn.add_notice_handler(lambda diag: seen.append((diag.severity, diag.sqlstate, diag.message_primary)))
    conn.execute("do $$ begin raise notice 'first'; raise warning 'second' using hint = 'h'; raise notice '%', repeat('x', 70000); end $$")
    conn.execute("drop table if exists no_such_table")
    report("notices", [(severity, state, text[:40], len(text)) for severity, state, text in seen])
    conn.rollback()


def backend(conn):
    """Which process serves it; what a driver knows as its process id may be half of a cancel key that the edge made up."""
    return conn.execute("select pg_backend_pid()").fetchone()[0]


class Striker(threading.Thread):
    """Does something to the backend that is seen asleep, by its process id; a failure of it is not lost."""

    def __init__(self, strike):
        super().__init__()
        self.strike, self.error = strike, None

    def run(self):
        try:
            self.strike(asleep())
        except Exception as error:  # reported after the join
            self.error = error

    def done(self):
        self.join()
        if self.error:
            raise self.error


def asleep():
    """The process that sleeps: a pool may run each transaction at another one."""
    with connect(autocommit=True) as watcher:
        deadline = time.monotonic() + WAIT
        while time.monotonic() < deadline:
            (pid,) = watcher.execute("select max(pid) from pg_stat_activity where state = 'active' and wait_event = 'PgSleep'").fetchone()
            if pid:
                return pid
            time.sleep(0.02)
    raise TimeoutError("no backend began to sleep")


def cancel(conn):
    for key, how in (("cancel", "cancel"), ("cancel_safe", "cancel_safe")):
        striker = Striker(lambda _pid, how=how: getattr(conn, how)())
        began = time.monotonic()
        striker.start()
        try:
            conn.execute("select pg_sleep(60)")
        except psycopg.errors.QueryCanceled as error:
            failure(key, error)
        striker.done()
        report(f"{key}.prompt", time.monotonic() - began < WAIT)
        conn.rollback()
        report(f"{key}.usable", conn.execute("select 1").fetchone())
        conn.rollback()


def cursors(conn):
    with conn.cursor("server_side", row_factory=dict_row) as cur:
        cur.itersize = 1000
        cur.execute("select g as n from generate_series(1, 10000) g")
        report("cursors.first", cur.fetchone())
        report("cursors.many", len(cur.fetchmany(500)))
        report("cursors.rest", sum(1 for _ in cur))
    with conn.cursor("scrolling", scrollable=True) as cur:
        cur.execute("select generate_series(1, 100)")
        cur.scroll(49)
        report("cursors.scrolled", cur.fetchone())
        cur.scroll(-10)
        report("cursors.scrolled back", cur.fetchone())
    conn.commit()
    with conn.cursor("holding", withhold=True) as cur:
        cur.execute("select generate_series(1, 10)")
        conn.commit()
        report("cursors.held", cur.fetchall())
    conn.commit()
    report("cursors.stream", sum(row[0] for row in conn.cursor().stream("select generate_series(1, 2000)")))
    conn.rollback()


def results(conn):
    cur = conn.execute("select 1; select 'two', 2; create temp table third (n int); insert into third select generate_series(1, 5); select count(*) from third")
    while True:
        report("results", (cur.statusmessage, cur.fetchall() if cur.description else None))
        if not cur.nextset():
            break
    conn.rollback()
    try:
        conn.execute("select 1; select 1 / 0; select 3")
    except psycopg.Error as error:
        report("results.error", error.sqlstate)
    conn.rollback()
    report("results.function", conn.execute(sql.SQL("select {}(%s)").format(sql.Identifier("upper")), ("abc",)).fetchone())
    conn.rollback()


def ended():
    """The client receives the server's own error when its backend is terminated."""
    with connect(autocommit=True) as victim:
        def strike(pid):
            with connect(autocommit=True) as killer:
                killer.execute("select pg_terminate_backend(%s)", (pid,))

        striker = Striker(strike)
        striker.start()
        try:
            victim.execute("select pg_sleep(60)")
        except psycopg.OperationalError as error:
            failure("ended", error)
        striker.done()
        report("ended.closed", victim.closed)


def main():
    startup()
    with connect() as conn:
        for section in (types, large, prepared, pipeline, errors, copy, notices, cancel, cursors, results):
            section(conn)
            conn.rollback()
    notifications()
    ended()
    report("end", "of the job")


main()
