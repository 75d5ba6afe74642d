"""From a config of mmdetection or mmsegmentation to a run: what `tools/train.py` and `tools/test.py` share.

The config stays the library's own; what is put right here is what would end in silence or in somebody else's traceback:
packages, checkpoints that do not fit, mixed precision and SyncBN without a GPU, several processes without a GPU.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from mmengine.config import Config, ConfigDict
from mmengine.config import utils as config_utils
from mmengine.runner import Runner
from mmengine.runner.checkpoint import _load_checkpoint

from downstream.backbones.loading import load_strictly
from downstream.backbones.timm_features import TimmFeatures
from downstream.backbones.vit_det import ViTDet
from downstream.backbones.vit_seg import ViTSeg
from downstream.checks.config import check_data, check_normalisation, check_overrides
from downstream.compat.operators import provide_operators
from downstream.compat.packages import BY_SCOPE, check_packages, faults, installed_versions, locate, own_folder
from downstream.hooks.finite import FiniteHook
from downstream.hooks.seeding import StepSeedHook
from downstream.summary import SummaryHook, provenance
from mae_et.errors import CheckpointError, ConfigError, DataError, UserError

log = logging.getLogger(__name__)

STRICT_BACKBONES = (ViTDet, ViTSeg, TimmFeatures)
AMP_ONLY = ("loss_scale", "dtype", "use_fsdp")
_SAVE = re.compile(r"(?:iter|epoch)_(\d+)\.pth$")


def read_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Reads a config file and merges overrides, after a look at the packages.

    Args:
        path: a Python config; `_base_ = "mmdet::..."` and "mmseg::..." name files of the installed packages.
        overrides: dotted keys and values, as from --cfg-options.
    Raises:
        UserError: if packages are not in order, with the commands that mend it.
        ConfigError: if the file is missing or cannot be read, or an override would change nothing.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError([f"no such file: {path}"], str(path))
    config_utils.MODULE2PACKAGE["mmseg"] = "mmseg"  # it names the package before its continuation, which is another now
    try:
        config = Config.fromfile(str(path))
    except Exception as error:  # mmengine runs the file as Python: anything can come out of it
        broken = {line for scope in BY_SCOPE for line in faults(scope, installed_versions(), locate, own_folder)}
        if broken and isinstance(error, (ImportError, FileNotFoundError, AssertionError)):
            raise UserError(
                "the packages are not in order:\n" + "\n".join(f"  - {x}" for x in sorted(broken))
            ) from error
        raise ConfigError([f"cannot be read: {type(error).__name__}: {error}"], str(path)) from error
    if "model" not in config:
        raise ConfigError(["no model in it: is it a config of detection or segmentation?"], str(path))
    check_packages(config.get("default_scope", "none"))
    if overrides:
        check_overrides(config, overrides)
        config.merge_from_dict(dict(overrides))
    return config


def set_backbone(config: Config, path: str | Path) -> None:
    """Makes the model start from a backbone file, loaded strictly.

    Raises:
        CheckpointError: if there is no such file.
        UserError: if the backbone of the config is not one of ours, which alone load strictly.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"no such backbone file: {path}")
    backbone = _without_wrapper(config.model).get("backbone") or {}
    names = [cls.__name__ for cls in STRICT_BACKBONES]
    if str(backbone.get("type")).rpartition(".")[2] not in names:
        raise UserError(
            f"--backbone needs one of {', '.join(names)} as model.backbone, not {backbone.get('type')!r}: others load in silence"
        )
    backbone["init_cfg"] = {"type": "Pretrained", "checkpoint": str(Path(path).resolve())}


def prepare(config: Config, launcher: str = "none", amp: bool = False) -> None:
    """Fits a config to this machine, in place; says what it changes.

    Args:
        config: as read.
        launcher: "none", "pytorch", "slurm" or "mpi".
        amp: mixed precision, where there is a GPU; in float16, or in what `optim_wrapper.dtype` says.
    Raises:
        UserError: if bfloat16 is asked of mmcv's compiled operators, which have none.
    """
    config.launcher = launcher
    cuda = torch.cuda.is_available()
    wrapper = config.get("optim_wrapper")
    if wrapper is not None:
        if amp:
            wrapper["type"] = "AmpOptimWrapper"
        if wrapper.get("type") == "AmpOptimWrapper":
            _set_precision(config, cuda)
    if not cuda and (count := _replace_type(config.model, "SyncBN", "BN")):
        log.warning("no GPU: BN in place of SyncBN, in %d places", count)
    for name in ("val_evaluator", "test_evaluator"):
        if _replace_type(config.get(name), "CocoMetric", "CocoMetricOrZero"):
            import downstream.compat.coco_metric  # noqa: F401 (registers it; needs mmdet)
    if launcher == "pytorch" and not cuda:
        _start_gloo()
        config.env_cfg = ConfigDict(config.get("env_cfg") or {})
        config.env_cfg.dist_cfg = {"backend": "gloo"}
        config.model_wrapper_cfg = {"type": "MMDistributedDataParallel", "device_ids": None}


def set_start(config: Config, resume: str | None) -> bool:
    """Sets what a run continues from.

    Args:
        config: with `work_dir`.
        resume: None: nothing; "auto": the newest checkpoint of the work dir, if there is one; else a checkpoint.
    Returns:
        Whether there is something to continue from.
    Raises:
        CheckpointError: if the checkpoint given is missing.
        UserError: if nothing is to be continued and the work dir holds a run.
    """
    newest = _newest_checkpoint(Path(config.work_dir))
    if resume is None:
        if newest is not None and not config.get("resume"):
            raise UserError(
                f"{config.work_dir} holds a run already ({newest.name}): --resume goes on with it; or choose another --work-dir"
            )
        return False
    found = newest if resume == "auto" else Path(resume)
    if found is None:
        log.warning("nothing to resume in %s: starting from the beginning", config.work_dir)
        return False
    if not found.is_file():
        raise CheckpointError(f"no checkpoint to resume from: {found}")
    log.info("resuming from %s", found)
    config.resume, config.load_from = True, str(found)
    backbone = _without_wrapper(config.model).get("backbone")
    if backbone is not None:
        backbone["init_cfg"] = None  # the checkpoint has it all; the file may be gone by now
    return True


def train(config: Config) -> None:
    """Trains, and writes `summary.json` into the work dir.

    Raises:
        CheckpointError: if the backbone file or `load_from` does not fit the model, naming keys and shapes.
        DataError: if annotations do not fit their images or classes, or an image is broken.
        ConfigError: if the backbone was pre-trained with another normalisation.
        NonFiniteError: if a loss or gradient was NaN or infinite.
    """
    check_data(config, ("train_dataloader", "val_dataloader"))
    backbone = provenance(backbone_file(config))
    if backbone is not None:
        check_normalisation(config, backbone)
    _add_hooks(config, {"type": StepSeedHook.__name__}, {"type": FiniteHook.__name__},
               {"type": SummaryHook.__name__, "backbone": backbone})  # fmt: skip
    runner: Any = Runner.from_cfg(config)
    _tell_batch(runner)
    if config.get("load_from"):
        load_checkpoint(runner.model, config.load_from)  # the library loads it again, with warnings only
    if backbone is None and not config.get("load_from"):
        log.warning("no --backbone, no load_from: the backbone starts from random weights")
    with _explained():
        runner.train()


def evaluate(config: Config, checkpoint: str | Path, tta: bool = False) -> dict[str, float]:
    """Evaluates a checkpoint, and writes `test_summary.json`, with tta `test_summary_tta.json`, into the work dir.

    Args:
        config: as prepared.
        checkpoint: of a training run.
        tta: several scales and flips, by the config's `tta_model` and `tta_pipeline`.
    Returns:
        The metrics.
    Raises:
        CheckpointError: if it does not fit the model, naming keys and shapes.
        DataError: if annotations do not fit their images or classes, or an image is broken.
        ConfigError: if the config says nothing about tta.
    """
    if not Path(checkpoint).is_file():
        raise CheckpointError(f"no such checkpoint: {checkpoint}")
    check_data(config, ("test_dataloader",))
    if tta:
        if "tta_model" not in config or "tta_pipeline" not in config:
            raise ConfigError(["--tta needs tta_model and tta_pipeline"], str(config.filename))
        config.test_dataloader.dataset.pipeline = config.tta_pipeline
        config.model = ConfigDict(**config.tta_model, module=config.model)
    _add_hooks(config, {"type": SummaryHook.__name__, "tta": tta, "checkpoint": Path(checkpoint).name})
    config.load_from, config.resume = None, False
    backbone = _without_wrapper(config.model).get("backbone")
    if backbone is not None:
        backbone["init_cfg"] = None
    runner: Any = Runner.from_cfg(config)
    content = load_checkpoint(_unwrapped(runner.model).module if tta else runner.model, checkpoint)
    runner.call_hook("after_load_checkpoint", checkpoint=content)
    with _explained():
        return runner.test()


def backbone_file(config: Config) -> str | None:
    """Returns the file that the backbone of a config starts from; None where it starts at random."""
    backbone = _without_wrapper(config.model).get("backbone") or {}
    return (backbone.get("init_cfg") or {}).get("checkpoint")


def load_checkpoint(model: Any, checkpoint: str | Path) -> dict[str, Any]:
    """Loads a checkpoint of a training run, every key accounted for; returns its content.

    Raises:
        CheckpointError: if it is none, or does not fit, naming keys and shapes.
    """
    if Path(checkpoint).suffix == ".safetensors":
        raise CheckpointError(
            f"{checkpoint} is a backbone file, no checkpoint of a training run: it goes to --backbone of tools/train.py"
        )
    try:
        content = _load_checkpoint(str(checkpoint), map_location="cpu")
    except Exception as error:
        raise CheckpointError(f"{checkpoint} cannot be read: {type(error).__name__}: {error}") from error
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{checkpoint} is no checkpoint of a training run; a backbone file goes to --backbone of tools/train.py"
        )
    load_strictly(_unwrapped(model), {key.removeprefix("module."): value for key, value in state.items()}, checkpoint)
    return content


def _set_precision(config: Config, cuda: bool) -> None:
    wrapper = config.optim_wrapper
    if not cuda:
        log.warning("no GPU: float32 in place of mixed precision")
        wrapper["type"] = "OptimWrapper"
        for key in AMP_ONLY:
            wrapper.pop(key, None)
    elif wrapper.get("dtype") == "bfloat16":
        if config.get("default_scope") == "mmdet" and provide_operators() == "compiled":
            raise UserError(
                "optim_wrapper.dtype = 'bfloat16', which mmcv's compiled RoIAlign does not know: use 'float16', or mmcv "
                "without its operators"
            )
        wrapper["loss_scale"] = {"enabled": False}  # its range is that of float32


def _add_hooks(config: Config, *hooks: dict[str, Any]) -> None:
    config.custom_hooks = [*(config.get("custom_hooks") or []), *hooks]


def _newest_checkpoint(work_dir: Path) -> Path | None:
    """Returns the checkpoint that the library noted last; else that of the highest number, e.g. where the note was lost."""
    note = work_dir / "last_checkpoint"
    if note.is_file():  # with the path of old, also of a folder that has moved
        noted = work_dir / Path(note.read_text(encoding="utf-8").strip()).name
        if noted.is_file():
            return noted
    numbered = {int(match[1]): path for path in work_dir.glob("*.pth") if (match := _SAVE.match(path.name))}
    return numbered[max(numbered)] if numbered else None


def _tell_batch(runner: Any) -> None:
    """Counts accumulated steps to the batch, which the library forgets, and says what another batch than the recipe's means."""
    scaling, wrapper = runner.auto_scale_lr, runner.cfg.optim_wrapper
    if not scaling or not scaling.get("enable"):
        return
    accumulated = wrapper.get("accumulative_counts", 1)
    planned = scaling["base_batch_size"]
    scaling["base_batch_size"] = planned / accumulated
    per_step = runner.world_size * runner.cfg.train_dataloader.batch_size
    if per_step * accumulated != planned:
        log.warning(
            "batch %d, the recipe's is %d: its learning rates are multiplied by %g",
            per_step * accumulated, planned, per_step * accumulated / planned,
        )  # fmt: skip
    if per_step != planned and runner.cfg.train_cfg.get("max_iters"):
        log.warning(
            "a step sees %d images, the recipe's %d: max_iters = %d are %g of its budget; see docs/transfer.md, few GPUs",
            per_step, planned, runner.cfg.train_cfg.max_iters, per_step / planned,
        )  # fmt: skip


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turns what the libraries raise for a user's fault into a message with its remedy."""
    try:
        yield
    except (AssertionError, FileNotFoundError) as error:
        told = str(error).strip().splitlines()[-1]  # the first lines may be a traceback of a loader process
        if isinstance(error, FileNotFoundError) or "failed to load image" in told:
            raise DataError(
                f"an image or mask cannot be read: {told}; mend it, or take it out of the data set"
            ) from error
        raise
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            "BatchNorm cannot train on one image: set train_dataloader.batch_size to 2 or more, or use SyncBN with several GPUs"
        ) from error
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"too little GPU memory ({str(error).splitlines()[0]}): lower train_dataloader.batch_size (learning rates follow), "
            "set model.backbone.activation_checkpointing=True, or use --amp"
        ) from error


def _unwrapped(model: Any) -> Any:
    is_parallel = isinstance(model, torch.nn.parallel.DistributedDataParallel)
    return model.module if is_parallel else model


def _without_wrapper(model: Any) -> Any:
    return model.module if "module" in model else model


def _replace_type(node: Any, old: str, new: str) -> int:
    """Replaces a `type` wherever it stands below a node; returns how often."""
    count = 0
    if isinstance(node, dict):
        if node.get("type") == old:
            node["type"], count = new, 1
        count += sum(_replace_type(value, old, new) for value in node.values())
    elif isinstance(node, (list, tuple)):
        count += sum(_replace_type(value, old, new) for value in node)
    return count


def _start_gloo() -> None:
    """mmengine would ask for a CUDA device first, also for gloo."""
    if not torch.distributed.is_initialized():
        lacking = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if lacking:
            raise UserError("--launcher pytorch: start with torchrun --nproc_per_node N tools/train.py ...")
        torch.distributed.init_process_group("gloo")
