"""The learning rate: closed forms at the points where they are known."""

import math
from itertools import pairwise

import pytest

from minigpt.trainer.schedule import learning_rate

TOTAL, PEAK = 200, 3e-3


def rates(schedule: str, warmup_ratio: float = 0.1, min_ratio: float = 0.1) -> list[float]:
    options = {"peak": PEAK, "schedule": schedule, "warmup_ratio": warmup_ratio, "min_ratio": min_ratio}
    return [learning_rate(step, TOTAL, **options) for step in range(TOTAL)]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_it_rises_in_a_line_and_never_leaves_its_bounds(schedule):
    found = rates(schedule)
    assert found[:20] == pytest.approx([PEAK * (step + 1) / 20 for step in range(20)])
    assert max(found) == PEAK
    assert min(found[20:]) >= 0.1 * PEAK
    assert all(later <= earlier for earlier, later in pairwise(found[19:]))


def test_cosine_is_half_way_down_half_way_and_ends_at_the_minimum():
    found = rates("cosine")
    assert found[110] == pytest.approx(PEAK * (0.1 + 0.9 / 2))
    assert found[65] == pytest.approx(PEAK * (0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2))
    assert found[-1] == pytest.approx(0.1 * PEAK, rel=1e-2)


def test_wsd_is_constant_and_then_a_line_over_the_last_fifth():
    found = rates("wsd")
    assert set(found[20:161]) == {PEAK}
    assert found[180] == pytest.approx(PEAK * (0.1 + 0.9 / 2))
    falls = [a - b for a, b in pairwise(found[160:])]
    assert falls == pytest.approx([falls[0]] * len(falls))
    assert found[-1] == pytest.approx(0.1 * PEAK, rel=0.3)


def test_without_warm_up_it_starts_at_the_peak():
    for schedule in ("cosine", "wsd", "constant"):
        assert rates(schedule, warmup_ratio=0)[0] == PEAK


def test_a_run_of_one_step_has_a_rate():
    for schedule in ("cosine", "wsd", "constant"):
        for warmup in (0.0, 0.05, 1.0):
            assert learning_rate(0, 1, peak=PEAK, schedule=schedule, warmup_ratio=warmup, min_ratio=0.0) > 0
