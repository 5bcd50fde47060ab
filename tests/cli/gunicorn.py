#!/usr/bin/env python3
"""`exec` as the parent of Flask under gunicorn, as in Databricks Apps: one process tree, SIGKILL 15 s after SIGTERM.

    tests/cli/gunicorn.py

`LAKEBASE_PROXY` names the program (default: target/debug/lakebase-proxy, built first). Python's standard library is all
that this script needs; the app's libraries are installed below target/gunicorn, at locked versions.
"""

import concurrent.futures
import contextlib
import hashlib
import os
import pathlib
import signal
import sys
import time
import urllib.request

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from stage import ROOT, TARGET, call, clean_environment, free_port, scratch_directory, start, until

WORK = TARGET / "gunicorn"
VENV = WORK / "venv"
LOCKED = HERE.parent / "drivers/requirements.txt"
MORE = ("gunicorn==27.0.1",)
KILLED_AFTER = 15  # seconds that Databricks Apps gives an app to end


def main():
    install()
    with contextlib.ExitStack() as stack:
        program = os.environ.get("LAKEBASE_PROXY")
        if program is None:
            call("cargo", "build", "--locked", "--quiet", cwd=ROOT)
            program = TARGET / "debug/lakebase-proxy"
        env_file = scratch_directory(stack) / "emulator.env"
        emulator = start(stack, "emulator", [program, "emulator", "--env-file", env_file], clean_environment())
        until("the emulator to be ready", lambda: env_file.exists() or None, emulator)
        variables = dict(line.split("=", 1) for line in env_file.read_text().splitlines())

        port = free_port()
        gunicorn = [VENV / "bin/gunicorn", "--chdir", HERE, "--workers", "2", "--threads", "2", "--bind", f"127.0.0.1:{port}", "gunicorn_app:app"]
        app = start(stack, "exec", [program, "exec", "--strip-secrets", "--", *gunicorn], clean_environment() | variables)
        url = f"http://127.0.0.1:{port}"

        def page(path="/"):
            with contextlib.suppress(OSError), urllib.request.urlopen(url + path, timeout=30) as answer:
                return answer.read().decode()

        def logged(words):
            return True if words in app.log.read_text() else None

        worker, user = until("the app to answer", page, app).split()
        expect(user == variables["PGUSER"], f"the app is {user}")
        print("the app answers")

        # gunicorn's own signals reach it through us: a worker more, new workers, log files reopened.
        for name in ("TTIN", "HUP", "USR1"):
            app.send_signal(getattr(signal, f"SIG{name}"))
            until(f"gunicorn to see SIG{name}", lambda: logged(f"Handling signal: {name.lower()}"), app)
        until("new workers", lambda: True if (new := page()) and new.split()[0] != worker else None, app)
        expect(app.poll() is None, "a reload ends nothing")
        print("gunicorn's signals reach gunicorn")

        with concurrent.futures.ThreadPoolExecutor() as requests:
            slow = requests.submit(page, "/slow")
            time.sleep(0.5)
            expect(not slow.done(), "a request is under way")
            sent = time.monotonic()
            app.terminate()
            code = app.wait(KILLED_AFTER)
            expect(slow.result() == "42", f"the request under way is answered, not {slow.result()}")
        took = time.monotonic() - sent
        expect(code == 0, f"gunicorn ends by SIGTERM with 0, not {code}")
        log = app.log.read_text()
        expect("does not end by SIGTERM" not in log and "Traceback" not in log, f"see {app.log}")
        print(f"after SIGTERM the request under way was answered, and all ended in {took:.1f} s with gunicorn's code {code}")


def install():
    wanted = LOCKED.read_text() + "\n".join(MORE)
    mark = VENV / "requirements.sha256"
    digest = hashlib.sha256(wanted.encode()).hexdigest()
    if mark.exists() and mark.read_text() == digest:
        return
    call(sys.executable, "-m", "venv", "--clear", VENV)
    call(VENV / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "-r", LOCKED, *MORE)
    mark.write_text(digest)


def expect(holds, what):
    if not holds:
        raise SystemExit(f"not so: {what}")


if __name__ == "__main__":
    sys.exit(main())
