"""Interleaved measurement: one contender runs at a time, ratios are taken within a round, failures are told."""

import sys
import time
from pathlib import Path

import pytest
from common import Contender, Rates, interleave, rates_between, rates_table, ratios, running, spread

COUNTER = """
import json, sys, time
with open(sys.argv[1], "a") as file:
    for step in range(1, 10**6):
        time.sleep(0.001)
        file.write(json.dumps({"step": step, "tokens": step * int(sys.argv[2])}) + "\\n")
        file.flush()
"""


def contender(folder: Path, name: str, tokens: int = 7) -> Contender:
    progress = folder / f"{name}.jsonl"
    command = [sys.executable, "-c", COUNTER, str(progress), str(tokens)]
    return Contender(name, command, progress, folder / f"{name}.log")


def state(process_id: int) -> str:
    """The kernel's letter for the state of a process: T is stopped."""
    return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]


def is_stopped(c: Contender) -> bool:
    """Whether it is stopped now or very soon: a signal may arrive a moment after it was sent."""
    assert c.process is not None
    for _ in range(200):
        if state(c.process.pid) == "T":
            return True
        time.sleep(0.01)
    return False


def test_all_contenders_stand_still_between_measurements_and_are_gone_afterwards(tmp_path):
    pair = [contender(tmp_path, "a"), contender(tmp_path, "b")]
    with running(pair, warmup_steps=2):
        assert all(is_stopped(c) for c in pair)
        assert all(len(c.lines) >= 2 for c in pair)
        size = pair[0].progress.stat().st_size
        time.sleep(0.05)
        assert pair[0].progress.stat().st_size == size
    assert all(c.process is not None and c.process.poll() is not None for c in pair)


def test_interleave_rates_each_contender_in_every_round(tmp_path):
    rates = interleave([contender(tmp_path, "a"), contender(tmp_path, "b")], rounds=3, steps=2, warmup_steps=1)
    assert {name: len(values) for name, values in rates.items()} == {"a": 3, "b": 3}
    assert all(rate.per_second > 0 for values in rates.values() for rate in values)


def test_a_rate_counts_the_tokens_between_two_readings():
    assert rates_between((10.0, 3.0, 100.0), (14.0, 5.0, 300.0)) == Rates(per_second=50.0, per_cpu_second=100.0)


def test_a_contender_that_ends_is_an_error_with_the_end_of_its_log(tmp_path):
    broken = Contender(
        "broken", [sys.executable, "-c", "raise SystemExit('no such data')"], tmp_path / "p", tmp_path / "l"
    )
    with pytest.raises(RuntimeError, match=r"broken ended with status 1:\nno such data"), running([broken], 1):
        pass


def test_unfinished_lines_and_validation_records_are_not_steps(tmp_path):
    c = contender(tmp_path, "a")
    c.progress.write_text('{"step": 1, "tokens": 5, "kind": "valid"}\n{"step": 1, "tokens": 5}\n{"step": 2, "tok')
    c._read()
    assert [line["tokens"] for line in c.lines] == [5]
    with open(c.progress, "a") as file:
        file.write('ens": 10}\n')
    c._read()
    assert [line["tokens"] for line in c.lines] == [5, 10]


def test_ratios_are_of_the_same_round():
    ours = [Rates(10.0, 1.0), Rates(40.0, 1.0), Rates(30.0, 1.0)]
    rates = {"ours": ours, "peer": [Rates(5.0, 2.0), Rates(10.0, 2.0), Rates(30.0, 2.0)]}
    assert ratios(rates, "ours")["peer"]["per_second"] == {"min": 1.0, "median": 2.0, "max": 4.0}
    assert ratios(rates, "ours")["peer"]["per_cpu_second"] == {"min": 0.5, "median": 0.5, "max": 0.5}
    assert spread([3.0, 1.0, 2.0]) == {"min": 1.0, "median": 2.0, "max": 3.0}
    assert "| peer | 10 (5 to 30) | 2.00 (1.00 to 4.00) | 2 (2 to 2) | 0.50 " in rates_table(rates, "ours")
