"""Reward functions that hang, crash and lie: the pool names them, ends them and goes on. All processes are real."""

import gc
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from minigpt.errors import UserError
from minigpt.rl.reward_pool import RewardPool

REFERENCE = {"answer": "12", "verifier": "math", "meta": {}, "messages": [], "finish_reason": "stop", "tokens": 10}

FUNCTIONS = """
import ctypes, os, signal, sys, threading, time
from fractions import Fraction

def number(prompt, completion, reference):
    return float(completion)

def slow_number(prompt, completion, reference):
    time.sleep(0.02 * (int(completion) % 3))
    return int(completion)

def process(prompt, completion, reference):
    return os.getpid()

def several(prompt, completion, reference):
    if completion == "sum":
        return {"a": 1, "b": 0.5}
    return {"reward": 2, "a": 3} if completion == "named" else {"reward": True}

def has_torch(prompt, completion, reference):
    return "torch" in sys.modules or "numpy" in sys.modules

def spoil(prompt, completion, reference):
    reference["answer"] = "spoilt"
    return 0

def listens(prompt, completion, reference):
    return float(reference["answer"] == "12")

def length(prompt, completion, reference):
    return len(completion)

leak = []
def leaking(prompt, completion, reference):
    leak.append(bytearray(60 << 20))
    return 1

def leave_a_child(prompt, completion, reference):
    import subprocess
    child = subprocess.Popen(["sleep", "1000"])
    with open(completion, "w") as file:
        file.write(str(child.pid))
    time.sleep(1000)

class Strange:
    def __float__(self):
        raise KeyError("no\\nway")

def misbehave(prompt, completion, reference):
    match completion.split():
        case ["sleep"]: time.sleep(1000)
        case ["loop"]:
            while True: pass
        case ["stubborn"]:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(1000)
        case ["power"]: return 9 ** 9 ** 9 ** 9
        case ["exit", status]: os._exit(int(status))
        case ["leave"]: sys.exit(0)
        case ["crash"]: ctypes.string_at(0)
        case ["kill"]: os.kill(os.getpid(), signal.SIGKILL)
        case ["memory"]: return len(bytearray(1 << 40))
        case ["recursion"]: return misbehave(prompt, completion, reference)
        case ["raise"]: raise ValueError("what\\nis this \\ud800 " + "x" * 10_000)
        case ["interrupt"]: raise KeyboardInterrupt
        case ["nan"]: return float("nan")
        case ["inf"]: return -float("inf")
        case ["large"]: return 1e39
        case ["huge"]: return 10 ** 400
        case ["none"]: return None
        case ["text"]: return "1.0"
        case ["list"]: return [1.0]
        case ["complex"]: return 1j
        case ["strange"]: return Strange()
        case ["deaf"]: os.closerange(3, 1000)
    return Fraction(1, 2)
"""

MISBEHAVIOUR = {
    "sleep": "took more than 1 s",
    "loop": "took more than 1 s",
    "stubborn": "took more than 1 s",
    "power": "took more than 1 s",
    "exit 0": "ended its process (status 0)",
    "exit 3": "ended its process (status 3)",
    "leave": "raised SystemExit: 0",
    "crash": "ended its process (Segmentation fault)",
    "kill": "ended its process (Killed)",
    "memory": "needed more than 512 MB",
    "recursion": "raised RecursionError: maximum recursion depth exceeded",
    "raise": "raised ValueError: what is this \\ud800 xxx",
    "interrupt": "raised KeyboardInterrupt",
    "nan": "returned nan",
    "inf": "returned -inf",
    "large": "returned 1e+39",
    "huge": "raised OverflowError",
    "none": "returned NoneType instead of a number",
    "text": "returned str instead of a number",
    "list": "returned list instead of a number",
    "complex": "returned complex instead of a number",
    "strange": "raised KeyError: 'no\\nway'",
    "deaf": "ended its process (status 1)",
}


@pytest.fixture(scope="module")
def functions(tmp_path_factory):
    """`functions("number")` names a function of a file of rewards."""
    file = tmp_path_factory.mktemp("rewards") / "mine.py"
    file.write_text(FUNCTIONS)
    return lambda name: f"{file}:{name}"


def score(pool, completions, **reference):
    return pool.score(["prompt"] * len(completions), completions, [REFERENCE | reference] * len(completions))


def worker_ids(pool):
    return [worker.process.pid for worker in pool._workers if worker.process is not None]


def wait_until_gone(pid, seconds=5.0):
    """Whether a process ends (or is a zombie that nobody has to fear) in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


# ------------------------------------------------------------------------------------------------------ what comes back


def test_the_reward_is_the_weighted_sum_and_every_part_is_shown(functions):
    with RewardPool(["accuracy=2", "format=0.5", functions("several")]) as pool:
        scores = score(pool, ["named", "<think>a</think><answer>12</answer>", "sum"])
    several = functions("several")
    assert scores.rewards.dtype == np.float32
    assert scores.rewards.tolist() == [0 - 0.5 + 2, 2 + 0.5 + 1, 0 - 0.5 + 1.5]
    assert scores.parts["accuracy"].tolist() == [0, 1, 0]
    assert scores.parts["format"].tolist() == [-1, 1, -1]
    assert scores.parts[several].tolist() == [2, 1, 1.5]
    np.testing.assert_array_equal(scores.parts[f"{several}/a"], np.float32([3, np.nan, 1]))
    np.testing.assert_array_equal(scores.parts[f"{several}/b"], np.float32([np.nan, np.nan, 0.5]))
    assert not scores.failed.any()
    assert scores.failures == []


@pytest.mark.parametrize("processes", [1, 3])
def test_results_have_the_order_of_the_batch(functions, processes):
    rng = np.random.default_rng(0)
    with RewardPool([functions("slow_number")], processes=processes) as pool:
        for n in (0, 1, 2, 5, 7, 31):
            wanted = rng.integers(0, 1000, n)
            assert score(pool, [str(value) for value in wanted]).rewards.tolist() == wanted.tolist()
        busy = RewardPool([functions("process")], processes=processes)
        with busy:
            ids = set(score(busy, ["a"] * 200).rewards.astype(int).tolist())
            assert ids <= set(worker_ids(busy))


def test_a_reward_cannot_change_what_the_next_one_sees(functions):
    with RewardPool([functions("spoil"), functions("listens")]) as pool:
        assert score(pool, ["a", "b"]).rewards.tolist() == [1, 1]


def test_workers_load_neither_torch_nor_numpy(functions):
    with RewardPool(["accuracy", functions("has_torch")]) as pool:
        assert score(pool, ["12"]).parts[functions("has_torch")].tolist() == [0]


@pytest.mark.parametrize("text", ["\0", "\ud800 \udfff", "<think>" * 1000, "😀" * 10, "a" * 10_000_000, "(" * 30_000])
def test_hostile_texts_come_through_whole(functions, text):
    with RewardPool([functions("length"), "accuracy", "format", "length", "repetition"]) as pool:
        scores = score(pool, [text, text + "1"])
        assert scores.parts[functions("length")].tolist() == [len(text), len(text) + 1]
        assert scores.parts["format"].tolist() == [-1, -1]
        assert not scores.failed.any()


# ------------------------------------------------------------------------------------------------- what can go wrong


@pytest.mark.parametrize("processes", [1, 2])
def test_every_misbehaviour_is_one_failure_and_the_others_are_scored(functions, processes):
    completions = [text for bad in MISBEHAVIOUR for text in ("fine", bad)] + ["fine"]
    spec = functions("misbehave")
    with RewardPool(["accuracy", spec], processes=processes, timeout=1, memory_mb=512) as pool:
        scores = score(pool, [f"{text} 12" if text == "fine" else text for text in completions])
        assert scores.failed.tolist() == [text != "fine" for text in completions]
        assert scores.rewards.tolist() == [1.5 if text == "fine" else 0.0 for text in completions]
        assert scores.parts["accuracy"].tolist() == [float(text == "fine") for text in completions]
        assert len(scores.failures) == 5
        assert scores.failures[0] == f"{spec} took more than 1 s on completion 1"
        assert score(pool, ["fine"]).rewards.tolist() == [0.5]


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    ("weight", "values", "worst"),
    [
        (1, [-3, -1, -2], -3),
        (0.5, [-3, 1, 2], -3),
        (1, [0.5, 1, 2], 0),
        (-1, [3, 1, 2], 3),
        (-2, [-3, -1, -2], 0),
        (1, [], 0),
    ],
    ids=str,
)
def test_a_failure_is_never_better_than_an_answer_that_was_judged(functions, processes, weight, values, worst):
    """However the values lie. What counts is the part times its weight, and a failed part is at most 0."""
    with RewardPool([f"{functions('number')}={weight}"], processes=processes) as pool:
        scores = score(pool, [text for value in values for text in ("no number", str(value))] + ["no number"])
    (part,) = scores.parts.values()
    assert part[~scores.failed].tolist() == values
    assert set(part[scores.failed].tolist()) == {worst}
    assert scores.rewards.tolist() == pytest.approx((weight * part).tolist())
    assert scores.rewards[scores.failed].max() <= min([0, *scores.rewards])


def test_a_reward_that_is_in_time_for_nothing_is_told_at_once_and_ends_the_batch(functions, capsys):
    """Seven prompts are not enough, however many answers they have, nor more of them beside one that was in time."""
    prompts = [str(i) for i in range(200)]
    with RewardPool([functions("misbehave")], processes=4, timeout=0.3) as pool:
        assert pool.score(["0"] * 5 + prompts[:7], ["sleep"] * 12, [REFERENCE] * 12).failed.all()
        pool.timeout = 2.0  # "fine" has to be in time
        scores = pool.score(prompts[:13], ["fine"] + ["sleep"] * 12, [REFERENCE] * 13)
        assert scores.failed.tolist() == [False] + [True] * 12
        assert capsys.readouterr().err.count("misbehave took more than 0.3 s (--reward_timeout)") == 1
        pool.timeout = 0.3
        with pytest.raises(
            UserError, match=r"misbehave took more than 0.3 s for answers to \d+ prompts .* mend it"
        ) as end:
            pool.score(prompts, ["sleep"] * 200, [REFERENCE] * 200)
        assert int(re.findall(r"to (\d+) prompts", str(end.value))[0]) < 50, "the others were not waited for"
        pool.timeout = 5.0
        assert score(pool, ["fine"]).rewards.tolist() == [0.5]


def test_a_machine_that_stalls_once_is_no_broken_reward_however_many_processes_notice(functions):
    """Each of them loses the call that it was at, here the first of eight prompts."""
    completions = ["sleep" if i % 2 == 0 and i < 16 else "fine" for i in range(64)]
    with RewardPool([functions("misbehave")], processes=8, timeout=0.5) as pool:
        scores = pool.score([str(i) for i in range(64)], completions, [REFERENCE] * 64)
    assert scores.failed[:16:2].all()
    assert scores.failed.sum() < 32, "the others were judged"


@pytest.mark.parametrize("bad", MISBEHAVIOUR)
def test_a_failure_says_what_happened(functions, bad):
    with RewardPool([functions("misbehave")], timeout=1, memory_mb=512) as pool:
        (sentence,) = score(pool, [bad]).failures
    assert MISBEHAVIOUR[bad] in sentence
    assert "\n" not in sentence
    assert len(sentence.encode()) < 600


def test_a_leak_ends_the_worker_and_costs_nobody_a_reward_but_the_call_that_ran_out(functions):
    with RewardPool([functions("leaking")], memory_mb=512) as pool:
        scores = score(pool, ["a"] * 24)
    assert 0 < scores.failed.sum() <= 4
    assert set(scores.rewards[~scores.failed]) == {1}


def test_what_a_reward_started_ends_with_it(functions, tmp_path):
    file = tmp_path / "pid"
    with RewardPool([functions("leave_a_child")], timeout=2) as pool:
        assert score(pool, [str(file)]).failed.all()
    assert wait_until_gone(int(file.read_text()))


def test_a_worker_that_died_between_two_batches_is_replaced(functions):
    with RewardPool([functions("number")]) as pool:
        for _ in range(3):
            (before,) = worker_ids(pool)
            os.kill(before, signal.SIGKILL)
            scores = score(pool, ["1", "2", "3"])
            assert scores.rewards.tolist() == [1, 2, 3]
            assert scores.failures == []
            assert worker_ids(pool) != [before]


def test_who_stops_a_job_stops_no_reward_of_the_step_that_is_finished_first(functions):
    with RewardPool([functions("number")]) as pool:
        before = worker_ids(pool)
        for worker in before:
            os.kill(worker, signal.SIGTERM)
        assert score(pool, ["1", "2", "3"]).rewards.tolist() == [1, 2, 3]
        assert worker_ids(pool) == before


def test_a_batch_that_does_not_fit_into_a_worker_is_an_error_and_not_a_row_of_zeros(functions):
    with RewardPool([functions("length")], memory_mb=128) as pool:
        with pytest.raises(UserError, match="memory_mb=128"):
            score(pool, ["a" * (256 << 20)])
        assert score(pool, ["a"]).rewards.tolist() == [1]


# ------------------------------------------------------------------------------------------------------ at construction


def test_the_example_of_the_documentation_prints_what_the_page_says(tmp_path):
    page = Path(__file__).parents[2] / "docs" / "rewards.md"
    module, script, printed = re.findall(r"^```(?:python|text)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    (tmp_path / "my_rewards.py").write_text(module)
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == printed


@pytest.mark.parametrize(
    ("specs", "sentence"),
    [
        (["accuracy", "formt"], r"no reward 'formt', did you mean format\?"),
        (["no_such_module:f"], "no module 'no_such_module'"),
        ([], "there is no reward"),
    ],
)
def test_a_wrong_spec_is_one_sentence_before_anything_runs(specs, sentence):
    with pytest.raises(UserError, match=sentence):
        RewardPool(specs)


@pytest.mark.parametrize("limit", [{"processes": 0}, {"timeout": 0}, {"timeout": float("nan")}, {"memory_mb": -1}])
def test_limits_that_make_no_sense_are_refused(limit):
    with pytest.raises(UserError, match=next(iter(limit))):
        RewardPool(["accuracy"], **limit)


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("import time; time.sleep(1000)", "importing the rewards .* took more than 2 s"),
        ("import os; os._exit(0)", r"importing the rewards .* ended its process \(status 0\)"),
        ("x = bytearray(1 << 40)", "cannot be imported: MemoryError"),
    ],
)
def test_an_import_that_hangs_or_crashes_is_a_sentence_too(tmp_path, monkeypatch, code, sentence):
    monkeypatch.setattr("minigpt.rl.reward_pool.START_SECONDS", 2.0)
    (tmp_path / "bad.py").write_text(code)
    with pytest.raises(UserError, match=sentence):
        RewardPool([f"{tmp_path / 'bad.py'}:f"], processes=2)


def test_modules_are_found_where_the_training_was_started(tmp_path, monkeypatch):
    (tmp_path / "rewards_of_mine.py").write_text("def f(prompt, completion, reference):\n    return 4")
    (tmp_path / "json.py").write_text("raise RuntimeError('a file in the working folder hides a module of Python')")
    monkeypatch.chdir(tmp_path)
    with RewardPool(["rewards_of_mine:f"]) as pool:
        assert score(pool, ["a"]).rewards.tolist() == [4]


# ------------------------------------------------------------------------------------------------------------ the end

ORPHANS = """
import sys
from minigpt.rl.reward_pool import RewardPool
pool = RewardPool([sys.argv[1], "accuracy"], processes=2, timeout=600)
print(*[worker.process.pid for worker in pool._workers], flush=True)
pool.score(["", ""], [sys.argv[2], sys.argv[2]], [{"answer": "1", "verifier": "exact", "meta": {}}] * 2)
print("scored", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("busy", ["loop", "power", "stubborn", "fine"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_no_worker_outlives_its_parent_however_it_dies(functions, busy, how):
    command = [sys.executable, "-c", ORPHANS, functions("misbehave"), busy]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        if busy == "fine":
            assert parent.stdout.readline() == "scored\n"
        else:
            time.sleep(0.3)  # so that it is in the middle of the call
        assert len(workers) == 2
        assert all(map(psutil.pid_exists, workers))
        parent.send_signal(how)
        parent.wait(5)
    assert all(map(wait_until_gone, workers))


def test_a_pool_that_nobody_closed_ends_its_workers_with_the_program(functions):
    code = ORPHANS.replace("sys.stdin.read()", "")
    command = [sys.executable, "-c", code, functions("misbehave"), "fine"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.endswith("scored\n")
    assert done.stderr == ""
    assert all(wait_until_gone(int(pid)) for pid in done.stdout.split()[:2])


def test_a_pool_that_nobody_holds_ends_its_workers(functions):
    pool = RewardPool([functions("number")])
    (pid,) = worker_ids(pool)
    del pool
    gc.collect()
    assert wait_until_gone(pid)


def test_a_pool_outlives_the_thread_that_made_it(functions):
    made = []
    thread = threading.Thread(target=lambda: made.append(RewardPool([functions("process")])))
    thread.start()
    thread.join()
    (pid,) = worker_ids(made[0])
    time.sleep(0.2)
    with made[0] as pool:
        assert score(pool, ["a"]).rewards.tolist() == [pid]


def test_closing_ends_a_call_that_hangs(functions):
    pool = RewardPool([functions("misbehave")], processes=2, timeout=600)
    workers = worker_ids(pool)
    errors = []

    def hang():
        try:
            score(pool, ["loop", "power"])
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=hang)
    thread.start()
    time.sleep(0.3)
    pool.close()
    pool.close()
    thread.join(5)
    assert not thread.is_alive()
    assert len(errors) == 1
    assert all(map(wait_until_gone, workers))
    assert worker_ids(pool) == []
