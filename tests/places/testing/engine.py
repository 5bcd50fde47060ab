"""A container engine for Testcontainers where there is none: runs the image's program on this machine.

Loaded by `pytest -p engine`. It shows that the guide's fixture drives Testcontainers as that expects; not that the image works.
"""

import os
import pathlib
import subprocess
import tempfile
import types

import testcontainers.core.container
from docker.models.containers import ExecResult

IMAGE = "lakebase-proxy-emulator"


class Container:
    id = short_id = "emulator"

    def __init__(self, command):
        self.command = [command] if isinstance(command, str) else command
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="engine-"))
        self.process = None

    def start(self):
        out, errors = (self.folder / name for name in ("stdout", "stderr"))
        with out.open("wb") as stdout, errors.open("wb") as stderr:
            self.process = subprocess.Popen(["lakebase-proxy", *self.command], stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr)

    def logs(self, stdout=True, stderr=True):
        return b"".join((self.folder / name).read_bytes() for name, wanted in (("stdout", stdout), ("stderr", stderr)) if wanted)

    def exec_run(self, cmd, **_):
        done = subprocess.run(cmd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        return ExecResult(done.returncode, done.stdout)

    def reload(self):
        self.status = "running" if self.process.poll() is None else "exited"

    def remove(self, **_):
        self.process.terminate()
        self.process.wait()


class Engine:
    def __init__(self, **_):
        self.client = types.SimpleNamespace(close=lambda: None)

    def create(self, image, command=None, network=None, **_):
        # Its ports are this machine's, as in the host's network.
        assert (image, network) == (IMAGE, "host"), (image, network)
        return Container(command)

    def start(self, container):
        container.start()

    def get_container_inspect_info(self, _):
        return None


os.environ["TESTCONTAINERS_RYUK_DISABLED"] = "true"
testcontainers.core.container.c.ryuk_disabled = True
testcontainers.core.container.DockerClient = Engine
