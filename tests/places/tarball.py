#!/usr/bin/env python3
"""The tarball and the image's root file system, each in a chroot that holds nothing else, run as a user without rights.

    tests/places/tarball.py --dist DIR

DIR is what `deploy/build` made. Needs root for the chroot; prints that and skips it otherwise. In each the program must
serve clients over verified TLS, refuse a certificate it cannot trust, print a hint if no roots are installed, and
resolve names as the machine would. A release's tarball gets a root with not even a C library in it.
"""

import argparse
import contextlib
import hashlib
import os
import pathlib
import subprocess
import sys
import tarfile

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import names
from place import own_network
from stage import ROOT, call, clean_environment, free_port, listening, scratch_directory, start, until

USER = 65532
# The addresses of each, and how it comes by them: the search list, IPv6 alone, an answer too long for UDP, /etc/hosts.
NAMES = {"db.lakebase.test": ["127.0.0.1", "::1"], "six.lakebase.test": ["::1"], "long.lakebase.test": ["127.0.0.1"]}
RESOLVED = {"db": ("127.0.0.1", "::1"), "six": ("::1",), "long": ("127.0.0.1",), "listed": ("127.0.0.1",)}
EXPECTED = (
    "bin/lakebase-proxy",
    "share/bash-completion/completions/lakebase-proxy",
    "share/fish/vendor_completions.d/lakebase-proxy.fish",
    "share/zsh/site-functions/_lakebase-proxy",
    "share/man/man1/lakebase-proxy.1",
    "share/man/man1/lakebase-proxy-exec.1",
    "share/lakebase-proxy/lakebase-proxy.toml",
    "share/lakebase-proxy/sql/01-role.sql",
    "share/doc/lakebase-proxy/INSTALL.md",
    "share/doc/lakebase-proxy/LICENSE-MIT",
    "lib/systemd/system/lakebase-proxy.service",
    "lib/systemd/system/lakebase-proxy.socket",
)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dist", type=pathlib.Path, required=True)
    dist = parser.parse_args().dist
    passed = checksums(dist)
    (archive,) = dist.glob("*-x86_64-linux*.tar.gz")
    passed += contents(archive)
    if os.geteuid() != 0:
        print("only root may chroot: the two roots are not tried")
        print(f"\ntarball: {passed} passed, 0 failed, 2 skipped")
        return
    own_network()
    with contextlib.ExitStack() as stack:
        stack.enter_context(names.serving(NAMES, only_tcp={"long.lakebase.test"}))
        scratch = scratch_directory(stack)
        os.chmod(scratch, 0o755)
        unpacked = scratch / "unpacked"
        with tarfile.open(archive) as tar:
            tar.extractall(unpacked, filter="data")
        (top,) = unpacked.iterdir()
        program = top / "bin/lakebase-proxy"
        # What is named for no C library needs none.
        static = archive.name.endswith("-linux.tar.gz")
        passed += linked(program, static)
        env_file = scratch / "emulator.env"
        emulator = start(stack, "tarball-emulator", [program, "emulator", "--env-file", env_file], clean_environment())
        until("the emulator to be ready", lambda: env_file.exists() or None, emulator)
        variables = dict(line.split("=", 1) for line in env_file.read_text().splitlines())

        image = scratch / "image"
        call(ROOT / "deploy/docker/rootfs", program, image)
        passed += tried("image", image, "/usr/bin/lakebase-proxy", variables)

        # Less than any distribution: what the tarball holds, and the C library if the program names one.
        bare = scratch / "bare"
        if static:
            (bare / "etc").mkdir(parents=True)
        else:
            call(ROOT / "deploy/docker/rootfs", program, bare)
            for name in ("usr/bin/lakebase-proxy", "etc/ssl/certs/ca-certificates.crt"):
                (bare / name).unlink()
        (bare / "usr/local").mkdir(parents=True)
        call("cp", "-a", f"{top}/.", bare / "usr/local")
        passed += tried("tarball", bare, "/usr/local/bin/lakebase-proxy", variables)
    print(f"\ntarball: {passed} passed, 0 failed")


def checksums(dist):
    lines = (dist / "SHA256SUMS").read_text().splitlines()
    for line in lines:
        digest, name = line.split()
        expect(hashlib.sha256((dist / name).read_bytes()).hexdigest() == digest, f"the checksum of {name}")
    expect({line.split()[1] for line in lines} == {file.name for file in dist.iterdir()} - {"SHA256SUMS"}, "every file has a checksum")
    return 1


def contents(archive):
    with tarfile.open(archive) as tar:
        entries = tar.getmembers()
    top = archive.name.removesuffix(".tar.gz")
    names = {entry.name.removeprefix(f"{top}/") for entry in entries}
    missing = [name for name in EXPECTED if name not in names]
    expect(not missing, f"{archive.name} lacks {missing}")
    expect(all(entry.name.startswith(f"{top}/") and entry.uid == entry.gid == 0 and entry.mode in (0o644, 0o755) for entry in entries), "everything is below one folder, and root's")
    return 1


def linked(program, static):
    """Whether the kernel alone can start it."""
    headers, needed = (output("readelf", "--wide", option, program) for option in ("--program-headers", "--dynamic"))
    needs = [line for line in (*headers.splitlines(), *needed.splitlines()) if "INTERP" in line or "(NEEDED)" in line]
    expect(bool(needs) != static, f"{program.name} {'needs' if needs else 'needs nothing'} at start: {needs}")
    print("statically linked" if static else "linked to this machine's C library")
    return 1


def tried(what, root, program, variables):
    # What a container's runtime puts there.
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n::1 localhost\n127.0.0.1 listed\n")
    (root / "etc/resolv.conf").write_text("nameserver 127.0.0.1\nsearch elsewhere.test lakebase.test\n")
    authority = root / "authority.pem"
    authority.write_bytes(pathlib.Path(variables["PGSSLROOTCERT"]).read_bytes())
    authority.chmod(0o644)
    before = files(root)

    def jail():
        os.chroot(root)
        os.chdir("/")
        os.setgroups([])
        os.setgid(USER)
        os.setuid(USER)

    def run(*arguments, environment=None, limit=60):
        return subprocess.run([program, *map(str, arguments)], env=environment or {}, preexec_fn=jail, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit)

    passed = 0
    result = run("--version")
    expect(result.returncode == 0 and result.stdout.startswith("lakebase-proxy "), result.stdout)
    passed += 1

    roots = root / "etc/ssl/certs/ca-certificates.crt"
    # Where the system has none, the workspace's certificate is judged by those that this variable names.
    named = {} if roots.exists() else {"SSL_CERT_FILE": "/authority.pem"}
    base = {name: value for name, value in variables.items() if name != "PGSSLROOTCERT"}
    with serving(what, program, base | named | {"PGSSLROOTCERT": "/authority.pem"}, jail) as (port, http):
        notes = psql(port)
        expect(notes == (0, "3"), f"{what}: {notes}")
        expect(run("wait", "--max", "5s", "--http-port", http).returncode == 0, f"{what}: the health check")
        passed += 2
    expect(run("wait", "--max", "1s", "--http-port", free_port()).returncode == 1, f"{what}: the health check of nothing")
    passed += 1

    for host, addresses in RESOLVED.items():
        result = run("doctor", environment=base | named | {"PGSSLROOTCERT": "/authority.pem", "PGHOST": host}).stdout
        line = next((line for line in result.splitlines() if "endpoint DNS" in line), result)
        expect(" ok " in line and set(line.partition(f"{host} is ")[2].replace(",", " ").split()) == set(addresses), f"{what}: {host}: {line}")
        passed += 1

    if not roots.exists():
        roots.parent.mkdir(parents=True, exist_ok=True)
        roots.write_bytes(pathlib.Path("/etc/ssl/certs/ca-certificates.crt").read_bytes())
    # The emulator's authority is none that the world trusts.
    with serving(what, program, base, jail) as (port, _):
        code, printed = psql(port)
        expect(code == 2 and "certificate" in printed and "HINT" in printed, f"{what}: a certificate that is not trusted: {printed}")
        passed += 1

    roots.unlink()
    result = run("serve", "--port", "0", "--http-port", "none", environment=base)
    expect(result.returncode == 1 and "ca-certificates" in result.stdout and "SSL_CERT_FILE" in result.stdout, f"{what}: without roots: {result.returncode}\n{result.stdout}")
    print(f"{what}: without roots it prints\n  " + "\n  ".join(result.stdout.strip().splitlines()[-2:]))
    passed += 1
    expect(files(root) - {roots, *roots.parents} <= before, f"{what}: it wrote {files(root) - before}")
    size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    print(f"{what}: {passed} passed; a root of {size:,} bytes")
    return passed


@contextlib.contextmanager
def serving(what, program, environment, jail):
    port, http = free_port(), free_port()
    with contextlib.ExitStack() as stack:
        proxy = start(stack, f"tarball-{what}", [program, "serve", "--port", port, "--http-port", http], environment, preexec_fn=jail)
        until("the proxy to be ready", lambda: listening(port), proxy)
        yield port, http


def psql(port):
    done = subprocess.run(["psql", f"host=localhost port={port} user=app", "-Atc", "select count(*) from notes"], env=clean_environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)
    return done.returncode, done.stdout.strip()


def output(*command):
    return subprocess.run([str(part) for part in command], check=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True).stdout


def files(root):
    return {path for path in root.rglob("*")}


def expect(holds, what):
    if not holds:
        raise SystemExit(f"not so: {what}")


if __name__ == "__main__":
    main()
