"""Builds and checks the wheel and the source distribution in dist/: `make release`. It uploads nothing.

The wheel is built from the source distribution, so a file that is missing there is missing in both. Checked are the metadata,
the files, and that version and changelog agree.
"""

from __future__ import annotations

import argparse
import datetime
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

import _checkout  # noqa: F401
from packaging.metadata import Metadata

import mae_et
from mae_et.cli import run_tool
from mae_et.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
FOLDERS = ("mae_et", "downstream", "configs")  # packaged
TOP = ("README.md", "LICENSE", "pyproject.toml", "setup.py")  # of the source distribution
SUFFIXES = {".py", ".typed", ".j2", ".css", ".js", ".json"}


def main(args: argparse.Namespace) -> None:
    dist = REPOSITORY / "dist"
    for folder in (dist, REPOSITORY / "build"):
        shutil.rmtree(folder, ignore_errors=True)
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(dist)!r})"
    run([sys.executable, "-c", build])
    (source,) = dist.glob("*.tar.gz")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(dist), str(source)])
    (wheel,) = dist.glob("*.whl")

    faults = [
        *archive_faults(source, wheel),
        *changelog_faults((REPOSITORY / "CHANGELOG.md").read_text(), mae_et.__version__),
    ]
    print(f"built: {source.relative_to(REPOSITORY)}, {wheel.relative_to(REPOSITORY)}")
    if faults:
        raise UserError("not ready to publish:\n" + "\n".join(f"  - {fault}" for fault in faults))
    print("checked: metadata, files, version and changelog")


def run(command: list[str]) -> None:
    """Runs a command quietly; its output is the message if it fails."""
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command[:4])} ... failed:\n{done.stdout}{done.stderr}")


def archive_faults(source: Path, wheel: Path) -> list[str]:
    """Returns what is wrong with the two archives."""
    wanted = {
        path.relative_to(REPOSITORY).as_posix()
        for folder in FOLDERS
        for path in (REPOSITORY / folder).rglob("*")
        if path.suffix in SUFFIXES and "__pycache__" not in path.parts
    }
    with tarfile.open(source) as archive:
        root = source.name.removesuffix(".tar.gz")
        names = {name.removeprefix(f"{root}/") for name in archive.getnames()}
        packed = archive.extractfile(f"{root}/PKG-INFO")
        assert packed is not None
        metadata = {source.name: packed.read()}
    faults = missing(source.name, names, wanted | set(TOP))
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata[wheel.name] = archive.read(next(name for name in names if name.endswith(".dist-info/METADATA")))
    installed = {f"mae_et/{name}" if name.startswith("configs/") else name for name in wanted}
    faults += missing(wheel.name, names, installed)
    for name, data in metadata.items():
        faults += [f"{name}: {fault}" for fault in metadata_faults(data)]
    return faults


def missing(archive: str, names: Iterable[str], wanted: Iterable[str]) -> list[str]:
    """Returns a fault that names the wanted files that an archive lacks, if there are any."""
    lacking = sorted(set(wanted) - set(names))
    more = f" and {len(lacking) - 5} more" if len(lacking) > 5 else ""
    return [f"{archive} lacks {', '.join(lacking[:5])}{more}"] if lacking else []


def metadata_faults(data: bytes) -> list[str]:
    """Returns what a package index would refuse in the metadata of a distribution, by the validator of packaging."""
    try:
        metadata = Metadata.from_email(data, validate=True)
    except Exception as error:  # a group of all faults; ExceptionGroup is a name of Python 3.11
        return [str(fault) for fault in getattr(error, "exceptions", [error])]
    faults = []
    if str(metadata.version) != mae_et.__version__:
        faults.append(f"it has version {metadata.version}, but mae_et.__version__ is {mae_et.__version__}")
    if not metadata.description or metadata.description_content_type != "text/markdown":
        faults.append("it has no description in Markdown: set project.readme in pyproject.toml")
    return faults


def changelog_faults(text: str, version: str) -> list[str]:
    """Returns how a changelog and a version disagree.

    The newest section must be that of the version, with its date; of a development version (1.0.dev0), "Unreleased".
    """
    heading = re.search(r"^## \[(.+?)\](?: - (.+))?$", text, re.MULTILINE)
    fix = (
        f"name it `## [{version}] - {datetime.date.today().isoformat()}`, or correct __version__ in mae_et/__init__.py"
    )
    if heading is None:
        return [f"CHANGELOG.md has no section: write one and {fix}"]
    name, date = heading.groups()
    if ".dev" in version and name == "Unreleased":
        return []
    if name != version:
        return [f"the newest section of CHANGELOG.md is [{name}], but the version is {version}: {fix}"]
    try:
        datetime.date.fromisoformat(date or "")
    except ValueError:
        return [f"the section [{version}] of CHANGELOG.md has no date (YYYY-MM-DD): {fix}"]
    return []


def make_parser() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)


if __name__ == "__main__":
    run_tool(main, make_parser())
