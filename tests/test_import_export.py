"""Folders of public model families come in, are tuned with their own tokenizer and template, and go out again."""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES, write_model, write_tokenizer
from safetensors.torch import load_file, save_file

from minigpt.commands import ExportOptions, ImportOptions, export, import_hf
from minigpt.dataset.chat import ChatEncoder
from minigpt.errors import UserError
from minigpt.generation.load import load_for_inference
from minigpt.model.model_minigpt import MiniGPT

CHAT = [
    {"messages": [{"role": "user", "content": f"问题 {i}?"}, {"role": "assistant", "content": f"Answer {i}."}]}
    for i in range(30)
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("public")
    for name in FAMILIES:
        write_model(base / name, name, max_shard_size="200KB" if name in ("qwen2.5", "llama3.2") else "5GB")
    return {name: base / name for name in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_imported_model_computes_what_transformers_computes(folders, tmp_path, family):
    from transformers import AutoModelForCausalLM

    assert (folders[family] / "model.safetensors.index.json").exists() == (family in ("qwen2.5", "llama3.2"))
    import_hf(ImportOptions(folders[family], tmp_path / "run"))
    stock = AutoModelForCausalLM.from_pretrained(folders[family], attn_implementation="eager").eval()
    model, encoder = load_for_inference(tmp_path / "run")
    ids = torch.randint(0, 6400, (2, 300), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = stock(ids).logits
        assert (expected - model(ids).logits).abs().max() <= 1e-5
    assert encoder.im_end_id in model.eos_token_ids
    export(ExportOptions(tmp_path / "run", tmp_path / "out", dtype="fp32"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    with torch.no_grad():
        assert (expected - again(ids).logits).abs().max() <= 1e-5
    assert type(again) is type(stock)
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (folders[family] / name).read_bytes()


@pytest.mark.parametrize("family", ["qwen2.5", "llama3.2"])
def test_config_says_what_transformers_4_and_5_read(folders, tmp_path, family):
    """4.57 reads `rope_theta` and `rope_scaling` at the top (its logits were compared once), 5 `rope_parameters`."""
    import_hf(ImportOptions(folders[family], tmp_path / "run"))
    config = json.loads((tmp_path / "run" / "hf" / "config.json").read_text())
    theta, scaling = FAMILIES[family].config["rope_theta"], FAMILIES[family].config.get("rope_scaling")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == theta
    assert config.get("rope_scaling") == scaling
    assert config["rope_parameters"] == {"rope_type": "default", **(scaling or {}), "rope_theta": theta}
    assert config["dtype"] == config["torch_dtype"] == "float32"


def test_a_llama_style_model_is_tuned_answers_and_is_exported_with_its_own_format(folders, tmp_path, capsys):
    from minigpt.generation.command import GenerateOptions, run_generate
    from minigpt.trainer.train_full_sft import SFTOptions, main

    import_hf(ImportOptions(folders["llama3.2"], tmp_path / "base"))
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps(c, ensure_ascii=False) for c in CHAT), encoding="utf-8")
    options = SFTOptions(init=tmp_path / "base", data=[tmp_path / "chat.jsonl"], save_dir=tmp_path / "run")
    options.seq_len, options.max_steps, options.global_batch_size, options.compile = 128, 2, 2, False
    main(options)
    generation = json.loads((tmp_path / "run" / "hf" / "generation_config.json").read_text())
    ends = [FAMILIES["llama3.2"].special.index(name) for name in ("<|eot_id|>", "<|end_of_text|>")]
    assert generation["eos_token_id"] == ends
    manifest = json.loads((tmp_path / "run" / "data" / "manifest.json").read_text())
    assert manifest["tokenizer"]["template_hash"]
    run_generate(GenerateOptions(tmp_path / "run", prompt="问题 1?", max_new_tokens=4, temperature=0))
    export(ExportOptions(tmp_path / "run", tmp_path / "gguf", format="gguf", dtype="fp16"))
    assert (tmp_path / "gguf" / "run-fp16.gguf").stat().st_size > 500_000
    export(ExportOptions(tmp_path / "run", tmp_path / "hf"))
    card = (tmp_path / "hf" / "README.md").read_text()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for fact in ("| import |", "llama3.2", "| sft | 2 |", summary["fingerprint"][:16], f"{summary['loss']:.4f}"):
        assert fact in card
    assert str(tmp_path) not in card


def test_every_stage_packs_with_an_imported_tokenizer(folders, tmp_path):
    from data_prep.pack import PackOptions, pack
    from minigpt.dataset.shards import PackedDataset

    encoder = ChatEncoder(folders["llama3.2"])
    question, good, bad = "Frage 问?", "gut", "schlecht"
    user = [{"role": "user", "content": question}]
    records = {
        "sft": {"messages": [*user, {"role": "assistant", "content": good}]},
        "reason": {"messages": [*user, {"role": "assistant", "content": good, "reasoning_content": "weil"}]},
        "preference": {"prompt": question, "chosen": good, "rejected": bad},
        "prompt": {"question": question, "answer": "42"},
    }
    for stage, record in records.items():
        (tmp_path / f"{stage}.jsonl").write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
        pack(
            PackOptions(
                stage=stage,  # type: ignore[arg-type]
                input=[tmp_path / f"{stage}.jsonl"],
                output=tmp_path / stage,
                tokenizer=folders["llama3.2"],
                seq_len=128,
                workers=1,
                valid_fraction=0.0,
            )
        )
    row = PackedDataset(tmp_path / "sft").row(0)
    ids, _ = encoder.encode(records["sft"]["messages"])
    assert row.input_ids[: len(ids)].tolist() == ids
    pair = PackedDataset(tmp_path / "preference").row(0)
    prompt = encoder.encode(user)[0]
    assert pair.prompt_ids.tolist() == prompt
    for side, text in ((pair.chosen_ids, good), (pair.rejected_ids, bad)):
        whole = encoder.encode([*user, {"role": "assistant", "content": text}])[0]
        assert [*pair.prompt_ids.tolist(), *side.tolist()] == whole
    asked = PackedDataset(tmp_path / "prompt").row(0)
    assert asked.prompt_ids.tolist() == encoder.encode_prompt(user)


def test_base_models_without_a_template(folders, tmp_path, capsys):
    """ChatML where the tokens are there; else continuation only, and the sentence that says what to do."""
    for family in ("smollm2", "llama3.2"):
        shutil.copytree(folders[family], tmp_path / family)
        (tmp_path / family / "chat_template.jinja").unlink()
        import_hf(ImportOptions(tmp_path / family, tmp_path / f"{family}-run"))
    said = capsys.readouterr().out
    assert "MiniGPT's (ChatML) is taken" in said
    assert "--chat_template FILE" in said
    user = [{"role": "user", "content": "A"}]
    chatml = ChatEncoder(tmp_path / "smollm2-run" / "hf")
    assert chatml.decode(chatml.encode_prompt(user), False) == "<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(UserError, match=r"no token <\|im_start\|> and no chat template"):
        ChatEncoder(tmp_path / "llama3.2-run" / "hf").encode_prompt(user)
    template = folders["llama3.2"] / "chat_template.jinja"
    import_hf(ImportOptions(tmp_path / "llama3.2", tmp_path / "with", chat_template=template))
    expected = ChatEncoder(folders["llama3.2"]).encode_prompt(user)
    assert ChatEncoder(tmp_path / "with" / "hf").encode_prompt(user) == expected


def test_a_readme_of_somebody_else_stays_and_ours_is_renewed(folders, tmp_path, capsys):
    import_hf(ImportOptions(folders["smollm2"], tmp_path / "run"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("mine")
    export(ExportOptions(tmp_path / "run", tmp_path / "out"))
    assert (tmp_path / "out" / "README.md").read_text() == "mine"
    assert "stays as it is" in capsys.readouterr().out
    (tmp_path / "out" / "README.md").unlink()
    for dtype in ("bf16", "fp32"):
        export(ExportOptions(tmp_path / "run", tmp_path / "out", dtype=dtype))
        assert f"| stored as | {dtype} |" in (tmp_path / "out" / "README.md").read_text()


@pytest.fixture
def run(folders, tmp_path) -> Path:
    """A run as training leaves it: float32 masters beside the rounded weights of `hf/`."""
    folder = tmp_path / "run"
    import_hf(ImportOptions(folders["smollm2"], folder))
    model = MiniGPT.from_pretrained(folder / "hf")
    torch.save(model.state_dict(), folder / f"full_sft_{model.config.hidden_size}.pth")
    model.save_pretrained(folder / "hf", dtype=torch.bfloat16)
    return folder


FULL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from minigpt import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
cli.main(sys.argv[1:])
"""


@pytest.mark.parametrize("kind", ["hf", "pth", "gguf"])
def test_an_export_to_a_full_disk_is_one_sentence_and_leaves_nothing(run, tmp_path, kind):
    arguments = ["export", run, "--output", tmp_path / "new" / "export", "--format", kind]
    command = [sys.executable, "-c", FULL_DISK, "20000", *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 1
    (line,) = ended.stderr.strip().splitlines()
    assert line.startswith(f"error: {tmp_path / 'new' / 'export'}/")
    assert "cannot be written (" in line
    assert "make room" in line
    assert not (tmp_path / "new").exists()


def test_an_export_takes_the_masters_and_never_lands_beside_them(run, tmp_path):
    from minigpt.trainer.setup import load_masters

    masters = torch.load(next(run.glob("*.pth")))
    before = sorted(path for path in run.rglob("*") if path.is_file())
    for output in (run, run.parent / "run" / ".." / "run"):
        for kind in ("pth", "hf", "gguf"):
            with pytest.raises(UserError, match=r"holds a run, .*: give another --output"):
                export(ExportOptions(run, output, format=kind))
    assert sorted(path for path in run.rglob("*") if path.is_file()) == before
    export(ExportOptions(run, tmp_path / "out", format="pth", dtype="fp32"))
    (exported,) = (tmp_path / "out").iterdir()
    for weights in (torch.load(exported), load_masters(run).state_dict()):
        assert all(torch.equal(weights[name], tensor) for name, tensor in masters.items())


# ------------------------------------------------------------------------------------------------- what is not let in


def edit_json(path: Path, **changes) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, **changes}), encoding="utf-8")


def header(folder: Path, tensors: dict, length: int | None = None) -> None:
    raw = json.dumps(tensors).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", length or len(raw)) + raw + b"\0" * 64)


def link_out(folder: Path, name: str) -> None:
    (folder.parent / "secret").write_bytes((folder / name).read_bytes())
    (folder / name).unlink()
    (folder / name).symlink_to("../secret")


def twice(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for number in (1, 2):
        save_file(tensors, folder / f"model-{number}.safetensors")
    names = dict.fromkeys(tensors, "model-1.safetensors") | {"model.norm.weight": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


HUGE = {"dtype": "F32", "shape": [1 << 40, 1 << 20], "data_offsets": [0, 1 << 62]}
REFUSED = {
    "code in the config": (lambda f: edit_json(f / "config.json", auto_map={"A": "b.C"}), "asks to run code"),
    "code in the tokenizer": (
        lambda f: edit_json(f / "tokenizer_config.json", auto_map={"AutoTokenizer": ["x.Y", None]}),
        "tokenizer_config.json: 'auto_map' asks to run code",
    ),
    "sentencepiece": (
        lambda f: edit_json(f / "tokenizer.json", model={"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 0}),
        "Unigram and not byte-level BPE",
    ),
    "linked weights": (lambda f: link_out(f, "model.safetensors"), "model.safetensors: is a link to"),
    "linked tokenizer": (lambda f: link_out(f, "tokenizer_config.json"), "tokenizer_config.json: is a link to"),
    "a header of 2^60 bytes": (lambda f: header(f, {}, 1 << 60), "not a whole safetensors file"),
    "a tensor of 2^62 bytes": (lambda f: header(f, {"a": HUGE}), "not a whole safetensors file"),
    "a tensor in two files": (twice, "is stored in another file as well"),
    "a billion layers": (lambda f: edit_json(f / "config.json", num_hidden_layers=10**9), "num_hidden_layers is"),
    "minus one head": (lambda f: edit_json(f / "config.json", num_attention_heads=-1), "num_attention_heads is -1"),
    "words for numbers": (lambda f: edit_json(f / "config.json", hidden_size="wide"), 'hidden_size is "wide"'),
    "a list for a number": (lambda f: edit_json(f / "config.json", rms_norm_eps=[1]), "config.json: "),
    "deep nesting": (lambda f: (f / "config.json").write_text("[" * 100_000), "not valid JSON"),
    "a template that loops": (
        lambda f: (f / "chat_template.jinja").write_text(
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
        ),
        "takes more than 2 seconds",
    ),
    "a template that breaks out": (
        lambda f: (f / "chat_template.jinja").write_text("{{ cycler.__init__.__globals__ }}"),
        "its chat template cannot be used",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json"),
    "no tokenizer_config": (lambda f: (f / "tokenizer_config.json").unlink(), "tokenizer_config.json: no such file"),
}


@pytest.mark.parametrize("trick", REFUSED)
def test_folders_that_mean_harm_are_refused_and_nothing_is_left(folders, tmp_path, trick):
    folder = tmp_path / "model"
    shutil.copytree(folders["smollm2"], folder)
    change, words = REFUSED[trick]
    change(folder)
    with pytest.raises((ValueError, OSError)) as caught:
        import_hf(ImportOptions(folder, tmp_path / "run"))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_links_of_the_hugging_face_cache_are_followed(folders, tmp_path):
    snapshot = tmp_path / "models--HuggingFaceTB--SmolLM2" / "snapshots" / "abc123"
    blobs = tmp_path / "models--HuggingFaceTB--SmolLM2" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(folders["smollm2"].iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    import_hf(ImportOptions(snapshot, tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["source"] == "HuggingFaceTB/SmolLM2@abc123"
    MiniGPT.from_pretrained(tmp_path / "run" / "hf")


def test_the_template_of_a_family_keeps_its_folder_name_out_of_the_ids(tmp_path):
    """The same files elsewhere give the same ids and the same hash: nothing random gets into packed data."""
    message = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]
    one, two = (ChatEncoder(write_tokenizer(tmp_path / name, "qwen3")) for name in ("one", "two"))
    assert one.encode(message) == two.encode(message)
