"""Sampled frequencies against the exact distribution of each filter, computed the plain way, and the random streams."""

import ast
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import minigpt
from minigpt.generation.sampling import SamplingParams, SamplingTensors, draw, filter_logits, sample, uniforms

DRAWS = 20_000
LOGITS = torch.tensor([1.7, -0.3, 0.4, 2.1, -1.2, 0.4, 1.1, -2.5, 0.0, 1.9])


def exact_distribution(logits: list[float], p: SamplingParams, seen: set[int] = frozenset()) -> np.ndarray:
    """The definition, one token after the other in float64."""
    penalized = [
        (x / p.repetition_penalty if x > 0 else x * p.repetition_penalty) if i in seen else x
        for i, x in enumerate(logits)
    ]
    tempered = [x / p.temperature for x in penalized]
    order = sorted(range(len(tempered)), key=lambda i: -tempered[i])
    if p.top_k:
        order = [i for i in order if tempered[i] >= tempered[order[min(p.top_k, len(order)) - 1]]]
    total = sum(math.exp(tempered[i]) for i in order)
    nucleus, mass = [], 0.0
    for i in order:
        nucleus.append(i)
        mass += math.exp(tempered[i]) / total
        if mass >= p.top_p:
            break
    nucleus = [i for i in order if tempered[i] >= tempered[nucleus[-1]]]  # equals of the last one stay as well
    best = math.exp(tempered[order[0]])
    kept = [i for i in nucleus if math.exp(tempered[i]) >= p.min_p * best]
    probabilities = np.zeros(len(logits))
    probabilities[kept] = [math.exp(tempered[i]) for i in kept]
    return probabilities / probabilities.sum()


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> tuple[float, int]:
    """Pearson's statistic over the possible outcomes and its degrees of freedom."""
    possible = probabilities > 0
    assert counts[~possible].sum() == 0, "a token of probability 0 was drawn"
    expected = probabilities[possible] * counts.sum()
    return float(((counts[possible] - expected) ** 2 / expected).sum()), int(possible.sum()) - 1


def largest_statistic(freedom: int) -> float:
    """What the statistic exceeds with probability 1e-4 (Wilson-Hilferty)."""
    return freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3 if freedom else 0.0


def in_groups(ids: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts and probabilities of 20 groups of neighbouring tokens of about equal mass."""
    groups = np.minimum(np.floor(np.cumsum(probabilities) * 20 * (1 - 1e-9)).astype(int), 19)
    return np.bincount(groups[ids], minlength=20), np.bincount(groups, weights=probabilities, minlength=20)


SETTINGS = {
    "plain": SamplingParams(),
    "cold": SamplingParams(temperature=0.5),
    "hot": SamplingParams(temperature=3.0),
    "top-k": SamplingParams(top_k=4),
    "top-k of one": SamplingParams(top_k=1),
    "top-k larger than the vocabulary": SamplingParams(top_k=1000),
    "top-p": SamplingParams(top_p=0.7),
    "tiny top-p": SamplingParams(top_p=1e-6),
    "min-p": SamplingParams(min_p=0.2),
    "penalty": SamplingParams(repetition_penalty=1.8),
    "penalty below one": SamplingParams(repetition_penalty=0.6),
    "all": SamplingParams(temperature=1.3, top_k=6, top_p=0.9, min_p=0.1, repetition_penalty=1.2),
}
SEEN = {0, 1, 3}


@pytest.mark.parametrize("name", SETTINGS)
def test_frequencies_fit_the_exact_distribution(name):
    p = SETTINGS[name]
    rows = LOGITS.expand(DRAWS, -1)
    seen = torch.zeros(DRAWS, len(LOGITS), dtype=torch.bool)
    seen[:, list(SEEN)] = True
    numbers = torch.from_numpy(uniforms(seed=7, sequence=0, start=0, count=DRAWS))
    drawn = sample(rows, SamplingTensors.of([p] * DRAWS, len(LOGITS), "cpu"), numbers, seen, log_probs=True)
    expected = exact_distribution(LOGITS.double().tolist(), p, SEEN if p.repetition_penalty != 1 else set())
    statistic, freedom = chi_square(np.bincount(drawn.ids.numpy(), minlength=len(LOGITS)), expected)
    assert statistic <= largest_statistic(freedom)
    behaviour = torch.from_numpy(np.log(expected[drawn.ids.numpy()]))
    assert (drawn.behaviour_log_probs - behaviour).abs().max() <= 1e-5
    full = (LOGITS.double() / p.temperature).log_softmax(0)[drawn.ids]
    assert (drawn.log_probs - full).abs().max() <= 1e-5


def test_the_statistic_notices_a_wrong_distribution():
    wrong = exact_distribution(LOGITS.double().tolist(), SamplingParams(temperature=1.1))
    rows = LOGITS.expand(DRAWS, -1)
    drawn = draw(rows, torch.from_numpy(uniforms(7, 0, 0, DRAWS)))
    statistic, freedom = chi_square(np.bincount(drawn.numpy(), minlength=len(LOGITS)), wrong)
    assert statistic > 5 * freedom


def test_rows_of_one_batch_keep_their_own_settings():
    """All settings in one call give the kept sets that each gives alone."""
    names = list(SETTINGS)
    torch.manual_seed(0)
    logits = torch.randn(len(names), 1000) * 3  # more than the candidates that a nucleus is first looked for among
    together = filter_logits(logits, SamplingTensors.of([SETTINGS[n] for n in names], 1000, "cpu"))
    for row, name in enumerate(names):
        alone = filter_logits(logits[row : row + 1], SamplingTensors.of([SETTINGS[name]], 1000, "cpu"))
        assert torch.equal(together[row], alone[0]), name


@pytest.mark.parametrize("top_p", [0.5, 0.9, 0.999])
@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0])
def test_nucleus_is_the_definition_whether_small_or_nearly_the_whole_vocabulary(top_p, spread):
    torch.manual_seed(1)
    logits = torch.randn(3, 2000) * spread
    kept = filter_logits(logits, SamplingTensors.of([SamplingParams(top_p=top_p)] * 3, 2000, "cpu")).isfinite()
    for row in range(3):
        probabilities, order = logits[row].double().softmax(0).sort(descending=True)
        before = probabilities.cumsum(0) - probabilities  # mass of what is more probable
        expected = torch.zeros(2000, dtype=torch.bool)
        expected[order[before < top_p]] = True
        assert int((kept[row] ^ expected).sum()) <= 1  # the border token may fall either way by rounding
        assert kept[row].sum() >= 1


def test_equal_logits_at_the_border_all_stay():
    logits = torch.tensor([[1.0, 2.0, 1.0, 0.0, 1.0]])
    kept = filter_logits(logits, SamplingTensors.of([SamplingParams(top_k=2)], 5, "cpu")).isfinite()
    assert kept.tolist() == [[True, True, True, False, True]]


def test_greedy_rows_ignore_the_random_numbers_and_filters():
    params = SamplingTensors.of([SamplingParams(temperature=0, top_p=0.1), SamplingParams(temperature=50.0)], 10, "cpu")
    logits = LOGITS.expand(2, -1)
    drawn = [sample(logits, params, torch.tensor([u, u], dtype=torch.float64)).ids.tolist() for u in (0.0, 0.5, 0.99)]
    assert {ids[0] for ids in drawn} == {int(LOGITS.argmax())}
    assert len({ids[1] for ids in drawn}) == 3


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-32])
def test_the_ends_of_the_unit_interval_never_draw_an_impossible_token(uniform):
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 1.0, -math.inf]])
    token = int(draw(logits, torch.tensor([uniform], dtype=torch.float64)))
    assert token == (1 if uniform == 0.0 else 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_log_probs_are_computed_in_float32(dtype):
    logits = (torch.randn(4, 6400) * 5).to(dtype)
    drawn = sample(
        logits, SamplingTensors.of([SamplingParams()] * 4, 6400, "cpu"), torch.rand(4).double(), log_probs=True
    )
    expected = logits.double().log_softmax(1).gather(1, drawn.ids[:, None])[:, 0]
    assert (drawn.log_probs - expected).abs().max() <= 1e-5


def test_streams_are_addressable_uniform_and_independent():
    whole = uniforms(3, 5, 0, 4096)
    parts = np.concatenate([uniforms(3, 5, a, b - a) for a, b in ((0, 7), (7, 64), (64, 1001), (1001, 4096))])
    assert np.array_equal(whole, parts)
    assert whole.min() >= 0.0
    assert whole.max() < 1.0
    columns = np.stack([uniforms(seed, sequence, 0, 4096) for seed in (0, 1, 2**63) for sequence in (0, 1, 2)])
    assert np.abs(np.corrcoef(columns) - np.eye(9)).max() < 0.08  # 5 standard deviations of 1/sqrt(4096)
    assert np.abs(columns.mean(1) - 0.5).max() < 5 * math.sqrt(1 / 12 / 4096)
    neighbours = np.array([uniforms(0, sequence, 10, 1)[0] for sequence in range(2000)])
    assert abs(neighbours.mean() - 0.5) < 5 * math.sqrt(1 / 12 / 2000)
    assert len(set(neighbours)) > 1990


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1},
        {"temperature": math.nan},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"repetition_penalty": 1e-300},
        {"repetition_penalty": 1e300},
        {"max_new_tokens": 0},
        {"seed": -1},
        {"stop": ("",)},
    ],
    ids=str,
)
def test_parameters_that_mean_nothing_are_refused_by_name(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        SamplingParams(**bad)


# ----------------------------------------------------------------------------- few best tokens or the whole vocabulary

MIXED = {
    "small top-k": SamplingParams(top_k=50, top_p=0.85, temperature=0.8),
    "nucleus": SamplingParams(top_p=0.9),
    "everything": SamplingParams(top_k=20, top_p=0.95, min_p=0.02, temperature=1.3),
    "large top-k": SamplingParams(top_k=1000, top_p=0.9),
    "plain": SamplingParams(),
    "min-p": SamplingParams(min_p=0.05),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # bfloat16 logits have many equals
@pytest.mark.parametrize("name", MIXED)
def test_a_large_vocabulary_is_sampled_by_the_definition_whatever_way_is_taken(name, dtype):
    """Peaked, flat and tied logits; the frequencies of token groups of about equal mass, and every log-probability."""
    torch.manual_seed(0)
    logits = (torch.randn(1, 3200) * 2).to(dtype)
    p = MIXED[name]
    numbers = torch.from_numpy(uniforms(seed=3, sequence=0, start=0, count=DRAWS // 4))
    rows = logits.expand(len(numbers), -1)
    drawn = sample(rows, SamplingTensors.of([p] * len(numbers), 3200, "cpu"), numbers, log_probs=True)
    expected = exact_distribution(logits[0].double().tolist(), p)
    assert (expected[drawn.ids.numpy()] > 0).all()
    statistic, freedom = chi_square(*in_groups(drawn.ids.numpy(), expected))
    assert statistic <= largest_statistic(freedom)
    assert (drawn.behaviour_log_probs - torch.from_numpy(np.log(expected[drawn.ids.numpy()]))).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_draws_the_same_token_and_bits_whatever_the_settings_of_its_batch_mates(dtype):
    torch.manual_seed(1)
    settings = [*MIXED.values(), SamplingParams(temperature=0.0), SamplingParams(top_k=200)]
    for spread in (0.05, 3.0):
        logits = (torch.randn(len(settings), 3200) * spread).to(dtype)
        numbers = torch.from_numpy(uniforms(5, 0, 0, len(settings)))
        together = sample(logits, SamplingTensors.of(settings, 3200, "cpu"), numbers, log_probs=True)
        for row, p in enumerate(settings):
            mates = [p] * len(settings)  # the same number of rows, as `batch_invariant` has it
            alone = sample(logits, SamplingTensors.of(mates, 3200, "cpu"), numbers, log_probs=True)
            assert alone.ids[row] == together.ids[row]
            assert alone.log_probs[row] == together.log_probs[row]
            assert alone.behaviour_log_probs[row] == together.behaviour_log_probs[row]


def test_equal_logits_at_the_border_can_all_be_drawn_also_more_than_were_looked_at():
    logits = torch.zeros(1, 3200)
    logits[0, :40] = 1.0  # 40 equals at the border of a top-k of 3
    params = SamplingTensors.of([SamplingParams(top_k=3)] * 4000, 3200, "cpu")
    numbers = torch.from_numpy(uniforms(7, 0, 0, 4000))
    drawn = sample(logits.expand(4000, -1), params, numbers)
    assert set(drawn.ids.tolist()) == set(range(40))


@pytest.mark.parametrize("vocab_size", [97, 3200])
@pytest.mark.parametrize("logit", [math.nan, math.inf, -math.inf, 3e38])
def test_a_network_that_has_diverged_gives_a_token_of_the_vocabulary(logit, vocab_size):
    """3e38 is finite but its quotient by a temperature is not. Batch mates draw what they draw without it."""
    params = [*MIXED.values(), SamplingParams(top_p=0.7, temperature=0.5), SamplingParams(temperature=0.0)]
    if logit == 3e38:
        params = [replace(p, temperature=0.5) for p in params]
    torch.manual_seed(0)
    sound = torch.randn(len(params), vocab_size) * 3
    numbers = torch.from_numpy(uniforms(5, 0, 0, 2 * len(params)))
    broken = torch.full_like(sound, logit)
    broken[:, 1::2] = sound[:, 1::2] if logit == math.inf else broken[:, 1::2]
    settings = SamplingTensors.of(params * 2, vocab_size, "cpu")
    drawn = sample(torch.cat((broken, sound)), settings, numbers, log_probs=True)
    expected = sample(torch.cat((sound, sound)), settings, numbers, log_probs=True)
    count = len(params)
    assert ((drawn.ids >= 0) & (drawn.ids < vocab_size)).all()
    assert drawn.log_probs[:count].isnan().all()
    assert drawn.behaviour_log_probs[:count].isnan().all()
    assert torch.equal(drawn.ids[count:], expected.ids[count:])
    assert torch.equal(drawn.log_probs[count:], expected.log_probs[count:])
    assert torch.equal(drawn.behaviour_log_probs[count:], expected.behaviour_log_probs[count:])
    assert sample(broken, SamplingTensors.of(params, vocab_size, "cpu"), numbers[:count]).ids.tolist() == [0] * count


@pytest.mark.parametrize("p", [*MIXED.values(), SamplingParams(temperature=0.0)], ids=[*MIXED, "greedy"])
def test_a_token_without_a_number_is_never_drawn(p):
    torch.manual_seed(0)
    logits = (torch.randn(1, 97) * 3).expand(500, -1).clone()
    without = logits.clone()
    logits[:, ::3], without[:, ::3] = math.nan, -math.inf
    settings, numbers = SamplingTensors.of([p] * 500, 97, "cpu"), torch.from_numpy(uniforms(5, 0, 0, 500))
    drawn, expected = (sample(x, settings, numbers) for x in (logits, without))
    assert torch.equal(drawn.ids, expected.ids)
    assert (drawn.ids % 3 > 0).all()


def test_logit_bias_adds_to_logits_and_leaves_the_models_own_log_probs():
    bias = torch.zeros(DRAWS, len(LOGITS))
    bias[:, 2], bias[:, 3] = 2.0, -100.0
    numbers = torch.from_numpy(uniforms(9, 0, 0, DRAWS))
    params = SamplingTensors.of([SamplingParams(temperature=1.5)] * DRAWS, len(LOGITS), "cpu")
    drawn = sample(LOGITS.expand(DRAWS, -1), params, numbers, None, bias, log_probs=True)
    expected = exact_distribution((LOGITS + bias[0]).double().tolist(), SamplingParams(temperature=1.5))
    seen = np.bincount(drawn.ids.numpy(), minlength=len(LOGITS))
    possible = expected > 1e-9
    statistic, freedom = chi_square(seen[possible], expected[possible] / expected[possible].sum())
    assert statistic <= largest_statistic(freedom)
    own = (LOGITS.double() / 1.5).log_softmax(0)[drawn.ids]
    assert (drawn.log_probs - own).abs().max() <= 1e-5


def test_equals_are_drawn_in_the_same_order_however_many_candidates_the_batch_mates_need():
    logits = torch.linspace(-9, -5, 3200).repeat(8, 1)
    logits[:, torch.randperm(3200, generator=torch.Generator().manual_seed(0))[:40]] = 1.0
    numbers = torch.from_numpy(uniforms(5, 0, 0, 8))
    mine, mate = SamplingParams(top_k=50), SamplingParams(top_k=250)
    alone = sample(logits, SamplingTensors.of([mine] * 8, 3200, "cpu"), numbers)
    mixed = sample(logits, SamplingTensors.of([mine] * 7 + [mate], 3200, "cpu"), numbers)
    assert alone.ids[:7].tolist() == mixed.ids[:7].tolist()


# ------------------------------------------------------------------------------------------------------- the only place

SAMPLERS = {"multinomial", "Categorical", "gumbel_softmax"}  # of torch
DECODERS = {"Decoder", "NativeDecoder", "StaticDecoder"}  # of ours


def test_all_sampling_goes_through_the_engine():
    """Nobody but minigpt/generation draws tokens or drives a decoder."""
    package = Path(minigpt.__file__).parent
    outside = [f for f in package.rglob("*.py") if f.relative_to(package).parts[0] not in ("generation", "model")]
    assert len(outside) > 50
    for file in [*outside, *(package.parent / "data_prep").glob("*.py"), *(package.parent / "examples").glob("*.py")]:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        names = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        names |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        assert not names & (SAMPLERS | DECODERS), file
