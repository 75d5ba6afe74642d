"""The loop, top to bottom. It does not know what it trains: it takes an objective (model, images, batch -> loss, logs).

Everything that happens at a step follows from the plan, the step's number and the state of a checkpoint: nothing is drawn
from a random stream that the step did not seed itself. That is why a run that was stopped anywhere, or killed, goes on to
the same losses, and why nothing that a hook computes on the side can change them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm.contrib.logging import logging_redirect_tqdm

from mae_et.config.schema import RunConfig
from mae_et.curriculum.plan import Plan
from mae_et.data.replay import ReplayBatches
from mae_et.data.stream import Batch, reading
from mae_et.engine.distributed import World
from mae_et.engine.guard import FiniteWatch
from mae_et.engine.hardware import peak_tflops
from mae_et.engine.progress import Bar, Meter, Progress
from mae_et.errors import CheckpointError, DataError, StoppedEarly, UserError
from mae_et.models.param_groups import set_lr
from mae_et.storage.checkpoint import save_checkpoint
from mae_et.storage.metrics_file import MetricsFile

log = logging.getLogger(__name__)


class Objective(Protocol):
    """What is learnt.

    Args:
        model: possibly wrapped for several processes: call it, do not reach into it.
        images: [n, C, B, B] normalised, at the stage's bandwidth.
        batch: labels and places in the stream, on the device.
    Returns:
        The loss, a scalar that is a mean over the images, and further scalars to log.
    """

    def __call__(self, model: nn.Module, images: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]: ...


class Hook(Protocol):
    """Something beside the training: pictures, an accuracy. `due` is asked before the first step and after each one.

    Args:
        step: steps done.
        writer: TensorBoard; None except on the main process.
    Returns:
        Whether it is to be called; scalars for the metrics.
    """

    def due(self, step: int) -> bool: ...

    def __call__(self, step: int, writer: SummaryWriter | None) -> dict[str, float]: ...


def train(
    plan: Plan,
    model: nn.Module,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    loader: Callable[[int], Iterable[Batch]],
    preprocess: Callable[[Tensor, int], Tensor],
    run: RunConfig,
    world: World,
    work_dir: Path,
    clip_grad_norm: float | None = None,
    hooks: Sequence[Hook] = (),
    identity: Mapping[str, Any] | None = None,
    resume_from: dict[str, Any] | None = None,
    max_bad_images: int = 0,
    image_name: Callable[[int], str] = str,
    ema: ModelEmaV3 | None = None,
) -> Progress:
    """Trains to the end of the plan.

    Args:
        plan: stages, batches, learning rates.
        model: on the world's device; its state is what checkpoints hold.
        objective: what is learnt.
        optimizer: over the model's parameters; the plan sets its learning rate.
        loader: first step -> micro batches from there on.
        preprocess: (uint8 images, bandwidth) -> normalised images at that bandwidth.
        run: seed, precision, intervals.
        world: this process among the others.
        work_dir: gets metrics.jsonl, tensorboard/ and checkpoints/.
        clip_grad_norm: largest norm of the gradient; None: no clipping.
        hooks: run by every process that has them; the main process records their scalars.
        identity: stored in each checkpoint, e.g. the config.
        resume_from: a checkpoint's content, which is emptied; None: from the start.
        max_bad_images: more unreadable images than this stop the run.
        image_name: index -> what messages call the image.
        ema: a moving average of the model's weights, kept and saved.
    Returns:
        The progress at the end.
    Raises:
        NonFiniteError: a loss or gradient was NaN or infinite; the parameters are those before the faulty update.
        StoppedEarly: SIGTERM or Ctrl-C; everything is saved.
        DataError: too many unreadable images.
        CheckpointError: a save failed, e.g. for a full disk; the saves before it are whole.
    """
    # ---------------------------------------------------------------- state
    device = world.device
    dtype = autocast_dtype(run.precision, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    progress = Progress()
    if resume_from is not None:
        progress = _restore(resume_from, world, model, optimizer, scaler, ema)
        resume_from.clear()  # its tensors have been copied
    wrapped = world.wrap(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    meter = Meter(progress, world)
    peak = device_peak_tflops(run.precision, device)

    def state() -> dict[str, Any]:
        return {
            **(identity or {}),
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "progress": progress.to_dict(),
            **({"ema": ema.module.state_dict()} if ema is not None else {}),
        }

    watch = FiniteWatch(optimizer, world, run.max_skipped_steps, scaler, progress, state, work_dir)

    # ---------------------------------------------------------------- outputs
    bar = Bar(plan, progress.step, hidden=not world.is_main)
    stack = contextlib.ExitStack()
    writer: SummaryWriter | None = None
    if world.is_main:
        metrics = stack.enter_context(contextlib.closing(MetricsFile(work_dir / "metrics.jsonl", progress.step)))
        writer = stack.enter_context(
            SummaryWriter(str(work_dir / "tensorboard"), purge_step=progress.step + 1 if progress.step else None)
        )
    stack.callback(bar.close)

    def record(values: Mapping[str, Any], prefix: str = "") -> None:
        metrics.write({"step": progress.step, **values})
        for name in values:
            cast(SummaryWriter, writer).add_scalar(prefix + name, values[name], progress.step)

    def run_hooks(due: Sequence[Hook]) -> None:
        if not due:
            return
        model.eval()
        for hook in due:
            values = hook(progress.step, writer)
            if values and world.is_main:
                record(values)
                bar.note(values)
        model.train()

    # ---------------------------------------------------------------- the loop
    feed = loader(progress.step)
    with stack, logging_redirect_tqdm(), _stop_signals() as stop_asked, reading(feed) as batches:
        model.train()
        if isinstance(feed, ReplayBatches):
            with meter.paused():
                _refill(feed, stop_asked, progress, world)
        if progress.step == 0:
            with meter.paused():
                run_hooks([hook for hook in hooks if hook.due(0)])
                world.barrier()
        while progress.step < plan.num_steps:
            step = progress.step
            stage, lr = plan.stage_at(step), plan.lr(step)
            set_lr(optimizer, lr)
            values: dict[str, Tensor] = {}
            places, num_bad_before = [], len(progress.bad_images)

            with _naming_the_memory_setting(stage.micro_batch_size, stage.bandwidth):
                for micro in range(stage.accum_steps):
                    with meter.waiting():
                        batch = next(batches)
                    if len(batch.images) < stage.micro_batch_size:
                        raise DataError(_only_bad(batch, image_name))
                    progress.bad_images.update({bad.index: bad.reason for bad in batch.bad_images})
                    places.append(batch.places)
                    batch = batch.to(device)
                    images = preprocess(batch.images, stage.bandwidth)
                    torch.manual_seed(_micro_seed(run.seed, step, micro, world.rank))  # for dropout and drop path
                    is_last = micro == stage.accum_steps - 1
                    with contextlib.nullcontext() if is_last or wrapped is model else cast(Any, wrapped).no_sync():
                        with torch.autocast(device.type, dtype, enabled=dtype is not None):
                            loss, extra = objective(wrapped, images, batch)
                        scaler.scale(loss / stage.accum_steps).backward()
                    for name, value in {"loss": loss, **extra}.items():
                        values[name] = values.get(name, 0) + value.detach().float() / stage.accum_steps
                scaler.unscale_(optimizer)
                grad_norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
                finite = watch.look(step, values["loss"], grad_norm, places)
                if watch.may_update(finite):
                    if clip_grad_norm is not None:
                        nn.utils.clip_grads_with_norm_(parameters, clip_grad_norm, grad_norm)
                    scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                if ema is not None:
                    ema.update(model)

            progress.step += 1
            meter.add({**values, "grad_norm": grad_norm}, finite, stage)

            # ------------------------------------------------------------ log, look aside, save
            ends_stage = progress.step == stage.first_step + stage.num_steps
            is_done = progress.step == plan.num_steps
            if progress.step % run.log_interval == 0 or ends_stage:
                rate = meter.flush()
                tflops = rate * stage.gflops_per_image * plan.backward_factor / 1e3
                watch.check()
                _share_bad_images(progress, world)
                entry = {
                    "stage": stage.index,
                    "bandwidth": stage.bandwidth,
                    "compute_fraction": plan.compute_fraction(progress.step),
                    "equivalent_epochs": plan.equivalent_epochs_at(progress.step),
                    **meter.take_means(),
                    "lr": lr,
                    "strength": plan.strength(step),
                    "images_per_second": rate,
                    # These two stay level from stage to stage where the speed-up is the ideal one.
                    "equivalent_images_per_second": rate * (stage.bandwidth / plan.image_size) ** 2,
                    "tflops_per_second": tflops,
                    **({"mfu": tflops / (peak * world.size)} if peak else {}),
                    "waiting_fraction": progress.stages[stage.index].waiting_seconds
                    / progress.stages[stage.index].seconds,
                    "memory_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else _rss_gib(),
                    "bad_images": len(progress.bad_images),
                    "seconds": progress.seconds,
                    "shown_images": plan.first_showing(progress.step),
                    "fresh_images": plan.first_image(progress.step),
                }
                if world.is_main:
                    record(entry, prefix="train/")
                    bar.show({"step": progress.step, **entry})
            bar.advance(progress.step)
            if len(progress.bad_images) > num_bad_before:
                _report_bad_images(progress, num_bad_before, max_bad_images, plan.dataset_size, image_name)
            due = [hook for hook in hooks if hook.due(progress.step)]
            with meter.paused() if due else contextlib.nullcontext():
                run_hooks(due)
                # Also holds the others here while the main process is in its hooks.
                stopping = world.any(stop_asked()) and not is_done
            if progress.step % run.save_interval == 0 or is_done or stopping:
                meter.flush()
                watch.check()
                _share_bad_images(progress, world)
                with meter.paused():
                    sums = world.gather((progress.sums, progress.weight))
                    if world.is_main:
                        saved = {**state(), "sums": sums}
                        save_checkpoint(saved, work_dir / "checkpoints", progress.step, run.keep_checkpoints)
                    world.barrier()
            if stopping:
                raise StoppedEarly(
                    f"stopped at step {progress.step} of {plan.num_steps}; everything is saved in {work_dir}: "
                    "run the same command with --resume to go on"
                )
    return progress


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Returns the type that matrix products run in, None for float32.

    Raises:
        UserError: for fp16 without a GPU.
    """
    if precision == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else None
    if precision == "fp16" and device.type == "cpu":
        raise UserError("run.precision = 'fp16' needs a GPU; use 'bf16' or 'fp32' on a CPU")
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def device_peak_tflops(precision: str, device: torch.device) -> float | None:
    """Returns the TFLOP/s that the device can reach at most in a run of this precision; None where that is not known."""
    if device.type != "cuda":
        return None
    float32 = "fp32" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", None: float32}
    return peak_tflops(torch.cuda.get_device_name(device), names[autocast_dtype(precision, device)])


def _restore(
    state: Mapping[str, Any],
    world: World,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    ema: ModelEmaV3 | None,
) -> Progress:
    try:
        model.load_state_dict(state["model"])
        if ema is not None:
            ema.module.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"]) if state["scaler"] else None
        progress, sums = Progress.from_dict(state["progress"]), state["sums"]
        if len(sums) == world.size:  # each process goes on with its own; the entries are means over them
            progress.sums, progress.weight = sums[world.rank]
        return progress
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"the checkpoint is not from a run of this model: {str(error).splitlines()[0]}"
        ) from error


def _refill(feed: ReplayBatches, stop_asked: Callable[[], bool], progress: Progress, world: World) -> None:
    """Brings the replay buffer of a resumed run back to what it held.

    Raises:
        StoppedEarly: SIGTERM or Ctrl-C on the way; nothing has changed since the checkpoint.
    """
    start = time.perf_counter()
    num_images = feed.refill(stop_asked)
    if world.any(stop_asked()):
        raise StoppedEarly(
            f"stopped while the replay buffer was refilled, before step {progress.step}: run the same command again"
        )
    if num_images:
        progress.refilled_images += num_images * world.size
        progress.refill_seconds += time.perf_counter() - start
        log.info("replay buffer: refilled in %.1f s", time.perf_counter() - start)


def _micro_seed(seed: int, step: int, micro: int, rank: int) -> int:
    return int(np.random.SeedSequence((seed, step, micro, rank)).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Turns SIGTERM and Ctrl-C into a question to ask; a second Ctrl-C interrupts at once."""
    asked = False

    def ask(number: int, _frame: object) -> None:
        nonlocal asked
        asked = True
        log.warning("%s: saving after this step", signal.Signals(number).name)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    if threading.current_thread() is not threading.main_thread():  # signals cannot be caught there
        yield lambda: False
        return
    previous = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _naming_the_memory_setting(micro_batch_size: int, bandwidth: int) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if "DataLoader worker" in str(error):
            raise UserError(
                f"a loader process died ({str(error).splitlines()[0]}): most often the machine ran out of memory or of "
                "/dev/shm; lower data.num_workers or give the job more memory"
            ) from error
        is_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
        if not is_memory:
            raise
        raise UserError(
            f"too little memory for {micro_batch_size} images at bandwidth {bandwidth}: lower batch.micro_batch_size "
            "(accumulation makes up for it), or set run.activation_checkpointing = True"
        ) from error


def _report_bad_images(
    progress: Progress, num_before: int, most: int, dataset_size: int, image_name: Callable[[int], str]
) -> None:
    """Names new unreadable images; stops the run when there are too many."""
    new = list(progress.bad_images.items())[num_before:]
    for index, reason in new:
        if len(progress.bad_images) <= 20:
            log.warning("unreadable image, another takes its place: %s: %s", image_name(index), reason)
    if len(progress.bad_images) > most:
        raise DataError(
            f"{len(progress.bad_images)} of {dataset_size} images are unreadable, more than data.max_bad_fraction "
            f"allows ({most}); the last: {image_name(new[-1][0])}: {new[-1][1]}. Mend or remove them, or raise the setting"
        )


def _share_bad_images(progress: Progress, world: World) -> None:
    for seen in world.gather(progress.bad_images):
        progress.bad_images.update(seen)


def _only_bad(batch: Batch, image_name: Callable[[int], str]) -> str:
    told = "; ".join(f"{image_name(bad.index)}: {bad.reason}" for bad in batch.bad_images[:3])
    return (
        f"{len(batch.bad_images)} images were unreadable in a row, the first: {told}. Mend or remove them; "
        "tools/dataset_stats.py lists all"
    )


def _rss_gib() -> float:
    """Returns the memory of this process, in GiB; 0 where it cannot be read."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30
    except OSError:
        return 0.0
