"""An app that knows nothing of the proxy: a pool named its server by libpq's variables alone."""

import os

import flask
from psycopg_pool import ConnectionPool

app = flask.Flask(__name__)
pool = ConnectionPool("", min_size=1, max_size=4, open=True)


def value(query):
    with pool.connection() as connection:
        return str(connection.execute(query).fetchone()[0])


@app.get("/")
def who():
    return f"{os.getpid()} {value('select current_user')}"


@app.get("/slow")
def slow():
    return value("select 42 from pg_sleep(2)")
