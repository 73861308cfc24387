"""The comparisons are fair (same loss, same conversations), the sums are right, and everything runs."""

import argparse
import itertools
import json
import math
import os
import re
import subprocess
from collections import Counter
from pathlib import Path

import generate
import kernels
import numpy as np
import peer_hf
import presets
import profile_step
import pytest
import sft
import torch
from common import CONFIG_S, packed_microworld

from minigpt.dataset.shards import PackedDataset, collate, token_statistics
from minigpt.model.model_minigpt import MiniGPT, MiniGPTConfig
from minigpt.trainer.flops import training_flops

REPOSITORY = Path(__file__).resolve().parents[2]
SHAPE = {**CONFIG_S, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def pretrain_rows(tmp_path_factory) -> PackedDataset:
    return PackedDataset(packed_microworld(tmp_path_factory.mktemp("pretrain"), "pretrain", 128, "tiny"), "train")


@pytest.fixture(scope="module")
def sft_rows(tmp_path_factory) -> PackedDataset:
    return PackedDataset(packed_microworld(tmp_path_factory.mktemp("sft"), "sft", 256, "tiny"), "train")


def tensors(batch: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def test_the_peer_computes_the_same_loss_on_the_same_rows(pretrain_rows):
    ours = MiniGPT(MiniGPTConfig(**SHAPE))
    peer = peer_hf.build_model(argparse.Namespace(**SHAPE))
    peer.load_state_dict(ours.state_dict())
    batch = tensors(collate([pretrain_rows.row(i) for i in range(3)]))
    ours_loss = ours(**batch).loss_sum
    peer_loss = peer_hf.summed_loss(peer, batch)
    assert torch.isclose(ours_loss, peer_loss, rtol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "autocast", "fp32"])
def test_the_peer_learns(pretrain_rows, precision):
    torch.manual_seed(0)
    step = peer_hf.make_step(peer_hf.build_model(argparse.Namespace(**SHAPE)), precision, False, 3e-3)
    batch = tensors(collate([pretrain_rows.row(i) for i in range(2)]))
    losses = [float(step(batch)) for _ in range(12)]
    assert abs(losses[0] - math.log(SHAPE["vocab_size"])) < 0.5
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("dtype", kernels.DTYPES.values(), ids=kernels.DTYPES)
def test_kernels_are_compared_with_torch_on_the_same_input(monkeypatch, dtype):
    """Both compute the same gradients, and afterwards each way was taken as often."""
    for module in (kernels.attention, kernels.cross_entropy):
        monkeypatch.setattr(module, "load_native", module.load_native)  # put back at the end
    monkeypatch.setattr(kernels.cross_entropy, "_KEPT_ELEMENTS", kernels.cross_entropy._KEPT_ELEMENTS)
    log_probs = kernels.log_probs_pass(0.5, 40, dtype)
    for one_pass, choose in (
        (kernels.attention_pass(2, 64, 20, 4, 2, 16, dtype), kernels.compiled_or_torch),
        (kernels.loss_pass(0.5, 40, dtype), kernels.compiled_or_torch),
        (log_probs, kernels.compiled_or_torch),
        (log_probs, kernels.kept_or_again),
    ):
        found = []
        times = kernels.compare(lambda one=one_pass, kept=found: kept.append(one()), 2, choose)
        assert [len(kind) for kind in times] == [2, 2]
        for ours, torchs in zip(found[::2], found[1::2], strict=True):
            for a, b in zip(ours, torchs, strict=True):
                assert ((a - b).float().norm() / b.float().norm()).item() < 2e-2


def conversations_of(window: list[dict[str, np.ndarray]]) -> Counter[bytes]:
    """The token ids of every document of some batches."""
    found: Counter[bytes] = Counter()
    for batch in window:
        for ids, documents in zip(batch["input_ids"], batch["document_ids"], strict=True):
            found.update(ids[documents == d].tobytes() for d in range(documents.max() + 1))
    return found


def test_each_kind_of_batches_trains_on_whole_conversations_of_the_same_data(sft_rows):
    known = {row.input_ids.astype(np.int64).tobytes() for row in sft.conversations(sft_rows)}
    for kind in sft.KINDS:
        windows = sft.windows(sft_rows, kind, 16)
        seen = conversations_of([batch for _ in range(4) for batch in next(windows)])
        assert seen, kind
        assert set(seen) <= known, kind


def test_padded_and_bucketed_steps_hold_as_many_conversations_as_packed_steps(sft_rows):
    rows_per_step = sft.POSITIONS_PER_STEP // sft_rows.seq_len
    expected = len(sft.conversations(sft_rows)) / len(sft_rows) * rows_per_step
    for kind in (sft.PADDED, sft.BUCKETED):
        windows = itertools.islice(sft.windows(sft_rows, kind, 16), 4)
        counts = [sum(conversations_of(window).values()) for window in windows]
        assert abs(np.mean(counts) - expected) <= 16 / 2, kind


def test_bucketing_deals_out_every_conversation_of_its_pool_once(sft_rows):
    pool = sft.conversations(sft_rows)[:96]
    windows = list(sft.bucketed_windows(pool, 32, 16, np.random.default_rng(0)))
    dealt = sum((conversations_of(window) for window in windows), Counter())
    assert dealt == Counter(row.input_ids.astype(np.int64).tobytes() for row in pool)
    widths = [batch["input_ids"].shape[1] for window in windows for batch in window]
    longest = max(len(row.input_ids) for row in pool)
    assert sum(widths) < len(widths) * longest  # some micro-batches are narrower than the longest conversation


def test_flops_per_token_are_those_of_the_batches(pretrain_rows):
    model = MiniGPT(MiniGPTConfig(**SHAPE))
    counts = token_statistics(collate([pretrain_rows.row(i) for i in range(len(pretrain_rows))]))
    by_batch = training_flops(
        model.config, tokens=counts.tokens, labels=counts.labels, attention_pairs=counts.attention_pairs
    )
    found = presets.flops_per_token(pretrain_rows, model.config)
    assert found == pytest.approx(by_batch / counts.tokens, rel=1e-9)


def test_the_table_of_presets_names_what_could_not_be_measured():
    assert "not measured: out of memory" in presets.table([{"preset": "1b", "error": "out of memory"}])


def test_a_preset_that_was_stopped_is_measured_by_the_steps_that_it_made(tmp_path):
    assert presets.measured("1b", tmp_path / "none", "took more than 45 s") == {
        "preset": "1b",
        "error": "took more than 45 s",
    }
    facts = {"compiled": False, "parameters": 1e9, "flops_per_token": 6e9, "matmul_flops_per_second": 5e14}
    (tmp_path / presets.FACTS).write_text(json.dumps(facts))
    record = {"kind": "train", "memory_gb": 30.0, "loss": 8.0}
    steps = [{**record, "step": i, "tokens_per_second": rate} for i, rate in enumerate((10.0, 3e4, 5e4, 4e4), 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    found = presets.measured("1b", tmp_path, "took more than 45 s")
    assert found["tokens_per_second"] == 4e4, "the first step compiles"
    assert found["mfu_of_measured_matmul"] == pytest.approx(4e4 * 6e9 / 5e14)
    assert "(took more than 45 s, after 4 steps) |" in presets.table([found])


def test_presets_are_published_one_by_one(tmp_path, monkeypatch):
    """Whoever is stopped during the second has the first."""

    def one(preset, *_):
        if preset == "300m":
            raise KeyboardInterrupt
        return {"preset": preset, "error": "too slow"}

    monkeypatch.setattr(presets, "_in_a_process", one)
    outputs = ["--json", str(tmp_path / "p.json"), "--markdown", str(tmp_path / "p.md"), "--data", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["presets.py", *outputs])
    with pytest.raises(KeyboardInterrupt):
        presets.main()
    assert json.loads((tmp_path / "p.json").read_text())["presets"] == [{"preset": "100m", "error": "too slow"}]
    assert "## Preset 100m on one device" in (tmp_path / "p.md").read_text()


def test_the_limits_of_each_part_of_the_gpu_script_add_up_to_eight_minutes():
    script = (REPOSITORY / "benchmarks" / "gpu.sh").read_text()
    parts = re.split(r"^if in_part \d; then$", script, flags=re.MULTILINE)[1:]
    limits = [
        {
            name: int(seconds)
            for name, seconds in re.findall(r"^    (?:run|bench|gpu_tests) (\w+) (\d+)", part, re.MULTILINE)
        }
        for part in parts
    ]
    assert len(limits) == 4
    assert max(sum(part.values()) for part in limits) <= 480
    assert list(limits[0]) == ["gpu_tests", "presets", "generate_gpu"], "the most important first"
    (a_preset,) = re.findall(r"bench presets .*--limit_seconds (\d+)", script)
    assert 3 * int(a_preset) < limits[0]["presets"]
    named = set().union(*limits)
    benchmarks = {path.stem for path in (REPOSITORY / "benchmarks").glob("*.py")} - {"common", "peer_hf"}
    assert {name for name in benchmarks if f"{name}.py" not in script and name not in named} == set()


def test_a_preset_is_ended_when_it_made_its_steps(tmp_path, monkeypatch):
    """A trainer that logs its steps and then saves for ever; one that fails says why; one that hangs is stopped."""
    program = "import sys, time, pathlib; folder = pathlib.Path(sys.argv[sys.argv.index('--save_dir') + 1]); {}"
    record = {"kind": "train", "tokens_per_second": 5.0, "memory_gb": 1.0, "loss": 2.0}
    steps = "".join(json.dumps({**record, "step": step}) + "\n" for step in (1, 2, 3, 4))
    facts = json.dumps({"compiled": True, "parameters": 1, "flops_per_token": 1.0, "matmul_flops_per_second": 1.0})
    logs = f"(folder / 'metrics.jsonl').write_text({steps!r}); (folder / 'facts.json').write_text({facts!r})"
    arguments = argparse.Namespace(
        seq_len=8, steps=4, tokens_per_step=8, micro_batch_size=None, compile=["1b"], smoke=True, limit_seconds=60
    )
    for name, body in (
        ("made", f"{logs}; time.sleep(1000)"),
        ("failed", "sys.exit('no memory')"),
        ("slow", "time.sleep(99)"),
    ):
        script, folder = tmp_path / f"{name}.py", tmp_path / name
        script.write_text(program.format(body))
        folder.mkdir()
        arguments.limit_seconds = 1 if name == "slow" else 60
        monkeypatch.setattr(presets, "__file__", str(script))
        found = presets._in_a_process("1b", tmp_path, folder, arguments)
        if name == "made":
            assert "| 1b | 0.0M | yes | 5 |" in presets.table([found])
            assert "stopped" not in found
        else:
            assert found["error"] == {"failed": "no memory", "slow": "took more than 1 s"}[name]


@pytest.mark.parametrize(
    ("operation", "group"),
    [
        ("aten::mm", "matrix products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention kernel"),
        ("aten::_fused_adamw_", "optimizer"),
        ("## Call CompiledFxGraph abc ##", "compiled pointwise"),
        ("aten::copy_", "copies and memory"),
        ("TorchDynamo Cache Lookup", "everything else"),
    ],
)
def test_operations_are_counted_to_their_group(operation, group):
    assert profile_step.group_of(operation) == group


def test_the_shares_of_a_profile_add_up():
    text = profile_step.report([("aten::mm", 6.0), ("aten::bmm", 2.0), ("aten::copy_", 2.0)], steps=2, singles=1)
    assert "matrix products              4.0  80.0%" in text
    assert "together                     5.0 100.0%" in text
    assert text.splitlines()[-1].split() == ["3.00", "aten::mm"]


def test_decode_steps_of_a_device_are_measured_with_and_without_fixed_shapes():
    lines = list(generate.on_device(["100m"], [1, 3], smoke=True))
    assert [(line["batch"], line["cuda_graphs"]) for line in lines] == [(1, False), (1, True), (3, False), (3, True)]
    for line in lines:
        assert line["tokens_per_second"] == pytest.approx(line["batch"] / line["seconds"])
        assert line["of_roofline"] > 0
        assert ("refused" in line) == (line["cuda_graphs"] and not torch.cuda.is_available())
    assert lines[2]["bytes"] - lines[0]["bytes"] == 2 * (lines[0]["bytes"] - weights_of(generate.SMOKE_SHAPE))
    assert "GB/s" in generate.device_table(lines)


def test_decode_steps_are_published_one_by_one(tmp_path):
    """Whoever is stopped during the third has two numbers, and the table of the first preset."""

    def lines():
        for preset in ("100m", "1b"):
            yield {"preset": preset, "batch": 1, "cuda_graphs": True, "error": "too slow"}
        raise KeyboardInterrupt

    outputs = argparse.Namespace(json=tmp_path / "g.json", markdown=tmp_path / "g.md")
    with pytest.raises(KeyboardInterrupt):
        generate._publish_lines(lines(), outputs)
    assert [line["preset"] for line in json.loads(outputs.json.read_text())["steps"]] == ["100m", "1b"]
    assert "## Generation on one device, 100m" in outputs.markdown.read_text()


def weights_of(shape: dict[str, int]) -> int:
    """Bytes in bfloat16."""
    return 2 * MiniGPT(MiniGPTConfig(**shape)).num_parameters()


@pytest.mark.slow
@pytest.mark.timeout(1500)  # without bf16 units
def test_one_command_runs_every_benchmark(tmp_path):
    script = str(REPOSITORY / "benchmarks" / "gpu.sh")
    ended = subprocess.run([script, "--smoke", str(tmp_path)], capture_output=True, text=True, env=os.environ)
    report = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert ended.returncode == 0, ended.stdout + report
    for title in (
        "Tests marked gpu",
        "Preset 1b on one device",
        "Generation on one device, 100m",
        "Training",
        "Fine-tuning",
        "Tests marked gpu, reinforcement learning",
        "Reinforcement learning: publish",
        "Reinforcement learning: memory",
    ):
        assert f"## {title}" in report
    for name in ("presets", "train", "sft", "generate_gpu"):
        assert json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
    rl = json.loads((tmp_path / "rl.json").read_text(encoding="utf-8"))
    assert rl["publish"]["3"]["broadcast"][0] > 0
    assert all(seconds > 0 for seconds in rl["publish"]["3"]["kernels"])
    grpo, ppo = ({*used} - {"GPU"} for used in (rl["memory"]["grpo"], rl["memory"]["ppo"]))
    assert grpo == {"Policy", "Reference", "Rollout"}, "it needs fewer models"
    assert ppo == {"Policy", "Critic", "Reference", "Reward", "Rollout"}
    assert all(megabytes > 50 for used in rl["memory"].values() for megabytes in used.values())
