"""The compiled decode step and sampler against the same in torch, and what happens where they cannot be compiled."""

import math
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_sampling import (
    DRAWS,
    LOGITS,
    MIXED,
    SEEN,
    SETTINGS,
    chi_square,
    exact_distribution,
    in_groups,
    largest_statistic,
)

import minigpt
from minigpt.generation.decoder import Decoder
from minigpt.generation.engine import Engine
from minigpt.generation.native import NativeDecoder, draws_of, library
from minigpt.generation.sampling import SamplingParams, SamplingTensors, adjust, sample, uniforms
from minigpt.model.kv_cache import KVCache
from minigpt.model.model_minigpt import MiniGPT
from minigpt.model.native import load_native

PRECISIONS = pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [(torch.float32, 16), (torch.bfloat16, 16), (torch.bfloat16, 32), (torch.bfloat16, 64)],  # from 32 on by tiles
    ids=["float32", "bfloat16", "bfloat16 in tiles", "bfloat16 in tiles of two pieces"],
)


def native_decoder(model: MiniGPT, slots: int) -> tuple[NativeDecoder, KVCache]:
    """With a cache of 64 tokens a slot."""
    cache = KVCache(model.config, slots, 64, NativeDecoder.cache_dtype(model))
    return NativeDecoder(Decoder(model, 64, slots), slots), cache


def decoded(model: MiniGPT, sequences: list[list[int]], native: bool, monkeypatch) -> torch.Tensor:
    """The logits that decode steps give behind each token of equally long texts, [sequences, tokens - 2, V]."""
    with monkeypatch.context() as patch:
        if not native:
            patch.setattr(NativeDecoder, "covers", lambda decoder: False)
        engine = Engine(model, slots=len(sequences))
    assert (engine._native is not None) == native
    for ids in sequences:
        engine.submit(ids[:2], SamplingParams(max_new_tokens=len(ids), temperature=0))
    engine.step()  # reads the prompts
    steps, sampled = [], engine._draw

    def draw(logits_BV, chosen, log_probs):
        steps.append(logits_BV.clone())
        return sampled(logits_BV, chosen, log_probs)

    engine._draw = draw
    for position in range(2, len(sequences[0])):
        for sequence, ids in zip(engine._rows, sequences, strict=True):
            sequence.ids[-1] = ids[position]
        engine.step()
    return torch.stack(steps, dim=1)


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"num_key_value_heads": 1, "qk_norm": False},
        {"num_key_value_heads": 4, "attention_bias": True, "tie_word_embeddings": False},
        {"hidden_size": 96, "head_dim": 48, "intermediate_size": 160, "vocab_size": 1000},
        {"head_dim": 32},
        {"head_dim": 64, "num_key_value_heads": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_is_what_the_model_says_without_a_cache(make_model, monkeypatch, shape, dtype):
    """In batches that fill the registers and do not; in bfloat16 about as far from float32's logits as torch is."""
    model = make_model(**shape).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    exact = make_model(**shape).float()
    exact.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(0)
    for count in (1, 5, 8, 11):
        ids = torch.randint(0, model.config.vocab_size, (count, 24), generator=generator)
        with torch.no_grad():
            expected = exact(ids).logits[:, 2:]
        error = (decoded(model, ids.tolist(), True, monkeypatch) - expected).abs().max()
        if dtype == torch.float32:
            assert error <= 1e-4 * expected.abs().max()
        else:
            assert error <= 1.2 * (decoded(model, ids.tolist(), False, monkeypatch) - expected).abs().max()


@pytest.mark.parametrize("size", [100.0, 177.4, 300.0, 3000.0])
def test_gates_far_beyond_what_an_exponential_can_hold_are_computed_as_in_torch(make_model, monkeypatch, size):
    """e^x of a large x is no float: its sign and size must not come from the bits of an overflow."""
    model = make_model().float()
    with torch.no_grad():
        for layer in model.model.layers:
            largest = 0.0
            for _ in range(2):  # gates reach about `size` in both directions
                hidden = torch.randn(64, model.config.hidden_size)
                largest = max(largest, layer.mlp.gate_proj(hidden / hidden.pow(2).mean(-1, True).sqrt()).abs().max())
            layer.mlp.gate_proj.weight.mul_(size / largest)
    ids = torch.randint(0, model.config.vocab_size, (5, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids).logits[:, 2:]
    error = (decoded(model, ids.tolist(), True, monkeypatch) - expected).abs().max()
    assert error <= 1e-3 * expected.abs().max()


def test_a_library_that_was_damaged_on_disk_is_built_once_more(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "good"))
    build, source = load_native.__wrapped__, Path(minigpt.__file__).parent / "model" / "cross_entropy.cpp"
    assert build(source) is not None
    (good,) = (tmp_path / "good" / "minigpt").glob("*.so")
    library = tmp_path / "bad" / "minigpt" / good.name  # elsewhere: this process has loaded the good one
    library.parent.mkdir(parents=True)
    library.write_bytes(b"")  # as a power cut leaves it
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "bad"))
    assert build(source) is not None
    assert library.stat().st_size == good.stat().st_size


@PRECISIONS
def test_a_row_has_the_same_bits_in_any_batch_and_with_any_number_of_threads(make_model, dtype, head_dim):
    model = make_model(head_dim=head_dim).to(dtype)
    native, cache = native_decoder(model, 17)
    torch.manual_seed(1)
    cache.kv.normal_()
    rows = [(i, i, 3 * i, i, 0, 1) for i in range(17)]
    threads, logits = torch.get_num_threads(), []
    try:
        for number, batches in ((2, [rows]), (1, [rows[:5], rows[5:]]), (3, [[row] for row in reversed(rows)])):
            torch.set_num_threads(number)
            for batch in batches:
                native.decode(batch, cache)
            logits.append(native.logits_BV.clone())
            native.logits_BV.zero_()
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


@PRECISIONS
def test_texts_read_at_once_beside_others_have_the_bits_of_texts_read_token_by_token(make_model, dtype, head_dim):
    model = make_model(head_dim=head_dim).to(dtype)
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(0, model.config.vocab_size, (n,), generator=generator).tolist() for n in (40, 1, 33, 7)]
    rows = [
        (token, slot, position, slot, 0, position == len(text) - 1)
        for slot, text in enumerate(texts)
        for position, token in enumerate(text)
    ]
    (native, cache), (_, other) = (native_decoder(model, 4) for _ in range(2))
    caches = [cache, other]
    for row in rows:
        native.decode([row], caches[0])
    logits = native.logits_BV.clone()
    native.logits_BV.zero_()
    native.decode(rows, caches[1])
    assert torch.equal(native.logits_BV, logits)
    assert torch.equal(caches[0].kv, caches[1].kv)


def test_prompts_that_the_compiled_step_takes_along_are_continued_as_by_the_model_alone(make_model):
    """They come while others are decoded, in pieces behind a known beginning, and for several samples."""
    model = make_model().float()
    engine, generator = Engine(model, slots=3, prefill_chunk=48), torch.Generator().manual_seed(1)
    long = torch.randint(0, model.config.vocab_size, (100,), generator=generator).tolist()
    requests = []
    for ids, n in ((long[:5], 1), (long[:40], 2), (long, 1), (long[:70] + long[:9], 1), (long[:3], 2)):
        requests.append(engine.submit(ids, SamplingParams(max_new_tokens=12, temperature=0), n=n))
        engine.step()
    while engine.has_work:
        engine.step()
    for request in requests:
        for completion in request.completions:
            ids = torch.tensor([request.prompt_ids + completion.ids])
            with torch.no_grad():
                logits = model(ids).logits[0, len(request.prompt_ids) - 1 : -1]
            chosen = logits.gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
            assert (logits.amax(-1) - chosen).max() <= 1e-5


@PRECISIONS
@pytest.mark.parametrize("shared", [5, 21, 32, 45])
def test_lent_keys_and_values_give_the_same_bits_as_a_copy_of_them(make_model, dtype, head_dim, shared):
    """To rows that share them, which attend together where tiles do it, and beside rows that do not."""
    model = make_model(head_dim=head_dim).to(dtype)
    native, cache = native_decoder(model, 12)
    torch.manual_seed(1)
    cache.kv.normal_()
    samples = {slot: (5 + slot, slot, 45 + slot) for slot in range(2, 11)}  # id, slot, position
    for slot in samples:
        cache.copy_row(0, slot, shared)
    for row in samples.values():
        native.decode([(*row, row[1], 0, 1)], cache)
    own = native.logits_BV.clone()
    native.logits_BV.zero_()
    cache.kv[:, :, 2:11, :, :shared] = torch.nan  # must not be read
    alone = (7, 1, 20, 1, 0, 0), (8, 11, 60, 11, 0, 0)
    native.decode([alone[0], *((*row, 0, shared, 1) for row in samples.values()), alone[1]], cache)
    assert torch.equal(native.logits_BV, own)


def test_in_bfloat16_samples_of_a_prompt_are_as_far_from_what_float32_says_as_in_torch(make_model, monkeypatch):
    """By their log-probabilities, over some hundred cached tokens; by tiles also queries and weights are rounded."""
    model = make_model(head_dim=32).bfloat16()
    exact = make_model(head_dim=32)
    exact.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, model.config.vocab_size, (n,), generator=generator).tolist() for n in (1, 37, 150, 200)]
    errors = []
    for native in (True, False):
        if not native:
            monkeypatch.setattr(NativeDecoder, "covers", lambda model: False)
        engine = Engine(model, slots=16)
        assert (engine._native is not None) == native
        requests = [engine.submit(ids, SamplingParams(max_new_tokens=60), n=5, log_probs=True) for ids in prompts]
        while engine.has_work:
            engine.step()
        found = []
        for request in requests:
            for completion in request.completions:
                with torch.no_grad():
                    logits = exact(torch.tensor([request.prompt_ids + completion.ids])).logits[0]
                log_probs = logits[len(request.prompt_ids) - 1 : -1].log_softmax(-1)
                expected = log_probs.gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
                found.append((torch.tensor(completion.log_probs) - expected).abs())
        errors.append(torch.cat(found).mean())
    assert errors[0] <= 1.2 * errors[1]


FILTERS = {
    "plain": SamplingParams(temperature=0.9),
    "greedy": SamplingParams(temperature=0.0),
    "top-k": SamplingParams(top_k=50, temperature=0.8),
    "top-k and top-p": SamplingParams(top_k=50, top_p=0.85, temperature=0.8),
    "nucleus": SamplingParams(top_p=0.9),
    "min-p": SamplingParams(min_p=0.05),
    "all": SamplingParams(top_k=20, top_p=0.95, min_p=0.02, temperature=1.3),
    "large top-k": SamplingParams(top_k=1000, top_p=0.9),
    "one": SamplingParams(top_k=1),
}
ROWS = 500


def native_sampler(vocab_size: int, rows: int) -> NativeDecoder:
    """One without a network."""
    sampler = object.__new__(NativeDecoder)
    sampler._library, sampler.vocab_size = library(), vocab_size
    sampler._stride = -(-vocab_size // 32) * 32
    sampler.logits_BV = torch.zeros(rows, sampler._stride)[:, :vocab_size]
    return sampler


@pytest.mark.parametrize("vocab_size", [97, 3200])
@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0], ids="spread {}".format)
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("name", FILTERS)
def test_the_same_random_numbers_draw_the_same_tokens_as_in_torch(name, tied, spread, vocab_size):
    """In all but one of a hundred rows, where rounding chooses the neighbour or keeps one token more in a nucleus."""
    torch.manual_seed(0)
    logits = torch.randn(ROWS, vocab_size) * spread
    if tied:  # a handful of values: equals at every border
        logits = (logits * 2).round() / 2
    params, numbers = [FILTERS[name]] * ROWS, uniforms(3, 0, 0, ROWS)
    expected = sample(logits, SamplingTensors.of(params, vocab_size, "cpu"), torch.from_numpy(numbers), log_probs=True)
    sampler, rows = native_sampler(vocab_size, ROWS), draws_of(params, vocab_size)
    sampler.logits_BV[:], rows["uniform"] = logits, numbers
    sampler.draw(rows, True)
    same = rows["id"] == expected.ids.numpy()
    assert np.abs(rows["log_prob"] - expected.log_probs.double().numpy())[same].max() <= 1e-5
    same &= np.abs(rows["behaviour_log_prob"] - expected.behaviour_log_probs.double().numpy()) <= 1e-5
    assert same.mean() >= 0.99


@pytest.mark.parametrize("name", SETTINGS)
def test_frequencies_fit_the_exact_distribution(name):
    p, V = SETTINGS[name], len(LOGITS)
    seen = torch.zeros(DRAWS, V, dtype=torch.bool)
    seen[:, list(SEEN)] = True
    sampler, rows = native_sampler(V, DRAWS), draws_of([p] * DRAWS, V)
    sampler.logits_BV[:], rows["uniform"] = LOGITS, uniforms(seed=7, sequence=0, start=0, count=DRAWS)
    adjusted = adjust(sampler.logits_BV, SamplingTensors.of([p] * DRAWS, V, "cpu"), seen, None)
    sampler.draw(rows, True, adjusted)
    expected = exact_distribution(LOGITS.double().tolist(), p, SEEN)
    statistic, freedom = chi_square(np.bincount(rows["id"], minlength=V), expected)
    assert statistic <= largest_statistic(freedom)
    assert np.abs(rows["behaviour_log_prob"] - np.log(expected[rows["id"]])).max() <= 1e-5
    full = (LOGITS.double() / p.temperature).log_softmax(0).numpy()[rows["id"]]
    assert np.abs(rows["log_prob"] - full).max() <= 1e-5


@pytest.mark.parametrize("name", MIXED)
def test_a_large_vocabulary_is_sampled_by_the_definition_whatever_way_is_taken(name):
    torch.manual_seed(0)
    logits, p, count = torch.randn(3200) * 2, MIXED[name], DRAWS // 4
    sampler, rows = native_sampler(3200, count), draws_of([p] * count, 3200)
    sampler.logits_BV[:], rows["uniform"] = logits, uniforms(seed=3, sequence=0, start=0, count=count)
    sampler.draw(rows, True)
    expected = exact_distribution(logits.double().tolist(), p)
    assert (expected[rows["id"]] > 0).all()
    statistic, freedom = chi_square(*in_groups(rows["id"], expected))
    assert statistic <= largest_statistic(freedom)
    assert np.abs(rows["behaviour_log_prob"] - np.log(expected[rows["id"]])).max() <= 1e-5


def test_adjusted_logits_are_sampled_from_and_the_models_own_give_the_log_probs():
    logits, bias = torch.randn(2, 97), torch.zeros(2, 97)
    bias[0, 5] = 100.0
    params = [SamplingParams(temperature=0.7)] * 2
    sampler, rows = native_sampler(97, 2), draws_of(params, 97)
    sampler.logits_BV[:], rows["uniform"] = logits, 0.4
    sampler.draw(rows, True, logits + bias)
    expected = sample(
        logits, SamplingTensors.of(params, 97, "cpu"), torch.tensor([0.4, 0.4]), None, bias, log_probs=True
    )
    assert rows["id"].tolist() == expected.ids.tolist() == [5, int(rows["id"][1])]
    assert torch.allclose(torch.from_numpy(rows["log_prob"]).float(), expected.log_probs, atol=1e-5)
    assert torch.allclose(torch.from_numpy(rows["behaviour_log_prob"]).float(), expected.behaviour_log_probs, atol=1e-5)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-32])
def test_the_ends_of_the_unit_interval_never_draw_an_impossible_token(uniform):
    sampler, rows = native_sampler(97, 1), draws_of([SamplingParams()], 97)
    sampler.logits_BV[:], rows["uniform"] = -math.inf, uniform
    sampler.logits_BV[0, [3, 70]] = torch.tensor([0.0, 1.0])
    sampler.draw(rows, True)
    assert rows["id"] == (3 if uniform == 0.0 else 70)


@pytest.mark.parametrize("logit", [math.nan, math.inf])
def test_a_network_that_has_diverged_gives_a_token_of_the_vocabulary(logit):
    params = [*FILTERS.values()]
    sampler, rows = native_sampler(97, len(params)), draws_of(params, 97)
    sampler.logits_BV[:], rows["uniform"] = logit, 0.5
    sampler.draw(rows, True)
    assert ((rows["id"] >= 0) & (rows["id"] < 97)).all()
    assert np.isnan(rows["log_prob"]).all()


@pytest.mark.parametrize("reason", [{"CXX": "no-such-compiler"}, {"CXX": "false"}, {"MINIGPT_NATIVE": "0"}], ids=str)
def test_without_a_compiler_the_engine_computes_with_torch(tmp_path, reason):
    code = (
        "from minigpt.generation.engine import Engine\n"
        "from minigpt.generation.generate import generate\n"
        "from minigpt.generation.sampling import SamplingParams\n"
        "from minigpt.model.model_minigpt import MiniGPT, MiniGPTConfig\n"
        "model = MiniGPT(MiniGPTConfig(vocab_size=97, hidden_size=64, num_hidden_layers=1, num_attention_heads=4))\n"
        "assert Engine(model)._native is None\n"
        "print(len(generate(model, [[1, 2]], SamplingParams(max_new_tokens=9))[0].ids))\n"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), **reason}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert run.stdout == "9\n", run.stderr
    assert not list(tmp_path.rglob("*.so"))


ARCHITECTURES = {}  # what the compiler may be told on this machine, and W then
if platform.machine() == "x86_64":
    CAN = set(Path("/proc/cpuinfo").read_text().split())
    ARCHITECTURES["-march=x86-64"] = 4
    if {"avx2", "fma", "bmi2"} <= CAN:
        ARCHITECTURES["-march=x86-64-v3"] = 8
    if "amx_bf16" in CAN:
        ARCHITECTURES["-mno-amx-bf16"] = 16


@pytest.mark.parametrize(("architecture", "width"), ARCHITECTURES.items())
def test_the_compiled_code_is_right_with_vectors_of_every_width(tmp_path, architecture, width):
    """The kernels' own tests again, compiled for older machines than this one may be."""
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "g++")} "$@" {architecture}\n')
    compiler.chmod(0o755)
    program = (
        "import sys, pytest\n"
        "from minigpt.generation.native import vector\n"
        f"assert vector() == {width}, vector()\n"
        "sys.exit(pytest.main(sys.argv[1:]))"
    )
    tests = Path(__file__).parents[1]
    files = [__file__, str(tests / "model" / "test_attention.py"), str(tests / "model" / "test_cross_entropy.py")]
    done = subprocess.run(
        [sys.executable, "-c", program, "-qx", "-k", "not every_width and not without_a_compiler", *files],
        env={**os.environ, "CXX": str(compiler), "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
