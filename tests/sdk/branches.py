#!/usr/bin/env python3
"""A branch for a pull request, by the Databricks Python SDK against the emulator: made, used, changed and deleted.

    tests/sdk/branches.py     in the environment of tests/sdk/run, which runs it

Reads the variables that `lakebase-proxy emulator` prints.
"""

import contextlib
import datetime
import os

import psycopg
from databricks.sdk import WorkspaceClient
from databricks.sdk import errors
from databricks.sdk.common.lro import LroOptions
from databricks.sdk.common.types.fieldmask import FieldMask
from databricks.sdk.service.postgres import (
    Branch,
    BranchSpec,
    BranchStatusState,
    Database,
    DatabaseDatabaseSpec,
    Endpoint,
    EndpointSpec,
    EndpointStatusState,
    EndpointType,
    Project,
    ProjectSpec,
    Role,
    RoleAttributes,
    RoleIdentityType,
    RoleRoleSpec,
)
from google.protobuf.duration_pb2 import Duration

PROJECT = "projects/lakebase-local"
BRANCH = f"{PROJECT}/branches/pr-7"
ENDPOINT = f"{BRANCH}/endpoints/primary"
LIMIT = LroOptions(timeout=datetime.timedelta(seconds=60))


def main():
    w = WorkspaceClient()
    with contextlib.ExitStack() as stack:
        # Its own transaction stays open meanwhile: a branch is made from a database in use.
        production = stack.enter_context(connect(w, os.environ["ENDPOINT_NAME"], autocommit=False))
        insert(production, "before the branch")
        production.commit()
        insert(production, "not committed")

        branch = create(w)
        assert branch.status.current_state == BranchStatusState.READY, branch
        assert branch.status.source_branch == f"{PROJECT}/branches/production", branch
        lifetime = branch.status.expire_time.ToDatetime() - branch.create_time.ToDatetime()
        assert abs(lifetime.total_seconds() - 3600) < 5, lifetime
        assert BRANCH in [one.name for one in w.postgres.list_branches(PROJECT)]

        preview = stack.enter_context(connect(w, ENDPOINT))
        assert contents(preview) == [*NOTES, "before the branch"], contents(preview)
        insert(preview, "on the branch")
        production.commit()
        assert contents(production) == [*NOTES, "before the branch", "not committed"]
        assert contents(preview) == [*NOTES, "before the branch", "on the branch"]

        roles_and_databases(w)
        endpoints(w)
        refusals(w)
        delete(w, preview)
    projects(w)
    print("sdk: the life of a branch passed")


NOTES = ["Welcome to Lakebase Autoscaling!", "This app connects to Postgres", "Data fetched from your database"]


def connect(w, endpoint, user=None, database=None, password=None, autocommit=True):
    """A connection as a client of Lakebase makes it; `hostaddr` since not every resolver knows names below localhost."""
    found = w.postgres.get_endpoint(endpoint)
    password = password or w.postgres.generate_database_credential(endpoint=endpoint).token
    return psycopg.connect(
        host=found.status.hosts.host,
        hostaddr="127.0.0.1",
        port=os.environ["PGPORT"],
        user=user or os.environ["PGUSER"],
        password=password,
        dbname=database or os.environ["PGDATABASE"],
        sslmode="verify-full",
        sslrootcert=os.environ["PGSSLROOTCERT"],
        connect_timeout=30,
        autocommit=autocommit,
    )


def insert(connection, text):
    connection.execute("insert into notes (content) values (%s)", [text])


def contents(connection):
    return [row[0] for row in connection.execute("select content from notes order by id")]


def create(w):
    spec = BranchSpec(ttl=Duration(seconds=3600))
    operation = w.postgres.create_branch(PROJECT, Branch(spec=spec), "pr-7")
    assert operation.name().startswith(f"{BRANCH}/operations/"), operation.name()
    return operation.wait(LIMIT)


def roles_and_databases(w):
    plain = Role(spec=RoleRoleSpec(postgres_role="reporting", attributes=RoleAttributes(createdb=True)))
    role = w.postgres.create_role(BRANCH, plain, role_id="reporting").wait(LIMIT)
    assert role.status.attributes.createdb and not role.status.attributes.createrole, role
    spec = RoleRoleSpec(attributes=RoleAttributes(createdb=False))
    changed = w.postgres.update_role(role.name, Role(spec=spec), FieldMask(["spec.attributes.createdb"])).wait(LIMIT)
    assert not changed.status.attributes.createdb, changed
    # A service principal that has no role on the branch yet.
    spec = RoleRoleSpec(postgres_role="0f1e2d3c-0000-4000-8000-000000000001", identity_type=RoleIdentityType.SERVICE_PRINCIPAL)
    identity = w.postgres.create_role(BRANCH, Role(spec=spec)).wait(LIMIT)
    assert identity.status.auth_method.value == "LAKEBASE_OAUTH_V1", identity

    owner = f"{BRANCH}/roles/app"
    spec = DatabaseDatabaseSpec(postgres_database="previews", role=owner)
    database = w.postgres.create_database(BRANCH, Database(spec=spec), database_id="previews").wait(LIMIT)
    with connect(w, ENDPOINT, database="previews") as there:
        there.execute("create table things (id int)")
    spec = DatabaseDatabaseSpec(postgres_database="renamed", role=owner)
    w.postgres.update_database(database.name, Database(spec=spec), FieldMask(["spec.postgres_database"])).wait(LIMIT)
    with connect(w, ENDPOINT, database="renamed") as there:
        assert there.execute("select count(*) from things").fetchone() == (0,)
    # Roles and databases are the branch's alone.
    production = f"{PROJECT}/branches/production"
    assert "renamed" not in [one.status.postgres_database for one in w.postgres.list_databases(production)]
    assert "reporting" not in [one.status.postgres_role for one in w.postgres.list_roles(production)]
    w.postgres.delete_database(database.name).wait(LIMIT)
    w.postgres.delete_role(identity.name).wait(LIMIT)

    # With native logins on, a role with a password needs no token.
    native = ProjectSpec(enable_pg_native_login=True)
    w.postgres.update_project(PROJECT, Project(spec=native), FieldMask(["spec.enable_pg_native_login"])).wait(LIMIT)
    password = w.postgres.reveal_role_password(role.name).password
    with connect(w, ENDPOINT, user="reporting", password=password) as there:
        assert there.execute("select current_user").fetchone() == ("reporting",)
    w.postgres.delete_role(role.name, reassign_owned_to=owner).wait(LIMIT)


def endpoints(w):
    spec = EndpointSpec(endpoint_type=EndpointType.ENDPOINT_TYPE_READ_ONLY)
    replica = w.postgres.create_endpoint(BRANCH, Endpoint(spec=spec), "replica").wait(LIMIT)
    assert replica.status.hosts.host != w.postgres.get_endpoint(ENDPOINT).status.hosts.host
    with connect(w, replica.name) as there:
        assert len(contents(there)) == 5
        with expect(psycopg.errors.ReadOnlySqlTransaction):
            insert(there, "refused")
    w.postgres.delete_endpoint(replica.name).wait(LIMIT)

    spec = EndpointSpec(endpoint_type=EndpointType.ENDPOINT_TYPE_READ_WRITE, suspend_timeout_duration=Duration(seconds=120))
    changed = w.postgres.update_endpoint(ENDPOINT, Endpoint(spec=spec), FieldMask(["spec.suspension"])).wait(LIMIT)
    assert changed.status.suspend_timeout_duration.seconds == 120, changed
    assert changed.status.current_state == EndpointStatusState.ACTIVE, changed


def refusals(w):
    protect(w, True)
    with expect(errors.BadRequest, "cannot delete protected branch"):
        w.postgres.delete_branch(BRANCH)
    protect(w, False)
    with expect(errors.BadRequest, "Read-write endpoints cannot be deleted."):
        w.postgres.delete_endpoint(ENDPOINT)
    with expect(errors.BadRequest, "Root branches cannot be deleted independently."):
        w.postgres.delete_branch(f"{PROJECT}/branches/production")
    with expect(errors.AlreadyExists, "branch with such id already exists"):
        w.postgres.create_branch(PROJECT, Branch(spec=BranchSpec(no_expiry=True)), "pr-7")
    kept = w.postgres.create_branch(PROJECT, Branch(spec=BranchSpec(no_expiry=True)), "pr-7", replace_existing=True).wait(LIMIT)
    assert kept.status.expire_time is None, kept
    with expect(errors.NotFound, "branch id not found"):
        w.postgres.get_endpoint(f"{PROJECT}/branches/pr-8/endpoints/primary")
    with expect(errors.InvalidParameterValue, "Unknown field path in update_mask: 'spec.ttl'"):
        w.postgres.update_branch(BRANCH, Branch(spec=BranchSpec(ttl=Duration(seconds=60))), FieldMask(["spec.ttl"]))
    # The work fails, not the request.
    spec = DatabaseDatabaseSpec(postgres_database="postgres", role=f"{BRANCH}/roles/app")
    with expect(Exception, 'BAD_REQUEST] database "postgres" already exists'):
        w.postgres.create_database(BRANCH, Database(spec=spec)).wait(LIMIT)


def protect(w, is_protected):
    spec = BranchSpec(is_protected=is_protected)
    done = w.postgres.update_branch(BRANCH, Branch(spec=spec), FieldMask(["spec.is_protected"])).wait(LIMIT)
    assert bool(done.status.is_protected) == is_protected, done


def delete(w, session):
    token = w.postgres.generate_database_credential(endpoint=ENDPOINT).token
    host = w.postgres.get_endpoint(ENDPOINT).status.hosts.host
    w.postgres.delete_branch(BRANCH).wait(LIMIT)
    with expect(errors.NotFound, "branch id not found"):
        w.postgres.get_branch(BRANCH)
    with expect(psycopg.OperationalError):
        session.execute("select 1")
    with expect(psycopg.OperationalError):
        psycopg.connect(host=host, hostaddr="127.0.0.1", port=os.environ["PGPORT"], user=os.environ["PGUSER"], password=token, sslmode="require")


def projects(w):
    project = w.postgres.create_project(Project(spec=ProjectSpec(display_name="Another")), "another-one").wait(LIMIT)
    assert project.status.display_name == "Another", project
    endpoint = f"{project.status.default_branch}/endpoints/primary"
    with connect(w, endpoint) as there:
        assert there.execute("select current_database()").fetchone() == (os.environ["PGDATABASE"],)
    w.postgres.delete_project(project.name).wait(LIMIT)
    with expect(errors.NotFound, "project id not found"):
        w.postgres.get_project(project.name)


@contextlib.contextmanager
def expect(kind, text=""):
    try:
        yield
    except kind as error:
        assert text in str(error), error
    else:
        raise AssertionError(f"no {kind.__name__}: {text}")


if __name__ == "__main__":
    main()
