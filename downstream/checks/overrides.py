"""Reads --cfg-options as they are written, and refuses those that would have no effect."""

from __future__ import annotations

import ast
import difflib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import mmengine.registry
from mmengine.config import Config
from mmengine.registry import Registry
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from mae_et.errors import ConfigError

# What the runner and our tools read of a config; other names of a file are its own variables.
READ = {
    *inspect.signature(Runner.__init__).parameters,
    "custom_imports", "tta_model", "tta_pipeline", "activation_checkpointing", "efficient_conv_bn_eval", "compile",
    "model_wrapper_cfg",
} - {"self", "cfg"}  # fmt: skip
# What mmengine takes out of a section before it builds the class that `type` names.
OF_MMENGINE = {
    "type", "_delete_", "_scope_", "priority", "constructor", "paramwise_cfg", "optimizer", "convert_to_iter_based", "by_epoch",
}  # fmt: skip
OF_LOADERS = {*inspect.signature(DataLoader.__init__).parameters, "num_batch_per_epoch", "indices"}
HINTS = {"pretrained": "a backbone file goes to --backbone"}
CONSTANTS = {"true": True, "false": False, "none": None, "null": None}
ALIKE = 0.85  # a new key as close as this to a known one is a typing error
_UNEXPECTED = re.compile(r"(\w+)(?:\.__init__)?\(\) got an unexpected keyword argument '(\w+)'")


def apply_overrides(config: Config, overrides: Mapping[str, Any] | Sequence[str]) -> None:
    """Merges overrides into a config, in place.

    Args:
        config: as read from its file.
        overrides: words KEY=VALUE as typed, or dotted keys with values that are taken as they are.
    Raises:
        ConfigError: naming those that cannot be read or would have no effect.
    """
    faults, values = [], {}
    pairs: list[tuple[str, Any]] = [*overrides.items()] if isinstance(overrides, Mapping) else []
    for word in [] if isinstance(overrides, Mapping) else overrides:
        key, equals, text = word.partition("=")
        if not equals or not key:
            faults.append(f"{word!r} is not of the form KEY=VALUE; quote values with spaces: 'KEY=two words'")
        else:
            pairs.append((key, parse_value(text, _current(config, key))))
    # New types come first: the other keys of their sections are those of the new classes.
    for key, value in sorted(pairs, key=lambda pair: not pair[0].endswith(".type")):
        if fault := _fault(config, key):
            faults.append(fault)
        elif key.endswith(".type"):
            config.merge_from_dict({key: value})
        else:
            values[key] = value
    if faults:
        raise ConfigError(faults, "--cfg-options")
    config.merge_from_dict(values)


def parse_value(text: str, current: Any) -> Any:
    """Returns the value of an override.

    Args:
        text: as typed.
        current: the value that it replaces. Text stays text; anything else is read as Python where that is possible.
    """
    if isinstance(current, str):
        return text
    if text.lower() in CONSTANTS:
        return CONSTANTS[text.lower()]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = text
    if isinstance(value, tuple) and not text.startswith("("):
        return list(value)
    is_list_of_words = value is text and (
        isinstance(current, (list, tuple)) or (text[:1] in "[(" and text[-1:] in "])")
    )
    if is_list_of_words:
        inner = text[1:-1] if text[:1] in "[(" and text[-1:] in "])" else text
        return [parse_value(part.strip(), None) for part in inner.split(",") if part.strip()]
    return value


def explain_unknown_key(config: Config, error: TypeError) -> ConfigError | None:
    """Turns Python's message about an unexpected argument into one that names the key; None for other errors."""
    match = _UNEXPECTED.search(str(error))
    if match is None:
        return None
    kind, key = match.groups()
    place, cls = key, _find_class(kind, config)
    for section, node in _sections(config._cfg_dict, ""):
        candidate = _find_class(_kind(node), config) if key in node else None
        if candidate is not None and kind in (base.__name__ for base in candidate.__mro__):  # it may hand the key on
            place, cls = f"{section}.{key}", candidate
            break
    names = _parameters(cls)[0]
    fault = f"{place}: {_unknown(key, cls.__name__ if cls else kind, names)}"
    return ConfigError([fault], str(config.filename or "config"))


def _fault(config: Config, key: str) -> str:
    """Returns why an override would have no effect, or ""."""
    first, *rest = key.split(".")
    if first not in READ:
        if first in config:
            return (
                f"{key}: {first!r} is a variable within the file, which was read before. Set what was made of it, e.g. "
                "train_dataloader.dataset.data_root, or write a config with this one as its _base_"
            )
        return f"{key}: unknown key {first!r}{_nearest(first, READ)}"
    node, place = config.get(first), first
    for part in rest:
        if isinstance(node, Mapping):
            if part not in node:
                fault = _fault_of_section(config, node, part, place)
                return f"{key}: {fault}" if fault else ""
            node = node[part]
        elif isinstance(node, (list, tuple)):
            if not part.isdecimal() or int(part) >= len(node):
                return (
                    f"{key}: {place} is a list of {len(node)} entries, so {part!r} must be a number below {len(node)}"
                )
            node = node[int(part)]
        elif node is not None:
            return f"{key}: {place} = {node!r} is a value, it has no key {part!r}"
        place += f".{part}"
    return ""


def _fault_of_section(config: Config, node: Mapping[str, Any], key: str, place: str) -> str:
    names, is_open = {*node}, True
    kind = _kind(node)
    if kind:
        parameters, is_open = _parameters(_find_class(kind, config))
        names |= parameters | OF_MMENGINE
        if kind == "OptimWrapper":  # --amp replaces it
            names |= _parameters(_find_class("AmpOptimWrapper", config))[0]
    elif place.endswith("_dataloader"):
        names, is_open = names | OF_LOADERS, False
    close = difflib.get_close_matches(key, names, 1, ALIKE)
    if key in names or (is_open and not close):
        return ""
    return _unknown(key, kind or place, names - OF_MMENGINE)


def _unknown(key: str, kind: str, names: set[str]) -> str:
    hint = f"; {HINTS[key]}" if key in HINTS else _nearest(key, names)
    known = ", ".join(sorted(name for name in names if not name.startswith("_")))
    return f"{kind} has no key {key!r}{hint}" + (f" (known: {known})" if known else "")


def _nearest(key: str, names: set[str]) -> str:
    close = difflib.get_close_matches(key, sorted(names), 1, 0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def _kind(node: Mapping[str, Any]) -> str:
    """Returns the name of the class that a section builds, without its scope; "" if it builds none."""
    kind = node.get("type")
    return (kind if isinstance(kind, str) else getattr(kind, "__name__", "")).rpartition(".")[2]


def _find_class(name: str, config: Config) -> type | None:
    """Looks a class up in all registries, in the scope of the config."""
    for registry in vars(mmengine.registry).values():
        if isinstance(registry, Registry):
            with registry.switch_scope_and_registry(config.get("default_scope")) as local:
                found = local.get(name)
            if isinstance(found, type):
                return found
    return None


def _parameters(cls: type | None) -> tuple[set[str], bool]:
    """Returns the arguments of a class, with those that it hands on, and whether it takes any others."""
    if cls is None:
        return set(), True
    names: set[str] = set()
    for base in cls.__mro__[:-1]:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(base.__init__).parameters.values()  # type: ignore[misc]
        names |= {x.name for x in parameters if x.kind not in (x.VAR_KEYWORD, x.VAR_POSITIONAL)} - {"self"}
        if not any(x.kind == x.VAR_KEYWORD for x in parameters):
            return names, False
    return names, True


def _current(config: Config, key: str) -> Any:
    node: Any = config._cfg_dict
    for part in key.split("."):
        if isinstance(node, Mapping):
            node = node.get(part)
        elif isinstance(node, (list, tuple)) and part.isdecimal() and int(part) < len(node):
            node = node[int(part)]
        else:
            return None
    return node


def _sections(node: Any, place: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Finds all dicts of a config with their dotted places."""
    if isinstance(node, Mapping):
        yield place, node
        for key, value in node.items():
            yield from _sections(value, f"{place}.{key}" if place else key)
    elif isinstance(node, (list, tuple)):
        for index, value in enumerate(node):
            yield from _sections(value, f"{place}.{index}")
