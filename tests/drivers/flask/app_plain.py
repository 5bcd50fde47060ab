"""The tutorial's notes app with no token code: a plain pool, named its server by libpq's variables alone."""

import os

import flask
from psycopg_pool import ConnectionPool

app = flask.Flask(__name__)
pool = ConnectionPool("", min_size=1, max_size=10, open=True)

PAGE = """<h1>Hello from Lakebase!</h1>
<h2>Recent Notes:</h2>
<ul>
{%- for content, created_at in notes %}
<li>{{ content }} - {{ created_at }}</li>
{%- endfor %}
</ul>"""


@app.get("/")
def recent_notes():
    with pool.connection() as connection:
        notes = connection.execute("select content, created_at from notes order by created_at desc, id desc limit 5").fetchall()
    return flask.render_template_string(PAGE, notes=notes)


if __name__ == "__main__":
    app.run(host="127.0.0.1", port=int(os.environ.get("DATABRICKS_APP_PORT", "8000")))
