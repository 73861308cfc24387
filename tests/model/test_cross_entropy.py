"""The chunked cross-entropy and log-probabilities against PyTorch's in float64: values and gradients, weights, ignored
labels, garbage."""

import pytest
import torch
import torch.nn.functional as F

from minigpt.model import cross_entropy
from minigpt.model.cross_entropy import linear_cross_entropy, linear_log_probs, linear_log_probs_and_entropy

N, E, V = 37, 16, 50


WAYS = ["8 rows a chunk", "one chunk", "logits computed again", "without a compiler", "as on a GPU"]


@pytest.fixture(params=WAYS, autouse=True)
def way(request, monkeypatch):
    """Small chunks, the last of them not full, and all tokens at once; logits that are too many to be kept; by torch
    alone; tokens without a label too."""
    if "8 rows a chunk" in request.param or "logits computed again" in request.param:
        monkeypatch.setattr(cross_entropy, "_CHUNK_ELEMENTS", {"cpu": V * 8, "cuda": V * 8})
    if "logits computed again" in request.param:
        monkeypatch.setattr(cross_entropy, "_KEPT_ELEMENTS", N * V - 1)
    if request.param == "without a compiler":
        monkeypatch.setattr(cross_entropy, "load_native", lambda source: None)
    if "as on a GPU" in request.param:
        monkeypatch.setattr(cross_entropy, "_on_cpu", lambda x: False)
        monkeypatch.setattr(cross_entropy, "load_native", lambda source: None)


def example(dtype=torch.float64):
    """Hidden states, output layer, labels (a third of them absent) and weights (0, 1 and 10)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, E, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, E, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[::3] = -100
    weights = torch.tensor([0.0, 1.0, 10.0])[torch.randint(0, 3, (N,), generator=generator)]
    return x, weight, labels, weights


def expected(x, weight, labels, weights):
    x, weight = (t.detach().double().requires_grad_() for t in (x, weight))
    per_token = F.cross_entropy(x @ weight.T, labels, reduction="none", ignore_index=-100)
    loss = (per_token * weights.double()).sum()
    return [loss.detach(), *torch.autograd.grad(3.0 * loss, (x, weight))]


def found(x, weight, labels, weights):
    loss = linear_cross_entropy(x, weight, labels, weights)
    return [loss.detach(), *torch.autograd.grad(3.0 * loss, (x, weight))]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str
)
def test_value_and_gradients_are_those_of_pytorch_in_float64(dtype, tolerance):
    batch = example(dtype)
    for ours, reference in zip(found(*batch), expected(*batch), strict=True):
        assert ((ours.double() - reference).norm() / reference.norm()).item() < tolerance


def test_the_loss_of_bf16_states_is_added_up_in_float32():
    loss = linear_cross_entropy(*example(torch.bfloat16))
    assert loss.dtype == torch.float32
    assert linear_cross_entropy(*example(torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
def test_what_stands_at_positions_without_weight_changes_nothing(garbage):
    x, weight, labels, weights = example(torch.float32)
    clean = found(x, weight, labels, weights)
    silent = (labels < 0) | (weights == 0)
    x.data[silent] = garbage
    weights[labels < 0] = garbage  # a weight where there is no label, too
    dirty = found(x, weight, labels, weights)
    assert torch.equal(clean[0], dirty[0])
    assert torch.equal(clean[2], dirty[2])
    assert torch.equal(clean[1], dirty[1])
    assert not dirty[1][silent].any(), "exactly zero gradient"


@pytest.mark.parametrize("all_masked_by", ["labels", "weights"])
def test_a_batch_without_any_label_has_loss_0_and_gradients_of_zeros(all_masked_by):
    x, weight, labels, weights = example()
    if all_masked_by == "labels":
        labels[:] = -100
    else:
        weights[:] = 0
    loss, grad_x, grad_weight = found(x, weight, labels, weights)
    assert loss.item() == 0
    assert grad_x.shape == x.shape
    assert not grad_x.any()
    assert grad_weight.shape == weight.shape
    assert not grad_weight.any()


def test_a_nan_at_a_labelled_position_is_not_hidden():
    x, weight, labels, weights = example()
    position = int(((labels >= 0) & (weights > 0)).nonzero()[0])
    x.data[position] = float("nan")
    assert linear_cross_entropy(x, weight, labels, weights).isnan()


def test_frozen_inputs_get_no_gradient_and_the_other_keeps_its_own():
    x, weight, labels, weights = example()
    _, grad_x, grad_weight = found(x, weight, labels, weights)
    linear_cross_entropy(x, weight.detach(), labels, weights).backward()
    assert torch.allclose(3.0 * x.grad, grad_x)
    linear_cross_entropy(x.detach(), weight, labels, weights).backward()
    assert torch.allclose(3.0 * weight.grad, grad_weight)
    with torch.no_grad():
        assert torch.isfinite(linear_cross_entropy(x, weight, labels, weights))


# ---------------------------------------------------------------------------------------------------- log-probabilities


def log_prob_results(function, x, weight, labels, upstream):
    """Log-probabilities of a function of (x, weight, labels), and its gradients under a given upstream gradient."""
    log_probs = function(x, weight, labels)
    return [log_probs.detach(), *torch.autograd.grad(log_probs, (x, weight), upstream.to(log_probs.dtype))]


def plain_log_probs(x, weight, labels):
    """By PyTorch's log_softmax over all logits."""
    found = (x @ weight.T).log_softmax(-1).gather(1, labels.clamp_min(0)[:, None])[:, 0]
    return torch.where(labels >= 0, found, 0.0)


@pytest.fixture
def upstream() -> torch.Tensor:
    """Any gradient from above, of both signs, another one for every token."""
    return torch.randn(N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str
)
def test_log_probs_and_their_gradients_are_those_of_pytorch_in_float64(dtype, tolerance, upstream):
    x, weight, labels, _ = example(dtype)
    ours = log_prob_results(linear_log_probs, x, weight, labels, upstream)
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    for found, reference in zip(ours, log_prob_results(plain_log_probs, *exact, labels, upstream), strict=True):
        assert ((found.double() - reference).norm() / reference.norm()).item() < tolerance


def test_log_probs_of_bf16_states_are_float32():
    x, weight, labels, _ = example(torch.bfloat16)
    assert linear_log_probs(x, weight, labels).dtype == torch.float32


@pytest.mark.parametrize("frozen", [False, True], ids=["all trained", "weight frozen"])
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
def test_a_position_without_label_has_log_prob_0_and_no_gradient_whatever_it_holds(garbage, frozen, upstream):
    x, weight, labels, _ = example(torch.float32)
    weight = weight.detach() if frozen else weight
    trained = (x,) if frozen else (x, weight)

    def results():
        log_probs = linear_log_probs(x, weight, labels)
        return [log_probs.detach(), *torch.autograd.grad(log_probs, trained, upstream.float())]

    clean = results()
    silent = labels < 0
    x.data[silent] = garbage
    upstream[silent] = garbage
    dirty = results()
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert not dirty[0][silent].any()
    assert not dirty[1][silent].any(), "exactly zero gradient"


def test_log_probs_with_a_frozen_part_give_the_other_its_gradient(upstream):
    x, weight, labels, _ = example()
    _, grad_x, grad_weight = log_prob_results(linear_log_probs, x, weight, labels, upstream)
    linear_log_probs(x, weight.detach(), labels).backward(upstream)
    assert torch.allclose(x.grad, grad_x, rtol=1e-12)
    linear_log_probs(x.detach(), weight, labels).backward(upstream)
    assert torch.allclose(weight.grad, grad_weight, rtol=1e-12)


def test_their_sum_is_the_loss():
    x, weight, labels, _ = example()
    loss = linear_cross_entropy(x, weight, labels, torch.ones(N))
    assert linear_log_probs(x, weight, labels).sum().item() == pytest.approx(-loss.item(), rel=1e-14)


# ------------------------------------------------------------------------------------------- temperature and entropy


def plain_log_probs_and_entropy(x, weight, labels, temperature):
    """By PyTorch's log_softmax over all logits; the entropy as its definition says."""
    log_p = (x @ weight.T / temperature).log_softmax(-1)
    chosen = log_p.gather(1, labels.clamp_min(0)[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    return tuple(torch.where(labels >= 0, value, 0.0) for value in (chosen, entropy))


def with_gradients(function, x, weight, labels, temperature, upstreams):
    """Both results, and their gradients together and each alone under gradients from above."""
    results = function(x, weight, labels, temperature)
    above = [u.to(r.dtype) for u, r in zip(upstreams, results, strict=True)]
    together = torch.autograd.grad(results, (x, weight), above, retain_graph=True)
    alone = [torch.autograd.grad(r, (x, weight), u, retain_graph=True) for r, u in zip(results, above, strict=True)]
    return [*(r.detach() for r in results), *together, *alone[0], *alone[1]]


@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.5])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 5e-6), (torch.bfloat16, 4e-2)], ids=str
)
def test_log_probs_and_entropy_at_a_temperature_are_those_of_pytorch_in_float64(dtype, tolerance, temperature):
    x, weight, labels, _ = example(dtype)
    generator = torch.Generator().manual_seed(1)
    upstreams = [torch.randn(N, generator=generator, dtype=torch.float64) for _ in range(2)]
    ours = with_gradients(linear_log_probs_and_entropy, x, weight, labels, temperature, upstreams)
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    theirs = with_gradients(plain_log_probs_and_entropy, *exact, labels, temperature, upstreams)
    for found, reference in zip(ours, theirs, strict=True):
        assert ((found.double() - reference).norm() / reference.norm()).item() < tolerance


@pytest.mark.parametrize("peak", [10.0, 17.0, 20.0])
def test_what_a_nearly_sure_token_lacks_is_not_lost_beside_it(peak, request):
    """Of 6,400 entries the others weigh 0.2 to 1e-5 together, and each of them less than float32 sees beside a 1."""
    generator = torch.Generator().manual_seed(0)
    x, weight, labels = torch.eye(2, E), 1e-3 * torch.randn(6400, E, generator=generator), torch.tensor([17, 4242])
    weight[labels, [0, 1]] = peak
    ours = linear_log_probs_and_entropy(x, weight, labels)
    theirs = plain_log_probs_and_entropy(x.double(), weight.double(), labels, 1.0)
    relative, absolute = (1e-4, 0) if request.node.callspec.params["way"] in WAYS[:3] else (0, 4e-6)
    for found, reference in zip(ours, theirs, strict=True):
        assert torch.allclose(found.double(), reference, rtol=relative, atol=absolute)


@pytest.mark.parametrize("temperature", [0.3, 2.5])
@pytest.mark.parametrize("frozen", [False, True], ids=["all trained", "weight frozen"])
def test_log_probs_alone_take_the_temperature_too(temperature, frozen, upstream):
    x, weight, labels, _ = example()
    weight = weight.detach() if frozen else weight
    trained = (x,) if frozen else (x, weight)
    both = [
        linear_log_probs(x, weight, labels, temperature),
        plain_log_probs_and_entropy(x, weight, labels, temperature)[0],
    ]
    assert torch.allclose(*both, rtol=1e-13)
    gradients = [torch.autograd.grad(log_probs, trained, upstream) for log_probs in both]
    assert all(torch.allclose(ours, theirs, rtol=1e-11) for ours, theirs in zip(*gradients, strict=True))


def test_asking_for_the_entropy_changes_no_bit_of_the_log_probs():
    x, weight, labels, _ = example(torch.float32)
    assert torch.equal(
        linear_log_probs(x, weight, labels, 0.7), linear_log_probs_and_entropy(x, weight, labels, 0.7)[0]
    )


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
def test_entropy_without_a_label_is_0_and_has_no_gradient_whatever_stands_there(garbage, upstream):
    x, weight, labels, _ = example(torch.float32)
    silent = labels < 0

    def results():
        found = linear_log_probs_and_entropy(x, weight, labels, 0.7)
        return [t.detach() for t in found] + list(torch.autograd.grad(found, (x, weight), [upstream.float()] * 2))

    clean = results()
    x.data[silent] = garbage
    upstream[silent] = garbage
    dirty = results()
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert not dirty[1][silent].any()
    assert not dirty[2][silent].any(), "exactly zero gradient"


@pytest.mark.parametrize("way", ["as on a GPU", "as on a GPU, logits computed again"], indirect=True)
@pytest.mark.parametrize("frozen", [False, True], ids=["all trained", "frozen output layer"])
@pytest.mark.parametrize("kind", ["loss", "log-probabilities", "entropy"])
def test_on_a_gpu_the_compiler_sees_all_of_it_and_computes_the_same(kind, frozen):
    """On a CPU it does not look inside. torch 2.11 made zeros of the gradients of a sum that was added up in place."""
    x, weight, labels, weights = example()
    if frozen:
        weight.requires_grad_(False)
    inputs = [t for t in (x, weight) if t.requires_grad]

    def scalar() -> torch.Tensor:
        if kind == "loss":
            return linear_cross_entropy(x, weight, labels, weights)
        if kind == "log-probabilities":
            return (weights * linear_log_probs(x, weight, labels, 0.7)).sum()
        return sum((weights * t).sum() for t in linear_log_probs_and_entropy(x, weight, labels, 0.7))

    torch._dynamo.reset()
    compiled = torch.compile(scalar, backend="aot_eager", fullgraph=True)
    for ours, plain in zip(torch.autograd.grad(compiled(), inputs), torch.autograd.grad(scalar(), inputs), strict=True):
        assert ours.any()
        assert torch.allclose(ours, plain, rtol=1e-12, atol=1e-14)
