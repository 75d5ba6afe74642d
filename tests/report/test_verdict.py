"""Differences, their intervals and the sentences about them."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mae_et.report.compare import Ratio, Sample, compare, cost_words, judge, quantile95
from mae_et.report.join import make_benchmark
from mae_et.report.tables import make_tables
from mae_et.report.verdict import make_verdicts
from tests.report.folders import ETPP, box_metrics, classify, dense, pretrain

VALUES = st.lists(st.floats(0, 100), min_size=2, max_size=6)


def naive_welch(ours, theirs):
    """From the textbook: half-width and degrees of freedom."""
    a, b = statistics.variance(ours) / len(ours), statistics.variance(theirs) / len(theirs)
    return math.sqrt(a + b), (a + b) ** 2 / (a**2 / (len(ours) - 1) + b**2 / (len(theirs) - 1))


@given(VALUES, VALUES)
def test_compare__unpaired_against_a_textbook(ours, theirs):
    assume(statistics.pvariance(ours) > 1e-6 and statistics.pvariance(theirs) > 1e-6)
    found = compare([Sample(value) for value in ours], [Sample(value) for value in theirs])
    error, freedom = naive_welch(ours, theirs)
    assert found.value == pytest.approx(sum(ours) / len(ours) - sum(theirs) / len(theirs), abs=1e-9)
    assert found.seed_half == pytest.approx(quantile95(freedom) * error, rel=1e-9)
    assert (found.image_half, found.is_paired) == (None, False)


@given(VALUES, st.floats(-5, 5), st.randoms())
def test_compare__pairs_cancel_what_the_seeds_share(ours, shift, order):
    base = [Sample(value, f"seed {i}") for i, value in enumerate(ours)]
    moved = [Sample(value + shift, f"seed {i}") for i, value in enumerate(ours)]
    order.shuffle(moved)
    found = compare(moved, base)
    assert found.is_paired
    assert found.value == pytest.approx(shift, abs=1e-9)
    assert found.seed_half == pytest.approx(0, abs=1e-6)


def test_compare__pairs_only_where_all_seeds_match():
    ours = [Sample(50.0 + i, str(i)) for i in range(3)]
    assert not compare(ours, [Sample(40.0 + i, str(i)) for i in range(2)]).is_paired
    assert not compare(ours, [Sample(40.0 + i, str(i + 1)) for i in range(3)]).is_paired
    assert not compare(ours, [Sample(40.0 + i, None) for i in range(3)]).is_paired
    assert compare([], ours) is None


def test_compare__images_and_seeds_add_in_quadrature():
    ours, base = ([Sample(50.0 + i + shift, str(i), 3.0) for i in range(2)] for shift in (0, 1))
    found = compare(ours, base)
    assert found.image_half == pytest.approx(3 * math.sqrt(2))  # more seeds on the same images do not narrow it
    assert found.half == pytest.approx(math.hypot(found.seed_half, found.image_half))


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.706), (2, 4.303), (10, 2.228), (30, 2.042), (60, 2.000), (120, 1.980), (1e6, 1.960)],
)
def test_quantile95__against_a_table(freedom, quantile):
    assert quantile95(freedom) == pytest.approx(quantile, abs=2e-3)


def test_quantile95__falls_with_the_degrees_of_freedom():
    values = [quantile95(1 + i / 10) for i in range(1000)]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize(
    ("ratios", "words"),
    [
        ((2.0, Ratio(2.0, 0.05), 2.0), ["2x fewer FLOPs", "2 ± 0.05x less time"]),
        ((1 / 1.04, Ratio(1 / 1.5, None), 1.0), ["1.04x the FLOPs", "1.5x the time"]),
        ((None, Ratio(0.5, 0.1), None), ["2 ± 0.40x the time"]),
        ((None, None, 0.25), ["4x the equivalent epochs"]),
        ((1.001, None, 0.25), ["the same FLOPs"]),
    ],
)
def test_cost_words__savings_and_extra_cost(ratios, words):
    assert cost_words(*ratios) == words


@pytest.mark.parametrize(
    ("ours", "base", "half", "start", "end"),
    [
        (
            [50, 51, 52],
            [40, 41, 42],
            None,
            "A difference was seen: a is 10.00 points above b in m on d",
            "paired by seed).",
        ),
        (
            [40, 41, 42],
            [50, 51, 53],
            None,
            "A difference was seen: a is 10.33 points below b in m on d",
            "paired by seed).",
        ),
        (
            [50, 51, 52],
            [49, 53, 51],
            None,
            "No difference was seen between a and b in m on d: ±0",
            "points would have shown.",
        ),
        ([50], [49], 4.0, "No difference can be seen with n = 1 between a and b", "from the validation images alone."),
        ([50], [30, 31], 4.0, "One run on a side (n = 1 and 2)", "the choice of validation images explains."),
        ([50], [30], None, "No difference can be seen with n = 1", "run two seeds or more on each side."),
        ([50, 51, 52], [49.5, 50.5, 51.5], 8.0, "No difference was seen", "points would have shown."),
    ],
)
def test_judge__sentence(ours, base, half, start, end):
    sides = [[Sample(value, str(i), half) for i, value in enumerate(values)] for values in (ours, base)]
    said = str(judge(compare(*sides), "a", "b", "m", "d"))
    assert said.startswith(start.replace("±0", "+0"))
    assert said.endswith(end)
    assert judge(compare(*sides), "a", "b", "m", "d", "2x fewer FLOPs").rest.endswith(" Cost: 2x fewer FLOPs.")


def test_make_verdicts__curricula_first_random_weights_last(tmp_path):
    for seed in (0, 1, 2):
        pretrain(tmp_path / f"constant_{seed}", seed=seed, seconds=100.0 + seed)
        pretrain(tmp_path / f"etpp_{seed}", seed=seed, bands=ETPP, epochs=2.0, seconds=50.0 + seed)
        classify(tmp_path / f"knn_c{seed}", f"constant_{seed}", 0.40 + seed / 100, num_val=100_000)
        classify(tmp_path / f"knn_e{seed}", f"etpp_{seed}", 0.45 + seed / 100, num_val=100_000)
        dense(tmp_path / f"det_c{seed}", "detection", box_metrics(0.20 + seed / 100), f"constant_{seed}")
        dense(tmp_path / f"det_e{seed}", "detection", box_metrics(0.20 + seed / 100), f"etpp_{seed}")
    classify(tmp_path / "random", None, 0.2, num_val=100_000)
    said = [str(verdict) for verdict in make_verdicts(make_tables(make_benchmark([tmp_path])))]
    assert len(said) == 4
    assert said[0].startswith("A difference was seen: etpp 16-24-32, 2 eq. epochs is 5.00 points above constant 32")
    assert "n = 3, paired by seed" in said[0]
    assert "No difference was seen" in said[1]  # box AP
    assert "random weights is 21.00 points below" in said[3]
