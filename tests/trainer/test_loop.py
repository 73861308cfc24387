"""The whole trainer against a loop of plain PyTorch, and however a step is cut."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_run import SMALL, assert_same_weights, metrics, weights

from minigpt.dataset.shards import GlobalOrder, PackedDataset, collate
from minigpt.errors import UserError
from minigpt.model.model_minigpt import FeedForward, MiniGPT, MiniGPTConfig
from minigpt.trainer.engine import Processes
from minigpt.trainer.loop import total_steps
from minigpt.trainer.options import TrainOptions
from minigpt.trainer.stage import micro_batch_size

CONFIGS = Path(__file__).parents[2] / "ds_configs"
STEPS, ROWS = 6, 4
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def cosine(step: int, peak=3e-3, lowest=0.1) -> float:
    """No warm-up; written down once more."""
    return peak * (lowest + (1 - lowest) * (1 + math.cos(math.pi * step / STEPS)) / 2)


def plain_loop(data: PackedDataset, clip: float) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Losses, gradient norms and weights of six AdamW steps in float64, from the logits and with no code of the
    trainer: one backward pass over the whole batch, the mean over the weights of its labels."""
    torch.manual_seed(0)
    model = MiniGPT(MiniGPTConfig(vocab_size=6400, intermediate_size=64, **SHAPE)).double()
    matrices = [p for n, p in model.named_parameters() if n.endswith("proj.weight")]
    others = [p for n, p in model.named_parameters() if not n.endswith("proj.weight")]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    order, losses, norms = GlobalOrder(len(data), seed=0), [], []
    for step in range(STEPS):
        rows = [data.row(order.index(step * ROWS + i)) for i in range(ROWS)]
        batch = {name: torch.from_numpy(array) for name, array in collate(rows).items()}
        logits = model(batch["input_ids"], batch["position_ids"], batch["document_ids"]).logits
        per_token = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
        loss = (per_token * batch["weights"].flatten()).sum() / batch["weights"].double().sum()
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clip).item())
        for group in optimizer.param_groups:
            group["lr"] = cosine(step)
        optimizer.step()
        losses.append(loss.item())
    return losses, norms, model.state_dict()


@pytest.fixture(scope="module", params=[0.5, 1e9], ids=["clipped", "not clipped"])
def clip_and_expected(request, packed):
    return request.param, plain_loop(PackedDataset(packed), request.param)


@pytest.mark.parametrize("micro_batch", [1, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_six_steps_are_those_of_a_plain_pytorch_loop(stage, micro_batch, clip_and_expected, packed, tmp_path, train):
    clip, (losses, norms, expected) = clip_and_expected
    assert min(norms) > 0.5, "a limit of 0.5 clips every step"
    config = ("--deepspeed", CONFIGS / f"zero{stage}.json", "--micro_batch_size", micro_batch)
    options = ("--optimizer", "adamw", "--warmup_ratio", 0, "--grad_clip", clip, "--max_steps", STEPS)
    train("pretrain", "--data", packed, "--save_dir", tmp_path, *config, *options)
    records = [record for record in metrics(tmp_path) if record["kind"] == "train"]
    assert [r["loss"] for r in records] == pytest.approx(losses, rel=1e-5)
    assert [r["grad_norm"] for r in records] == pytest.approx(norms, rel=1e-4)
    assert [r["lr"] for r in records] == pytest.approx([cosine(step) for step in range(STEPS)])
    found = weights(tmp_path)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        # The median: AdamW divides by the size of a gradient, so where that is all rounding error its step is too.
        assert (found[name].double() - weight).abs().median().item() < 1e-6, name


def test_the_first_loss_is_that_of_a_model_that_knows_nothing(packed, tmp_path, train):
    train("pretrain", "--data", packed, "--save_dir", tmp_path, "--max_steps", 1)
    assert metrics(tmp_path)[0]["loss"] == pytest.approx(math.log(6400), rel=0.02)


def test_a_run_learns_and_leaves_what_the_next_stage_needs(packed, conversations, tmp_path, train):
    """Loss falls, validation too; the exported folder holds the .pth's weights, rounded; fine-tuning starts from the
    unrounded ones."""
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    more = ("--eval_interval", 10, "--export_dtype", "bf16")
    out = train("pretrain", "--data", packed, "--save_dir", base, "--max_steps", 30, *more)
    assert "loss: " in out
    records = metrics(base)
    losses = [r["loss"] for r in records if r["kind"] == "train"]
    held_out = [r["valid_loss"] for r in records if r["kind"] == "valid"]
    assert losses[-1] < losses[0] - 1
    assert len(held_out) == 3
    assert held_out[-1] < held_out[0]
    exported = MiniGPT.from_pretrained(base / "hf").state_dict()
    assert all(torch.equal(weight.bfloat16().float(), exported[name]) for name, weight in weights(base).items())
    summary = json.loads((base / "summary.json").read_text())
    assert summary["loss"] == losses[-1]
    assert summary["valid_loss"] == held_out[-1]
    assert summary["fingerprint"] == PackedDataset(packed).fingerprint
    options = ("--data", conversations, "--init", base, "--max_steps", 1, "--learning_rate", 0)
    train("sft", *options, "--save_dir", tuned)
    assert_same_weights(tuned, base)


def test_validation_is_the_plain_mean_over_the_held_out_labels(conversations, packed, tmp_path, train):
    """Computed once more from the logits, row by row in float64; bits per byte from the bytes of the label tokens."""
    train("pretrain", "--data", packed, "--save_dir", tmp_path / "base", "--max_steps", 2, "--export_dtype", "fp32")
    train("sft", "--data", conversations, "--init", tmp_path / "base", "--save_dir", tmp_path / "run", "--max_steps", 2)
    model = MiniGPT.from_pretrained(tmp_path / "base" / "hf")
    model.load_state_dict(weights(tmp_path / "run"))
    model = model.double()
    data = PackedDataset(conversations, "valid")
    tokens = (conversations / "tokenizer.json").read_text()
    vocabulary = {index: token for token, index in json.loads(tokens)["model"]["vocab"].items()}
    special = {token["id"] for token in json.loads(tokens)["added_tokens"]}
    nats, labels, n_bytes = 0.0, 0, 0
    for i in range(len(data)):
        batch = {name: torch.from_numpy(array) for name, array in collate([data.row(i)]).items()}
        with torch.no_grad():
            logits = model(batch["input_ids"], batch["position_ids"], batch["document_ids"]).logits[0]
        for position in (batch["weights"][0] > 0).nonzero().flatten().tolist():
            label = int(batch["labels"][0, position])
            nats -= logits[position].log_softmax(-1)[label].item()
            labels += 1
            n_bytes += 0 if label in special else len(vocabulary[label])
    (found,) = [record for record in metrics(tmp_path / "run") if record["kind"] == "valid"]
    assert labels
    assert found["valid_loss"] == pytest.approx(nats / labels, rel=1e-5)
    assert found["valid_bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)


def test_gradient_checkpointing_runs_blocks_again_and_gives_the_same_run(packed, tmp_path, train):
    passes = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, _: passes.append(1) if isinstance(module, FeedForward) else None
    )
    try:
        counts = []
        for name, options in (("plain", ()), ("checkpointed", ("--gradient_checkpointing",))):
            passes.clear()
            train("pretrain", "--data", packed, "--save_dir", tmp_path / name, "--max_steps", 3, *options)
            counts.append(len(passes))
    finally:
        hook.remove()
    assert counts[1] - counts[0] == 3 * 2, "steps times layers"
    assert_same_weights(tmp_path / "checkpointed", tmp_path / "plain")


def test_every_attention_backend_gives_the_same_run(packed, tmp_path, train):
    losses = {}
    for backend in ("sdpa", "varlen", "reference"):
        run = tmp_path / backend
        train("pretrain", "--data", packed, "--save_dir", run, "--max_steps", 3, "--attention_backend", backend)
        losses[backend] = [record.get("loss", record.get("valid_loss")) for record in metrics(run)]
    assert losses["varlen"] == pytest.approx(losses["sdpa"], rel=1e-6)
    assert losses["reference"] == pytest.approx(losses["sdpa"], rel=1e-6)


def test_a_run_that_explodes_stops_with_a_sentence_and_keeps_its_checkpoint(packed, tmp_path, minigpt):
    """A learning rate of 1e30 makes everything infinite in one step; the steps after it are skipped, then it ends."""
    explode = ("--learning_rate", 1e30, "--schedule", "constant", "--optimizer", "adamw", "--save_interval", 1)
    for stage in range(4):
        run = tmp_path / str(stage)
        config = ("--deepspeed", CONFIGS / f"zero{stage}.json", "--max_nan_steps", 3, "--max_steps", 20)
        ended = minigpt("train", "pretrain", *SMALL, "--data", packed, "--save_dir", run, *explode, *config)
        sentence = ended.sentence()
        assert "NaN or infinite in 3 steps in a row (now at step 4)" in sentence, stage
        assert "--learning_rate" in sentence
        assert metrics(run)[-1]["skipped_steps"] == 3
        assert not list(run.glob("*.pth")), "no weights to go on with"
        assert list((run / "checkpoints").glob("step_*"))


@pytest.mark.slow
def test_compiled_training_is_eager_training_and_resumes_to_the_same_bits(packed, tmp_path, train):
    """bf16: losses agree as far as rounding goes; an interrupted compiled run ends in the bits of a whole one."""
    options = ("--data", packed, "--max_steps", 4, "--dtype", "bf16", "--eval_rows", 4)
    eager, compiled, resumed = (tmp_path / name for name in ("eager", "compiled", "resumed"))
    train("pretrain", *options, "--save_dir", eager)
    every = ("--compile", "true", "--save_interval", 2, "--keep_checkpoints", 3)
    out = train("pretrain", *options, "--save_dir", compiled, *every)
    assert "compiled" in out
    losses = [[record.get("loss", record.get("valid_loss")) for record in metrics(run)] for run in (eager, compiled)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-3)
    (resumed / "checkpoints").mkdir(parents=True)
    (compiled / "checkpoints" / "step_00000002").rename(resumed / "checkpoints" / "step_00000002")
    assert "at step 2 of 4" in train("pretrain", *options, "--save_dir", resumed, *every)
    assert_same_weights(resumed, compiled)


def processes(world_size: int) -> Processes:
    return Processes(0, 0, world_size, torch.device("cpu"))


@pytest.mark.parametrize(
    ("rows", "world_size", "seq_len", "expected"),
    [(16, 1, 256, 16), (16, 4, 256, 4), (64, 1, 256, 16), (16, 1, 1024, 4), (6, 2, 2048, 1), (3, 1, 8192, 1)],
)
def test_the_micro_batch_is_the_largest_that_divides_a_ranks_share_and_fits_a_pass(rows, world_size, seq_len, expected):
    options = TrainOptions(global_batch_size=rows)
    assert micro_batch_size(options, processes(world_size), seq_len) == expected


def test_a_global_batch_that_does_not_divide_among_the_processes_is_refused():
    for rows, world_size in ((6, 4), (1, 2)):
        with pytest.raises(UserError, match=f"--global_batch_size {rows} does not divide among {world_size} processes"):
            micro_batch_size(TrainOptions(global_batch_size=rows), processes(world_size), 256)


def test_epochs_are_steps():
    assert total_steps(TrainOptions(epochs=2, global_batch_size=16), 100) == 13
    assert total_steps(TrainOptions(epochs=0.001, global_batch_size=16), 100) == 1
    assert total_steps(TrainOptions(epochs=2, max_steps=5), 100) == 5
