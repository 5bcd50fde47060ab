#!/usr/bin/env python3
"""Every program of deploy/guides/connect.md, run as it stands there: each must print the number of notes.

    tests/places/connect.py [WORD...]     only those whose heading has one of the words

The guide's own port is 5432, which may be taken here: everything runs in a network namespace of its own. Libraries are
installed below target/places/connect, at locked versions; languages are the machine's.
"""

import contextlib
import hashlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from place import own_network
from stage import ROOT, TARGET, call, clean_environment, listening, scratch_directory, start, until

GUIDE = ROOT / "deploy/guides/connect.md"
WORK = TARGET / "places/connect"
VENV = WORK / "venv"
LIMIT = 180  # seconds for one program, compiling it included
# The fewest that a guide of this name may have.
FEWEST = 20

RUN = {
    "go": ("go", ["go", "run"]),
    "java": ("java", ["java", "-cp", "/usr/share/java/postgresql.jar"]),
    "js": ("mjs", ["node"]),
    "perl": ("pl", ["perl"]),
    "php": ("php", ["php"]),
    "python": ("py", [VENV / "bin/python"]),
    "ruby": ("rb", ["ruby"]),
    "sh": ("sh", ["sh"]),
}
# Compiled by cargo: tests/it/guides.rs.
ELSEWHERE = {"rust"}
# Goes with the program after it, which imports what is made of it.
SCHEMA = "prisma"


def main():
    words = sys.argv[1:]
    programs = [(heading, language, text) for heading, language, text in blocks() if language not in ELSEWHERE]
    if sum(language != SCHEMA for _, language, _ in programs) < FEWEST:
        raise SystemExit(f"only {len(programs)} programs in {GUIDE}")
    install()
    own_network()
    failed = []
    passed = 0
    with contextlib.ExitStack() as stack:
        variables, proxy = serve(stack)
        if not words:
            # The prose holds of what libpq reads, too.
            expect(variables["PGDATABASE"] == "databricks_postgres", "the emulator's database")
        for number, (heading, language, text) in enumerate(programs):
            if words and not any(word.lower() in heading.lower() for word in words):
                continue
            if language == SCHEMA:
                generate(text)
                continue
            began = time.monotonic()
            printed = run(number, language, text)
            if printed == "3":
                passed += 1
                print(f"{heading:<45} passed ({time.monotonic() - began:.1f} s)", flush=True)
            else:
                failed.append(heading)
                print(f"{heading:<45} FAILED: {printed[-1500:]}", flush=True)
        expect(proxy.poll() is None, f"the proxy ended; see {proxy.log}")
    print(f"\nconnect: {passed} passed, {len(failed)} failed")
    return 1 if failed else 0


def blocks():
    """Heading, language and text of each program."""
    heading, language, lines = [], None, []
    for line in GUIDE.read_text().splitlines():
        if language is None and (found := re.match(r"(#+) (.+)", line)):
            heading = [*heading[: len(found.group(1)) - 2], found.group(2)]
        elif line.startswith("```"):
            if language is None:
                language, lines = line.removeprefix("```"), []
            else:
                if language not in {*RUN, *ELSEWHERE, SCHEMA}:
                    raise SystemExit(f"{' / '.join(heading)}: nothing here runs {language!r}")
                yield " / ".join(heading), language, "\n".join(lines) + "\n"
                language = None
        elif language is not None:
            lines.append(line)


def run(number, language, text):
    suffix, command = RUN[language]
    if not shutil.which(str(command[0])):
        return f"{command[0]} is not installed"
    folder = WORK / "node" if language == "js" else WORK
    file = folder / (f"Program{number}.{suffix}")
    file.write_text(text)
    environment = clean_environment() | {"HOME": str(WORK), "GO111MODULE": "off", "GOPATH": "/usr/share/gocode", "GOCACHE": str(WORK / "go"), "GOFLAGS": "-p=2", "DJANGO_SETTINGS_MODULE": ""}
    try:
        done = subprocess.run([str(part) for part in (*command, file)], env=environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return f"nothing within {LIMIT} s"
    if done.returncode != 0:
        return f"exit code {done.returncode}: {done.stderr or done.stdout}"
    return done.stdout.strip()


def generate(schema):
    """The client that Prisma makes of a schema."""
    node = WORK / "node"
    (node / "schema.prisma").write_text(schema)
    # It will not start without the engine of its migrations, which is no part of any package, and never calls it.
    environment = clean_environment() | {"HOME": str(WORK), "PRISMA_SCHEMA_ENGINE_BINARY": shutil.which("true"), "CHECKPOINT_DISABLE": "1", "NO_UPDATE_NOTIFIER": "1"}
    call("npx", "--no-install", "prisma", "generate", "--no-hints", cwd=node, env=environment)


def serve(stack):
    """The emulator, and the proxy on the guide's port."""
    program = os.environ.get("LAKEBASE_PROXY", TARGET / "debug/lakebase-proxy")
    env_file = scratch_directory(stack) / "emulator.env"
    emulator = start(stack, "connect-emulator", [program, "emulator", "--env-file", env_file], clean_environment())
    until("the emulator to be ready", lambda: env_file.exists() or None, emulator)
    variables = dict(line.split("=", 1) for line in env_file.read_text().splitlines())
    proxy = start(stack, "connect-proxy", [program, "serve"], clean_environment() | variables)
    until("the proxy to be ready", lambda: listening(5432), proxy)
    return variables, proxy


def install():
    """What the programs import, at versions that are written down."""
    lock = (HERE / "connect/requirements.txt").read_text()
    mark = VENV / "requirements"
    if not mark.exists() or mark.read_text() != lock:
        WORK.mkdir(parents=True, exist_ok=True)
        call(sys.executable, "-m", "venv", "--clear", VENV)
        call(VENV / "bin/pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "-r", HERE / "connect/requirements.txt")
        mark.write_text(lock)
    node = WORK / "node"
    digest = hashlib.sha256((HERE / "connect/package-lock.json").read_bytes()).hexdigest()
    mark = node / "installed"
    if not mark.exists() or mark.read_text() != digest:
        node.mkdir(parents=True, exist_ok=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(HERE / "connect" / name, node)
        call("npm", "ci", "--no-audit", "--no-fund", "--loglevel=error", "--ignore-scripts", cwd=node)
        mark.write_text(digest)


def expect(holds, what):
    if not holds:
        raise SystemExit(f"not so: {what}")


if __name__ == "__main__":
    sys.exit(main())
