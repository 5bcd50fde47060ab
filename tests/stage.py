#!/usr/bin/env python3
"""An emulated Lakebase and a proxy in front of it, for as long as a command runs.

    tests/stage.py COMMAND...

The command finds the proxy in PGHOST, PGPORT, HTTP_URL (health and metrics) and NOTES_URL; its exit code is this
script's. `LAKEBASE_PROXY` names the program (default: target/debug/lakebase-proxy, built first). Python's standard library
is all that is needed. Logs go to target/stage/.
"""

import base64
import contextlib
import json
import os
import pathlib
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
LOGS = TARGET / "stage"
START_LIMIT = 60  # seconds for a server to come up
END_LIMIT = 30  # seconds for it to end after SIGTERM


def main():
    # A `kill` must clean up like Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with contextlib.ExitStack() as stack:
        stage = Stage(stack)
        found = {"PGHOST": "localhost", "PGPORT": str(stage.port), "HTTP_URL": stage.http, "NOTES_URL": stage.notes}
        code = subprocess.run(sys.argv[1:], env=clean_environment() | found, stdin=subprocess.DEVNULL).returncode
        stage.check()
    return code


class Stage:
    """The emulator, and the proxy in front of it."""

    def __init__(self, stack, more_flags=()):
        program = os.environ.get("LAKEBASE_PROXY")
        if program is None:
            call("cargo", "build", "--locked", "--quiet", cwd=ROOT)
            program = TARGET / "debug/lakebase-proxy"
        env_file = scratch_directory(stack) / "emulator.env"
        emulator = start(stack, "emulator", [program, "emulator", "--env-file", env_file], clean_environment())
        until("the emulator to be ready", lambda: env_file.exists() or None, emulator)
        self.variables = dict(line.split("=", 1) for line in env_file.read_text().splitlines())
        self.port, http, notes = free_port(), free_port(), free_port()
        self.http, self.notes = f"http://127.0.0.1:{http}", f"http://127.0.0.1:{notes}"
        flags = ["--port", self.port, "--http-port", http, "--notes", "--notes-port", notes, "--log-filter", "debug", "--admin-console", *more_flags]
        self.proxy = start(stack, "proxy", [program, "serve", *flags], clean_environment() | self.variables)
        until("the proxy to be ready", lambda: listening(self.port), self.proxy)

    def check(self):
        """What must hold when all clients have left."""
        if self.proxy.poll() is not None:
            raise SystemExit(f"the proxy ended with code {self.proxy.returncode}; see {self.proxy.log}")
        until("all sessions to end", lambda: True if self.metric("client_connections_active") + self.metric("upstream_connections_active") == 0 else None, self.proxy)
        log = self.proxy.log.read_text(errors="replace")
        if self.metric("session_panics_total") != 0 or "panicked" in log:
            raise SystemExit(f"the proxy panicked; see {self.proxy.log}")
        # Every token is a JWT, and all JWTs begin like this.
        if any(secret in log for secret in (self.variables["DATABRICKS_CLIENT_SECRET"], "eyJ")):
            raise SystemExit(f"a secret is in {self.proxy.log}")

    def metric(self, name):
        """The sum over all labels."""
        with urllib.request.urlopen(f"{self.http}/metrics", timeout=START_LIMIT) as answer:
            lines = answer.read().decode().splitlines()
        found = [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"lakebase_proxy_{name} ", f"lakebase_proxy_{name}{{"))]
        if not found:
            raise SystemExit(f"there is no metric lakebase_proxy_{name}")
        return sum(found)

    def workspace_token(self):
        client = f"{self.variables['DATABRICKS_CLIENT_ID']}:{self.variables['DATABRICKS_CLIENT_SECRET']}"
        headers = {"Authorization": "Basic " + base64.b64encode(client.encode()).decode(), "Content-Type": "application/x-www-form-urlencoded"}
        form = urllib.parse.urlencode({"grant_type": "client_credentials", "scope": "all-apis"})
        return self.call("/oidc/v1/token", headers, form)["access_token"]

    def credential(self):
        """A database credential, by the documented requests and nothing of ours."""
        headers = {"Authorization": f"Bearer {self.workspace_token()}", "Content-Type": "application/json"}
        return self.call("/api/2.0/postgres/credentials", headers, json.dumps({"endpoint": self.variables["ENDPOINT_NAME"]}))["token"]

    def endpoint(self):
        return self.call(f"/api/2.0/postgres/{self.variables['ENDPOINT_NAME']}", {"Authorization": f"Bearer {self.workspace_token()}"})

    def call(self, path, headers, body=None):
        request = urllib.request.Request(self.variables["DATABRICKS_HOST"] + path, body and body.encode(), headers)
        with urllib.request.urlopen(request, timeout=START_LIMIT) as answer:
            return json.load(answer)


class Postgres:
    """A throwaway Postgres without a password, of the newest version that is installed or of this one."""

    def __init__(self, stack, version="*", settings=()):
        scratch = scratch_directory(stack)
        self.binaries = max(pathlib.Path("/usr/lib/postgresql").glob(f"{version}/bin"), key=lambda path: int(path.parent.name))
        self.as_server = []
        if os.geteuid() == 0:  # Postgres refuses to run as root
            self.as_server = ["runuser", "-u", "postgres", "--"]
            os.chown(scratch, pwd.getpwnam("postgres").pw_uid, -1)
        data, self.port = scratch / "data", free_port()
        self.call("initdb", "-D", data, "-A", "trust", "-U", "postgres", "--no-sync", "-E", "UTF8", "--locale=C.UTF-8")
        options = " ".join(f"-c {setting}" for setting in ("fsync=off", *settings))
        self.call("pg_ctl", "-w", "-D", data, "-l", scratch / "log", "-o", f"-p {self.port} -k {scratch} {options}", "start")
        stack.callback(self.call, "pg_ctl", "-w", "-D", data, "-m", "fast", "stop")

    def call(self, program, *arguments):
        call(*self.as_server, self.binaries / program, *arguments, stdout=subprocess.DEVNULL, cwd="/")


def clean_environment():
    """What is around must not steer libpq, the Databricks SDK or the proxy."""
    prefixes = ("PG", "DATABRICKS_", "LAKEBASE_", "ENDPOINT_")
    around = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
    return around | {"LC_ALL": "C.UTF-8", "TZ": "UTC", "PYTHONUTF8": "1", "HOME": str(LOGS)}


def scratch_directory(stack):
    directory = pathlib.Path(tempfile.mkdtemp(prefix="lakebase-proxy-"))
    stack.callback(shutil.rmtree, directory, ignore_errors=True)
    return directory


def call(*command, **more):
    subprocess.run([str(part) for part in command], check=True, stdin=subprocess.DEVNULL, **more)


RESERVED = []  # the sockets of free_port(), bound until this program ends


def free_port():
    """A port that nothing else takes: Linux gives one that is bound to no other program by itself, and lets listeners with SO_REUSEADDR share it."""
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("", 0))
    RESERVED.append(reserved)
    return reserved.getsockname()[1]


def listening(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return None


def until(what, check, process):
    """Waits until `check` returns a value, for as long as the process lives."""
    deadline = time.monotonic() + START_LIMIT
    while time.monotonic() < deadline:
        if (found := check()) is not None:
            return found
        if process.poll() is not None:
            raise SystemExit(f"waiting for {what}: the program ended with code {process.returncode}; its log:\n{tail(process)}")
        time.sleep(0.05)
    raise SystemExit(f"waited {START_LIMIT} s for {what}; the program's log:\n{tail(process)}")


def tail(process):
    return process.log.read_text(errors="replace")[-4000:]


def start(stack, name, command, environment, **more):
    """A program for as long as the stack lives; it must end by itself on request."""
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / f"{name}.log"
    with log.open("w") as out:
        process = subprocess.Popen([str(part) for part in command], env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, **more)
    process.log = log

    def stop():
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(END_LIMIT)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise SystemExit(f"{name} did not end within {END_LIMIT} s of SIGTERM; see {log}") from None
    stack.callback(stop)
    return process


if __name__ == "__main__":
    sys.exit(main())
