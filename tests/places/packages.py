#!/usr/bin/env python3
"""The wheel and the npm package, as installed on an empty machine; then the three Databricks Apps.

    tests/places/packages.py [--dist DIR] [--screenshots DIR]

Installed into an empty virtual environment and an empty npm project by a user without rights, and run under Databricks
Apps' conditions in front of an emulator that is the installed program, too. `--dist` names what `deploy/build` made;
without it the program of `cargo build-release` is packed first. Chromium looks at each page.
"""

import argparse
import contextlib
import html
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

from place import KILLED_AFTER, NOTES, Place
from stage import ROOT, TARGET, call, free_port, until

APPS = ROOT / "deploy/databricks-app"
# What an upload may be at most.
LARGEST = 10_000_000


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dist", type=pathlib.Path)
    parser.add_argument("--screenshots", type=pathlib.Path)
    arguments = parser.parse_args()
    dist = arguments.dist
    if dist is None:
        dist = TARGET / "places/dist"
        call(ROOT / "deploy/build", "--here", "--out", dist)
    passed = 0
    with contextlib.ExitStack() as stack:
        place = Place(stack)
        passed += wheel(place, dist)
        passed += npm(place, dist)
        program = place.folder / "venv/bin/lakebase-proxy"
        variables = place.emulator(stack, program)
        passed += notices_a_missing_platform(place)
        for name in ("flask", "node", "notes"):
            for variant in ("value", "valueFrom"):
                app(place, name, variant, variables, arguments.screenshots)
                passed += 1
    print(f"\npackages: {passed} passed, 0 failed")


# Installed


def wheel(place, dist):
    """From the wheel alone: the program runs, and the demo with it."""
    (file,) = dist.glob("*linux*_x86_64.whl")
    small(file)
    file = place.bring(file)
    place.run("python3", "-m", "venv", "venv")
    place.run("venv/bin/pip", "install", "--quiet", "--no-index", "--no-deps", file)
    expect(place.run("venv/bin/pip", "list", "--format=freeze").count("lakebase-proxy==") == 1, "pip lists it")
    version = place.run("venv/bin/lakebase-proxy", "--version").split()
    expect(version == ["lakebase-proxy", project_version()], f"the wheel's program is {version}")

    with contextlib.ExitStack() as stack:
        demo = place.start(stack, "places-demo", [place.folder / "venv/bin/lakebase-proxy", "demo", "--port", "0", "--http-port", "0", "--notes-port", "0"], place.environment())
        url = until("the demo's panel", lambda: (found := re.search(r"(http://\S+)", demo.log.read_text())) and found.group(1), demo)
        until("the demo's page", lambda: page(url) if all(note in page(url) for note in NOTES) else None, demo)
    print(f"wheel: {file.stat().st_size:,} bytes; demo serves {len(NOTES)} notes at {url}")
    return 2


def npm(place, dist):
    """From the npm packages alone, without running any script of theirs."""
    version = project_version()
    files = [dist / f"lakebase-proxy-{version}.tgz", dist / f"lakebase-proxy-linux-x64-{version}.tgz"]
    for file in files:
        small(file)
    project = place.folder / "npm-project"
    place.run("mkdir", project)
    copies = [place.bring(file) for file in files]
    place.run("npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--offline", *copies, cwd=project)
    version = place.run("node_modules/.bin/lakebase-proxy", "--version", cwd=project).split()
    expect(version == ["lakebase-proxy", project_version()], f"the package's program is {version}")
    result = place.run("node_modules/.bin/lakebase-proxy", "--no-such-flag", cwd=project, code=1)
    expect("--no-such-flag" in result, result)
    with contextlib.ExitStack() as stack:
        # A flag that node would take for its own, and a process that node is not part of.
        env_file = project / "emulator.env"
        emulator = place.start(stack, "places-npm-emulator", ["node_modules/.bin/lakebase-proxy", "emulator", "--env-file", env_file], place.environment(), project)
        until("the emulator to be ready", lambda: env_file.exists() or None, emulator)
        program = pathlib.Path(f"/proc/{emulator.pid}/exe").resolve()
        expect(program.name == "lakebase-proxy", f"the process is {program}")
    print(f"npm: {', '.join(f'{file.name} {file.stat().st_size:,} bytes' for file in files)}")
    return 3


def notices_a_missing_platform(place):
    project = place.folder / "npm-project"
    place.run("rm", "-r", project / "node_modules/lakebase-proxy-linux-x64")
    result = place.run("node_modules/.bin/lakebase-proxy", "--version", cwd=project, code=1)
    expect("is not installed" in result and "hint:" in result, result)
    return 1


def small(file):
    expect(file.stat().st_size < LARGEST, f"{file.name} has {file.stat().st_size} bytes")


def project_version():
    return re.search(r'^version = "(.+)"', (ROOT / "Cargo.toml").read_text(), re.MULTILINE).group(1)


# The three apps


def app(place, name, variant, variables, screenshots):
    folder = place.folder / name
    if not folder.exists():
        place.bring(APPS / name)
        install(place, folder)
    settings = app_yaml(folder / "app.yaml", variant)
    port = free_port()
    environment = platform_variables(place, folder, port, variables) | resolved(settings["env"], variant, variables)
    command = [part.replace("$DATABRICKS_APP_PORT", str(port)) for part in settings["command"]]
    before = files(folder)
    with contextlib.ExitStack() as stack:
        process = place.start(stack, f"places-{name}-{variant}", command_path(command, environment), environment, folder)
        url = f"http://127.0.0.1:{port}/"
        shown = until(f"the app {name}", lambda: page(url), process)
        text = html.unescape(shown)
        missing = [words for words in ("Hello from Lakebase!", "Recent Notes", *NOTES) if words not in text]
        expect(not missing and len(re.findall("<li[ >]", shown)) == len(NOTES), f"{name}: the page lacks {missing or 'exactly three notes'}:\n{shown}")
        if variant == "value":
            look(url, name, screenshots)
        began = time.monotonic()
        process.terminate()
        try:
            code = process.wait(KILLED_AFTER)
        except subprocess.TimeoutExpired:
            raise SystemExit(f"{name}: still there {KILLED_AFTER} s after SIGTERM; see {process.log}") from None
        took = time.monotonic() - began
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
            raise SystemExit(f"{name}: left processes behind; see {process.log}")
    log = process.log.read_text(errors="replace")
    expect(not any(secret in log for secret in (variables["DATABRICKS_CLIENT_SECRET"], "eyJ")), f"a secret is in {process.log}")
    expect("panicked" not in log and "Traceback" not in log, f"see {process.log}")
    expect(files(folder) == before, f"{name}: wrote {files(folder) - before}, where only standard output and error are kept")
    print(f"{name} ({variant}): three notes; ended {took:.1f} s after SIGTERM with {code}")


def install(place, folder):
    """As the platform does: npm where there is a package.json, else pip. The packages lie beside, as before publication."""
    if (folder / "package.json").exists():
        tarballs = {re.sub(r"-\d.*", "", file.name): f"file:../{file.name}" for file in place.folder.glob("lakebase-proxy-*.tgz")}
        manifest = json.loads((folder / "package.json").read_text())
        expect("lakebase-proxy" in manifest["dependencies"], "package.json names the proxy")
        manifest["dependencies"] |= tarballs
        place.write(folder / "package.json", json.dumps(manifest))
        place.run("npm", "install", "--omit=dev", "--no-audit", "--no-fund", "--loglevel=error", cwd=folder)
    else:
        (file,) = place.folder.glob("*.whl")
        wanted = (folder / "requirements.txt").read_text()
        expect(re.search("^lakebase-proxy$", wanted, re.MULTILINE) is not None, "requirements.txt names the proxy")
        place.write(folder / "requirements.txt", re.sub("^lakebase-proxy$", f"../{file.name}", wanted, flags=re.MULTILINE))
        place.run("python3", "-m", "venv", ".venv", cwd=folder)
        place.run(".venv/bin/pip", "install", "--quiet", "-r", "requirements.txt", cwd=folder)


def app_yaml(file, variant):
    """`command` and `env`, with the tutorial's variables or, as in its last lines, the resource's."""
    import yaml

    text = file.read_text()
    if variant == "valueFrom":
        text = text[: text.index("\nenv:")] + re.sub("^# ", "", text[text.index("\n# env:") :], flags=re.MULTILINE)
    return yaml.safe_load(text)


def resolved(env, variant, variables):
    """The reader's own values in the places of the tutorial's examples."""
    if variant == "valueFrom":
        expect([entry.get("valueFrom") for entry in env] == ["postgres"], "the resource's key is postgres")
        return {entry["name"]: variables["ENDPOINT_NAME"] for entry in env}
    own = {name: variables[name] for name in ("PGHOST", "PGPORT", "PGDATABASE", "PGUSER", "ENDPOINT_NAME")}
    return {entry["name"]: own.get(entry["name"], entry["value"]) for entry in env}


def platform_variables(place, folder, port, variables):
    """What Databricks Apps gives every app, and one with a database."""
    binaries = ":".join(str(folder / part) for part in (".venv/bin", "node_modules/.bin"))
    always = {
        "DATABRICKS_APP_NAME": "notes",
        "DATABRICKS_APP_URL": "https://notes-1234567890.aws.databricksapps.com",
        "DATABRICKS_WORKSPACE_ID": "1234567890",
        "DATABRICKS_APP_PORT": str(port),
        "PORT": str(port),
        "FLASK_RUN_HOST": "0.0.0.0",
        "FLASK_RUN_PORT": str(port),
        "UVICORN_HOST": "0.0.0.0",
        "UVICORN_PORT": str(port),
        "PYTHONUNBUFFERED": "1",
    }
    # The emulator's own authority: a real endpoint's certificate is signed by one that every machine trusts.
    emulated = {name: variables[name] for name in ("DATABRICKS_HOST", "DATABRICKS_CLIENT_ID", "DATABRICKS_CLIENT_SECRET", "PGSSLROOTCERT")}
    database = {"PGAPPNAME": "notes"} | {name: variables[name] for name in ("PGHOST", "PGPORT", "PGDATABASE", "PGUSER", "PGSSLMODE")}
    return place.environment(binaries) | {"PYTHONDONTWRITEBYTECODE": "1"} | always | emulated | database


def command_path(command, environment):
    """The program is looked for in the app's PATH, not in ours, and no shell is there to do it."""
    if "/" in command[0]:
        return command
    found = shutil.which(command[0], path=environment["PATH"])
    expect(found is not None, f"{command[0]} is not in the app's PATH")
    return [found, *command[1:]]


def files(folder):
    return {path for path in folder.rglob("*") if not {"node_modules", ".venv"} & set(path.relative_to(folder).parts)}


def page(url):
    with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(url, timeout=30) as answer:
        return answer.read().decode()
    return None


def look(url, name, screenshots):
    """What a person sees."""
    from chromium import Chromium

    with Chromium() as browser:
        browser.call("Emulation.setDeviceMetricsOverride", width=800, height=500, deviceScaleFactor=1, mobile=False)
        status = browser.open(url)
        expect(status == 200, f"{name}: status {status}")
        text = browser.evaluate("document.body.innerText")
        expect(all(note in text for note in NOTES), f"{name}: the browser shows {text}")
        if screenshots:
            browser.screenshot(screenshots / f"{name}.png")


def expect(holds, what):
    if not holds:
        raise SystemExit(f"not so: {what}")


if __name__ == "__main__":
    main()
