"""Keeps off the terminal what mmengine, mmdet and mmseg print at their start and a user cannot act on."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator

from mmengine.logging import MMLogger

# Beginnings of log messages. The run's log file keeps all of them.
FILE_ONLY = (
    "\n" + "-" * 60 + "\nSystem environment",
    "Config:\n",
    "Hooks will be executed",
    "Distributed training is not used, all SyncBatchNorm",
    "LR is set based on batch size",  # run.py says it with the reason
    "Loads checkpoint by",
)
DROPPED = (
    '"FileClient" will be deprecated',
    '"HardDiskBackend" is the alias',
    "Using env variable",
    "Line NMS is not compiled",
    "The prefix is not set in metric class",
)
WARNINGS = (
    "faster_coco_eval is not installed",  # a metric that no config here uses
    "Default ``avg_non_ignore`` is False",  # as in the published recipes
    "`reduce_zero_label` will be deprecated",
    "Fail to import ``MultiScaleDeformableAttention``",
    "torch.meshgrid",
    "__array_wrap__ must accept",
)


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Drops notices that concern no user while a config is read and mmdet or mmseg are imported."""
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=f".*{re.escape(message)}")
    MMLogger.get_current_instance().addFilter(_is_relevant)  # the one before the run's own
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        for line in printed.getvalue().splitlines():
            if "Could not import OneDL" not in line:
                print(line)


def quieten(logger: logging.Logger) -> None:
    """Drops useless messages of a run's logger, and leaves long ones to its log file."""
    logger.addFilter(_is_relevant)
    for handler in logger.handlers:
        if not isinstance(handler, logging.FileHandler):
            handler.addFilter(_is_for_the_terminal)


def _is_relevant(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(DROPPED)


def _is_for_the_terminal(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(FILE_ONLY)
