"""Decode steps in fixed shapes: what is rounded up may not be seen, and recordings are made again when memory moved."""

import random

import pytest
import torch

from minigpt.generation.decoder import Decoder
from minigpt.generation.engine import Engine
from minigpt.generation.generate import generate
from minigpt.generation.graphs import StaticDecoder, attend_together, graphs_wanted, length_bucket, rows_bucket
from minigpt.generation.sampling import SamplingParams
from minigpt.model.attention import _grouped_queries
from minigpt.model.kv_cache import KVCache
from minigpt.model.model_lora import apply_lora

V = 97


def random_ids(count: int, seed: int = 0) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(V) for _ in range(count)]


def filled_cache(model, slots: int, length: int) -> KVCache:
    cache = KVCache(model.config, slots, length, model.model.embed_tokens.weight.dtype)
    torch.manual_seed(1)
    cache.kv.normal_()
    return cache


def step_in_exact_shapes(decoder: Decoder, cache: KVCache, ids, positions, tokens: int) -> torch.Tensor:
    positions_B = torch.tensor(positions)
    return decoder.logits(decoder.hidden(torch.tensor(ids), positions_B, attend_together(cache, positions_B, tokens)))


def test_sizes_are_few_and_large_enough():
    assert [rows_bucket(n, 24) for n in (1, 2, 3, 8, 9, 16, 17, 24)] == [1, 2, 4, 8, 16, 16, 24, 24]
    assert [length_bucket(n, 2000) for n in (1, 128, 129, 512, 513, 1024, 1025)] == [
        128,
        128,
        256,
        512,
        768,
        1024,
        1536,
    ]
    assert length_bucket(1900, 2000) == 2000
    for tokens in range(1, 5000):
        assert tokens <= length_bucket(tokens, 5000) <= max(tokens + 127, 1.5 * tokens)
    assert len({length_bucket(n, 4096) for n in range(1, 4097)}) <= 12


@torch.inference_mode()
def test_a_step_of_full_size_has_the_same_bits_and_a_padded_one_the_same_numbers(make_model):
    model = make_model(num_key_value_heads=2).double()
    decoder = Decoder(model, 400, 8)
    static = StaticDecoder(decoder, 8)
    for rows, last in ((8, 127), (4, 255), (5, 127), (1, 60), (3, 130)):
        ids, positions = random_ids(rows, rows), [last, *random_ids(rows - 1, rows + 50)]
        ours, theirs = filled_cache(model, 8, 256), filled_cache(model, 8, 256)
        expected = step_in_exact_shapes(decoder, theirs, ids, positions, last + 1)
        found = static.decode(ids, positions, ours)
        assert found.shape == (rows, V)
        if rows in (8, 4):  # nothing was rounded up
            assert torch.equal(found, expected)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
        written = torch.zeros(ours.kv.shape[2:5:2], dtype=torch.bool)
        written[range(rows), positions] = True
        padding = range(rows, rows_bucket(rows, 8))
        written[padding, [0] * len(padding)] = True
        before = filled_cache(model, 8, 256).kv
        changed = (ours.kv != before).any(dim=5).any(dim=3).any(dim=1).any(dim=0)
        assert torch.equal(changed, written), "no slot but those that were meant, at no place but the new one"
        assert torch.allclose(ours.kv[:, :, :rows], theirs.kv[:, :, :rows], rtol=1e-9, atol=1e-9)


@torch.inference_mode()
def test_what_free_slots_hold_changes_no_bit_of_a_row(make_model):
    model = make_model().double()
    static = StaticDecoder(Decoder(model, 400, 8), 8)
    results = []
    for noise in (1.0, -7.0):
        cache = filled_cache(model, 8, 128)
        cache.kv[:, :, 5:] = noise
        results.append(static.decode(random_ids(5), [3, 100, 7, 0, 64], cache).clone())
    assert torch.equal(*results)


def test_engines_in_fixed_and_in_exact_shapes_generate_the_same(make_model):
    """Three slots for eight sequences, prompts in pieces, growing caches, weights that change half-way."""
    model, other = make_model(), make_model(seed=1)
    results = []
    for fixed in (True, False):
        model.load_state_dict(make_model().state_dict())
        engine = Engine(model, slots=3, prefill_chunk=40, cuda_graphs=fixed)
        requests = []
        for i in range(8):
            params = SamplingParams(max_new_tokens=20 + 9 * i, temperature=0.7 * (i % 2), top_k=20, seed=i)
            requests.append(engine.submit(random_ids(1 + 17 * i, i), params, n=1 + i % 2, log_probs=True))
            engine.step()
        for _ in range(60):
            engine.step()
        engine.load_weights(dict(other.named_parameters()))
        while engine.has_work:
            engine.step()
        results.append([c for request in requests for c in request.completions])
    for ours, theirs in zip(*results, strict=True):
        assert ours.ids == theirs.ids
        assert torch.tensor(ours.log_probs).sub(torch.tensor(theirs.log_probs)).abs().max() <= 1e-4


def test_new_weights_are_written_where_the_old_ones_were_and_adapters_never_into_the_model(make_model):
    """float64 is not laid out for oneDNN, so what a step reads are ordinary tensors, as on a GPU."""
    model = make_model().double()
    apply_lora(model, rank=2)
    decoder = Decoder(model, 400, 4)
    places = decoder.places
    own = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "embed" in name or "norm" in name:
                parameter.normal_()
                own[name] = parameter.detach().clone()
    decoder.refresh()
    assert decoder.places == places
    assert all(torch.equal(p, own[name]) for name, p in model.named_parameters())
    cache, twin = filled_cache(model, 4, 128), filled_cache(model, 4, 128)
    with torch.inference_mode():
        found = StaticDecoder(decoder, 4).decode([5, 6, 7, 8], [3, 4, 5, 127], cache)
        expected = step_in_exact_shapes(Decoder(model, 400, 4), twin, [5, 6, 7, 8], [3, 4, 5, 127], 128)
    assert torch.equal(found, expected)


def test_an_adapter_that_comes_later_is_not_written_into_the_model(make_model):
    model = make_model().double()
    decoder = Decoder(model, 400, 2)
    places = decoder.places
    base = [p for p in model.parameters() if p.dim() > 1]
    before = [p.detach().clone() for p in base]
    apply_lora(model, rank=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    decoder.refresh()
    assert all(torch.equal(*pair) for pair in zip(base, before, strict=True))
    assert decoder.places != places, "so that recordings are made again"


def test_recordings_are_forgotten_when_cache_or_weights_moved(make_model, monkeypatch):
    model = make_model().double()
    static = StaticDecoder(Decoder(model, 400, 2), 2)
    made = []

    def record(B, L, cache):
        made.append((B, L))
        static._replays[B, L] = lambda: static._compute(B, L, cache)

    monkeypatch.setattr(static, "_record", record)
    static.refused = None
    cache = filled_cache(model, 2, 128)
    with torch.inference_mode():
        for positions in ([1, 2], [2, 3], [3]):
            static.decode([0] * len(positions), positions, cache)
        assert made == static.recorded[::-1] == [(2, 128), (1, 128)]
        static._decoder.refresh()
        static.decode([0], [4], cache)
        assert len(made) == 2, "weights in their old places"
        larger = cache.resized(256)
        static.decode([0], [5], larger)
        assert (made[2:], static.recorded) == ([(1, 128)], [(1, 128)])
        model.double().model.norm.weight.data = model.model.norm.weight.data.clone()
        static._decoder.refresh()
        static.decode([0], [6], larger)
        assert len(made) == 4


def test_what_cannot_be_recorded_is_computed_without_and_said_once(make_model, capsys):
    """Here because there is no GPU: the recording itself fails."""
    model = make_model().double()
    static = StaticDecoder(Decoder(model, 400, 2), 2)
    assert static.refused == "there is no GPU"
    static.refused = None
    static._pool = object()
    with torch.inference_mode():
        first = static.decode([1, 2], [0, 0], filled_cache(model, 2, 128)).clone()
        again = static.decode([1, 2], [0, 0], filled_cache(model, 2, 128))
    assert torch.equal(first, again)
    assert static.refused
    assert capsys.readouterr().err.count("CUDA graphs are off") == 1


def test_who_decides_whether_graphs_are_used(monkeypatch, model):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.delenv("MINIGPT_CUDA_GRAPHS", raising=False)
    assert graphs_wanted(None, gpu, False)
    assert not graphs_wanted(None, cpu, False)
    assert not graphs_wanted(None, gpu, True)
    assert not graphs_wanted(False, gpu, False)
    monkeypatch.setenv("MINIGPT_CUDA_GRAPHS", "0")
    assert not graphs_wanted(None, gpu, False)
    with pytest.raises(ValueError, match="batch_invariant exclude"):
        Engine(model, slots=1, batch_invariant=True, cuda_graphs=True)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_query_heads_of_a_group_as_queries_equal_repeated_keys(heads):
    torch.manual_seed(0)
    q, (k, v) = torch.randn(3, 4, 16, dtype=torch.float64), torch.randn(2, 3, heads, 20, 16, dtype=torch.float64)
    bias = torch.zeros(3, 20, dtype=torch.float64).masked_fill(
        torch.arange(20) > torch.tensor([[4], [19], [0]]), -torch.inf
    )
    repeated = [x.repeat_interleave(4 // heads, dim=1) for x in (k, v)]
    scores = torch.einsum("bhd,bhld->bhl", q, repeated[0]) / 4 + bias[:, None]
    expected = torch.einsum("bhl,bhld->bhd", scores.softmax(-1), repeated[1])
    assert (_grouped_queries(q, k, v, bias) - expected).abs().max() <= 1e-12


# ------------------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replayed_steps_equal_steps_computed_one_operator_at_a_time(make_model, dtype):
    model = make_model().to("cuda", dtype)
    decoder = Decoder(model, 400, 8)
    recorded, plain = StaticDecoder(decoder, 8), StaticDecoder(decoder, 8)
    plain.refused = "for comparison"
    caches = [KVCache(model.config, 8, 256, dtype, "cuda") for _ in range(2)]
    with torch.inference_mode():
        for step in range(200):
            ids = random_ids(1 + step % 8, step)
            found = recorded.decode(ids, [step] * len(ids), caches[0])
            assert torch.equal(found, plain.decode(ids, [step] * len(ids), caches[1])), step
    assert recorded.refused is None
    assert recorded.recorded == [(rows, tokens) for rows in (1, 2, 4, 8) for tokens in (128, 256)]
    assert torch.equal(*(cache.kv for cache in caches))


@pytest.mark.gpu
def test_recordings_share_their_working_memory(make_model):
    """The largest comes first; each of its own stream would get 32 MiB for cuBLAS alone on Hopper."""
    model = make_model().to("cuda", torch.bfloat16)
    static = StaticDecoder(Decoder(model, 400, 8), 8)
    cache = KVCache(model.config, 8, 256, torch.bfloat16, "cuda")
    with torch.inference_mode():
        static.decode(random_ids(8), [200] * 8, cache)
        before = torch.cuda.memory_reserved()
        for rows in (4, 2, 1):
            static.decode(random_ids(rows), [200] * rows, cache)
    assert len(static.recorded) == 4
    assert torch.cuda.memory_reserved() - before < 8 << 20


@pytest.mark.gpu
def test_an_engine_with_graphs_follows_new_weights_and_a_growing_cache(make_model):
    model = make_model().cuda()
    engine = Engine(model, slots=4)
    assert engine._static is not None
    prompts, params = [random_ids(5, i) for i in range(6)], SamplingParams(max_new_tokens=300, temperature=0)
    for seed in (0, 1, 2):
        engine.load_weights(dict(make_model(seed=seed).named_parameters()))
        requests = [engine.submit(prompt, params) for prompt in prompts]
        while engine.has_work:
            engine.step()
        assert engine._static.refused is None
        expected = generate(make_model(seed=seed), prompts, params)
        agree = [
            a == b
            for request, completion in zip(requests, expected, strict=True)
            for a, b in zip(request.completions[0].ids[:100], completion.ids[:100], strict=True)
        ]
        assert sum(agree) >= 0.95 * len(agree)  # where two tokens lie within rounding, a text goes on otherwise
