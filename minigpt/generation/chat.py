"""`minigpt chat`: a conversation in the terminal.

Ctrl-C stops the answer, never the program; Ctrl-D or /exit ends it. Works with a pipe as well: one message a line.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TextIO

from minigpt.generation.command import ModelOptions, sampling_params, thinking_switch
from minigpt.generation.text import printable

if TYPE_CHECKING:
    from minigpt.dataset.chat import ChatEncoder
    from minigpt.generation.engine import Engine
    from minigpt.model.model_minigpt import MiniGPT

HELP = """/reset              forget the conversation
/think on|off|auto  let the model think first, never, or as it likes
/help               this list
/exit               leave (or Ctrl-D)
Ctrl-C stops an answer."""
DIM, PLAIN = "\x1b[2m", "\x1b[0m"


@dataclass
class ChatOptions(ModelOptions):
    """Options of `minigpt chat`: those of every command that samples."""


def chat(options: ChatOptions) -> None:
    """Talk to a model in the terminal, until /exit or the end of the input.

    Raises:
        UserError, ValueError, FileNotFoundError: one sentence, for a run that cannot be loaded.
    """
    sampling = sampling_params(options)  # wrong options are told before anything is loaded
    from minigpt.generation.generate import stop_token_ids
    from minigpt.generation.load import load_for_inference, stage_of

    model, encoder = load_for_inference(options.run, options.device, options.dtype, options.adapter)
    sampling = replace(sampling, stop_token_ids=stop_token_ids(model))
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores Ctrl-C
    terminal = Terminal(sys.stdin, sys.stdout)
    terminal.note(f"{options.run}: {model.num_parameters() / 1e6:.1f} M parameters. /help lists the commands.")
    if stage_of(options.run) == "pretrain":
        terminal.note("This run is only pretrained: it continues text and has not learnt to answer. Train sft on it.")
    Conversation(model, encoder, sampling, terminal, options.system, thinking_switch(options.think)).run()


class Terminal:
    """Lines in, text out; dim parts and notes only where a person looks on."""

    def __init__(self, stdin: TextIO, stdout: TextIO) -> None:
        self._stdin, self._stdout = stdin, stdout
        self.interactive = stdin.isatty() and stdout.isatty()
        self._dim = False
        if hasattr(stdin, "reconfigure"):
            stdin.reconfigure(errors="replace")  # a stray byte is no reason to leave
        if self.interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (line editing and history for input())

    def read(self) -> str | None:
        """The next line, None at the end of the input."""
        if not self.interactive:
            line = self._stdin.readline()
            return line.rstrip("\r\n") if line else None
        while True:
            try:
                return input("\nyou> ")
            except EOFError:
                self.write("\n")
                return None
            except KeyboardInterrupt:
                self.note("\n/exit or Ctrl-D leaves.")

    def write(self, text: str) -> None:
        """Prints text of a model or of ours at once."""
        self._stdout.write(printable(text))
        self._stdout.flush()

    def thinking(self, on: bool) -> None:
        """Marks the beginning or the end of a thinking part: dim for a person, tags for a program."""
        if on == self._dim:
            return
        self._dim = on
        marks = (DIM, PLAIN + "\n") if self.interactive else ("<think>", "</think>\n")
        self._stdout.write(marks[0] if on else marks[1])
        self._stdout.flush()

    def note(self, text: str) -> None:
        """A remark that is not part of the conversation; in a pipe it goes to standard error."""
        if self.interactive:
            self._stdout.write(f"{DIM}{text}{PLAIN}\n")
            self._stdout.flush()
        else:
            print(text, file=sys.stderr, flush=True)


class Conversation:
    """The state of a chat: messages, thinking switch, and the model that answers."""

    def __init__(
        self,
        model: MiniGPT,
        encoder: ChatEncoder,
        sampling: Any,
        terminal: Terminal,
        system: str | None = None,
        enable_thinking: bool | None = None,
    ) -> None:
        self.model, self.encoder, self.sampling, self.terminal = model, encoder, sampling, terminal
        self.enable_thinking = enable_thinking
        self.start = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, Any]] = list(self.start)
        self._engine: Engine | None = None
        self.answers = 0  # each answer draws from a random stream of its own

    def run(self) -> None:
        """Reads and answers until /exit or the end of the input."""
        while (line := self.terminal.read()) is not None:
            line = line.strip()
            if line in ("/exit", "/quit"):
                return
            if line.startswith("/"):
                self.command(line)
            elif line:
                self.answer(line)

    def command(self, line: str) -> None:
        """Carries out a line that begins with a slash."""
        name, *arguments = line.split()
        if name == "/reset" and not arguments:
            self.messages = list(self.start)
            self.terminal.note("The conversation is forgotten.")
        elif name == "/think" and len(arguments) == 1 and arguments[0] in ("on", "off", "auto"):
            self.enable_thinking = thinking_switch(arguments[0])
            self.terminal.note(f"Thinking is {arguments[0]}.")
        else:
            if name != "/help":
                self.terminal.note(f"{line} is not a command.")
            self.terminal.note(HELP)

    def answer(self, text: str) -> None:
        """Answers one message; what was said before an interruption stays in the conversation."""
        with interrupt_flag() as interrupted:
            self._answer(text, interrupted)

    def _answer(self, text: str, interrupted: threading.Event) -> None:
        from minigpt.generation.answer import AnswerStream

        self.messages.append({"role": "user", "content": text})
        prompt_ids = self.prompt_ids()
        if prompt_ids is None:
            self.messages.pop()
            self.terminal.note(
                f"This message does not fit into the context of {self.model.config.max_position_embeddings} tokens; "
                f"send a shorter one."
            )
            return
        parts = AnswerStream(self.encoder, self.enable_thinking)
        started, tokens, stopped = time.perf_counter(), 0, False
        if self.terminal.interactive:
            self.terminal.write("\n")
        for kind, piece in self.pieces(prompt_ids, parts):
            tokens += 1
            self.show(kind, piece)
            if interrupted.is_set():
                stopped = True
                break
        for part in parts.flush():
            self.show(*part)
        self.terminal.thinking(False)
        self.terminal.write("\n")
        self.messages.append(parts.message())
        self.answers += 1
        if self.terminal.interactive:
            rate = tokens / max(time.perf_counter() - started, 1e-9)
            self.terminal.note(f"{'stopped, ' if stopped else ''}{tokens} tokens, {rate:.0f} tokens/s")

    def pieces(self, prompt_ids: list[int], parts: Any) -> Iterator[tuple[str, str]]:
        """One (kind, text) for every token, "" where a token adds no text yet."""
        from minigpt.generation.engine import Engine

        if self._engine is None:
            self._engine = Engine(self.model, slots=1)  # it remembers what it read: the turns so far
        for token in self._engine.stream(prompt_ids, self.sampling, sequence_id=self.answers):
            if token in self.sampling.stop_token_ids:
                return
            new = parts.push(token)
            yield new[0] if new else ("", "")

    def show(self, kind: str, text: str) -> None:
        """Prints a piece of the answer."""
        from minigpt.generation.answer import THINKING

        if text:
            self.terminal.thinking(kind == THINKING)
            self.terminal.write(text)

    def prompt_ids(self) -> list[int] | None:
        """The conversation as ids. The oldest turns are dropped when it has outgrown the context; None: even the last
        message alone does not fit."""
        context = self.model.config.max_position_embeddings
        room = min(self.sampling.max_new_tokens, context // 4)
        first = len(self.start)
        turns = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        for begin in turns:
            messages = self.start + self.messages[begin:]
            ids = self.encoder.encode_prompt(messages, enable_thinking=self.enable_thinking)
            if len(ids) + room <= context:
                if begin > first:
                    self.terminal.note("The conversation has outgrown the context; its oldest turns are forgotten.")
                    self.messages = messages
                return ids
        return None


@contextlib.contextmanager
def interrupt_flag() -> Iterator[threading.Event]:
    """While open, Ctrl-C sets the event it gives; a second Ctrl-C interrupts as usual."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def handle(signum: int, frame: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)
