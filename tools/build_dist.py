"""Wheel and sdist, the same bytes every time: times, owners and order come from the commit, not from the machine.

python tools/build_dist.py OUT     # SOURCE_DATE_EPOCH is taken if it is set, else the time of the last commit
"""

from __future__ import annotations

import argparse
import gzip
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD = "import sys, setuptools.build_meta as b; out = sys.argv[1]; b.build_sdist(out); b.build_wheel(out)"


def build(source: Path, out: Path, epoch: int) -> list[Path]:
    """Build the files that git tracks in `source` into the folder `out`; returns wheel and sdist."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "source"
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=source, capture_output=True, check=True).stdout
        for name in sorted(filter(None, listed.decode().split("\0"))):
            target = copy / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target)
            target.chmod(0o644)
        environment = {**os.environ, "SOURCE_DATE_EPOCH": str(epoch), "PYTHONHASHSEED": "0"}
        built = Path(folder) / "built"
        built.mkdir()
        command = [sys.executable, "-c", BUILD, str(built)]
        done = subprocess.run(command, cwd=copy, env=environment, umask=0o022, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
        shutil.copyfile(wheel, out / wheel.name)
        (out / sdist.name).write_bytes(_settled(sdist, epoch))
    return [out / wheel.name, out / sdist.name]


def _settled(sdist: Path, epoch: int) -> bytes:
    """The archive with its members in order, all of one time and of nobody: setuptools keeps those of the machine."""
    packed = io.BytesIO()
    with (
        tarfile.open(sdist) as source,
        gzip.GzipFile(fileobj=packed, mode="wb", filename="", mtime=epoch) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as target,
    ):
        for member in sorted(source.getmembers(), key=lambda member: member.name):
            content = source.extractfile(member) if member.isfile() else None
            member.mtime, member.uid, member.gid, member.uname, member.gname = epoch, 0, 0, "", ""
            member.mode, member.pax_headers = (0o755 if member.isdir() else 0o644), {}
            target.addfile(member, content)
    return packed.getvalue()


def commit_time(source: Path) -> int:
    """Seconds since 1970 of the last commit."""
    done = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=source, capture_output=True, check=True)
    return int(done.stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    for path in build(ROOT, arguments.out, commit_time(ROOT) if epoch is None else int(epoch)):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
