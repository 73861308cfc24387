"""The engine: what shares a batch, a prompt or a slot, and what changes between two steps, against the bare model."""

import random

import families
import numpy as np
import pytest
import torch

from minigpt.generation import engine as engine_module
from minigpt.generation import sampling
from minigpt.generation.engine import Engine, cache_bytes
from minigpt.generation.generate import generate
from minigpt.generation.native import NativeDecoder, library
from minigpt.generation.request import Request
from minigpt.generation.sampling import SamplingParams
from minigpt.model.model_lora import apply_lora
from minigpt.model.model_minigpt import MiniGPT

V = 97


def prompts_of(lengths, seed=0) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randrange(V) for _ in range(n)] for n in lengths]


def run(engine: Engine) -> list[Request]:
    finished = []
    while engine.has_work:
        finished += engine.step()
    return finished


def greedy(model, prompt: list[int], count: int) -> list[int]:
    """The definition: the whole text through the model for every token."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def assert_log_probs_of_the_model(model, request: Request, temperature: float) -> None:
    for completion in request.completions:
        ids = torch.tensor([request.prompt_ids + completion.ids])
        with torch.no_grad():
            logits = model(ids).logits[0, len(request.prompt_ids) - 1 : -1].double() / temperature
        expected = logits.log_softmax(-1).gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
        assert (torch.tensor(completion.log_probs) - expected).abs().max() <= 1e-5


# ----------------------------------------------------------------------------------------------- against the bare model


@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize("bias", [False, True])
def test_refilled_slots_chunked_prompts_and_shared_prefixes_are_greedy_as_without_a_cache(
    make_model, heads, bias, computed_by
):
    """Three slots for ten sequences; prompts longer than a chunk; a beginning of 70 tokens shared by half of them."""
    model = make_model(num_key_value_heads=heads, attention_bias=bias)
    shared = prompts_of([70], seed=9)[0]
    prompts = [(shared if i % 2 else []) + p for i, p in enumerate(prompts_of([3, 1, 90, 20, 1, 64, 33, 2, 5, 31]))]
    engine = Engine(model, slots=3, prefill_chunk=40)
    requests = []
    for i, prompt in enumerate(prompts):
        params = SamplingParams(max_new_tokens=5 + 7 * (i % 4), temperature=0)
        requests.append(engine.submit(prompt, params, log_probs=True))
        engine.step()
    finished = run(engine)
    assert {id(r) for r in finished} <= {id(r) for r in requests}
    for request in requests:
        assert request.done
        assert request.completions[0].ids == greedy(model, request.prompt_ids, request.params.max_new_tokens)
        assert_log_probs_of_the_model(model, request, 1.0)
    stats = engine.stats
    assert stats.prefix_hit_tokens >= 4 * 64
    assert stats.generated_tokens == sum(len(r.completions[0].ids) for r in requests)
    assert (stats.running, stats.waiting) == (0, 0)


@pytest.mark.parametrize("family", ["llama3.2", "qwen3", "qwen2.5"])
def test_greedy_on_imported_families_equals_transformers_generate(tmp_path, family):
    stock = families.write_model(tmp_path, family).float().eval()
    with torch.no_grad():
        for parameter in stock.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)  # logits that differ, so that there are no near-ties
    stock.save_pretrained(tmp_path)
    model = MiniGPT.from_pretrained(tmp_path).eval()
    generator = random.Random(1)
    prompts = [[generator.randrange(model.config.vocab_size) for _ in range(n)] for n in (9, 30, 2)]
    ours = generate(model, prompts, SamplingParams(max_new_tokens=30, temperature=0))
    for prompt, completion in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        theirs = stock.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
        assert completion.ids == theirs[0, len(prompt) :].tolist()


def test_log_probs_of_samples_equal_a_full_forward_pass(model, computed_by):
    """Temperature, top-p and top-k; samples that share a prompt; the behaviour's under the filtered distribution."""
    engine = Engine(model, slots=5)
    params = SamplingParams(max_new_tokens=25, temperature=0.7, top_p=0.8, top_k=20, seed=4)
    requests = [engine.submit(p, params, n=3, log_probs=True) for p in prompts_of([4, 50, 130])]
    run(engine)
    for request in requests:
        assert_log_probs_of_the_model(model, request, 0.7)
        assert len({tuple(c.ids) for c in request.completions}) == 3
        for c in request.completions:
            assert all(b >= lp - 1e-6 for b, lp in zip(c.behaviour_log_probs, c.log_probs, strict=True))
            assert c.versions == [0] * len(c.ids)


def test_adapters_are_in_what_is_generated(make_model):
    model = make_model()
    base = generate(model, prompts_of([8]), SamplingParams(max_new_tokens=20, temperature=0))[0].ids
    apply_lora(model, rank=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    model.eval()
    adapted = generate(model, prompts_of([8]), SamplingParams(max_new_tokens=20, temperature=0))[0].ids
    assert adapted != base
    assert adapted == greedy(model, prompts_of([8])[0], 20)


# ------------------------------------------------------------------------------------------------------------- sharing


def test_samples_share_one_reading_of_the_prompt_also_those_that_wait_for_a_slot(model):
    prompt = prompts_of([60])[0]
    params = SamplingParams(max_new_tokens=12, temperature=1.0, seed=2)
    engine = Engine(model, slots=3, prefix_cache_tokens=0)
    read = count_read_tokens(engine)
    request = engine.submit(prompt, params, n=8)
    run(engine)
    assert sum(read) == 60
    alone = [generate(model, [prompt], params, sequence_ids=[i])[0].ids for i in range(8)]
    assert [c.ids for c in request.completions] == alone


def test_a_prompt_read_in_pieces_is_read_once_though_its_samples_move_into_other_rows(model):
    """Rows in front of a group become free while its prompt is read: the last sample moves there, and must not begin
    the prompt anew."""
    short, long = prompts_of([4, 90])
    engine = Engine(model, slots=6, prefix_cache_tokens=0, prefill_chunk=16)
    for tokens in (2, 3, 4):
        engine.submit(short, SamplingParams(max_new_tokens=tokens, temperature=0))
    engine.step()
    read = count_read_tokens(engine)
    engine.submit(long, SamplingParams(max_new_tokens=5, temperature=1.0, seed=2), n=3)
    run(engine)
    assert sum(read) == 90
    assert engine.stats.prompt_tokens == 3 * 4 + 90


def count_read_tokens(engine: Engine) -> list[int]:
    """Collects the sizes of all passes over prompts from now on."""
    sizes, hidden = [], engine.decoder.hidden

    def counting(ids_N, positions_N, attend):
        if not attend.__qualname__.startswith("Engine._attend"):
            sizes.append(len(ids_N))
        return hidden(ids_N, positions_N, attend)

    engine.decoder.hidden, natively = counting, engine._decode_natively

    def counting_natively(native, decoding, taken_along):
        if taken_along:
            sizes.append(sum(taken_along.values()))
        return natively(native, decoding, taken_along)

    engine._decode_natively = counting_natively
    return sizes


def test_the_next_turn_of_a_conversation_reads_only_what_is_new(model):
    engine = Engine(model, slots=2)
    prompt = prompts_of([50])[0]
    params = SamplingParams(max_new_tokens=40, temperature=0)
    first = engine.submit(prompt, params)
    run(engine)
    read = count_read_tokens(engine)
    turn = prompt + first.completions[0].ids + prompts_of([10], seed=3)[0]
    second = engine.submit(turn, params)
    run(engine)
    assert sum(read) == 100 - 64, "two whole blocks of 32 of the 89 tokens in the cache are found again"
    assert second.completions[0].ids == greedy(model, turn, 40)


@pytest.mark.parametrize(
    ("compiled", "passes"), [(False, [7, 5 + 1 + 30 + 9 + 48]), (True, [48, 5 + 1 + 30 + 9 + 7])], ids=["torch", "C++"]
)
def test_prompts_that_begin_with_what_is_known_are_read_in_one_pass(model, monkeypatch, compiled, passes):
    """Beside them one that is new and one of which only a part fits into the step, what is left of 100 tokens; all go
    on as without a cache. Short rests are the compiled step's."""
    if not compiled:
        monkeypatch.setattr(NativeDecoder, "covers", lambda decoder: False)
    known, *tails = prompts_of([64, 5, 1, 30, 9])
    new, long = prompts_of([7, 200], seed=3)
    engine = Engine(model, slots=8, prefill_chunk=100)
    engine.submit(known, SamplingParams(max_new_tokens=1))
    run(engine)
    read = count_read_tokens(engine)
    params = SamplingParams(max_new_tokens=30, temperature=0)
    requests = [engine.submit(prompt, params) for prompt in (*[known + tail for tail in tails], new, long)]
    engine.step()
    assert sorted(read) == passes
    assert [len(r.completions[0].ids) for r in requests] == [1] * 5 + [0]
    run(engine)
    assert [r.completions[0].ids for r in requests] == [greedy(model, r.prompt_ids, 30) for r in requests]


def test_the_prefix_cache_keeps_no_more_than_it_may(model):
    engine = Engine(model, slots=2, prefix_cache_tokens=128)
    for prompt in prompts_of([100] * 6):
        engine.submit(prompt, SamplingParams(max_new_tokens=2, temperature=0))
    run(engine)
    assert len(engine._prefix) == 4


def test_long_prompts_are_read_between_the_steps_of_others(model):
    """While 300 tokens are read 32 at a time, the short request gets a token every step."""
    short, long = prompts_of([4, 300])
    engine = Engine(model, slots=2, prefill_chunk=32, prefix_cache_tokens=0)
    a = engine.submit(short, SamplingParams(max_new_tokens=50, temperature=0))
    engine.step()
    b = engine.submit(long, SamplingParams(max_new_tokens=5, temperature=0))
    for step in range(9):
        engine.step()
        assert len(a.completions[0].ids) == step + 2
        assert not b.completions[0].ids
    run(engine)
    assert b.completions[0].ids == greedy(model, long, 5)
    assert a.completions[0].ids == greedy(model, short, 50)


# ------------------------------------------------------------------------------------------------------ batch-invariant


def results(request: Request) -> list[tuple]:
    return [(c.ids, c.log_probs, c.behaviour_log_probs) for c in request.completions]


@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float32, 16), (torch.bfloat16, 16), (torch.bfloat16, 32)])
def test_batch_invariant_results_are_equal_bit_for_bit_whatever_runs_beside(make_model, dtype, head_dim, computed_by):
    """Alone; in a batch of 64 sequences; late, backwards and in another rhythm; in refilled slots; on retry after a
    cancel; with a prefix that is known."""
    model = make_model(head_dim=head_dim).to(dtype)
    lengths = [3, 40, 1, 17, 130, 300, 2, 64, *[9] * 24]
    prompts = prompts_of(lengths)
    kinds = [
        SamplingParams(max_new_tokens=12, temperature=0.9, top_p=0.9, seed=3),
        SamplingParams(max_new_tokens=20, temperature=1.0, seed=3),
        SamplingParams(max_new_tokens=7, temperature=0.0),
        SamplingParams(max_new_tokens=16, temperature=0.8, top_k=50, repetition_penalty=1.2, seed=1),
    ]

    def engine(**options) -> Engine:
        return Engine(model, slots=8, batch_invariant=True, **options)

    def submit(e: Engine, i: int) -> Request:
        return e.submit(prompts[i], kinds[i % 4], n=2, sequence_ids=[2 * i, 2 * i + 1], log_probs=True)

    together = engine()
    batch = [submit(together, i) for i in range(32)]
    run(together)
    late = engine(prefill_chunk=1, prefix_cache_tokens=0)
    backwards = {}
    for i in reversed(range(8)):
        backwards[i] = submit(late, i)
        late.step()
        late.step()
    run(late)
    reused = engine()
    for i in range(8):
        expected = results(batch[i])
        alone = engine()
        request = submit(alone, i)
        run(alone)
        assert results(request) == expected
        assert results(backwards[i]) == expected
        abandoned = submit(reused, i)
        reused.step()
        reused.step()
        reused.cancel(abandoned)
        retried = submit(reused, i)
        run(reused)
        assert results(retried) == expected
    assert reused.stats.prefix_hit_tokens > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_invariant_results_of_config_s_are_the_same_alone_and_in_a_batch_of_64(make_model, dtype, computed_by):
    shape = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 832}
    model = make_model(vocab_size=6400, hidden_size=256, max_position_embeddings=512, **shape).to(dtype)
    generator = random.Random(3)
    prompts = [[generator.randrange(6400) for _ in range(3 + 5 * i % 97)] for i in range(64)]
    kinds = [
        SamplingParams(max_new_tokens=8, temperature=1.0, seed=3),
        SamplingParams(max_new_tokens=8, temperature=0.9, top_p=0.9, seed=3),
        SamplingParams(max_new_tokens=8, temperature=0.0),
        SamplingParams(max_new_tokens=8, temperature=0.8, top_k=50, repetition_penalty=1.2, seed=1),
    ]

    def answers(numbers) -> dict[int, list[tuple]]:
        engine = Engine(model, slots=64, batch_invariant=True, prefix_cache_tokens=0)
        requests = {
            i: engine.submit(prompts[i], kinds[i % 4], sequence_ids=[i], log_probs=True, top_log_probs=3)
            for i in numbers
        }
        engine.step()
        assert engine.stats.running == len(requests)
        run(engine)
        return {i: [*results(r), r.completions[0].top_log_probs] for i, r in requests.items()}

    together = answers(range(64))
    assert answers(reversed(range(64))) == together
    for i in (0, 17, 38, 63):  # one of each kind
        assert answers([i])[i] == together[i]


def test_batch_invariant_results_of_a_later_turn_do_not_depend_on_whether_the_earlier_one_ran_here(model, computed_by):
    """What torch's decode steps wrote rounds otherwise than reading the text, so it must not be used again."""
    prompt, params = prompts_of([100])[0], SamplingParams(max_new_tokens=200, seed=5)
    here = Engine(model, slots=4, batch_invariant=True)
    first = here.submit(prompt, params)
    run(here)
    turn = prompt + first.completions[0].ids
    answers = []
    for engine in (here, Engine(model, slots=4, batch_invariant=True)):
        request = engine.submit(turn, SamplingParams(max_new_tokens=30, seed=6), log_probs=True)
        run(engine)
        answers.append(results(request))
    assert answers[0] == answers[1]


# --------------------------------------------------------------------------------------------------- between two steps


def test_new_weights_between_two_tokens_make_all_that_older_ones_computed_unreachable(make_model, computed_by):
    """Behind the reload a sequence is what the new model says of its text so far: greedy tokens and log-probs, in its
    slot, in a slot that it gets later, and where its prompt had been read for others or kept as a prefix."""
    old, new = make_model(seed=0), make_model(seed=1)
    new_weights = {name: p.clone() for name, p in new.named_parameters()}
    engine = Engine(old, slots=3)
    shared = prompts_of([64])[0]
    params = SamplingParams(max_new_tokens=20, temperature=0)
    early = engine.submit(shared, SamplingParams(max_new_tokens=3, temperature=0))
    running = [engine.submit(shared + p, params, log_probs=True) for p in prompts_of([5, 9])]
    group = engine.submit(shared, params, n=4, log_probs=True)
    while len(running[0].completions[0].ids) < 6:
        engine.step()
    before = [list(r.completions[0].ids) for r in running]
    assert early.done
    assert engine.load_weights(new_weights) == engine.version == 1
    later = engine.submit([*shared, 1, 2], params)
    run(engine)
    for request, ids in zip(running, before, strict=True):
        c = request.completions[0]
        assert c.ids[: len(ids)] == ids
        assert c.ids[len(ids) :] == greedy(new, request.prompt_ids + ids, 20 - len(ids))
        assert c.versions == [0] * len(ids) + [1] * (20 - len(ids))
    for c in group.completions:
        cut = c.versions.index(1)
        assert c.ids[cut:] == greedy(new, shared + c.ids[:cut], 20 - cut)
    assert {c.versions.index(1) for c in group.completions} >= {0}, "some samples must enter behind the reload"
    assert later.completions[0].ids == greedy(new, [*shared, 1, 2], 20)


def test_torch_reads_weights_when_a_long_prompt_comes_and_then_the_newest(make_model):
    """Copies of all weights for prompts that never come would cost their memory and, at every load, their time."""
    engine, models = Engine(make_model(seed=0), slots=2), [make_model(seed=seed) for seed in (0, 1, 2)]
    short, long = prompts_of([10, engine_module.SHORT_PROMPT + 1])
    params = SamplingParams(max_new_tokens=5, temperature=0)
    for prompt, model in ((short, models[0]), (short, models[1]), (long, models[1]), (long, models[2])):
        if model is not models[engine.version]:
            engine.load_weights(dict(model.named_parameters()))
        request = engine.submit(prompt, params)
        run(engine)
        assert request.completions[0].ids == greedy(model, prompt, 5)
        assert bool(engine.decoder.layers) == (prompt is long or engine._native is None)


def test_good_weights_behind_broken_ones_find_nothing_of_them_in_the_cache(make_model, computed_by):
    """NaN keys and values of a diverged policy must not reach who gets the slots later, not even times a weight 0."""
    model, prompts = make_model(), prompts_of([5, 9, 30])
    good = {name: p.detach().clone() for name, p in model.named_parameters()}
    params = SamplingParams(max_new_tokens=40, temperature=0.8, seed=3)
    expected = [c.ids for c in generate(model, prompts, params)]
    engine = Engine(model, slots=3)
    engine.load_weights({name: torch.full_like(p, torch.nan) for name, p in good.items()})
    doomed = [engine.submit(prompt, SamplingParams(max_new_tokens=200)) for prompt in prompts_of([100, 100, 100])]
    for _ in range(50):  # also behind the place where the cache grows
        engine.step()
    assert not engine._cache.kv.isfinite().all(), "the case is too easy"
    for request in doomed:
        engine.cancel(request)
    engine.load_weights(good)
    requests = [engine.submit(prompt, params, sequence_ids=[i]) for i, prompt in enumerate(prompts)]
    run(engine)
    assert [request.completions[0].ids for request in requests] == expected


def test_weights_that_do_not_fit_are_refused_before_anything_changes(model):
    engine = Engine(model, slots=1)
    good = {name: p.detach().clone() for name, p in model.named_parameters()}
    name = "model.layers.1.mlp.up_proj.weight"
    for bad, message in (
        ({k: v for k, v in good.items() if k != name}, f"{name} is missing"),
        ({**good, "model.extra": torch.zeros(1)}, "model.extra is unknown"),
        ({**good, name: torch.zeros(3, 3)}, f"{name} has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.load_weights({k: v + 1 for k, v in bad.items()})
    assert engine.version == 0
    assert all(torch.equal(p, good[n]) for n, p in model.named_parameters())


def test_a_cancelled_request_leaves_its_slots_and_changes_nothing_for_others(model):
    engine = Engine(model, slots=3)
    a, b = prompts_of([10, 20])
    params = SamplingParams(max_new_tokens=30, temperature=0)
    doomed = engine.submit(a, params, n=5)
    kept = engine.submit(b, params)
    for _ in range(4):
        engine.step()
    assert not kept.completions[0].ids, "the case is too easy: it must wait for a slot"
    engine.cancel(doomed)
    assert doomed.done
    assert doomed.cancelled
    assert {c.finish_reason for c in doomed.completions} == {"cancelled"}
    engine.step()
    assert engine.stats.running == 1
    assert doomed not in run(engine)
    assert kept.completions[0].ids == greedy(model, b, 30)
    engine.cancel(doomed)  # once more does no harm


def test_a_callback_that_fails_harms_nobody(model):
    """Whoever catches its error can go on: all sequences stay what they are alone."""
    prompts, params = prompts_of([5, 9, 7]), SamplingParams(max_new_tokens=8, temperature=0)
    engine, calls = Engine(model, slots=3), 0

    def fail(sample, token, log_prob):
        nonlocal calls
        calls += 1
        raise RuntimeError("not today")

    heard = []
    callbacks = (fail, lambda sample, token, log_prob: heard.append(token), None)
    requests = [engine.submit(ids, params, on_token=c) for ids, c in zip(prompts, callbacks, strict=True)]
    while engine.has_work:
        try:
            engine.step()
        except RuntimeError:
            continue
    assert calls == 8
    assert heard == requests[1].completions[0].ids
    assert [r.completions[0].ids for r in requests] == [greedy(model, ids, 8) for ids in prompts]


def test_a_stream_loses_nothing_when_others_drive_the_engine(model):
    prompts, engine = prompts_of([5, 9]), Engine(model, slots=2)
    long, short = (
        engine.stream(ids, SamplingParams(max_new_tokens=n, temperature=0))
        for ids, n in zip(prompts, (10, 3), strict=True)
    )
    begun = [next(long), next(short)]
    assert begun[0:1] + list(long) == greedy(model, prompts[0], 10)
    assert begun[1:2] + list(short) == greedy(model, prompts[1], 3)


def test_numbers_of_streams_may_come_from_numpy(model):
    prompt, params = prompts_of([6])[0], SamplingParams(max_new_tokens=8, seed=5)
    expected = generate(model, [prompt] * 3, params, sequence_ids=[0, 1, 2])
    assert generate(model, [prompt] * 3, params, sequence_ids=np.arange(3)) == expected


def test_a_callback_may_cancel_its_request(model):
    engine = Engine(model, slots=2)
    heard = []

    def on_token(sample, token, log_prob):
        heard.append((sample, token))
        if len(heard) == 5:
            engine.cancel(request)

    request = engine.submit(
        prompts_of([5])[0], SamplingParams(max_new_tokens=30, temperature=0), n=2, on_token=on_token
    )
    other = engine.submit(prompts_of([7])[0], SamplingParams(max_new_tokens=9, temperature=0))
    run(engine)
    assert len(heard) == 5
    assert other.completions[0].ids == greedy(model, other.prompt_ids, 9)


def test_tokens_are_reported_with_their_log_probs_as_they_come(model):
    engine, heard = Engine(model, slots=4), {0: [], 1: []}
    request = engine.submit(
        prompts_of([5])[0],
        SamplingParams(max_new_tokens=10, seed=1),
        n=2,
        on_token=lambda sample, token, log_prob: heard[sample].append((token, log_prob)),
        log_probs=True,
    )
    run(engine)
    for sample, c in enumerate(request.completions):
        assert heard[sample] == list(zip(c.ids, c.log_probs, strict=True))


def test_logit_bias_forbids_and_forces_tokens_of_its_own_row(model, computed_by):
    engine = Engine(model, slots=2)
    prompt = prompts_of([6])[0]
    free = greedy(model, prompt, 8)
    params = SamplingParams(max_new_tokens=8, temperature=0)
    forced = engine.submit(prompt, SamplingParams(max_new_tokens=8, temperature=0, logit_bias={11: 1000.0}))
    plain = engine.submit(prompt, params)
    run(engine)
    again = [engine.submit(prompt, params) for _ in range(2)]  # the slots of before
    run(engine)
    assert forced.completions[0].ids == [11] * 8
    assert [r.completions[0].ids for r in (plain, *again)] == [free] * 3


def test_a_bias_and_a_penalty_cost_nothing_once_their_requests_have_left(model, computed_by, monkeypatch):
    """The samplers get no bias, and the very logits of the model, as soon as no row in use has either."""
    engine, adjusted = Engine(model, slots=2), []

    def adjust(logits_BV, params, seen_BV, bias_BV):
        result = sampling.adjust(logits_BV, params, seen_BV, bias_BV)
        adjusted.append(result is not logits_BV)
        return result

    def sample(logits_BV, params, uniforms_B, seen_BV, bias_BV, *, log_probs):
        adjusted.append(params.repetition_penalty is not None or bias_BV is not None)
        return sampling.sample(logits_BV, params, uniforms_B, seen_BV, bias_BV, log_probs=log_probs)

    monkeypatch.setattr(engine_module, "adjust", adjust)
    monkeypatch.setattr(engine_module, "sample", sample)
    plain, prompts = SamplingParams(max_new_tokens=8, seed=1), prompts_of([6, 7])
    free = [engine.submit(prompt, plain) for prompt in prompts]
    run(engine)
    assert adjusted == [False] * 8
    for special in ({"logit_bias": {5: 1.0}}, {"repetition_penalty": 1.3}):
        adjusted.clear()
        engine.submit(prompts[0], SamplingParams(max_new_tokens=3, **special))
        beside = engine.submit(prompts[1], plain)
        run(engine)
        assert adjusted == [True] * 3 + [False] * 5
        assert beside.completions[0].ids == free[1].completions[0].ids
    adjusted.clear()
    once_more = engine.submit(prompts[0], SamplingParams(max_new_tokens=8, temperature=0, logit_bias={11: 1000.0}))
    run(engine)
    assert adjusted == [True] * 8
    assert once_more.completions[0].ids == [11] * 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_ids": []}, "the prompt is empty"),
        ({"prompt_ids": [V]}, "token id 97, outside"),
        ({"prompt_ids": [1] * 400}, "leaves no room in the model's context of 400"),
        ({"n": 0}, "at least one sample"),
        ({"n": 2, "sequence_ids": [1]}, "2 samples and 1 sequence ids"),
        ({"params": SamplingParams(stop=("x",))}, "decode"),
        ({"params": SamplingParams(logit_bias={V: 1.0})}, "logit_bias names token id 97"),
    ],
)
def test_requests_that_mean_nothing_are_refused_and_leave_the_queue_as_it_was(model, arguments, message):
    engine = Engine(model, slots=1)
    with pytest.raises(ValueError, match=message):
        engine.submit(**{"prompt_ids": [1, 2], "params": SamplingParams(), **arguments})
    assert not engine.has_work


@pytest.mark.parametrize(
    "options", [{"slots": 0}, {"max_length": 1}, {"prefill_chunk": 0}, {"prefix_cache_tokens": -1}]
)
def test_engines_that_cannot_work_are_refused_by_name(model, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Engine(model, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [16, 32])
def test_the_cache_takes_the_memory_that_limits_are_computed_from(make_model, dtype, head_dim, computed_by):
    """In bfloat16 half of it, where the compiled step reads keys and values by tiles."""
    model = make_model(head_dim=head_dim).to(dtype)
    engine = Engine(model, slots=3)
    bytes_a_number = {torch.float64: 8, torch.float32: 4, torch.bfloat16: 4}[dtype]
    if dtype == torch.bfloat16 and head_dim == 32 and engine._native is not None and library().has_tiles():
        bytes_a_number = 2
    engine.submit([1] * 200, SamplingParams(max_new_tokens=1))
    run(engine)
    numbers = 2 * 2 * 3 * 2 * engine._cache.max_length * head_dim
    assert engine._cache.bytes() == cache_bytes(model, 3, engine._cache.max_length) == bytes_a_number * numbers


def test_a_shorter_max_length_ends_sequences_there(model):
    engine = Engine(model, slots=1, max_length=20)
    request = engine.submit(prompts_of([15])[0], SamplingParams(max_new_tokens=50, temperature=0))
    run(engine)
    assert len(request.completions[0].ids) == 5
    assert request.completions[0].finish_reason == "length"
