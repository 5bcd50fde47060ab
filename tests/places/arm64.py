#!/usr/bin/env python3
"""The packages for Linux on arm64, run by QEMU: both programs, a login over TLS, and the demo.

    tests/places/arm64.py --dist DIR

DIR is what `deploy/build linux-arm64` made. The emulator is target/debug/lakebase-proxy, or what `LAKEBASE_PROXY` names.
"""

import argparse
import contextlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tarfile

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from place import NOTES, Place
from stage import ROOT, TARGET, call, clean_environment, free_port, listening, start, until

QEMU = "qemu-aarch64-static"
# Where Debian's package libc6-arm64-cross puts the C library.
LIBRARIES = "/usr/aarch64-linux-gnu"
LIMIT = 120


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dist", type=pathlib.Path, required=True)
    dist = parser.parse_args().dist
    passed = 0
    with contextlib.ExitStack() as stack:
        place = Place(stack)
        packed, static = packages(place, dist)
        for program in (packed, static):
            passed += starts(program)
        variables = emulated(stack, place)
        for name, program in (("packed", packed), ("static", static)):
            passed += serves(stack, name, program, variables)
        passed += demo(stack, place, packed)
    print(f"\narm64: {passed} passed, 0 failed")


def packages(place, dist):
    """The program of the wheel, which npm's is too, and that of the tarball."""
    (wheel,) = dist.glob("*manylinux2014_aarch64*.whl")
    # As pip on such a machine installs it.
    call("python3", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--only-binary=:all:", "--platform", "manylinux2014_aarch64", "--target", place.folder / "wheel", wheel)
    packed = place.folder / "wheel/bin/lakebase-proxy"
    (npm,) = dist.glob("lakebase-proxy-linux-arm64-*.tgz")
    with tarfile.open(npm) as tar:
        manifest = json.load(tar.extractfile("package/package.json"))
        expect((manifest["os"], manifest["cpu"], manifest["libc"]) == (["linux"], ["arm64"], ["glibc"]), f"npm's package is for {manifest}")
        expect(tar.extractfile("package/bin/lakebase-proxy").read() == packed.read_bytes(), "npm's program is the wheel's")
    (launcher,) = dist.glob("lakebase-proxy-[0-9]*.tgz")
    with tarfile.open(launcher) as tar:
        expect("lakebase-proxy-linux-arm64" in json.load(tar.extractfile("package/package.json"))["optionalDependencies"], "npm finds the program")
    (archive,) = dist.glob("*-aarch64-linux.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(place.folder, filter="data")
    return packed, place.folder / archive.name.removesuffix(".tar.gz") / "bin/lakebase-proxy"


def starts(program):
    version = run(program, "--version").split()
    expect(version == ["lakebase-proxy", project_version()], f"the version is {version}")
    expect("Usage: lakebase-proxy" in run(program, "--help"), "the help is shown")
    print(f"{program.relative_to(program.parents[2])}: version, help", flush=True)
    return 2


def emulated(stack, place):
    env_file = place.folder / "emulator.env"
    emulator = start(stack, "arm64-emulator", [os.environ.get("LAKEBASE_PROXY", TARGET / "debug/lakebase-proxy"), "emulator", "--env-file", env_file], clean_environment())
    until("the emulator to be ready", lambda: env_file.exists() or None, emulator)
    return dict(line.split("=", 1) for line in env_file.read_text().splitlines())


def serves(stack, name, program, variables):
    """A login over TLS on both sides, data, a cancel; then SIGTERM."""
    with contextlib.ExitStack() as own:
        port = free_port()
        command = [QEMU, "-L", LIBRARIES, program, "serve", "--port", port, "--http-port", "none", "--client-tls", "self-signed"]
        proxy = start(own, f"arm64-{name}", command, clean_environment() | variables)
        until("the proxy to listen", lambda: listening(port), proxy)
        rows = psql(port, "select count(*) from generate_series(1, 10000)")
        expect(rows == "10000", rows)
        expect(len(psql(port, "select repeat('x', 5000000)")) == 5_000_000, "5 MB arrive")
        proxy.terminate()
        code = proxy.wait(LIMIT)
        log = proxy.log.read_text(errors="replace")
        expect(code == 143 and "panicked" not in log and "ERROR" not in log, f"SIGTERM ends it with {code}:\n{log}")
    print(f"{name}: a login over TLS, 5 MB, SIGTERM", flush=True)
    return 3


def demo(stack, place, program):
    """With a Postgres of this machine: a foreign one for the program."""
    (*_, binaries) = sorted(pathlib.Path("/usr/lib/postgresql").glob("*/bin"))
    place.run(binaries / "initdb", "--pgdata", "data", "--username", "postgres", "--auth", "trust", "--no-sync")
    port = free_port()
    options = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": place.folder, "fsync": "off"}
    flags = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
    postgres = place.start(stack, "arm64-postgres", [binaries / "postgres", "-D", "data", *flags], place.environment())
    until("Postgres", lambda: listening(port), postgres)
    ports = [part for flag in ("--port", "--http-port", "--notes-port") for part in (flag, 0)]
    url = f"postgresql://postgres@127.0.0.1:{port}/postgres"
    shown = place.start(stack, "arm64-demo", [QEMU, "-L", LIBRARIES, program, "demo", "--postgres-url", url, *ports], place.environment())
    page = until("the demo's panel", lambda: (found := re.search(r"(http://\S+)", shown.log.read_text())) and found.group(1), shown)
    text = subprocess.run(["curl", "--silent", "--show-error", "--retry", "5", "--retry-all-errors", page], check=True, stdout=subprocess.PIPE, text=True, timeout=LIMIT).stdout
    missing = [note for note in NOTES if note not in text]
    expect(not missing, f"the demo's page lacks {missing}")
    print(f"demo: {len(NOTES)} notes at {page}", flush=True)
    return 1


def run(program, *arguments, code=0):
    ended = subprocess.run([QEMU, "-L", LIBRARIES, program, *arguments], env=clean_environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT)
    expect(ended.returncode == code, f"{arguments} ended with {ended.returncode}, not {code}:\n{ended.stdout}")
    return ended.stdout


def psql(port, statement):
    command = ["psql", "--no-psqlrc", "--tuples-only", "--no-align", "--command", statement, f"host=127.0.0.1 port={port} sslmode=require user=anyone dbname=databricks_postgres connect_timeout=60"]
    return subprocess.run(command, env=clean_environment(), check=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, timeout=LIMIT).stdout.strip()


def project_version():
    return re.search(r'^version = "(.+)"', (ROOT / "Cargo.toml").read_text(), re.MULTILINE).group(1)


def expect(holds, otherwise):
    if not holds:
        raise SystemExit(otherwise)


if __name__ == "__main__":
    main()
