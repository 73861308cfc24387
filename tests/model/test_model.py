"""The network: packing, padding, masks and caches change how a loss is computed, never what it is."""

import math

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F

from minigpt.dataset.shards import Row, collate
from minigpt.model.attention import boundaries
from minigpt.model.kv_cache import KVCache
from minigpt.model.model_minigpt import MiniGPT, MiniGPTConfig

V = 300
DOCUMENTS = [11, 3, 17, 1, 9, 7]  # tokens of each


def small_model(dtype=torch.float32, seed=0, **shape) -> MiniGPT:
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, **shape}
    model = MiniGPT(MiniGPTConfig(vocab_size=V, **shape))
    for parameter in model.parameters():  # at its small initial values attention hardly matters
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.to(dtype)


def documents(seed=0) -> list[tuple[list[int], list[int]]]:
    """(ids, weight codes) of each document."""
    rng = np.random.default_rng(seed)
    return [(rng.integers(1, V, n).tolist(), rng.integers(0, 3, n).tolist()) for n in DOCUMENTS]


def packed_row(chosen, length: int) -> Row:
    ids = [i for document, _ in chosen for i in document]
    codes = [c for _, document in chosen for c in document]
    padding = [0] * (length - len(ids))
    table = np.array([0.0, 1.0, 10.0], dtype=np.float32)
    lengths = np.array([len(document) for document, _ in chosen], dtype=np.int32)
    return Row(np.array(ids + padding, dtype=np.uint16), lengths, np.array(codes + padding, dtype=np.uint8), table)


def tensors(rows: list[Row]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in collate(rows).items()}


def unpadded_batches():
    """Each document alone in a batch of exactly its length: nothing to mask, plain causal attention."""
    return [
        {name: t for name, t in tensors([packed_row([d], len(d[0]))]).items() if name != "document_ids"}
        for d in documents()
    ]


def packed_batches():
    """Three documents in each of two rows; the second row ends in padding."""
    docs = documents()
    return [tensors([packed_row(docs[:3], 32), packed_row(docs[3:], 32)])]


def padded_batches():
    """Every document in a row of its own, padded to the longest and beyond."""
    return [tensors([packed_row([d], 32) for d in documents()])]


def loss_and_gradients(model, batches):
    """Weighted sum over all batches, and the gradient of every parameter by name."""
    model.zero_grad()
    loss = sum(model(**batch).loss_sum for batch in batches)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def largest_difference(found, expected) -> tuple[float, float]:
    """Relative differences: of the loss, and of the worst gradient tensor."""
    loss = abs(found[0] - expected[0]) / abs(expected[0])
    gradients = [(found[1][n].double() - g.double()).norm() / g.double().norm() for n, g in expected[1].items()]
    return float(loss), float(max(gradients))


@pytest.mark.parametrize("backend", [None, "varlen", "sdpa", "reference"])
@pytest.mark.parametrize("layout", [packed_batches, padded_batches])
@pytest.mark.parametrize(
    ("dtype", "loss_tolerance", "gradient_tolerance"),
    [(torch.float32, 1e-6, 1e-5), (torch.float64, 1e-12, 1e-12)],
    ids=["float32", "float64"],
)
def test_packed_and_padded_rows_have_the_loss_and_gradient_of_documents_alone(
    dtype, loss_tolerance, gradient_tolerance, layout, backend
):
    model = small_model(dtype)
    expected = loss_and_gradients(model, unpadded_batches())
    model.attention_backend = backend
    loss, gradient = largest_difference(loss_and_gradients(model, layout()), expected)
    assert loss <= loss_tolerance
    assert gradient <= gradient_tolerance


@pytest.mark.parametrize("backend", ["varlen", "sdpa"])
@pytest.mark.parametrize("layout", [packed_batches, padded_batches])
def test_bf16_is_as_near_to_float64_packed_as_alone(layout, backend):
    """Root mean square over ten models, so that luck in rounding one of them does not decide."""
    ours, alone = [], []
    for seed in range(10):
        model = small_model(torch.bfloat16, seed)
        exact = loss_and_gradients(small_model(torch.bfloat16, seed).double(), unpadded_batches())
        alone.append(largest_difference(loss_and_gradients(model, unpadded_batches()), exact))
        model.attention_backend = backend
        ours.append(largest_difference(loss_and_gradients(model, layout()), exact))
    for error, yardstick in zip(np.square(ours).mean(0) ** 0.5, np.square(alone).mean(0) ** 0.5, strict=True):
        assert error <= 1.5 * yardstick


@pytest.mark.parametrize("backend", ["varlen", "sdpa"])
def test_nothing_leaks_from_one_document_into_another(backend):
    """Document 0 of the row is replaced: logits of the others, and the gradients of a loss on them, keep every bit."""
    model = small_model(torch.float32)
    model.attention_backend = backend
    docs = documents()[:3]
    first, length = len(docs[0][0]), 32
    silent = (docs[0][0], [0] * first)
    replaced = ([(i * 7 + 1) % V for i in silent[0]], silent[1])
    results = []
    for beginning in (silent, replaced):
        batch = tensors([packed_row([beginning, *docs[1:]], length)])
        seen = {name: batch[name] for name in ("input_ids", "position_ids", "document_ids")}
        results.append((model(**seen).logits[:, first:], loss_and_gradients(model, [batch])))
    (logits, (loss, gradients)), (other_logits, (other_loss, other_gradients)) = results
    assert torch.equal(logits, other_logits)
    assert torch.equal(loss, other_loss)
    embedding = "model.embed_tokens.weight"  # tied: its rows get the output layer's gradient too, the same one
    assert all(torch.equal(g, other_gradients[n]) for n, g in gradients.items() if n != embedding)
    assert torch.equal(gradients[embedding], other_gradients[embedding])


def test_the_loss_is_the_weighted_sum_of_what_pytorch_computes_from_the_logits():
    model = small_model(torch.float64)
    (batch,) = packed_batches()
    loss = model(**batch).loss_sum
    seen = {name: batch[name] for name in ("input_ids", "position_ids", "document_ids")}
    logits = model(**seen).logits
    per_token = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none", ignore_index=-100)
    assert torch.allclose(loss, (per_token * batch["weights"].flatten()).sum(), rtol=1e-13)
    assert (batch["weights"] == 10).any(), "the example has weights that are not 1"


def test_a_batch_without_labels_gives_zero_loss_and_zero_gradients():
    model = small_model()
    (batch,) = packed_batches()
    batch["labels"][:], batch["weights"][:] = -100, 0
    loss, gradients = loss_and_gradients(model, [batch])
    assert loss.item() == 0
    assert len(gradients) == len(list(model.parameters()))
    assert not any(g.any() for g in gradients.values())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_a_new_model_knows_nothing(tied, qk_norm):
    """Loss ln(vocabulary) at step 0: a model that starts elsewhere is initialised wrongly."""
    torch.manual_seed(0)
    model = MiniGPT(MiniGPTConfig(vocab_size=6400, num_hidden_layers=2, tie_word_embeddings=tied, qk_norm=qk_norm))
    ids = torch.randint(0, 6400, (4, 65))
    loss = model(ids[:, :-1], labels=ids[:, 1:]).loss_sum.item() / (4 * 64)
    assert loss == pytest.approx(math.log(6400), rel=0.02)


def test_tied_embeddings_are_one_parameter_with_the_gradient_of_both_uses():
    model = small_model(torch.float64)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    untied = small_model(torch.float64, tie_word_embeddings=False)
    untied.load_state_dict({**model.state_dict(), "lm_head.weight": model.lm_head.weight})
    assert untied.num_parameters() == model.num_parameters() + V * 32
    tied_loss, tied = loss_and_gradients(model, packed_batches())
    loss, apart = loss_and_gradients(untied, packed_batches())
    assert torch.equal(loss, tied_loss)
    name = "model.embed_tokens.weight"
    assert torch.allclose(tied[name], apart[name] + apart["lm_head.weight"], rtol=1e-12)


def test_a_state_dict_with_a_missing_or_unknown_key_is_refused():
    model = small_model()
    state = model.state_dict()
    del state["model.norm.weight"]
    with pytest.raises(RuntimeError, match=r"model\.norm\.weight"):
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match="surplus"):
        model.load_state_dict({**model.state_dict(), "surplus": torch.ones(1)})
    del (state := dict(model.state_dict()))["lm_head.weight"]
    missing, unexpected = model.load_state_dict(state)  # tied: it is there under its other name
    assert not missing
    assert not unexpected


def test_gradient_checkpointing_changes_no_bit():
    model = small_model()
    plain = loss_and_gradients(model, packed_batches())
    model.model.gradient_checkpointing = True
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    recomputed = loss_and_gradients(model, packed_batches())
    assert len(calls) == 2, "forward, and again in the backward pass"
    assert torch.equal(plain[0], recomputed[0])
    assert all(torch.equal(g, recomputed[1][n]) for n, g in plain[1].items())


def test_a_cache_gives_the_logits_of_the_whole_sequence_for_ragged_rows():
    """Two rows of which one is 6 tokens ahead, fed in pieces of 4, 1 and 3; what is stale behind them is noise."""
    model = small_model(torch.float64)
    ids = torch.randint(0, V, (2, 14), generator=torch.Generator().manual_seed(0))
    whole = model(ids).logits
    cache = KVCache(model.config, 2, 20, torch.float64)
    model(ids[1:2, :6].expand(2, 6), kv_cache=cache)  # row 0 is garbage now, overwritten from position 0 on
    positions, logits = torch.tensor([0, 6]), []
    for size in (4, 1, 3):
        index = positions[:, None] + torch.arange(size)
        logits.append(model(ids.gather(1, index), position_ids=index, kv_cache=cache).logits)
        positions = positions + size
    logits = torch.cat(logits, dim=1)
    assert torch.allclose(logits[0], whole[0, :8], rtol=0, atol=1e-12)
    assert torch.allclose(logits[1], whole[1, 6:14], rtol=0, atol=1e-12)


@pytest.mark.slow
def test_long_rows_compile_once_and_mean_the_same():
    """1,100 tokens a row (document attention) under torch.compile: the eager numbers, and no graph for new lengths."""
    torch._dynamo.reset()
    model = small_model(num_hidden_layers=1)
    graphs = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    for lengths in ((700, 399), (1000, 50, 40)):
        row = packed_row([([1 + (7 * i) % (V - 1) for i in range(n)], [1] * n) for n in lengths], 1100)
        batch = tensors([row])
        eager = loss_and_gradients(model, [batch])
        edges = boundaries(batch["document_ids"])
        batch["cu_seqlens"] = F.pad(edges, (0, 8 - len(edges)), value=1100)  # as the trainer gives them: one shape
        model.zero_grad()
        loss = compiled(**batch).loss_sum
        loss.backward()
        ours = loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}
        loss_difference, gradient_difference = largest_difference(ours, eager)
        assert loss_difference <= 1e-6
        assert gradient_difference <= 1e-5
    assert graphs.frame_count == 1


def test_arguments_that_would_mean_something_else_are_refused():
    model = MiniGPT(MiniGPTConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    ids = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="reduction is 'mean'"):
        model(ids, labels=ids, reduction="mean")
    with pytest.raises(ValueError, match="without document_ids"):
        model(ids, cu_seqlens=torch.tensor([0, 2, 4], dtype=torch.int32))
