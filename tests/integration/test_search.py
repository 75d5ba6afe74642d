"""A curriculum search with real trainings of tiny models: the tree, kills, shared folders, costs and errors."""

import json
import multiprocessing
import shutil
from pathlib import Path

import pytest
import torch

from mae_et.commands.search import estimate_lines, main, make_parser, result_lines
from mae_et.config.files import load_config, save_config
from mae_et.config.schema import PretrainConfig, from_dict
from mae_et.config.search import SearchConfig
from mae_et.config.supervised import SupervisedConfig
from mae_et.curriculum.search.space import whole_trial
from mae_et.engine.distributed import World, join_world
from mae_et.errors import ConfigError, DataError, NonFiniteError, UserError
from mae_et.report.join import make_benchmark
from mae_et.report.page import write_report
from mae_et.runs.record_files import read_record
from mae_et.runs.search import SEARCH, SearchRecord, read_trials, record_of
from mae_et.storage.metrics_file import read_jsonl
from mae_et.tasks import scores
from mae_et.tasks.bayesian import BayesianSearch
from mae_et.tasks.pretrain import MAETask
from mae_et.tasks.search import CurriculumSearch
from mae_et.tasks.trials import TrialRunner
from tests.conftest import Stop, changing_loss, small_values

SEQUENTIAL = {"algorithm": "sequential", "candidates": [16, 32], "stages": 3, "proxy_epochs": 0.8, "noise_seeds": 2}


def mae_config(**overrides):
    own = {
        "data__val": "scenes:12@32,seed=4",
        "model__depth": 1,
        "model__decoder_depth": 1,
        "curriculum__preset": "etpp",
        "curriculum__stages": [],
        "curriculum__equivalent_epochs": 4.0,
        "curriculum__baseline_equivalent_epochs": 6.0,
        "curriculum__warmup_equivalent_epochs": 0.5,
        "run__save_interval": 3,
    }
    return from_dict(PretrainConfig, small_values(**{**own, **overrides}))


def supervised_config():
    values = small_values()
    del values["run"]["num_pictures"]
    return from_dict(
        SupervisedConfig,
        {
            "data": {**values["data"], "val": "scenes:12@32,seed=4"},
            "model": {"name": "resnet18", "options": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}},
            "curriculum": {
                "equivalent_epochs": 4.0,
                "baseline_equivalent_epochs": 6.0,
                "warmup_equivalent_epochs": 0.5,
            },
            "batch": {"global_batch_size": 8},
            "regularization": {"ema_decay": 0.9},
            "run": values["run"],
        },
    )


def search(config, work_dir, **settings):
    return CurriculumSearch(config, from_dict(SearchConfig, settings), work_dir)


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """The folder of an undisturbed search."""
    folder = tmp_path_factory.mktemp("tree")
    search(mae_config(), folder, score="loss", **SEQUENTIAL).run("cpu")
    return folder


def results(folder):
    """What must not depend on how often a search was stopped: all but the measured times."""
    record = json.loads((folder / SEARCH).read_text())
    del record["found"]["seconds"]
    trials = [trial.model_dump(exclude={"seconds"}) for trial in read_trials(folder)]
    return record, trials, (folder / "curriculum.py").read_text()


def test_sequential__writes_tree_table_and_curriculum(tree):
    record = read_record(tree / SEARCH, SearchRecord)
    trials = {trial.name: trial for trial in read_trials(tree)}
    assert len(trials) == 3 + 2 + 1  # noise with two seeds, which holds one candidate; two stages; the last stage
    for decision in record.found.decisions:
        prefix = [row.bandwidth for row in record.found.stages[: decision.stage - 1]]
        for band, (score,) in decision.scores.items():
            trial = trials["-".join(map(str, [*prefix, band])) + "_seed0"]
            assert trial.score == score
            assert trial.is_branch
    last = trials[record.found.trials[0]]
    assert last.bandwidths == [row.bandwidth for row in record.found.stages]
    assert record.found.score == last.score
    assert (tree / "tree.png").stat().st_size > 5000
    assert (tree / "trials.csv").read_text().count("\n") == len(trials) + 1


def test_sequential__costs_what_the_dry_run_says(tree, tmp_path):
    record = read_record(tree / SEARCH, SearchRecord)
    estimate = search(mae_config(), tmp_path / "unused", score="loss", **SEQUENTIAL).estimate()
    assert record.found.spent_equivalent_epochs == pytest.approx(estimate.equivalent_epochs[0], rel=0.1)
    assert record.found.num_trials == estimate.num_trials[0]
    assert not (tmp_path / "unused").exists()
    assert f"{estimate.equivalent_epochs[0]:.2f}" in estimate_lines(estimate)[-1]
    assert f"{record.found.spent_equivalent_epochs:.2f}" in "\n".join(result_lines(record, tree))


def test_sequential__killed_three_times_gives_the_same_tree(tree, tmp_path, monkeypatch):
    for num_batches in (4, 9, 17):  # in a branch, in a proxy, further down the tree
        count = iter(range(num_batches))

        def die(number, loss, count=count):
            if next(count, None) is None:
                raise Stop
            return loss

        killed = scores.Searchable(changing_loss(MAETask, die), scores._open_mae_data, {"loss": scores._held_out_loss})
        with monkeypatch.context() as patch:
            patch.setitem(scores.SEARCHABLE, PretrainConfig, killed)
            with pytest.raises(Stop):
                search(mae_config(), tmp_path, score="loss", **SEQUENTIAL).run("cpu")
    search(mae_config(), tmp_path, score="loss", **SEQUENTIAL).run("cpu")
    assert results(tmp_path) == results(tree)


def test_branch__begins_where_the_trunk_ends(tree):
    done = {trial.name: trial for trial in read_trials(tree)}
    branch = next(trial for trial in done.values() if trial.start_from and trial.is_branch)
    trunk_log, log = (read_jsonl(tree / "trials" / name / "metrics.jsonl") for name in (branch.start_from, branch.name))
    assert log[0]["step"] == trunk_log[-1]["step"] + 1
    assert log[0]["shown_images"] == trunk_log[-1]["shown_images"] + 8
    # One cosine over the budget: the rate does not start again.
    assert 0 < log[0]["lr"] < trunk_log[-1]["lr"]
    assert log[0]["compute_fraction"] == pytest.approx(trunk_log[-1]["compute_fraction"], abs=0.1)


def test_curriculum__is_taken_by_file_and_as_base(tree, tmp_path):
    path = tmp_path / "config.py"
    save_config(mae_config(), path, "A config.")
    found = read_record(tree / SEARCH, SearchRecord).found
    overrides = {"curriculum.file": str(tree / "curriculum.py")}
    config = load_config(PretrainConfig, path, overrides)
    assert [row.bandwidth for row in config.curriculum.stages] == [row.bandwidth for row in found.stages]
    assert config.curriculum.equivalent_epochs == found.equivalent_epochs
    assert config.curriculum.file is None
    more = load_config(PretrainConfig, path, {**overrides, "curriculum.equivalent_epochs": "7.5"})
    assert more.curriculum.equivalent_epochs == 7.5
    child = tmp_path / "child.py"
    child.write_text(
        f"_base_ = {str(tree / 'curriculum.py')!r}\ndata = dict(train='unused')\n"
        "curriculum = dict(warmup_equivalent_epochs=0.5)\nmodel = dict(patch_size=8)\n"
    )
    assert load_config(PretrainConfig, child).curriculum.stages == config.curriculum.stages
    with pytest.raises(ConfigError, match=r"curriculum\.file = .* cannot be read"):
        load_config(PretrainConfig, path, {"curriculum.file": "missing.py"})
    with pytest.raises(ConfigError, match=r"curriculum.file = .* holds batch, curriculum, data"):
        load_config(PretrainConfig, path, {"curriculum.file": str(path)})
    with pytest.raises(ConfigError, match="is read with a config file"):
        from_dict(PretrainConfig, {"data": {"train": "x"}, "curriculum": {"file": "curriculum.py"}})


def test_report__shows_table_and_picture(tree, tmp_path):
    write_report(make_benchmark([tree]), tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Curriculum searches" in page
    assert page.count("_seed0</th>") == sum(trial.seed == 0 for trial in read_trials(tree))
    text = (tmp_path / "report" / "report.md").read_text()
    assert "sequential search by loss: " in text
    score = read_record(tree / SEARCH, SearchRecord).found.score
    assert f"{score:.4g}" in (tmp_path / "report" / "figures" / "search_1.svg").read_text()
    assert "Not in the tables" not in text  # the trials are no runs of their own
    broken = tmp_path / "broken"
    shutil.copytree(tree, broken)
    (broken / SEARCH).write_text("{}")
    write_report(make_benchmark([broken]), tmp_path / "report")
    assert "cannot be read: record_version is none" in (tmp_path / "report" / "report.html").read_text()


def test_supervised__sequential_by_top1(tmp_path):
    record = search(
        supervised_config(), tmp_path, algorithm="sequential", candidates=[16, 32], stages=2, proxy_epochs=0.8,
        noise_seeds=2,
    ).run("cpu")  # fmt: skip
    assert record.settings.score == "top1"
    assert 0 <= record.found.score <= 1
    assert [row.bandwidth for row in record.found.stages][-1] == 32


def test_backward__full_runs_from_last_to_first(tmp_path):
    own = search(
        mae_config(), tmp_path, algorithm="backward", candidates=[16, 32], stages=2, noise_seeds=2, tolerance=1.0
    )
    record = own.run("cpu")
    assert [row.bandwidth for row in record.found.stages] == [16, 32]  # everything is within a tolerance of 1
    least, most = own.estimate().equivalent_epochs
    assert least * 0.9 <= record.found.spent_equivalent_epochs <= most * 1.1
    assert record.found.equivalent_epochs == pytest.approx(6 * (0.25 + 1) / 2)


# ---- Optuna ----

BAYESIAN = {"algorithm": "bayesian", "candidates": [16, 24, 32], "stages": 3, "noise_seeds": 2}


class ArtificialRunner(TrialRunner):
    """Scores a trial by its curriculum, at once."""

    def _train_and_score(self, trial, world, watch):
        score = -sum(row.compute_fraction * abs(row.bandwidth - 20) for row in trial.rows) + trial.seed * 1e-3
        if watch is not None and any(watch(part, score) for part in (1, 2)):
            status = "pruned"
        else:
            status = "finished"
        return record_of(trial, status=status, score=score, equivalent_epochs=4.0, real_epochs=4.0, seconds=0.1)


def take_trials(folder: Path, num_trials: int, sampler: str) -> None:
    own = search(mae_config(), folder, trials=num_trials, sampler=sampler, **BAYESIAN)
    runner = own.runner
    own.runner = ArtificialRunner(runner.config, runner.settings, runner.kind, runner.cost, runner.data, folder)
    own.run("cpu")


def test_bayesian__a_trial_that_ends_while_it_is_claimed_is_left_alone(tmp_path, monkeypatch):
    own = search(mae_config(), tmp_path, trials=4, **BAYESIAN)
    bayesian = BayesianSearch(own.runner, own.space, World(0, 1, 1, torch.device("cpu")))
    other, hold = bayesian.study.ask(), bayesian._hold

    def hold_late(number):
        if number == other.number:
            bayesian.study.tell(number, 0.5)  # by the process that had it
        return hold(number)

    monkeypatch.setattr(bayesian, "_hold", hold_late)
    claimed = bayesian._claim()
    assert claimed is not None
    with claimed as trial:
        assert trial is None or trial.number != other.number


def test_bayesian__two_processes_share_a_study(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=take_trials, args=(tmp_path, 22, "tpe")) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    trials = read_trials(tmp_path)
    assert sum(trial.name.startswith("trial-") for trial in trials) == 22
    record = read_record(tmp_path / SEARCH, SearchRecord)
    full = next(trial.score for trial in trials if trial.name == "full-size_seed0")
    assert record.found.score > full
    assert all(sum(trial.compute_fractions) == pytest.approx(1) for trial in trials)
    take_trials(tmp_path, 24, "tpe")  # more trials of the same study
    assert sum(trial.name.startswith("trial-") for trial in read_trials(tmp_path)) == 24


def test_bayesian__resumes_the_trial_of_a_killed_process(tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    take_trials(whole, 12, "tpe")
    real, calls = ArtificialRunner._train_and_score, iter(range(12))

    def die(self, trial, world, watch):
        if next(calls, None) is None:
            raise Stop
        return real(self, trial, world, watch)

    killed = tmp_path / "killed"
    monkeypatch.setattr(ArtificialRunner, "_train_and_score", die)
    with pytest.raises(Stop):
        take_trials(killed, 12, "tpe")
    monkeypatch.setattr(ArtificialRunner, "_train_and_score", real)
    take_trials(killed, 12, "tpe")
    assert results(killed)[1:] == results(whole)[1:]


def test_bayesian__real_trainings_with_the_gp_sampler(tmp_path):
    record = search(mae_config(), tmp_path, trials=2, sampler="gp", score="loss", **BAYESIAN).run("cpu")
    assert record.found.num_trials == 2 + 2
    assert record.found.spent_equivalent_epochs == pytest.approx(record.planned_equivalent_epochs[0], rel=0.1)


def test_bayesian__prunes_a_trial_that_falls_behind(tmp_path):
    own = search(mae_config(), tmp_path, trials=1, score="loss", **BAYESIAN)
    trial = whole_trial(own.space, "one", own.space.branch([16, 16, 32], seed=0).rows, seed=0)
    seen = []
    with join_world("cpu") as world:
        record = own.runner.run(trial, world, lambda part, score: seen.append((part, score)) or part == 1)
    assert record.status == "pruned"
    assert [part for part, _ in seen] == [1]
    assert record.score == seen[0][1]
    assert record.equivalent_epochs == pytest.approx(4 / 3, rel=0.25)


# ---- scores without labels, and errors ----


@pytest.mark.parametrize("score", ["knn", "linear", "loss", "rankme"])
def test_scores__are_finite_and_repeatable(score, tmp_path):
    own = search(mae_config(), tmp_path, score=score, **SEQUENTIAL)
    trial = own.space.branch([16, 16, 32], seed=0)
    with join_world("cpu") as world:
        task = MAETask(own.runner.config_of(trial), own.data, own.runner.plan_of(trial), world, tmp_path)
        values = [own.runner._score(trial, task) for _ in range(2)]
    assert values[0] == values[1]
    assert values[0] < 0 if score == "loss" else values[0] >= 0


def plain_folder(folder: Path) -> Path:
    from PIL import Image

    folder.mkdir()
    for i in range(10):
        Image.new("RGB", (32, 32), (20 * i, 99, 0)).save(folder / f"{i}.png")
    return folder


def test_errors__scores_that_need_labels(tmp_path):
    images = str(plain_folder(tmp_path / "images"))
    with pytest.raises(DataError, match=r"score = 'knn' needs labelled images in data.val, which is None"):
        search(mae_config(data__val=None), tmp_path / "a", **SEQUENTIAL)
    with pytest.raises(DataError, match=r"score = 'linear' needs labels: .*has no labels.*--score loss or rankme"):
        search(mae_config(data__val=images), tmp_path / "a", score="linear", **SEQUENTIAL)
    with pytest.raises(DataError, match="score = 'loss' needs held-out images"):
        search(mae_config(data__val=None), tmp_path / "a", score="loss", **SEQUENTIAL)
    search(mae_config(data__train=images, data__val=images), tmp_path / "a", score="loss", **SEQUENTIAL).estimate()
    with pytest.raises(ConfigError, match="score = 'top1' is not for a pretrain config; choose one of knn"):
        search(mae_config(), tmp_path / "a", score="top1", **SEQUENTIAL)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({**SEQUENTIAL, "budget": 0.1}, "below|raise curriculum.equivalent_epochs|less than one step"),
        ({**SEQUENTIAL, "candidates": [8, 32]}, "too few to learn from"),
        ({**SEQUENTIAL, "candidates": [20, 32]}, "20 is not a multiple of 8"),
        ({**SEQUENTIAL, "proxy_epochs": 0.01}, "proxy_epochs = 0.01"),
        ({**BAYESIAN, "stages": 9}, "step"),
    ],
)
def test_errors__what_cannot_be_planned(settings, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        search(mae_config(), tmp_path / "a", **settings).estimate()
    assert not (tmp_path / "a").exists()


def test_errors__a_search_with_other_settings(tree, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tree, copy)
    with pytest.raises(UserError, match=r"holds a search with other settings:\n  - proxy_epochs: 0.8 -> 1.2"):
        search(mae_config(), copy, score="loss", **{**SEQUENTIAL, "proxy_epochs": 1.2}).run("cpu")
    with pytest.raises(UserError, match=r"optimizer.base_lr: 0.016 -> 0.1"):
        search(mae_config(optimizer__base_lr=0.1), copy, score="loss", **SEQUENTIAL).run("cpu")
    with pytest.raises(UserError, match=r"data.train: other images"):
        search(mae_config(data__train="scenes:21@32,seed=3"), copy, score="loss", **SEQUENTIAL).run("cpu")


def test_errors__a_score_that_is_not_finite(tmp_path, monkeypatch):
    broken = scores.Searchable(MAETask, scores._open_mae_data, {"knn": lambda task, data: float("nan")})
    monkeypatch.setitem(scores.SEARCHABLE, PretrainConfig, broken)
    with pytest.raises(NonFiniteError, match=r"trial 32_seed0: its score \(knn\) is nan"):
        search(mae_config(), tmp_path, **SEQUENTIAL).run("cpu")


@pytest.mark.parametrize("settings", [{**SEQUENTIAL}, {**BAYESIAN}])
def test_errors__an_unwritable_folder(settings, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make the folder"):
        search(mae_config(), tmp_path / "file" / "search", **settings).run("cpu")


def test_errors__a_damaged_study(tmp_path):
    own = search(mae_config(), tmp_path, trials=1, **BAYESIAN)
    (tmp_path / "study.log").mkdir()
    with join_world("cpu") as world, pytest.raises(UserError, match=r"study.log cannot be opened"):
        BayesianSearch(own.runner, own.space, world)


def test_errors__options_for_a_fixed_list_of_stages(tmp_path):
    with pytest.raises(ConfigError, match=r"batch.micro_batch_sizes has one value for each stage"):
        search(mae_config(batch__micro_batch_sizes=[8, 8, 8], batch__micro_batch_size=None), tmp_path, **SEQUENTIAL)


def test_command__dry_run_prints_the_cost(tmp_path, capsys):
    path = tmp_path / "config.py"
    save_config(mae_config(), path, "A config.")
    words = f"{path} --algorithm sequential --candidates 16,32 --stages 3 --work-dir {tmp_path / 'out'} --dry-run"
    main(make_parser().parse_args(words.split()))
    said = capsys.readouterr().out
    assert "candidates 16, 32 px" in said
    assert "score: knn" in said
    assert not (tmp_path / "out").exists()
    words = f"{path} --algorithm backward --budget 0.5 --stages x --dry-run"
    with pytest.raises(ConfigError, match="stages = 'x' must be an int"):
        main(make_parser().parse_args(words.split()))
