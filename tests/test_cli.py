"""The `minigpt` command: verbs, flags, YAML files, and mistakes that end in one sentence."""

import dataclasses
import importlib
import json
import os
import pty
import subprocess
import sys
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from minigpt.cli import VERBS, main, parse_options
from minigpt.errors import UserError
from minigpt.rl.layout import choose_layout
from minigpt.rl.options import GRPOOptions, PPOOptions
from minigpt.trainer.train_pretrain import PretrainOptions

REPOSITORY = Path(__file__).resolve().parents[1]
RECIPES = sorted(path.relative_to(REPOSITORY) for path in (REPOSITORY / "minigpt").rglob("recipes/*po_*.yaml"))
MINIGPT = [sys.executable, "-m", "minigpt"]


@dataclass
class Options:
    """A few options of every kind.

    Args:
        run: A folder.
        data: Files.
        max_steps: Steps.
        learning_rate: Rate.
        dtype: Precision.
        overwrite: Start over.
        global_batch_size: Rows.
        prompt: Text.
    """

    run: Path
    data: list[Path] = field(default_factory=list)
    max_steps: int | None = None
    learning_rate: float = 1e-3
    dtype: Literal["bf16", "fp32"] = "bf16"
    overwrite: bool = False
    global_batch_size: int = 16
    prompt: str | None = None


def parse(*arguments: str) -> Options:
    return parse_options(Options, list(arguments), "minigpt try", positional=True)


def refusal(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory, shipped_tokenizer) -> Path:
    """A finished pretrain run with random weights."""
    from minigpt.model.model_minigpt import MiniGPT, MiniGPTConfig

    folder = tmp_path_factory.mktemp("tiny")
    model = MiniGPT(MiniGPTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1))
    model.save_pretrained(folder / "hf", tokenizer_folder=shipped_tokenizer)
    (folder / "summary.json").write_text(json.dumps({"stage": "pretrain"}))
    return folder


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*MINIGPT, *map(str, arguments)], capture_output=True, text=True)


def test_flags_fill_the_dataclass_with_typed_values():
    options = parse("out/a", "--data", "x", "y z", "--max_steps", "7", "--overwrite", "--dtype=fp32")
    assert parse("a", '--data=["x", "y z"]').data == [Path("x"), Path("y z")]
    assert parse("out/a", "--data=x", "--max-steps=7", "--learning-rate", "-1.5") == Options(
        Path("out/a"), data=[Path("x")], max_steps=7, learning_rate=-1.5
    )
    assert options == Options(Path("out/a"), data=[Path("x"), Path("y z")], max_steps=7, overwrite=True, dtype="fp32")


def test_the_guides_batch_size_is_the_global_one():
    assert parse("a", "--batch_size", "2").global_batch_size == 2
    assert parse("a", "--batch-size=3").global_batch_size == 3


def test_the_launchers_local_rank_is_passed_over():
    assert parse("a", "--local_rank=1").run == Path("a")


def test_a_yaml_file_sets_the_same_fields_and_flags_win(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("max_steps: 5\nlearning_rate: 0.01\ndata: [a, b]\n")
    options = parse("r", "--config", str(file), "--max_steps", "9")
    assert (options.max_steps, options.learning_rate, options.data) == (9, 0.01, [Path("a"), Path("b")])


# What YAML reads as nothing, a number, a truth value, a list or a mapping, and what command lines take for options
TEXTS = ("null", "~", " Null ", "# Title", "&a", "5", "1e3", "true", "[a]", "a: b", "- a", "-", "-x", "'q'", "", "x y")


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_option_is_the_text_as_it_was_written(text, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps({"prompt": text}))
    assert parse("r", "--prompt", text).prompt == text
    assert parse(f"--prompt={text}", "r").prompt == text
    assert parse("r", "--config", str(file)).prompt == text
    assert parse("r", f"--config={file}", "--prompt", "other").prompt == "other"


def test_a_word_that_is_called_like_a_text_option_is_no_text():
    assert parse("prompt").prompt is None
    assert parse("--prompt", "null", "prompt").prompt == "null"


def test_nothing_is_said_by_null_where_it_can_be_no_text(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("prompt: null\nmax_steps: 3")
    options = parse("r", "--prompt", "x", "--config", str(file), "--max_steps", "null")
    assert (options.prompt, options.max_steps) == (None, None)


def test_no_command_reads_a_text_as_nothing():
    for name, verb in VERBS.items():
        module, _, attribute = verb.options.partition(":")
        options = getattr(importlib.import_module(module), attribute)
        fields = typing.get_type_hints(options)
        needed = ["r" for f in dataclasses.fields(options) if f.default is f.default_factory and verb.positional]
        for text in (name for name, kind in fields.items() if kind == str | None):
            arguments = [*needed, f"--{text}", "null"]
            if text == "stop_when":  # a text with a form
                with pytest.raises(UserError, match="--stop_when is null, it must be"):
                    parse_options(options, arguments, positional=verb.positional)
                continue
            parsed = parse_options(options, arguments, positional=verb.positional)
            assert getattr(parsed, text) == "null", f"minigpt {name} --{text}"


@pytest.mark.parametrize("arguments", [("--max_step", "3"), ("--max-step=3",), ("--maxsteps", "3")])
def test_an_unknown_option_names_the_one_that_was_meant(arguments):
    message = refusal("r", *arguments)
    assert "unknown option" in message
    assert "did you mean max_steps?" in message


@pytest.mark.parametrize(
    ("arguments", "word", "remedy"),
    [
        (("extra",), "extra", "a text to answer is given by --prompt, in quotes"),
        (("--prompt", "two", "words", "more"), "words", "a text to answer is given by --prompt, in quotes"),
        (("data", "packed"), "data", "did you mean --data?"),
    ],
)
def test_a_word_too_many_is_told_from_an_unknown_option(arguments, word, remedy):
    sentence = f"the word {word} belongs to no option, {remedy}; `minigpt try --help` lists them"
    assert refusal("r", *arguments) == sentence


def test_a_missing_word_is_named_with_where_it_goes():
    assert refusal() == "`minigpt try` needs RUN; `minigpt try --help` explains it"
    with pytest.raises(UserError, match=r"^`minigpt try` needs --run RUN; "):
        parse_options(Options, [], "minigpt try")


def test_an_unknown_key_of_a_yaml_file_names_the_one_that_was_meant(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("learning_rat: 5\n")
    assert "unknown option learning_rat, did you mean learning_rate?" in refusal("r", "--config", str(file))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--max_steps", "x"), "--max_steps is x, it must be a whole number or null"),
        (("--max_steps", "1.5"), "--max_steps is 1.5, it must be a whole number or null"),
        (("--learning_rate", "fast"), "--learning_rate is fast, it must be a number"),
        (("--dtype", "fp64"), "--dtype is fp64, it must be bf16 or fp32"),
        (("--overwrite", "maybe"), "--overwrite is maybe, it must be true or false"),
        (("--data",), "--data needs at least one value"),
        (("--max_steps", "--overwrite"), "--max_steps needs a value"),
        (("--config",), "--config needs a value"),
    ],
)
def test_a_wrong_value_is_named_with_what_it_must_be(arguments, sentence):
    assert refusal("r", *arguments) == sentence


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_recipes_and_the_files_that_they_name_are_found_from_any_folder(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = parse_options(GRPOOptions if recipe.name.startswith("grpo") else PPOOptions, ["--config", str(recipe)])
    assert options.deepspeed is None or json.loads(options.deepspeed.read_text())["zero_optimization"]["stage"] == 2
    choose_layout(options.layout, 16)


def test_the_users_own_file_goes_before_the_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = parse_options(PretrainOptions, ["--deepspeed", "ds_configs/zero2.json"]).deepspeed
    assert shipped == REPOSITORY / "ds_configs" / "zero2.json"
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / "ds_configs" / "zero2.json").write_text("{}")
    own = parse_options(PretrainOptions, ["--deepspeed", "ds_configs/zero2.json"]).deepspeed
    assert own == Path("ds_configs/zero2.json")
    missing = parse_options(PretrainOptions, ["--deepspeed", "ds_configs/zero9.json"]).deepspeed
    assert missing == Path("ds_configs/zero9.json"), "the trainer says that there is none"


def test_a_missing_yaml_file_is_named():
    assert refusal("r", "--config", "/nowhere.yaml") == "there is no file '/nowhere.yaml' for --config"
    assert refusal("r", "--config", "/") == "there is no file '/' for --config"


def test_a_yaml_file_with_an_open_bracket_is_told_from_a_wrong_option(tmp_path):
    (tmp_path / "run.yaml").write_text("max_steps: 3\ndata: [a\n")
    refused = refusal("r", "--config", str(tmp_path / "run.yaml"))
    assert refused.startswith("the file of --config is no valid YAML: ")
    assert "line 2" in refused


def test_every_verb_exists_and_all_its_options_have_a_help_text():
    for name, verb in VERBS.items():
        for path in (verb.function, verb.options):
            module, _, attribute = path.partition(":")
            assert hasattr(importlib.import_module(module), attribute), name
        module, _, attribute = verb.options.partition(":")
        options = getattr(importlib.import_module(module), attribute)
        documented = "".join(parent.__doc__ or "" for parent in options.__mro__[:-1])
        missing = [f.name for f in dataclasses.fields(options) if f"  {f.name}: " not in documented]
        assert not missing, f"{name}: {missing}"


@pytest.mark.parametrize("name", ["train pretrain", "data pack", "generate"])
def test_help_lists_the_flags_with_their_defaults(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*name.split(), "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    options = {"train pretrain": "--max_steps", "data pack": "--seq_len", "generate": "--max_new_tokens"}
    assert options[name] in text
    assert "default:" in text


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("chta",), 2, ("no command `minigpt chta`", "did you mean chat?")),
        (("data", "pak"), 2, ("did you mean data pack?",)),
        (("chat",), 1, ("needs RUN",)),
        (("generate", "/nowhere/run", "--prompt", "x"), 1, ("/nowhere/run",)),
        (("chat", "/nowhere/run"), 1, ("/nowhere/run",)),
        (("data", "verify", "/nowhere/data"), 1, ("/nowhere/data",)),
        (("data", "inspect", "/nowhere/file"), 1, ("/nowhere/file",)),
        (("report", "/nowhere/run"), 1, ("/nowhere/run",)),
        (("export", "/nowhere/run"), 1, ("/nowhere/run",)),
        (("import", "/nowhere/model"), 1, ("/nowhere/model",)),
        (("import", "/"), 1, ("config.json",)),
        (("verify", "11"), 1, ("milestone 11",)),
        (("train", "pretrain", "--max_step", "1"), 1, ("max_steps",)),
    ],
)
def test_mistakes_end_in_one_sentence_and_a_status(arguments, status, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    output = capsys.readouterr()
    assert ended.value.code == status
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    assert all(word in output.err for word in words), output.err
    assert not list(tmp_path.iterdir()), "something was written"


@pytest.mark.parametrize(
    ("content", "where"),
    [
        (b'{"text": "good"}\n{"text": \n', "bad.jsonl:2"),
        (b'{"text": "good"}\n{"txt": "x"}\n', "bad.jsonl:2"),
        (b'{"text": "\xff\xfe"}\n', "bad.jsonl:1"),
        (b"", "bad.jsonl"),
    ],
)
def test_bad_input_to_pack_names_file_and_line_and_leaves_nothing(content, where, tmp_path):
    source = tmp_path / "bad.jsonl"
    source.write_bytes(content)
    packed = run("data", "pack", "--stage", "pretrain", "--input", source, "--output", tmp_path / "packed")
    assert packed.returncode == 1
    sentence = packed.stderr.strip().splitlines()[-1]
    assert sentence.startswith("error: ")
    assert where in sentence
    assert "Traceback" not in packed.stderr
    assert not (tmp_path / "packed" / "manifest.json").exists()


def test_debug_shows_where_and_without_it_there_is_no_traceback(tmp_path):
    assert "Traceback" not in run("export", tmp_path / "none").stderr
    assert "Traceback" in run("export", tmp_path / "none", "--debug").stderr


def test_pack_verify_train_generate_and_export_by_the_names_that_scripts_rely_on(tmp_path):
    source, packed, out, model = (tmp_path / name for name in ("text.jsonl", "packed", "run", "model"))
    stories = (f"story {i}: the cat sat on mat {i * 7} and looked at the moon {i} times" for i in range(200))
    source.write_text("".join(json.dumps({"text": story}) + "\n" for story in stories))
    tokenizer = Path(importlib.import_module("minigpt").__file__).parent / "model"
    small = ("--hidden_size", 32, "--num_hidden_layers", 1, "--num_attention_heads", 2, "--num_key_value_heads", 1)
    steps = [
        ("data", "pack", "--stage", "pretrain", "--input", source, "--tokenizer", tokenizer, "--seq_len", 64,
         "--output", packed, "--workers", 1),
        ("data", "verify", packed),
        ("train", "pretrain", "--data", packed, "--save_dir", out, "--max_steps", 2, *small,
         "--intermediate_size", 64, "--compile", "false", "--dtype", "fp32", "--threads", 1),
        ("generate", out, "--prompt", "the cat", "--max_new_tokens", 4, "--temperature", 0, "--chat", "off"),
        ("export", out, "--format", "hf", "--output", model),
        ("import", model, "--output", tmp_path / "imported"),
        ("generate", tmp_path / "imported", "--prompt", "the cat", "--max_new_tokens", 4, "--temperature", 0,
         "--chat", "off"),
    ]  # fmt: skip
    outputs = []
    for step in steps:
        done = run(*step)
        assert done.returncode == 0, (step, done.stdout, done.stderr)
        outputs.append(done.stdout)
    assert "loss: " in outputs[2]
    assert (model / "config.json").exists()
    assert (tmp_path / "imported" / "hf" / "model.safetensors").exists()
    assert outputs[3] == outputs[6], "an exported and imported model writes the same"


def generate_at_a_terminal(run: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`minigpt generate` whose standard input is a terminal at which somebody types "the cat" and Ctrl-D."""
    terminal, keyboard = pty.openpty()
    os.write(terminal, b"the cat\n\x04")
    command = [*MINIGPT, "generate", run, "--max_new_tokens", "2", "--temperature", "0", *arguments]
    try:
        return subprocess.run(list(map(str, command)), stdin=keyboard, capture_output=True, text=True, timeout=300)
    finally:
        os.close(terminal)
        os.close(keyboard)


def test_a_prompt_that_is_waited_for_at_a_terminal_is_asked_for(tiny_run):
    asked = "no --prompt: type it here, then Ctrl-D on a line of its own\n"
    typed = generate_at_a_terminal(tiny_run)
    assert (typed.returncode, typed.stderr) == (0, asked)
    given = generate_at_a_terminal(tiny_run, "--prompt", "the cat\n")
    assert (given.returncode, given.stdout, given.stderr) == (0, typed.stdout, "")
    piped = subprocess.run(
        [*MINIGPT, "generate", tiny_run, "--max_new_tokens", "2", "--temperature", "0"],
        input="the cat\n", capture_output=True, text=True,
    )  # fmt: skip
    assert (piped.stdout, piped.stderr) == (typed.stdout, "")
    assert asked not in generate_at_a_terminal(tiny_run / "nowhere").stderr, "a wrong run is told before"


def test_the_help_of_the_command_imports_nothing_heavy():
    program = "import sys; from minigpt.cli import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    heavy = {"torch", "numpy", "transformers", "tokenizers", "deepspeed", "pyarrow", "ray", "jsonargparse", "rich"}
    assert not heavy & set(done.stderr.split())


def test_a_reader_that_goes_away_is_no_error():
    """`minigpt train pretrain --help | head -1`: the pipe closes under the writer."""
    command = f"{sys.executable} -m minigpt.cli train pretrain --help | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
