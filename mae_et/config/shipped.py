"""Finds configs: a file, or the name of a config that comes with the package, e.g. "demo" or "detection/demo"."""

from __future__ import annotations

import difflib
import logging
from pathlib import Path

import mae_et
from mae_et.errors import ConfigError

log = logging.getLogger(__name__)


def shipped_folder() -> Path:
    """Returns the folder of the shipped configs: inside the installed package, or configs/ of a checkout."""
    package = Path(mae_et.__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def shipped_configs() -> dict[str, Path]:
    """Returns the files of the shipped configs by name, e.g. "pretrain/demo"; base files (`_base_`) are left out."""
    root = shipped_folder()
    files = sorted(path for path in root.glob("*/*.py") if not path.parent.name.startswith("_"))
    return {f"{path.parent.name}/{path.stem}": path for path in files}


def find_config(name: str | Path, kinds: tuple[str, ...]) -> Path:
    """Returns the file of a config.

    Args:
        name: a file; or a shipped config as "demo", "pretrain/demo" or "configs/pretrain/demo.py". An existing file comes
            first. A name without a folder is looked up in `kinds`, then in all folders if only one has it: the check of its
            content says what runs it.
        kinds: the folders of the configs that the caller runs, e.g. ("detection", "segmentation").
    Raises:
        ConfigError: if there is no such config, or several have the name. The message lists the candidates.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = shipped_configs()
    parts = (path.with_suffix("") if path.suffix == ".py" else path).parts
    wanted = "/".join(parts[1:] if parts[:1] == ("configs",) else parts)
    if "/" in wanted:
        found = [wanted] if wanted in shipped else []
    else:
        same_name = [key for key in shipped if key.rpartition("/")[2] == wanted]
        found = [key for key in same_name if key.startswith(tuple(f"{kind}/" for kind in kinds))]
        found = found or (same_name if len(same_name) == 1 else [])
    if len(found) > 1:
        raise ConfigError([f"{len(found)} shipped configs have this name: {_some(found)}. Give one of them"], str(name))
    if not found:
        fault = _folder(path) if path.is_dir() else _missing(path, kinds, shipped)
        raise ConfigError([fault], str(name))
    log.info("config: %s", shipped[found[0]])
    return shipped[found[0]]


def _folder(path: Path) -> str:
    configs = sorted(str(config) for config in path.glob("*.py"))
    holds = (
        f"one of its files: {_some(configs)}" if configs else "a Python config or the name of a shipped one, e.g. demo"
    )
    return f"is a folder, not a config file; give {holds}"


def _missing(path: Path, kinds: tuple[str, ...], shipped: dict[str, Path]) -> str:
    """Returns a message for a config that was not found: similar files for a path, similar names for a name."""
    own = [name for name in shipped if name.startswith(tuple(f"{kind}/" for kind in kinds))]
    if path.suffix == ".py":
        by_name = {config.name: str(config) for config in (*Path("configs").glob("**/*.py"), *path.parent.glob("*.py"))}
        near = [by_name[name] for name in difflib.get_close_matches(path.name, by_name, n=3)]
        hint = (
            f"did you mean {_some(near)}?"
            if near
            else "give the full path of the file, or the name of a shipped config"
        )
        return f"no such file: {path.absolute()} (the current folder is {Path.cwd()}); {hint}"
    with_folder = {name: name for name in shipped}
    by_stem = {name.rpartition("/")[2]: name for name in (*shipped, *own)}  # own configs win
    known = with_folder if len(path.parts) > 1 else by_stem
    if elsewhere := [name for name in shipped if name.rpartition("/")[2] == str(path)]:
        near = [name for name in own if path.stem in name.rpartition("/")[2]]
        hint = f"did you mean {_some(near)}?" if near else f"shipped configs: {_some(own)}"
        return f"{_some(elsewhere)} are for other commands; {hint}"
    near = [known[key] for key in difflib.get_close_matches(str(path), known, n=3)]
    hint = f"did you mean {_some(near)}?" if near else f"shipped configs: {_some(own)}"
    return f"no config has this name, and no such file: {path.absolute()}; {hint}"


def _some(names: list[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
