"""asyncpg (its own implementation of the protocol, binary throughout): one broad job, reported as `key = value` lines.

The server is named by libpq's own variables alone, so the same script runs direct and through the proxy.
"""

import asyncio
import io
import re
import time
from datetime import date, timedelta
from decimal import Decimal
from uuid import UUID

import asyncpg

# asyncpg sends these as startup parameters, one by one.
SETTINGS = {
    "application_name": "asyncpg's job",
    "TimeZone": "Pacific/Auckland",
    "search_path": "public, pg_catalog",
    "statement_timeout": "54321",
    "jit": "off",
    "extra_float_digits": "2",
}
WAIT = 20  # seconds that anything here may take before it counts as hung


def report(key, value):
    print(f"{key} = {value!r}" if not isinstance(value, str) else f"{key} = {value}", flush=True)


def failure(key, error):
    for field, value in sorted(error.as_dict().items()):
        # The number of a backend's temporary schema and a line of the server's source may differ.
        if value is not None and field not in ("query", "server_source_line"):
            report(f"{key}.{field}", re.sub(r"pg_temp_\d+", "pg_temp_N", str(value)))


async def connect(**parameters):
    return await asyncpg.connect(timeout=WAIT, command_timeout=2 * WAIT, **parameters)


async def startup():
    conn = await connect()
    report("startup.server_version", tuple(conn.get_server_version()))
    report("startup.pid is pg_backend_pid", await conn.fetchval("select pg_backend_pid()") == conn.get_server_pid())
    settings = conn.get_settings()
    for name in ("server_encoding", "client_encoding", "DateStyle", "TimeZone", "IntervalStyle", "application_name",
                 "integer_datetimes", "standard_conforming_strings", "is_superuser", "session_authorization"):
        report(f"startup.status.{name}", getattr(settings, name))
    report("startup.current", tuple(await conn.fetchrow("select current_database(), current_user")))
    await conn.close()
    # DISCARD ALL drops prepared statements, so none may be remembered.
    conn = await connect(server_settings=SETTINGS, statement_cache_size=0)

    async def show(key):
        for name in SETTINGS:
            report(f"{key}.{name}", await conn.fetchval(f"show {name}"))
    await show("startup.show")
    await conn.execute("set application_name = 'changed'; set timezone = 'UTC'; set search_path = pg_catalog")
    report("startup.status after SET", conn.get_settings().application_name)
    # What a pool of asyncpg does between two users of a connection: unlisten, close all, reset all.
    await conn.reset()
    await show("startup.after reset")
    await conn.execute("discard all")
    await show("startup.after DISCARD ALL")
    await conn.close()
    for key, wrong in (("startup.no such database", {"database": "no_such_database"}),
                       ("startup.bad setting", {"server_settings": {"options": "-c no_such_setting=1"}})):
        try:
            await (await connect(**wrong)).close()
            report(key, "connected")
        except asyncpg.PostgresError as error:
            report(key, error.sqlstate)


async def types(conn):
    row = await conn.fetchrow(
        """select 42::int2, -7::int4, 9007199254740993::int8, 1.5::float4, 2.25::float8, 123456789.123456789::numeric, true, false,
                  'text'::text, 'x'::char(3), '\\xdeadbeef'::bytea, date '2026-02-28', time '23:59:59.999999',
                  timestamp '2026-02-28 12:34:56.789', timestamptz '2026-02-28 12:34:56+00', interval '1 day 02:03:04',
                  '{"a": [1, null]}'::jsonb, array[1, null, 3], array[['a', 'b'], ['c', 'd']], int4range(1, 5),
                  '10.0.0.0/8'::cidr, 'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'::uuid, 'infinity'::float8, null::int4,
                  point(1, 2), (1, 'a', null::text), '101'::bit(3)""")
    for number, value in enumerate(row.values()):
        report(f"types.{number:02}", value)
    sent = [1 << 40, b"\0\x01\xff", "naïve – 漢字 🐘", UUID(int=7), [1.5, None, float("inf")], Decimal("1e-10"),
            date(1, 1, 1), timedelta(days=-3, microseconds=1), None]
    casts = ("int8", "bytea", "text", "uuid", "float8[]", "numeric", "date", "interval", "text")
    back = await conn.fetchrow("select " + ", ".join(f"${n}::{cast}" for n, cast in enumerate(casts, 1)), *sent)
    report("types.round trip", list(back.values()) == sent)
    await conn.execute("create type pg_temp.mood as enum ('sad', 'happy 🐘'); create type pg_temp.pair as (m pg_temp.mood, n int)")
    report("types.own", await conn.fetchval("select row('happy 🐘', 3)::pg_temp.pair"))
    report("types.empty query", await conn.fetch(""))
    report("types.1600 columns", sum((await conn.fetchrow("select " + ",".join(str(n) for n in range(1600)))).values()))


async def large(conn):
    text = "0123456789abcdef" * (1 << 20)
    report("large.sent", tuple(await conn.fetchrow("select md5($1::text), length($1::text)", text)))
    report("large.received", await conn.fetchval("select repeat('0123456789abcdef', 1 << 20)") == text)
    report("large.array", sum(await conn.fetchval("select $1::int[]", list(range(300_000)))))
    rows = await conn.fetch("select g, md5(g::text) from generate_series(1, 100000) g")
    report("large.rows", (len(rows), tuple(rows[-1])))


async def prepared(conn):
    statement = await conn.prepare("select $1::int * 2 as doubled, $2::text as label")
    report("prepared.parameters", [kind.name for kind in statement.get_parameters()])
    report("prepared.attributes", [(a.name, a.type.name) for a in statement.get_attributes()])
    for number in range(5):
        report(f"prepared.{number}", tuple(await statement.fetchrow(number, f"n{number}")))
    report("prepared.status", statement.get_statusmsg())
    # More distinct statements than asyncpg's cache holds, so that it closes some.
    report("prepared.many", sum([await conn.fetchval(f"select {n} + $1::int", n) for n in range(150)]))
    try:
        await conn.fetchval("select $1::int", "not a number")
    except asyncpg.DataError:
        report("prepared.wrong kind", "refused by the driver")


async def batch(conn):
    await conn.execute("create temp table batched (n int primary key, t text)")
    await conn.executemany("insert into batched values ($1, $2)", [(n, f"row {n}") for n in range(5000)])
    report("batch.inserted", tuple(await conn.fetchrow("select count(*), sum(n) from batched")))
    report("batch.returned", len(await conn.fetchmany("insert into batched values ($1, 'r') returning n", [(n,) for n in range(6000, 6100)])))
    try:
        await conn.executemany("insert into batched values ($1, 'x')", [(9000,), (9001,), (1,), (9002,)])
    except asyncpg.UniqueViolationError as error:
        failure("batch.error", error)
    report("batch.all or nothing", await conn.fetchval("select count(*) from batched where n >= 9000"))


async def errors(conn):
    await conn.execute("create temp table strict (id int primary key, positive int constraint must_be_positive check (positive > 0), label text not null)")
    for key, statement in (
        ("unique", "insert into strict values (1, 1, 'a'), (1, 2, 'b')"),
        ("check", "insert into strict values (2, -1, 'a')"),
        ("not null", "insert into strict values (3, 1, null)"),
        ("syntax", "selec 1"),
        ("no table", "select * from no_such_table"),
        ("division", "select 1 / 0"),
        ("raised", "do $$ begin raise exception 'own words %', 7 using errcode = 'LB001', detail = 'a detail', hint = 'a hint'; end $$"),
        ("unicode", "do $$ begin raise exception 'żółć 🐘'; end $$"),
    ):
        try:
            await conn.execute(statement)
        except asyncpg.PostgresError as error:
            failure(f"errors.{key}", error)
    try:
        async with conn.transaction():
            await conn.execute("insert into strict values (1, 1, 'dropped')")
            await conn.fetch("select 1 / 0")
    except asyncpg.DivisionByZeroError:
        report("errors.rolled back", await conn.fetchval("select count(*) from strict"))
    async with conn.transaction(isolation="serializable", readonly=True, deferrable=True):
        report("errors.serializable", await conn.fetchval("show transaction_isolation"))
        try:
            async with conn.transaction():
                await conn.execute("insert into pg_catalog.pg_class default values")
        except asyncpg.PostgresError as error:
            report("errors.read only", error.sqlstate)
    transaction = conn.transaction()
    await transaction.start()
    try:
        await conn.execute("select 1 / 0")
    except asyncpg.DivisionByZeroError:
        pass
    try:
        await conn.execute("select 1")
    except asyncpg.InFailedSQLTransactionError as error:
        report("errors.in failed transaction", error.sqlstate)
    await transaction.rollback()
    report("errors.usable", await conn.fetchval("select 1"))


async def copy(conn):
    await conn.execute("create temp table copied (id int, t text, b bytea)")
    records = [(n, f"row {n} żółć\t\\", bytes([n % 256]) * 3) for n in range(20000)]
    report("copy.in", await conn.copy_records_to_table("copied", records=records))
    out = io.BytesIO()
    report("copy.out", await conn.copy_from_query("select * from copied order by id", output=out))
    report("copy.out bytes", len(out.getvalue()))
    out = io.BytesIO()
    report("copy.csv", await conn.copy_from_table("copied", output=out, format="csv", header=True))
    report("copy.csv bytes", len(out.getvalue()))
    out.seek(0)
    report("copy.csv back", await conn.copy_to_table("copied", source=out, format="csv", header=True))
    report("copy.checksum", await conn.fetchval("select md5(string_agg(t, ',' order by id)) from copied"))
    try:
        await conn.copy_to_table("copied", source=io.BytesIO(b"not a number\tx\t\\\\x00\n"))
    except asyncpg.PostgresError as error:
        failure("copy.bad row", error)

    async def gives_up():
        yield b"1\tx\t\\\\x00\n"
        raise RuntimeError("changed my mind")
    try:
        await conn.copy_to_table("copied", source=gives_up())
    except RuntimeError as error:
        report("copy.given up", str(error))
    try:
        await conn.copy_from_query("select 1 / (50000 - g) from generate_series(1, 60000) g", output=io.BytesIO())
    except asyncpg.PostgresError as error:
        report("copy.out fails midway", error.sqlstate)
    report("copy.left", await conn.fetchval("select count(*) from copied"))


async def notifications():
    listener, speaker = await connect(), await connect()
    received, speakers = asyncio.Queue(), await backend(speaker)
    await listener.add_listener("drivers_asyncpg", lambda _conn, pid, channel, payload: received.put_nowait((channel, payload, pid == speakers)))
    await speaker.execute("notify drivers_asyncpg, 'one'")
    report("notify.first", await asyncio.wait_for(received.get(), WAIT))
    await speaker.fetch("select pg_notify('drivers_asyncpg', $1)", "two 🐘" + "x" * 7900)
    channel, payload, same = await asyncio.wait_for(received.get(), WAIT)
    report("notify.second", (channel, payload[:5], len(payload), same))
    await listener.close()
    await speaker.close()


async def notices(conn):
    seen = []
    conn.add_log_listener(lambda _conn, message: seen.append((message.severity, message.sqlstate, message.message[:40], len(message.message))))
    await conn.execute("do $$ begin raise notice 'first'; raise warning 'second' using hint = 'h'; raise notice '%', repeat('x', 70000); end $$")
    await asyncio.sleep(0)
    report("notices", seen)


async def backend(conn):
    """Which process serves it; what a driver knows as its process id may be half of a cancel key that the edge made up."""
    return await conn.fetchval("select pg_backend_pid()")


async def asleep():
    """The process that sleeps: a pool may run each transaction at another one."""
    watcher = await connect()
    deadline = time.monotonic() + WAIT
    try:
        while time.monotonic() < deadline:
            pid = await watcher.fetchval("select max(pid) from pg_stat_activity where state = 'active' and wait_event = 'PgSleep'")
            if pid:
                return pid
            await asyncio.sleep(0.02)
    finally:
        await watcher.close()
    raise TimeoutError("no backend began to sleep")


async def cancel(conn):
    began = time.monotonic()
    query = asyncio.ensure_future(conn.execute("select pg_sleep(60)"))
    await asleep()
    query.cancel()
    try:
        await query
    except asyncio.CancelledError:
        report("cancel", "cancelled")
    report("cancel.usable", await conn.fetchval("select 1"))
    try:
        await conn.execute("select pg_sleep(60)", timeout=0.3)
    except asyncio.TimeoutError:
        report("cancel.timeout", "timed out")
    report("cancel.usable again", await conn.fetchval("select 2"))
    report("cancel.prompt", time.monotonic() - began < WAIT)


async def cursors(conn):
    async with conn.transaction():
        report("cursors.sum", sum([row[0] async for row in conn.cursor("select generate_series(1, 10000)", prefetch=700)]))
        cursor = await conn.cursor("select generate_series(1, 100)")
        report("cursors.skipped", await cursor.forward(40))
        report("cursors.fetched", [row[0] for row in await cursor.fetch(3)])


async def results(conn):
    report("results.last status", await conn.execute("select 1; create temp table third (n int); insert into third select generate_series(1, 5)"))
    try:
        await conn.execute("insert into third values (6); select 1 / 0; select 3")
    except asyncpg.PostgresError as error:
        report("results.error", error.sqlstate)
    report("results.undone", await conn.fetchval("select count(*) from third"))


async def pool():
    async with asyncpg.create_pool(min_size=3, max_size=6, server_settings={"application_name": "pooled"}) as pooled:
        report("pool.sum", sum(await asyncio.gather(*(pooled.fetchval("select $1::int", n) for n in range(100)))))
        report("pool.application_name", await pooled.fetchval("show application_name"))


async def ended():
    """The client receives the server's own error when its backend is terminated."""
    victim, killer = await connect(), await connect()
    query = asyncio.ensure_future(victim.execute("select pg_sleep(60)"))
    pid = await asleep()
    await killer.execute(f"select pg_terminate_backend({pid})")
    try:
        await query
    except asyncpg.PostgresError as error:
        failure("ended", error)
    report("ended.closed", victim.is_closed())
    await killer.close()


async def main():
    await startup()
    conn = await connect()
    for section in (types, large, prepared, batch, errors, copy, notices, cancel, cursors, results):
        await section(conn)
    await conn.close()
    await notifications()
    await pool()
    await ended()
    report("end", "of the job")


asyncio.run(main())
