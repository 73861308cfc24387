"""The guide's verification scripts, verbatim, run as a reader runs them: with the current directory at `minigpt/`.

They run in a copy of the package folder, so that a reader's own `out_test` is never touched; the copy comes first on
the path, so it is the copy's code that is tested.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt.cli import main
from minigpt.milestones import MILESTONES

REPOSITORY = Path(__file__).resolve().parents[1]

SCRIPTS = {
    1: """
from transformers import PreTrainedTokenizerFast
tokenizer = PreTrainedTokenizerFast.from_pretrained("./model")
text = "你好，MiniGPT！"
input_ids = tokenizer.encode(text)
decoded_text = tokenizer.decode(input_ids)
assert text == decoded_text.replace(" ", "")   # some tokenizers add spaces
""",
    2: """
import torch
from model.model_minigpt import MiniGPT, MiniGPTConfig
config = MiniGPTConfig(vocab_size=6400, hidden_size=256, num_hidden_layers=2,
                       num_attention_heads=4, max_position_embeddings=512)
model = MiniGPT(config)
print(sum(p.numel() for p in model.parameters()))
dummy_input = torch.randint(0, 6400, (2, 10))
output = model(dummy_input)
assert output.logits.shape == (2, 10, 6400)
""",
    3: """
from transformers import PreTrainedTokenizerFast
from dataset.lm_dataset import SFTDataset
import json
tokenizer = PreTrainedTokenizerFast.from_pretrained("./model")
with open("test_sft.jsonl", "w", encoding="utf-8") as f:
    data = {"conversations": [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]}
    f.write(json.dumps(data, ensure_ascii=False))
ds = SFTDataset("test_sft.jsonl", tokenizer, max_length=64)
x, y, mask = ds[0]
print("Input:", tokenizer.decode(x))
print("Mask :", mask.tolist())     # 0 over user's "A", 1 over assistant's "B"
""",
    6: """
import torch
from transformers import PreTrainedTokenizerFast
from model.model_minigpt import MiniGPT, MiniGPTConfig
tokenizer = PreTrainedTokenizerFast.from_pretrained("./model")
model = MiniGPT(MiniGPTConfig(...))                       # your configuration
state_dict = torch.load("./out_sft_test/xxx.pth", map_location="cpu")
model.load_state_dict(state_dict, strict=False)
model.eval()
messages = [{"role": "user", "content": "你好"}]
input_str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
input_ids = tokenizer(input_str, return_tensors="pt").input_ids
with torch.no_grad():
    outputs = model.generate(input_ids, max_new_tokens=50)
response = tokenizer.decode(outputs[0][len(input_ids[0]):], skip_special_tokens=True)
""",
    7: """
import torch
from model.model_minigpt import MiniGPT, MiniGPTConfig
from model.model_lora import apply_lora
model = MiniGPT(MiniGPTConfig(hidden_size=256, num_hidden_layers=2))
print(sum(p.numel() for p in model.parameters()))
apply_lora(model, rank=8)
print(sum(p.numel() for p in model.parameters() if p.requires_grad))
y = model(torch.randint(0, 100, (1, 10)))
""",
}
PRETRAIN = "python trainer/train_pretrain.py --epochs 1 --batch_size 2 --save_dir ./out_test"
SFT = "python trainer/train_full_sft.py --epochs 1 --batch_size 2 --save_dir ./out_sft_test"

# Printed after milestone 6's script, in the same process: what the test looks at.
REVEAL = """
import json
result = model.load_state_dict(state_dict, strict=False)
print(json.dumps({"missing": result.missing_keys, "unexpected": result.unexpected_keys, "response": response,
                  "new_tokens": len(outputs[0]) - len(input_ids[0])}))
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """A copy of the package folder, where the scripts may write."""
    folder = tmp_path_factory.mktemp("guide") / "minigpt"
    shutil.copytree(REPOSITORY / "minigpt", folder, ignore=shutil.ignore_patterns("__pycache__", "out*", "test_*"))
    return folder


def run(package: Path, *command: str) -> str:
    """Run a command in the package folder and return what it printed."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(package.parent),
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
    }
    done = subprocess.run(command, cwd=package, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def run_script(package: Path, number: int, text: str) -> str:
    """Save a script as `test_phaseN.py`, as the guide does, and run it."""
    script = package / f"test_phase{number}.py"
    script.write_text(text.lstrip(), encoding="utf-8")
    return run(package, "python", script.name)


def train_losses(run_folder: Path) -> list[float]:
    records = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["kind"] == "train"]


@pytest.fixture(scope="module")
def pretrained(package) -> str:
    return run(package, *PRETRAIN.split())


@pytest.fixture(scope="module")
def tuned(package, pretrained) -> str:
    return run(package, *SFT.split())


def test_the_scripts_are_those_of_the_guide():
    guide = REPOSITORY.parent / "shared" / "SEED.md"
    if not guide.exists():
        pytest.skip(f"no copy of the guide at {guide}; the scripts above are run all the same")
    text = guide.read_text(encoding="utf-8")
    for piece in (*SCRIPTS.values(), PRETRAIN, SFT):
        assert piece.strip() in text


def test_milestone_1_text_becomes_ids_and_comes_back(package):
    run_script(package, 1, SCRIPTS[1])


def test_milestone_2_the_model_gives_logits(package):
    assert run_script(package, 2, SCRIPTS[2]).strip() == "3245568"


def test_milestone_7_an_adapter_of_rank_8_on_every_layer_but_the_output(package):
    whole, trained = map(int, run_script(package, 7, SCRIPTS[7]).split())
    attention, feed_forward = 4 * (256 + 256), 3 * (256 + 704)
    assert trained == 2 * 8 * (attention + feed_forward)
    assert whole == 2 * (256 * (4 * 256 + 3 * 704) + 2 * 256 + 2 * 32) + 256 + 6400 * 256


def test_milestone_3_the_mask_is_1_over_the_answer_only(package):
    printed = run_script(package, 3, SCRIPTS[3])
    mask = json.loads(re.search(r"^Mask : (.*)$", printed, re.MULTILINE)[1])
    text = "Input: <|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n"
    assert printed.startswith(text)
    assert len(mask) == 63
    assert mask[:13] == [0.0] * 11 + [1.0, 1.0]  # y: … assistant \n | B <|im_end|>
    assert not any(mask[13:])


@pytest.mark.slow
def test_milestone_4_pretraining_prints_a_falling_loss_and_saves_weights(package, pretrained):
    printed = [float(loss) for loss in re.findall(r"loss: (\d+\.\d{4})", pretrained)]
    assert printed
    assert "nan" not in pretrained.lower()
    losses = train_losses(package / "out_test")
    assert abs(losses[0] - math.log(6400)) < 0.3  # random weights know nothing
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert [file.name for file in (package / "out_test").glob("*.pth")] == ["pretrain_256.pth"]


@pytest.mark.slow
def test_milestone_5_fine_tuning_starts_from_the_pretrained_weights_and_the_loss_falls(package, tuned):
    assert "out_test" in tuned  # it says which weights it starts from
    assert re.search(r"loss: \d+\.\d{4}", tuned)
    losses = train_losses(package / "out_sft_test")
    assert losses[0] < 0.9 * math.log(6400)
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    assert [file.name for file in (package / "out_sft_test").glob("*.pth")] == ["full_sft_256.pth"]


@pytest.mark.slow
def test_milestone_6_the_saved_weights_answer_with_no_key_missing_or_left_over(package, tuned):
    config = json.loads((package / "out_sft_test" / "hf" / "config.json").read_text())
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "intermediate_size")  # fmt: skip
    script = SCRIPTS[6].replace("...", ", ".join(f"{name}={config[name]}" for name in names), 1)
    script = script.replace("xxx.pth", "full_sft_256.pth")
    told = json.loads(run_script(package, 6, script + REVEAL).splitlines()[-1])
    assert told["missing"] == []
    assert told["unexpected"] == []
    assert told["response"].strip()
    assert 0 < told["new_tokens"] <= 50


@pytest.mark.slow
def test_the_same_command_again_trains_nothing(package, pretrained):
    again = run(package, *PRETRAIN.split())
    assert "nothing to do" in again
    assert re.search(r"loss: \d+\.\d{4}", again)


def test_milestone_8_the_four_tags_weigh_ten(package):
    """What the guide says, "build a batch by hand; loss_mask really is 10 at those positions", by its own imports."""
    script = """
import json, torch
from transformers import PreTrainedTokenizerFast
from dataset.lm_dataset import ReasonDataset
from model.model_minigpt import MiniGPT, MiniGPTConfig
tokenizer = PreTrainedTokenizerFast.from_pretrained("./model")
think = {"role": "assistant", "content": "<think>one and one</think><answer>2</answer>"}
with open("test_reason.jsonl", "w", encoding="utf-8") as f:
    f.write(json.dumps({"conversations": [{"role": "user", "content": "1 + 1 = ?"}, think]}))
ds = ReasonDataset("test_reason.jsonl", tokenizer, max_length=40)
x, y, loss_mask = (t.unsqueeze(0) for t in ds[0])
tags = tokenizer.convert_tokens_to_ids(["<think>", "</think>", "<answer>", "</answer>"])
is_tag = torch.isin(y, torch.tensor(tags))
logits = MiniGPT(MiniGPTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2))(x).logits
loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), y, reduction="none")
loss = (loss * loss_mask).sum() / loss_mask.sum()
print(json.dumps({"at tags": loss_mask[is_tag].tolist(), "elsewhere": sorted(set(loss_mask[~is_tag].tolist())),
                  "sum": loss_mask.sum().item(), "said": tokenizer.decode(y[loss_mask > 0]), "loss": loss.item()}))
"""
    told = json.loads(run_script(package, 8, script))
    assert told["at tags"] == [10.0] * 4
    assert told["elsewhere"] == [0.0, 1.0]
    assert told["said"] == "<think>one and one</think><answer>2</answer><|im_end|>"
    assert told["sum"] == 40 + 5  # "one", " and", " one", "2", "<|im_end|>"
    assert abs(told["loss"] - math.log(6400)) < 0.3  # the weighted mean of a model that knows nothing


@pytest.mark.parametrize("number", [1, 2, 3, 7, 8])
def test_verify_runs_the_check_and_says_what_it_saw(number, capsys):
    main(["verify", str(number)])
    printed = capsys.readouterr().out
    assert printed.count("  ok: ") >= 3
    assert printed.rstrip().endswith(f"milestone {number} is passed")


@pytest.mark.slow
@pytest.mark.parametrize("number", [4, 5, 6])
def test_verify_looks_at_the_runs_of_the_guide(number, package, tuned, monkeypatch, capsys):
    monkeypatch.chdir(package)
    main(["verify", str(number), "--save_dir", str(package)])
    assert capsys.readouterr().out.rstrip().endswith(f"milestone {number} is passed")


@pytest.mark.slow
def test_verify_trains_by_reinforcement_on_ray_and_looks_at_what_came_of_it(tmp_path, capfd):
    """Milestones 9 and 10 in one folder: the second check finds the tiny model that the first one made."""
    for number, groups in (
        (9, "policy (1) + critic (1) + reference (1) + reward (1)"),
        (10, "policy (1) + reference (1)"),
    ):
        main(["verify", str(number), "--save_dir", str(tmp_path)])
        printed = capfd.readouterr().out
        assert f"{groups} + rollout (1)" in printed  # four models, and two
        assert ("making a tiny model" in printed) == (number == 9)
        assert printed.rstrip().endswith(f"milestone {number} is passed")


@pytest.mark.parametrize(
    ("number", "stage", "change", "sentence"),
    [
        (10, "grpo", {"sampler_gap_max": 1.5}, "same log-probability"),
        (10, "grpo", {"version_lag": 1.0}, "the weights that learn from them"),
        (10, "grpo", {"kl": 0.01}, "the KL is exactly 0"),
        (10, "grpo", {"reward": 1.9}, "reward rises"),
        (9, "ppo", {"reward_model": 3.1}, "reward_model rises"),
        (9, "ppo", {"value_loss": 0.1}, "the critic learns"),
    ],
)
def test_verify_fails_when_reinforcement_was_not_what_it_should_be(number, stage, change, sentence, tmp_path, capsys):
    """A finished run whose first step is changed in one number."""
    (tmp_path / "rl_start" / "hf").mkdir(parents=True)
    (tmp_path / "rl_start" / "judge").mkdir()
    folder = tmp_path / f"out_{stage}_test"
    folder.mkdir()
    good = {"kind": "train", "sampler_gap_max": 1e-6, "version_lag": 0.0, "kl": 0.0, "kl_per_answer": 0.0}
    first = {**good, "reward": 0.5, "reward_format": -0.5, "reward_model": 0.0}
    last = {**good, "reward": 2.0, "reward_format": 1.0, "reward_model": 3.0}
    if stage == "ppo":
        first, last = {**first, "value_loss": 5.0}, {**last, "value_loss": 0.1}
    lines = [{"step": i, **record} for i, record in enumerate(({**first, **change}, last, last, last), start=1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "summary.json").write_text(json.dumps({"stage": stage, "steps": 4, "loss": 0.0}))
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(number), "--save_dir", str(tmp_path)])
    assert ended.value.code == 1
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(("last", "sentence"), [(9.5, "the loss falls"), ("nan", "the loss is a number")])
def test_verify_fails_when_a_run_is_not_what_it_should_be(last, sentence, tmp_path, capsys):
    """A loss that rises is no pretraining; one that is none is written as text."""
    run_folder = tmp_path / "out_test"
    run_folder.mkdir()
    summary = {"stage": "pretrain", "steps": 2, "loss": 9.5}
    (run_folder / "summary.json").write_text(json.dumps(summary))
    lines = [json.dumps({"step": i + 1, "kind": "train", "loss": loss}) for i, loss in enumerate((8.76, last))]
    (run_folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(SystemExit) as ended:
        main(["verify", "4", "--save_dir", str(tmp_path)])
    assert ended.value.code == 1
    assert sentence in capsys.readouterr().err


def test_there_is_a_check_for_each_milestone():
    assert set(MILESTONES) == set(range(1, 11))
