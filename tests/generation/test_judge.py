"""Rewards and values behind a prompt that is read once, against the whole texts through the model."""

import random

import pytest
import torch

from minigpt.generation import judge
from minigpt.generation.judge import Judge
from minigpt.model.model_critic import RewardModel, ValueModel


def answers_of(lengths) -> list[list[int]]:
    generator = random.Random(2)
    return [[generator.randrange(97) for _ in range(n)] for n in lengths]


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("tokens", [4096, 30], ids=["one pass", "several passes"])
def test_rewards_and_values_equal_the_whole_texts_through_the_model(make_model, monkeypatch, qk_norm, tokens):
    monkeypatch.setattr(judge, "MAX_TOKENS", tokens)
    trunk = make_model(qk_norm=qk_norm)
    prompt, answers = answers_of([50])[0], answers_of([1, 20, 9, 33, 2])
    reward, critic = RewardModel.from_decoder(trunk), ValueModel.from_decoder(trunk)
    expected = reward.rewards([prompt + answer for answer in answers])
    assert expected.std() > 0.01, "the case is too easy: all rewards are alike"
    assert (Judge(reward).rewards(prompt, answers) - expected).abs().max() <= 1e-5
    values = Judge(critic).values(prompt, answers)
    for answer, found in zip(answers, values, strict=True):
        with torch.no_grad():
            whole = critic(torch.tensor([prompt + answer]))[0, len(prompt) - 1 :]
        assert found.shape == whole.shape
        assert (found - whole).abs().max() <= 1e-5


def test_no_answers_have_no_rewards_and_no_values(make_model):
    trunk = make_model()
    rewards = Judge(RewardModel.from_decoder(trunk)).rewards([1, 2], [])
    assert (rewards.shape, rewards.dtype) == ((0,), torch.float32)
    assert Judge(ValueModel.from_decoder(trunk)).values([1, 2], []) == []


def test_the_prompt_is_read_once(make_model):
    scorer = Judge(RewardModel.from_decoder(make_model()))
    sizes, hidden = [], scorer.decoder.hidden
    scorer.decoder.hidden = lambda ids, *rest: (sizes.append(len(ids)), hidden(ids, *rest))[1]
    scorer.rewards(answers_of([50])[0], answers_of([5, 7, 9]))
    assert sizes == [50, 21]


def test_new_weights_count_after_refresh(make_model):
    model = RewardModel.from_decoder(make_model())
    scorer, prompt, answers = Judge(model), answers_of([6])[0], answers_of([5, 7])
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.mul_(1.1)
    scorer.refresh()
    expected = model.rewards([prompt + answer for answer in answers])
    assert (scorer.rewards(prompt, answers) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("prompt", "answer", "message"), [([], [1], "empty"), ([1], [], "empty"), ([1] * 399, [1, 2], "context of 400")]
)
def test_texts_that_cannot_be_judged_are_refused(make_model, prompt, answer, message):
    with pytest.raises(ValueError, match=message):
        Judge(ValueModel.from_decoder(make_model())).values(prompt, [[1], answer])
