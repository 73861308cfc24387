"""`minigpt verify N`: the check that ends milestone N of the guide, told line by line.

Each check does what the guide's own script does and looks a little closer: besides the shape of an output it asks for
what would be different if the code were wrong. Nothing is written but the runs of milestones 4, 5, 9 and 10 in
`save_dir`.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt.errors import UserError
from minigpt.observe.metrics import read_metrics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from minigpt.model.model_minigpt import MiniGPT

TOKENIZER = Path(__file__).parent / "model"
TAGS = ("<|im_start|>", "<|im_end|>", "<think>", "</think>", "<answer>", "</answer>")


@dataclass
class VerifyOptions:
    """Run the check of a milestone of the guide.

    Args:
        milestone: 1 tokenizer, 2 model, 3 datasets, 4 pretraining, 5 supervised fine-tuning, 6 chat, 7 LoRA,
            8 reasoning, 9 PPO, 10 GRPO.
        save_dir: Where milestones 4, 5, 9 and 10 train; a run that is finished there is looked at, not trained again.
    """

    milestone: int
    save_dir: Path = Path("out/milestones")


def verify(options: VerifyOptions) -> None:
    """Run the check of a milestone; the first thing that is not as it should be ends it with status 1."""
    if options.milestone not in MILESTONES:
        raise UserError(
            f"there is no check for milestone {options.milestone}; there are {', '.join(map(str, MILESTONES))}"
        )
    title, check = MILESTONES[options.milestone]
    print(f"milestone {options.milestone}: {title}")
    check(options)
    print(f"milestone {options.milestone} is passed")


def verify_tokenizer(options: VerifyOptions) -> None:
    """Milestone 1: text becomes ids and comes back unchanged."""
    tokenizer = _tokenizer()
    text = "你好，MiniGPT！"
    ids = tokenizer.encode(text)
    print(f"  {text!r} → {ids}")
    _expect(tokenizer.decode(ids) == text, "decoding the ids gives the text back")
    hard = "naïve 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 🙂\t\n  two  spaces 3.14159 漢字かな"
    _expect(tokenizer.decode(tokenizer.encode(hard)) == hard, "so it does for rare characters, digits and white space")
    _expect(all(len(tokenizer.encode(tag)) == 1 for tag in TAGS), f"{' '.join(TAGS)} are one id each")


def verify_model(options: VerifyOptions) -> None:
    """Milestone 2: logits of the right shape, of a model that knows nothing yet and cannot see the future."""
    import torch

    from minigpt.model.model_minigpt import MiniGPT, MiniGPTConfig

    torch.manual_seed(0)
    model = MiniGPT(
        MiniGPTConfig(
            vocab_size=6400,
            hidden_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=512,
        )
    ).eval()
    print(f"  {sum(p.numel() for p in model.parameters()):,} parameters")
    ids_BT = torch.randint(0, 6400, (2, 10))
    with torch.no_grad():
        logits_BTV = model(ids_BT).logits
        _expect(logits_BTV.shape == (2, 10, 6400), "the logits are [2, 10, 6400]")
        loss = torch.nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten()).item()
        _expect(abs(loss - math.log(6400)) < 0.5, f"the loss of random weights, {loss:.2f}, is near ln 6400 = 8.76")
        other_BT = ids_BT.clone()
        other_BT[:, -1] = (other_BT[:, -1] + 1) % 6400
        same = torch.equal(model(other_BT).logits[:, :-1], logits_BTV[:, :-1])
        _expect(same, "another last token changes nothing at the positions before it")


def verify_datasets(options: VerifyOptions) -> None:
    """Milestone 3: labels are the inputs moved by one, and only the assistant's words are learned."""
    from minigpt.dataset.lm_dataset import PretrainDataset, SFTDataset

    tokenizer = _tokenizer()
    turns = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]
    with tempfile.TemporaryDirectory() as folder:
        texts, chats = Path(folder, "pretrain.jsonl"), Path(folder, "sft.jsonl")
        texts.write_text(json.dumps({"text": "MiniGPT reads."}) + "\n", encoding="utf-8")
        chats.write_text(json.dumps({"conversations": turns}) + "\n", encoding="utf-8")
        x, y, mask = PretrainDataset(texts, tokenizer, max_length=32)[0]
        _expect(x[1:].tolist() == y[:-1].tolist(), "pretraining: y is x moved by one token")
        _expect(
            str(tokenizer.decode(y[mask > 0])).endswith("reads.<|endoftext|>"),
            "pretraining: the text and its end are learned",
        )
        x, y, mask = SFTDataset(chats, tokenizer, max_length=64)[0]
    print(
        f"  input {tokenizer.decode(x[: int(mask.nonzero().max()) + 1])!r}\n  mask  {[int(m) for m in mask.tolist()]}"
    )
    _expect(tokenizer.decode(y[mask > 0]) == "B<|im_end|>", "SFT: exactly the answer B and its <|im_end|> are learned")


def verify_pretrain(options: VerifyOptions) -> None:
    """Milestone 4: one epoch over the embedded world; the loss begins at ln(vocab) and falls."""
    run = _train("train_pretrain", options.save_dir / "out_test")
    losses = _check_losses(run)
    _expect(
        abs(losses[0] - math.log(6400)) < 0.5, f"it begins at {losses[0]:.2f}, near ln 6400 = 8.76: nothing is known"
    )
    _expect(any(run.glob("pretrain_*.pth")), f"{run} holds the weights, {next(run.glob('*.pth')).name}")


def verify_sft(options: VerifyOptions) -> None:
    """Milestone 5: the same loop over conversations, from the weights of milestone 4."""
    if not (options.save_dir / "out_test" / "summary.json").exists():
        verify_pretrain(options)
    run = _train("train_full_sft", options.save_dir / "out_sft_test")
    losses = _check_losses(run)
    _expect(losses[0] < 0.9 * math.log(6400), f"it begins at {losses[0]:.2f}: the weights of milestone 4 are in use")
    _expect(any(run.glob("full_sft_*.pth")), f"{run} holds the weights, {next(run.glob('*.pth')).name}")


def verify_chat(options: VerifyOptions) -> None:
    """Milestone 6: the saved weights answer through a hand-written `generate`."""
    import torch

    if not (options.save_dir / "out_sft_test" / "summary.json").exists():
        verify_sft(options)
    run = options.save_dir / "out_sft_test"
    model, weights = _model_of(run)
    result = model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True), strict=False)
    unused = [*result.missing_keys, *result.unexpected_keys]
    _expect(
        not unused, f"every tensor of {weights.name} has its place in the model" + f" ({unused[:3]})" * bool(unused)
    )
    tokenizer = _tokenizer()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "你好"}], tokenize=False, add_generation_prompt=True
    )
    input_ids = tokenizer(prompt, return_tensors="pt").input_ids
    torch.manual_seed(0)
    with torch.no_grad():
        output = model.eval().generate(input_ids, max_new_tokens=50)
    _expect(output[0, : input_ids.shape[1]].tolist() == input_ids[0].tolist(), "the output begins with the prompt")
    answer = output[0, input_ids.shape[1] :]
    _expect(0 < len(answer) <= 50, f"{len(answer)} new tokens")
    print(f"  你好 → {tokenizer.decode(answer, skip_special_tokens=True)!r}")


def verify_lora(options: VerifyOptions) -> None:
    """Milestone 7: a small adapter beside frozen weights changes nothing at first, learns, and can be merged."""
    import torch

    from minigpt.model.model_lora import apply_lora, lora_layers, merge_lora, unmerge_lora
    from minigpt.model.model_minigpt import MiniGPT, MiniGPTConfig
    from minigpt.model.peft_format import save_adapter

    torch.manual_seed(0)
    model = MiniGPT(MiniGPTConfig(hidden_size=256, num_hidden_layers=2))
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole = sum(p.numel() for p in model.parameters())
    ids_BT = torch.randint(0, 100, (4, 32))
    before = model(ids_BT).logits
    apply_lora(model, rank=8)
    trained = [p for p in model.parameters() if p.requires_grad]
    count = sum(p.numel() for p in trained)
    expected = sum(8 * (layer.in_features + layer.out_features) for layer in lora_layers(model).values())
    print(f"  {whole:,} parameters, {count:,} of the adapter are trained ({count / whole:.1%})")
    _expect(count == expected, "these are r · (inputs + outputs) of every linear layer but the output layer")
    _expect(torch.equal(model(ids_BT).logits, before), "a new adapter changes no bit of the logits: B is zero")
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(ids_BT, labels=ids_BT.roll(-1, 1)).loss_sum / ids_BT.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    _expect(losses[-1] < 0.8 * losses[0], f"the loss falls from {losses[0]:.2f} to {losses[-1]:.2f} in 20 steps")
    state = model.state_dict()
    _expect(all(torch.equal(state[n], tensor) for n, tensor in base.items()), "no bit of the model's weights has moved")
    adapted = model(ids_BT).logits
    difference = float((merge_lora(model)(ids_BT).logits - adapted).detach().abs().max())
    _expect(difference <= 1e-5, f"merged into the weights it says the same (to {difference:.0e})")
    unmerge_lora(model)
    _expect(all(torch.equal(state[n], tensor) for n, tensor in base.items()), "and unmerging restores every bit")
    with tempfile.TemporaryDirectory() as folder:
        size = (save_adapter(model, folder) / "adapter_model.safetensors").stat().st_size
    _expect(size < 5 * count, f"the adapter's file takes {size / 1e6:.2f} MB, the model's {4 * whole / 1e6:.1f} MB")


def verify_reasoning(options: VerifyOptions) -> None:
    """Milestone 8: the four tags weigh 10 in a batch built by hand, of the guide's dataset and of packed rows."""
    from data_prep.pack import PackOptions, pack
    from minigpt.dataset.lm_dataset import ReasonDataset
    from minigpt.dataset.shards import PackedDataset, collate
    from minigpt.trainer.train_reason import with_tag_weight

    tokenizer = _tokenizer()
    tags = tokenizer.convert_tokens_to_ids(["<think>", "</think>", "<answer>", "</answer>"])
    conversations = [
        [
            {"role": "user", "content": "What is 17 + 25? Use <think>."},  # a tag that a person spells is no tag
            {"role": "assistant", "content": "42", "reasoning_content": "7+5=12, carry 1. 1+2+1=4."},
        ],
        [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}],
    ]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "reason.jsonl")
        lines = [json.dumps({"messages": turns}, ensure_ascii=False) for turns in conversations]
        file.write_text("\n".join(lines), encoding="utf-8")
        batch = [ReasonDataset(file, tokenizer, max_length=64)[row] for row in range(2)]
        packed = Path(folder, "packed")
        pack(PackOptions(stage="reason", input=[file], output=packed, seq_len=64, workers=1, valid_fraction=0.0))
        rows = PackedDataset(packed)
        trained = collate([rows.row(row) for row in range(len(rows))])
        lighter = collate([with_tag_weight(rows, 3.0).row(row) for row in range(len(rows))])
    labels = [int(token) for _, y, _ in batch for token in y]
    weights = [float(weight) for _, _, mask in batch for weight in mask]
    weighed = [(token, weight) for token, weight in zip(labels, weights, strict=True) if weight]
    print("  " + " ".join(f"{tokenizer.decode(token)!r}:{weight:g}" for token, weight in weighed))
    tens = [token for token, weight in weighed if weight == 10]
    _expect(tens == tags, f"the weight is 10 at {tokenizer.decode(tens)}, once each and in this order")
    _expect(set(weights) == {0.0, 1.0, 10.0}, "everything else weighs 1 (the assistant) or 0 (the user, padding)")
    told = "<think>7+5=12, carry 1. 1+2+1=4.</think><answer>42</answer><|im_end|>你好！<|im_end|>"
    said = tokenizer.decode([token for token, _ in weighed])
    _expect(said == told, "exactly what the assistant says has a weight; the <think> that the user spells has none")
    total = sum(weights)
    _expect(total == len(weighed) + 4 * 9, f"the loss is divided by the sum of the weights, here {total:g}")
    at_tags = (trained["weights"] > 0) & (trained["labels"][..., None] == tags).any(-1)
    same = trained["weights"].sum() == total and set(trained["weights"][at_tags].tolist()) == {10.0}
    _expect(same and at_tags.sum() == 4, "the packed rows that `minigpt train reason` reads carry the same weights")
    _expect(set(lighter["weights"][at_tags].tolist()) == {3.0}, "--tag_weight 3 weighs the same rows anew")


def verify_ppo(options: VerifyOptions) -> None:
    """Milestone 9: the advantages are those of the paper, and four models on Ray teach a tiny one to think first."""
    import torch

    from minigpt.rl.algorithms import gae

    rewards, mask = torch.tensor([[0.0, 0.0, 1.0, 9.0]]), torch.tensor([[1, 1, 1, 0]])  # the last one is padding
    values = torch.tensor([[0.1, 0.4, 0.7, 9.0]])
    whole, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    one_step, _ = gae(rewards, values, mask, gamma=1.0, lam=0.0)
    print(
        f"  V = 0.1, 0.4, 0.7, then a reward of 1: advantages {_rounded(whole)} (λ = 1), {_rounded(one_step)} (λ = 0)"
    )
    expected = torch.tensor([[0.9, 0.6, 0.3, 0.0]])
    _expect(torch.allclose(whole, expected), "λ = 1: the advantage is the return minus the value")
    expected = torch.tensor([[0.3, 0.3, 0.3, 0.0]])
    _expect(torch.allclose(one_step, expected), "λ = 0: it is what one step adds, r + V' - V; padding has no say")
    _expect(torch.allclose(returns, torch.tensor([[1.0, 1.0, 1.0, 0.0]])), "the critic is to learn the return, 1")
    start = _rl_start(options.save_dir)
    run = _train_rl(
        "ppo",
        options.save_dir,
        *("--reward", "format", "--reward_model", str(start / "judge"), "--critic_learning_rate", "3e-3"),
        *("--update_epochs", "2", "--kl_coefficient", "0.05"),
    )
    records = _check_first_rl_step(run)
    names = ("value_loss", "kl_per_answer", "reward_model")
    _expect(
        all(name in records[0] for name in names), "a critic, a reference and a reward model stood beside the policy"
    )
    _check_rise(records, "reward_format", 0.3)
    _check_rise(records, "reward_model", 0.1)
    first, last = records[0]["value_loss"], sum(record["value_loss"] for record in records[-3:]) / 3
    _expect(last < 0.5 * first, f"the critic learns what to expect: its loss falls from {first:.2f} to {last:.2f}")


def verify_grpo(options: VerifyOptions) -> None:
    """Milestone 10: advantages within a group, and two models on Ray teach a tiny one to think before it answers."""
    import torch

    from minigpt.rl.algorithms import group_advantages

    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.1, 0.1, 0.1, 0.1])
    advantages = group_advantages(rewards, 4)
    print(f"  rewards of two groups of 4: {_rounded(rewards)}\n  advantages {_rounded(advantages)}")
    group = rewards[:4]
    _expect(
        torch.allclose(advantages[:4], (group - group.mean()) / group.std(), atol=1e-4),
        "A = (R - mean) / std of a group",
    )
    _expect(advantages[4:].tolist() == [0.0] * 4, "equal rewards teach nothing: exactly 0, no rounding errors")
    _rl_start(options.save_dir)
    run = _train_rl("grpo", options.save_dir, "--reward", "format", "accuracy", "--kl_coefficient", "0.04")
    records = _check_first_rl_step(run)
    _expect(records[0]["kl"] == 0, "policy and reference are the same model at first: the KL is exactly 0")
    _expect("value_loss" not in records[0], "there is no critic")
    _check_rise(records, "reward", 0.5)
    _check_rise(records, "reward_format", 0.5)
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    for when in ("before", "after"):
        shown = summary[when]["samples"][0]
        print(f"  {when} {summary['steps']} steps: {shown['prompt']} → {shown['answer']!r}")
    _expect(all("<think>" in s["answer"] for s in summary["after"]["samples"]), "the model has come to think first")


MILESTONES: dict[int, tuple[str, Callable[[VerifyOptions], None]]] = {
    1: ("tokenizer", verify_tokenizer),
    2: ("model architecture", verify_model),
    3: ("dataset pipeline", verify_datasets),
    4: ("pretraining loop", verify_pretrain),
    5: ("supervised fine-tuning", verify_sft),
    6: ("inference and chat", verify_chat),
    7: ("LoRA", verify_lora),
    8: ("reasoning", verify_reasoning),
    9: ("PPO", verify_ppo),
    10: ("GRPO", verify_grpo),
}


def _expect(good: bool, statement: str) -> None:
    if not good:
        raise UserError(f"the check fails, this is not so: {statement}")
    print(f"  ok: {statement}", flush=True)


def _tokenizer() -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(TOKENIZER))


def _train(module: str, run: Path) -> Path:
    """The guide's training command, seen by the user; returns the finished run."""
    arguments = ["--epochs", "1", "--batch_size", "2", "--save_dir", str(run)]
    print(f"  python trainer/{module}.py {' '.join(arguments)}", flush=True)
    if subprocess.run([sys.executable, "-m", f"minigpt.trainer.{module}", *arguments]).returncode:
        raise UserError(f"the training command failed; what it said stands above, {run} holds what it wrote")
    return run


def _check_losses(run: Path) -> list[float]:
    """The losses of a run's steps, after checking that they are numbers and fall."""
    losses: list[float] = [record["loss"] for record in read_metrics(run) if record.get("kind") == "train"]
    _expect(all(map(math.isfinite, losses)), f"the loss is a number at all {len(losses)} steps")
    part = max(1, len(losses) // 10)
    first, last = sum(losses[:part]) / part, sum(losses[-part:]) / part
    _expect(last < first, f"the loss falls: {first:.4f} over the first tenth, {last:.4f} over the last")
    return losses


def _model_of(run: Path) -> tuple[MiniGPT, Path]:
    """A model of a run's shape with random weights, and the file with its weights."""
    from minigpt.model.hf import config_from_hf
    from minigpt.model.model_minigpt import MiniGPT

    config_file = run / "hf" / "config.json"
    config: dict[str, Any] = json.loads(config_file.read_text(encoding="utf-8"))
    return MiniGPT(config_from_hf(config, config_file)), next(run.glob("full_sft_*.pth"))


def _rounded(values: Any) -> list[float]:
    return [round(value, 2) for value in values.flatten().tolist()]


def _rl_start(folder: Path) -> Path:
    """What milestones 9 and 10 begin with, made in a few seconds: `folder`/rl_start, a tiny model that thinks before
    half of its answers; in it `judge`, a reward model that prefers those answers, and `prompts.jsonl`."""
    import torch

    from minigpt.dataset.chat import ChatEncoder
    from minigpt.model.model_critic import RewardModel
    from minigpt.model.model_minigpt import MiniGPT, MiniGPTConfig
    from minigpt.trainer.train_reward import bradley_terry_loss
    from minigpt.trainer.weights import write_language_model

    start = folder / "rl_start"
    if (start / "hf").exists() and (start / "judge").exists():
        return start
    start.mkdir(parents=True, exist_ok=True)
    encoder = ChatEncoder(TOKENIZER)
    sums = [(a, b) for a in range(1, 6) for b in range(1, 6)]
    questions = [{"role": "user", "content": f"{a} + {b} = ?"} for a, b in sums]
    plain = [{"role": "assistant", "content": str(a + b)} for a, b in sums]
    thought = [{**answer, "reasoning_content": f"{a} and {b}."} for answer, (a, b) in zip(plain, sums, strict=True)]
    records = [
        {"messages": [question], "answer": answer["content"], "verifier": "math", "meta": {}}
        for question, answer in zip(questions, plain, strict=True)
    ]
    lines = [json.dumps(record) for record in records]
    (start / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    chats = [[q, a] for answers in (thought, plain) for q, a in zip(questions, answers, strict=True)]
    encoded = [encoder.encode(chat) for chat in chats]
    longest = max(len(ids) for ids, _ in encoded)
    x_BT, labels_BT = torch.zeros(len(chats), longest).long(), torch.full((len(chats), longest), -100)
    for row, (ids, codes) in enumerate(encoded):
        x_BT[row, : len(ids)] = torch.tensor(ids)
        learnt = torch.tensor([i if code else -100 for i, code in zip(ids, codes, strict=True)])
        labels_BT[row, : len(ids) - 1] = learnt[1:]
    print("  making a tiny model that thinks before half of its answers, and a reward model that likes it", flush=True)
    torch.manual_seed(0)
    model = MiniGPT(MiniGPTConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4))
    _fit(model, 200, lambda: model(x_BT, labels=labels_BT).loss_sum / (labels_BT >= 0).sum())
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    write_language_model(
        start, model, weights, name="sft", tokenizer_folder=TOKENIZER, stop_token="<|im_end|>", dtype="fp32"
    )
    judge = RewardModel.from_decoder(model)
    last = torch.tensor([row * longest + len(ids) - 2 for row, (ids, _) in enumerate(encoded)])  # at <|im_end|>

    def preference() -> Any:
        rewards = judge(x_BT, last_tokens=last)
        return bradley_terry_loss(rewards[: len(sums)] - rewards[len(sums) :]).mean()

    _fit(judge, 20, preference)
    judge.save_pretrained(start / "judge", tokenizer_folder=TOKENIZER)
    return start


def _fit(model: Any, steps: int, loss: Callable[[], Any]) -> None:
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def _train_rl(stage: str, folder: Path, *arguments: str) -> Path:
    """A short run of PPO or GRPO on the tiny model, seen by the user; returns the finished run."""
    run, start = folder / f"out_{stage}_test", folder / "rl_start"
    shared = ["--data", start / "prompts.jsonl", "--eval_data", start / "prompts.jsonl", "--init", start]
    shared += ["--save_dir", run, "--max_steps", "16", "--prompts_per_step", "8", "--samples_per_prompt", "8"]
    shared += ["--max_new_tokens", "24", "--learning_rate", "5e-4", "--dtype", "fp32", "--compile", "false"]
    command = [f"minigpt.trainer.train_{stage}", *map(str, shared), *arguments]
    print(f"  python -m {' '.join(command)}", flush=True)
    if subprocess.run([sys.executable, "-m", *command]).returncode:
        raise UserError(f"the training command failed; what it said stands above, {run} holds what it wrote")
    return run


def _check_first_rl_step(run: Path) -> list[dict[str, Any]]:
    """The records of a run's steps, after checking what must be true before the first update."""
    records = [record for record in read_metrics(run) if record.get("kind") == "train"]
    first = records[0]
    _expect(
        first["sampler_gap_max"] < 1e-4,
        "what was sampled has the same log-probability for the sampler as for the policy "
        f"(to {first['sampler_gap_max']:.0e}): the right tokens are learned",
    )
    _expect(first["version_lag"] == 0, "the answers are by the weights that learn from them")
    return records


def _check_rise(records: list[dict[str, Any]], name: str, least: float) -> None:
    first, last = records[0][name], sum(record[name] for record in records[-3:]) / 3
    _expect(last >= first + least, f"{name} rises: {first:.2f} at first, {last:.2f} at the end")
