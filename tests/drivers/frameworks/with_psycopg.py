"""psycopg: connections that prepare each statement, or (`discard`) a pool that discards everything at each return, as Npgsql does."""

import contextlib
import sys

import psycopg
import psycopg_pool
from rounds import SCHEMA, Session, run

DISCARDS = sys.argv[1:] == ["discard"]


def discard(connection):
    connection.autocommit = True
    connection.execute("discard all")
    connection.autocommit = False


@contextlib.contextmanager
def connections():
    """A context for the connection of each round."""
    if DISCARDS:
        # What the server forgets, psycopg must not rely on.
        with psycopg_pool.ConnectionPool("", kwargs={"prepare_threshold": None}, min_size=2, reset=discard, timeout=60) as pool:
            yield pool.connection
    else:
        with psycopg.connect("", prepare_threshold=1) as connection:
            yield lambda: contextlib.nullcontext(connection)


def prepare():
    with psycopg.connect("") as connection:
        connection.execute(f"drop schema if exists {SCHEMA} cascade")
        connection.execute(f"create schema {SCHEMA} create table item (worker int, round int, note text, unique (worker, round))")


def work(session: Session):
    with connections() as connection:
        is_set = False
        for round in session.rounds():
            with connection() as c:
                if DISCARDS or not is_set:
                    for name, value in session.settings.items():
                        c.execute(f"set {name} = '{value}'")
                    c.commit()
                    is_set = True
                one_round(session, c, round)


def one_round(session, c, round):
    worker = session.worker
    for name, value in session.settings.items():
        session.equal(name, c.execute("select current_setting(%s)", (name,)).fetchone(), (value,))
    if round == 0:
        c.execute("delete from item where worker = %s", (worker,))
    c.execute("insert into item values (%s, %s, %s)", (worker, round, session.note(round)))
    try:
        with c.transaction():
            c.execute("insert into item values (%s, %s, 'twice')", (worker, round))
        session.equal("a key is", "inserted twice", "unique")
    except psycopg.errors.UniqueViolation:
        pass
    session.equal("rows", c.execute("select count(*), sum(round) from item where worker = %s", (worker,)).fetchone(), session.count(round))
    c.commit()
    c.execute("set local statement_timeout = '77s'")
    c.execute("update item set note = 'undone' where worker = %s", (worker,))
    c.rollback()
    session.equal("timeout", c.execute("show statement_timeout").fetchone(), (session.settings["statement_timeout"],))
    with c.cursor("some" if round % 10 == 0 else "") as cursor:
        cursor.execute("select note from item where worker = %s order by round", (worker,))
        session.equal("notes", [note for (note,) in cursor], [session.note(it) for it in range(round + 1)])
    c.commit()


run(prepare, work)
