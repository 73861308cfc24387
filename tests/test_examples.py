"""What `examples/rl_failures.py` shows: each fault has a number that gives it away; without one the reward rises."""

import importlib.util
from pathlib import Path

import pytest
import torch

spec = importlib.util.spec_from_file_location(
    "rl_failures", Path(__file__).resolve().parents[1] / "examples" / "rl_failures.py"
)
assert spec is not None
rl_failures = importlib.util.module_from_spec(spec)
assert spec.loader is not None
spec.loader.exec_module(rl_failures)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_whole_it_learns_and_nothing_looks_wrong():
    first, *_, last = rl_failures.run("whole")
    assert last["reward"] > first["reward"] + 0.05
    assert last["truncated"] < 0.3 * first["truncated"]
    assert first["kl"] == 0
    assert max(first["sampler_gap"], last["sampler_gap"]) < 1e-4


def test_a_mask_that_is_one_off_shows_in_the_first_sampler_gap():
    assert rl_failures.run("mask", steps=1)[0]["sampler_gap"] > 0.5


def test_without_an_end_every_answer_is_truncated():
    (seen,) = rl_failures.run("eos", steps=1)
    assert seen["truncated"] == 1
    assert seen["response_length"] == rl_failures.LONGEST


def test_too_high_a_rate_shows_as_kl_of_nats_and_no_entropy():
    history = rl_failures.run("kl", steps=21)
    assert max(seen["kl"] for seen in history) > 1
    assert min(seen["entropy"] for seen in history) < 0.5 * history[0]["entropy"]
    assert history[-1]["reward"] < 0.05


@pytest.mark.parametrize("fault", ["dead", "whole"])
def test_dead_groups_have_no_gradient(fault):
    (seen,) = rl_failures.run(fault, steps=1)
    dead = fault == "dead"
    assert (seen["zero_variance_groups"] == 1) is dead
    assert (seen["grad_norm"] < 1e-6) is dead
