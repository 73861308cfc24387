"""LoRA against its formula in float64: same logits at first, right gradients, frozen weights, merging and back."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minigpt.errors import UserError
from minigpt.model.model_lora import (
    LoRA,
    LoRAConfig,
    adapters_off,
    add_adapter,
    apply_lora,
    find_targets,
    lora_layers,
    merge_lora,
    merged_weight,
    set_adapter,
    split_state_dict,
    unload_lora,
    unmerge_lora,
)
from minigpt.model.model_minigpt import MiniGPT, MiniGPTConfig

V = 211
KINDS = {"lora": {}, "rslora": {"rslora": True}, "dora": {"dora": True}}
MANY, FEW = 80, 5  # tokens: enough for the sum W + s·B A to be formed, and too few


def small_model(dtype=torch.float32, **shape) -> MiniGPT:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, **shape}
    model = MiniGPT(MiniGPTConfig(vocab_size=V, intermediate_size=48, **shape))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.to(dtype)


def ids(tokens: int) -> torch.Tensor:
    return torch.randint(0, V, (2, tokens), generator=torch.Generator().manual_seed(tokens))


def stir(model: nn.Module, seed: int = 1) -> nn.Module:
    """An adapter as training leaves it: B is no longer zero, m no longer the rows' lengths."""
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        for name in layer.adapters:
            for kind, matrix in layer.matrices(name).items():
                noise = torch.randn(matrix.shape, generator=generator).to(matrix.dtype)
                matrix.data += noise * (0.3 if kind == "magnitude" else 0.1)
    return model


@pytest.mark.parametrize("tokens", [MANY, FEW])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_a_new_adapter_changes_no_bit_of_the_logits(kind, dtype, tokens):
    model = small_model(dtype, qk_norm=False, attention_bias=True)
    before = model(ids(tokens)).logits
    apply_lora(model, rank=4, dropout=0.1, **KINDS[kind]).eval()
    assert torch.equal(model(ids(tokens)).logits, before)


@pytest.mark.parametrize("tokens", [MANY, FEW])
def test_a_new_dora_adapter_changes_no_bit_of_the_logits(tokens):
    model = small_model()
    before = model(ids(tokens)).logits
    assert torch.equal(apply_lora(model, rank=4, dora=True)(ids(tokens)).logits, before)


@pytest.mark.parametrize("dora", [False, True])
def test_exactly_the_adapters_are_trained_and_counted(dora):
    model = small_model()
    r, E, H, G, D, Fw = 3, 32, 4, 2, 8, 48
    widths = [(E, H * D), (E, G * D), (E, G * D), (H * D, E), (E, Fw), (E, Fw), (Fw, E)]
    expected = 2 * sum(r * (i + o) + o * dora for i, o in widths)
    apply_lora(model, rank=r, dora=dora)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == expected
    assert all(".lora_" in name for name in trained)
    assert not any(".lora_" in name for name, p in model.named_parameters() if not p.requires_grad)


def dense(x, weight, A, B, bias, config, magnitude=None):
    """The definition, with a gradient for everything."""
    W = weight + config.scale * (B @ A)
    if magnitude is not None:
        W = W * (magnitude / W.norm(dim=1).detach())[:, None]
    return F.linear(x, W, bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [MANY, FEW])
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_are_those_of_the_formula_in_float64(kind, tokens, bias):
    torch.manual_seed(0)
    base = nn.Linear(24, 17, bias=bias).double()
    layer = LoRA(base)
    config = LoRAConfig(rank=5, alpha=7.0, **KINDS[kind])
    layer.add("default", config)
    layer.active = "default"
    layer.weight.requires_grad_(False)
    stir(layer)
    x = torch.randn(2, tokens, 24, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, tokens, 17, dtype=torch.float64)
    matrices = {kind: p.detach().clone().requires_grad_() for kind, p in layer.matrices("default").items()}
    x_copy = x.detach().clone().requires_grad_()
    expected = dense(x_copy, base.weight.detach(), bias=base.bias, config=config, **matrices)
    expected.backward(upstream)
    found = layer(x)
    found.backward(upstream)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, x_copy.grad, rtol=1e-12, atol=1e-12)
    for name, matrix in layer.matrices("default").items():
        torch.testing.assert_close(matrix.grad, matrices[name].grad, rtol=1e-11, atol=1e-11)
    assert base.weight.grad is None


def test_gradients_in_float32_and_bf16_are_as_exact_as_a_dense_layers():
    """Relative errors against float64: 1e-5 in float32; in bf16 at most 1.5 times those of plain autograd in bf16."""
    model = apply_lora(small_model(torch.float64), rank=4)
    stir(model)
    batch = {"input_ids": ids(MANY), "labels": ids(MANY)}

    def gradients(dtype) -> dict[str, torch.Tensor]:
        copied = copy.deepcopy(model).to(dtype)
        copied(**batch).loss_sum.backward()
        return {n: p.grad.double() for n, p in copied.named_parameters() if p.requires_grad}

    def errors(found) -> list[float]:
        return [float((g - exact[n]).norm() / exact[n].norm()) for n, g in found.items()]

    exact = gradients(torch.float64)
    assert max(errors(gradients(torch.float32))) <= 1e-5
    ours = errors(gradients(torch.bfloat16))
    with pytest.MonkeyPatch.context() as patch:  # the branch beside W, by plain autograd
        patch.setattr("minigpt.model.model_lora._TOKENS_WORTH_A_SUM", math.inf)
        plain = errors(gradients(torch.bfloat16))
    assert sum(ours) <= 1.5 * sum(plain)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_and_unmerged_models_say_the_same_and_unmerging_restores_every_bit(kind):
    model = small_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stir(apply_lora(model, rank=4, **KINDS[kind]))
    unmerged = model(ids(MANY)).logits
    assert (unmerged - small_model()(ids(MANY)).logits).abs().max() > 0.1, "the adapter does something"
    merged = merge_lora(model)(ids(MANY)).logits
    assert (merged - unmerged).abs().max() <= 1e-5
    unmerge_lora(model)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert torch.equal(model(ids(MANY)).logits, unmerged)


def test_merging_is_done_in_float32_and_rounded_once():
    layer = LoRA(nn.Linear(16, 8, bias=False).bfloat16())
    layer.add("default", LoRAConfig(rank=2))
    layer.active = "default"
    stir(layer)
    exact = layer.weight.double() + 8.0 * layer.B.double() @ layer.A.double()
    layer.merge()
    assert torch.equal(layer.weight, exact.bfloat16())


@pytest.mark.parametrize("kind", KINDS)
def test_unloading_leaves_a_plain_model_with_the_merged_weights(kind):
    model = stir(apply_lora(small_model(), rank=4, **KINDS[kind]))
    adapted = model(ids(MANY)).logits
    unload_lora(model)
    assert model.state_dict().keys() == small_model().state_dict().keys()
    assert not any(isinstance(m, LoRA) for m in model.modules())
    assert (model(ids(MANY)).logits - adapted).abs().max() <= 1e-5


def test_training_moves_the_adapter_and_no_bit_of_the_base():
    model = small_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    apply_lora(model, rank=4)
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(input_ids=ids(MANY), labels=ids(MANY)).loss_sum
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_adapters_are_switched_and_switched_off_without_touching_each_other():
    model = small_model()
    plain = model(ids(MANY)).logits
    add_adapter(model, "pirate", LoRAConfig(rank=4), find_targets(model, ["q_proj", "v_proj"]))
    add_adapter(model, "poet", LoRAConfig(rank=2, dora=True), find_targets(model))
    stir(model)
    assert torch.equal(model(ids(MANY)).logits, plain), "none is active yet"
    said = {}
    for name in ("pirate", "poet"):
        set_adapter(model, name)
        said[name] = model(ids(MANY)).logits
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trained
        assert all(n.endswith(f"_{name}") for n in trained)
    assert not torch.allclose(said["pirate"], said["poet"], atol=1e-2)
    with adapters_off(model):
        assert torch.equal(model(ids(MANY)).logits, plain)
    assert torch.equal(model(ids(MANY)).logits, said["poet"])
    with pytest.raises(KeyError), adapters_off(model):
        raise KeyError
    assert torch.equal(model(ids(MANY)).logits, said["poet"]), "they are on again after an error"
    set_adapter(model, "pirate")
    assert torch.equal(model(ids(MANY)).logits, said["pirate"])
    set_adapter(model, None)
    assert torch.equal(model(ids(MANY)).logits, plain)


def test_dropout_drops_inputs_of_the_branch_in_training_only():
    torch.manual_seed(0)
    base = nn.Linear(24, 17)
    layer = LoRA(base)
    layer.add("default", LoRAConfig(rank=5, dropout=0.5))
    layer.active = "default"
    stir(layer)
    x = torch.randn(MANY, 24)
    torch.manual_seed(3)
    found = layer.train()(x)
    torch.manual_seed(3)
    expected = base(x) + layer.adapters["default"].scale * F.dropout(x, 0.5) @ layer.A.T @ layer.B.T
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    whole = dense(x, base.weight, layer.A, layer.B, base.bias, layer.adapters["default"])
    torch.testing.assert_close(layer.eval()(x), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (None, 14),
        (["all-linear"], 14),
        (["q_proj", "v_proj"], 4),
        (["model.layers.1.mlp.up_proj"], 1),
        (["self_attn.k_proj"], 2),
        ([r".*layers\.0\..*(gate|up)_proj"], 2),
        (["lm_head"], 1),
    ],
)
def test_targets_are_ends_of_names_whole_names_or_regular_expressions(targets, expected):
    model = small_model(tie_word_embeddings=False)
    assert len(find_targets(model, targets)) == expected
    apply_lora(model, rank=2, targets=targets)
    assert len(lora_layers(model)) == expected


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"targets": ["query"]}, "no linear layer is named 'query'; there are q_proj, k_proj"),
        ({"targets": ["q_proj", "proj"]}, "no linear layer is named 'proj'"),
        ({"targets": ["("]}, "neither the name of a layer nor a regular expression"),
        ({"rank": 0}, "at least 1"),
        ({"dropout": 1.0}, "less than 1"),
        ({"alpha": 0.0}, "above 0"),
        ({"name": "a.b"}, "no name for an adapter"),
    ],
)
def test_what_cannot_be_is_said_and_the_model_stays_as_it_was(options, said):
    model = small_model()
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        apply_lora(model, **options)
    assert not lora_layers(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_name_is_given_once_and_an_unknown_one_is_not_switched_to():
    model = apply_lora(small_model())
    with pytest.raises(UserError, match="already"):
        apply_lora(model)
    with pytest.raises(UserError, match="no adapter named 'poet'; it has default"):
        set_adapter(model, "poet")
    merge_lora(model)
    for change in (lambda: set_adapter(model, None), lambda: apply_lora(model, name="poet")):
        with pytest.raises(UserError, match="unmerge"):
            change()
    with pytest.raises(UserError, match="unmerge"), adapters_off(model):
        pass


def test_an_adapter_of_a_tied_output_layer_works_but_is_not_merged():
    model = stir(apply_lora(small_model(), rank=4, targets=["lm_head"]))
    embedding = model.model.embed_tokens.weight.clone()
    with pytest.raises(UserError, match=r"tied to model\.embed_tokens\.weight"):
        merge_lora(model)
    with pytest.raises(UserError, match="tied"):
        split_state_dict(model, model.state_dict())
    assert torch.equal(model.model.embed_tokens.weight, embedding)


def test_the_loss_of_an_adapted_output_layer_is_that_of_its_logits():
    model = stir(apply_lora(small_model(torch.float64, tie_word_embeddings=False), rank=4, targets=["lm_head"]))
    x, labels = ids(MANY), ids(MANY).roll(1)
    loss = model(x, labels=labels).loss_sum
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    expected = F.cross_entropy(model(x).logits.flatten(0, 1), labels.flatten(), reduction="sum")
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for found, p in zip(gradients, [p for p in model.parameters() if p.requires_grad], strict=True):
        torch.testing.assert_close(found, p.grad, rtol=1e-10, atol=1e-12)
    merged = merge_lora(model)(x).logits
    torch.testing.assert_close(F.cross_entropy(merged.flatten(0, 1), labels.flatten(), reduction="sum"), expected)


def test_masters_are_split_into_a_merged_model_and_the_adapter():
    model = stir(apply_lora(small_model(), rank=4, dora=True))
    base, adapter = split_state_dict(model, dict(model.named_parameters()))
    plain = small_model()
    plain.load_state_dict(base)
    assert (plain(ids(MANY)).logits - model(ids(MANY)).logits).abs().max() <= 1e-5
    assert adapter.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    layer = lora_layers(model)["model.layers.0.mlp.up_proj"]
    expected = merged_weight(layer.weight, layer.adapters["default"], **layer.matrices("default"))
    assert torch.equal(base["model.layers.0.mlp.up_proj.weight"], expected)


def test_gradient_checkpointing_changes_no_bit():
    model = stir(apply_lora(small_model(), rank=4))
    batch = {"input_ids": ids(MANY), "labels": ids(MANY)}

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(**batch).loss_sum.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    plain = gradients()
    model.model.gradient_checkpointing = True
    # the embedding is frozen: nothing but the adapters asks for gradients
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))


def test_a_traced_model_has_one_graph_and_the_same_gradients():
    """What torch.compile sees, without the minutes of its code generator."""
    torch._dynamo.reset()
    model = stir(apply_lora(small_model(), rank=4))
    batch = {"input_ids": ids(MANY), "labels": ids(MANY)}

    def gradients(call) -> list[torch.Tensor]:
        model.zero_grad()
        call(**batch).loss_sum.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    eager = gradients(model)
    traced = gradients(torch.compile(model, backend="aot_eager", fullgraph=True))
    for a, b in zip(eager, traced, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
