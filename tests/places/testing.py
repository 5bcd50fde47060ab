#!/usr/bin/env python3
"""Every program of deploy/guides/testing.md, run as it stands there.

    tests/places/testing.py [WORD...]     only the sections whose heading has one of the words

There is no container engine on the machines of CI: the commands of the Compose file run on this machine, in the Compose
file's order, and Testcontainers on an engine that runs the program (testing/engine.py). The Compose file and the workflow are
checked against their schemas besides, the workflow by actionlint, too.
"""

import contextlib
import hashlib
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import yaml
from stage import ROOT, TARGET, call, clean_environment, scratch_directory

GUIDE = ROOT / "deploy/guides/testing.md"
WORK = TARGET / "places/testing"
VENV = WORK / "venv"
CI_TOOLS = TARGET / "ci-venv/bin"
PLACES_TOOLS = pathlib.Path(sys.executable).parent
LIMIT = 180  # seconds for one program, many times what it takes


def main():
    words = sys.argv[1:]
    sections = blocks()
    install()
    checks = {
        "In a shell": shell,
        "pytest": pytest,
        "A branch per pull request": branch,
        "Node": node,
        "A CI job": job,
        "Docker Compose": compose,
        "Testcontainers": testcontainers,
    }
    if (unknown := set(sections) - set(checks)) or (missing := set(checks) - set(sections)):
        raise SystemExit(f"sections that nothing runs: {unknown}, and that are not there: {missing}")
    failed = 0
    for heading, check in checks.items():
        if words and not any(word.lower() in heading.lower() for word in words):
            continue
        began = time.monotonic()
        try:
            with contextlib.ExitStack() as stack:
                check(sections, scratch_directory(stack))
            print(f"{heading:<30} passed ({time.monotonic() - began:.1f} s)", flush=True)
        except (AssertionError, subprocess.SubprocessError) as error:
            failed += 1
            print(f"{heading:<30} FAILED: {error}", flush=True)
    print(f"\ntesting: {len(checks) - failed} sections, {failed} failed")
    return 1 if failed else 0


def blocks():
    """The programs of each section."""
    sections = {}
    text = GUIDE.read_text()
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        found = re.findall(r"^```\w+\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
        if found:
            sections[section.splitlines()[0]] = found
    return sections


def shell(sections, folder):
    [script] = sections["In a shell"]
    printed = run(["sh", "-e", "-c", script], folder)
    expect("Welcome to Lakebase Autoscaling!" in printed.splitlines(), printed)


def pytest(sections, folder):
    conftest, notes = sections["pytest"]
    (folder / "conftest.py").write_text(conftest)
    (folder / "test_notes.py").write_text(notes)
    passed(run([VENV / "bin/python", "-m", "pytest", "-q"], folder), 3)
    # The same tests, in the other order: none needs what another leaves.
    passed(run([VENV / "bin/python", "-m", "pytest", "-q", *(f"test_notes.py::{name}" for name in reversed(re.findall(r"def (test_\w+)", notes)))], folder), 3)


def branch(sections, folder):
    (folder / "conftest.py").write_text(sections["pytest"][0])
    [test] = sections["A branch per pull request"]
    (folder / "test_branch.py").write_text(test)
    passed(run([VENV / "bin/python", "-m", "pytest", "-q"], folder), 1)


def testcontainers(sections, folder):
    [conftest] = sections["Testcontainers"]
    (folder / "conftest.py").write_text(conftest)
    (folder / "test_notes.py").write_text(sections["pytest"][1])
    shutil.copy(HERE / "testing/engine.py", folder)
    passed(run([VENV / "bin/python", "-m", "pytest", "-q", "-p", "engine"], folder), 3)


def node_project(sections, folder):
    [test] = sections["Node"]
    (folder / "notes.test.mjs").write_text(test)
    (folder / "node_modules").symlink_to(WORK / "node/node_modules")


def node(sections, folder):
    node_project(sections, folder)
    [script] = sections["In a shell"]
    tap(run(["sh", "-e", "-c", re.sub(r"^lakebase-proxy exec .*$", "node --test", script, flags=re.MULTILINE)], folder))


def job(sections, folder):
    [text] = sections["A CI job"]
    workflow = folder / "test.yml"
    workflow.write_text(text)
    call(CI_TOOLS / "actionlint", workflow)
    call(PLACES_TOOLS / "check-jsonschema", "--builtin-schema", "vendor.github-workflows", workflow)
    node_project(sections, folder)
    more = {"RUNNER_TEMP": str(folder), "GITHUB_ENV": str(folder / "github.env")}
    steps = [step["run"] for step in yaml.safe_load(text)["jobs"]["test"]["steps"] if "run" in step]
    expect(steps[:2] == ["npm ci", 'pip install "lakebase-proxy[demo]"'], steps)
    groups = []
    try:
        # As a runner does: the steps share files and what they leave running, no more.
        for step in steps[2:]:
            if (file := folder / "github.env").exists():
                more |= dict(line.split("=", 1) for line in file.read_text().splitlines())
            printed = run(["bash", "-e", "-c", step], folder, more, groups)
        tap(printed)
    finally:
        # What a step left running is of its process group.
        for group in groups:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGTERM)
    until_gone(folder / "lakebase.env")


def compose(sections, folder):
    [text] = sections["Docker Compose"]
    # As a volume: open to the user that Postgres runs as.
    folder.chmod(0o755)
    file = folder / "compose.yaml"
    file.write_text(text)
    call(PLACES_TOOLS / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", file)
    services = yaml.safe_load(text.replace("/run/lakebase", str(folder)))["services"]
    lakebase, tests = services["lakebase"], services["tests"]
    expect(tests["network_mode"] == "service:lakebase", tests)
    node_project(sections, folder)
    with subprocess.Popen(["lakebase-proxy", *lakebase["command"]], env=environment() | lakebase["environment"], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as emulator:
        try:
            command = lakebase["healthcheck"]["test"][1:]
            deadline = time.monotonic() + LIMIT
            while subprocess.run(command).returncode != 0:
                expect(emulator.poll() is None and time.monotonic() < deadline, "the emulator is not healthy")
                time.sleep(0.1)
            tap(run(tests["command"], folder))
        finally:
            emulator.terminate()


def until_gone(env_file):
    """The file goes when the emulator does."""
    deadline = time.monotonic() + LIMIT
    while env_file.exists():
        expect(time.monotonic() < deadline, "the emulator goes on")
        time.sleep(0.05)


def environment():
    program = pathlib.Path(os.environ.get("LAKEBASE_PROXY", TARGET / "debug/lakebase-proxy"))
    return clean_environment() | {"PATH": f"{program.resolve().parent}:{os.environ['PATH']}", "PYTHONDONTWRITEBYTECODE": "1"}


def run(command, folder, more=None, groups=None):
    """What a command prints. It may leave programs running, which keep its output open: that is a file."""
    output = folder / "output"
    with output.open("w") as out:
        process = subprocess.Popen([str(part) for part in command], cwd=folder, env=environment() | (more or {}), stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
        if groups is not None:
            groups.append(process.pid)
        try:
            code = process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = f"nothing within {LIMIT} s"
    printed = output.read_text(errors="replace")
    expect(code == 0, f"exit code {code}: {printed[-3000:]}")
    return printed


def passed(printed, count):
    expect(re.search(rf"^{count} passed", printed, re.MULTILINE), printed[-2000:])


def tap(printed):
    expect(re.search(r"^(#|ℹ) pass 2$", printed, re.MULTILINE) and re.search(r"^(#|ℹ) fail 0$", printed, re.MULTILINE), printed[-2000:])


def expect(holds, what):
    if not holds:
        raise AssertionError(what)


def install():
    lock = (HERE / "testing/requirements.txt").read_text()
    mark = VENV / "requirements"
    if not mark.exists() or mark.read_text() != lock:
        WORK.mkdir(parents=True, exist_ok=True)
        call(sys.executable, "-m", "venv", "--clear", VENV)
        call(VENV / "bin/pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "-r", HERE / "testing/requirements.txt")
        mark.write_text(lock)
    node = WORK / "node"
    digest = hashlib.sha256((HERE / "testing/package-lock.json").read_bytes()).hexdigest()
    mark = node / "installed"
    if not mark.exists() or mark.read_text() != digest:
        node.mkdir(parents=True, exist_ok=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(HERE / "testing" / name, node)
        call("npm", "ci", "--no-audit", "--no-fund", "--loglevel=error", "--ignore-scripts", cwd=node)
        mark.write_text(digest)


if __name__ == "__main__":
    sys.exit(main())
