"""A run goes on at another number of processes: the same samples, the same moments, other rounding."""

import json
from pathlib import Path

import pytest
import torch
from small_run import SMALL, metrics, weights
from test_distributed import launch
from test_resume import as_it_was_at
from world_size_worker import COPIES, copy, trained_engine

from minigpt.trainer import checkpoint
from minigpt.trainer.engine import PartOfLine, init_processes

STEPS, CUT = 10, 4
CASES = [f"zero{stage} {optimizer}" for stage in (1, 2) for optimizer in ("adamw", "muon")] + ["zero0 adamw"]
CONFIGS = Path(__file__).parents[2] / "ds_configs"


@pytest.mark.parametrize("before", [1, 2, 3, 5])
@pytest.mark.parametrize("now", [1, 2, 3, 5])
@pytest.mark.parametrize("total", [1, 7, 30, 31])
def test_a_line_cut_for_any_number_of_ranks_is_recut_for_any_other(total, before, now):
    line = torch.arange(1.0, total + 1)

    def cut(world_size: int) -> list[torch.Tensor]:
        """As ZeRO does: parts of an even length, so the last ones may be padding in part or altogether."""
        length = 2 * -(-total // (2 * world_size))
        return list(torch.cat([line, line.new_zeros(world_size * length - total)]).split(length))

    for index, expected in enumerate(cut(now)):
        found = PartOfLine(total, index, len(expected), line.dtype)
        for piece in cut(before):
            found.take(piece)
        assert torch.equal(found.part, expected)


def options(case: str, packed: Path, run: Path) -> list[str]:
    config, optimizer = case.split()
    return [
        *("--data", str(packed), "--save_dir", str(run), "--max_steps", str(STEPS), "--save_interval", str(CUT)),
        *("--keep_checkpoints", "9", "--deepspeed", str(CONFIGS / f"{config}.json"), "--optimizer", optimizer),
        *("--eval_rows", "2", "--micro_batch_size", "2"),
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, packed) -> Path:
    """Folders CASE/whole1, CASE/whole2 (not interrupted, by 1 and 2 processes) and CASE/1to2 (begun by 1, ended by 2).
    And COPY/1, a checkpoint of an engine alone, and COPY/2, the same loaded and saved by two."""
    from minigpt import cli

    folder = tmp_path_factory.mktemp("runs")
    processes = init_processes()
    threads = torch.get_num_threads()
    jobs = []
    for case in CASES:
        whole = folder / case / "whole1"
        cli.main(["train", "pretrain", *SMALL, *options(case, packed, whole)])
        interrupted = as_it_was_at(CUT, whole, folder / case / "1to2")
        for run in (folder / case / "whole2", interrupted):
            jobs.append({"train": [*SMALL, *options(case, packed, run)]})
    for case in COPIES:
        engine = trained_engine(processes, *case)
        source = checkpoint.save(engine, folder / f"{case}" / "1", {"step": 3}, keep=1)
        engine.close()
        jobs.append({"copy": case, "from": str(source), "to": str(folder / f"{case}" / "2")})
    torch.set_num_threads(threads)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    launch(2, str(Path(__file__).with_name("world_size_worker.py")), str(folder / "jobs.json"))
    return folder


def assert_same_course(found: Path, expected: Path) -> None:
    """Same samples at every step, losses up to rounding, and weights that no step of Adam's tells apart."""
    ours, theirs = ([r for r in metrics(run) if r["kind"] == "train"] for run in (found, expected))
    for key in ("step", "tokens", "lr"):
        assert [r[key] for r in ours] == [r[key] for r in theirs]
    assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in theirs], rel=2e-6)
    assert [r["grad_norm"] for r in ours] == pytest.approx([r["grad_norm"] for r in theirs], rel=2e-5)
    reference = weights(expected)
    for name, weight in weights(found).items():
        assert (weight - reference[name]).norm() < 2e-5 * reference[name].norm(), name


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_go_on_where_one_was_stopped(case, runs):
    folder = runs / case
    assert_same_course(folder / "1to2", folder / "whole1")
    newest = checkpoint.list_checkpoints(folder / "1to2")[-1]
    assert checkpoint.verify(newest)["world_size"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_one_process_goes_on_where_two_were_stopped(case, runs, packed, train):
    interrupted = as_it_was_at(CUT, runs / case / "whole2", runs / case / "2to1")
    out = train("pretrain", *options(case, packed, interrupted))
    assert f"at step {CUT} of {STEPS}" in out
    assert "written by 2 processes, now 1" in " ".join(out.split())
    assert_same_course(interrupted, runs / case / "whole2")


def engine_files(folder: Path) -> list[dict]:
    """What the ranks' files hold of the optimizer: only tensors and plain values."""
    from minigpt.trainer.engine import _load_safely

    paths = sorted(folder.glob("engine/*optim_states.pt"))
    return [_load_safely(path, "cpu")["optimizer_state_dict"] for path in paths]


@pytest.mark.slow
@pytest.mark.parametrize("case", COPIES, ids=str)
def test_masters_and_moments_go_from_one_process_to_two_and_back_without_losing_a_bit(case, runs, tmp_path):
    (alone,), (together,) = (checkpoint.list_checkpoints(runs / f"{case}" / name) for name in "12")
    (before,) = engine_files(alone)
    halves = engine_files(together)
    assert len(halves) == 2
    back = copy(init_processes(), case, together, tmp_path / "back")
    (after,) = engine_files(back)
    masters = "single_partition_of_fp32_groups"
    for group, master in enumerate(before[masters]):
        both = torch.cat([half[masters][group] for half in halves])
        assert torch.equal(both[: len(master)], master)
        assert not both[len(master) :].any(), "padding"
        assert torch.equal(after[masters][group], master)
        for name, value in before["base_optimizer_state"]["state"][group].items():
            assert value.abs().max() > 0
            assert torch.equal(after["base_optimizer_state"]["state"][group][name], value), (group, name)


@pytest.mark.slow
def test_ranks_of_another_world_size_draw_different_random_numbers_and_always_the_same(runs, tmp_path):
    (source,) = checkpoint.list_checkpoints(runs / f"{COPIES[0]}" / "1")
    (together,) = checkpoint.list_checkpoints(runs / f"{COPIES[0]}" / "2")
    drawn = [
        torch.load(folder / f"rng_{rank:05d}.pt", weights_only=True)["cpu"]
        for folder, rank in ((source, 0), (together, 0), (together, 1))
    ]
    assert len({state.numpy().tobytes() for state in drawn}) == 3
    states = []
    for name in ("once", "twice"):
        torch.manual_seed(len(name))
        again = copy(init_processes(), COPIES[0], together, tmp_path / name)
        states.append(torch.load(again / "rng_00000.pt", weights_only=True)["cpu"])
    assert torch.equal(*states)
