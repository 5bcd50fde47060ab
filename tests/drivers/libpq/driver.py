"""libpq's own tools (psql, pg_dump, pgbench): one broad job over one server, reported as `key = value` lines.

The server is named by libpq's own variables alone, so the same script runs direct and through the proxy.
"""

import glob
import hashlib
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time

WAIT = 30  # seconds that anything here may take before it counts as hung
# Debian keeps pgbench off the PATH.
for directory in sorted(glob.glob("/usr/lib/postgresql/*/bin"), key=lambda path: int(path.split("/")[4])):
    os.environ["PATH"] = os.environ["PATH"] + os.pathsep + directory
os.environ["PGCONNECT_TIMEOUT"] = str(WAIT)
os.environ["PSQLRC"] = os.devnull
os.environ["PAGER"] = ""
# A terminal must not change what psql prints.
os.environ["TERM"] = "dumb"


def report(key, value):
    print(f"{key} = {value}", flush=True)


def settled(text):
    # What libpq puts before the server's words names the server; a backend's process id names the backend.
    text = re.sub(r'connection to server at "[^"]*"(?: \([^)]*\))?, port \d+ failed: ', "", text)
    text = re.sub(r"server process with PID \d+", "server process with PID N", text)
    return re.sub(r"pg_temp_\d+", "pg_temp_N", text)


def run(key, *command, stdin="", env=None, lines=True):
    began = time.monotonic()
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=4 * WAIT, env={**os.environ, **(env or {})})
    report(f"{key}.exit", done.returncode)
    if lines:
        for line in done.stdout.splitlines():
            report(f"{key}.out", settled(line))
    for line in done.stderr.splitlines():
        report(f"{key}.err", settled(line))
    return done.stdout, time.monotonic() - began


def psql(key, script, *options, **more):
    return run(key, "psql", "-X", "-A", "-t", *options, stdin=script, **more)


def startup():
    psql("startup", """
        select current_database(), current_user;
        select pg_backend_pid() > 0;
        show server_version; show application_name; show client_encoding;
        \\echo :SERVER_VERSION_NUM :ENCODING
        \\encoding LATIN1
        show client_encoding;
        select U&'\\00e9' = chr(233);
        \\encoding UTF8
        select 'żółć 🐘';
    """)
    script = "show application_name; show client_encoding; show timezone; show datestyle; show search_path; show geqo; show work_mem;"
    given = {"PGAPPNAME": "psql's own", "PGTZ": "Pacific/Auckland", "PGDATESTYLE": "German", "PGGEQO": "off", "PGCLIENTENCODING": "LATIN1",
             "PGOPTIONS": "-c search_path=public,pg_catalog -c work_mem=1234kB"}
    psql("startup.given", script, env=given)
    psql("startup.after RESET ALL", "set timezone = 'UTC'; set work_mem = '1MB'; reset all; " + script, "-q", env=given)
    psql("startup.after DISCARD ALL", "set timezone = 'UTC'; set work_mem = '1MB'; discard all; " + script, "-q", env=given)
    psql("startup.conninfo", script, "-d", "application_name='from the string' options='-c work_mem=4321kB' client_encoding=auto", env={"LC_ALL": "C.UTF-8"})
    for key, wrong, word in (("no such database", "dbname=no_such_database", "no_such_database"),
                             ("bad option", "options='-c no_such_setting=1'", "no_such_setting"),
                             ("replication", "replication=database", "walsender")):
        done = subprocess.run(["psql", "-X", "-A", "-t", "-d", wrong, "-c", "select 1"], capture_output=True, text=True, timeout=WAIT)
        report(f"startup.{key}", (done.returncode, "FATAL" in done.stderr, word in done.stderr, done.stdout))


def session():
    psql("session", """
        \\set VERBOSITY verbose
        create temp table t (id int primary key, label text not null check (label <> ''));
        insert into t values (1, 'one'), (2, 'two') returning *;
        insert into t values (1, 'again');
        insert into t values (3, '');
        insert into t values (4, null);
        selec 1;
        select * from t order by id \\gdesc
        select 1 as a, null as b, '' as c \\gx
        select format('select %L as made, %s as number', 'row ' || g, g) from generate_series(1, 3) g \\gexec
        begin; insert into t values (5, 'five'); savepoint s; select 1 / 0; rollback to s; commit;
        select count(*) from t;
        begin; select 1 / 0; select 1; commit;
        select 1\\; select 2\\; select 'three';
        do $$ begin raise notice 'a notice'; raise warning 'a warning'; end $$;
        listen drivers_libpq;
        notify drivers_libpq, 'payload';
        unlisten *;
        \\set FETCH_COUNT 100
        select sum(g) over (order by g) from generate_series(1, 1000) g offset 998;
        declare c cursor with hold for select generate_series(1, 10);
        fetch 3 from c; close c;
        prepare p as select $1::int * 2; execute p(21); deallocate p;
        \\d t
        \\errverbose
    """, "-P", "null=NULL")
    psql("session.stops", "select 1; select 1 / 0; select 2;", "-v", "ON_ERROR_STOP=1")
    psql("session.one transaction", "create table never_made (n int); select 1 / 0;", "-1", "-v", "ON_ERROR_STOP=1")
    psql("session.undone", "select to_regclass('never_made') is null;")


def copy(directory):
    rows = os.path.join(directory, "rows")
    back = os.path.join(directory, "back")
    with open(rows, "w", encoding="utf-8") as out:
        for number in range(100_000):
            out.write(f"{number}\trow {number} żółć 🐘\t\\N\n")
    psql("copy", f"""
        create temp table copied (id int, t text, n int);
        \\copy copied from '{rows}'
        \\copy (select * from copied order by id) to '{back}'
        \\copy copied to '{back}.bin' with (format binary)
        \\copy copied from '{back}.bin' with (format binary)
        select count(*), md5(string_agg(t, ',' order by id)) from copied;
        copy (select 1, 'x') to stdout with csv;
        \\copy copied from program 'echo not a number'
        copy copied from stdin;
7\tseven\t8
\\.
        \\copy (select 1 / (50000 - g) from generate_series(1, 60000) g) to '{back}.half'
        select 'still here', count(*) from copied;
    """)
    with open(rows, "rb") as one, open(back, "rb") as other:
        report("copy.same file", one.read() == other.read())


def pgbench():
    env = {"PGOPTIONS": "-c client_min_messages=warning"}
    done = subprocess.run(["pgbench", "-i", "-s", "1", "-q"], capture_output=True, text=True, timeout=4 * WAIT, env={**os.environ, **env})
    report("pgbench.init", done.returncode)
    for mode in ("simple", "extended", "prepared"):
        for what, options in (("tpcb", []), ("select", ["-S"]), ("connect", ["-S", "-C"])):
            count = 10 if what == "connect" else 50
            done = subprocess.run(["pgbench", "-n", "-M", mode, "-c", "4", "-j", "2", "-t", str(count), *options], capture_output=True, text=True, timeout=4 * WAIT)
            found = re.search(r"number of transactions actually processed: (.*)", done.stdout)
            failed = re.search(r"number of failed transactions: (.*)", done.stdout)
            report(f"pgbench.{mode}.{what}", (done.returncode, found and found[1], failed and failed[1]))
            if done.returncode != 0:
                report(f"pgbench.{mode}.{what}.err", done.stderr)
    script = "\\startpipeline\nselect 1;\nselect 2;\nselect :client_id;\n\\endpipeline\n"
    with tempfile.NamedTemporaryFile("w", suffix=".sql") as file:
        file.write(script)
        file.flush()
        done = subprocess.run(["pgbench", "-n", "-M", "prepared", "-c", "2", "-t", "50", "-f", file.name], capture_output=True, text=True, timeout=4 * WAIT)
        report("pgbench.pipeline", (done.returncode, re.findall(r"actually processed: (.*)", done.stdout)))
    psql("pgbench.sum", "select sum(abalance) = (select sum(tbalance) from pgbench_tellers), (select count(*) from pgbench_history) from pgbench_accounts;")


def dump(directory):
    # pgbench's accounts differ from run to run, so what is dumped is made here.
    psql("dump.made", """
        drop table if exists dumped;
        create table dumped (id int primary key, t text default 'x', b bytea, at timestamptz);
        insert into dumped select g, 'row żółć ' || g, decode(md5(g::text), 'hex'), timestamptz '2026-01-01 00:00+00' + g * interval '1 h' from generate_series(1, 5000) g;
        create index dumped_t on dumped (t); comment on table dumped is 'for pg_dump';
    """, "-q", env={"PGOPTIONS": "-c client_min_messages=warning"})
    text, _ = run("dump.plain", "pg_dump", "-t", "public.dumped", "--no-owner", "--no-privileges", lines=False)
    report("dump.plain.size", len(text))
    # Newer pg_dumps write a random key into \restrict.
    text = re.sub(r"(?m)^\\(un)?restrict .*$", "", text)
    report("dump.plain.md5", hashlib.md5(text.encode()).hexdigest())
    parallel = os.path.join(directory, "dump")
    run("dump.parallel", "pg_dump", "-t", "public.dumped", "-t", "public.pgbench_*", "-F", "d", "-j", "3", "-f", parallel)
    run("dump.schema", "pg_dump", "-s", "-t", "public.pgbench_*", "--no-owner", "--no-privileges", "-f", os.path.join(directory, "schema.sql"))
    psql("dump.dropped", "drop table dumped;")
    run("dump.restored", "pg_restore", "--no-owner", "--no-privileges", "-j", "2", "-t", "dumped", "-d", os.environ.get("PGDATABASE", "dbname="), parallel)
    psql("dump.checked", "select count(*), md5(string_agg(t || b::text || at::text, ',' order by id)) from dumped; drop table dumped;")
    run("dump.ready", "pg_isready", lines=False)


class Terminal:
    """psql as a person has it: on a terminal, where Ctrl-C is a key."""

    def __init__(self, *command):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execvp(command[0], command)
        self.seen = ""

    def type(self, text):
        os.write(self.fd, text.encode())

    def until(self, pattern):
        deadline = time.monotonic() + WAIT
        while not (found := re.search(pattern, self.seen)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{pattern!r} did not appear after {self.seen!r}")
            if select.select([self.fd], [], [], 0.1)[0]:
                self.seen += os.read(self.fd, 65536).decode()
        self.seen = self.seen[found.end():]
        return found

    def exit_code(self):
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def ctrl_c():
    terminal = Terminal("psql", "-X", "-n", "-q", "-A", "-t")
    terminal.type("select 'pid ' || pg_backend_pid();\n")
    pid = terminal.until(r"pid (\d+)\r")[1]
    for attempt in range(2):
        terminal.type("select pg_sleep(60);\n")
        # Whichever process it is: a pool may run each transaction at another one.
        watch = ["psql", "-X", "-A", "-t", "-c", "select wait_event from pg_stat_activity where state = 'active' and wait_event = 'PgSleep'"]
        deadline = time.monotonic() + WAIT
        while subprocess.run(watch, capture_output=True, text=True, timeout=WAIT).stdout.strip() != "PgSleep":
            if time.monotonic() > deadline:
                raise TimeoutError("psql never began to sleep")
            time.sleep(0.02)
        began = time.monotonic()
        terminal.type("\x03")
        report(f"ctrl-c.{attempt}.answer", terminal.until(r"ERROR:  [^\r\n]*")[0])
        report(f"ctrl-c.{attempt}.prompt", time.monotonic() - began < 5)
        terminal.type("select 'alive ' || 6 * 7, pg_backend_pid();\n")
        report(f"ctrl-c.{attempt}.same session", terminal.until(r"alive 42\|(\d+)")[1] == pid)
    terminal.type("\\q\n")
    report("ctrl-c.exit", terminal.exit_code())


def main():
    directory = tempfile.mkdtemp(prefix="drivers-libpq-")
    try:
        startup()
        session()
        copy(directory)
        pgbench()
        dump(directory)
        ctrl_c()
        psql("end.cleaned", "drop table pgbench_accounts, pgbench_branches, pgbench_history, pgbench_tellers;", "-q")
        report("end", "of the job")
    finally:
        shutil.rmtree(directory)


sys.exit(main())
