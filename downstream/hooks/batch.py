"""Notes how many images an update has seen, and compares it when a run is resumed."""

from __future__ import annotations

import logging
from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS

log = logging.getLogger(__name__)
_KEY = "images_per_update"


@HOOKS.register_module()
class BatchHook(Hook):
    """Warns if a resumed run has another batch: mmengine restores learning rates without scaling them again."""

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Adds the number of images of an update."""
        checkpoint.setdefault("meta", {})[_KEY] = images_per_update(runner)

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Compares the number with that of this run."""
        before, now = (checkpoint.get("meta") or {}).get(_KEY), images_per_update(runner)
        if runner.cfg.get("resume") and before is not None and before != now:
            log.warning(
                "the checkpoint was trained with %d images an update, this run has %d. The learning rates stay those for %d: "
                "use %d images (processes x train_dataloader.batch_size x accumulative_counts), or start a new run",
                before, now, before, before,
            )  # fmt: skip


def images_per_update(runner: Any) -> int:
    """Returns the images of one update over all processes and accumulated steps."""
    config = runner.cfg
    accumulated = config.optim_wrapper.get("accumulative_counts", 1)
    return runner.world_size * config.train_dataloader.batch_size * accumulated
