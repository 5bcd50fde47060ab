"""The same app without a proxy: each new connection of the pool logs in with a database credential minted for it."""

import os

import flask
import psycopg
from databricks.sdk import WorkspaceClient
from psycopg_pool import ConnectionPool

workspace = WorkspaceClient()
endpoint = os.environ["ENDPOINT_NAME"]


class LakebaseConnection(psycopg.Connection):
    """A connection whose password is made when it is opened."""

    @classmethod
    def connect(cls, conninfo="", **parameters):
        credential = workspace.postgres.generate_database_credential(endpoint=endpoint)
        return super().connect(conninfo, **{**parameters, "password": credential.token})


app = flask.Flask(__name__)
pool = ConnectionPool("", connection_class=LakebaseConnection, min_size=1, max_size=10, open=True)

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
