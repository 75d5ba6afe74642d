"""The algorithms of the curriculum search, driven by artificial scores; the measures that need no labels."""

import itertools
import math
import statistics

import pytest
import torch

from mae_et.config.schema import from_dict
from mae_et.config.search import SearchConfig
from mae_et.curriculum.search.backward import backward, possible_runs
from mae_et.curriculum.search.sequential import sequential
from mae_et.curriculum.search.space import curriculum_of, suggestions
from mae_et.curriculum.search.trial import Space, choose_nearest, find_candidates, margin_of_noise
from mae_et.errors import ConfigError
from mae_et.evaluation.label_free import rank_me
from mae_et.evaluation.linear import linear_predict

CANDIDATES = (96, 128, 160, 192, 224)


def space(num_stages=5, seeds=1, noise_seeds=3, candidates=CANDIDATES):
    return Space((224, 224), candidates, num_stages, 200.0, tuple(range(seeds)), tuple(range(noise_seeds)))


def drive(search, score):
    """Answers a search with scores of (trial); returns its result and the batches that it asked for."""
    batches = [next(search)]
    while True:
        try:
            batches.append(search.send({trial.name: score(trial) for trial in batches[-1]}))
        except StopIteration as stop:
            return stop.value, batches


# ---- Algorithm 2 ----


def test_sequential__keeps_the_best_branch_of_each_stage():
    target = (96, 160, 160, 192)

    def score(trial):
        return -sum(abs(a - b) for a, b in zip(trial.bandwidths, target, strict=False))

    found, batches = drive(sequential(space()), score)
    assert [row.bandwidth for row in found.rows] == [*target, 224]
    assert [len(batch) for batch in batches] == [3, 5, 5, 5, 5, 1]
    assert [decision.chosen for decision in found.decisions] == list(target)


def test_sequential__branches_start_from_the_trunk_and_share_its_stages():
    _, batches = drive(sequential(space()), lambda trial: -trial.bandwidths[-1])
    trials = {trial.name: trial for batch in batches for trial in batch}
    for trial in trials.values():
        assert [row.compute_fraction for row in trial.rows] == [0.2] * 5
        assert [row.bandwidth for row in trial.rows[trial.num_rows :]] == [224] * (5 - trial.num_rows)
        if trial.num_rows > 1:
            assert trials[trial.start_from].bandwidths == trial.bandwidths[:-1]
            assert trials[trial.start_from].seed == trial.seed


def test_sequential__a_difference_within_the_noise_is_a_tie():
    noise = {0: -0.01, 1: 0.0, 2: 0.01}  # the deviation is 0.01, so the margin for one seed is 0.028

    def score(trial, gain):
        return noise[trial.seed] + gain * (trial.bandwidths[-1] == 192)

    found, _ = drive(sequential(space()), lambda trial: score(trial, 0.02))
    assert found.margin == pytest.approx(2 * 0.01 * math.sqrt(2))
    assert [row.bandwidth for row in found.rows[:-1]] == [96] * 4  # no evidence, no change
    found, _ = drive(sequential(space()), lambda trial: score(trial, 0.03))
    assert [row.bandwidth for row in found.rows[:-1]] == [192] * 4


def test_sequential__repeats_score_each_candidate_by_its_mean():
    def score(trial):  # 160 wins with seed 0 alone; 128 on average
        return {160: (3.0, 0.0), 128: (2.0, 2.0)}.get(trial.bandwidths[-1], (0.0, 0.0))[trial.seed]

    found, batches = drive(sequential(space(seeds=2, noise_seeds=2)), score)
    assert [row.bandwidth for row in found.rows[:-1]] == [128] * 4
    assert len(batches[1]) == 10
    assert len(found.trials) == 2


@pytest.mark.parametrize(
    ("scores", "margin", "previous", "chosen"),
    [
        ({96: [1.0], 160: [2.0]}, 0.5, 96, 160),
        ({96: [1.6], 160: [2.0]}, 0.5, 96, 96),
        ({96: [1.6], 160: [2.0]}, 0.5, 160, 160),
        ({96: [2.0], 128: [1.0], 160: [2.0]}, 0.5, 128, 96),  # equally near: the smaller one
        ({96: [2.0], 160: [2.0]}, 0.0, 160, 160),
    ],
)
def test_choose_nearest__tie_rule(scores, margin, previous, chosen):
    assert choose_nearest(1, scores, margin, previous).chosen == chosen


# ---- Algorithm 1 ----


def brute_force(num_stages, candidates, score, limit):
    """The rule of the paper as written, with all candidates tried: B_i is the smallest that keeps the score."""
    bandwidths = [224] * num_stages
    for stage in reversed(range(num_stages - 1)):
        table = {band: score([band] * (stage + 1) + bandwidths[stage + 1 :]) for band in candidates}
        bandwidths[: stage + 1] = [min(band for band, value in table.items() if value >= limit)] * (stage + 1)
    return bandwidths


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("tolerance", [0.0, 0.01, 0.05, 0.3])
def test_backward__agrees_with_a_brute_force_table(exponent, tolerance):
    def quality(bandwidths):  # late stages need high frequencies more
        lost = sum((1 - band / 224) * (i + 1) ** exponent for i, band in enumerate(bandwidths))
        return 0.8 - 0.1 * max(0.0, lost / 5**exponent - 0.2)

    found, batches = drive(backward(space(), tolerance), lambda trial: quality(trial.bandwidths))
    expected = brute_force(5, CANDIDATES, quality, 0.8 - tolerance)
    assert [row.bandwidth for row in found.rows] == expected
    assert len(batches) - 1 <= len(CANDIDATES) - 1 + 4


def test_backward__reaches_the_published_curriculum_in_the_published_number_of_runs():
    published = (160, 160, 160, 192, 224)

    def score(trial):
        return float(all(band >= least for band, least in zip(trial.bandwidths, published, strict=True)))

    found, batches = drive(backward(space(candidates=(96, 128, 160, 192))), score)
    assert tuple(row.bandwidth for row in found.rows) == published
    assert len(batches) - 1 == 6
    runs = [trial.equivalent_epochs / 200 for batch in batches[1:] for trial in batch]
    assert runs == pytest.approx([0.788, 0.608, 0.653, 0.543, 0.580, 0.616], abs=5e-4)


def test_backward__default_tolerance_is_the_margin_of_the_noise():
    def score(trial):
        return 0.8 + {0: -0.01, 1: 0.0, 2: 0.01}[trial.seed] - (0.01 if trial.bandwidths[0] < 224 else 0)

    found, _ = drive(backward(space()), score)
    assert found.margin == pytest.approx(margin_of_noise(0.01, 1, 3))
    assert [row.bandwidth for row in found.rows] == [96, 96, 96, 96, 224]  # .78 is above .8 - .023
    found, _ = drive(backward(space(), tolerance=0.0), score)
    assert [row.bandwidth for row in found.rows] == [224] * 5


def test_backward__stages_have_equal_epochs():
    trial = space().equal_epochs((96, 96, 160, 192, 224), seed=0)
    real = [row.compute_fraction * trial.equivalent_epochs * (224 / row.bandwidth) ** 2 for row in trial.rows]
    assert real == pytest.approx([40.0] * 5)


def test_possible_runs__all_outcomes_of_backward():
    runs = list(possible_runs(lambda: backward(space(num_stages=3, candidates=(96, 160, 224)), 0.0)))
    names = {" ".join(trial.name.removesuffix("_seed0") for trial in trials[3:]) for trials in runs}
    assert names == {
        "160-160-224 96-96-224",  # the second passes or, at the last stage that may change, fails
        "160-160-224 96-96-224 96-160-224",
        "160-160-224 160-224-224",
        "160-160-224 160-224-224 96-224-224",
    }


# ---- the space of the Bayesian search ----


def test_curriculum_of__is_a_curriculum_of_the_whole_budget():
    own = space()
    ranges = suggestions(own, has_strength=True)
    for low_or_high in (0, 1):
        values = {name: limits[low_or_high] for name, limits in ranges.items()}
        rows = curriculum_of(own, values)
        assert sum(row.compute_fraction for row in rows) == pytest.approx(1, abs=1e-9)
        assert rows[-1].bandwidth == 224
    values |= {"candidate_1": 3, "candidate_2": 0, "share_1": 4.0, "share_2": 1.0, "strength_1": 0.9, "strength_2": 0.1}
    rows = curriculum_of(own, values)
    assert [row.bandwidth for row in rows] == [96, 192, 224, 224, 224]
    assert [row.strength for row in rows] == sorted(row.strength for row in rows)
    assert rows[0].compute_fraction > rows[1].compute_fraction


# ---- candidates and settings ----


@pytest.mark.parametrize(
    ("image_size", "multiple", "expected"),
    [(224, 16, (96, 128, 160, 192, 224)), (112, 8, (48, 64, 80, 96, 112)), (224, 14, (98, 126, 154, 196, 224)),
     (384, 16, (96, 240, 320, 352, 384))],
)  # fmt: skip
def test_find_candidates__scale_as_the_presets_do(image_size, multiple, expected):
    assert find_candidates((), image_size, multiple) == expected


def test_find_candidates__names_each_that_the_model_cannot_take():
    with pytest.raises(ConfigError) as caught:
        find_candidates((100, 96, 256), 224, 16)
    assert len(caught.value.faults) == 2
    assert "100 is not a multiple of 16" in str(caught.value)
    assert "256 exceeds" in str(caught.value)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"stages": 1}, "stages = 1 must be >= 2"),
        ({"noise_seeds": 1}, "noise_seeds = 1 must be >= 2"),
        ({"candidates": [96, 96]}, "96 more than once"),
        ({"candidates": [96]}, "no choice"),
        ({"algorithm": "greedy"}, "algorithm = 'greedy' must be one of"),
        ({"trials": 5}, "trials = 5 has no effect with algorithm = 'sequential'"),
        ({"algorithm": "backward", "budget": 0.5}, "budget = 0.5 has no effect"),
        ({"algorithm": "bayesian", "tolerance": 0.1}, "tolerance = 0.1 has no effect"),
    ],
)
def test_settings__faults(values, said):
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        from_dict(SearchConfig, values)


# ---- measures ----


def test_rank_me__counts_orthogonal_directions():
    basis = torch.linalg.qr(torch.randn(64, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    for rank in (1, 3, 8):
        assert rank_me(basis[:, :rank] @ basis[:rank, :rank]) <= rank + 1e-3
    assert rank_me(basis) == pytest.approx(8, rel=1e-4)
    assert rank_me(torch.ones(10, 4)) == pytest.approx(1, rel=1e-3)


def test_rank_me__is_the_formula():
    features = torch.randn(30, 5, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(features.double()).tolist()
    shares = [value / sum(values) + 1e-7 for value in values]
    assert rank_me(features) == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)), rel=1e-9)


def test_rank_me__refuses_nothing_and_reports_nan():
    with pytest.raises(ValueError, match="no rank"):
        rank_me(torch.zeros(4, 3))
    assert math.isnan(rank_me(torch.tensor([[1.0, float("nan")]])))


def test_linear_predict__separates_what_a_plane_separates():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(300, 6, generator=generator)
    labels = (points[:, 0] + 2 * points[:, 1] > 0.3).long()
    with torch.inference_mode():
        bank, known = points[:200].clone(), labels[:200].clone()
    predicted = linear_predict(bank, known, points[200:], 2)
    assert (predicted == labels[200:]).float().mean() > 0.95
    assert torch.equal(predicted, linear_predict(bank, known, points[200:], 2))


def test_names__differ_for_different_trials():
    own = space()
    names = [
        own.branch(bands, seed).name
        for length in (1, 2)
        for bands in itertools.product(CANDIDATES, repeat=length)
        for seed in (0, 1)
    ]
    assert len(set(names)) == len(names)
    assert statistics.mode([name.count("seed") for name in names]) == 1
