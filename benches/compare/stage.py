"""A throwaway Postgres with TLS, and every way to it, each a process of its own."""

import glob
import os
import pwd
import shutil
import signal
import socket
import subprocess
import time

TOKEN = "t" * 1100  # about as long as a database credential
ROLE, DATABASE = "app", "bench"


RESERVED = []  # the sockets of free_port(), bound until this program ends


def free_port():
    """A port that nothing else takes: Linux gives one that is bound to no other program by itself, and lets listeners with SO_REUSEADDR share it."""
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("", 0))
    RESERVED.append(reserved)
    return reserved.getsockname()[1]


def tool(*names):
    for name in names:
        found = shutil.which(name) or next(iter(sorted(glob.glob(f"/usr/lib/postgresql/*/bin/{name}"), reverse=True)), None)
        if found:
            return found
    return None


def _unprivileged():
    """Postgres and PgBouncer refuse to run as root."""
    if os.geteuid() != 0:
        return {}
    user = pwd.getpwnam("postgres")
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def run(*command, **more):
    more.setdefault("timeout", 300)
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more)
    if done.returncode:
        raise RuntimeError(f"{command[0]}: exit {done.returncode}\n{done.stdout}")
    return done.stdout


def wait_for_port(port, process, log, seconds=30):
    """Seconds until something listens there."""
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return time.perf_counter() - began
        except OSError:
            if process.poll() is not None:
                break
            time.sleep(0.001)
    with open(log) as output:
        raise RuntimeError(f"nothing listens on port {port}:\n{output.read()[-2000:]}")


class Process:
    """A program in the background; its output in a file."""

    def __init__(self, directory, name, command, port, prefix=(), **more):
        self.log = os.path.join(directory, f"{name}.log")
        with open(self.log, "w") as log:
            self.child = subprocess.Popen([*prefix, *map(str, command)], stdin=subprocess.DEVNULL, stdout=log, stderr=log, **more)
        self.pid, self.port = self.child.pid, port
        try:
            self.start_seconds = wait_for_port(port, self.child, self.log, 120 if prefix else 30)
        except RuntimeError:
            self.stop()
            raise

    def stop(self, how=signal.SIGTERM):
        if self.child.poll() is None:
            self.child.send_signal(how)
            try:
                self.child.wait(10)
            except subprocess.TimeoutExpired:
                self.child.kill()
                self.child.wait()


class Postgres:
    """The server: an RSA certificate, cleartext passwords over TLS as the endpoint requires them, room for a thousand."""

    def __init__(self, directory):
        self.port, self.directory = free_port(), os.path.join(directory, "postgres")
        os.mkdir(self.directory)
        os.chmod(directory, 0o755)
        self.authority = os.path.join(directory, "ca.pem")
        self._certificates(directory)
        self._user = _unprivileged()
        if self._user:
            for path in [self.directory, *glob.glob(os.path.join(directory, "server.*"))]:
                os.chown(path, self._user["user"], self._user["group"])
        data = os.path.join(self.directory, "data")
        run(tool("initdb"), "-D", data, "-U", "postgres", "-A", "trust", "-N", "--no-instructions", "-E", "UTF8", **self._as_user())
        with open(os.path.join(data, "pg_hba.conf"), "w") as rules:
            rules.write("local all postgres trust\nhostssl all all 127.0.0.1/32 password\nhost all all 127.0.0.1/32 password\n")
        settings = {
            "port": self.port, "listen_addresses": "127.0.0.1", "unix_socket_directories": self.directory, "ssl": "on",
            "ssl_cert_file": os.path.join(directory, "server.pem"), "ssl_key_file": os.path.join(directory, "server.key"),
            "max_connections": 1300, "fsync": "off", "synchronous_commit": "off", "shared_buffers": "128MB",
            "autovacuum": "off", "max_wal_senders": 0, "wal_level": "minimal", "log_min_messages": "fatal",
        }
        flags = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        self.process = Process(directory, "postgres", [tool("postgres"), "-D", data, *flags], self.port, **self._as_user())
        self.admin("postgres", f"CREATE ROLE {ROLE} LOGIN PASSWORD '{TOKEN}'", f"CREATE DATABASE {DATABASE} OWNER {ROLE}")
        self.admin(DATABASE, f"SET ROLE {ROLE}; CREATE UNLOGGED TABLE sink (row text)")

    def _as_user(self):
        return dict(self._user)

    def _certificates(self, directory):
        def path(name):
            return os.path.join(directory, name)

        openssl = tool("openssl")
        run(openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", path("ca.key"), "-out", self.authority,
            "-subj", "/CN=compare", "-days", "3")
        run(openssl, "req", "-newkey", "rsa:2048", "-nodes", "-keyout", path("server.key"), "-out", path("server.csr"), "-subj", "/CN=localhost")
        with open(path("server.ext"), "w") as extensions:
            extensions.write("subjectAltName=DNS:localhost\nextendedKeyUsage=serverAuth\n")
        run(openssl, "x509", "-req", "-in", path("server.csr"), "-CA", self.authority, "-CAkey", path("ca.key"), "-CAcreateserial",
            "-days", "3", "-extfile", path("server.ext"), "-out", path("server.pem"))
        os.chmod(path("server.key"), 0o600)

    def admin(self, database, *statements):
        for statement in statements:
            run(tool("psql"), "-XqAt", "-h", self.directory, "-p", self.port, "-U", "postgres", "-d", database, "-c", statement)

    def stop(self):
        self.process.stop(signal.SIGINT)


class Way:
    """One way to the server. `process` is what it costs; None for the direct one."""

    name = None
    user = {}

    def __init__(self, directory, server_port, authority, prefix=()):
        self.directory, self.server_port, self.authority, self.prefix = directory, server_port, authority, prefix
        self.process = None
        self.start()

    def conninfo(self):
        return f"host=127.0.0.1 port={self.process.port} dbname={DATABASE} user={ROLE} password={TOKEN} sslmode=disable gssencmode=disable"

    def stop(self):
        if self.process:
            self.process.stop()


class Direct(Way):
    """What the app would do itself: libpq, TLS, verify-full."""

    name = "direct TLS"

    def start(self):
        pass

    def conninfo(self):
        return (f"host=localhost hostaddr=127.0.0.1 port={self.server_port} dbname={DATABASE} user={ROLE} password={TOKEN} "
                f"sslmode=verify-full sslrootcert={self.authority} gssencmode=disable")


class Ours(Way):
    name = "lakebase-proxy"
    program = None

    def start(self):
        port = free_port()
        file = os.path.join(self.directory, f"proxy-{port}.toml")
        with open(file, "w") as settings:
            settings.write(f'[[endpoint]]\nhost = "localhost"\nport = {self.server_port}\nuser = "{ROLE}"\ndatabase = "{DATABASE}"\n'
                           f'credential = {{ password_env = "COMPARE_TOKEN" }}\nlisten = {port}\n')
        environment = {"PATH": os.environ["PATH"], "COMPARE_TOKEN": TOKEN, "PGSSLROOTCERT": self.authority}
        if self.prefix:  # exact counts are of one worker
            environment["TOKIO_WORKER_THREADS"] = "1"
        command = [self.program, "--http-port", "none", "--max-connections", "20000", "--config-file", file, *self.flags()]
        self.process = Process(self.directory, f"proxy-{port}", command, port, self.prefix, env=environment)


    def flags(self):
        return []


class Pooled(Ours):
    """The same with a pool."""

    name = "lakebase-proxy, auto"
    pool_mode, pool_size = "auto", 9000

    def flags(self):
        return ["--pool-mode", self.pool_mode, "--default-pool-size", str(self.pool_size)]


class FewPooled(Pooled):
    """For more clients than connections that keep them to their end."""

    pool_mode, pool_size = "session", 20


class FewAuto(Pooled):
    pool_size = 20


class Sharing(Pooled):
    name = "lakebase-proxy, transaction"
    pool_mode, pool_size = "transaction", 20


class PgBouncer(Way):
    name = "PgBouncer"
    pool_mode, pool_size = "session", 9000

    def start(self):
        port = free_port()
        file = os.path.join(self.directory, f"pgbouncer-{port}.ini")
        with open(file, "w") as settings:
            settings.write(
                f"[databases]\n{DATABASE} = host=localhost port={self.server_port} dbname={DATABASE} user={ROLE} password={TOKEN}\n"
                f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = any\npool_mode = {self.pool_mode}\n"
                f"max_client_conn = 20000\ndefault_pool_size = {self.pool_size}\nserver_round_robin = 0\nlog_connections = 0\nlog_disconnections = 0\n"
                f"server_tls_sslmode = verify-full\nserver_tls_ca_file = {self.authority}\nignore_startup_parameters = extra_float_digits\n")
        os.chmod(file, 0o644)
        self.user = _unprivileged()
        self.process = Process(self.directory, f"pgbouncer-{port}", [tool("pgbouncer"), file], port, self.prefix, **self.user)


class FewPgBouncer(PgBouncer):
    """For more clients than connections."""

    pool_size = 20


class SharingPgBouncer(FewPgBouncer):
    name = "PgBouncer, transaction"
    pool_mode = "transaction"


class Stunnel(Way):
    name = "stunnel"

    def start(self):
        port = free_port()
        file = os.path.join(self.directory, f"stunnel-{port}.conf")
        with open(file, "w") as settings:
            settings.write(f"foreground = yes\npid =\nsyslog = no\ndebug = 3\n[postgres]\nclient = yes\nprotocol = pgsql\n"
                           f"accept = 127.0.0.1:{port}\nconnect = 127.0.0.1:{self.server_port}\nCAfile = {self.authority}\n"
                           "verifyChain = yes\ncheckHost = localhost\n")
        self.process = Process(self.directory, f"stunnel-{port}", [tool("stunnel4", "stunnel"), file], port, self.prefix)


class Go(Way):
    """What Cloud SQL Auth Proxy's relay is made of; that proxy itself only goes to Google's servers."""

    name = "Go relay"

    def start(self):
        port = free_port()
        program = os.path.join(self.directory, "relay")
        if not os.path.exists(program):
            run(tool("go"), "build", "-o", program, os.path.join(os.path.dirname(os.path.abspath(__file__)), "relay.go"))
        command = [program, f"127.0.0.1:{port}", f"127.0.0.1:{self.server_port}", "localhost", self.authority]
        self.process = Process(self.directory, f"relay-{port}", command, port, self.prefix)


class ScriptedServer:
    """Thousands of sessions of a scripted server, in a separate process."""

    def __init__(self, program, directory):
        self.directory = os.path.join(directory, "scripted")
        os.mkdir(self.directory)
        os.chmod(self.directory, 0o755)
        self.child = subprocess.Popen([program, "scripted-upstream", self.directory], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.port = int(self.child.stdout.readline())
        self.authority = os.path.join(self.directory, "ca.pem")

    def stop(self):
        self.child.kill()
        self.child.wait()
