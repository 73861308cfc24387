"""Bands of loss curves: closed forms, and runs that are inside, above, below, broken or short."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from minigpt.errors import UserError
from minigpt.observe.reference import check_against, load_band, make_band, save_band, smooth


def write_run(folder: Path, losses: list[float], every: int = 1) -> Path:
    """A run folder with one record per `every` steps of 1,000 tokens."""
    folder.mkdir(parents=True)
    records = [
        {"step": step, "loss": loss if math.isfinite(loss) else "nan", "tokens": step * 1000}
        for step, loss in enumerate(losses, start=1)
        if step % every == 0
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def power_law(seed: int, steps: int = 300, shift: float = 0.0) -> list[float]:
    """A loss curve as trainings have it: 2 + 6.7·step^-0.5, with noise of 0.05."""
    noise = np.random.default_rng(seed).normal(0, 0.05, steps)
    return [2 + shift + 6.7 * step**-0.5 + float(noise[step - 1]) for step in range(1, steps + 1)]


def test_constant_runs_give_their_extremes_and_the_margin(tmp_path):
    runs = [write_run(tmp_path / str(level), [level] * 50) for level in (2.0, 3.0, 2.5)]
    band = make_band(runs, recipe="constant", margin=0.25, points=7)
    assert band.loss_low == pytest.approx([1.75] * 7, abs=1e-4)
    assert band.loss_high == pytest.approx([3.25] * 7, abs=1e-4)
    assert (band.tokens[0], band.tokens[-1], band.runs) == (1000, 50_000, 3)


def test_smoothing_equals_numpy_weighted_line_fit_and_leaves_nan_out():
    rng = np.random.default_rng(0)
    tokens, losses = np.arange(1.0, 401.0), rng.normal(3, 1, 400)
    losses[17] = math.nan
    kept = np.isfinite(losses)
    for point in (1.0, 13.5, 180.0, 400.0):
        distance = np.log(tokens[kept]) - math.log(point)
        root_weights = np.exp(-0.25 * (distance / 0.1) ** 2)
        expected = np.polyfit(distance, losses[kept], 1, w=root_weights)[1]
        assert smooth(tokens, losses, np.array([point]))[0] == pytest.approx(expected, abs=1e-2)


def test_smoothing_keeps_straight_lines_however_seldom_they_were_logged():
    tokens = np.array([1e3, 1e4, 1.1e4, 5e5, 2e6])
    at = np.geomspace(1e3, 2e6, 23)
    assert smooth(tokens, 9 - 0.5 * np.log(tokens), at) == pytest.approx(9 - 0.5 * np.log(at), abs=1e-9)


def test_a_band_survives_the_disk_and_an_unknown_recipe_has_none(tmp_path):
    band = make_band([write_run(tmp_path / "run", power_law(0))], recipe="demo")
    save_band(band, tmp_path)
    assert load_band("demo", tmp_path) == band
    assert load_band("other", tmp_path) is None


@pytest.fixture
def band(tmp_path):
    return make_band([write_run(tmp_path / f"seed{seed}", power_law(seed)) for seed in (0, 1, 2)], recipe="demo")


def test_another_seed_is_inside_also_when_logged_less_often_or_interrupted(tmp_path, band):
    assert check_against(write_run(tmp_path / "new", power_law(9)), band).inside
    assert check_against(write_run(tmp_path / "sparse", power_law(9), every=10), band).inside
    interrupted = check_against(write_run(tmp_path / "short", power_law(9, steps=120)), band)
    assert interrupted.inside
    assert "tokens" in interrupted.sentence


@pytest.mark.parametrize(("shift", "word"), [(0.4, "higher"), (-0.4, "lower")])
def test_a_shifted_run_is_outside_and_the_sentence_says_where_and_which_way(tmp_path, band, shift, word):
    check = check_against(write_run(tmp_path / "shifted", power_law(9, shift=shift)), band)
    assert not check.inside
    assert word in check.sentence
    assert "300.0k tokens" in check.sentence
    assert f"expected {band.loss_low[-1]:.2f} to {band.loss_high[-1]:.2f}" in check.sentence


def test_a_run_that_diverges_at_its_end_is_outside_although_nearly_all_points_are_inside(tmp_path, band):
    losses = power_law(9)
    losses[-8:] = [loss + 1.0 for loss in losses[-8:]]
    run = write_run(tmp_path / "diverged", losses)
    without_its_last_point = replace(
        band, tokens=band.tokens[:-1], loss_low=band.loss_low[:-1], loss_high=band.loss_high[:-1]
    )
    assert check_against(run, without_its_last_point).inside
    assert not check_against(run, band).inside


def test_nan_is_outside_and_too_short_is_said(tmp_path, band):
    losses = power_law(9)
    losses[100] = math.nan
    broken = check_against(write_run(tmp_path / "nan", losses), band)
    assert not broken.inside
    assert "not a number" in broken.sentence
    assert "fewer than two" in check_against(write_run(tmp_path / "one", [8.0]), band).sentence


def test_bands_of_nothing_are_refused_with_the_folder_named(tmp_path):
    with pytest.raises(UserError, match="no runs given"):
        make_band([], recipe="demo")
    with pytest.raises(UserError, match=r"nowhere does not exist"):
        make_band([tmp_path / "nowhere"], recipe="demo")


def test_the_command_records_a_band(tmp_path):
    runs = [str(write_run(tmp_path / f"seed{seed}", power_law(seed))) for seed in (0, 1)]
    command = [sys.executable, "-m", "minigpt.observe.reference", "demo", json.dumps(runs), "--output", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    recorded = load_band("demo", tmp_path)
    assert recorded is not None
    assert recorded.runs == 2
    assert "cores" in recorded.recorded_on["hardware"]
