"""The terminal chat through a real pseudo-terminal and through a pipe, and `generate`."""

import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest
import torch

from minigpt.errors import UserError
from minigpt.generation import chat as chat_module
from minigpt.generation.chat import Conversation, Terminal
from minigpt.generation.command import GenerateOptions, run_generate
from minigpt.generation.generate import generate
from minigpt.generation.load import load_for_inference
from minigpt.generation.sampling import SamplingParams

SCRIPT = [sys.executable, str(chat_module.__file__).replace("generation/chat.py", "scripts/chat.py")]
PATIENCE = 60.0  # seconds for a loaded machine


class Person:
    """Somebody at a terminal: types, reads the screen, presses keys."""

    def __init__(self, arguments: list[str]) -> None:
        self.screen_fd, terminal = pty.openpty()
        # A session of its own whose terminal is the pty: Ctrl-C arrives as it does in real life. Not by pty.fork():
        # Python code between fork and exec may wait forever for a lock that a thread of the tests' process held.
        self.program = subprocess.Popen(
            ["setsid", "--ctty", *arguments],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"},
        )
        os.close(terminal)
        self.screen = ""

    def type(self, text: str) -> None:
        os.write(self.screen_fd, text.encode())

    def see(self, pattern: str) -> str:
        """Waits until the screen shows the pattern behind what was seen before."""
        deadline = time.monotonic() + PATIENCE
        while not (match := re.search(pattern, self.screen, re.S)):
            if time.monotonic() > deadline or not self._read():
                raise AssertionError(f"{pattern!r} did not appear; the screen shows {self.screen!r}")
        self.screen = self.screen[match.end() :]
        return match.group()

    def leave(self) -> int:
        """Waits for the end of the program, returns its exit status."""
        while self._read():
            pass
        return self.program.wait(PATIENCE)

    def send_away(self) -> None:
        """Ends the program if it still runs, so that a failed test leaves nothing behind."""
        self.program.kill()
        self.program.wait(PATIENCE)
        os.close(self.screen_fd)

    def _read(self) -> bool:
        if not select.select([self.screen_fd], [], [], PATIENCE)[0]:
            return False
        try:
            data = os.read(self.screen_fd, 4096)
        except OSError:  # how Linux says that the other end is closed
            return False
        self.screen += data.decode(errors="replace")
        return bool(data)


def test_chat_on_a_terminal(run_folder):
    """Answers, stops on Ctrl-C and goes on, obeys the commands, survives Ctrl-C at the prompt, leaves on Ctrl-D."""
    person = Person([*SCRIPT, str(run_folder), "--max_new_tokens", "4000", "--temperature", "0"])
    try:
        person.see(r"M parameters.*you> ")
        person.type("hello\n")
        person.see(r"hello\r\n\r\n.{40}")  # the answer has begun; it would be 4,000 tokens long
        person.type("\x03")
        person.see(r"stopped, \d+ tokens, .*you> ")
        person.type("/think on\n")
        person.see(r"Thinking is on.*you> ")
        person.type("again\n")
        person.see(re.escape(chat_module.DIM) + r"[^\x1b]")  # thinking is shown dim
        person.type("\x03")
        person.see(r"stopped, .*you> ")
        time.sleep(0.5)  # readline shows its prompt a moment before it listens to Ctrl-C
        person.type("\x03")
        person.see(r"/exit or Ctrl-D leaves.*you> ")
        person.type("/nonsense\n")
        person.see(r"/nonsense is not a command.*/reset.*you> ")
        person.type("/reset\n")
        person.see(r"forgotten.*you> ")
        person.type("\x04")
        assert person.leave() == 0
    finally:
        person.send_away()


def test_chat_through_a_pipe_answers_one_message_a_line_and_keeps_remarks_off_standard_output(run_folder):
    arguments = [*SCRIPT, str(run_folder), "--max_new_tokens", "8", "--temperature", "0", "--think", "off"]
    done = subprocess.run(
        arguments,
        input="hello\n/reset\nhello\n",
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    model, encoder = load_for_inference(run_folder)
    prompt = encoder.encode_prompt([{"role": "user", "content": "hello"}], enable_thinking=False)
    params = SamplingParams(max_new_tokens=8, temperature=0, stop_token_ids=model.eos_token_ids)
    expected = generate(model, [prompt], params, decode=encoder.decode)[0].text
    assert done.stdout == f"{expected}\n" * 2
    assert "The conversation is forgotten" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["/nowhere"], "/nowhere: no such run"), (["/nowhere", "--top_p", "7"], "top_p is 7.0; give greater than 0")],
)
def test_chat_says_in_one_sentence_what_is_wrong(arguments, message):
    done = subprocess.run([*SCRIPT, *arguments], input="", capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1
    assert done.stderr.startswith(message)
    assert len(done.stderr.strip().splitlines()) == 1


class Pipe:
    """A standard stream that is a file."""

    def __init__(self, tmp_path, text: str = "") -> None:
        (tmp_path / "in").write_text(text)
        self.stdin = (tmp_path / "in").open()
        self.stdout = (tmp_path / "out").open("w+")

    def shown(self) -> str:
        self.stdout.seek(0)
        return self.stdout.read()


def conversation(run_folder, pipe: Pipe, system: str | None = None, **options) -> Conversation:
    model, encoder = load_for_inference(run_folder)
    params = SamplingParams(**{"max_new_tokens": 6, "temperature": 0, "stop_token_ids": model.eos_token_ids, **options})
    return Conversation(model, encoder, params, Terminal(pipe.stdin, pipe.stdout), system)


def test_history_is_the_prompt_of_the_next_turn(run_folder, tmp_path):
    talk = conversation(run_folder, Pipe(tmp_path, "one\ntwo\n"))
    talk.run()
    assert [m["role"] for m in talk.messages] == ["user", "assistant"] * 2
    before = talk.encoder.encode(talk.messages[:2])[0]
    assert talk.encoder.encode_prompt(talk.messages[:3])[: len(before)] == before


def test_the_oldest_turns_go_when_the_context_is_full_and_a_too_long_message_is_refused(run_folder, tmp_path, capsys):
    talk = conversation(run_folder, Pipe(tmp_path), system="Be brief.", max_new_tokens=5)
    talk.model.config.max_position_embeddings = 200
    for number in range(12):
        talk.answer(f"message number {number} " + "word " * 10)
    assert talk.messages[0]["role"] == "system"
    assert talk.messages[1]["role"] == "user"
    assert "number 11" in talk.messages[-2]["content"]
    assert 5 <= len(talk.messages) <= 19
    assert "outgrown the context" in capsys.readouterr().err
    kept = list(talk.messages)
    talk.answer("word " * 1000)
    assert "does not fit into the context of 200 tokens" in capsys.readouterr().err
    assert talk.messages == kept


def test_a_model_cannot_steer_the_terminal(tmp_path):
    pipe = Pipe(tmp_path)
    Terminal(pipe.stdin, pipe.stdout).write("a\x1b[2Jb\x07\u009b31mc\nd\te")
    assert pipe.shown() == "a[2Jb31mc\nd\te"


# ------------------------------------------------------------------------------------------------------------ generate


def options_for(run, **options) -> GenerateOptions:
    return GenerateOptions(run=run, **{"prompt": "hello", "max_new_tokens": 12, "temperature": 0.0, **options})


def test_generate_prints_what_it_returns_and_equals_the_batch_engine(run_folder, capsys):
    model, encoder = load_for_inference(run_folder)
    params = SamplingParams(max_new_tokens=12, temperature=0, stop_token_ids=model.eos_token_ids)
    for chat, prompt in (
        ("auto", encoder.encode_prompt([{"role": "user", "content": "hello"}])),
        ("off", encoder.encode_text("hello")),
    ):
        text = run_generate(options_for(run_folder, chat=chat))
        assert capsys.readouterr().out == text + "\n"
        assert text == generate(model, [prompt], params, decode=encoder.decode)[0].text


def test_generate_continues_the_text_of_a_pretrained_run(run_folder, tmp_path):
    (tmp_path / "hf").symlink_to(run_folder / "hf")
    (tmp_path / "summary.json").write_text('{"stage": "pretrain"}')
    assert run_generate(options_for(tmp_path)) == run_generate(options_for(run_folder, chat="off"))
    assert run_generate(options_for(tmp_path)) != run_generate(options_for(tmp_path, chat="on"))


def test_generate_stops_before_a_stop_string(run_folder):
    whole = run_generate(options_for(run_folder, chat="off"))
    stop = whole[4:6]
    assert run_generate(options_for(run_folder, chat="off", stop=[stop])) == whole[: whole.index(stop)]


def test_generate_repeats_with_a_seed(run_folder):
    options = {"temperature": 1.5, "top_p": 1.0}
    first = run_generate(options_for(run_folder, seed=1, **options))
    assert first == run_generate(options_for(run_folder, seed=1, **options))
    assert first != run_generate(options_for(run_folder, seed=2, **options))


def test_generate_refuses_a_prompt_longer_than_the_context(run_folder):
    with pytest.raises(ValueError, match=r"leaves no room in the model's context of 4096"):
        run_generate(options_for(run_folder, prompt="word " * 5000))


def test_generate_refuses_an_unknown_switch(run_folder):
    with pytest.raises(UserError, match="think is 'perhaps'"):
        run_generate(options_for(run_folder, think="perhaps"))


def test_nothing_of_generation_leaves_gradients_off(run_folder):
    run_generate(options_for(run_folder))
    assert torch.is_grad_enabled()
