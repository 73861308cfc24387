"""`minigpt generate`: one prompt, one continuation, on standard output as it is made."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from minigpt.errors import UserError

if TYPE_CHECKING:
    from minigpt.generation.sampling import SamplingParams


@dataclass
class ModelOptions:
    """What every command that samples from a model can be told.

    Args:
        run: Run folder, Hugging Face folder or .pth file.
        max_new_tokens: Most tokens of an answer.
        temperature: 0 always takes the most probable token; larger is more random.
        top_k: Sample among the k most probable tokens only; 0: all.
        top_p: Sample among the most probable tokens that make up this probability; 1: all.
        min_p: Drop tokens less than this fraction as probable as the best one; 0: none.
        repetition_penalty: Above 1 makes tokens that already occurred less probable.
        seed: Of the random numbers; the same seed gives the same text.
        system: System message of a chat.
        think: In a chat: thinking on, off, or auto: as the model likes.
        device: auto, cpu or cuda.
        dtype: auto, fp32 or bf16.
        adapter: A LoRA adapter for the model: the folder of one in PEFT's format, or a run that trained one.
    """

    run: Path
    max_new_tokens: int = 512
    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 0.9
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    system: str | None = None
    think: Literal["auto", "on", "off"] = "auto"
    device: str = "auto"
    dtype: str = "auto"
    adapter: Path | None = None


@dataclass
class GenerateOptions(ModelOptions):
    """Options of `minigpt generate`.

    Args:
        prompt: The text to continue or the question to answer; by default standard input.
        stop: The text ends before the first of these strings.
        chat: Treat the prompt as a question in a chat: on, off (continue the text), or auto: off for pretrained runs.
    """

    prompt: str | None = None
    stop: list[str] = field(default_factory=list)
    chat: Literal["auto", "on", "off"] = "auto"


def sampling_params(options: ModelOptions, stop: Sequence[str] = ()) -> SamplingParams:
    """The sampling parameters that the options mean, without the ids that the model stops at.

    Raises:
        ValueError: for values that mean nothing, such as a top_p of 3.
    """
    from minigpt.generation.sampling import SamplingParams

    shared = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    return SamplingParams(stop=tuple(stop), **{name: getattr(options, name) for name in shared})


def run_generate(options: GenerateOptions) -> str:
    """Answer a prompt, or continue a text, on standard output; the text is returned as well.

    Raises:
        UserError, ValueError, FileNotFoundError: one sentence, for a run that cannot be loaded or a prompt that is too
            long.
    """
    params = sampling_params(options, options.stop)  # wrong options are told before anything is loaded
    from minigpt.generation.generate import stop_token_ids, stream
    from minigpt.generation.load import load_for_inference, stage_of
    from minigpt.generation.text import StopStrings, TextStream, printable

    model, encoder = load_for_inference(options.run, options.device, options.dtype, options.adapter)
    prompt = options.prompt if options.prompt is not None else _read_prompt()
    params = replace(params, stop_token_ids=stop_token_ids(model))
    answers = stage_of(options.run) != "pretrain" and encoder.knows_chat
    if options.chat == "on" or (options.chat == "auto" and answers):
        system = [{"role": "system", "content": options.system}] if options.system else []
        messages = [*system, {"role": "user", "content": prompt}]
        prompt_ids = encoder.encode_prompt(messages, enable_thinking=thinking_switch(options.think))
    else:
        prompt_ids = [*encoder.bos_ids, *encoder.encode_text(prompt)] or [encoder.eos_id]

    decoder, stop, parts = TextStream(encoder.decode), StopStrings(params.stop), []

    def show(text: str) -> None:
        parts.append(text)
        print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)

    for token in stream(model, prompt_ids, params):
        if token not in params.stop_token_ids:
            show(stop.push(decoder.push(token)))
        if stop.found is not None:
            break
    show(stop.push(decoder.flush()) + stop.flush())
    print(flush=True)
    return "".join(parts)


def _read_prompt() -> str:
    """Standard input; a person at a terminal is told that it is waited for."""
    if sys.stdin.isatty():
        print("no --prompt: type it here, then Ctrl-D on a line of its own", file=sys.stderr, flush=True)
    return sys.stdin.read()


def thinking_switch(think: str) -> bool | None:
    """The template's `enable_thinking` for auto, on and off."""
    if think not in ("auto", "on", "off"):
        raise UserError(f"think is {think!r}: use on, off or auto")
    return {"auto": None, "on": True, "off": False}[think]
