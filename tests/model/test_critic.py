"""Reward model and critic: stock folders both ways, rewards that do not depend on how answers are batched."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minigpt.errors import UserError
from minigpt.model import hf
from minigpt.model.attention import BACKENDS
from minigpt.model.model_critic import RewardModel, ValueModel
from minigpt.model.model_minigpt import MiniGPT, MiniGPTConfig

TOLERANCE = 1e-5
TOKENIZER = Path(hf.__file__).parent
SHAPE = {"vocab_size": 131, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
LAYOUTS = {
    "Qwen3ForCausalLM": {"qk_norm": True},
    "LlamaForCausalLM": {"qk_norm": False},
    "Qwen2ForCausalLM": {"qk_norm": False, "attention_bias": True},
}
LENGTHS = (9, 1, 40, 17, 40)
PAD = 3


def random_model(**options) -> MiniGPT:
    """A model whose norms and biases are not at their trivial start values, and whose attention is not uniform."""
    model = MiniGPT(MiniGPTConfig(**{**SHAPE, "max_position_embeddings": 256, **options})).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.08 + (1.0 if parameter.dim() == 1 else 0.0)
    return model


def reward_model(**options) -> RewardModel:
    torch.manual_seed(5)
    model = RewardModel.from_decoder(random_model(**options))
    model.score.weight.data.normal_()
    return model.eval()


def sequences() -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(4, 131, (n,), generator=generator).tolist() for n in LENGTHS]


def load_stock(folder):
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()


def stock_scores(stock, padded: bool) -> torch.Tensor:
    """By transformers' class: one at a time, or right-padded in one batch."""
    with torch.no_grad():
        if not padded:
            return torch.cat([stock(torch.tensor([ids])).logits[:, 0] for ids in sequences()])
        longest = max(LENGTHS)
        ids = torch.tensor([s + [PAD] * (longest - len(s)) for s in sequences()])
        return stock(ids, attention_mask=(ids != PAD).long()).logits[:, 0]


@pytest.mark.parametrize("architecture", LAYOUTS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_reward_model_scores_the_same_in_transformers(tmp_path, architecture, tied):
    model = reward_model(tie_word_embeddings=tied, num_key_value_heads=2, **LAYOUTS[architecture])
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token_id": PAD}))
    stock = load_stock(tmp_path)
    assert type(stock).__name__ == architecture.replace("ForCausalLM", "ForSequenceClassification")
    assert stock.config.num_labels == 1
    assert set(load_file(tmp_path / "model.safetensors")) >= {"score.weight", "model.norm.weight"}
    for padded in (False, True):
        assert (model.rewards(sequences()) - stock_scores(stock, padded)).abs().max() <= TOLERANCE
    again = RewardModel.from_pretrained(tmp_path)
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))


@pytest.mark.parametrize("architecture", LAYOUTS)
def test_a_stock_sequence_classifier_scores_the_same_here(tmp_path, architecture):
    import transformers

    torch.manual_seed(1)
    kind = architecture.replace("ForCausalLM", "")
    config = getattr(transformers, f"{kind}Config")(
        **SHAPE, intermediate_size=160, num_key_value_heads=2, num_labels=1, pad_token_id=PAD, head_dim=16
    )
    stock = getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()
    for parameter in stock.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    stock.save_pretrained(tmp_path)
    found = RewardModel.from_pretrained(tmp_path).eval().rewards(sequences())
    assert (found - stock_scores(stock, padded=True)).abs().max() <= TOLERANCE
    assert found.std() > 0.1


def test_the_tokenizer_gives_the_folder_its_padding_id(tmp_path):
    model = RewardModel(MiniGPTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    model.save_pretrained(tmp_path, tokenizer_folder=TOKENIZER)
    assert isinstance(load_stock(tmp_path).config.pad_token_id, int)


@pytest.mark.parametrize("max_tokens", [1, 45, 10**6])
def test_rewards_do_not_depend_on_batch_mates_or_padding(max_tokens):
    model = reward_model()
    alone = torch.cat([model(torch.tensor([ids])) for ids in sequences()]).detach()
    torch.testing.assert_close(model.rewards(sequences(), max_tokens).detach(), alone, rtol=1e-5, atol=1e-4)
    assert alone.std() > 0.1


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_rows_give_the_rewards_of_single_answers(backend):
    """Two rows with all answers; an empty slot has reward 0 and touches no gradient, though NaN may lie there."""
    model = reward_model().double()
    model.attention_backend = backend
    ids = torch.full((2, 60), 7)
    documents, positions = torch.full((2, 60), -1), torch.zeros(2, 60, dtype=torch.int64)
    ends, places = [], [(0, 0), (0, 9), (0, 10), (1, 0), (1, 17)]
    for number, ((row, start), tokens) in enumerate(zip(places, sequences(), strict=True)):
        where = (row, slice(start, start + len(tokens)))
        ids[where], documents[where] = torch.tensor(tokens), number
        positions[where] = torch.arange(len(tokens))
        ends.append(row * 60 + start + len(tokens) - 1)
    packed = model(ids, positions, documents, torch.tensor([[*ends, -1]]))
    single = torch.cat([model(torch.tensor([tokens])) for tokens in sequences()])
    assert packed.shape == (1, 6)
    assert packed.dtype == torch.float64
    assert (packed[0, :5] - single).abs().max() <= 1e-12
    assert packed[0, 5] == 0
    hidden = torch.full((1, 4, 64), float("nan"), dtype=torch.float64)
    model.hidden_states = lambda *_, **__: hidden
    model(ids, last_tokens=torch.tensor([-1, -1])).sum().backward()
    assert not model.score.weight.grad.any()


def test_a_reward_in_bf16_is_not_rounded_to_steps():
    model = reward_model().bfloat16()
    found = model.rewards(sequences())
    assert found.dtype == torch.float32
    assert not torch.equal(found, found.bfloat16().float())


def test_the_head_starts_small_at_any_width():
    for width in (64, 256):
        torch.manual_seed(0)
        config = MiniGPTConfig(hidden_size=width, num_hidden_layers=2, num_attention_heads=4)
        model = RewardModel.from_decoder(MiniGPT(config))
        spread = model.rewards([torch.randint(0, 6400, (20,)).tolist() for _ in range(64)]).std().item()
        assert 0.02 < spread < 0.2, width


def test_the_critic_values_every_token_and_starts_from_the_reward_model():
    reward = reward_model()
    critic = ValueModel.from_decoder(reward)
    ids = torch.tensor([sequences()[2]])
    values = critic(ids)
    assert values.shape == (1, 40)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values[:, -1], reward(ids), rtol=1e-5, atol=1e-4)
    before = critic(ids[:, :20])
    # a value knows nothing of what comes after
    torch.testing.assert_close(values[:, :20], before, rtol=1e-5, atol=1e-4)
    reward.score.weight.data.zero_()
    torch.testing.assert_close(critic(ids), values, rtol=1e-5, atol=1e-4, msg="the head is a copy")
    fresh = ValueModel.from_decoder(random_model())
    assert fresh(ids).abs().max() < 5


def damaged(folder, **changes):
    """The saved model with other entries in config.json."""
    reward_model().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"architectures": ["Qwen3ForCausalLM"]}, "Qwen3ForCausalLM is no reward model"),
        ({"architectures": ["BertForSequenceClassification"]}, "BertForCausalLM is not supported"),
        ({"auto_map": {"AutoModel": "x.py"}}, "auto_map"),
    ],
)
def test_what_is_no_reward_model_is_refused(tmp_path, changes, sentence):
    damaged(tmp_path, **changes)
    with pytest.raises(ValueError, match=sentence):
        RewardModel.from_pretrained(tmp_path)


def test_a_classifier_of_several_labels_is_refused(tmp_path):
    damaged(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "score.weight": torch.zeros(3, 64)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"score.weight is of shape \(3, 64\)"):
        RewardModel.from_pretrained(tmp_path)


def test_an_empty_sequence_is_refused():
    with pytest.raises(ValueError, match="empty sequence"):
        reward_model().rewards([[1], []])
