"""The `minigpt` command: one verb a job, no logic.

A verb is a function that takes a dataclass of options. The dataclass's fields are the flags, its docstring is the help,
and a YAML file (`--config`) sets the same fields. Nothing heavy is imported before the verb is known.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from minigpt.errors import UserError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Verb:
    """A job of the command line.

    Attributes:
        function: `module:function`, called with the options.
        options: `module:dataclass`.
        help: One line.
        positional: Whether fields without a default are given by position (`minigpt chat RUN`).
    """

    function: str
    options: str
    help: str
    positional: bool = False


def _train(module: str, options: str, help: str) -> Verb:
    return Verb(f"minigpt.trainer.{module}:main", f"minigpt.trainer.{module}:{options}", help)


_COMMANDS = "minigpt.commands"
VERBS: dict[str, Verb] = {
    "quickstart": Verb(
        "minigpt.quickstart:quickstart",
        "minigpt.quickstart:QuickstartOptions",
        "train a small bilingual model from nothing, in minutes, and see it answer",
    ),
    "data inspect": Verb(
        f"{_COMMANDS}:inspect", f"{_COMMANDS}:InspectOptions", "show what a file or packed folder holds", True
    ),
    "data tokenizer": Verb(
        f"{_COMMANDS}:tokenizer", "data_prep.tokenizer:TokenizerOptions", "train a byte-level BPE tokenizer"
    ),
    "data pack": Verb(f"{_COMMANDS}:pack", "data_prep.pack:PackOptions", "turn raw files into packed Arrow shards"),
    "data verify": Verb(
        f"{_COMMANDS}:verify_data", f"{_COMMANDS}:VerifyDataOptions", "check every byte of a packed folder", True
    ),
    "train pretrain": _train("train_pretrain", "PretrainOptions", "train a model from nothing on plain text"),
    "train sft": _train("train_full_sft", "SFTOptions", "teach a pretrained model to answer, on conversations"),
    "train lora": _train("train_lora", "LoRATrainOptions", "tune a model by a small adapter beside frozen weights"),
    "train reason": _train("train_reason", "ReasonOptions", "teach a fine-tuned model to think before it answers"),
    "train dpo": _train("train_dpo", "DPOOptions", "tune a model on pairs of a better and a worse answer"),
    "train reward": _train("train_reward", "RewardOptions", "learn from such pairs how good an answer is"),
    "train grpo": _train("train_grpo", "GRPOOptions", "improve a model by rewards for its answers, within groups"),
    "train ppo": _train("train_ppo", "PPOOptions", "improve a model by rewards for its answers, with a critic"),
    "chat": Verb("minigpt.generation.chat:chat", "minigpt.generation.chat:ChatOptions", "talk to a model", True),
    "serve": Verb(
        "minigpt.serve.command:serve",
        "minigpt.serve.command:ServeOptions",
        "an OpenAI-compatible server for a model, and a chat page",
        True,
    ),
    "generate": Verb(
        "minigpt.generation.command:run_generate",
        "minigpt.generation.command:GenerateOptions",
        "answer one prompt",
        True,
    ),
    "eval": Verb(
        "minigpt.evaluation.command:evaluate",
        "minigpt.evaluation.command:EvalOptions",
        "judge a model: bits per byte, exact answers, pass@k, multiple choice",
        True,
    ),
    "export": Verb(
        f"{_COMMANDS}:export", f"{_COMMANDS}:ExportOptions", "write a run's weights for other programs", True
    ),
    "import": Verb(f"{_COMMANDS}:import_hf", f"{_COMMANDS}:ImportOptions", "make a run of a Hugging Face folder", True),
    "report": Verb(f"{_COMMANDS}:report", f"{_COMMANDS}:ReportOptions", "curves and numbers of a run", True),
    "verify": Verb(
        "minigpt.milestones:verify",
        "minigpt.milestones:VerifyOptions",
        "run the check of a milestone of the guide",
        True,
    ),
    "doctor": Verb(f"{_COMMANDS}:doctor", f"{_COMMANDS}:DoctorOptions", "what is missing here, and the remedy"),
}
MAY_BE_SHIPPED = ("config", "deepspeed", "layout")  # options that name a file, which may be one of MiniGPT's own
GROUPS = {"data": "text to packed shards", "train": "the training stages"}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the `minigpt` command."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return
    if arguments[0] == "--version":
        import minigpt

        print(minigpt.__version__)
        return
    words = 2 if arguments[0] in GROUPS else 1
    name = " ".join(arguments[:words])
    if words == 2 and (len(arguments) == 1 or arguments[1] in ("-h", "--help")):
        print(_overview(arguments[0]))
        return
    if name not in VERBS:
        _fail(f"there is no command `minigpt {name}`{did_you_mean(name, VERBS)}; `minigpt --help` lists them", 2)
    verb = VERBS[name]
    run_command(_load(verb.function), _load(verb.options), arguments[words:], f"minigpt {name}", verb.positional)


def run_command(
    function: Callable[[Any], Any],
    options: type,
    arguments: Sequence[str] | None = None,
    program: str | None = None,
    positional: bool = False,
) -> None:
    """Parse the options of a verb and call it; errors of the user's end in one sentence and exit status 1.

    Args:
        function: What the verb does.
        options: The dataclass that it takes.
        arguments: Command line; None: this process's.
        program: Name in the help.
        positional: Whether fields without a default are given by position.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    try:
        chosen = parse_options(options, [a for a in arguments if a != "--debug"], program, positional, function.__doc__)
        function(chosen)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        if debug:
            raise
        _fail(_sentence(error), 1)


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or ''}: {error.strerror}".removeprefix(": ")
    if isinstance(error, (UserError, OSError, ValueError)) and str(error):
        return " ".join(str(error).split())
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text} (unexpected; the same command with --debug shows where)"


def parse_options(
    options: type, arguments: list[str], program: str | None = None, positional: bool = False, about: str | None = None
) -> Any:
    """The dataclass `options` filled from a command line and `--config` files. Errors: UserError with a suggestion."""
    from jsonargparse import ArgumentError, ArgumentParser

    description = (about or options.__doc__ or "").strip().split("\n\n")[0]
    parser = ArgumentParser(prog=program, description=description, exit_on_error=False, allow_abbrev=False)
    about_config = "YAML file with any of the options below; MiniGPT's own are found from any folder"
    parser.add_argument("--config", action="config", help=about_config)
    parser.add_class_arguments(options, as_positional=positional, fail_untyped=False)
    fields = typing.get_type_hints(options)
    expanded = _expand(arguments, fields)
    try:
        parsed = parser.parse_args(expanded)
    except ArgumentError as error:
        raise UserError(_explain(str(error), fields, program, positional)) from error
    values = {f.name: parsed[f.name] for f in dataclasses.fields(options) if f.name in parsed}
    values |= {name: text for name, text in _texts(expanded, fields).items() if values.get(name, "") is None}
    for name in filter(values.get, MAY_BE_SHIPPED):
        values[name] = type(values[name])(_shipped(values[name]))
    return options(**{name: _plain(value, fields[name]) for name, value in values.items()})


def _plain(value: Any, kind: Any) -> Any:
    """jsonargparse's namespaces as the dataclasses they stand for."""
    if dataclasses.is_dataclass(kind) and not dataclasses.is_dataclass(value):
        return kind(**vars(value))  # type: ignore[operator]
    return value


def _shipped(path: str | Path) -> str | Path:
    """A file that comes with MiniGPT, called what it is called in the repository (`ds_configs/zero2.json`), wherever
    it is installed and whatever the working directory is; another path as it is. A file of the user's goes first.
    """
    ours = Path(__file__).parents[1] / path
    return ours if not os.path.exists(path) and os.path.isfile(ours) else path


def _expand(arguments: list[str], fields: dict[str, Any]) -> list[str]:
    """The habits of command lines: `--flag` alone, `--input A B C`, `--batch_size`, and the launcher's --local_rank."""
    expanded, i = [], 0
    while i < len(arguments):
        argument = arguments[i]
        i += 1
        if argument.startswith("--local_rank"):  # the environment says it too
            continue
        if not argument.startswith("--"):
            expanded.append(argument)
            continue
        name, has_value, value = argument.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if name == "batch_size" and "global_batch_size" in fields:
            name = "global_batch_size"
        kind = os.PathLike if name == "config" else fields.get(name)
        if kind is None:  # the parser's own (--help), or nobody's
            expanded.append(argument)
            continue
        values = [value] if has_value else []
        while not has_value and i < len(arguments) and not arguments[i].startswith("--"):
            values.append(arguments[i])
            i += 1
        if name == "config" and values:
            values[0] = str(_shipped(values[0]))
        if _accepts(kind, list) and values == ["[]"]:
            expanded.append(f"--{name}=[]")
        elif _accepts(kind, list) and not value.startswith("["):
            if not values:
                raise UserError(f"--{name} needs at least one value")
            expanded.append(f"--{name}={json.dumps(values, ensure_ascii=False)}")
        elif _accepts(kind, bool) and not values:
            expanded.append(f"--{name}=true")
        elif values:  # with the equals sign a value may begin with a dash; what follows it is given by position
            expanded += [f"--{name}={values[0]}", *values[1:]]
        else:
            expanded.append(f"--{name}")
    return expanded


def _texts(expanded: list[str], fields: dict[str, Any]) -> dict[str, str]:
    """The texts that were given for text options, by flags or in `--config` files, as they were written.

    jsonargparse reads every text as YAML once more, where `null`, `~` and `# a heading` are nothing: what it takes for
    None is put right by these.
    """
    texts: dict[str, str] = {}
    for argument in (argument for argument in expanded if argument.startswith("--")):
        option, _, value = argument.removeprefix("--").partition("=")
        given = _read_yaml(value) if option == "config" and os.path.isfile(value) else {option: value}
        for name, text in given.items():
            texts.pop(name, None)
            if isinstance(text, str) and _accepts(fields.get(name), str):
                texts[name] = text
    return texts


def _read_yaml(path: str) -> dict[str, Any]:
    """A `--config` file that jsonargparse has read without complaint."""
    import yaml

    with open(path, encoding="utf-8") as file:
        return yaml.safe_load(file) or {}


def _accepts(kind: Any, wanted: type) -> bool:
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    return any(k is wanted or typing.get_origin(k) is wanted for k in kinds)


def _explain(message: str, fields: dict[str, Any], program: str | None, positional: bool) -> str:
    """One sentence of jsonargparse's complaint, with the option that was probably meant."""
    text = " ".join(message.split())
    program = program or sys.argv[0]
    unknown = re.search(
        r"[Uu]nrecognized arguments: (\S+)|(?:[Kk]ey|[Oo]ption) ['\"]?([\w.]+)['\"]? is not (?:exp|acc)", text
    )
    if unknown:
        word = unknown[1] or unknown[2]
        name, hint = word.lstrip("-").split("=")[0], f"`{program} --help` lists them"
        if unknown[2] or word.startswith("-"):
            return f"unknown option {name}{did_you_mean(name, fields)}; {hint}"
        remedy = "a text with spaces needs quotes"
        if "prompt" in fields:
            remedy = "a text to answer is given by --prompt, in quotes"
        if name in fields:
            remedy = f"did you mean --{name}?"
        return f"the word {word} belongs to no option, {remedy}; {hint}"
    if no_file := re.search(r'Parser key "config": (?:File does not exist|Path is not a file): (.+)', text):
        return f"there is no file {no_file[1]} for --config"
    if no_yaml := re.search(r"Problems parsing config: (.*)", text):
        return f"the file of --config is no valid YAML: {no_yaml[1]}"
    if bare := re.match(r"argument (--\w+): expected one argument", text):
        return f"{bare[1]} needs a value"
    if missing := re.search(r"arguments are required: ([\w, ]+)", text):
        names = missing[1].split(", ")
        call = " ".join(name.upper() if positional else f"--{name} {name.upper()}" for name in names)
        return f"`{program}` needs {call}; `{program} --help` explains it"
    wrong = re.match(r'Parser key "(\w+)": .*(?:Given value|Got value): (.*)', text)
    if wrong and wrong[1] in fields:
        return f"--{wrong[1]} is {wrong[2]}, it must be {_in_words(fields[wrong[1]])}"
    return text.removeprefix("error: ")


def _in_words(kind: Any) -> str:
    """A type as a person would say it: `int | None` → "a whole number or null"."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "null"}
    if kind in names:
        return names[kind]
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(map(str, typing.get_args(kind)))
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return " or ".join(map(_in_words, typing.get_args(kind)))
    if typing.get_origin(kind) is list:
        return f"a list, each {_in_words(typing.get_args(kind)[0])}"
    return "a path" if isinstance(kind, type) and issubclass(kind, os.PathLike) else str(kind)


def _load(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _overview(group: str | None = None) -> str:
    lines = ["MiniGPT: from raw text to a model that chats and reasons, on your own machine.", ""]
    if group is None:
        lines += ["usage: minigpt COMMAND [options]     (minigpt COMMAND --help explains each)", ""]
    else:
        lines = [f"minigpt {group}: {GROUPS[group]}", ""]
    for name, verb in VERBS.items():
        if group is None or name.startswith(group + " "):
            lines.append(f"  {name:<16} {verb.help}")
    if group is None:
        lines += ["", "Start with:  minigpt quickstart"]
    return "\n".join(lines)


def _fail(sentence: str, status: int) -> NoReturn:
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
