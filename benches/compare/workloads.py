"""What is done along each way, and what is written down of it."""

import os
import re
import resource
import selectors
import signal
import socket
import struct
import subprocess
import tempfile
import time

import machine
from libpq import Session
from stage import DATABASE, ROLE, TOKEN, run, tool

MB = 1_000_000


def percentile(values, share):
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


class Cost:
    """Processor time of a way's process while it is open."""

    def __init__(self, way):
        self._pid = way.process.pid if way.process else None

    def __enter__(self):
        self._before = machine.cpu_seconds(self._pid) if self._pid else 0
        return self

    def __exit__(self, *_):
        self.seconds = machine.cpu_seconds(self._pid) - self._before if self._pid else None

    def per(self, count):
        return None if self.seconds is None else self.seconds * 1e6 / count


def started(way):
    """Time until it listens, and its memory after the start, without clients."""
    time.sleep(1)
    return {"ms": way.process.start_seconds * 1e3, "resident_mb": machine.status_kb(way.process.pid, "VmRSS") / 1024}


def connect(way, count):
    """Connect, SELECT 1, close."""
    taken = []
    with Cost(way) as cost:
        for _ in range(count):
            began = time.perf_counter()
            with Session(way.conninfo()) as session:
                session.execute(b"SELECT 1")
            taken.append(time.perf_counter() - began)
    return {"p50_ms": percentile(taken, 0.5) * 1e3, "p99_ms": percentile(taken, 0.99) * 1e3, "cpu_us": cost.per(count)}


def round_trips(way, count):
    with Session(way.conninfo()) as session:
        session.time_round_trips(count // 10)
        with Cost(way) as cost:
            taken = session.time_round_trips(count)
    return {"p50_us": percentile(taken, 0.5) * 1e6, "p99_us": percentile(taken, 0.99) * 1e6, "cpu_us": cost.per(count)}


def pgbench(way, mode, clients, seconds):
    with tempfile.TemporaryDirectory() as directory:
        log = ["--log", "--log-prefix", os.path.join(directory, "log")]
        with Cost(way) as cost:
            output = run(tool("pgbench"), "-n", "-S", "-M", mode, "-c", clients, "-j", min(clients, 2), "-T", seconds, *log, way.conninfo())
        taken = [int(line.split(b" ", 3)[2]) for name in os.listdir(directory) for line in open(os.path.join(directory, name), "rb")]
    count, tps = _pgbench_output(output)
    return {"tps": tps, "cpu_us": cost.per(count), "p50_us": percentile(taken, 0.5), "p99_us": percentile(taken, 0.99)}


def _pgbench_output(output):
    count = re.search(r"transactions actually processed: (\d+)", output)
    tps = re.search(r"tps = ([\d.]+)", output)
    # Its time begins before its clients have connected.
    if not count or not tps:
        raise RuntimeError("pgbench came to no transaction in its time")
    return int(count[1]), float(tps[1])


def many_connects(way, count):
    """Eight clients that connect for every transaction."""
    with Cost(way) as cost:
        output = run(tool("pgbench"), "-n", "-S", "-C", "-c", 8, "-j", 2, "-t", count // 8, way.conninfo())
    return {"per_second": _pgbench_output(output)[1], "cpu_us": cost.per(count)}


def copy_out(way, megabytes, row):
    rows = megabytes * MB // row
    query = f"COPY (SELECT repeat('x', {row - 1}) FROM generate_series(1, {rows})) TO STDOUT"
    return _copy(way, megabytes, ["-c", query], subprocess.DEVNULL)


def copy_in(way, megabytes, row, file):
    # The rows go nowhere: it is the way that is measured, not the table.
    with open(file) as rows:
        return _copy(way, megabytes, ["-c", "COPY sink FROM STDIN WHERE false"], rows)


def _copy(way, megabytes, arguments, stdin):
    command = [tool("psql"), "-Xq", "-d", way.conninfo(), *arguments]
    with Cost(way) as cost:
        began = time.perf_counter()
        subprocess.run(command, stdin=stdin, stdout=subprocess.DEVNULL, check=True)
        elapsed = time.perf_counter() - began
    return {"mb_s": megabytes / elapsed, "cpu_us_mb": cost.per(megabytes)}


def rows_file(directory, megabytes, row):
    file = os.path.join(directory, f"rows-{row}")
    if not os.path.exists(file):
        line = b"x" * (row - 1) + b"\n"
        with open(file, "wb") as out:
            for _ in range(megabytes * MB // row):
                out.write(line)
    return file


def idle_sessions(way, count, watch_seconds):
    """Opens sessions that have sent one query, and measures the process while they are idle."""
    pid = way.process.pid
    few = max(count // 10, 1)
    crowd = Crowd(way)
    try:
        crowd.grow(few)
        time.sleep(0.5)
        first = machine.private_kb(pid)
        crowd.grow(count)
        # What opening them left to do, such as giving memory back, is over by then.
        time.sleep(4)
        last = machine.private_kb(pid)
        before = machine.cpu_seconds(pid)
        time.sleep(watch_seconds)
        used = machine.cpu_seconds(pid) - before
    finally:
        crowd.leave()
    return {"kb": (last - first) / (count - few), "cpu_ms_minute": used * 1e3 * 60 / watch_seconds}


def crowd(way, count):
    """So many clients at once on few connections: each connects, waits for its turn, sends one query and leaves."""
    pid = way.process.pid
    with Session(way.conninfo()) as session:
        session.execute(b"SELECT 1")
    clients = Crowd(way)
    before = machine.private_kb(pid)
    with Cost(way) as cost:
        began = time.perf_counter()
        # All of them wait before the first is let go on.
        waiting = clients.knock(count)
        time.sleep(1)
        memory = machine.private_kb(pid) - before
        paused = time.perf_counter()
        clients.serve(waiting)
        elapsed = time.perf_counter() - paused
    return {"per_second": count / elapsed, "cpu_us": cost.per(count), "kb": memory / count, "seconds": paused - began + elapsed}


class Crowd:
    """Many sessions in one thread, without a library: startup, password on request, one query."""

    def __init__(self, way):
        self._port = way.process.port
        self._sessions = []

    def knock(self, count):
        """Sessions that have sent their startup message and may be waiting."""
        selector = selectors.DefaultSelector()
        for _ in range(count):
            session = self._dial()
            selector.register(session, selectors.EVENT_READ, {"received": b"", "sent": False})
        return selector

    def serve(self, selector):
        """Lets each of them send its query and leave, as soon as it has been logged in."""
        left, deadline = len(self._sessions), time.monotonic() + 300
        while left:
            for key, _ in selector.select(5):
                if self._receive(selector, key):
                    key.fileobj.sendall(b"X\0\0\0\4")
                    key.fileobj.close()
                    left -= 1
            if time.monotonic() > deadline:
                raise TimeoutError(f"{left} clients were not served within five minutes")
        selector.close()
        self._sessions.clear()

    def _dial(self):
        session = socket.create_connection(("127.0.0.1", self._port), timeout=60)
        body = struct.pack("!I", 196608) + f"user\0{ROLE}\0database\0{DATABASE}\0\0".encode()
        session.sendall(struct.pack("!I", len(body) + 4) + body)
        session.setblocking(False)
        self._sessions.append(session)
        return session

    def grow(self, to, at_once=50):
        selector = selectors.DefaultSelector()
        opening, deadline = 0, time.monotonic() + 300
        while len(self._sessions) < to or opening:
            while opening < at_once and len(self._sessions) < to:
                selector.register(self._dial(), selectors.EVENT_READ, {"received": b"", "sent": False})
                opening += 1
            for key, _ in selector.select(5):
                opening -= self._receive(selector, key)
            if time.monotonic() > deadline:
                raise TimeoutError(f"{to} sessions were not open within five minutes")
        selector.close()

    def _receive(self, selector, key):
        received = key.fileobj.recv(16384)
        if not received:
            raise ConnectionError("a session was closed")
        key.data["received"] += received
        while len(output := key.data["received"]) >= 5:
            tag, length = output[:1], struct.unpack("!I", output[1:5])[0]
            if len(output) < length + 1:
                break
            body, key.data["received"] = output[5 : length + 1], output[length + 1 :]
            if tag == b"E":
                raise ConnectionError(body.replace(b"\0", b" ").decode(errors="replace"))
            if tag == b"R" and body[:4] == b"\0\0\0\3":
                key.fileobj.sendall(b"p" + struct.pack("!I", len(TOKEN) + 5) + TOKEN.encode() + b"\0")
            if tag == b"Z" and key.data["sent"]:
                selector.unregister(key.fileobj)
                return 1
            if tag == b"Z":
                key.data["sent"] = True
                key.fileobj.sendall(b"Q\0\0\0\x0dSELECT 1\0")
        return 0

    def leave(self):
        for session in self._sessions:
            session.close()
        self._sessions.clear()


def room_for(sessions):
    """Whether one process may have so many descriptors, after raising the limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard == resource.RLIM_INFINITY or hard > 2 * sessions + 200


def system_calls(way, count):
    """Of one round trip; all threads of the process."""
    out = os.path.join(way.directory, "strace.out")
    with Session(way.conninfo()) as session:
        session.time_round_trips(200)
        tracer = subprocess.Popen(["strace", "-f", "-c", "-o", out, "-p", str(way.process.pid)], stderr=subprocess.PIPE, text=True)
        if "attached" not in tracer.stderr.readline():
            raise RuntimeError("strace may not attach")
        session.time_round_trips(count)
        tracer.send_signal(signal.SIGINT)
        tracer.wait()
    with open(out) as table:
        total = next(line for line in table if line.rstrip().endswith(" total"))
    return {"calls": int(total.split()[3]) / count}


def instructions(kind, directory, server, count):
    """Of user space, of one round trip: a process of its own under callgrind."""
    out = os.path.join(directory, f"callgrind-{kind.__name__}")
    os.makedirs(out, exist_ok=True)
    os.chmod(out, 0o777)
    prefix = ["valgrind", "--tool=callgrind", "-q", f"--callgrind-out-file={out}/counts"]
    way = kind(directory, server.port, server.authority, prefix)
    try:
        with Session(way.conninfo()) as session:
            session.time_round_trips(200)
            # As the process's own user, or it waits for ever; while a session is busy, or it may wait long.
            control = {"timeout": 60, **way.user}
            run("callgrind_control", "--zero", way.process.pid, **control)
            session.time_round_trips(count)
            run("callgrind_control", "--dump", way.process.pid, **control)
    finally:
        way.stop()
    total = 0
    for name in os.listdir(out):
        if name.startswith("counts.1"):
            with open(os.path.join(out, name)) as counts:
                total += next(int(line.split()[1]) for line in counts if line.startswith(("totals:", "summary:")))
    return {"instructions": total / count}
