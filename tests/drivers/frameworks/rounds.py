"""What the programs in Python have in common: workers that repeat rounds until the time is over, and check what they read."""

import os
import pathlib
import sys
import threading
import time

# Of the program, so that an unqualified table is another one in each.
SCHEMA = "of_" + "_".join([pathlib.Path(sys.argv[0]).stem, *sys.argv[1:]])
WORKERS = 3
# Then the rows are deleted, and counted from zero again.
ROUNDS = 50
PAUSE = 0.02  # seconds between rounds: clients at rest are what connections are shared for


class Session:
    def __init__(self, worker):
        self.worker = worker
        self.done = 0
        self.settings = {"search_path": SCHEMA, "timezone": f"Etc/GMT+{worker}", "statement_timeout": f"{30 + worker}s", "app.tenant": f"{SCHEMA} {worker}"}

    def rounds(self):
        """The numbers 0 to ROUNDS - 1, again and again."""
        end = time.monotonic() + float(os.environ["ROUNDS_SECONDS"])
        while time.monotonic() < end:
            yield self.done % ROUNDS
            self.done += 1
            time.sleep(PAUSE)

    def note(self, round):
        return f"{SCHEMA} {self.worker} {round}"

    def count(self, round):
        """Of the rows after a round, and the sum of their rounds."""
        return round + 1, round * (round + 1) // 2

    def equal(self, what, found, expected):
        if found != expected:
            raise AssertionError(f"{SCHEMA}, worker {self.worker}, round {self.done}: {what}: {found!r} instead of {expected!r}")


def run(prepare, work):
    prepare()
    sessions = [Session(worker) for worker in range(WORKERS)]
    failed = []
    threading.excepthook = lambda it: (failed.append(it.exc_value), sys.__excepthook__(it.exc_type, it.exc_value, it.exc_traceback))
    threads = [threading.Thread(target=work, args=(session,)) for session in sessions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        sys.exit(1)
    report(sessions)


def report(sessions):
    print(sum(session.done for session in sessions))
