"""The wiring that all training tasks share: data, plan, run folder, stream, trainer, summary."""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

import mae_et
from mae_et.config.data import DataConfig
from mae_et.config.schema import TrainConfig, to_dict
from mae_et.curriculum.cost import ModelCost
from mae_et.curriculum.plan import Plan, make_plan
from mae_et.data.inspection import inspect_images
from mae_et.data.replay import check_memory, make_stream
from mae_et.data.sources.several import describe_sampling
from mae_et.data.sources.source import ImageSource
from mae_et.data.transforms import make_train_transform
from mae_et.engine.distributed import World, join_world, restarts_by_itself
from mae_et.engine.hardware import available_memory
from mae_et.engine.loggers import check_installed
from mae_et.engine.precision import device_peak_tflops
from mae_et.engine.progress import Progress
from mae_et.engine.task import Task
from mae_et.engine.trainer import Trainer, TrainerSettings
from mae_et.errors import DataError
from mae_et.models.sizes import size_text
from mae_et.runs.folder import RunFolder, describe_data, describe_model
from mae_et.runs.record_files import write_record
from mae_et.runs.records import InitialWeights, TrainingSummary
from mae_et.runs.summary import summarize, write_stage_scalars
from mae_et.storage.metrics_file import read_jsonl
from mae_et.tasks.resolve import resolve

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskData:
    """The images of a run."""

    train: ImageSource
    val: ImageSource | None = None
    class_names: tuple[str, ...] = ()


class TrainingTask(Task):
    """A task that `run_training` can carry out: what the trainer asks for, and what a run writes besides.

    A subclass builds the model on the device and sets the attributes below in its constructor.

    Attributes:
        world: this process among the others.
        work_dir: the run folder.
        kind: of the run, stored in its checkpoints.
        optimizer: over the model's parameters; its learning rate is set step by step.
        metadata: what a backbone file of this run says about itself, as strings.
        summary_type: of summary.json.
        initial_weights: what the run starts from; None: random weights.
        resumes_other_weights: whether a run resumes although the file of its initial weights changed or is gone.
        sees_batch_split: whether losses depend on how a batch is split over processes and accumulation steps.
    """

    world: World
    work_dir: Path
    kind: ClassVar[str]
    summary_type: ClassVar[type[TrainingSummary]]
    resumes_other_weights: ClassVar[bool] = True
    sees_batch_split: ClassVar[bool] = False
    optimizer: torch.optim.Optimizer
    metadata: Mapping[str, str]
    initial_weights: InitialWeights | None = None

    @classmethod
    @abstractmethod
    def open_data(cls, config: Any) -> TaskData:
        """Opens the images of a config.

        Raises:
            DataError: if there are none, or labels are missing or do not match.
        """

    @classmethod
    @abstractmethod
    def cost(cls, config: Any) -> ModelCost:
        """Returns what the plan needs to know about the network of a config."""

    @abstractmethod
    def __init__(self, config: Any, data: TaskData, plan: Plan, world: World, work_dir: Path) -> None: ...

    def load_initial_weights(self) -> None:
        """Loads the weights that a new run starts from; a resumed run does not call it."""
        return

    @abstractmethod
    def finish(self, progress: Progress, metrics: list[dict[str, Any]]) -> dict[str, Any]:
        """Writes the result files at the end of a run; all processes take part, the main one writes.

        Args:
            progress: at the end.
            metrics: lines of metrics.jsonl; empty on other processes than the main one.
        Returns:
            What the task adds to summary.json.
        """


def run_training(
    task_type: type[TrainingTask],
    config: TrainConfig,
    work_dir: str | Path,
    resume: bool = False,
    device: str | None = None,
) -> dict[str, Any]:
    """Runs a training from its config to its summary.

    Args:
        task_type: what is trained.
        config: as checked.
        work_dir: gets config.py, plan.json, environment.json, run.log, metrics.jsonl, checkpoints/, summary.json and the
            files of the loggers and of the task.
        resume: continue from the newest checkpoint in `work_dir`; start the run if there is none. Always on where torchrun
            may restart the processes (`--max-restarts`).
        device: "cpu" or "cuda"; None: CUDA where available.
    Returns:
        The summary, as in summary.json; empty on other processes than the main one.
    Raises:
        UserError: what the user can fix; see errors.py.
    """
    work_dir, start = Path(work_dir), time.perf_counter()
    resume = resume or restarts_by_itself()
    check_installed(config.run.loggers)
    with join_world(device) as world:
        data = task_type.open_data(config)
        num_images = len(data.train)
        if config.data.num_images not in (None, num_images):
            log.warning("data.num_images = %d, but data.train holds %d images", config.data.num_images, num_images)
        config, resolved = resolve(task_type, config, data, world, work_dir, resume, start)
        plan = make_plan(config, task_type.cost(config), num_images, world.size, world.local_size)
        for note in plan.notes:
            log.info("note: %s", note)
        check_memory(plan, available_memory())

        torch.manual_seed(config.run.seed)
        task = task_type(config, data, plan, world, work_dir)
        with RunFolder(work_dir, config, world) as folder:
            findings = inspect_data(data, config.data, world)
            identity = identify(config, task, data.train, plan, world)
            state = folder.open(resume, identity, plan, resolved)
            if state is None:
                task.load_initial_weights()
            trainer = make_trainer(config, task, data.train, plan, identity)
            if state is not None:
                trainer.load_state(state)
            log.info(
                "%s: %s, %d images, %d steps in %s %s, on %s",
                work_dir, describe_model(task.model), num_images, plan.num_steps,
                "1 stage at bandwidth" if len(plan.stages) == 1 else f"{len(plan.stages)} stages at bandwidths",
                ", ".join(size_text(stage.input_size) for stage in plan.stages), world.device,
            )  # fmt: skip
            progress = trainer.fit()
            with trainer.parallel.evaluation():
                return sum_up(config, task, plan, progress, findings)


def inspect_data(data: TaskData, options: DataConfig, world: World) -> dict[str, Any]:
    """Inspects the images on the main process and logs what it finds.

    Args:
        data: of the run.
        options: of the config.
        world: all processes stop if the main one finds errors.
    Returns:
        The findings for summary.json; empty on other processes than the main one.
    Raises:
        DataError: with all errors.
    """
    fault, findings = None, {}
    if world.is_main:
        found = inspect_images(data.train, data.val, options.image_size)
        if options.train_weights:
            found.add("count", "sampling", describe_sampling(data.train, options.train_weights))
        found.log()
        findings = found.to_dict()
        try:
            found.raise_errors()
        except DataError as error:
            fault = str(error)
    if fault := world.gather(fault)[0]:
        raise DataError(fault)
    return findings


def identify(config: TrainConfig, task: TrainingTask, source: ImageSource, plan: Plan, world: World) -> dict[str, Any]:
    """Returns what makes a run the same run when it is resumed; each checkpoint holds it."""
    split = None
    if task.sees_batch_split or plan.replay_bytes:  # each process has a replay buffer of its own
        sizes = [stage.micro_batch_size for stage in plan.stages] if task.sees_batch_split else None
        split = {"num_processes": world.size, "micro_batch_sizes": sizes}
    weights = task.initial_weights
    return {
        "kind": task.kind,
        "version": mae_et.__version__,
        "config": to_dict(config),
        "metadata": dict(task.metadata),
        "num_steps": plan.num_steps,
        "initial_weights": None if task.resumes_other_weights or weights is None else weights.encoder_sha256,
        "batch_split": split,
        **describe_data(source),
    }


def make_trainer(
    config: TrainConfig, task: TrainingTask, source: ImageSource, plan: Plan, identity: Mapping[str, Any]
) -> Trainer:
    """Returns the trainer of a run. Its checkpoints hold `identity`."""
    world = task.world
    on_gpu = world.device.type == "cuda"
    stream = make_stream(source, make_train_transform(config.data), plan, config, world.rank, on_gpu)
    settings = TrainerSettings(
        run=config.run,
        work_dir=task.work_dir,
        clip_grad_norm=config.optimizer.clip_grad_norm,
        max_bad_images=int(config.data.max_bad_fraction * len(source)),
        image_name=source.name,
        identity=identity,
    )
    return Trainer(plan, task, task.optimizer, stream, world, settings)


def sum_up(
    config: TrainConfig, task: TrainingTask, plan: Plan, progress: Progress, findings: dict[str, Any]
) -> dict[str, Any]:
    """Writes the results of a finished run and returns its summary; empty on other processes than the main one."""
    world, work_dir = task.world, task.work_dir
    metrics = read_jsonl(work_dir / "metrics.jsonl") if world.is_main else []
    own = task.finish(progress, metrics)
    if not world.is_main:
        return {}
    peak_tflops = device_peak_tflops(config.run.precision, world.device)
    cost = summarize(plan, progress, metrics, world, peak_tflops)
    record = task.summary_type(**own, **cost, initial_weights=task.initial_weights, data_findings=findings)
    write_record(work_dir / "summary.json", record)
    summary = record.model_dump(mode="json")
    write_stage_scalars(summary, plan, work_dir, config.run.loggers)
    return summary
