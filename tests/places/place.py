"""A place to run an app in, like Databricks Apps': a user without rights, a clean environment, no shell.

Root runs these programs as an unprivileged user; other users run them as themselves.
"""

import ctypes
import fcntl
import os
import pathlib
import shutil
import socket
import struct
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
sys.path.insert(0, str(HERE.parent / "browser"))

from stage import ROOT, TARGET, free_port, start, until

WORK = TARGET / "places"
NOTES = ("Welcome to Lakebase Autoscaling!", "This app connects to Postgres", "Data fetched from your database")
KILLED_AFTER = 15  # seconds that Databricks Apps gives an app to end
UNPRIVILEGED = 65534


class Place:
    """A scratch folder that belongs to a user without rights, and commands run there as that user."""

    def __init__(self, stack):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="place-"))
        stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
        self.user = {}
        if os.geteuid() == 0:
            os.chown(self.folder, UNPRIVILEGED, UNPRIVILEGED)
            self.user = {"user": UNPRIVILEGED, "group": UNPRIVILEGED, "extra_groups": []}

    def environment(self, path=""):
        """All that is there: nothing of the machine's own."""
        return {"PATH": f"{path}:/usr/local/bin:/usr/bin:/bin".removeprefix(":"), "HOME": str(self.folder), "LC_ALL": "C.UTF-8", "TMPDIR": str(self.folder)}

    def bring(self, source, name=None):
        """A copy of a file or folder, owned by the user."""
        to = self.folder / (name or source.name)
        if source.is_dir():
            shutil.copytree(source, to)
        else:
            shutil.copy(source, to)
        for path in (to, *to.rglob("*")):
            if self.user:
                os.chown(path, UNPRIVILEGED, UNPRIVILEGED)
        return to

    def write(self, path, text):
        path.write_text(text)
        if self.user:
            os.chown(path, UNPRIVILEGED, UNPRIVILEGED)

    def run(self, *command, path="", cwd=None, more=None, code=0):
        """What a command prints, which must end with this code."""
        done = subprocess.run(
            [str(part) for part in command],
            env=self.environment(path) | registries() | (more or {}),
            cwd=cwd or self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
            **self.user,
        )
        if done.returncode != code:
            raise SystemExit(f"{' '.join(map(str, command))}: exit code {done.returncode}, not {code}:\n{done.stdout[-4000:]}")
        return done.stdout

    def start(self, stack, name, command, environment, cwd=None):
        return start(stack, name, command, environment, cwd=cwd or self.folder, start_new_session=True, **self.user)

    def emulator(self, stack, program):
        """An emulated Lakebase, by a program installed here; returns the variables that lead to it."""
        env_file = self.folder / "emulator.env"
        emulator = self.start(stack, "places-emulator", [program, "emulator", "--env-file", env_file], self.environment())
        until("the emulator to be ready", lambda: env_file.exists() or None, emulator)
        return dict(line.split("=", 1) for line in env_file.read_text().splitlines())


def own_network():
    """Leaves the machine's network for one that has nothing but a loopback device."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_network, new_user = 0x40000000, 0x10000000
    if libc.unshare(new_network if os.geteuid() == 0 else new_network | new_user) != 0:
        raise SystemExit(f"no network namespace of our own: {os.strerror(ctypes.get_errno())}")
    up = 0x1  # IFF_UP
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as device:
        fcntl.ioctl(device, 0x8914, struct.pack("16sh14x", b"lo", up))  # SIOCSIFFLAGS


def registries():
    """How this machine's pip and npm reach their registries."""
    kept = ("pip_", "npm_config_", "ssl_cert_", "node_extra_ca_certs", "requests_ca_bundle")
    return {name: value for name, value in os.environ.items() if name.lower().startswith(kept) or name.lower().endswith("_proxy")}
