"""The training loop. It does not know which task it trains: see task.py.

Everything in a step follows from the plan, the number of the step and the state of a checkpoint. No random stream is used
that the step did not seed itself. So a run that was stopped anywhere, or killed, resumes to the same losses, and nothing
that a hook computes can change them.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mae_et.config.schema import RunConfig
from mae_et.curriculum.plan import Plan
from mae_et.data.buffers import Batch
from mae_et.data.stream import Stream
from mae_et.engine.bad_images import BadImages
from mae_et.engine.checkpoints import Checkpoints
from mae_et.engine.distributed import World
from mae_et.engine.faults import explained_failures, stop_signals
from mae_et.engine.guard import NonFiniteGuard, stop_at
from mae_et.engine.parallel import Parallel, whole_norm
from mae_et.engine.precision import device_peak_tflops
from mae_et.engine.progress import Progress
from mae_et.engine.stop_vote import StopVote
from mae_et.engine.task import Task
from mae_et.engine.train_log import StepResult, TrainLog
from mae_et.errors import CheckpointError, NonFiniteError, StoppedEarly
from mae_et.models.attention import prefers_explicit, set_attention
from mae_et.models.param_groups import set_lr
from mae_et.models.sizes import Size, size_text


@dataclass(frozen=True)
class TrainerSettings:
    """How a training is carried out."""

    run: RunConfig  # seed, precision, intervals
    work_dir: Path  # gets metrics.jsonl, checkpoints/ and the files of the loggers
    clip_grad_norm: float | None = None  # largest norm of the gradient; None: no clipping
    max_bad_images: int = 0  # more unreadable images than this stop the run
    image_name: Callable[[int], str] = str  # index -> what messages call the image
    identity: Mapping[str, Any] = field(default_factory=dict)  # stored in each checkpoint, e.g. the config


class Trainer:
    """Trains a task to the end of its plan.

    Args:
        plan: stages, batches, learning rates.
        task: model, loss, preprocessing, EMA, hooks.
        optimizer: over the model's parameters. The plan sets its learning rate.
        stream: the training images.
        world: this process among the others.
        settings: how the training is carried out.
    """

    def __init__(
        self,
        plan: Plan,
        task: Task,
        optimizer: torch.optim.Optimizer,
        stream: Stream,
        world: World,
        settings: TrainerSettings,
    ) -> None:
        self.plan, self.task, self.optimizer = plan, task, optimizer
        self.stream, self.world, self.settings = stream, world, settings
        self.parallel = Parallel(task, optimizer, world, settings.run, plan)
        self.dtype = self.parallel.dtype
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=self.dtype == torch.float16)
        self.progress = Progress()
        self.is_resumed = False
        self.input_size: Size | None = None  # of the last step of this process, px

    def fit(self, until_step: int | None = None) -> Progress:
        """Trains from the current progress to the end of the plan, or to a step before it.

        Args:
            until_step: the number of steps after which everything is saved and the method returns; None: all of the plan.
        Returns:
            The progress at the end.
        Raises:
            NonFiniteError: a loss or gradient was NaN or infinite. The parameters are those before the faulty update.
            StoppedEarly: SIGTERM, SIGHUP or Ctrl-C. Everything is saved.
            DataError: too many unreadable images.
            CheckpointError: a save failed, e.g. because the disk is full. Earlier saves are whole.
            UserError: out of memory, or another process died.
        """
        plan, progress = self.plan, self.progress
        end = plan.num_steps if until_step is None else until_step
        with (
            explained_failures(self.world.rank, self._working_on),
            stop_signals() as request,
            self.stream.open(progress.step, request) as batches,
            self.outputs(),
        ):
            if not self.is_resumed:
                self.run_hooks()
            stop, stopping = StopVote(request, self.world), self.world.any(request())
            if stopping and not self.is_resumed:
                raise StoppedEarly(
                    "stopped before the first step, so there is nothing to save: run the same command again"
                )
            while progress.step < end and not stopping:
                result = self.train_step(batches, stop)
                if result is not None:
                    progress.step += 1
                    self.write_log(result)
                    self.run_hooks()
                    self.log.show_entry()
                is_done = progress.step == end
                stopping = result is None or (stop.passed() and not is_done)
                if stopping or is_done or progress.step % self.settings.run.save_interval == 0:
                    self.save()
            self.checkpoints.wait()
            if stopping:
                raise StoppedEarly(
                    f"stopped at step {progress.step} of {plan.num_steps}. Everything is saved in {self.settings.work_dir}: "
                    "run the same command with --resume to continue"
                )
        if progress.num_skipped >= end > 0:
            raise NonFiniteError(
                f"all {end} steps had a non-finite loss or gradient and were skipped: nothing was learned. Use "
                "run.precision = 'bf16' or 'fp32', lower base_lr, or check the data"
            )
        return progress

    def train_step(self, batches: Iterator[Batch], stop: StopVote) -> StepResult | None:
        """Runs one step: micro batches with accumulated gradients, the check for non-finite values, clipping, the update.

        Args:
            batches: the micro batches of this process.
            stop: asked between micro batches; counts the votes of this step.
        Returns:
            What the step reports; None if it was given up because of a stop request. The model is then as before the step.
        """
        plan, task, step = self.plan, self.task, self.progress.step
        task.step = step
        stage, lr = plan.stage_at(step), plan.lr(step)
        self._enter_bandwidth(stage.input_size)
        if task.enter_step(step):
            self.model = self.parallel.wrap()
        set_lr(self.optimizer, lr)
        buffers = [buffer.clone() for buffer in task.model.buffers()] if stage.accum_steps > 1 else []
        values: dict[str, Tensor] = {}
        places = []

        for micro in range(stage.accum_steps):
            if micro and stop.passed_between():
                self._undo(buffers)
                return None
            with self.log.meter.waiting():
                batch = next(batches)
            self.bad_images.add(batch, stage.micro_batch_size)
            places.append(batch.places)
            batch = batch.to(self.world.device)
            images = task.preprocess(batch.images, stage.input_size)
            torch.manual_seed(_micro_seed(self.settings.run.seed, step, micro, self.world.rank))  # dropout, drop path
            with self.parallel.micro_batch(self.model, is_last=micro == stage.accum_steps - 1):
                with torch.autocast(self.world.device.type, self.dtype, enabled=self.dtype is not None):
                    loss, extra = task.loss(self.model, images, batch)
                self.scaler.scale(loss / stage.accum_steps).backward()
            for name, value in {"loss": loss, **extra}.items():
                values[name] = values.get(name, 0) + value.detach().float() / stage.accum_steps

        self.scaler.unscale_(self.optimizer)
        parameters = task.parameters_to_clip()
        grad_norm = whole_norm(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        finite = self.guard.look(step, values["loss"], grad_norm, places, stop)
        if self.guard.may_update(finite):
            if self.settings.clip_grad_norm is not None:
                nn.utils.clip_grads_with_norm_(parameters, self.settings.clip_grad_norm, grad_norm)
            self.scaler.step(self.optimizer)
        else:
            self.check_finite()
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if task.ema is not None:
            task.ema.update(task.model)
        return StepResult(stage, lr, {**values, "grad_norm": grad_norm}, finite)

    def write_log(self, result: StepResult) -> None:
        """Adds a step to the log; writes an entry where one is due. All processes take part."""
        is_due = self.log.add(result)
        if is_due or self.world.size == 1:
            self.bad_images.share()
        if is_due:
            self.check_finite()
            self.log.write_entry(result)

    def run_hooks(self) -> None:
        """Runs the hooks that are due, on all processes, outside the training time."""
        due = [hook for hook in self.task.hooks if hook.due(self.progress.step)]
        if not due:
            return
        with self.log.meter.paused(), self.parallel.evaluation():
            self.task.model.eval()
            for hook in due:
                values = hook(self.progress.step, self.log.writer)
                if values and self.world.is_main:
                    self.log.record(values)
                    self.log.bar.note(values, self.progress.step)
            self.task.model.train()

    def save(self) -> None:
        """Saves a checkpoint of the current step. All processes take part."""
        progress = self.progress
        self.log.meter.flush()
        self.bad_images.share()
        self.check_finite()
        with self.log.meter.paused():
            sums = self.world.gather((progress.sums, progress.weight))
            self.checkpoints.save(progress.step, {**self.values(), "sums": sums})

    def check_finite(self) -> None:
        """Raises NonFiniteError, after a dump, if more steps were non-finite than run.max_skipped_steps allows."""
        faulty = self.guard.faulty_step()
        if faulty is not None:
            stop_at(
                faulty,
                self.optimizer,
                lambda path: self.checkpoints.dump(path, self.values()),
                self.settings.work_dir,
                self.world.is_main,
            )

    def values(self) -> dict[str, Any]:
        """Returns what a checkpoint holds besides the tensors of model, optimizer and average."""
        return {
            **self.settings.identity,
            "scaler": self.scaler.state_dict(),
            "progress": self.progress.to_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes over the content of a checkpoint and empties it: its tensors are copied.

        Each form can be loaded by one process, by several under DDP, and by several under FSDP2.

        Args:
            state: from a single file, or {"sharded": path} and the plain values of a sharded checkpoint.
        Raises:
            CheckpointError: if it is not from a run of this model.
        """
        with _explained_state():
            progress = Progress.from_dict(state["progress"])
            self._take_weights(state, self.plan.stage_at(max(0, progress.step - 1)).input_size)
            sums = state["sums"]
        if len(sums) == self.world.size:  # each process continues its own sums; the entries are means over them
            progress.sums, progress.weight = sums[self.world.rank]
        self.progress, self.is_resumed = progress, True
        state.clear()

    def start_from(self, state: dict[str, Any], size: Size) -> None:
        """Takes over model, optimizer, average and loss scale of another run, and starts at the first step of this plan.

        Args:
            state: the content of its checkpoint; it is emptied.
            size: of the images of the last step of that run, px.
        Raises:
            CheckpointError: if it is not from a run of this model.
        """
        with _explained_state():
            self._take_weights(state, size)
        state.clear()

    def _take_weights(self, state: Mapping[str, Any], size: Size) -> None:
        self._enter_bandwidth(size)
        if "sharded" in state:
            self.parallel.read(state["sharded"], state)
        elif self.task.ema is not None and "ema" not in state:
            raise CheckpointError(
                "the checkpoint has no moving average of the weights, but this run keeps one: resume with the config "
                "that wrote the checkpoint, or start a new run"
            )
        elif self.parallel.is_sharded:
            self.parallel.load(state)
        else:
            self._load_whole(state)
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])

    def _load_whole(self, state: Mapping[str, Any]) -> None:
        self.task.model.load_state_dict(state["model"])
        if self.task.ema is not None:
            self.task.ema.module.load_state_dict(state["ema"])
        # The state is memory-mapped. On a CPU the optimizer would keep it, so that every process needs the file.
        on_cpu = self.world.device.type == "cpu"
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]) if on_cpu else state["optimizer"])

    @contextlib.contextmanager
    def outputs(self) -> Iterator[None]:
        """Opens the log and wraps the model, for the time of the training. `train_step` and `save` need it."""
        settings, world, progress = self.settings, self.world, self.progress
        progress.refilled_images += self.stream.refilled_images * world.size
        progress.refill_seconds += self.stream.refill_seconds
        peak = device_peak_tflops(settings.run.precision, world.device)
        self.guard = NonFiniteGuard(self.optimizer, world, self.scaler, progress, settings.run.max_skipped_steps)
        self.bad_images = BadImages(
            progress, world, self.plan.dataset_size, settings.max_bad_images, settings.image_name
        )
        self.model = self.parallel.wrap()
        self.task.model.train()
        folder, keep = settings.work_dir / "checkpoints", settings.run.keep_checkpoints
        with (
            TrainLog(
                self.plan,
                progress,
                world,
                settings.work_dir,
                settings.run.log_interval,
                peak,
                settings.run.loggers,
                settings.identity.get("config"),
            ) as self.log,
            Checkpoints(folder, keep, world, self.parallel) as self.checkpoints,
        ):
            yield

    def _enter_bandwidth(self, size: Size) -> None:
        if size != self.input_size:
            self.input_size = size
            replaced = self.parallel.enter_bandwidth(size)
            length = 1 + max((stage.num_patches for stage in self.plan.stages if stage.input_size == size), default=0)
            set_attention(self.task.model, prefers_explicit(self.world.device.type, self.dtype, length))
            if replaced:
                self.model = self.parallel.wrap()

    def _undo(self, buffers: list[Tensor]) -> None:
        """Drops the gradients of a step that was given up, and restores what its forward passes changed."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, before in zip(self.task.model.buffers(), buffers, strict=True):
                buffer.copy_(before)

    def _working_on(self) -> str:
        stage = self.plan.stage_at(min(self.progress.step, self.plan.num_steps - 1))
        return f"{stage.micro_batch_size} images at bandwidth {size_text(stage.input_size)}"


@contextlib.contextmanager
def _explained_state() -> Iterator[None]:
    """Turns the errors of loading a foreign state into one message."""
    try:
        yield
    except CheckpointError:
        raise
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"the checkpoint is not from a run of this model: {str(error).splitlines()[0]}"
        ) from error


def _micro_seed(seed: int, step: int, micro: int, rank: int) -> int:
    return int(np.random.SeedSequence((seed, step, micro, rank)).generate_state(1, np.uint64)[0] >> np.uint64(1))
