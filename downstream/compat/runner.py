"""mmengine's runner with a short start on the terminal, our messages in its log file, and strict loading of weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from mmengine.dist import is_main_process
from mmengine.logging import MMLogger
from mmengine.runner import Runner

from downstream.backbones.loading import load_new_heads
from downstream.compat.quiet import quieten

OURS = ("downstream", "mae_et")


class MessageBuffer(logging.Handler):
    """Keeps the messages that are logged before a run has a log file, for `TransferRunner` to write them there."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.records: list[logging.LogRecord] = []
        self.messages: list[str] = []
        for name in OURS:
            logging.getLogger(name).addHandler(self)
            logging.getLogger(name).setLevel(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps a message."""
        self.records.append(record)
        self.messages.append(record.getMessage())

    def close(self) -> None:
        """Stops listening."""
        for name in OURS:
            logging.getLogger(name).removeHandler(self)
        super().close()


class TransferRunner(Runner):
    """mmengine's runner; built by `from_cfg` as usual.

    Attributes:
        buffer: our messages so far.
        findings, messages: of the start, for summary.json.
        new_heads: layers that start from new weights because `load_from` has another number of classes.
    """

    buffer: MessageBuffer | None = None
    findings: dict[str, list[dict[str, str]]]
    messages: list[str]
    new_heads: Sequence[str] = ()
    _has_loaded: bool

    def build_logger(self, log_level: int | str = "INFO", log_file: str | None = None, **options: Any) -> MMLogger:
        """Builds the logger, and connects the log file to our loggers."""
        logger = super().build_logger(log_level, log_file, **options)
        quieten(logger)
        files = [handler for handler in logger.handlers if isinstance(handler, logging.FileHandler)]
        for record in self.buffer.records if self.buffer else []:
            for handler in files:
                handler.handle(record)
        for name in OURS:
            ours = logging.getLogger(name)
            for old in [*ours.handlers]:
                if isinstance(old, logging.FileHandler):  # of an earlier run in this process
                    ours.removeHandler(old)
            for handler in files:
                ours.addHandler(handler)
            if not is_main_process():
                ours.setLevel(logging.ERROR)
        return logger

    def load_or_resume(self) -> None:
        """Resumes as mmengine does; `load_from` is loaded strictly except for heads of another number of classes."""
        if self._has_loaded or self._resume or self._load_from is None:
            super().load_or_resume()
            return
        self._has_loaded = True
        checkpoint, new = load_new_heads(self.model, self._load_from)
        if new:
            self.new_heads = new
        self.call_hook("after_load_checkpoint", checkpoint=checkpoint)


def start_buffer() -> MessageBuffer:
    """Starts to collect messages for the next run; forgets those of a run that did not start."""
    if TransferRunner.buffer is not None:
        TransferRunner.buffer.close()
    TransferRunner.buffer = MessageBuffer()
    return TransferRunner.buffer
