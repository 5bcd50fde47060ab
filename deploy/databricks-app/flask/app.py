"""The tutorial's notes app. There is no token code: the pool finds lakebase-proxy in the environment, as any libpq would."""

import flask
from psycopg_pool import ConnectionPool

app = flask.Flask(__name__)
# With min_size=0 the pool renews no idle connection: each login would keep the compute awake.
pool = ConnectionPool(min_size=0, max_size=10, max_idle=60, open=True)

PAGE = """<!doctype html>
<html lang="en">
<title>Hello from Lakebase!</title>
<h1>Hello from Lakebase!</h1>
<h2>Recent Notes:</h2>
<ul>
{%- for content, created_at in notes %}
<li>{{ content }} - {{ created_at }}</li>
{%- endfor %}
</ul>
</html>
"""


@app.get("/")
def recent_notes():
    with pool.connection() as connection:
        notes = connection.execute("select content, created_at from notes order by created_at desc, id desc limit 5").fetchall()
    return flask.render_template_string(PAGE, notes=notes)
