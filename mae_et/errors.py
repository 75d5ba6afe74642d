"""Errors that a user can fix. Commands print them as one message and exit with their code; any other error is a bug."""


class UserError(ValueError):
    """An error that the user can fix: the message has what is wrong, with the value, and how to fix it."""

    exit_code = 1


class ConfigError(UserError):
    """All faults of one config at once.

    Args:
        faults: one line each, with the key, the value and what is allowed.
        where: the config's path, or what was read.
    """

    exit_code = 2

    def __init__(self, faults: list[str], where: str = "config") -> None:
        self.faults = list(faults)
        many = "1 fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        super().__init__(f"{where}: {many}\n" + "\n".join(f"  - {fault}" for fault in self.faults))


class DataError(UserError):
    """Missing, empty or unreadable data."""


class CheckpointError(UserError):
    """A file that is no checkpoint, is damaged, or belongs to another model."""


class NonFiniteError(UserError):
    """A loss or gradient that is NaN or infinite; raised before the update."""


class StoppedEarly(UserError):
    """SIGTERM or Ctrl-C: the state is saved and `--resume` continues from it. Exit code 75 (EX_TEMPFAIL)."""

    exit_code = 75


def printable(name: str) -> str:
    r"""Escapes what a terminal, a log line or UTF-8 cannot take: control characters, line breaks, bytes that are not UTF-8.

    Args:
        name: of a file, folder or class, as `os.fsdecode` returns it.
    Returns:
        The name, with `\x1b`, `\n`, `\u202e` and so on in place of characters that are not printable.
    """
    return name if name.isprintable() else "".join(map(_escaped, name))


def _escaped(character: str) -> str:
    if character.isprintable():
        return character
    if "\udc80" <= character <= "\udcff":  # a byte that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
