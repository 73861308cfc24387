"""DPO, IPO and the reward model: closed forms, the loop, what is learnt from a known rule, the reference's file."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from small_run import SMALL, assert_same_weights, metrics, weights

from data_prep.pack import PackOptions, pack
from minigpt.dataset.preference import pair_window
from minigpt.dataset.shards import PackedDataset
from minigpt.model.model_critic import RewardModel
from minigpt.model.model_minigpt import MiniGPT, MiniGPTConfig
from minigpt.trainer.loop import to_tensors
from minigpt.trainer.train_dpo import DirectPreference, DPOOptions, answer_sums, preference_loss
from minigpt.trainer.train_reward import REWARD, bradley_terry_loss

LN2 = math.log(2)
WORDS = [f"{a}{b}" for a in "bdfgklmnprst" for b in "aeiou"]
SHAPE = MiniGPTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


# ------------------------------------------------------------------------------------------------------- closed forms


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def numbers(seed: int = 0):
    """Log-probabilities of both answers under policy and reference, and lengths, float64 [7, 2]."""
    rng = np.random.default_rng(seed)
    policy, reference = (torch.from_numpy(-30 * rng.random((7, 2))) for _ in range(2))
    lengths = torch.from_numpy(rng.integers(1, 40, (7, 2))).double()
    return policy.requires_grad_(), reference, lengths


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.4])
def test_dpo_is_equation_7_and_its_gradient_the_one_below_it(beta, epsilon):
    """Rafailov et al.: −β σ(r̂_rejected − r̂_chosen) [∇ ln π(chosen) − ∇ ln π(rejected)]; cDPO mixes both ways round."""
    policy, reference, lengths = numbers()
    losses = preference_loss(policy, reference, lengths, beta=beta, label_smoothing=epsilon)
    (gradient,) = torch.autograd.grad(losses.sum(), policy)
    for p, r, loss, g in zip(policy.tolist(), reference.tolist(), losses.tolist(), gradient.tolist(), strict=True):
        chosen, rejected = beta * (p[0] - r[0]), beta * (p[1] - r[1])
        expected = -(1 - epsilon) * math.log(sigmoid(chosen - rejected)) - epsilon * math.log(
            sigmoid(rejected - chosen)
        )
        assert loss == pytest.approx(expected, rel=1e-12)
        slope = -beta * ((1 - epsilon) * sigmoid(rejected - chosen) - epsilon * sigmoid(chosen - rejected))
        assert g == pytest.approx([slope, -slope], rel=1e-9)


@pytest.mark.parametrize("beta", [0.05, 0.5])
def test_ipo_draws_the_difference_of_mean_log_ratios_to_its_target(beta):
    """Azar et al., eq. 17, with means per token as TRL has it since its authors asked for them."""
    policy, reference, lengths = numbers(1)
    losses = preference_loss(policy, reference, lengths, loss_type="ipo", beta=beta)
    (gradient,) = torch.autograd.grad(losses.sum(), policy)
    rows = zip(policy.tolist(), reference.tolist(), lengths.tolist(), losses.tolist(), gradient.tolist(), strict=True)
    for p, r, n, loss, g in rows:
        h = (p[0] - r[0]) / n[0] - (p[1] - r[1]) / n[1]
        assert loss == pytest.approx((h - 1 / (2 * beta)) ** 2, rel=1e-12)
        slope = 2 * (h - 1 / (2 * beta))
        assert g == pytest.approx([slope / n[0], -slope / n[1]], rel=1e-9)


def test_the_sft_term_is_the_mean_loss_of_the_chosen_answer():
    policy, reference, lengths = numbers(2)
    plain = preference_loss(policy, reference, lengths)
    both = preference_loss(policy, reference, lengths, sft_weight=0.3)
    assert torch.allclose(both - plain, -0.3 * policy[:, 0] / lengths[:, 0], rtol=1e-12)


@pytest.mark.parametrize("loss_type", ["dpo", "ipo"])
def test_gradients_are_finite_differences(loss_type):
    policy, reference, lengths = numbers(3)

    def summed(p):
        return preference_loss(p, reference, lengths, loss_type=loss_type, sft_weight=0.1).sum()

    assert torch.autograd.gradcheck(summed, policy, eps=1e-5, atol=1e-7)


def test_a_pair_that_the_policy_judges_as_the_reference_costs_ln_2_and_extremes_stay_finite():
    reference = torch.tensor([[-3.0, -500.0]], dtype=torch.float64)
    assert preference_loss(reference, reference, torch.ones(1, 2)).item() == pytest.approx(LN2, rel=1e-15)
    far = preference_loss(reference + torch.tensor([[-1e5, 1e5]]), reference, torch.ones(1, 2))
    assert far.item() == pytest.approx(2e4)


@pytest.mark.parametrize("margin", [-800.0, -2.0, 0.0, 3.0, 800.0])
def test_bradley_terry(margin):
    m = torch.tensor(margin, dtype=torch.float64, requires_grad=True)
    loss = bradley_terry_loss(m)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-margin)) if margin > -700 else -margin, rel=1e-12)
    loss.backward()
    assert m.grad.item() == pytest.approx(-1 / (1 + math.exp(margin)) if margin < 700 else 0.0, rel=1e-9)


# -------------------------------------------------------------------------------------------- a data set with a rule


def pair(rng: np.random.Generator) -> dict:
    """The better answer is the polite one: it begins with `please`; everything else is chance."""
    words = [" ".join(rng.choice(WORDS, rng.integers(2, 9))) for _ in range(3)]
    return {"prompt": words[0], "chosen": f"please {words[1]}", "rejected": f"now {words[2]}"}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """300 pairs, about 75 of them held out, packed in rows of 64 tokens."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    source = folder / "pairs.jsonl"
    source.write_text("".join(json.dumps(pair(rng)) + "\n" for _ in range(300)), encoding="utf-8")
    pack(
        PackOptions(stage="preference", input=[source], output=folder / "p", seq_len=64, workers=1, valid_fraction=0.25)
    )
    return folder / "p"


@pytest.fixture(scope="module")
def base(tmp_path_factory, pairs) -> Path:
    """A model with random weights as if it were fine-tuned."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base") / "hf"
    MiniGPT(SHAPE).save_pretrained(folder, tokenizer_folder=pairs)
    return folder


# ------------------------------------------------------------------------------- what does not decide loss and gradient


def whole_batch(data: PackedDataset, indices: np.ndarray, rows: int, dtype=torch.float64):
    """The tensors of the given pairs in passes of `rows` rows."""
    for batch in pair_window(data, indices, rows=rows, slots=len(indices)):
        batch.pop("pair_indices")
        tensors = to_tensors(batch, torch.device("cpu"))
        yield {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}


def dpo_stage(**options) -> DirectPreference:
    return DirectPreference(DPOOptions(**options))


def log_prob_of(model: MiniGPT, prompt: np.ndarray, answer: np.ndarray, codes: np.ndarray) -> torch.Tensor:
    """Of the weighted tokens of one answer alone, from all logits."""
    ids = torch.tensor(np.concatenate([prompt, answer]).astype(np.int64))
    log_probs = model(ids[None, :-1]).logits[0].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    return log_probs[len(prompt) - 1 :][torch.tensor(codes > 0)].sum()


def one_by_one(data: PackedDataset, indices: np.ndarray, model: MiniGPT, reference: MiniGPT) -> torch.Tensor:
    """Σ DPO loss of the pairs, each answer in a forward pass of its own, straight from the definition."""
    total = torch.zeros((), dtype=torch.float64)
    for index in indices:
        row = data.row(int(index))
        ratio = []
        for ids, codes in ((row.chosen_ids, row.chosen_weight), (row.rejected_ids, row.rejected_weight)):
            with torch.no_grad():
                before = log_prob_of(reference, row.prompt_ids, ids, codes)
            ratio.append(log_prob_of(model, row.prompt_ids, ids, codes) - before)
        total = total - torch.nn.functional.logsigmoid(0.1 * (ratio[0] - ratio[1]))
    return total


@pytest.mark.parametrize("rows", [2, 24])
def test_packing_changes_neither_the_loss_of_dpo_nor_its_gradient(pairs, rows):
    data, indices = PackedDataset(pairs), np.arange(6)
    torch.manual_seed(0)
    model, reference = MiniGPT(SHAPE).double(), MiniGPT(SHAPE).double()
    expected = one_by_one(data, indices, model, reference)
    expected_gradients = torch.autograd.grad(expected, list(model.parameters()))
    stage, total, gradients = dpo_stage(), 0.0, [torch.zeros_like(p) for p in model.parameters()]
    for batch in whole_batch(data, indices, rows):
        with torch.no_grad():
            before = stage.loss(reference, **batch)
        loss, _ = stage.loss(model, **batch, reference_log_probs=before)
        total += loss.item()
        for gradient, part in zip(gradients, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            gradient += part
    assert total == pytest.approx(expected.item(), rel=1e-12)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        assert ((found - wanted).norm() / wanted.norm()).item() <= 1e-10


@pytest.mark.parametrize("rows", [2, 24])
def test_packing_changes_neither_the_loss_of_the_reward_model_nor_its_gradient(pairs, rows):
    data, indices = PackedDataset(pairs), np.arange(9)
    torch.manual_seed(0)
    model = RewardModel(SHAPE).double()
    expected = torch.zeros((), dtype=torch.float64)
    for index in indices:
        row = data.row(int(index))
        reward = [
            model(torch.tensor([[*row.prompt_ids.tolist(), *ids[: np.flatnonzero(codes)[-1] + 1].tolist()]]))[0]
            for ids, codes in ((row.chosen_ids, row.chosen_weight), (row.rejected_ids, row.rejected_weight))
        ]
        expected = expected + torch.log1p(torch.exp(reward[1] - reward[0]))
    expected_gradients = torch.autograd.grad(expected, list(model.parameters()))
    total, gradients = 0.0, [torch.zeros_like(p) for p in model.parameters()]
    for batch in whole_batch(data, indices, rows):
        loss, sums = REWARD.loss(model, **batch)
        assert sums.shape == (4,)
        total += loss.item()
        for gradient, part in zip(gradients, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            gradient += part
    assert total == pytest.approx(expected.item(), rel=1e-12)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        assert ((found - wanted).norm() / wanted.norm()).item() <= 1e-10


def test_an_answers_sum_does_not_depend_on_where_its_tokens_stand():
    """A thousand float32 values in two orders: equal to the last bit that float32 shows."""
    values = -5 * torch.rand(4, 500, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(0, 7, (4, 500), generator=torch.Generator().manual_seed(1))
    mixed = torch.randperm(2000, generator=torch.Generator().manual_seed(2))
    found = answer_sums(values.flatten()[mixed], ids.flatten()[mixed], 3)
    assert torch.equal(found.float(), answer_sums(values, ids, 3).float())
    assert found[1, 1].item() == pytest.approx(values.double()[ids == 3].sum().item(), rel=1e-14)


# ------------------------------------------------------------------------------------------------------------ training


@pytest.fixture
def train_pairs(minigpt, pairs, base):
    """A successful run of a preference stage from `base`; returns what it said."""

    def run(stage: str, folder: Path, *options: object, init: Path = base) -> str:
        ended = minigpt(
            *("train", stage, *SMALL, "--data", pairs, "--init", init, "--save_dir", folder),
            *("--batch_size", 16, *options),
        )
        assert ended.status == 0, ended.err
        return ended.out

    return run


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("adapter", [(), ("--lora_rank", 4)], ids=["all weights", "adapter"])
def test_the_first_loss_is_ln_2(train_pairs, tmp_path, dtype, adapter):
    train_pairs("dpo", tmp_path, "--max_steps", 1, "--dtype", dtype, *adapter)
    (first, *_) = metrics(tmp_path)
    assert first["loss"] == pytest.approx(LN2, abs=1e-6 if dtype == "fp32" else 2e-2)
    assert abs(first["margin"]) <= (1e-5 if dtype == "fp32" else 5e-2)


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("dpo", ("--learning_rate", 1e-3)),
        ("dpo", ("--learning_rate", 3e-3, "--lora_rank", 8)),
        ("dpo", ("--learning_rate", 1e-3, "--loss_type", "ipo")),
        ("reward", ("--learning_rate", 3e-3)),
    ],
    ids=["dpo", "dpo with an adapter", "ipo", "reward"],
)
def test_a_known_rule_is_learnt_on_pairs_that_were_never_seen(train_pairs, tmp_path, stage, options):
    """Held-out accuracy is above one half by its 95 % interval; before training it is not."""
    train_pairs(stage, tmp_path, "--max_steps", 24, *options)
    (valid,) = [record for record in metrics(tmp_path) if record["kind"] == "valid"]
    assert valid["valid_pairs"] > 50
    assert valid["valid_accuracy_low"] > 0.5
    assert valid["valid_accuracy_low"] < valid["valid_accuracy"] <= valid["valid_accuracy_high"]
    assert valid["valid_margin"] > 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["valid_accuracy"] == valid["valid_accuracy"]


def test_a_reward_run_leaves_a_model_that_judges_as_its_validation_did(train_pairs, tmp_path, pairs, base):
    train_pairs("reward", tmp_path, "--max_steps", 8, "--learning_rate", 3e-3)
    model = RewardModel.from_pretrained(tmp_path)
    (path,) = tmp_path.glob("*.pth")
    assert path.name == "reward_32.pth"
    assert all(torch.equal(w, weights(tmp_path)[name]) for name, w in model.state_dict().items())
    held_out = PackedDataset(pairs, "valid")
    right = 0
    for i in range(len(held_out)):
        row = held_out.row(i)
        ids = [[*row.prompt_ids.tolist(), *a.tolist()[:-1]] for a in (row.chosen_ids, row.rejected_ids)]
        chosen, rejected = model.rewards(ids).tolist()
        right += chosen > rejected
    assert right / len(held_out) == pytest.approx(json.loads((tmp_path / "summary.json").read_text())["valid_accuracy"])
    from transformers import AutoModelForSequenceClassification

    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        theirs = stock(torch.tensor([ids[0]])).logits[0, 0].item()
    assert theirs == pytest.approx(model.rewards([ids[0]]).item(), abs=1e-5)
    assert not torch.equal(weights(tmp_path)["model.norm.weight"], MiniGPT.from_pretrained(base).model.norm.weight)


def test_a_run_goes_on_with_its_stored_reference_to_the_same_bits(train_pairs, tmp_path, minigpt, pairs, base):
    options = ("--learning_rate", 1e-3, "--save_interval", 2, "--keep_checkpoints", 9)
    said = train_pairs("dpo", tmp_path / "whole", "--max_steps", 4, *options)
    assert "log-probabilities of 300 pairs" in said
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "whole", again)
    shutil.rmtree(again / "checkpoints" / "step_00000004")
    (again / "summary.json").unlink()
    said = train_pairs("dpo", again, "--max_steps", 4, *options)
    assert "at step 2 of 4" in said
    assert "log-probabilities" not in said, "they were stored"
    assert_same_weights(again, tmp_path / "whole")


def test_a_run_does_not_go_on_against_another_reference(train_pairs, tmp_path, minigpt, pairs, base):
    run, other = tmp_path / "run", tmp_path / "other"
    model = MiniGPT.from_pretrained(base)
    model.model.norm.weight.data[3] += 0.5
    model.save_pretrained(other, tokenizer_folder=base)
    train_pairs("dpo", run, "--max_steps", 2)
    (run / "summary.json").unlink()
    options = ("--data", pairs, "--init", other, "--save_dir", run, "--max_steps", 4, *SMALL)
    found = minigpt("train", "dpo", *options).sentence()
    assert "was trained against other weights than those that --init gives now" in found


def test_a_reference_that_is_damaged_or_belongs_elsewhere_is_said_and_computed_anew(train_pairs, tmp_path, base):
    run, other = tmp_path / "run", tmp_path / "other"
    file = run / "reference_log_probs.safetensors"
    model = MiniGPT.from_pretrained(base)
    model.model.norm.weight.data[3] += 0.5
    model.save_pretrained(other, tokenizer_folder=base)
    train_pairs("dpo", run, "--max_steps", 1)
    good = file.read_bytes()
    for damaged, options, init, sentence in (
        (good[:-9] + bytes([good[-9] ^ 1]) + good[-8:], (), base, "is damaged"),
        (good[: len(good) // 2], (), base, "cannot be read"),
        (good, (), other, "was made with other weights"),
        (good, ("--dtype", "bf16"), base, "was made with other precision"),
    ):
        file.write_bytes(damaged)
        shutil.rmtree(run / "checkpoints")
        (run / "summary.json").unlink()
        said = train_pairs("dpo", run, "--max_steps", 1, *options, init=init)
        assert f"{file} {sentence}" in said
        assert "computing the reference's log-probabilities" in said
        assert (file.read_bytes() == good) == (damaged != good)
        assert metrics(run)[0]["loss"] == pytest.approx(LN2, abs=2e-2)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--beta", 0), "--beta is 0.0, it must be a number above 0"),
        (("--label_smoothing", 0.5), "--label_smoothing is 0.5"),
        (("--loss_type", "ipo", "--label_smoothing", 0.1), "belongs to --loss_type dpo"),
        (("--sft_weight", -1), "--sft_weight is -1.0"),
        (("--micro_batch_size", 1), "--micro_batch_size 2"),
    ],
)
def test_options_that_mean_nothing_are_refused(minigpt, pairs, base, tmp_path, options, sentence):
    arguments = ("--data", pairs, "--init", base, "--save_dir", tmp_path / "run", *options)
    assert sentence in minigpt("train", "dpo", *SMALL, *arguments).sentence()


def test_data_of_another_stage_is_refused(minigpt, packed, base, tmp_path):
    for stage in ("dpo", "reward"):
        ended = minigpt("train", stage, *SMALL, "--data", packed, "--init", base, "--save_dir", tmp_path / stage)
        assert f"{stage} needs --stage preference" in ended.sentence()
