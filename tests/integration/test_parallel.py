"""Training on several processes: DDP and FSDP2 give the losses of one process, from checkpoints of any form."""

from __future__ import annotations

import copy
import functools
import itertools
import os
import pickle
import shutil
import signal
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mae_et.config.schema import PretrainConfig, RunConfig, from_dict
from mae_et.engine import trainer as trainer_module
from mae_et.engine.checkpoints import Checkpoints
from mae_et.engine.distributed import World, join_world
from mae_et.engine.guard import NonFiniteGuard
from mae_et.engine.parallel import Parallel, find_blocks, make_mesh
from mae_et.engine.task import Task
from mae_et.errors import CheckpointError, ConfigError, UserError
from mae_et.models.cswin import CSWin
from mae_et.models.resize import change_input_size
from mae_et.storage import sharded_checkpoint
from mae_et.storage.backbone import load_mae
from mae_et.storage.checkpoint import check_whole, list_checkpoints, load_checkpoint, load_newest
from mae_et.tasks.pretrain import MAETask
from mae_et.tasks.run import run_training
from tests import processes
from tests.conftest import Stop, losses, small_values

# Three blocks, 8 steps in two stages, checkpoints at steps 3, 6 and 8.
TINY: dict[str, Any] = {
    "model__embed_dim": 16, "model__num_heads": 2, "model__depth": 2, "model__decoder_embed_dim": 16, "model__decoder_depth": 1,
    "curriculum__stages": [
        {"compute_fraction": 0.3, "bandwidth": 16, "strength": 0.0},
        {"compute_fraction": 0.7, "bandwidth": 32, "strength": 1.0},
    ],
    "curriculum__equivalent_epochs": 1.6, "curriculum__warmup_equivalent_epochs": 0.5,
    "optimizer__clip_grad_norm": 0.3, "model__ema_decay": 0.9,
    "run__save_interval": 3, "run__keep_checkpoints": 9,
}  # fmt: skip
FSDP = {"run__parallel": "fsdp"}
ALONE = World(0, 1, 1, torch.device("cpu"))


class Quiet(MAETask):
    """Pre-trains without pictures and accuracies."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.hooks = []


def train(work_dir: Path, resume: bool = False, task: type = Quiet, **overrides: Any) -> dict[str, Any]:
    config = from_dict(PretrainConfig, small_values(**{**TINY, **overrides}))
    return run_training(task, config, work_dir, resume=resume, device="cpu")


def must_succeed(ended: list[tuple[int, str]]) -> None:
    assert [code for code, _ in ended] == [0] * len(ended), [text[-3000:] for _, text in ended]


def names(work_dir: Path) -> list[str]:
    return [path.name for path in list_checkpoints(work_dir / "checkpoints")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run in one process."""
    work_dir = tmp_path_factory.mktemp("alone") / "run"
    train(work_dir)
    return work_dir


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that two processes shard, with two micro batches in a step."""
    work_dir = tmp_path_factory.mktemp("two") / "run"
    options = {
        **FSDP,
        "batch__micro_batch_size": 2,
        "run__activation_checkpointing": True,
        "data__val": "scenes:7@32,seed=4",
    }
    must_succeed(processes.run(partial(train, work_dir, **options), 2, work_dir.parent / "output"))
    return work_dir


@pytest.fixture
def copied(two: Path, tmp_path: Path) -> Path:
    return shutil.copytree(two, tmp_path / "run")


# -------------------------------------------------------------------- equal losses, from checkpoints of any form


def test_fsdp__two_processes_equal_one(alone: Path, two: Path) -> None:
    assert losses(two) == pytest.approx(losses(alone), rel=1e-4)
    ours, expected = (load_file(folder / "backbone.safetensors") for folder in (two, alone))
    assert ours.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-3, atol=1e-4)
    assert names(two) == ["step_00000003", "step_00000006", "step_00000008"]
    for path in list_checkpoints(two / "checkpoints"):
        check_whole(path)


def test_fsdp__one_process_resumes_from_a_sharded_checkpoint(alone: Path, copied: Path) -> None:
    """The newest checkpoint has a changed byte, and a part of the one before is missing: the run resumes from step 3."""
    part = copied / "checkpoints/step_00000008/__1_0.distcp"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    (copied / "checkpoints/step_00000006/__0_0.distcp").unlink()
    shutil.copytree(copied / "checkpoints/step_00000003", copied / "checkpoints/.step_00000009.writing")
    said: list[str] = []
    path, _ = load_newest(copied / "checkpoints", said.append)
    assert path.name == "step_00000003"
    assert "__1_0.distcp is damaged: its SHA-256 differs" in said[0]
    assert "1 of its 4 files are missing: __0_0.distcp" in said[1]
    train(copied, resume=True)
    assert losses(copied) == pytest.approx(losses(alone), rel=1e-4)
    assert names(copied) == ["step_00000003", "step_00000006.pt", "step_00000008.pt"]
    assert not list((copied / "checkpoints").glob(".*"))


def test_fsdp__four_processes_in_two_groups_resume_from_a_single_file(alone: Path, tmp_path: Path) -> None:
    work_dir = shutil.copytree(alone, tmp_path / "run")
    for step in (6, 8):
        (work_dir / f"checkpoints/step_0000000{step}.pt").unlink()
    options = {**FSDP, "run__data_parallel_shard_degree": 2}
    must_succeed(processes.run(partial(train, work_dir, resume=True, **options), 4, tmp_path / "output"))
    assert losses(work_dir) == pytest.approx(losses(alone), rel=1e-4)
    assert names(work_dir) == ["step_00000003.pt", "step_00000006", "step_00000008"]


def test_sharded_checkpoint__gives_weights_like_a_file(alone: Path, two: Path) -> None:
    model = load_mae(two)[0].state_dict()
    assert set(load_checkpoint(two / "checkpoints/step_00000008")["model"]) == set(model)
    for key, value in load_mae(alone)[0].state_dict().items():
        torch.testing.assert_close(model[key], value, rtol=1e-3, atol=1e-4)


# -------------------------------------------------------------------- saves that are cut off or fail


def train_until_killed(work_dir: Path, victim: int, place: str) -> None:
    """Kills one process inside the save of step 6: while it writes its tensors, or when all are written."""
    original = getattr(sharded_checkpoint, place)

    def killing(*args: Any, **kwargs: Any) -> Any:
        temporary = work_dir / "checkpoints/.step_00000006.writing"
        if int(os.environ["RANK"]) == victim and temporary.is_dir() and (place == "stage" or any(temporary.iterdir())):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(sharded_checkpoint, place, killing)
    train(work_dir, **FSDP)


@pytest.mark.parametrize(("victim", "place"), [(0, "_sync"), (1, "_fingerprint")])
def test_fsdp__killed_inside_a_save(alone: Path, tmp_path: Path, victim: int, place: str) -> None:
    ended = processes.run(partial(train_until_killed, tmp_path / "run", victim, place), 2, tmp_path / "output")
    assert ended[victim][0] == -signal.SIGKILL
    code, text = ended[1 - victim]
    assert code == 1, text[-3000:]
    assert "lost contact with another training process" in text
    assert names(tmp_path / "run") == ["step_00000003"]
    train(tmp_path / "run", resume=True)
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=1e-4)


def test_check_sharded__damage_is_named(copied: Path) -> None:
    path = copied / "checkpoints/step_00000008"
    with open(path / "values.pt", "ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match=r"values\.pt is damaged: it has \d+ bytes"):
        check_whole(path)
    (path / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"its manifest\.json cannot be read"):
        check_whole(path)
    (path / "manifest.json").write_text('{"files": {}}')
    with pytest.raises(CheckpointError, match="not whole"):
        check_whole(path)


class Payload:
    def __reduce__(self) -> Any:
        return os.system, ("echo code ran",)


def test_load_checkpoint__metadata_runs_no_code(copied: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = copied / "checkpoints/step_00000008"
    (path / ".metadata").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(CheckpointError, match="could run code; nothing was run"):
        load_checkpoint(path, verify=False)
    assert "code ran" not in capfd.readouterr().out


# -------------------------------------------------------------------- what several processes check at once


class Tables(Task):
    """A ViT with a position table that depends on the size of the images."""

    def __init__(self, device: torch.device) -> None:
        torch.manual_seed(0)
        self.model = timm.create_model(
            "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=4
        ).to(device)
        self.ema = ModelEmaV3(self.model, decay=0.5)

    def preprocess(self, images: Tensor, bandwidth: int) -> Tensor:
        return images

    def loss(self, model: nn.Module, images: Tensor, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return F.cross_entropy(model(images), batch), {}

    def enter_bandwidth(self, bandwidth: int, optimizer: torch.optim.Optimizer) -> bool:
        return change_input_size(self.model, optimizer, self.ema, bandwidth)


def steps_at_two_sizes(world: World, run: RunConfig) -> dict[str, Any]:
    task = Tables(world.device)
    optimizer = torch.optim.AdamW(
        list(task.model.named_parameters()), lr=1e-2, eps=1e-3, fused=True
    )  # a large eps: some gradients are rounding noise
    parallel = Parallel(task, optimizer, world, run, SimpleNamespace(stages=()))  # type: ignore[arg-type]
    seen = []
    generator = torch.Generator().manual_seed(0)
    for size in (16, 32, 16):
        parallel.enter_bandwidth(size)
        model = parallel.wrap()
        for _ in range(2):
            images, labels = torch.randn(4, 3, size, size, generator=generator), torch.arange(4)
            with torch.autocast("cpu", parallel.dtype, enabled=parallel.dtype is not None):
                loss, _ = task.loss(model, world.share(images), world.share(labels))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            task.ema.update(task.model)
            seen.append(float(world.mean(loss.detach())))
    with parallel.evaluation():
        copy.deepcopy(task.model)
        ema = {name: value.clone() for name, value in task.ema.module.state_dict().items()}
        if world.is_main:  # the others do not take part
            seen.append(float(task.ema.module(torch.ones(1, 3, 16, 16))[0, 0].detach()))
    moments = {name: parallel.tensors()[f"optimizer.{name}.exp_avg_sq"] for name in ("pos_embed", "head.weight")}
    moments = {n: m.full_tensor() if hasattr(m, "full_tensor") else m for n, m in moments.items()}
    return {"seen": seen, "moments": moments, "ema": ema}


class HostReads(TorchFunctionMode):
    """Lists the calls that give the host the value of a tensor. On a GPU each would wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "nonzero"):
            self.calls.append(name)
        return func(*args, **(kwargs or {}))


def counted_steps(work_dir: Path, **options: Any) -> tuple[Counter[str], list[str]]:
    """Returns the collectives and the reads of the host in two steps.

    The device decides about non-finite steps, as on a GPU.
    """
    collectives, reads = Counter[str](), HostReads()
    original, profiler = trainer_module.Trainer.train_step, torch.profiler.profile()
    held: list[Any] = []

    def step(self: Any, batches: Any, stop: Any) -> Any:
        if self.progress.step == 5:  # DDP has arranged its buckets
            held.extend(itertools.islice(batches, 2))  # the transforms of the loader are not counted
            profiler.__enter__()
            reads.__enter__()
        if self.progress.step == 7:
            reads.__exit__(None, None, None)
            profiler.__exit__(None, None, None)
            collectives.update(event.name for event in profiler.events() if event.name.startswith("gloo:"))
            raise Stop
        return original(self, iter([held.pop(0)]) if held else batches, stop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module.Trainer, "train_step", step)
        patch.setattr(trainer_module, "NonFiniteGuard", functools.partial(NonFiniteGuard, on_device=True))
        with pytest.raises(Stop):
            train(work_dir, run__log_interval=1000, run__save_interval=1000, **options)
    return collectives, reads.calls


def failed_save(world: World, folder: Path) -> str:
    parallel = SimpleNamespace(is_sharded=True, tensors=lambda: {"model.x": torch.ones(2)}, optimizer_values=list)
    (folder / "file").write_text("")
    checkpoints = Checkpoints(folder / "file", 1, world, parallel)  # type: ignore[arg-type]
    checkpoints.save(1, {})  # returns: the failure comes with the next call
    with pytest.raises(CheckpointError) as error:
        checkpoints.wait()
    return str(error.value)


def check_all(folder: Path) -> None:
    results: dict[str, Any] = {}
    with join_world("cpu") as world:
        low = RunConfig(parallel="fsdp", precision="bf16", gradient_dtype="bf16")
        results["bf16"] = steps_at_two_sizes(world, low)["seen"]
        results["sizes"] = steps_at_two_sizes(world, RunConfig(parallel="fsdp", precision="fp32"))
        with pytest.raises(UserError) as error:
            make_mesh(world, 3)
        results["mesh"] = str(error.value)
        results["failed save"] = failed_save(world, folder)
    ports = iter((folder / "ports").read_text().split())
    for name, options in (("ddp", {}), ("fsdp", FSDP)):
        os.environ["MASTER_PORT"] = next(ports)  # a port serves one group
        results[name] = counted_steps(folder / name, **options)
    torch.save(results, folder / f"rank_{os.environ['RANK']}.pt")


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("checked")
    (folder / "ports").write_text(" ".join(str(processes.free_port()) for _ in range(2)))
    must_succeed(processes.run(partial(check_all, folder), 2, folder / "output"))
    return folder, [torch.load(folder / f"rank_{rank}.pt", weights_only=False) for rank in range(2)]


def test_parallel__sharded_model_changes_its_input_size(checked: Any) -> None:
    ours, expected = checked[1][0]["sizes"], steps_at_two_sizes(ALONE, RunConfig(precision="fp32"))
    assert ours["seen"] == pytest.approx(expected["seen"], rel=1e-3)
    assert checked[1][0]["bf16"] == pytest.approx(expected["seen"], rel=0.05, abs=0.05)
    for part in ("moments", "ema"):
        assert ours[part].keys() == expected[part].keys()
        for name, value in expected[part].items():
            torch.testing.assert_close(ours[part][name], value, rtol=1e-2, atol=1e-5)


def test_make_mesh__degree_that_does_not_divide_the_processes(checked: Any) -> None:
    assert (
        "run.data_parallel_shard_degree = 3 does not divide the 2 processes: set it to one of 2"
        in checked[1][1]["mesh"]
    )


def test_checkpoints__a_failed_save_is_reported_in_all_processes(checked: Any) -> None:
    for result in checked[1]:
        assert "cannot write" in result["failed save"]


def test_train_step__collectives_and_waits(checked: Any) -> None:
    """One reduce of the gradients, one of the flags. The host reads one number: the votes to stop, on a GPU those before."""
    for result in checked[1]:
        assert result["ddp"] == ({"gloo:all_reduce": 4}, ["__bool__"] * 2)
        # Two gathers of each of three blocks, one of the root; a reduce of the gradients of each; norm and flags.
        # gloo carries out a reduce-scatter as an all-reduce, depending on the version of torch.
        collectives, reads = result["fsdp"]
        assert (sum(collectives.values()), reads) == (2 * (7 + 4 + 2), ["__bool__"] * 2)


# -------------------------------------------------------------------- without processes


@pytest.mark.parametrize(
    ("name", "num", "kind"),
    [
        ("vit_tiny_patch16_224", 12, "Block"),
        ("resnet50", 16, "Bottleneck"),
        ("convnext_tiny", 18, "ConvNeXtBlock"),
        ("swin_tiny_patch4_window7_224", 12, "SwinTransformerBlock"),
        ("caformer_s18", 18, "MetaFormerBlock"),
    ],
)
def test_find_blocks__of_timm(name: str, num: int, kind: str) -> None:
    with torch.device("meta"):
        blocks = find_blocks(timm.create_model(name))
    assert [type(block).__name__ for block in blocks] == [kind] * num


def test_find_blocks__of_cswin_and_of_a_model_without_any() -> None:
    blocks = find_blocks(CSWin(embed_dim=16, depths=(1, 2, 1, 1), num_heads=(2, 2, 2, 2)))
    assert [type(block).__name__ for block in blocks] == ["CSWinBlock"] * 5
    assert find_blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU())) == []


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"data_parallel_shard_degree": 2}, "data_parallel_shard_degree = 2 has no effect with parallel = 'ddp'"),
        ({"parallel": "fsdp", "precision": "fp16"}, 'Use "bf16"'),
        ({"parallel": "zero"}, "'ddp', 'fsdp'"),
    ],
)
def test_config__faults(run: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(PretrainConfig, {"data": {"train": "x"}, "run": run})
