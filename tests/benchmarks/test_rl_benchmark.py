"""The benchmark of reinforcement learning runs, and its sums are right."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import rl

REPOSITORY = Path(__file__).resolve().parents[2]


def test_the_bound_of_overlap_is_both_times_over_the_longer_one():
    """3 s of sampling and 1 s of the rest: at best 4/3 as fast. 3.2 s a step is 15/16 of that."""
    found = rl.overlap_and_bound([{"step": 4.0, "sampling": 3.0}], [{"step": 3.2, "sampling": 3.0}])
    assert found["gain"] == [pytest.approx(1.25)]
    assert found["bound"] == [pytest.approx(4 / 3)]
    assert found["share"] == [pytest.approx(15 / 16)]


@pytest.mark.slow
def test_it_measures_a_step_with_and_without_overlap(tmp_path):
    """The other parts are in `gpu.sh`, which another test runs."""
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "rl.py"), "--smoke", "--parts", "overlap"]
    command += ["--json", str(tmp_path / "rl.json")]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert ended.returncode == 0, ended.stderr
    found = json.loads((tmp_path / "rl.json").read_text(encoding="utf-8"))
    assert 0 < found["overlap"]["sampling"][0] < found["overlap"]["apart"][0]
