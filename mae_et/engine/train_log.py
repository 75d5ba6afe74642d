"""What a run shows and records while it runs: metrics.jsonl, the loggers, the progress bar or log lines."""

from __future__ import annotations

import builtins
import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from mae_et.curriculum.plan import Plan, PlannedStage
from mae_et.engine.distributed import World
from mae_et.engine.hardware import process_memory
from mae_et.engine.loggers import Loggers
from mae_et.engine.progress import Meter, Progress
from mae_et.engine.time_left import TimeLeft
from mae_et.models.sizes import size_text
from mae_et.storage.metrics_file import MetricsFile

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 5.0
SECONDS_BETWEEN_LINES_BESIDE_A_BAR = 60.0


@dataclass(frozen=True)
class StepResult:
    """What a training step reports. The tensors stay on the device."""

    stage: PlannedStage
    lr: float  # absolute, before layer decay
    values: Mapping[str, Tensor]  # scalars: loss, grad_norm and what the task adds
    finite: Tensor  # 1.0 or 0.0


class TrainLog:
    """Writes the metrics of a run. All processes call its methods; the main one writes.

    Args:
        plan: of the run.
        progress: of the run.
        world: this process among the others.
        work_dir: gets metrics.jsonl and the files of the loggers.
        log_interval: steps between entries. A stage's last step gets an entry too.
        peak_tflops: of one device; None: unknown, and then no utilization is logged.
        loggers: names of the loggers.
        config: of the run; shown by the loggers with a server.
    """

    def __init__(
        self,
        plan: Plan,
        progress: Progress,
        world: World,
        work_dir: Path,
        log_interval: int,
        peak_tflops: float | None,
        loggers: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.plan, self.progress, self.world, self.work_dir = plan, progress, world, work_dir
        self.log_interval, self.peak_tflops = log_interval, peak_tflops
        self.loggers, self.config = loggers, config or {}
        self.writer: Loggers | None = None
        self.unshown: tuple[dict[str, Any], float | None] | None = None

    def __enter__(self) -> TrainLog:
        self.bar = ProgressBar(self.plan, self.progress.step, hidden=not self.world.is_main)
        self.time_left = TimeLeft(self.plan, self.progress)
        with contextlib.ExitStack() as stack:
            stack.callback(self.bar.close)
            stack.enter_context(logging_redirect_tqdm())
            if self.world.is_main:
                step = self.progress.step
                self.metrics = MetricsFile(self.work_dir / "metrics.jsonl", step)
                stack.callback(self.metrics.close)
                lost = self.progress.lost_entries
                self.writer = Loggers(self.loggers, self.work_dir, step, self.config, lost)
                stack.push(lambda error, *_: self.writer.close(ok=error is None))  # type: ignore[union-attr]
            self._stack = stack.pop_all()
        self.meter = Meter(self.progress, self.world)  # its clock starts here
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def add(self, result: StepResult) -> bool:
        """Adds a step that is done. Returns whether an entry is due at this step."""
        self.meter.add(result.values, result.finite, result.stage)
        self.bar.advance(self.progress.step)
        ends_stage = self.progress.step == result.stage.first_step + result.stage.num_steps
        return self.progress.step % self.log_interval == 0 or ends_stage

    def write_entry(self, result: StepResult) -> None:
        """Writes the means since the last entry, with speed, cost and position in the run. The host waits for the device."""
        plan, progress, stage = self.plan, self.progress, result.stage
        rate = self.meter.flush()
        tflops = rate * stage.gflops_per_image * plan.backward_factor / 1e3
        stats = progress.stages[stage.index]
        on_gpu = self.world.device.type == "cuda"
        entry = {
            "stage": stage.index,
            "bandwidth": stage.bandwidth,
            "compute_fraction": plan.compute_fraction(progress.step),
            "equivalent_epochs": plan.equivalent_epochs_at(progress.step),
            **self.meter.take_means(),
            "lr": result.lr,
            "strength": plan.strength(progress.step - 1),
            "images_per_second": rate,
            # These two stay level from stage to stage where the speed-up is the ideal one.
            "equivalent_images_per_second": rate * stage.area_fraction,
            "tflops_per_second": tflops,
            **({"mfu": tflops / (self.peak_tflops * self.world.size)} if self.peak_tflops else {}),
            "waiting_fraction": stats.waiting_seconds / stats.seconds,
            "memory_gib": (torch.cuda.max_memory_allocated() if on_gpu else process_memory("VmRSS")) / 2**30,
            "bad_images": len(progress.bad_images),
            "seconds": progress.seconds,
            "shown_images": plan.first_showing(progress.step),
            "fresh_images": plan.first_image(progress.step),
        }
        if self.world.is_main:
            self.record(entry, prefix="train/")
            self.unshown = {"step": progress.step, **entry}, self.time_left.seconds()

    def show_entry(self) -> None:
        """Shows the entry of this step, if there is one. The hooks have run, so that it has their values."""
        if self.unshown is not None:
            self.bar.show(*self.unshown)
            self.unshown = None

    def record(self, values: Mapping[str, Any], prefix: str = "") -> None:
        """Writes scalars of the current step to metrics.jsonl and the loggers; main process only."""
        assert self.writer is not None
        self.metrics.write({"step": self.progress.step, **values})
        self.writer.add_scalars({prefix + name: value for name, value in values.items()}, self.progress.step)


class ProgressBar:
    """Shows the progress in units of compute.

    Terminals and notebooks get a bar. The log gets lines, more of them where there is no bar.
    """

    def __init__(self, plan: Plan, step: int, hidden: bool) -> None:
        self.plan = plan
        self.bar = tqdm(
            total=100.0,
            initial=100 * plan.compute_fraction(step),
            disable=True if hidden else False if hasattr(builtins, "__IPYTHON__") else None,  # None: only on a terminal
            bar_format="{desc}{percentage:5.1f}%|{bar}| {elapsed}{postfix}",
            dynamic_ncols=True,
        )
        self.prints = not hidden
        self.interval = SECONDS_BETWEEN_LINES if self.bar.disable else SECONDS_BETWEEN_LINES_BESIDE_A_BAR
        self.last_print = 0.0
        self.notes: dict[str, tuple[float, int]] = {}  # name -> value and its step

    def note(self, values: Mapping[str, float], step: int) -> None:
        """Shows the accuracy and the loss of a hook from now on; its other scalars would make the line too long."""
        for name, value in values.items():
            if name.endswith(("top1", "loss")):
                self.notes[name.replace("/", " ")] = value, step

    def show(self, entry: Mapping[str, Any], seconds_left: float | None) -> None:
        """Shows a metrics entry, and the time to the end of the run where it is known."""
        stage = self.plan.stages[entry["stage"]]
        facts = [
            "loss not finite" if entry["loss"] is None else f"loss {entry['loss']:.4f}",
            f"lr {entry['lr']:.2e}",
            f"{entry['images_per_second']:.0f} img/s",
            *(
                f"{name} {value:.3g}" + (f" (step {step})" if step != entry["step"] else "")
                for name, (value, step) in self.notes.items()
            ),
        ]
        is_last = entry["step"] == self.plan.num_steps
        if seconds_left is not None and not is_last:
            facts.append(f"{tqdm.format_interval(seconds_left)} left")
        head = f"stage {stage.index + 1}/{len(self.plan.stages)} bandwidth {size_text(stage.input_size)}"
        self.bar.set_description_str(head + " ")
        self.bar.set_postfix_str(", ".join(facts))
        if self.prints and (is_last or time.monotonic() - self.last_print > self.interval):
            self.last_print = time.monotonic()
            done, num_steps = 100 * entry["compute_fraction"], self.plan.num_steps
            log.info("%5.1f%%  %s  step %d/%d  %s", done, head, entry["step"], num_steps, "  ".join(facts))

    def advance(self, step: int) -> None:
        if not self.bar.disable:
            self.bar.update(100 * self.plan.compute_fraction(step) - self.bar.n)

    def close(self) -> None:
        self.bar.close()
