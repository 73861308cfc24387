"""Which model a path means, and the sentence for paths that hold none."""

import json
import shutil

import pytest
import torch

from minigpt.errors import UserError
from minigpt.generation.load import config_of_state_dict, load_for_inference, stage_of

END_OF_TURN, END_OF_TEXT = 2, 0


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(50)[None]).logits


def test_a_run_and_its_hf_folder_give_the_same_model_and_the_ids_that_end_an_answer(run_folder):
    of_run, encoder = load_for_inference(run_folder)
    of_folder, _ = load_for_inference(run_folder / "hf", device="cpu", dtype="fp32")
    assert torch.equal(logits(of_run), logits(of_folder))
    assert of_run.eos_token_ids == (END_OF_TURN, END_OF_TEXT)
    assert not of_run.training
    assert encoder.decode(encoder.encode_text("你好")) == "你好"
    assert stage_of(run_folder) == "sft"
    assert stage_of(run_folder / "hf") == "sft"


def test_dtype_is_as_asked(run_folder):
    model, _ = load_for_inference(run_folder, dtype="bf16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("with_config", [True, False])
def test_pth_weights_give_the_same_model_with_and_without_a_config_beside(tmp_path, make_model, with_config):
    model = make_model(vocab_size=6400)
    state = model.state_dict()
    torch.save(state, tmp_path / "full_sft_64.pth")
    if with_config:
        model.save_pretrained(tmp_path / "hf")
        (tmp_path / "hf" / "model.safetensors").unlink()
    loaded, encoder = load_for_inference(tmp_path / "full_sft_64.pth")
    assert torch.equal(logits(loaded), logits(model))
    assert encoder.vocab_size == 6400
    if not with_config:
        assert torch.equal(logits(load_for_inference(tmp_path)[0]), logits(model))


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": False, "num_key_value_heads": 1, "head_dim": 32}])
def test_shape_is_read_off_a_state_dict(make_model, options):
    model = make_model(max_position_embeddings=2048, intermediate_size=96, **options)
    assert config_of_state_dict(model.state_dict(), "x.pth") == model.config


def test_missing_path(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such run"):
        load_for_inference(tmp_path / "nowhere")


def test_folder_without_a_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither hf/config\.json nor config\.json"):
        load_for_inference(tmp_path)


def test_unfinished_run(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match=r"has not finished.*repeat its train command"):
        load_for_inference(tmp_path)


def test_file_that_is_no_model(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match=r"notes\.txt: not a model"):
        load_for_inference(tmp_path / "notes.txt")


def test_pickles_that_run_code_are_not_run(tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "was_run"), "w"))

    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil()))
    torch.save({"model.embed_tokens.weight": Evil()}, tmp_path / "evil2.pth")
    for name in ("evil.pth", "evil2.pth"):
        with pytest.raises(UserError, match=r"not a readable state dict") as caught:
            load_for_inference(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "was_run").exists()


def test_truncated_pth(tmp_path, make_model):
    torch.save(make_model(vocab_size=6400).state_dict(), tmp_path / "a.pth")
    (tmp_path / "a.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:5000])
    with pytest.raises(UserError, match=r"a\.pth: not a readable state dict"):
        load_for_inference(tmp_path)


def test_tokenizer_of_another_model(tmp_path, run_folder, make_model):
    make_model(vocab_size=97).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(run_folder / "hf" / name, tmp_path)
    with pytest.raises(UserError, match=r"tokenizer has 6400 entries but the model only 97"):
        load_for_inference(tmp_path)


def test_folder_without_a_tokenizer(tmp_path, make_model):
    make_model().save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        load_for_inference(tmp_path)


def test_stop_ids_of_a_foreign_folder_come_from_its_generation_config(tmp_path, run_folder):
    shutil.copytree(run_folder / "hf", tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [17, 4]}))
    assert load_for_inference(tmp_path)[0].eos_token_ids == (17, 4, END_OF_TURN, END_OF_TEXT)


@pytest.mark.parametrize(("option", "value"), [("device", "tpu9"), ("dtype", "fp8")])
def test_unknown_devices_and_dtypes(run_folder, option, value):
    with pytest.raises(UserError, match=f"{option} '{value}' is unknown"):
        load_for_inference(run_folder, **{option: value})
