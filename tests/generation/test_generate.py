"""The KV cache, ragged batches and stopping, against the model without a cache and against transformers."""

import copy
import math
import random

import pytest
import torch
from test_sampling import exact_distribution

from minigpt.generation.decoder import Decoder
from minigpt.generation.generate import generate, generate_ids, stream
from minigpt.generation.native import NativeDecoder
from minigpt.generation.request import Completion
from minigpt.generation.sampling import SamplingParams

NEAR_TIE = 1e-5  # two candidates closer than this may change places between a batch of one and a batch of many


def prompts_of(lengths, vocab_size=97, seed=0) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randrange(vocab_size) for _ in range(n)] for n in lengths]


def greedy_without_cache(model, prompt: list[int], max_new_tokens: int, stop: set[int]) -> list[int]:
    """The definition: the whole text through the model for every token."""
    ids = list(prompt)
    for _ in range(max_new_tokens):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in stop:
            break
    return ids[len(prompt) :]


def gap_at(model, ids: list[int]) -> float:
    """The difference of the two greatest logits behind `ids`."""
    with torch.no_grad():
        first, second = model(torch.tensor([ids])).logits[0, -1].topk(2).values.tolist()
    return first - second


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("batch_size", [64, 3])
def test_ragged_batch_with_cache_equals_each_prompt_without_cache(make_model, qk_norm, batch_size):
    """Crosses the first cache bucket (128), and rows end at different steps, so the batch shrinks."""
    model = make_model(qk_norm=qk_norm)
    prompts = prompts_of([3, 40, 1, 17, 9, 120, 2])
    params = SamplingParams(max_new_tokens=150, temperature=0, stop_token_ids=(5, 6, 7))
    completions = generate(model, prompts, params, batch_size=batch_size)
    for prompt, completion in zip(prompts, completions, strict=True):
        expected = greedy_without_cache(model, prompt, 150, {5, 6, 7})
        assert completion.ids == expected
        assert completion.finish_reason == ("stop" if expected[-1] in (5, 6, 7) else "length")
    lengths = {len(completion.ids) for completion in completions}
    assert len(lengths) > 2, "the case is too easy: rows must end at different steps"
    assert 150 in lengths, "the case is too easy: one row must cross the cache bucket"


def test_greedy_equals_transformers_generate_on_the_exported_model(tmp_path, model):
    from transformers import AutoModelForCausalLM

    model.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    prompts = torch.tensor(prompts_of([12, 12, 12]))
    theirs = stock.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=60,
        do_sample=False,
        eos_token_id=5,
        pad_token_id=5,
    )
    ours = model.generate(prompts, max_new_tokens=60, eos_token_id=5)
    assert ours.tolist() == theirs.tolist()


def test_repetition_penalty_equals_transformers(tmp_path, model):
    from transformers import AutoModelForCausalLM

    model.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    prompts = torch.tensor(prompts_of([12, 12]))
    theirs = stock.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=40,
        do_sample=False,
        repetition_penalty=1.5,
        eos_token_id=None,
        pad_token_id=0,
    )
    ours = model.generate(prompts, max_new_tokens=40, repetition_penalty=1.5, eos_token_id=())
    assert ours.tolist() == theirs.tolist()
    assert ours.tolist() != model.generate(prompts, max_new_tokens=40, eos_token_id=()).tolist()


def test_a_sequence_samples_the_same_tokens_alone_in_any_batch_and_in_a_stream(model):
    """Its random numbers are its own. Arithmetic differs in the last bits, so a first difference is allowed only where
    the number drawn lies within 1e-5 of the border between two tokens; with this seed there is none at all."""
    prompts = prompts_of([3, 40, 1, 17, 9, 64, 5, 5])
    params = SamplingParams(max_new_tokens=50, temperature=0.8, top_p=0.95, stop_token_ids=(5,), seed=3)
    together = [c.ids for c in generate(model, prompts, params)]
    alone = [generate(model, [p], params, sequence_ids=[i])[0].ids for i, p in enumerate(prompts)]
    pairs = [c.ids for c in generate(model, prompts, params, batch_size=2)]
    backwards = generate(model, prompts[::-1], params, sequence_ids=list(range(len(prompts)))[::-1])
    streamed = [list(stream(model, p, params, sequence_id=i)) for i, p in enumerate(prompts)]
    assert together == alone == pairs == [c.ids for c in backwards[::-1]] == streamed


def test_batch_mates_with_other_filters_change_nothing(model):
    prompts = prompts_of([9, 9, 9])
    mine = SamplingParams(max_new_tokens=40, temperature=1.2, seed=1)
    mates = [
        SamplingParams(max_new_tokens=40, temperature=0.5, top_k=3, repetition_penalty=1.3, seed=2),
        SamplingParams(max_new_tokens=7, temperature=0, top_p=0.5),
    ]
    mixed = generate(model, prompts, [mine, *mates])
    assert mixed[0].ids == generate(model, prompts[:1], mine)[0].ids
    assert mixed[1].ids == generate(model, prompts[1:2], mates[0], sequence_ids=[1])[0].ids
    assert mixed[2].ids == greedy_without_cache(model, prompts[2], 7, set())


def test_a_long_row_that_ended_stands_still_while_short_ones_go_on(model):
    """It stays in the batch until half of it has ended, and must not walk out of the cache or disturb the others."""
    prompts = prompts_of([120, 3, 5])
    params = [SamplingParams(max_new_tokens=n, temperature=0) for n in (2, 100, 110)]
    for prompt, p, completion in zip(prompts, params, generate(model, prompts, params), strict=True):
        assert completion.ids == greedy_without_cache(model, prompt, p.max_new_tokens, set())


def test_seeds_and_sequences_differ_and_repeat(model):
    prompts = prompts_of([9]) * 4
    params = SamplingParams(max_new_tokens=30, seed=1)
    first = [c.ids for c in generate(model, prompts, params)]
    assert first == [c.ids for c in generate(model, prompts, params)]
    assert len({tuple(ids) for ids in first}) == 4, "the four samples of a prompt must differ"
    assert first != [c.ids for c in generate(model, prompts, SamplingParams(max_new_tokens=30, seed=2))]


def test_continuing_from_the_middle_gives_the_same_sequence(model):
    """The stream is addressed by position, so a request that was interrupted and sent again with its text goes on."""
    prompt = prompts_of([9])[0]
    whole = generate(model, [prompt], SamplingParams(max_new_tokens=40, seed=5))[0].ids
    rest = generate(model, [prompt + whole[:15]], SamplingParams(max_new_tokens=25, seed=5))[0].ids
    assert whole[:15] + rest == whole


@pytest.mark.parametrize(
    "filters",
    [
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"top_k": 20, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_log_probs_equal_the_full_forward_pass_and_behaviour_the_filtered_distribution(model, filters, computed_by):
    """In float64, from the logits of the whole text, one token after the other by the definition."""
    params = SamplingParams(max_new_tokens=30, temperature=0.7, seed=2, **filters)
    exact, prompts = copy.deepcopy(model).double(), prompts_of([4, 30])
    for prompt, completion in zip(prompts, generate(model, prompts, params, log_probs=True), strict=True):
        with torch.no_grad():
            logits = exact(torch.tensor([prompt + completion.ids])).logits[0, len(prompt) - 1 : -1]
        full = (logits / params.temperature).log_softmax(-1).gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
        filtered = [
            math.log(exact_distribution(logits[i].tolist(), params, {*prompt, *completion.ids[:i]})[token])
            for i, token in enumerate(completion.ids)
        ]
        assert (torch.tensor(completion.log_probs) - full).abs().max() <= 1e-5
        assert (torch.tensor(completion.behaviour_log_probs) - torch.tensor(filtered)).abs().max() <= 1e-5
        assert (torch.tensor(filtered) - full).abs().max() > 0.01


def test_equal_prompts_with_equal_params_are_read_once_whoever_made_the_params(model, monkeypatch):
    read, hidden = [], Decoder.hidden

    def counting(decoder, ids_N, positions_N, attend):
        if not attend.__qualname__.startswith(("Engine._attend", "attend_together")):
            read.append(len(ids_N))
        return hidden(decoder, ids_N, positions_N, attend)

    monkeypatch.setattr(Decoder, "hidden", counting)
    monkeypatch.setattr(NativeDecoder, "covers", lambda decoder: False)
    prompt, other = prompts_of([20, 20])
    settings = [SamplingParams(max_new_tokens=9, seed=4, stop_token_ids=(1,), logit_bias={7: 1.0}) for _ in range(3)]
    biased = SamplingParams(max_new_tokens=9, seed=4, stop_token_ids=(1,), logit_bias={7: 2.0})
    prompts, settings = [prompt, prompt, other, prompt], [*settings, biased]
    together = generate(model, prompts, settings)
    assert sum(read) == 3 * 20, "the first two share it, the last has another bias"
    alone = [
        generate(model, [ids], p, sequence_ids=[i]) for i, (ids, p) in enumerate(zip(prompts, settings, strict=True))
    ]
    assert [c.ids for c in together] == [c.ids for (c,) in alone]


def test_bfloat16_models_generate(model):
    half = copy.deepcopy(model).to(torch.bfloat16)
    completion = generate(half, prompts_of([5]), SamplingParams(max_new_tokens=20, temperature=0))[0]
    assert len(completion.ids) == 20


# ------------------------------------------------------------------------------------------------------------ stopping


def letters(ids) -> str:
    """Every id is one character."""
    return "".join(chr(0x4E00 + i) for i in ids)


def test_stop_strings_end_the_text_before_them_wherever_tokens_are_cut(model):
    prompts = prompts_of([6, 11])
    free = generate(model, prompts, SamplingParams(max_new_tokens=40, temperature=0), decode=letters)
    stops = [free[0].text[10:13], free[1].text[20:22]]  # each spans several tokens
    cut = generate(model, prompts, SamplingParams(max_new_tokens=40, temperature=0, stop=tuple(stops)), decode=letters)
    for f, c in zip(free, cut, strict=True):
        end, stop = min((f.text.find(s) + len(s), s) for s in stops if s in f.text)
        assert c.text == f.text[: end - len(stop)]
        assert c.finish_reason == "stop"
        assert c.ids == f.ids[: len(c.ids)]
        assert len(c.ids) < 40


def test_stop_token_is_in_the_ids_but_not_in_the_text(model):
    prompt = prompts_of([6])[0]
    free = greedy_without_cache(model, prompt, 30, set())
    stop = free[12]
    first = free.index(stop)
    params = SamplingParams(max_new_tokens=30, temperature=0, stop_token_ids=(stop,))
    completion = generate(model, [prompt], params, decode=letters)[0]
    assert completion == Completion(ids=free[: first + 1], finish_reason="stop", text=letters(free[:first]))


def test_stop_token_is_not_in_the_text_of_a_request_with_stop_strings_either(model):
    prompt = prompts_of([6])[0]
    free = greedy_without_cache(model, prompt, 30, set())
    stop = free[12]
    params = SamplingParams(max_new_tokens=30, temperature=0, stop_token_ids=(stop,), stop=("never",))
    assert generate(model, [prompt], params, decode=letters)[0].text == letters(free[: free.index(stop)])


def test_stop_strings_without_decode_are_refused(model):
    with pytest.raises(ValueError, match="decode"):
        generate(model, [[1]], SamplingParams(stop=("x",)))


def test_context_end_is_a_length_stop_and_a_prompt_that_fills_it_an_error(model):
    completion = generate(model, prompts_of([390]), SamplingParams(max_new_tokens=50, temperature=0))[0]
    assert len(completion.ids) == 10
    assert completion.finish_reason == "length"
    with pytest.raises(
        ValueError, match=r"prompt 1 has 400 tokens, which leaves no room in the model's context of 400"
    ):
        generate(model, prompts_of([3, 400]), SamplingParams())


@pytest.mark.parametrize(
    ("prompt", "message"), [([], "prompt 0 is empty"), ([97], "token id 97"), ([-1], "token id -1")]
)
def test_prompts_that_mean_nothing_are_refused(model, prompt, message):
    with pytest.raises(ValueError, match=message):
        generate(model, [prompt], SamplingParams())


def test_every_token_is_reported_once_and_in_order(model):
    prompts = prompts_of([3, 20, 7, 1])
    heard: dict[int, list[int]] = {i: [] for i in range(4)}
    params = SamplingParams(max_new_tokens=60, temperature=0, stop_token_ids=(5, 6, 7))
    completions = generate(
        model, prompts, params, on_token=lambda prompt, token: heard[prompt].append(token), batch_size=3
    )
    assert [heard[i] for i in range(4)] == [c.ids for c in completions]


# ------------------------------------------------------------------------------------------------------- model.generate


def test_generate_ids_returns_prompt_and_new_ids_padded_behind_the_end(model):
    prompts = torch.tensor(prompts_of([8, 8]))
    free = model.generate(prompts, max_new_tokens=30, eos_token_id=())
    assert free.shape == (2, 38)
    stop = int(free[0, 8 + 4])
    out = model.generate(prompts, max_new_tokens=30, eos_token_id=stop, pad_token_id=96)
    for row, reference in zip(out.tolist(), free.tolist(), strict=True):
        new = reference[8:]
        end = new.index(stop) + 1 if stop in new else 30
        assert row[8:] == new[:end] + [96] * (out.shape[1] - 8 - end)
        assert row[:8] == reference[:8]


def test_no_prompts_are_continued_by_nothing(model):
    nothing = torch.zeros(0, 8, dtype=torch.int64)
    assert torch.equal(model.generate(nothing, max_new_tokens=30), nothing)


def test_generate_is_greedy_unless_asked_to_sample(model):
    prompts = torch.tensor(prompts_of([8]))
    greedy = prompts[0].tolist() + greedy_without_cache(model, prompts[0].tolist(), 20, set())
    for options in ({}, {"temperature": 0}, {"temperature": 0, "top_k": 5}, {"do_sample": False, "temperature": 2.0}):
        assert generate_ids(model, prompts, 20, eos_token_id=(), **options)[0].tolist() == greedy, options
    for options in ({"temperature": 1.5}, {"top_p": 0.99}, {"do_sample": True}):
        assert generate_ids(model, prompts, 20, eos_token_id=(), **options)[0].tolist() != greedy, options


def test_padding_on_either_side_is_left_out_of_the_prompt(model):
    prompt = prompts_of([5])[0]
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=15, eos_token_id=())[0, 5:].tolist()
    for ids, mask in (([9, 9, *prompt], [0, 0] + [1] * 5), ([*prompt, 9, 9], [1] * 5 + [0, 0])):
        out = model.generate(
            torch.tensor([ids]), max_new_tokens=15, eos_token_id=(), attention_mask=torch.tensor([mask])
        )
        assert out[0].tolist() == ids + expected


def test_training_mode_comes_back_and_gradients_are_as_before(model):
    prompts = torch.tensor(prompts_of([8]))
    model.train()
    try:
        out = model.generate(prompts, max_new_tokens=5)
        assert model.training
        iterator = stream(model, [1, 2], SamplingParams(max_new_tokens=5))
        next(iterator)
        assert torch.is_grad_enabled()
        iterator.close()
        assert model.training
        model(out).logits.sum().backward()  # what generate returns can be trained on
    finally:
        model.zero_grad()
        model.eval()


def test_greedy_gaps_of_the_fixture_are_wide(model):
    """The comparisons above are token for token, so the fixture must not sit on near-ties."""
    for prompt in prompts_of([3, 40, 1, 17, 9]):
        ids = list(prompt)
        for token in greedy_without_cache(model, prompt, 30, set()):
            assert gap_at(model, ids) > NEAR_TIE
            ids.append(token)
