#!/usr/bin/env python3
"""The Windows program, run by Wine, in front of an emulator of this machine.

    tests/places/windows.py --dist DIR      of what `deploy/build win32-x64` made
    tests/places/windows.py --program FILE

Clients of this machine connect to it, over TLS too; then `token`, `doctor`, `exec`, Ctrl-C and a killed proxy. The emulator
is target/debug/lakebase-proxy, or what `LAKEBASE_PROXY` names.
"""

import argparse
import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from stage import ROOT, TARGET, call, clean_environment, scratch_directory, start, until

LIMIT = 60
COMPILER = "x86_64-w64-mingw32-gcc"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--dist", type=pathlib.Path)
    which.add_argument("--program", type=pathlib.Path)
    arguments = parser.parse_args()
    passed = 0
    with contextlib.ExitStack() as stack:
        scratch = scratch_directory(stack)
        program = arguments.program
        if arguments.dist:
            program = packed(arguments.dist, scratch)
            passed += 3
        windows = Windows(stack, scratch, program)
        passed += windows.alone()
        env_file = scratch / "emulator.env"
        emulator_program = os.environ.get("LAKEBASE_PROXY", TARGET / "debug/lakebase-proxy")
        emulator = start(stack, "windows-emulator", [emulator_program, "emulator", "--env-file", env_file], clean_environment())
        until("the emulator to be ready", lambda: env_file.exists() or None, emulator)
        windows.variables |= dict(line.split("=", 1) for line in env_file.read_text().splitlines())
        for part in (windows.serves, windows.has_a_token, windows.finds_nothing_wrong, windows.runs_a_child, windows.takes_its_child_along):
            passed += part(stack)
    print(f"\nwindows: {passed} passed, 0 failed")


def packed(dist, scratch):
    """The program of the zip, which is the wheel's and npm's, too."""
    (archive,) = dist.glob("*-x86_64-windows.zip")
    with zipfile.ZipFile(archive) as files:
        files.extractall(scratch)
    program = scratch / archive.stem / "lakebase-proxy.exe"
    for name in ("lakebase-proxy.toml", "README.md", "LICENSE-MIT", "completions.ps1"):
        expect((program.parent / name).is_file(), f"{archive.name} has {name}")
    (wheel,) = dist.glob("*-win_amd64.whl")
    # As pip on Windows installs it.
    call("python3", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--only-binary=:all:", "--platform", "win_amd64", "--target", scratch / "wheel", wheel)
    (npm,) = dist.glob("lakebase-proxy-win32-x64-*.tgz")
    with tarfile.open(npm) as tar:
        manifest = json.load(tar.extractfile("package/package.json"))
        expect((manifest["os"], manifest["cpu"], manifest["bin"]) == (["win32"], ["x64"], {"lakebase-proxy": "bin/lakebase-proxy.exe"}), f"npm's package is {manifest}")
        of_npm = tar.extractfile("package/bin/lakebase-proxy.exe").read()
    expect(program.read_bytes() == of_npm == (scratch / "wheel/bin/lakebase-proxy.exe").read_bytes(), "all packages have the same program")
    return program


class Windows:
    def __init__(self, stack, scratch, program):
        self.folder = scratch / "program"
        self.folder.mkdir()
        self.program = shutil.copy(program, self.folder / "lakebase-proxy.exe")
        # Windows looks for libraries beside the program first.
        call(COMPILER, "-shared", "-O", "-o", self.folder / "bcryptprimitives.dll", HERE / "windows/bcryptprimitives.c", "-ladvapi32")
        # An installation of Windows of its own. Started once, so that no test waits for that.
        self.variables = clean_environment() | {"WINEPREFIX": str(scratch / "prefix"), "WINEDEBUG": "-all"}
        stack.callback(subprocess.run, ["wineserver", "--kill"], env=self.variables)
        call("wine", "wineboot", "--init", env=self.variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def run(self, *arguments, code=0):
        ended = subprocess.run(["wine", self.program, *map(str, arguments)], env=self.variables, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT, cwd=self.folder)
        expect(ended.returncode == code, f"{arguments} ended with {ended.returncode}, not {code}:\n{ended.stdout}")
        return ended.stdout

    def start(self, stack, name, *arguments, **more):
        return start(stack, f"windows-{name}", ["wine", self.program, *map(str, arguments)], self.variables, cwd=self.folder, **more)

    def alone(self):
        """Without an endpoint."""
        version = self.run("--version").split()
        expect(version == ["lakebase-proxy", project_version()], f"the version is {version}")
        expect("--unix-socket" in self.run("--help"), "the help is shown")
        refused = self.run("serve", "--unix-socket", "C:\\run", code=1)
        expect("--unix-socket is set" in refused and "127.0.0.1" in refused, refused)
        refused = self.run("emulator", code=1)
        expect("--postgres-url" in refused, refused)
        return passed("version, help, and what Windows lacks", 4)

    def serves(self, stack):
        with contextlib.ExitStack() as own:
            proxy = self.start(own, "serve", "--port", 0, "--http-port", 0, "--client-tls", "self-signed")
            port = until("the proxy to listen", lambda: listener(proxy.log), proxy)
            for mode in ("disable", "require"):
                rows = psql(port, mode, "select count(*) from generate_series(1, 100000)")
                expect(rows == "100000", f"sslmode={mode}: {rows}")
            # More than any buffer, each way.
            size = psql(port, "disable", "select length(repeat('x', 20000000))")
            expect(size == "20000000", size)
            expect(len(psql(port, "disable", "select repeat('x', 20000000)")) == 20_000_000, "20 MB arrive")
            cancelled = subprocess.run(client(port, "disable", "set statement_timeout = '300ms'; select pg_sleep(30)"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT)
            expect("statement timeout" in cancelled.stdout, cancelled.stdout)
            # A cancel request of a client, as by Ctrl-C in psql.
            sleeping = subprocess.Popen(client(port, "disable", "select pg_sleep(30)"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            until("the query to run", lambda: psql(port, "disable", "select 1 from pg_stat_activity where query = 'select pg_sleep(30)' and state = 'active'") or None, proxy)
            sleeping.send_signal(signal.SIGINT)
            answer, _ = sleeping.communicate(timeout=LIMIT)
            expect("canceling statement due to user request" in answer, answer)
            second = self.run("serve", "--port", port, "--http-port", "none", code=1)
            expect(f":{port}" in second and "hint" in second, second)
            # Ctrl-C of the console, as Wine delivers it.
            proxy.send_signal(signal.SIGINT)
            code = proxy.wait(LIMIT)
            log = proxy.log.read_text(errors="replace")
            expect(code == 130, f"Ctrl-C ends it with {code}:\n{log}")
            expect("panicked" not in log and "ERROR" not in log, log)
        return passed("serve: psql with and without TLS, 20 MB, cancel, a taken port, Ctrl-C", 7)

    def has_a_token(self, stack):
        token = self.run("token").strip()
        expect(token.startswith("eyJ") and len(token.splitlines()) == 1, "`token` prints a credential and nothing else")
        return passed("token", 1)

    def finds_nothing_wrong(self, stack):
        report = self.run("doctor", "--port", 0)
        expect("SELECT 1" in report, report)
        return passed("doctor", 1)

    def runs_a_child(self, stack):
        shown = self.run("exec", "--", "cmd", "/c", "echo %PGHOST% %PGSSLMODE% %DATABASE_URL%")
        expect(re.search(r"127\.0\.0\.1 disable postgresql://\S+@127\.0\.0\.1:\d+/\S+\?sslmode=disable", shown) is not None, shown)
        self.run("exec", "--", "cmd", "/c", "exit 7", code=7)
        missing = self.run("exec", "--", "no-such-program", code=127)
        expect("no-such-program" in missing, missing)
        return passed("exec: the child's variables, its exit code, a program that is missing", 3)

    def takes_its_child_along(self, stack):
        """A client of this machine beside the child; then the proxy is killed."""
        with contextlib.ExitStack() as own:
            mark = self.folder / "child.txt"
            # It waits for a key, which is never pressed.
            proxy = own.enter_context(subprocess.Popen(["wine", self.program, "exec", "--", "cmd", "/c", f"echo %PGPORT%> {mark.name} & pause"], env=self.variables, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=self.folder))
            own.callback(proxy.kill)
            port = wait(lambda: mark.exists() and mark.read_text().strip(), "the child")
            expect(psql(port, "disable", "select 1") == "1", "the child's proxy serves")
            children = wait(lambda: processes("pause"), "the child's process")
            proxy.kill()
            wait(lambda: not [pid for pid in processes("pause") if pid in children and pid != proxy.pid], "the child's end")
        return passed("exec: the child ends with a proxy that is killed", 2)


def listener(log):
    found = re.search(r"listening for Postgres clients.*?127\.0\.0\.1:(\d+)|127\.0\.0\.1:(\d+).*?listening for Postgres clients", log.read_text(errors="replace"))
    return found and int(found.group(1) or found.group(2))


def client(port, mode, statement):
    return ["psql", "--no-psqlrc", "--tuples-only", "--no-align", "--command", statement, f"host=127.0.0.1 port={port} sslmode={mode} user=anyone dbname=databricks_postgres connect_timeout=30"]


def psql(port, mode, statement):
    return subprocess.run(client(port, mode, statement), env=clean_environment(), check=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, timeout=LIMIT).stdout.strip()


def processes(part):
    """The ids of programs that Wine runs with this word on their command line."""
    found = set()
    for file in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = file.read_bytes().decode(errors="replace")
            if "cmd" in words and part in words and "python" not in words:
                found.add(int(file.parent.name))
    return found


def wait(check, what):
    deadline = time.monotonic() + LIMIT
    while not (found := check()):
        if time.monotonic() > deadline:
            raise SystemExit(f"waited {LIMIT} s for {what}")
        time.sleep(0.05)
    return found


def project_version():
    return re.search(r'^version = "(.+)"', (ROOT / "Cargo.toml").read_text(), re.MULTILINE).group(1)


def passed(what, count):
    print(what, flush=True)
    return count


def expect(holds, otherwise):
    if not holds:
        raise SystemExit(otherwise)


if __name__ == "__main__":
    main()
