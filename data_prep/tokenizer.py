"""Train the tokenizer: byte-level BPE with Qwen2's split regex, digits one by one, single-id special tokens.

Sennrich et al. 2016 (BPE, https://arxiv.org/abs/1508.07909), Radford et al. 2019 (bytes as the alphabet). The split
regex is exactly Qwen2's, because llama.cpp knows it; a regex of our own would make every exported model unreadable
there. There is no Unicode normalizer, although Qwen2 has NFC: llama.cpp does not apply it, so ids would differ between
the two for text that is not NFC, and `decode(encode(text)) == text` would fail on it.
"""

import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt.dataset.shards import write_atomically
from minigpt.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPLIT_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Ids 0, 1, 2: hidden by `decode(skip_special_tokens=True)`."""
TAG_TOKENS = ("<think>", "</think>", "<answer>", "</answer>", "<tool_call>", "</tool_call>")
"""Ids 3 to 8: one id each, but text that a reader wants to see, so `special` is false, as in Qwen3."""
SPARE_TOKENS = tuple(f"<|reserved_{i}|>" for i in range(23))
"""Ids 9 to 31: free for later use without moving any other id."""
ADDED_TOKENS = CONTROL_TOKENS + TAG_TOKENS + SPARE_TOKENS
MIN_VOCAB_SIZE = len(ADDED_TOKENS) + 256
MAX_TOKEN_BYTES = 30
"""Ten Chinese characters: longer pieces are catch phrases of one book and waste an entry."""

CHAT_TEMPLATE = """\
{%- macro text(content) -%}
    {%- if content is string -%}{{- content -}}
    {%- elif content -%}{%- for part in content -%}{{- part.text -}}{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- set first_is_system = messages and messages[0].role == 'system' -%}
{%- if tools -%}
    {{- '<|im_start|>system\\n' -}}
    {%- if first_is_system -%}{{- text(messages[0].content) + '\\n\\n' -}}{%- endif -%}
    {{- '# Tools\\n\\nYou may call these functions, one JSON object each:\\n' -}}
    {%- for tool in tools -%}{{- tool | tojson(ensure_ascii=False) + '\\n' -}}{%- endfor -%}
    {{- '\\nTo call one, answer with {"name": ..., "arguments": ...} in a tool call.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'assistant' -%}
        {{- '<|im_start|>assistant\\n' -}}
        {%- if message.reasoning_content is string -%}
            {{- '<think>' + message.reasoning_content + '</think>' -}}
            {%- if message.content or not message.tool_calls -%}
                {{- '<answer>' + text(message.content) + '</answer>' -}}
            {%- endif -%}
        {%- else -%}{{- text(message.content) -}}{%- endif -%}
        {%- for call in message.tool_calls or [] -%}
            {%- set call = call.function or call -%}
            {{- '<tool_call>{"name": ' + call.name | tojson(ensure_ascii=False) + ', "arguments": ' -}}
            {%- if call.arguments is string -%}{{- call.arguments -}}
            {%- else -%}{{- call.arguments | tojson(ensure_ascii=False) -}}{%- endif -%}
            {{- '}</tool_call>' -}}
        {%- endfor -%}
        {{- '<|im_end|>\\n' -}}
    {%- elif not (tools and loop.first and first_is_system) -%}
        {{- '<|im_start|>' + message.role + '\\n' + text(message.content) + '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
    {%- if enable_thinking is defined and enable_thinking is not none -%}
        {{- '<think>' if enable_thinking else '<think></think>' -}}
    {%- endif -%}
{%- endif -%}
"""
"""The Jinja twin of `minigpt.dataset.chat.ChatEncoder` for transformers, vLLM, llama.cpp; a test holds them equal."""


@dataclass
class TokenizerOptions:
    """What `minigpt data tokenizer` trains on and writes.

    Args:
        input: Files or folders: plain text, Markdown, jsonl, JSON arrays, Parquet; every format that `pack` accepts.
        output: Folder that receives tokenizer.json and tokenizer_config.json.
        vocab_size: Entries in all, special tokens included; at least 288.
        weights: How often each input counts (one number per input; 0.5 takes every second document). Empty: 1 each.
        held_out: Share of the documents, chosen by hash, that is left out of training and may be measured on.
    """

    input: list[Path] = field(default_factory=list)
    output: Path = Path("tokenizer")
    vocab_size: int = 6400
    weights: list[float] = field(default_factory=list)
    held_out: float = 0.0


def train_tokenizer(options: TokenizerOptions) -> Path:
    """Train on `options.input` and write the tokenizer's two files.

    Returns:
        The folder, `options.output`.
    Raises:
        UserError: no usable input, a weight too many or too few, a vocabulary too small to hold all bytes.
    """
    if not options.input:
        raise UserError("no input given: name text files or folders with --input")
    if options.weights and len(options.weights) != len(options.input):
        raise UserError(
            f"--weights has {len(options.weights)} numbers but --input has {len(options.input)} paths: give one each"
        )
    if any(weight < 0 for weight in options.weights):
        raise UserError(f"--weights {options.weights} holds a negative number: give numbers of 0 or more")
    weights = options.weights or [1.0] * len(options.input)
    texts = (
        copy
        for path, weight in zip(options.input, weights, strict=True)
        for text in training_texts(path, held_out=options.held_out)
        for copy in [text] * repetitions(text, weight)
    )
    save_tokenizer(train_from_texts(texts, options.vocab_size), options.output)
    return options.output


def training_texts(path: Path, *, held_out: float = 0.0, take_held_out: bool = False) -> Iterator[str]:
    """The documents of one input that are trained on, or with `take_held_out` the others."""
    from data_prep.readers import read_texts

    return (text for text in read_texts([path]) if (_unit_hash(text) < held_out) == take_held_out)


def repetitions(text: str, weight: float) -> int:
    """How many copies of `text` weight `weight` means: its whole part, and one more for that share of the texts."""
    whole = int(weight)
    return whole + (_unit_hash("repeat" + text) < weight - whole)


def _unit_hash(text: str) -> float:
    """A number in [0, 1) that depends on the text only."""
    return zlib.crc32(text.encode("utf-8", "surrogatepass")) / 2**32


def train_from_texts(texts: Iterable[str], vocab_size: int) -> "Tokenizer":
    """Byte-level BPE over `texts`: added tokens first, then the 256 bytes, then merges by frequency."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(
            f"vocab_size {vocab_size} cannot hold all bytes and special tokens: use {MIN_VOCAB_SIZE} or more"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(ADDED_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=MAX_TOKEN_BYTES,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise UserError(
            f"the input gives only {tokenizer.get_vocab_size()} entries, not {vocab_size}: "
            "add text or ask for a smaller --vocab_size"
        )
    return _with_visible_tags(tokenizer)


def _with_visible_tags(tokenizer: "Tokenizer") -> "Tokenizer":
    """Mark the tags as not special; the trainer marks everything that it is given as special."""
    from tokenizers import Tokenizer

    data = json.loads(tokenizer.to_str())
    for token in data["added_tokens"]:
        token["special"] = token["content"] not in TAG_TOKENS
    return Tokenizer.from_str(json.dumps(data))


def tokenizer_config() -> dict[str, Any]:
    """The content of tokenizer_config.json: a chat turn ends with <|im_end|>, <|endoftext|> pads and ends documents."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {
            str(i): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": token not in TAG_TOKENS,
            }
            for i, token in enumerate(ADDED_TOKENS)
        },
        "chat_template": CHAT_TEMPLATE,
    }


def save_tokenizer(tokenizer: "Tokenizer", folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into `folder`; each file is whole or as it was."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.dumps(tokenizer_config(), ensure_ascii=False, indent=2) + "\n"
    write_atomically(folder / "tokenizer.json", tokenizer.to_str(pretty=False).encode())
    write_atomically(folder / "tokenizer_config.json", config.encode())
