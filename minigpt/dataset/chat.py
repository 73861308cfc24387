"""Conversations to token ids and loss weights: the one place where a chat is rendered.

A turn is `<|im_start|>ROLE\\nCONTENT<|im_end|>\\n`. Three things are decided here and nowhere else:

* Text from people and data files is encoded with **all** added tokens off, segment by segment: a user who types
  `<|im_end|>` or `<think>` gets ordinary characters, never a control id. (`encode_special_tokens=True` would still let
  the tags through, since they are not special.)
* `role\\n` and the content of a system, user or tool turn are one segment. An assistant turn is cut after
  `assistant\\n`, because that is where generation starts.
* Loss weights are small codes: 0 is context, 1 is what the assistant says and its `<|im_end|>`, `tag_code` is for the
  four reasoning tags.

The ids equal those of the chat template in tokenizer_config.json, except where the text itself spells an added token
(the template has no way to tell it from the real one) and where an assistant turn begins with white space that holds a
line break (the template then merges it with the line break after `assistant`). `encode(messages)` of a conversation
is always a prefix of `encode` of its continuation.

A tokenizer that comes with a chat template of its own is rendered through that (`chat_template.py`), by the same rules.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from minigpt.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    from minigpt.dataset.chat_template import ChatTemplate

Message = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]] | None
ROLES = ("system", "user", "assistant", "tool")
END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "<|eot_id|>", "</s>", IM_END)
"""How tokenizers of other families call the end of a document, in order of preference."""
CONTEXT, ANSWER, TAG = 0, 1, 2
"""Weight codes; what each weighs stands in the shards' `weight_table` (0.0, 1.0 and 10.0 for the reasoning stage)."""

TOOLS_HEAD = "# Tools\n\nYou may call these functions, one JSON object each:\n"
TOOLS_FOOT = '\nTo call one, answer with {"name": ..., "arguments": ...} in a tool call.'


class Piece(NamedTuple):
    """A part of a rendered conversation: plain text, or the name of one added token."""

    text: str
    code: int
    is_token: bool = False


class ChatEncoder:
    """Renders conversations with one tokenizer.

    Args:
        tokenizer: A `PreTrainedTokenizerFast`, a `tokenizers.Tokenizer`, a tokenizer.json, or a folder that holds one.
    Raises:
        FileNotFoundError: the path holds no tokenizer.json.
        UserError: the files are broken.

    Attributes:
        eos_id: End of a document, `<|endoftext|>`.
        im_end_id: End of a chat turn: `<|im_end|>`, or what the tokenizer's own template puts there; equals `eos_id`
            where there is nothing of the kind.
        bos_ids: What the tokenizer puts before every document: nothing, or `<|begin_of_text|>` for Llama.
        template: The tokenizer's own chat template; None where there is none, and for MiniGPT's, which `render` equals.
        pad_id: Padding; `eos_id`, which is safe because padding is masked by position and not by id.
        vocab_size: One more than the largest id.

    Example:
        >>> encoder = ChatEncoder("minigpt/model")
        >>> ids, codes = encoder.encode([{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}])
        >>> encoder.decode([i for i, code in zip(ids, codes) if code], skip_special_tokens=False)
        'B<|im_end|>'
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast | Tokenizer | str | Path") -> None:
        from tokenizers import Tokenizer

        self.tokenizer = load_tokenizer(tokenizer)
        plain = json.loads(self.tokenizer.to_str())
        added = plain["added_tokens"]
        self._added: dict[str, int] = {token["content"]: token["id"] for token in added}
        plain.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
        self._plain = Tokenizer.from_str(json.dumps(plain))
        vocab = self.tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocab.values()) + 1
        self.template, names = _own_template(tokenizer, added)
        ends = (*END_OF_TEXT_NAMES, names.get("eos_token", ""))
        self.eos_id: int = next((self._added[name] for name in ends if name in self._added), 0)
        self.pad_id: int = self.eos_id
        with_special, text = self.tokenizer.encode("a").ids, self.encode_text("a")
        begin = next((i for i in range(len(with_special)) if with_special[i : i + len(text)] == text), 0)
        self.bos_ids: list[int] = with_special[:begin]

    @cached_property
    def im_end_id(self) -> int:
        """End of a chat turn; the attribute above."""
        name = IM_END if self.template is None else self.template.end_of_turn
        return self._added.get(name or "", self.eos_id)

    @property
    def knows_chat(self) -> bool:
        """Whether conversations can be rendered: by a template of the tokenizer's, or because it has the tokens."""
        return self.template is not None or (IM_START in self._added and IM_END in self._added)

    def opens_thinking(self, enable_thinking: bool | None) -> bool:
        """Whether `encode_prompt` ends inside of the thinking part."""
        return bool(enable_thinking) if self.template is None else self.template.opens_thinking(enable_thinking)

    def encode_text(self, text: str) -> list[int]:
        """Ids of a person's text; nothing in it can become a control token or a tag."""
        return self._plain.encode(text, add_special_tokens=False).ids

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode_text` of each, in one call to the tokenizer."""
        return [encoding.ids for encoding in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode(
        self, messages: Sequence[Message], *, tools: Tools = None, tag_code: int = ANSWER
    ) -> tuple[list[int], list[int]]:
        """A whole conversation.

        Args:
            messages: `{"role", "content"}`, and for assistants also `reasoning_content`, `tool_calls`, `weight`.
            tools: JSON schemas of the functions that the assistant may call.
            tag_code: Weight code of `<think>`, `</think>`, `<answer>`, `</answer>`: 1, or 2 for the reasoning stage.
        Returns:
            (ids, codes), equally long: token ids, and the weight code of each.
        Raises:
            UserError: a message without a known role or with content that is not text.
        """
        return self.encode_many([messages], tools=[tools], tag_code=tag_code)[0]

    def encode_many(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        tools: Sequence[Tools] | None = None,
        tag_code: int = ANSWER,
    ) -> list[tuple[list[int], list[int]]]:
        """`encode` of each conversation, in one call to the tokenizer: the fast way for packing."""
        tools = tools if tools is not None else [None] * len(conversations)
        if self.template is not None:
            return self._encode_pieces(self.template.render(conversations, tools, tag_code))
        rendered = [render(m, tools=t, tag_code=tag_code) for m, t in zip(conversations, tools, strict=True)]
        return self._encode_pieces(rendered)

    def encode_prompt(
        self, messages: Sequence[Message], *, tools: Tools = None, enable_thinking: bool | None = None
    ) -> list[int]:
        """A conversation and the start of the assistant's answer.

        Args:
            enable_thinking: True opens `<think>`, False closes it at once, None leaves the choice to the model.
        """
        if self.template is not None:
            pieces = self.template.render_prompt(messages, tools, enable_thinking)
        else:
            pieces = render(messages, tools=tools) + generation_prompt(enable_thinking)
        return self._encode_pieces([pieces])[0][0]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; the tags are ordinary text here, control tokens appear only when asked for."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def token_id(self, name: str) -> int:
        """Id of an added token such as `<think>`."""
        try:
            return self._added[name]
        except KeyError:
            raise UserError(
                f"the tokenizer has no token {name} and no chat template: put the template of its family beside it as "
                f"chat_template.jinja, or use MiniGPT's tokenizer, or one trained with `minigpt data tokenizer`"
            ) from None

    def _encode_pieces(self, rendered: Sequence[Sequence[Piece]]) -> list[tuple[list[int], list[int]]]:
        texts = [piece.text for pieces in rendered for piece in pieces if not self._is_single_id(piece)]
        encoded = iter(self.encode_texts(texts))
        result = []
        for pieces in rendered:
            ids: list[int] = []
            codes: list[int] = []
            for piece in pieces:
                piece_ids = [self._added[piece.text]] if self._is_single_id(piece) else next(encoded)
                ids += piece_ids
                codes += [piece.code] * len(piece_ids)
            result.append((ids, codes))
        return result

    def _is_single_id(self, piece: Piece) -> bool:
        """A turn cannot be written without its control tokens; a tag that a foreign tokenizer lacks is spelled out."""
        if not piece.is_token:
            return False
        if piece.text in (IM_START, IM_END):
            self.token_id(piece.text)
        return piece.text in self._added


def render(messages: Sequence[Message], *, tools: Tools = None, tag_code: int = ANSWER) -> list[Piece]:
    """The pieces of a conversation, in order; neighbouring text pieces are separate segments on purpose."""
    pieces: list[Piece] = []
    system = text_of(messages[0]) if messages and messages[0].get("role") == "system" else None
    if tools:
        listing = "".join(_json(tool) + "\n" for tool in tools)
        before = system + "\n\n" if system is not None else ""
        pieces += _turn("system", before + TOOLS_HEAD + listing + TOOLS_FOOT)
        messages = messages[1:] if system is not None else messages
    for message in messages:
        role = message.get("role")
        if role not in ROLES:
            raise UserError(f"a message has the role {role!r}: roles are {', '.join(ROLES)}")
        if role == "assistant":
            pieces += _assistant_turn(message, tag_code)
        else:
            pieces += _turn(role, text_of(message))
    return pieces


def generation_prompt(enable_thinking: bool | None) -> list[Piece]:
    """The start of an assistant's turn, up to where the model goes on."""
    pieces = [Piece(IM_START, CONTEXT, True), Piece("assistant\n", CONTEXT)]
    if enable_thinking is not None:
        pieces.append(Piece("<think>", CONTEXT, True))
    if enable_thinking is False:
        pieces.append(Piece("</think>", CONTEXT, True))
    return pieces


def text_of(message: Message) -> str:
    """The text of a message's content: a string, nothing, or OpenAI's list of text parts."""
    content = message.get("content")
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    raise UserError(f"the content of a {message.get('role')} message is not text but {type(content).__name__}")


def _turn(role: str, content: str) -> list[Piece]:
    return [
        Piece(IM_START, CONTEXT, True),
        Piece(f"{role}\n{content}", CONTEXT),
        Piece(IM_END, CONTEXT, True),
        Piece("\n", CONTEXT),
    ]


def _assistant_turn(message: Message, tag_code: int) -> list[Piece]:
    pieces = generation_prompt(None)
    content, reasoning, calls = text_of(message), message.get("reasoning_content"), message.get("tool_calls") or []
    if isinstance(reasoning, str):
        pieces += inline_reasoning(reasoning, content, bool(calls), tag_code)
    else:
        pieces.append(Piece(content, ANSWER))
    for call in calls:
        pieces += [Piece("<tool_call>", ANSWER, True), Piece(_call(call), ANSWER), Piece("</tool_call>", ANSWER, True)]
    pieces.append(Piece(IM_END, ANSWER, True))
    if message.get("weight", 1) == 0:
        pieces = [piece._replace(code=CONTEXT) for piece in pieces]
    return [*pieces, Piece("\n", CONTEXT)]


def inline_reasoning(reasoning: str, content: str, calls: bool, tag_code: int) -> list[Piece]:
    """Thinking and answer between their tags; beside tool calls an empty answer is left out."""
    # Thinking switched off is something that the prompt says, so the model is not trained to say it.
    think_code = tag_code if reasoning else CONTEXT
    pieces = [Piece("<think>", think_code, True), Piece(reasoning, ANSWER), Piece("</think>", think_code, True)]
    if content or not calls:
        pieces += [Piece("<answer>", tag_code, True), Piece(content, ANSWER), Piece("</answer>", tag_code, True)]
    return pieces


def _call(call: Message) -> str:
    """`{"name": …, "arguments": …}` of an OpenAI-style or bare call; arguments that are JSON text stay as given."""
    function = call.get("function") or call
    if "name" not in function or "arguments" not in function:
        raise UserError(f"a tool call has the keys {sorted(function)}: it needs name and arguments")
    arguments = function["arguments"]
    text = arguments if isinstance(arguments, str) else _json(arguments)
    return f'{{"name": {_json(function["name"])}, "arguments": {text}}}'


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _own_template(
    tokenizer: "PreTrainedTokenizerFast | Tokenizer | str | Path", added: Sequence[Mapping[str, Any]]
) -> "tuple[ChatTemplate | None, dict[str, str]]":
    """The tokenizer's chat template, None where it has none or MiniGPT's own, and its special tokens by name."""
    from tokenizers import Tokenizer

    from minigpt.dataset.chat_template import AddedToken, ChatTemplate, find_template, one_template, shipped_template

    where: str | Path
    if isinstance(tokenizer, str | Path):
        where = Path(tokenizer) if Path(tokenizer).is_dir() else Path(tokenizer).parent
        source, names = find_template(where)
    elif isinstance(tokenizer, Tokenizer):
        return None, {}
    else:
        where = "the tokenizer"
        source = one_template(tokenizer.chat_template, where)
        names = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    if source is None or source == shipped_template():
        return None, names
    tokens = {
        token["content"]: AddedToken(token["id"], token["special"], token["lstrip"], token["rstrip"]) for token in added
    }
    return ChatTemplate(source, names, tokens, where), names


def load_tokenizer(tokenizer: "PreTrainedTokenizerFast | Tokenizer | str | Path") -> "Tokenizer":
    """The `tokenizers.Tokenizer` behind whatever the caller has.

    Raises:
        FileNotFoundError: the path holds no tokenizer.json.
        UserError: the file is not a tokenizer.
    """
    from tokenizers import Tokenizer

    if isinstance(tokenizer, str | Path):
        path = Path(tokenizer)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: give a folder that holds tokenizer.json, or that file")
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every kind of broken file
            raise UserError(f"{path} is not a tokenizer ({error}): train one with `minigpt data tokenizer`") from error
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    return tokenizer.backend_tokenizer
