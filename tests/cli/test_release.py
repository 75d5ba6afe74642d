"""What `make release` checks, the Dockerfile, and the shell completion."""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
import subprocess
import sys

import pytest

from mae_et.commands.completion import completion
from mae_et.errors import UserError
from tests.cli.commands import COMMANDS, project
from tests.conftest import REPOSITORY, load_tool

DOCKERFILE = (REPOSITORY / "Dockerfile").read_text()


@pytest.mark.parametrize(
    ("heading", "version", "fault"),
    [
        ("## [1.2.0] - 2026-02-03", "1.2.0", None),
        ("## [Unreleased]", "1.3.0.dev0", None),
        ("## [Unreleased]", "1.2.0", r"newest section of CHANGELOG.md is \[Unreleased\]"),
        ("## [1.1.0] - 2026-02-03", "1.2.0", r"is \[1.1.0\], but the version is 1.2.0"),
        ("## [1.2.0]", "1.2.0", "no date"),
        ("## [1.2.0] - soon", "1.2.0", "no date"),
        ("text", "1.2.0", "no section"),
    ],
)
def test_release__version_and_changelog_agree(heading: str, version: str, fault: str | None) -> None:
    older = "" if heading == "text" else "## [0.1.0] - 2025-01-01\n"
    faults = load_tool("release").changelog_faults(f"# Changelog\n\n{heading}\n\n{older}", version)
    assert bool(faults) == bool(fault)
    assert fault is None or re.search(fault, faults[0])


def test_release__metadata_that_an_index_refuses_is_named() -> None:
    release = load_tool("release")
    version = release.mae_et.__version__
    good = f"Metadata-Version: 2.1\nName: mae_et\nVersion: {version}\nDescription-Content-Type: text/markdown\n\n# mae_et\n"
    assert release.metadata_faults(good.encode()) == []
    assert "no description" in release.metadata_faults(good.replace("# mae_et\n", "").encode())[0]
    assert "9.9" in release.metadata_faults(good.replace(version, "9.9").encode())[0]
    assert release.metadata_faults(good.replace("Name: mae_et", "Name: -bad-").encode())
    assert release.missing("a.whl", {"x"}, {"x", "y"}) == ["a.whl lacks y"]


def ignored(path: str) -> bool:
    """Returns whether .dockerignore leaves a path out of the build context."""
    patterns = [line for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    parts = path.strip("./").split("/")
    return any(fnmatch.fnmatch(part, pattern.removeprefix("**/")) for pattern in patterns for part in parts)


def test_dockerfile__copies_files_that_exist_and_starts_a_command_that_exists() -> None:
    copied = [words.split() for words in re.findall(r"^COPY (.+)$", DOCKERFILE, re.MULTILINE)]
    sources = {source for words in copied for source in words[:-1]}
    assert {"mae_et", "downstream", "configs", "pyproject.toml", "setup.py"} <= sources
    for source in sources:
        assert (REPOSITORY / source).exists(), source
        assert not ignored(source), source
    assert ignored("docs")
    assert ignored("mae_et/__pycache__")
    (entry,) = re.findall(r"^ENTRYPOINT (.+)$", DOCKERFILE, re.MULTILINE)
    assert json.loads(entry)[0] in project()["scripts"]
    assert project()["readme"] in sources  # setuptools reads it


def test_dockerfile__scripts_parse_and_a_cpu_image_installs_no_cuda() -> None:
    joined = re.sub(r"\\\n", "", DOCKERFILE)
    for script in re.findall(r"^RUN (.+)$", joined, re.MULTILINE):
        subprocess.run(["sh", "-n", "-c", script], check=True, timeout=10)
    wanted, left_out = re.findall(r"grep -v?E '(.+?)' requirements.txt", joined)
    lines = (REPOSITORY / "requirements.txt").read_text().splitlines()
    assert [line.split("==")[0] for line in lines if re.match(wanted, line)] == ["torch", "torchvision"]
    kept = [line for line in lines if not re.match(left_out, line)]
    assert not [line for line in kept if re.match(r"cuda|nvidia|triton", line)]
    assert len(kept) > 40


@pytest.fixture(scope="module")
def script() -> str:
    pytest.importorskip("shtab")
    return completion("bash", [COMMANDS["pretrain"], COMMANDS["stats"]])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["mae-et", "pre"], {"pretrain"}),
        (["mae-et", "pretrain", "pretrain/phot"], {"pretrain/photos"}),
        (["mae-et", "pretrain", "photos", "--work"], {"--work-dir"}),
        (["mae-et", "pretrain", "photos", "--device", "c"], {"cpu", "cuda"}),
    ],
)
def test_completion__in_bash(script: str, words: list[str], expected: set[str]) -> None:
    if shutil.which("bash") is None:
        pytest.skip("no bash")
    ask = f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _shtab_mae_et; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(
        ["bash", "-c", f"{script}\n{ask}"], capture_output=True, text=True, timeout=20, cwd=REPOSITORY
    )
    assert set(done.stdout.split()) == expected, done.stderr


def test_completion__zsh_names_commands_and_configs() -> None:
    pytest.importorskip("shtab")
    text = completion("zsh", [COMMANDS["stats"], COMMANDS["pretrain"]])
    assert text.startswith("#compdef mae-et")
    assert "_mae_et_configs" in text
    assert "pretrain/photos" in text


def test_completion__without_shtab_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(UserError, match=r"pip install 'mae_et\[completion\]'"):
        completion("bash", [])
