"""The engine in one process: parameter groups, masters, clipping, Muon's update, skipped steps, evaluation."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from distributed_worker import first_gradients
from torch.utils._python_dispatch import TorchDispatchMode

from minigpt.errors import UserError
from minigpt.model.model_minigpt import MiniGPT, MiniGPTConfig
from minigpt.trainer import checkpoint
from minigpt.trainer.engine import Engine, init_processes, parameter_groups
from minigpt.trainer.muon import orthogonalise
from minigpt.trainer.stage import StageModule, language_model_loss

CONFIGS = Path(__file__).parents[2] / "ds_configs"
OPTIMIZERS = [*((stage, "adamw") for stage in range(4)), *((stage, "muon") for stage in range(3))]
V = 97


def small_model(**shape) -> MiniGPT:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return MiniGPT(MiniGPTConfig(vocab_size=V, hidden_size=32, num_hidden_layers=2, **heads, **shape))


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, V, (2, 17), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:].contiguous(), "weights": torch.ones(2, 16)}


@pytest.fixture
def engine():
    """Makes engines and frees them."""
    made = []

    def make(stage: int, dtype=torch.float32, loss=language_model_loss, **options) -> Engine:
        options = {"learning_rate": 1e-2, "weight_decay": 0.0, "grad_clip": 0.0, **options}
        options.setdefault("config", CONFIGS / f"zero{stage}.json")
        made.append(Engine(StageModule(small_model(), loss), init_processes(), dtype=dtype, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def one_step(engine: Engine, seed: int = 0, rate: float = 1e-2, spoil: float = 1.0):
    """A step over one batch; `spoil` multiplies the weight of one label."""
    tensors = batch(seed)
    tensors["weights"][0, 0] *= spoil
    loss = engine.forward_backward(tensors, 1 / 32)
    return loss.item() / 32, engine.step(rate)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shape", [{}, {"qk_norm": False, "attention_bias": True}], ids=["qwen3", "qwen2"])
def test_every_parameter_is_in_one_group_and_only_hidden_matrices_decay(tied, shape):
    model = small_model(tie_word_embeddings=tied, **shape)
    decaying, other = parameter_groups(model, 0.1)
    counts = [sum(p.numel() for p in group["params"]) for group in (decaying, other)]
    assert sum(counts) == model.num_parameters() == sum(p.numel() for p in model.parameters())
    assert len({id(p) for group in (decaying, other) for p in group["params"]}) == len(list(model.parameters()))
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in decaying["params"]} == {
        name for name in names.values() if name.endswith("proj.weight")
    }
    assert (decaying["weight_decay"], other["weight_decay"]) == (0.1, 0.0)


def test_frozen_parameters_are_in_no_group():
    model = small_model()
    model.model.layers[0].requires_grad_(False)
    chosen = sum(p.numel() for group in parameter_groups(model, 0.1) for p in group["params"])
    assert chosen == model.num_parameters() - sum(p.numel() for p in model.model.layers[0].parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_masters_keep_the_float32_weights_that_they_were_given(stage, dtype, engine):
    masters = engine(stage, dtype).master_weights()
    for name, parameter in small_model().named_parameters():
        assert torch.equal(masters[f"model.{name}"], parameter.detach()), name


class Products(TorchDispatchMode):
    """Notes the precisions of matrices that are multiplied by torch, or by the loss, which holds the output layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: dict[str, set[torch.dtype]] = {"mm": set(), "labelled_loss": set()}

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        if (noted := self.dtypes.get(function.overloadpacket.__name__)) is not None:
            noted.update(a.dtype for a in arguments if isinstance(a, torch.Tensor) and a.dim() == 2)
        return function(*arguments, **(named or {}))


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 2**-24), (torch.bfloat16, 2**-9)], ids=str)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_products_are_in_the_precision_that_was_asked_for(stage, dtype, rounding, engine):
    """And the gradient lies as far from that in float64 as its rounding says: no farther, and no nearer either."""
    exact = small_model().double()
    (exact(**batch()).loss_sum / 32).backward()
    ours = engine(stage, dtype, optimizer_name="adamw")
    with Products() as products:
        ours.forward_backward(batch(), 1 / 32)
    assert products.dtypes == {"mm": {dtype}, "labelled_loss": {dtype}}
    ours.step(1e-2)
    found = first_gradients(ours)
    errors = [float((found[name] - p.grad).norm() / p.grad.norm()) for name, p in exact.named_parameters()]
    assert rounding < max(errors) < 32 * rounding


@pytest.mark.parametrize(("stage", "optimizer"), OPTIMIZERS)
def test_the_reported_norm_is_that_of_the_whole_gradient_before_clipping(stage, optimizer, engine):
    model = small_model()
    (model(**batch()).loss_sum / 32).backward()
    norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in model.parameters()])).item()
    for clip in (0.0, 1e-3):
        _, result = one_step(engine(stage, optimizer_name=optimizer, grad_clip=clip))
        assert result.applied
        assert result.grad_norm == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize(("stage", "optimizer"), OPTIMIZERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e38], ids=str)
def test_a_step_that_is_not_finite_changes_nothing_and_the_next_ones_go_on(bad, stage, optimizer, engine):
    """As if the bad batch had never been: optimizer state included. 1e38 is finite; its sum is not."""
    spoilt, clean = (engine(stage, optimizer_name=optimizer) for _ in range(2))
    for one in (spoilt, clean):
        assert one_step(one, seed=1)[1].applied
    tensors = batch(2)
    tensors["weights"][:] = bad if bad == 1e38 else 1.0
    tensors["weights"][0, 0] = bad
    spoilt.forward_backward(batch(3), 1 / 32)
    spoilt.forward_backward(tensors, 1 / 32)
    assert not spoilt.step(1e-2).applied
    for one in (spoilt, clean):
        assert one_step(one, seed=4)[1].applied
    found, expected = spoilt.master_weights(), clean.master_weights()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_infinite_loss_with_finite_gradients_is_not_applied(stage, engine):
    ours = engine(stage, loss=lambda model, **tensors: language_model_loss(model, **tensors) + float("inf"))
    _, result = one_step(ours)
    assert not result.applied
    found = ours.master_weights()
    assert all(torch.equal(found[f"model.{name}"], p.detach()) for name, p in small_model().named_parameters())


def test_orthogonalised_matrices_have_singular_values_near_1_and_keep_their_directions():
    torch.manual_seed(0)
    for shape in ((32, 32), (32, 96), (96, 32), (1, 8)):
        matrix = torch.randn(1, *shape)
        found = orthogonalise(matrix, torch.float32)[0]
        u, _, v = torch.linalg.svd(matrix[0], full_matrices=False)
        values = torch.linalg.svdvals(found)
        assert values.min() > 0.5
        assert values.max() < 1.3
        inner = torch.diagonal(u.T @ found @ v.T)  # of each singular pair with itself: its new singular value
        assert torch.allclose(inner.sort().values, values.sort().values, atol=1e-3)


@pytest.mark.parametrize("shape", [(24, 24), (24, 40), (24, 48), (48, 24), (24, 200)], ids=str)
def test_orthogonalised_matrices_are_those_of_the_iteration_as_it_is_defined(shape):
    """In float64, also where singular values lie a factor of 10,000 apart."""
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape) * torch.logspace(0, -4, shape[1])
    x = matrices.double() / matrices.double().norm(dim=(1, 2), keepdim=True)
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x @ x.mT @ x + 2.0315 * x @ x.mT @ x @ x.mT @ x
    found = orthogonalise(matrices, torch.float32).double()
    assert ((found - x).norm() / x.norm()).item() < 1e-3


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_muon_moves_matrices_orthogonally_and_the_rest_as_adamw(stage, engine):
    """The first update of a matrix is U V^T of its gradient, at AdamW's usual size; of a vector, AdamW's sign step."""
    model = small_model()
    (model(**batch()).loss_sum / 32).backward()
    gradients = {f"model.{name}": p.grad for name, p in model.named_parameters()}
    ours = engine(stage, optimizer_name="muon")
    before = ours.master_weights()
    one_step(ours, rate=1e-2)
    after = ours.master_weights()
    for name, gradient in gradients.items():
        update = (before[name] - after[name]) / 1e-2
        if name.endswith("proj.weight"):
            u, _, v = torch.linalg.svd(gradient, full_matrices=False)
            size = 0.2 * max(gradient.shape) ** 0.5
            values = torch.linalg.svdvals(update / size)
            assert values.max() < 1.3
            assert (update / size * (u @ v)).sum() / len(values) > 0.6
            assert update.square().mean().sqrt() == pytest.approx(0.2, rel=0.3)
        else:
            large = gradient.abs() > 1e-5
            assert torch.allclose(update[large], gradient[large].sign(), atol=1e-2), name


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_muon_orthogonalises_the_gradient_with_nesterov_momentum(stage, engine):
    """Two steps, the first with rate 0: the second goes along g2 + 0.95 · (g2 + 0.95 · g1)."""
    gradients = []
    for seed in (1, 2):
        model = small_model()
        (model(**batch(seed)).loss_sum / 32).backward()
        gradients.append({f"model.{name}": p.grad for name, p in model.named_parameters()})
    ours = engine(stage, optimizer_name="muon")
    one_step(ours, seed=1, rate=0.0)
    before = ours.master_weights()
    one_step(ours, seed=2, rate=1e-2)
    after = ours.master_weights()
    for name, second in gradients[1].items():
        if name.endswith("proj.weight"):
            direction = second + 0.95 * (second + 0.95 * gradients[0][name])
            expected = 0.2 * max(second.shape) ** 0.5 * orthogonalise(direction[None], torch.float32)[0]
            update = (before[name] - after[name]) / 1e-2
            assert (update - expected).norm() < 1e-3 * expected.norm(), name


@pytest.mark.parametrize("key", ["round_robin_gradients", "parameter_alignment"])
def test_muon_is_not_taken_where_deepspeed_lays_the_matrices_out_otherwise(key, engine, tmp_path):
    """It would cut other matrices out of a rank's slice than there are, without a word."""
    config = tmp_path / "zero.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": 2, key: True}}))
    assert engine(2, config=config, optimizer_name="auto").optimizer_name == "adamw"
    with pytest.raises(UserError, match=f"muon works with ZeRO stages 0 to 2 without .*{key}.*--optimizer adamw"):
        engine(2, config=config, optimizer_name="muon")
    config.write_text(json.dumps({"zero_optimization": {"stage": 2, key: False}}))
    assert engine(2, config=config, optimizer_name="auto").optimizer_name == "muon"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_evaluation_gives_the_loss_and_leaves_no_trace(stage, engine):
    ours, undisturbed = engine(stage), engine(stage)
    loss = ours.evaluate(batch()).item()
    assert loss == pytest.approx(small_model()(**batch()).loss_sum.item(), rel=1e-6)
    ours.forward_backward(batch(1), 1 / 64)
    ours.evaluate(batch())  # in the middle of a window
    ours.forward_backward(batch(2), 1 / 64)
    ours.step(1e-2)
    for seed in (1, 2):
        undisturbed.forward_backward(batch(seed), 1 / 64)
    undisturbed.step(1e-2)
    found, expected = ours.master_weights(), undisturbed.master_weights()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_random_numbers_go_on_behind_a_checkpoint_as_they_did(engine, tmp_path):
    ours = engine(1)
    one_step(ours)
    torch.manual_seed(7)
    folder = checkpoint.save(ours, tmp_path, {"step": 1}, keep=1)
    expected = torch.rand(3)
    torch.manual_seed(8)
    checkpoint.load(ours, folder)
    assert torch.equal(torch.rand(3), expected)


def test_what_two_processes_find_wrong_is_raised_by_one_and_what_one_finds_by_that_one():
    alone = init_processes()
    first, second = (replace(alone, rank=rank, world_size=2) for rank in range(2))
    with pytest.raises(UserError, match="no data"), first.errors_said_once():
        raise UserError("there is no data for both")
    with pytest.raises(SystemExit) as ended, second.errors_said_once():
        raise UserError("there is no data for both")
    assert ended.value.code == 1
    with pytest.raises(UserError, match="damaged"), second.errors_said_once():
        raise UserError("a file of the second is damaged")


def test_alone_no_port_is_left_behind_for_programs_that_are_started_from_here(monkeypatch):
    import os

    for name in ("MASTER_PORT", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    found = init_processes()
    assert (found.rank, found.world_size) == (0, 1)
    assert "MASTER_PORT" not in os.environ


def test_the_configuration_that_offloads_trains_and_counts_all_parameters(tmp_path):
    """In a process of its own: ZeRO stage 3 changes torch for good, and a parameter that is spread looks empty."""
    shape = ["--hidden_size=32", "--num_hidden_layers=1", "--num_attention_heads=2", "--num_key_value_heads=1"]
    command = [sys.executable, "-m", "minigpt", "train", "pretrain", *shape, "--max_steps=2", "--compile=false"]
    done = subprocess.run(
        [*command, f"--save_dir={tmp_path}", f"--deepspeed={CONFIGS / 'zero3_offload.json'}", "--dtype=bf16"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "hf" / "model.safetensors").exists()
    weights = torch.load(tmp_path / "pretrain_32.pth", weights_only=True)
    total = sum(weight.numel() for name, weight in weights.items() if name != "lm_head.weight")  # it is tied
    assert json.loads((tmp_path / "summary.json").read_text())["parameters"] == total
    assert f"{total / 1e6:.2f}M parameters" in done.stdout


def test_no_timer_of_deepspeed_waits_for_the_device(engine, monkeypatch):
    """Its timer of throughput would before every forward pass and after every step, from the third step on."""
    from deepspeed.utils import timer

    waits = []
    monkeypatch.setattr(timer.get_accelerator(), "synchronize", lambda *_: waits.append(1))
    one = engine(1)
    for seed in range(4):
        one_step(one, seed)
    assert not waits
