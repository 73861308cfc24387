"""What cannot be trained is said in one sentence on stderr with exit status 1, before anything is written."""

import json
import shutil
from pathlib import Path

import pytest
from small_run import SMALL

from minigpt import cli
from minigpt.dataset.shards import PackedDataset

CONFIGS = Path(__file__).parents[2] / "ds_configs"


@pytest.fixture
def refused(minigpt, tmp_path):
    """The sentence with which a run is refused; it leaves no file behind."""

    def run(stage: str, *arguments: object) -> str:
        save_dir = tmp_path / "runs" / "refused"
        ended = minigpt("train", stage, *SMALL, "--save_dir", save_dir, *arguments)
        left = [path for path in save_dir.rglob("*") if path.is_file()]
        assert not left
        return ended.sentence()

    return run


@pytest.fixture(scope="module")
def base(tmp_path_factory, packed):
    """A finished pretrain run, made once."""
    run = tmp_path_factory.mktemp("base") / "run"
    cli.main(["train", "pretrain", *SMALL, "--data", str(packed), "--save_dir", str(run), "--max_steps", "1"])
    return run


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--global_batch_size", 0),
        ("--micro_batch_size", 0),
        ("--micro_batch_size", -1),
        ("--seq_len", 0),
        ("--max_steps", 0),
        ("--epochs", 0),
        ("--epochs", "inf"),
        ("--learning_rate", -1),
        ("--learning_rate", "nan"),
        ("--weight_decay", "nan"),
        ("--grad_clip", -1),
        ("--warmup_ratio", 1.5),
        ("--min_lr_ratio", -0.5),
        ("--beta1", 1.0),
        ("--beta2", "nan"),
        ("--keep_checkpoints", 0),
        ("--save_interval", -1),
        ("--eval_rows", 0),
        ("--log_interval", 0),
        ("--max_nan_steps", 0),
        ("--hidden_size", 0),
        ("--num_hidden_layers", -2),
        ("--threads", -1),
    ],
)
def test_a_number_that_makes_no_sense_is_named(option, value, packed, refused):
    sentence = refused("pretrain", "--data", packed, option, value)
    assert option in sentence
    assert str(value) in sentence


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--global_batch_size", 6, "--micro_batch_size", 4), ("--micro_batch_size 4", "6 rows")),
        (("--num_attention_heads", 3), ("hidden_size 32", "num_attention_heads 3")),
        (("--num_key_value_heads", 3), ("num_attention_heads 4", "num_key_value_heads 3")),
        (("--vocab_size", 100), ("--vocab_size 100", "6400")),
        (("--learning_rat", 1e-3), ("learning_rat", "did you mean learning_rate?")),
        (("--dtype", "fp8"), ("dtype", "fp8")),
        (("--max_steps", "many"), ("max_steps", "many")),
        (("--dtype", "bf16", "--deepspeed", CONFIGS / "zero0.json"), ("stage 0", "--dtype fp32")),
        (("--optimizer", "muon", "--deepspeed", CONFIGS / "zero3.json"), ("muon", "--optimizer adamw")),
    ],
    ids=lambda value: " ".join(str(v) for v in value if str(v).startswith("--")) or None,
)
def test_options_that_do_not_go_together_are_named(arguments, words, packed, refused):
    sentence = refused("pretrain", "--data", packed, *arguments)
    for word in words:
        assert word in sentence


@pytest.mark.parametrize("option", [("--lora_alpha", 32), ("--lora_targets", "q_proj", "v_proj"), ("--lora_dora",)])
@pytest.mark.parametrize("stage", ["dpo", "reason", "grpo", "ppo"])
def test_options_of_an_adapter_without_one_are_not_a_full_fine_tuning(stage, option, minigpt):
    if stage in ("grpo", "ppo") and option == ("--lora_dora",):
        option = ("--lora_alpha", 8)  # all that they know
    sentence = minigpt("train", stage, *option).sentence()
    assert f"{option[0]} belongs to an adapter: give --lora_rank too, or leave it out" in sentence


def test_several_folders_of_packed_data_are_told_to_be_packed_together(packed, conversations, refused):
    assert "takes one packed folder, or raw files" in refused("pretrain", "--data", packed, conversations)


def test_data_that_are_not_there(tmp_path, refused):
    missing = tmp_path / "missing.jsonl"
    assert str(missing) in refused("pretrain", "--data", missing)
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    assert str(empty) in refused("pretrain", "--data", empty)


def test_a_broken_line_of_raw_data_is_named_with_its_number(tmp_path, refused):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "good"}\n{"text": "torn\n')
    assert f"{broken}:2" in refused("pretrain", "--data", broken)


def test_data_packed_for_another_stage(packed, conversations, base, refused):
    sentence = refused("pretrain", "--data", conversations)
    assert "--stage sft" in sentence
    assert "minigpt data pack --stage pretrain" in sentence
    assert "--stage pretrain" in refused("sft", "--data", packed, "--init", base)


def test_a_damaged_shard_is_found_when_its_first_row_is_used(packed, tmp_path, minigpt):
    """Found before a step is made of it; nothing of the run's results is written."""
    damaged = tmp_path / "damaged"
    shutil.copytree(packed, damaged)
    (shard,) = (damaged / "train").glob("*.arrow")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    run = tmp_path / "run"
    ended = minigpt("train", "pretrain", *SMALL, "--data", damaged, "--save_dir", run, "--max_steps", 2)
    assert str(shard) in ended.sentence()
    assert not (run / "metrics.jsonl").read_text()
    assert not list(run.glob("*.pth"))


def test_an_unfinished_dataset(packed, tmp_path, refused):
    unfinished = tmp_path / "unfinished"
    shutil.copytree(packed, unfinished)
    (unfinished / "manifest.json").unlink()
    assert "not a finished dataset" in refused("pretrain", "--data", unfinished)


def test_raw_files_may_lie_in_a_folder_called_train(tmp_path, train):
    """What is packed is decided alike for --data and for `minigpt data pack --input`."""
    data = tmp_path / "mydata"
    (data / "train").mkdir(parents=True)
    (data / "train" / "a.jsonl").write_text('{"text": "the river and the stone"}\n' * 3 + '{"text": "a bird"}\n')
    (data / "manifest.json").write_text("{}")
    packed_elsewhere = data / "packed"
    assert "packed 1 rows" in train("pretrain", "--data", data, "--save_dir", tmp_path / "run", "--max_steps", 1)
    cli.main(["data", "pack", "--stage", "pretrain", "--input", str(data), "--output", str(packed_elsewhere)])
    assert PackedDataset(packed_elsewhere).manifest["inputs"] == PackedDataset(tmp_path / "run/data").manifest["inputs"]


def test_sft_never_starts_from_random_weights(conversations, refused):
    sentence = refused("sft", "--data", conversations)
    assert "--init RUN" in sentence
    assert "minigpt train pretrain" in sentence


def test_sft_takes_the_newest_pretrain_run_beside_it_and_says_which(base, conversations, train):
    out = train("sft", "--data", conversations, "--save_dir", base.parent / "sft", "--max_steps", 1)
    assert f"starting from the newest pretrain run, {base}" in " ".join(out.split())
    assert json.loads((base.parent / "sft" / "summary.json").read_text())["init"] == f"from {base}"


def test_init_that_holds_no_model(packed, tmp_path, refused):
    assert str(tmp_path / "nothing") in refused("pretrain", "--data", packed, "--init", tmp_path / "nothing")


def test_init_with_a_broken_weights_file(base, packed, tmp_path, refused):
    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    (path,) = broken.glob("*.pth")
    path.write_bytes(path.read_bytes()[:1000])
    assert str(path) in refused("pretrain", "--data", packed, "--init", broken)
    path.write_bytes(b"")
    assert str(path) in refused("pretrain", "--data", packed, "--init", broken)


def test_init_with_another_tokenizer_than_the_data(base, packed, tmp_path, refused):
    other = tmp_path / "other"
    shutil.copytree(base, other)
    path = other / "hf" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"].pop()
    path.write_text(json.dumps(content))
    sentence = refused("pretrain", "--data", packed, "--init", other)
    assert "another tokenizer" in sentence
    assert f"--tokenizer {other / 'hf'}" in sentence


def test_rows_longer_than_the_model_was_made_for(base, packed, tmp_path, refused):
    short = tmp_path / "short"
    shutil.copytree(base, short)
    path = short / "hf" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_position_embeddings": 32}))
    sentence = refused("pretrain", "--data", packed, "--init", short)
    assert "rows of 64 tokens" in sentence
    assert "--seq_len" in sentence


def test_deepspeed_files_that_cannot_be_used(packed, tmp_path, refused):
    path = tmp_path / "zero.json"
    assert str(path) in refused("pretrain", "--data", packed, "--deepspeed", path)
    path.write_text("{")
    assert f"{path} is not valid JSON" in refused("pretrain", "--data", packed, "--deepspeed", path)
    path.write_text("[]")
    assert str(path) in refused("pretrain", "--data", packed, "--deepspeed", path)


@pytest.mark.parametrize(
    "given",
    [
        {"optimizer": {"type": "Adam"}},
        {"train_batch_size": 32},
        {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto"},
        {"gradient_accumulation_steps": 2},
        {"gradient_clipping": 0.5, "bf16": {"enabled": False}},
        {"fp16": {"enabled": True}},
    ],
    ids=" ".join,
)
def test_keys_of_a_deepspeed_file_that_our_options_decide(given, packed, tmp_path, refused):
    path = tmp_path / "zero.json"
    path.write_text(json.dumps(given))
    sentence = refused("pretrain", "--data", packed, "--deepspeed", path)
    assert f"{path} sets {', '.join(given)}, which options of the trainer decide; take that out" in sentence


def test_a_run_folder_that_cannot_be_made(packed, tmp_path, minigpt):
    (tmp_path / "file").touch()
    run = tmp_path / "file" / "run"
    ended = minigpt("train", "pretrain", *SMALL, "--data", packed, "--save_dir", run)
    assert str(run) in ended.sentence()


def test_a_folder_with_a_finished_run_of_another_stage(base, conversations, minigpt):
    ended = minigpt("train", "sft", *SMALL, "--data", conversations, "--init", base, "--save_dir", base)
    assert "holds a finished pretrain run" in ended.sentence()


def test_a_yaml_file_sets_options_and_its_unknown_keys_are_named(packed, tmp_path, minigpt, train):
    path = tmp_path / "options.yaml"
    path.write_text("max_steps: 1\nlearning_rat: 1.0\n")
    ended = minigpt("train", "pretrain", *SMALL, "--data", packed, "--save_dir", tmp_path / "run", "--config", path)
    assert "learning_rat" in ended.sentence()
    path.write_text("max_steps: 1\nlearning_rate: 0.5\n")
    assert "1 steps" in train("pretrain", "--data", packed, "--save_dir", tmp_path / "run", "--config", path)
    assert "learning_rate: 0.5" in (tmp_path / "run" / "config.yaml").read_text()
