"""asyncpg: a pool, which resets each connection at its return, with prepared statements that it keeps."""

import asyncio
import os
import time

import asyncpg
from rounds import PAUSE, ROUNDS, SCHEMA, WORKERS, Session, report


async def main():
    sessions = [Session(worker) for worker in range(WORKERS)]
    async with asyncpg.create_pool(min_size=WORKERS, max_size=WORKERS) as pool:
        async with pool.acquire() as c:
            await c.execute(f"drop schema if exists {SCHEMA} cascade; create schema {SCHEMA} create table item (worker int, round int, note text, unique (worker, round))")
        await asyncio.gather(*(work(pool, session) for session in sessions))
    report(sessions)


async def work(pool, session):
    end = time.monotonic() + float(os.environ["ROUNDS_SECONDS"])
    while time.monotonic() < end:
        async with pool.acquire() as c:
            await one_round(session, c, session.done % ROUNDS)
        session.done += 1
        await asyncio.sleep(PAUSE)


async def one_round(session, c, round):
    worker = session.worker
    await c.execute(";".join(f"set {name} = '{value}'" for name, value in session.settings.items()))
    for name, value in session.settings.items():
        session.equal(name, await c.fetchval("select current_setting($1)", name), value)
    if round == 0:
        await c.execute("delete from item where worker = $1", worker)
    async with c.transaction():
        await c.execute("insert into item values ($1, $2, $3)", worker, round, session.note(round))
        try:
            async with c.transaction():
                await c.execute("insert into item values ($1, $2, 'twice')", worker, round)
            session.equal("a key is", "inserted twice", "unique")
        except asyncpg.UniqueViolationError:
            pass
        session.equal("rows", tuple(await c.fetchrow("select count(*), sum(round) from item where worker = $1", worker)), session.count(round))
    undone = c.transaction(isolation="serializable", readonly=False)
    await undone.start()
    await c.execute("set local statement_timeout = '77s'")
    await c.execute("update item set note = 'undone' where worker = $1", worker)
    await undone.rollback()
    session.equal("timeout", await c.fetchval("show statement_timeout"), session.settings["statement_timeout"])
    async with c.transaction():
        notes = [row["note"] async for row in c.cursor("select note from item where worker = $1 order by round", worker)]
    session.equal("notes", notes, [session.note(it) for it in range(round + 1)])


asyncio.run(main())
