"""Conversations through the chat template that belongs to a model of somebody else.

The template decides how a turn looks; what people wrote never passes through it. Every text in a conversation is
replaced by a placeholder that nobody can guess, the template is rendered (`template_worker.py`), and the result is cut
at the placeholders: what the template wrote may hold control tokens, the texts that are put back are encoded with all
added tokens off. So nobody opens a role, whatever he types.

Loss weights need to know where an answer begins and ends. It begins where the template's own generation prompt ends
(in `<|im_start|>assistant\n<think>\n` the model writes `<think>` itself), or at the assistant's first text where no
such prompt is found. It ends with the token that the template puts behind an answer: `<|im_end|>`, `<|eot_id|>`, ….

A template sees roles, the number of messages, what is empty, white space around texts, and the names of tools; it
does not see the texts. One that looks into them (to cut at `</think>`, say) finds nothing there.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from minigpt.dataset.chat import ANSWER, CONTEXT, ROLES, Message, Piece, Tools, inline_reasoning, text_of
from minigpt.errors import UserError

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
END_OF_MESSAGE = "<|eom_id|>"
"""Llama's other end of a turn, after a call of one of its own tools."""
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
MAX_TEMPLATE = 1 << 20
SECONDS, CHARACTERS = 2.0, 4_000_000
"""What one conversation may cost: processor time and characters. Templates of public models need a thousandth."""
PLAIN_WORD = re.compile(r"[\w ,.:;/-]*")
_UNTRAINED = 255  # an assistant's turn of weight 0: cut into the same segments as others, but context


class AddedToken(NamedTuple):
    """An added token of a tokenizer: its id, whether it is a control token, and what white space it swallows."""

    id: int
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False


def find_template(folder: Path) -> tuple[str | None, dict[str, str]]:
    """The chat template of a tokenizer's folder, None where it has none, and its special tokens by name.

    Raises:
        UserError: a file is broken, asks for code of its own, or holds several templates and none is the default.
    """
    path = folder / "tokenizer_config.json"
    settings: Any = {}
    if path.is_file():
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not valid JSON ({str(error).splitlines()[0]}): copy the file again") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path} holds no JSON object: copy the file again")
    separate = folder / "chat_template.jinja"
    template = settings.get("chat_template")
    if separate.is_file():
        path, template = separate, separate.read_text(encoding="utf-8")
    tokens = {name: settings[name] for name in SPECIAL_TOKENS if settings.get(name)}
    names = {name: token["content"] if isinstance(token, dict) else str(token) for name, token in tokens.items()}
    return one_template(template, path), names


def one_template(template: Any, source: Path | str) -> str | None:
    """A template as text; of several the one called "default"."""
    if isinstance(template, list):
        template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
    if isinstance(template, dict):
        if "default" not in template:
            raise UserError(f"{source} holds several chat templates and none is called default: keep one of them")
        template = template["default"]
    if template is not None and not isinstance(template, str):
        raise UserError(f"{source}: the chat template is not text but {type(template).__name__}: copy the file again")
    return template or None


@lru_cache(maxsize=1)
def shipped_template() -> str | None:
    """The template of the tokenizer that MiniGPT ships, whose twin in Python is `minigpt.dataset.chat.render`."""
    return find_template(Path(__file__).parents[1] / "model")[0]


class _Rendered:
    """A conversation with placeholders, and what stands behind each."""

    def __init__(self, nonce: str, is_plain: re.Pattern[str]) -> None:
        self.nonce, self.is_plain = nonce, is_plain
        self.values: list[tuple[int | None, str, str | list[Piece]]] = []  # message, what it is, and the text
        self.messages: list[dict[str, Any]] = []
        self.tools: Any = None

    def hide(self, message: int | None, what: str, text: str | list[Piece]) -> str:
        """A placeholder for a text; white space around it stays outside, since templates strip it."""
        before = after = ""
        if isinstance(text, str):
            core = text.strip()
            begin = text.index(core) if core else len(text)
            before, text, after = text[:begin], core, text[begin + len(core) :]
        self.values.append((message, what, text))
        return f"{before}{self.nonce}{len(self.values) - 1}.{after}"

    def hide_in(self, message: int | None, value: Any) -> Any:
        """Structured data with placeholders for all texts but plain words, which templates may look up."""
        if isinstance(value, str):
            return value if self.is_plain.fullmatch(value) else self.hide(message, "data", value)
        if isinstance(value, Mapping):
            return {self.hide_in(message, str(key)): self.hide_in(message, item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide_in(message, item) for item in value]
        return value


class _Piecewise:
    """Collects pieces; neighbouring text of the same weight becomes one piece, as the tokenizer would see it."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self._break = True

    def add(self, text: str, code: int, is_token: bool = False) -> None:
        last = self.pieces[-1] if self.pieces else None
        if is_token or self._break or last is None or last.is_token or last.code != code:
            if text:
                self.pieces.append(Piece(text, code, is_token))
                self._break = False
        else:
            self.pieces[-1] = last._replace(text=last.text + text)

    def cut(self) -> None:
        """The next text is a segment of its own: here generation starts."""
        self._break = True


class ChatTemplate:
    """Renders conversations with a folder's own template.

    Args:
        source: the template's text.
        variables: special tokens that it may name, such as `bos_token`.
        added: the tokenizer's added tokens by their text.
        where: for messages to the user.
        seconds: processor time that one rendering may take.
        characters: that one rendering may write.

    Raises:
        UserError: the template is larger than any real one. What is wrong inside it comes out when it is first used.
    """

    def __init__(
        self,
        source: str,
        variables: Mapping[str, str],
        added: Mapping[str, AddedToken],
        where: str | Path = "the tokenizer",
        *,
        seconds: float = SECONDS,
        characters: int = CHARACTERS,
    ) -> None:
        if len(source) > MAX_TEMPLATE:
            raise UserError(f"{where}: its chat template has {len(source):,} characters: use the original model's")
        self.where, self.added, self.source = where, added, source
        self.nonce = str(secrets.randbits(100) + (1 << 100))
        self._process = _TemplateProcess(source, dict(variables), self.nonce, str(where), seconds, characters)
        self._placeholder = re.compile(rf"{self.nonce}(\d+)([ja]*)\.")
        names = sorted(added, key=len, reverse=True)
        spelled = "|".join(
            (r"\s*" if added[name].lstrip else "") + re.escape(name) + (r"\s*" if added[name].rstrip else "")
            for name in names
        )
        self._tokens = re.compile(spelled or r"(?!)")
        self._is_plain = re.compile(rf"(?!.*(?:{spelled or r'(?!)'})){PLAIN_WORD.pattern}")

    # ------------------------------------------------------------------------------------------- what the template does

    @cached_property
    def _probe(self) -> dict[str, Any]:
        """The template's habits, from a conversation of two turns."""
        rendered = _Rendered(self.nonce, self._is_plain)
        user = {"role": "user", "content": rendered.hide(0, "content", "A")}
        said = {"role": "assistant", "content": rendered.hide(1, "content", "B")}
        thought = rendered.hide(1, "reasoning", "C")
        calls: list[dict[str, Any]] = [{"messages": [user], "add_generation_prompt": False}]
        calls += [
            {"messages": [user], "add_generation_prompt": True, **switch}
            for switch in ({}, {"enable_thinking": True}, {"enable_thinking": False})
        ]
        calls.append({"messages": [user, said], "add_generation_prompt": False})
        thinking = {**said, "reasoning_content": thought, "thinking": thought}
        calls.append({"messages": [user, thinking], "add_generation_prompt": False})
        results = self._process.render([{"tools": None, **call} for call in calls])
        for result in (results[0], results[1], results[4]):
            if "error" in result:
                raise UserError(f"{self.where}: its chat template cannot be used ({result['error']})")
        texts = [result.get("text", "") for result in results]
        prompts = {}
        for switch, text in zip((None, True, False), texts[1:4], strict=True):
            prompts[switch] = text[len(texts[0]) :] if text.startswith(texts[0]) else ""
        answer_at = re.escape(self.nonce) + r"1\."
        parts = re.split(answer_at, texts[4], maxsplit=1)
        if len(parts) < 2:
            raise UserError(f"{self.where}: its chat template leaves out what the assistant says: use another template")
        before, after = parts
        if not prompts[None]:  # a template that knows no add_generation_prompt
            head = before[len(texts[0]) :] if before.startswith(texts[0]) else ""
            prompts = dict.fromkeys(prompts, head)
        ends = [m.group().strip() for m in self._tokens.finditer(after)]
        special = [name for name in ends if self.added[name].special]
        return {
            "prompts": prompts,
            "end": next(iter(special or ends), None),
            "reasoning": f"{self.nonce}2." in texts[5],
        }

    @property
    def end_of_turn(self) -> str | None:
        """The token behind an answer; None where the template writes none."""
        return self._probe["end"]

    @property
    def shows_reasoning(self) -> bool:
        """Whether the template has a place for `reasoning_content`."""
        return self._probe["reasoning"]

    @property
    def switches_thinking(self) -> bool:
        """Whether the template itself knows `enable_thinking`."""
        return "enable_thinking" in self._process.names

    def opens_thinking(self, enable_thinking: bool | None) -> bool:
        """Whether an answer begins inside of the thinking part, because the prompt opened it."""
        written = self._probe["prompts"][enable_thinking if self.switches_thinking else None]
        if enable_thinking is not None and not self.switches_thinking:
            return enable_thinking
        return written.rstrip().endswith("<think>")

    # ------------------------------------------------------------------------------------------------------- rendering

    def render(
        self, conversations: Sequence[Sequence[Message]], tools: Sequence[Tools], tag_code: int
    ) -> list[list[Piece]]:
        """The pieces of whole conversations.

        Raises:
            UserError: the template refuses a conversation, or leaves out a part of it.
        """
        hidden = [self._hide(messages, t, tag_code) for messages, t in zip(conversations, tools, strict=True)]
        texts = self._texts(hidden, {"add_generation_prompt": False})
        return [
            self._pieces(text, rendered, messages, tag_code)
            for text, rendered, messages in zip(texts, hidden, conversations, strict=True)
        ]

    def render_prompt(self, messages: Sequence[Message], tools: Tools, enable_thinking: bool | None) -> list[Piece]:
        """The pieces of a conversation and the start of the assistant's answer. Errors: as `render`."""
        rendered = self._hide(messages, tools, ANSWER)
        switch = {"enable_thinking": enable_thinking} if enable_thinking is not None else {}
        if self._probe["prompts"][None] and "add_generation_prompt" not in self._process.names:
            text = self._texts([rendered], {})[0] + self._probe["prompts"][None]
        else:
            text = self._texts([rendered], {"add_generation_prompt": True, **switch})[0]
        pieces = [piece._replace(code=CONTEXT) for piece in self._pieces(text, rendered, messages, ANSWER)]
        if enable_thinking is not None and not self.switches_thinking:
            if not self.opens_thinking(None):
                pieces.append(Piece("<think>", CONTEXT, True))
            if enable_thinking is False:
                pieces.append(Piece("</think>", CONTEXT, True))
        return pieces

    def _texts(self, hidden: Iterable[_Rendered], options: dict[str, Any]) -> list[str]:
        calls = [{"messages": one.messages, "tools": one.tools, **options} for one in hidden]
        texts = []
        for result in self._process.render(calls):
            if "error" in result:
                raise UserError(
                    f"{self.where}: its chat template refuses the conversation ({result['error']}): "
                    f"leave the conversation out, or give the tokenizer another template"
                )
            texts.append(result["text"])
        return texts

    def _hide(self, messages: Sequence[Message], tools: Tools, tag_code: int) -> _Rendered:
        rendered = _Rendered(self.nonce, self._is_plain)
        if tools:
            if "tools" not in self._process.names:
                raise UserError(f"{self.where}: its chat template knows no tools: leave the conversation out")
            rendered.tools = rendered.hide_in(None, tools)
        for i, message in enumerate(messages):
            role = message.get("role")
            if role not in ROLES:
                raise UserError(f"a message has the role {role!r}: roles are {', '.join(ROLES)}")
            content, calls = text_of(message), message.get("tool_calls") or []
            shown: dict[str, Any] = {"role": role, "content": content}
            reasoning = message.get("reasoning_content") if role == "assistant" else None
            if isinstance(reasoning, str) and not self.shows_reasoning:
                inline = inline_reasoning(reasoning, content, bool(calls), tag_code)
                shown["content"] = rendered.hide(i, "content", inline)
            else:
                if isinstance(reasoning, str):
                    thought = rendered.hide(i, "reasoning", reasoning) if reasoning else ""
                    shown |= {"reasoning_content": thought, "thinking": thought}
                if content or not calls:  # beside a call, templates ask whether there is any content
                    shown["content"] = rendered.hide(i, "content", content)
            if calls:
                shown["tool_calls"] = [self._hide_call(rendered, i, call) for call in calls]
            for key in ("name", "tool_call_id"):
                if isinstance(message.get(key), str):
                    shown[key] = rendered.hide_in(i, message[key])
            rendered.messages.append(shown)
        return rendered

    def _hide_call(self, rendered: _Rendered, message: int, call: Mapping[str, Any]) -> dict[str, Any]:
        function = call.get("function") or call
        if "name" not in function or "arguments" not in function:
            raise UserError(f"a tool call has the keys {sorted(function)}: it needs name and arguments")
        arguments = function["arguments"]
        if isinstance(arguments, str):  # as OpenAI's clients give it; templates want the object
            with contextlib.suppress(ValueError, RecursionError):
                arguments = json.loads(arguments)
        hidden = {
            "name": rendered.hide(message, "call", str(function["name"])),
            "arguments": rendered.hide_in(message, arguments),
        }
        return {"type": "function", "function": hidden}

    def _pieces(self, text: str, rendered: _Rendered, messages: Sequence[Message], tag_code: int) -> list[Piece]:
        """Cuts a rendered conversation at the placeholders and puts the texts back, with their weights."""
        cuts = list(self._placeholder.finditer(text))
        self._check_complete(rendered, {int(cut[1]) for cut in cuts}, messages)
        owners = [rendered.values[int(cut[1])][0] for cut in cuts]
        said = [owner is not None and messages[owner].get("role") == "assistant" for owner in owners]
        out, end, answer = _Piecewise(), 0, CONTEXT
        for n, cut in enumerate(cuts):
            literal = text[end : cut.start()]
            owner, before = owners[n], owners[n - 1] if n else None
            if said[n] and owner != before:  # the first text of an answer
                assert owner is not None
                begin = self._answer_begins(literal)
                self._add_literal(out, literal[:begin], answer, tag_code)
                out.cut()
                answer = ANSWER if messages[owner].get("weight", 1) != 0 else _UNTRAINED
                self._add_literal(out, literal[begin:], answer, tag_code, ends=False)
            else:
                self._add_literal(out, literal, answer, tag_code, ends=owner != before)
                answer = answer if owner == before else CONTEXT
            self._add_value(out, rendered.values[int(cut[1])][2], cut[2], answer)
            end = cut.end()
        self._add_literal(out, text[end:], answer, tag_code)
        return [piece._replace(code=CONTEXT) if piece.code == _UNTRAINED else piece for piece in out.pieces]

    def _answer_begins(self, literal: str) -> int:
        """Where in the text before an answer the generation prompt ends; at its end when there is none in it."""
        found = [
            literal.rfind(prompt) + len(prompt)
            for prompt in self._probe["prompts"].values()
            if prompt and prompt in literal
        ]
        return max(found, default=len(literal))

    def _add_literal(self, out: _Piecewise, text: str, answer: int, tag_code: int, ends: bool = True) -> None:
        """What the template wrote: control tokens and text. With `ends`, an answer ends with its token, or at once."""
        stops = {self.end_of_turn, END_OF_MESSAGE} - {None}
        tokens = list(self._tokens.finditer(text))
        answer_until = len(text)
        if ends:
            answer_until = next((match.end() for match in tokens if match.group().strip() in stops), 0)
        position = 0
        for match in tokens:
            code = answer if match.end() <= answer_until else CONTEXT
            out.add(text[position : match.start()], code)
            name = match.group() if match.group() in self.added else match.group().strip()
            out.add(name, tag_code if code == ANSWER and name in TAGS else code, is_token=True)
            position = match.end()
        out.add(text[position:], answer if not ends else CONTEXT)

    def _add_value(self, out: _Piecewise, value: str | list[Piece], escapes: str, answer: int) -> None:
        """A text of people's; what went through `tojson` is written as JSON."""
        if not isinstance(value, str):
            for piece in value:
                out.add(piece.text, piece.code if answer == ANSWER else answer, piece.is_token)
            return
        for escape in escapes:
            value = json.dumps(value, ensure_ascii=escape == "a")[1:-1]
        out.add(value, answer)

    def _check_complete(self, rendered: _Rendered, found: set[int], messages: Sequence[Message]) -> None:
        """Nothing may get lost, but what templates drop on purpose: old thinking, and words beside a call."""
        for number, (message, what, value) in enumerate(rendered.values):
            if number in found or message is None or what in ("reasoning", "data") or not value:
                continue
            if what == "content" and messages[message].get("tool_calls"):
                continue
            raise UserError(
                f"{self.where}: its chat template leaves out {'a tool call' if what == 'call' else 'the text'} of "
                f"message {message + 1} ({messages[message].get('role')}): leave the conversation out, or give the "
                f"tokenizer another template"
            )


class _TemplateProcess:
    """The process that renders; started when it is first needed, and again after it died."""

    def __init__(
        self, template: str, variables: dict[str, str], nonce: str, where: str, seconds: float, characters: int
    ) -> None:
        self.setup = {
            "template": template,
            "variables": variables,
            "nonce": nonce,
            "seconds": seconds,
            "characters": characters,
        }
        self.where, self.seconds = where, seconds
        self._process: subprocess.Popen[str] | None = None
        self._names: frozenset[str] = frozenset()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_process": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def __del__(self) -> None:
        if self._process is not None:
            self._process.kill()

    def render(self, calls: list[dict[str, Any]]) -> list[dict[str, str]]:
        """`{"text"}` or `{"error"}` for each call. Errors: UserError when the template is broken or takes too long."""
        with self._lock:
            return self._ask(self._running(), {"calls": calls})["results"]

    @cached_property
    def names(self) -> frozenset[str]:
        """The variables that the template looks at. Errors: UserError when it is broken."""
        with self._lock:
            self._running()
        return self._names

    def _running(self) -> subprocess.Popen[str]:
        process = self._process
        if process is None or process.poll() is not None:
            process = self._process = self._start()
            answer = self._ask(process, self.setup)
            if "error" in answer:
                self._process = None
                raise UserError(f"{self.where}: its chat template is broken ({answer['error']})")
            self._names = frozenset(answer["names"])
        return process

    def _start(self) -> subprocess.Popen[str]:
        script = Path(__file__).with_name("template_worker.py")
        return subprocess.Popen(
            [sys.executable, "-P", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C in a terminal is for us alone
        )

    def _ask(self, process: subprocess.Popen[str], request: dict[str, Any]) -> dict[str, Any]:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if answer:
            return json.loads(answer)
        status = process.wait()
        self._process = None
        if status == -signal.SIGPROF:
            raise UserError(
                f"{self.where}: its chat template takes more than {self.seconds:g} seconds for a conversation: "
                f"do not use this tokenizer"
            )
        raise UserError(f"{self.where}: its chat template ended the program that renders it: do not use this tokenizer")
