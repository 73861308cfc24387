"""Attention: every backend is the formula in float64, and documents in one row do not know of each other."""

import itertools
import subprocess
import sys

import pytest
import torch

import minigpt.model.attention as attention_module
from minigpt.model.attention import (
    SOURCE,
    AttentionPattern,
    _flash,
    _takes_groups,
    attention,
    boundaries,
    cached_pattern,
    choose_backend,
    packed_pattern,
)
from minigpt.model.native import load_native

BACKENDS = ("varlen", "varlen without a compiler", "sdpa")
# Documents of two rows, in tokens: of one token, of many, and padding (-1) at the end of the second row.
DOCUMENT_LENGTHS = ((5, 1, 18), (11, 6))
T = 24


def document_ids(lengths=DOCUMENT_LENGTHS, row_length=T) -> torch.Tensor:
    """[B, T], documents numbered from 0 in each row, padding -1."""
    ids = torch.full((len(lengths), row_length), -1, dtype=torch.int32)
    for row, row_lengths in zip(ids, lengths, strict=True):
        start = 0
        for number, length in enumerate(row_lengths):
            row[start : start + length] = number
            start += length
    return ids


def random_qkv(dtype, heads=(4, 2), head_dim=8, row_length=T, rows=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, h, row_length, head_dim) for h in (heads[0], heads[1], heads[1])]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def formula(q, k, v, ids):
    """The definition, one query at a time in float64: softmax over the earlier keys of its own document."""
    groups = q.shape[1] // k.shape[1]
    out = []
    for b, h, t in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        seen = [s for s in range(t + 1) if ids[b, s] == ids[b, t]]
        scores = torch.stack([q[b, h, t] @ k[b, h // groups, s] for s in seen]) / q.shape[-1] ** 0.5
        out.append(scores.softmax(0) @ v[b, h // groups, seen])
    return torch.stack(out).view(q.shape)


def output_and_gradients(compute, tensors):
    out = compute(*tensors)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, tensors, upstream)]


@pytest.fixture
def backend(request, monkeypatch):
    name, _, restriction = request.param.partition(" without ")
    if restriction:
        without_compiler(monkeypatch)
    return name


def without_compiler(monkeypatch) -> None:
    monkeypatch.setattr("minigpt.model.attention.load_native", lambda source: None)


def relative_error(found, expected) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=["multi-head", "grouped", "multi-query"])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"], indirect=True)
def test_every_backend_is_the_formula_in_output_and_gradient(backend, heads):
    ids = document_ids()
    expected = output_and_gradients(lambda *qkv: formula(*qkv, ids), random_qkv(torch.float64, heads))
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        pattern = packed_pattern(ids, dtype, backend)
        found = output_and_gradients(lambda *qkv, p=pattern: attention(*qkv, p), random_qkv(dtype, heads))
        for name, ours, reference in zip(("output", "dq", "dk", "dv"), found, expected, strict=True):
            assert ours.dtype == dtype
            assert relative_error(ours, reference) < tolerance, (name, dtype)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_document_changes_nothing_not_even_a_bit(backend, dtype):
    """Everything of the middle document is replaced, by larger numbers too: the rest keeps its bits, also gradients."""
    lengths = ((5, 7, 12),)
    pattern = packed_pattern(document_ids(lengths), dtype, backend)
    others = [0, 1, 2, 3, 4, *range(12, 24)]

    def output_of_the_others(q, k, v):
        return attention(q, k, v, pattern)[:, :, others]

    first = output_and_gradients(output_of_the_others, random_qkv(dtype, rows=1))
    changed = random_qkv(dtype, rows=1)
    for x, noise in zip(changed, random_qkv(dtype, rows=1, seed=1), strict=True):
        x.data[:, :, 5:12] = 100 * noise.data[:, :, 5:12]
    second = output_and_gradients(output_of_the_others, changed)
    assert torch.equal(first[0], second[0])
    for a, b in zip(first[1:], second[1:], strict=True):
        assert torch.equal(a[:, :, others], b[:, :, others])
        assert not b[:, :, 5:12].any(), "what is not asked for has no gradient"


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"], indirect=True)
def test_the_future_is_not_seen(backend):
    pattern = packed_pattern(document_ids(((T,),)), torch.float32, backend)
    q, k, v = random_qkv(torch.float32, rows=1)
    before = attention(q, k, v, pattern)
    k.data[:, :, 15:], v.data[:, :, 15:] = 7.0, -7.0
    after = attention(q, k, v, pattern)
    assert torch.equal(before[:, :, :15], after[:, :, :15])
    assert not torch.equal(before[:, :, 15:], after[:, :, 15:])


def test_a_cache_shows_each_row_what_lies_up_to_its_own_position():
    """One new query a row at positions 3 and 20 of caches of 24: as the formula over the first 4 and 21 keys."""
    q, k, v = random_qkv(torch.float64)
    positions = torch.tensor([[3], [20]])
    out = attention(q[:, :, :1], k, v, cached_pattern(positions, T))
    for row, position in enumerate(positions.flatten().tolist()):
        length = position + 1
        query = torch.cat([torch.zeros(1, 4, position, 8, dtype=torch.float64), q[row : row + 1, :, :1]], dim=2)
        one_document = torch.zeros(1, length, dtype=torch.int32)
        expected = formula(query, k[row : row + 1, :, :length], v[row : row + 1, :, :length], one_document)
        assert torch.allclose(out[row, :, 0], expected[0, :, -1], rtol=0, atol=1e-14)


def test_boundaries_are_where_documents_and_rows_begin():
    edges = boundaries(document_ids())
    assert edges.tolist() == [0, 5, 6, 24, 35, 41, 48]
    assert edges.dtype == torch.int32


def test_repeated_boundaries_at_the_end_are_empty_documents():
    """Compiled training keeps their number fixed by repeating the last one."""
    ids = document_ids()
    edges = boundaries(ids)
    padded = torch.cat([edges, edges[-1:].repeat(5)])
    exact = attention(*random_qkv(torch.float32), AttentionPattern("varlen", cu_seqlens=edges, max_seqlen=T))
    same = attention(*random_qkv(torch.float32), AttentionPattern("varlen", cu_seqlens=padded, max_seqlen=T))
    assert torch.equal(exact, same)


def test_every_machine_takes_the_fastest_backend_that_it_has(monkeypatch):
    """Compiled code where it can be; else a mask in short rows, and no mask in long ones."""
    assert load_native(SOURCE) is not None, "the tests need a C++ compiler"
    assert {choose_backend("cpu", T, dtype) for T in (256, 4096) for dtype in (torch.float32, torch.bfloat16)} == {
        "varlen"
    }
    assert choose_backend("cpu", 1024, torch.float64) == "sdpa", "compiled code computes in float32"
    without_compiler(monkeypatch)
    assert choose_backend("cpu", 1024) == "sdpa"
    assert choose_backend("cpu", 1025) == "varlen"
    capabilities = {"cuda:0": (8, 0), "cuda:1": (7, 5), "cuda:2": (10, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[str(device)])
    assert [choose_backend(device, 256) for device in capabilities] == ["varlen", "sdpa", "varlen"]
    assert choose_backend("cuda:0", 256, torch.float32) == "sdpa", "flash kernels take no float32"


PEAK_OF_ONE_LONG_ROW = """
import sys, torch
from minigpt.model.attention import attention, choose_backend, packed_pattern
torch.set_num_threads(1)

def peak_mb():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024

def one_pass(T):
    ids = torch.arange(T)[None] // (T // 4)
    q, k, v = (torch.randn(1, h, T, 8, requires_grad=True) for h in (2, 1, 1))
    attention(q, k, v, packed_pattern(ids, torch.float32, choose_backend("cpu", T))).sum().backward()

one_pass(1032)
before = peak_mb()
one_pass(12000)
print(peak_mb() - before)
"""


def test_memory_of_a_long_row_is_not_quadratic():
    """12,000 tokens: a mask of bytes alone would be 144 MB, float32 scores of one head 576 MB."""
    done = subprocess.run([sys.executable, "-c", PEAK_OF_ONE_LONG_ROW], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 60


# Documents that fill panels, registers and tiles and do not, in rows of 121
MANY_LENGTHS = ((1, 7, 8, 9, 31, 32, 33), (64, 57), (15, 16, 17, 73), (121,))


@pytest.mark.parametrize("head_dim", [8, 32, 40, 64, 80, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_code_is_the_formula_whatever_divides(head_dim, dtype):
    """Documents and heads of many sizes, padding, several rows; against SDPA in float64."""
    ids, heads = document_ids(MANY_LENGTHS, 121), (6, 2)
    exact = random_qkv(torch.float64, heads, head_dim, 121, 4)
    expected = output_and_gradients(lambda *x: attention(*x, packed_pattern(ids, torch.float64, "sdpa")), exact)
    ours = random_qkv(dtype, heads, head_dim, 121, 4)
    found = output_and_gradients(lambda *x: attention(*x, packed_pattern(ids, dtype, "varlen")), ours)
    for name, one, reference in zip(("output", "dq", "dk", "dv"), found, expected, strict=True):
        assert relative_error(one, reference) < (1e-6 if dtype == torch.float32 else 6e-3), name


@pytest.mark.parametrize("spread", [1.0, 8.0], ids="spread {}".format)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (5, 1)], ids=["multi-head", "grouped", "multi-query"])
@pytest.mark.parametrize("head_dim", [32, 80])
def test_in_bfloat16_compiled_code_errs_no_more_than_torchs_flash_kernel(head_dim, heads, spread, monkeypatch):
    """From the float64 result of the same inputs, of which large ones let a query see a few keys only."""
    ids = document_ids(MANY_LENGTHS, 121)
    pattern = packed_pattern(ids, torch.bfloat16, "varlen")

    def inputs(dtype):
        q, k, v = random_qkv(torch.bfloat16, heads, head_dim, 121, 4)
        return [x.detach().to(dtype).requires_grad_() for x in (spread * q, k, v)]

    def in_bfloat16(*qkv):
        return attention(*qkv, pattern)

    exact = packed_pattern(ids, torch.float64, "sdpa")
    out, *_ = expected = output_and_gradients(lambda *x: attention(*x, exact), inputs(torch.float64))
    assert out.isfinite().all()
    ours = output_and_gradients(in_bfloat16, inputs(torch.bfloat16))
    without_compiler(monkeypatch)
    torchs = output_and_gradients(in_bfloat16, inputs(torch.bfloat16))
    for name, one, other, reference in zip(("output", "dq", "dk", "dv"), ours, torchs, expected, strict=True):
        assert relative_error(one, reference) < 1.1 * relative_error(other, reference), name
        assert relative_error(one, reference) < 8e-3, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_slice_of_a_larger_tensor_gives_the_bits_of_a_copy(dtype):
    """As queries, keys and values of one projection are; what lies between them is not read."""
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(121, 2, 4 + 2 + 2, 80, generator=generator).to(dtype)[:, 0]
    edges = torch.tensor([0, 1, 18, 50, 121], dtype=torch.int32)
    operator = torch.ops.minigpt.document_attention
    slices = [x.requires_grad_() for x in fused.split([4, 2, 2], dim=1)]
    copies = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in slices]
    of_slices = output_and_gradients(lambda *x: operator(*x, edges)[0], slices)
    of_copies = output_and_gradients(lambda *x: operator(*x, edges)[0], copies)
    assert all(torch.equal(a, b) for a, b in zip(of_slices, of_copies, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_sums_are_those_of_the_scores(dtype):
    q, k, v = (x.detach()[0].transpose(0, 1) for x in random_qkv(dtype, (6, 2), 32, 121, 1))
    _, log_sums = torch.ops.minigpt.document_attention(q, k, v, torch.tensor([0, 121], dtype=torch.int32))
    scores = torch.einsum("thd,shd->hts", q.double(), k.double().repeat_interleave(3, 1)) / 32**0.5
    hidden = torch.ones(121, 121, dtype=torch.bool).triu(1)
    assert log_sums.dtype == torch.float32
    assert torch.allclose(log_sums.double(), scores.masked_fill(hidden, -torch.inf).logsumexp(-1).T, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_code_computes_the_same_bits_on_any_number_of_threads(dtype):
    ids = document_ids(((100, 21), (60, 61)), 121)
    results = []
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            pattern = packed_pattern(ids, dtype, "varlen")
            tensors = random_qkv(dtype, row_length=121)
            results.append(output_and_gradients(lambda *x, p=pattern: attention(*x, p), tensors))
        finally:
            torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_numbers_that_are_none_stay_so():
    """A diverged network must be seen as one: NaN in bfloat16 rounds to NaN."""
    q, k, v = random_qkv(torch.bfloat16, rows=1)
    v.data[0, 0, 3, 0] = float("nan")
    out = attention(q, k, v, packed_pattern(document_ids(((T,),)), torch.bfloat16, "varlen"))
    assert out[0, 0, 5, 0].isnan()
    assert not out[0, 2].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_that_are_none_stay_in_their_document(dtype):
    """Also where a document ends within a tile, and in what a thread computes next."""
    ids = document_ids(((40, 41, 40),), 121)
    clean, broken = (random_qkv(dtype, row_length=121, rows=1) for _ in range(2))
    for x in broken:
        x.data[:, :, 40:81] = float("nan")
    others = [*range(40), *range(81, 121)]
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            pattern = packed_pattern(ids, dtype, "varlen")
            found = [output_and_gradients(lambda *x, p=pattern: attention(*x, p), qkv) for qkv in (clean, broken)]
        finally:
            torch.set_num_threads(before)
        for a, b in zip(*found, strict=True):
            assert torch.equal(a[:, :, others], b[:, :, others])
            assert b[:, :, 40:81].isnan().all()


def of_torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
                  window_size=(-1, -1)):  # fmt: skip
    """What the kernel behind torch's `varlen_attn` takes and computes, on a CPU; with the arguments of torch 2.11."""
    assert query.shape == key.shape == value.shape
    assert query.shape[2] % 8 == 0
    assert query.shape[2] <= 256
    assert (window_size, return_aux) == ((-1, 0), None), "causal"
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert max_q == max_k >= cu_seq_q.diff().max()
    out = torch.zeros_like(query)
    for start, end in itertools.pairwise(cu_seq_q.tolist()):
        scores = torch.einsum("thd,shd->hts", query[start:end], key[start:end]) * scale
        hidden = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out[start:end] = torch.einsum("hts,shd->thd", weights, value[start:end])
    return out


def of_torch_2_13(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    """The same with grouped heads, if that is said."""
    groups = query.shape[1] // key.shape[1]
    assert enable_gqa or groups == 1
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    arguments = query, key, value, cu_seq_q, cu_seq_k, max_q, max_k
    return of_torch_2_11(*arguments, return_aux=return_aux, scale=scale, window_size=window_size)


@pytest.mark.parametrize("varlen", [of_torch_2_11, of_torch_2_13], ids=["torch 2.11", "torch 2.13"])
@pytest.mark.parametrize(("heads", "head_dim"), [((4, 4), 8), ((4, 2), 8), ((4, 1), 6)])
def test_flash_attention_is_called_as_each_torch_takes_it(varlen, heads, head_dim, monkeypatch):
    monkeypatch.setattr(attention_module, "varlen_attn", varlen)
    monkeypatch.setattr(attention_module, "_flash_takes_groups", _takes_groups(varlen))
    ids = document_ids()
    pattern = packed_pattern(ids, torch.float64, "varlen")

    def ours(*qkv):
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in qkv)
        return _flash(q, k, v, pattern).unflatten(0, (2, T)).transpose(1, 2)

    found = output_and_gradients(ours, random_qkv(torch.float64, heads, head_dim))
    expected = output_and_gradients(lambda *qkv: formula(*qkv, ids), random_qkv(torch.float64, heads, head_dim))
    for name, one, reference in zip(("output", "dq", "dk", "dv"), found, expected, strict=True):
        assert relative_error(one, reference) < 1e-13, name


@pytest.mark.parametrize("head_dim", [64, 20])
def test_the_installed_torch_takes_the_call(head_dim):
    """On tensors without contents, for which the real operator only tells the shapes, forward and backward."""
    q, k, v = (torch.empty(48, heads, head_dim, device="meta", dtype=torch.bfloat16, requires_grad=True)
               for heads in (4, 2, 2))  # fmt: skip
    edges = torch.empty(5, device="meta", dtype=torch.int32)
    out = _flash(q, k, v, AttentionPattern("varlen", cu_seqlens=edges, max_seqlen=T))
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    gradients = torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
    assert [x.shape for x in gradients] == [x.shape for x in (q, k, v)]


def test_no_prompt_waits_for_cudnn_to_plan_its_shape():
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=["multi-head", "grouped"])
@pytest.mark.parametrize("head_dim", [64, 20])
def test_flash_attention_on_a_gpu_is_the_formula(heads, head_dim):
    """bf16: as near to float64 as rounding the exact answer's inputs to bf16 allows."""
    ids = document_ids()
    expected = output_and_gradients(
        lambda *qkv: formula(*qkv, ids), random_qkv(torch.float64, heads, head_dim=head_dim)
    )
    on_gpu = [x.detach().cuda().requires_grad_() for x in random_qkv(torch.bfloat16, heads, head_dim=head_dim)]
    pattern = packed_pattern(ids.cuda(), torch.bfloat16, choose_backend("cuda", T))
    assert pattern.backend == "varlen"
    out = attention(*on_gpu, pattern)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    found = [out.detach(), *torch.autograd.grad(out, on_gpu, upstream.to("cuda", torch.bfloat16))]
    for name, ours, reference in zip(("output", "dq", "dk", "dv"), found, expected, strict=True):
        assert relative_error(ours.cpu(), reference) < 1e-2, name
