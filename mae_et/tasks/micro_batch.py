"""Finds the largest micro batch that each stage of a pre-training can have on the device at hand, by a dry run."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import torch
from timm.utils import ModelEmaV3

from mae_et.config.schema import PretrainConfig
from mae_et.curriculum.plan import Plan
from mae_et.engine.hardware import available_memory, process_memory
from mae_et.engine.precision import autocast_dtype
from mae_et.errors import UserError
from mae_et.lowfreq import crop_and_normalize
from mae_et.models.attention import prefers_explicit, set_attention
from mae_et.models.sizes import Size, count_patches, size_text
from mae_et.tasks.pretrain import build_model, build_optimizer

log = logging.getLogger(__name__)

MARGIN = 0.1  # of the memory, for what a dry run does not see: fragments, gradients in flight, a kernel's scratch space
CLEAR_GROWTH = 64 * 2**20  # bytes; a process that grows by less tells nothing of its images


def fit_micro_batches(config: PretrainConfig, plan: Plan, device: str) -> tuple[int, ...]:
    """Finds, for each stage, the largest part of a process's batch that fits with a tenth of the memory to spare.

    On a GPU by real forward and backward passes with the optimizer's state in place. On a CPU, where too much would take
    the machine down, from how a process grows with its images; loader processes are not counted there.

    Args:
        config: of the run.
        plan: of the same config: its stages' batches are what is divided.
        device: "cpu" or "cuda".
    Returns:
        A value for batch.micro_batch_sizes, each a divisor of the stage's batch of one process.
    Raises:
        UserError: if not even one image fits.
    """
    with _trial_on_gpu(config, plan) if device == "cuda" else _trial_on_cpu(config, plan.world_size) as make_trial:
        sizes = []
        for stage in plan.stages:
            local = stage.global_batch_size // plan.world_size
            found = largest_fitting(
                [n for n in range(1, local + 1) if local % n == 0], make_trial(stage.input_size, local)
            )
            if found is None:
                raise UserError(
                    f"not even one image at bandwidth {size_text(stage.input_size)} fits into the memory: set "
                    "run.activation_checkpointing = True, or take a smaller model"
                )
            log.info("bandwidth %s: %d of %d images fit at once", size_text(stage.input_size), found, local)
            sizes.append(found)
    return tuple(sizes)


def largest_fitting(sizes: list[int], fits: Callable[[int], bool]) -> int | None:
    """Returns the largest size that fits, by bisection; None if none does.

    Args:
        sizes: rising.
        fits: true up to some size, false above it.
    """
    low, high = 0, len(sizes)  # sizes[:low] fit, sizes[high:] do not
    while low < high:
        middle = (low + high) // 2
        if fits(sizes[middle]):
            low = middle + 1
        else:
            high = middle
    return sizes[low - 1] if low else None


Trial = Callable[[int], bool]


class _Step:
    """A forward and backward pass as the training loop does it, on black images; the gradients stay."""

    def __init__(self, config: PretrainConfig, device: torch.device, size: Size) -> None:
        self.config, self.device = config, device
        self.dtype = autocast_dtype(config.run.precision, device)
        self.model = build_model(config).to(device).train()
        self.model.set_grad_checkpointing(config.run.activation_checkpointing)
        num_patches = count_patches(size, config.model.size_multiple)
        set_attention(self.model, prefers_explicit(device.type, self.dtype, num_patches + 1))
        if config.model.ema_decay is not None:
            self.ema = ModelEmaV3(self.model)  # takes memory
        optimizer = build_optimizer(config, self.model)
        self(1, size)
        optimizer.step()  # makes its state

    def __call__(self, num_images: int, size: Size) -> None:
        data = self.config.data
        shape = (num_images, self.config.model.in_chans, *data.image_size)
        images = torch.zeros(shape, dtype=torch.uint8, device=self.device)
        inputs = crop_and_normalize(images, size, data.mean, data.std, self.config.curriculum.centered)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            loss, _ = self.model(inputs, self.config.model.mask_ratio)
        loss.backward()


@contextlib.contextmanager
def _trial_on_gpu(config: PretrainConfig, plan: Plan) -> Iterator[Callable[[Size, int], Trial]]:
    device = torch.device("cuda", torch.cuda.current_device())
    smallest = min((stage.input_size for stage in plan.stages), key=math.prod)
    free, total = torch.cuda.mem_get_info(device)
    torch.cuda.set_per_process_memory_fraction((1 - MARGIN) * free / total, device)
    try:
        try:
            step = _Step(config, device, smallest)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"the model, its optimizer and one image at bandwidth {size_text(smallest)} do not fit into the GPU's memory"
            ) from error

        def fits(num_images: int, size: Size) -> bool:
            done = False
            with contextlib.suppress(torch.OutOfMemoryError):
                step(num_images, size)
                torch.cuda.synchronize(device)
                done = True
            torch.cuda.empty_cache()  # only now: the exception held the tensors of the pass
            return done

        yield lambda size, _: lambda num_images: fits(num_images, size)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


@contextlib.contextmanager
def _trial_on_cpu(config: PretrainConfig, world_size: int) -> Iterator[Callable[[Size, int], Trial]]:
    free = available_memory()
    if free is None:
        raise UserError("this system does not tell how much memory is free: set batch.micro_batch_sizes by hand")
    room = (1 - MARGIN) * free / world_size  # the processes share the machine

    def make_trial(size: Size, most: int) -> Trial:
        # A process of its own for each stage: memory that was freed stays with a process and would hide the next growth.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            try:
                base, per_image = pool.submit(measure_growth, config, size, most).result()
            except BrokenProcessPool:
                return lambda _: False
        return lambda num_images: base + num_images * per_image <= room

    yield make_trial


def measure_growth(config: PretrainConfig, size: Size, most: int) -> tuple[float, float]:
    """Measures how this process grows with the images of a forward and backward pass on the CPU.

    Doubles the images until the growth is clear, or to `most` images. Only a fresh process tells the truth.

    Returns:
        Bytes without images, and bytes for each image.
    """
    step = _Step(config, torch.device("cpu"), size)
    num_images, peak = 1, 0
    while True:
        before = peak
        step(num_images, size)
        peak = process_memory("VmHWM")
        if num_images > 1 and (peak - before >= CLEAR_GROWTH or num_images >= most):
            per_image = (peak - before) / (num_images / 2)
            return peak - num_images * per_image, per_image
        num_images *= 2
