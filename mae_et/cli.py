"""Starts and ends a command: a user's mistake gives one message that says how to fix it, a bug gives a traceback.

Exit codes: 0 done; 1 an error, with its fix on stderr; 2 a faulty config, or a command line that cannot be read; 75 stopped
early by SIGTERM or Ctrl-C with everything saved (run again with --resume); 130 interrupted with nothing to save.
"""

from __future__ import annotations

import argparse
import errno
import logging
import sys
import traceback
from collections.abc import Callable, Sequence

from mae_et.errors import UserError


def image_size(text: str) -> tuple[int, int]:
    """Reads the size of images from the command line: "224", or "360,480" (height, width).

    Raises:
        argparse.ArgumentTypeError: if it is neither.
    """
    sides = text.split(",")
    if len(sides) > 2 or not all(side.strip().isdecimal() and int(side) for side in sides):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size: give the side of a square, e.g. 224, or height and width, e.g. 360,480"
        )
    return int(sides[0]), int(sides[-1])


def run_tool(
    main: Callable[[argparse.Namespace], int | None],
    parser: argparse.ArgumentParser,
    words: Sequence[str] | None = None,
) -> None:
    """Parses the command line, runs main and exits.

    Args:
        main: takes the parsed arguments; returns an exit code, or None for 0.
        parser: gets `--debug`, which shows the traceback of a user's mistake too.
        words: of the command line; None: all of this process.
    """
    parser.add_argument("--debug", action="store_true", default=False, help="show the traceback of an error")
    parser.allow_abbrev = False  # --cfg-option would be taken for --cfg-options
    args = parser.parse_args(words)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it tells of its font cache at the level INFO
    try:
        code = main(args)
    except BrokenPipeError:  # `tool | head` closed our output
        sys.stderr.close()
        code = 0
    except (UserError, OSError, KeyboardInterrupt) as error:
        code, message = _explain(error)
        if args.debug:
            traceback.print_exc()
        print(message, file=sys.stderr)
    sys.exit(code)


def _explain(error: BaseException) -> tuple[int, str]:
    if isinstance(error, UserError):
        # A run that stops when it is asked to has not failed.
        prefix = "" if error.exit_code == 75 else "error: "
        return error.exit_code, f"{prefix}{error}"
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return 1, f"error: the disk is full ({error.filename or 'unknown file'}): free space and run again"
    return 1, f"error: {error}; --debug shows where"
