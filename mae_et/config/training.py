"""What all training configs share beside the data: curriculum, batch, optimizer, replay and run.

What follows from a config (steps, absolute learning rates, batch per stage) is a Plan: see mae_et/curriculum/plan.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from typing import Annotated, Literal

from pydantic import Field

from mae_et.config.data import AsTuple, Count, DataConfig, Fraction, Positive, PositiveFloat, UnitInterval, shorter_side
from mae_et.config.section import FaultyFieldError, Section, check, unused
from mae_et.config.source_list import split_sources
from mae_et.models.sizes import nearest_size, size_text


class NetworkConfig(Section):
    """What a training config needs to know about any network."""

    in_chans: Positive = Field(3, description="Image channels: 3 for RGB, 1 for grey, or the bands of the images.")

    @property
    def size_multiple(self) -> int:
        """Px; image size and bandwidths must be multiples of it."""
        raise NotImplementedError


class StageConfig(Section):
    """One row of a curriculum."""

    compute_fraction: UnitInterval = Field(description="Fraction of the compute budget, counted by area.")
    bandwidth: Positive = Field(
        description="Side of the low-frequency crop, px; of a rectangle the shorter side. The longer one keeps the aspect of "
        "data.image_size, rounded to the patch size."
    )
    strength: Fraction | None = Field(
        None, description="Strength of the augmentation. None: rises linearly with the compute done."
    )
    global_batch_size: Positive | None = Field(None, description="Images per step. None: batch.global_batch_size.")


class CurriculumConfig(Section):
    """What the model sees when. The presets are in mae_et/curriculum/presets.py."""

    file: str | None = Field(
        None,
        description="A curriculum.py of `mae-et search`: its keys replace those of this section when a config is read; "
        "--cfg-options come after it.",
    )
    preset: Literal["etpp", "etpp_deit", "etpp_convnext", "et", "blog", "constant", "custom"] = Field(
        "etpp", description='Named list of stages, or "custom" for `stages`.'
    )
    stages: Annotated[tuple[StageConfig, ...], AsTuple] = Field((), description='Stages of preset = "custom".')
    equivalent_epochs: PositiveFloat = Field(400.0, description="Compute budget, in epochs at full image size.")
    budget_hours: PositiveFloat | None = Field(
        None,
        description="Compute budget in hours on the device at hand. The speed is measured at the start, and equivalent_epochs, "
        "warmup_equivalent_epochs and baseline_equivalent_epochs are scaled together to what fits. None: equivalent_epochs "
        "as given.",
    )
    baseline_equivalent_epochs: PositiveFloat = Field(
        1600.0, description="Budget of the run that this one is compared with."
    )
    warmup_equivalent_epochs: Annotated[float, Field(ge=0)] = Field(
        40.0, description="Length of the linear warm-up of the learning rate, in equivalent epochs."
    )
    centered: bool = Field(
        True, description="Samples the crop at pixel centres: it neither shifts the image nor breaks flips."
    )

    @check
    def _file(self) -> Iterator[str]:
        if self.file is not None:
            yield f"file = {self.file!r} is read with a config file or --cfg-options only: give its preset and stages instead"

    @check
    def _warmup(self) -> Iterator[str]:
        if self.warmup_equivalent_epochs >= self.equivalent_epochs:
            yield (
                f"warmup_equivalent_epochs = {self.warmup_equivalent_epochs:g} must be below "
                f"equivalent_epochs = {self.equivalent_epochs:g}"
            )

    @check
    def _custom_stages(self) -> Iterator[str]:
        if self.preset == "custom" and not self.stages:
            yield 'stages is empty, but preset = "custom" needs them: give stages, or choose another preset'
        if self.preset != "custom" and self.stages:
            yield f'stages has no effect with preset = {self.preset!r}: remove it, or set preset = "custom"'

    @check
    def _fractions(self) -> Iterator[str]:
        total = sum(stage.compute_fraction for stage in self.stages)
        if self.stages and abs(total - 1) > 1e-6:
            yield f"stages: the values of compute_fraction must add up to 1, not {total:g}"

    @check
    def _unused(self) -> Iterator[str]:
        if self.preset == "constant":
            yield from unused(self, ["centered"], "preset = 'constant'")


class EarlyLargeBatchConfig(Section):
    """Larger batches while the images are small (EfficientTrain++); the lr grows with the root of the batch.

    Rule "area": batch.global_batch_size (image_size / bandwidth)^2, of rectangles the ratio of the areas, rounded by
    `area_batch` in mae_et/curriculum/batch.py.
    Rule "list": the stages' own global_batch_size. Rule "none": those too, but the lr grows linearly with the batch.
    """

    rule: Literal["none", "area", "list"] = Field("none", description="How the batch of a stage is chosen.")
    max_global_batch_size: Positive | None = Field(None, description='Limit of rule = "area". None: no limit.')
    max_lr: PositiveFloat | None = Field(None, description="Limit of the absolute lr of any stage. None: no limit.")

    @check
    def _unused(self) -> Iterator[str]:
        reason = f"rule = {self.rule!r}"
        if self.rule != "area":
            yield from unused(self, ["max_global_batch_size"], reason)
        if self.rule == "none":
            yield from unused(self, ["max_lr"], reason)


class BatchConfig(Section):
    """Images per step. Accumulation follows from the global and the micro batch, stage by stage."""

    global_batch_size: Positive = Field(
        4096, description="Images per optimizer step, over all processes and accumulation steps."
    )
    micro_batch_size: Positive | None = Field(
        None, description="Images that one device holds at full image size. None: the whole batch of a process."
    )
    micro_batch_sizes: Annotated[tuple[Positive, ...], AsTuple] = Field(
        (),
        description="The same for each stage; replaces micro_batch_size. `mae-et plan --fit-micro-batch` finds the values.",
    )
    early_large_batch: EarlyLargeBatchConfig = EarlyLargeBatchConfig()

    @check
    def _limit(self) -> Iterator[str]:
        limit = self.early_large_batch.max_global_batch_size
        if limit is not None and limit < self.global_batch_size:
            yield (
                f"early_large_batch.max_global_batch_size = {limit} is below global_batch_size = {self.global_batch_size}, "
                "the batch at full image size"
            )


class OptimizerConfig(Section):
    """AdamW and its schedule. The defaults are MAE's."""

    base_lr: PositiveFloat = Field(1.5e-4, description="Learning rate for each 256 images of the global batch.")
    min_lr: Annotated[float, Field(ge=0)] = Field(0.0, description="Absolute lr at the end of the cosine.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.05, description="Weight decay; not of biases and norms.")
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], AsTuple
    ] = Field((0.9, 0.95), description="Decay rates of AdamW's moments.")  # fmt: skip
    eps: PositiveFloat = Field(1e-8, description="AdamW's epsilon.")
    clip_grad_norm: PositiveFloat | None = Field(None, description="Limit of the gradient's norm. None: no clipping.")


class ReplayStageConfig(Section):
    """The replay buffer of the stages at one bandwidth."""

    bandwidth: Positive = Field(description="Bandwidth of the stages, px.")
    factor: Positive = Field(description="R: images shown for each image that the loader prepares.")
    size: Positive = Field(
        256, description="Size of the buffer, in loader batches of global_batch_size / factor images, as published."
    )


class ReplayConfig(Section):
    """Shows prepared images again where the loader is the limit: see docs/guides/loading.md."""

    mode: Literal["off", "mix", "alternate"] = Field(
        "off", description="Replays images within each batch (mix) or as whole batches (alternate)."
    )
    stages: Annotated[tuple[ReplayStageConfig, ...], AsTuple] = Field(
        (), description="Factor and size by bandwidth; a bandwidth without a row has factor 1. Empty: as published."
    )
    max_memory_gib: PositiveFloat | None = Field(
        None, description="Limit of the buffers of all processes of one machine, GiB. None: the free memory."
    )

    @check
    def _one_row_per_bandwidth(self) -> Iterator[str]:
        bandwidths = [stage.bandwidth for stage in self.stages]
        for bandwidth in sorted({b for b in bandwidths if bandwidths.count(b) > 1}):
            yield f"stages name bandwidth {bandwidth} more than once: give it one row"


class RunConfig(Section):
    """How the run is carried out. Only `seed` and `precision` change what is learned."""

    seed: Count = Field(0, description="Seed of all random numbers.")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="Autocast precision. auto: bf16 on a GPU that supports it and on a CPU with AVX512_BF16 or AMX, otherwise "
        "fp32. The choice is made at the first start and kept on resuming.",
    )
    compile: bool = Field(False, description="Runs torch.compile, once for each bandwidth.")
    activation_checkpointing: bool = Field(False, description="Recomputes activations in the backward pass.")
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp",
        description="Several processes: each has the whole model (ddp), or a part of the parameters, gradients and moments "
        "(fsdp: FSDP2). One process has the whole model.",
    )
    data_parallel_shard_degree: Annotated[int, Field(ge=2)] | None = Field(
        None,
        description='Processes that share one copy of the parameters, with parallel = "fsdp". Below the number of processes: '
        "HSDP. None: all processes.",
    )
    gradient_dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="Type in which several processes average the gradients."
    )
    log_interval: Positive = Field(20, description="Steps between log lines.")
    loggers: Annotated[tuple[Literal["tensorboard", "wandb", "mlflow", "csv"], ...], AsTuple] = Field(
        ("tensorboard",),
        description="Where the run shows its curves besides metrics.jsonl: see docs/guides/logging.md.",
    )
    save_interval: Positive = Field(1000, description="Steps between checkpoints.")
    keep_checkpoints: Positive = Field(2, description="Number of newest checkpoints that are kept.")
    max_skipped_steps: Count = Field(
        0, description="Steps with a non-finite loss or gradient that are skipped before the run stops."
    )

    @check
    def _loggers(self) -> Iterator[str]:
        for name in sorted({name for name in self.loggers if self.loggers.count(name) > 1}):
            yield f"loggers has {name!r} more than once: remove the copies"

    @check
    def _sharding(self) -> Iterator[str]:
        if self.parallel == "ddp":
            yield from unused(self, ["data_parallel_shard_degree"], "parallel = 'ddp'")
        elif self.precision == "fp16":
            yield 'precision = "fp16" cannot be used with parallel = "fsdp": its loss scale is not shared. Use "bf16"'


class TrainConfig(Section):
    """The base of all training configs. A curriculum is planned from this alone, for every task."""

    data: DataConfig
    model: NetworkConfig = NetworkConfig()
    curriculum: CurriculumConfig = CurriculumConfig()
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    replay: ReplayConfig = ReplayConfig()
    run: RunConfig = RunConfig()

    @check
    def _image_size(self) -> Iterator[str]:
        size, multiple = self.data.image_size, self.model.size_multiple
        if any(side % multiple for side in size):
            common = math.gcd(*size)
            fitting = [str(n) for n in range(8, 33) if common % n == 0 and size[0] != size[1]]
            keep = f"; to keep the sides, set model.patch_size to {' or '.join(fitting)}" if fitting else ""
            yield (
                f"data.image_size = {size_text(size)} is not a multiple of {multiple}, the patch size; the nearest is "
                f"{size_text(nearest_size(size, multiple))}{keep}"
            )

    @check
    def _channels(self) -> Iterator[str]:
        for name in ("mean", "std"):
            with suppress(FaultyFieldError):
                values = getattr(self.data, name)
                if len(values) != self.model.in_chans:
                    yield f"data.{name} has {len(values)} values, but model.in_chans = {self.model.in_chans}"

    @check
    def _pictures_only(self) -> Iterator[str]:
        """Yields what is for 8-bit RGB or grey images alone."""
        channels, is_deep = self.model.in_chans, self.data.value_range is not None
        # Their headers say how many bits they have; `make_stream` checks these.
        are_raw = all(spec.endswith(".raw.json") for spec in split_sources(self.data.train))
        kind = f"model.in_chans = {channels}" if channels != 3 else "data.value_range"
        if self.data.loading == "fast" and not are_raw and (channels != 3 or is_deep):
            yield f'data.loading = "fast" decodes 8-bit colour JPEG files; with {kind} use "exact" or "direct"'
        kind = "data.value_range" if is_deep else f"model.in_chans = {channels}"
        if self.data.augmentation.ramp == "randaugment" and (channels not in (1, 3) or (is_deep and not are_raw)):
            yield (
                'data.augmentation.ramp = "randaugment" changes 8-bit RGB or grey pictures; with '
                f'{kind} use "none" or "crop_scale"'
            )
        if self.replay.mode != "off" and is_deep and not are_raw:
            yield f"replay.mode = {self.replay.mode!r} keeps 8-bit images; with data.value_range use 'off'"

    @check
    def _bandwidth_multiples(self) -> Iterator[str]:
        multiple = self.model.size_multiple
        for i, stage in enumerate(self.curriculum.stages):
            with suppress(FaultyFieldError):
                if stage.bandwidth % multiple:
                    below, above = stage.bandwidth // multiple * multiple, (stage.bandwidth // multiple + 1) * multiple
                    yield (
                        f"curriculum.stages[{i}].bandwidth = {stage.bandwidth} is not a multiple of {multiple}, the patch "
                        f"size; use {f'{below} or {above}' if below else above}"
                    )

    @check
    def _bandwidth_limits(self) -> Iterator[str]:
        for i, stage in enumerate(self.curriculum.stages):
            with suppress(FaultyFieldError):
                if stage.bandwidth > min(self.data.image_size):
                    yield (
                        f"curriculum.stages[{i}].bandwidth = {stage.bandwidth} exceeds "
                        f"{shorter_side(self.data.image_size)}"
                    )

    @check
    def _stage_batches(self) -> Iterator[str]:
        rule, own = self.batch.early_large_batch.rule, []
        for i, stage in enumerate(self.curriculum.stages):
            if stage.global_batch_size is not None:
                own.append(i)
        if rule == "area" and own:
            yield (
                f"batch.early_large_batch.rule = 'area' and curriculum.stages[{own[0]}].global_batch_size both set the batch "
                "of a stage: remove one, or set rule = 'list'"
            )
        if rule == "list" and not own:
            yield (
                "batch.early_large_batch.rule = 'list' needs a global_batch_size in curriculum.stages (preset = 'custom'); "
                "no stage has one"
            )

    @check
    def _max_lr(self) -> Iterator[str]:
        limit = self.batch.early_large_batch.max_lr
        lr = self.optimizer.base_lr * self.batch.global_batch_size / 256
        if limit is not None and limit < lr:
            yield (
                f"batch.early_large_batch.max_lr = {limit:g} is below the lr at full image size, "
                f"base_lr * global_batch_size / 256 = {lr:g}"
            )
