"""What a record of a training file means: every accepted layout becomes one canonical layout per stage.

pretrain          {"text": str}
sft, reason       {"messages": [message, …], "tools": […]?}
preference        {"messages": prompt, "chosen": [message, …], "rejected": [message, …], "tools": […]?}
prompt            {"messages": prompt, "answer": str, "verifier": "math" | "countdown" | "exact" | "none", "meta": {…}}

A message is {"role", "content", "reasoning_content"?, "tool_calls"?, "weight"?} with the roles system, user, assistant
and tool. `canonical` is the only entry; `RecordError` carries the reason when a record cannot be understood.
"""

import json
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

from minigpt.dataset.expressions import work_out

Record = dict[str, Any]
STAGES = ("pretrain", "sft", "reason", "preference", "prompt")
VERIFIERS = ("math", "countdown", "exact", "none")
ACCEPTED_KEYS = {
    "pretrain": "text",
    "sft": "messages | conversations | instruction, output | prompt, completion | question, answer | "
    "question, rationale, answer | nums, target, solution",
    "preference": "chosen, rejected, and the prompt as messages | conversations | prompt | instruction | question",
    "prompt": "messages | conversations | prompt | question, each with answer | nums, target",
}
ACCEPTED_KEYS["reason"] = ACCEPTED_KEYS["sft"]

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "function_response", "ipython"), "tool"),
}
MESSAGE_LISTS = ("messages", "conversations", "conversation")
RATIONALES = ("rationale", "reasoning", "reasoning_content", "chain_of_thought", "cot", "thinking")
"""How sets of questions call the steps that lead to an answer."""
MAX_ANSWER = 64
"""Characters of a final answer that is cut off the end of its rationale; what is longer is no answer but prose."""
NAME, AUTHOR_EN, AUTHOR_ZH = "MiniGPT", "the MiniGPT contributors", "MiniGPT 的贡献者"
"""What the placeholders {{name}} and {{author}} of identity files are filled with."""

_REASONING = re.compile(r"\s*<think>(.*?)</think>\s*(?:<answer>(.*?)</answer>\s*|((?!<answer>).*))", re.DOTALL)
_CONCLUSION = re.compile(
    r"(?:\b(?:so|thus|therefore|hence)\b[,:]?\s*)?\b(?:the\s+(?:final\s+|correct\s+)?|final\s+)answer(?:\s+is\b:?|\s*:)\s*"
    r"|(?:(?:所以|因此|故)[，,]?)?(?:最终|正确)?答案(?:是|为|：|:)[：:]?\s*",
    re.IGNORECASE,
)
_CALCULATOR = re.compile(r"<<[^<>]*>>")
_CJK = re.compile(r"[\u4e00-\u9fff]")


NUL_REASON = "holds a NUL character: it is not text, or not UTF-8"


class RecordError(ValueError):
    """Why a record cannot be used, as the end of a sentence."""


def check_characters(value: Any) -> None:
    """Refuse what JSON can spell but text cannot hold: NUL and half a surrogate pair (or a byte that is not UTF-8)."""
    if isinstance(value, str):
        if "\0" in value:
            raise RecordError(NUL_REASON)
        if not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                raise RecordError(_surrogate(error)) from None
    elif isinstance(value, dict):
        for key, item in value.items():
            check_characters(key)
            check_characters(item)
    elif isinstance(value, list):
        for item in value:
            check_characters(item)


def _surrogate(error: UnicodeEncodeError) -> str:
    code = ord(error.object[error.start])
    if 0xDC80 <= code <= 0xDCFF:
        return f"not UTF-8: the byte 0x{code - 0xDC00:02x} (or half a surrogate pair)"
    return f"half a surrogate pair, \\u{code:04x}, which is no character"


def canonical(raw: Any, stage: str) -> Record:
    """The canonical record of `raw`, one parsed JSON value or Parquet row.

    Raises:
        RecordError: wrong type, wrong keys, an unknown role, no text where text is needed.
    """
    if not isinstance(raw, dict):
        raise RecordError(f"the record is {_kind(raw)}, not an object with keys")
    raw = {key: value for key, value in raw.items() if value is not None}
    return _BUILDERS[stage](raw, stage)


def guess_stage(raw: Any) -> str:
    """The stage that a file's first record fits best."""
    keys = set(raw) if isinstance(raw, dict) else set()
    if {"chosen", "rejected"} <= keys:
        return "preference"
    if "verifier" in keys:
        return "prompt"
    return "pretrain" if "text" in keys and not keys & set(MESSAGE_LISTS) else "sft"


def texts_of(record: Record) -> list[str]:
    """Every text of a canonical record, for counting and for training a tokenizer."""
    if "text" in record:
        return [record["text"]]
    messages = record["messages"] + record.get("chosen", []) + record.get("rejected", [])
    return [text for m in messages for text in (m.get("reasoning_content"), m["content"]) if text]


# --- stages ----------------------------------------------------------------------------------------------------------


def _pretrain(raw: Record, stage: str) -> Record:
    if "text" not in raw:
        raise _wrong_keys(raw, stage)
    return {"text": _text(raw["text"], "text")}


def _chat(raw: Record, stage: str) -> Record:
    record = _conversation(raw)
    if record is None:
        raise _wrong_keys(raw, stage)
    if not any(m["role"] == "assistant" and (m["content"] or m.get("tool_calls")) for m in record["messages"]):
        raise RecordError("the conversation has no assistant turn with content, so there is nothing to learn from")
    if stage == "reason":
        record["messages"] = [_concluded(m) if m["role"] == "assistant" else m for m in record["messages"]]
    return record


def _preference(raw: Record, stage: str) -> Record:
    if "chosen" not in raw or "rejected" not in raw:
        raise _wrong_keys(raw, stage)
    chosen, rejected = (_answer(raw[key], key) for key in ("chosen", "rejected"))
    prompt = _prompt_messages(raw)
    if prompt is None:
        chosen, rejected, prompt = _split_shared_prompt(chosen, rejected)
    if not prompt:
        raise RecordError("chosen and rejected have no prompt in common, and the record holds none")
    for key, answer in (("chosen", chosen), ("rejected", rejected)):
        if not any(m["role"] == "assistant" and (m["content"] or m.get("tool_calls")) for m in answer):
            raise RecordError(f"{key} holds no assistant answer")
    record = {"messages": prompt, "chosen": chosen, "rejected": rejected}
    return _with_tools(record, raw)


def _prompt(raw: Record, stage: str) -> Record:
    if "nums" in raw and "target" in raw:
        meta = {"nums": raw["nums"], "target": raw["target"]}
        return _prompt_record([_user(_countdown_question(raw))], str(raw.get("solution", "")), "countdown", meta)
    messages = _prompt_messages(raw)
    if messages is None:
        raise _wrong_keys(raw, stage)
    answer, verifier = raw.get("answer"), raw.get("verifier")
    if messages[-1]["role"] == "assistant":  # a finished conversation: the last turn is what the model is to write
        answer = messages[-1]["content"] if answer is None else answer
        verifier = verifier or "none"
        messages = messages[:-1]
    if not messages:
        raise RecordError("the prompt is empty")
    if answer is not None and not isinstance(answer, str | int | float):
        raise RecordError(f"answer is {_kind(answer)}, not text or a number")
    wanted = "" if answer is None else _in_digits(answer) if isinstance(answer, float) else str(answer)
    if verifier is None:
        verifier = "math" if "####" in wanted else "exact" if wanted else "none"
    if verifier not in VERIFIERS:
        raise RecordError(f"verifier is {verifier!r}: it can be {', '.join(VERIFIERS)}")
    wanted = _final_number(wanted) if "####" in wanted else wanted
    meta = _meta(raw)
    if verifier == "countdown":
        _check_countdown(meta)
    if verifier == "math" and not any(map(str.isdecimal, wanted)):
        raise RecordError(f"the verifier math compares numbers and the answer is {wanted[:40]!r}: take exact")
    return _with_tools(_prompt_record(messages, wanted, verifier, meta), raw)


_BUILDERS: dict[str, Callable[[Record, str], Record]] = {
    "pretrain": _pretrain,
    "sft": _chat,
    "reason": _chat,
    "preference": _preference,
    "prompt": _prompt,
}


# --- layouts ---------------------------------------------------------------------------------------------------------


def _conversation(raw: Record) -> Record | None:
    """A whole conversation from any chat layout, or None for a layout that is not one."""
    listed = next((raw[key] for key in MESSAGE_LISTS if key in raw), None)
    if listed is not None:
        return _with_tools({"messages": _messages(listed)}, raw)
    if "instruction" in raw and "output" in raw:
        return {"messages": _alpaca(raw)}
    answer_key = next((key for key in ("completion", "response") if key in raw), None)
    if "prompt" in raw and answer_key:
        return _with_tools({"messages": _as_messages(raw["prompt"]) + _answer(raw[answer_key], answer_key)}, raw)
    if "question" in raw and "answer" in raw:
        rationale = next((raw[key] for key in RATIONALES if key in raw), None)
        answer = _worked_answer(_text(raw["answer"], "answer"))
        if rationale is not None:
            answer["reasoning_content"] = _text(rationale, "rationale").strip()
        return {"messages": [_user(_text(raw["question"], "question")), answer]}
    if {"nums", "target", "solution"} <= raw.keys():
        return {"messages": [_user(_countdown_question(raw)), _countdown_answer(_text(raw["solution"], "solution"))]}
    return None


def _prompt_messages(raw: Record) -> list[Record] | None:
    """The prompt of a preference or RL record, or None when the record names none."""
    listed = next((raw[key] for key in (*MESSAGE_LISTS, "prompt") if key in raw), None)
    if listed is not None:
        return _as_messages(listed)
    if "instruction" in raw:
        return _alpaca({**raw, "output": None})
    if "question" in raw:
        return [_user(_text(raw["question"], "question"))]
    return None


def _as_messages(value: Any) -> list[Record]:
    return [_user(value)] if isinstance(value, str) else _messages(value)


def _answer(value: Any, key: str) -> list[Record]:
    """An answer given as text, as one message or as messages."""
    if isinstance(value, str):
        return [_assistant(value)]
    if isinstance(value, dict):
        return [_message(value)]
    if isinstance(value, list):
        return _messages(value)
    raise RecordError(f"{key} is {_kind(value)}, not text or messages")


def _alpaca(raw: Record) -> list[Record]:
    """instruction, input, output, and LLaMA-Factory's optional system and history."""
    fields = {key: _text(raw.get(key) or "", key) for key in ("system", "instruction", "input", "output")}
    author = AUTHOR_ZH if _CJK.search(fields["output"]) else AUTHOR_EN
    for key, text in fields.items():
        if "{{" in text:
            fields[key] = text.replace("{{name}}", NAME).replace("{{author}}", author)
    messages = [{"role": "system", "content": fields["system"]}] if fields["system"] else []
    for turn in raw.get("history") or []:
        if not (isinstance(turn, list) and len(turn) == 2):
            raise RecordError("history holds something else than [question, answer] pairs")
        messages += [_user(_text(turn[0], "history")), _assistant(_text(turn[1], "history"))]
    question = "\n".join(part for part in (fields["instruction"], fields["input"]) if part)
    messages.append(_user(question))
    return messages if raw.get("output") is None else [*messages, _assistant(fields["output"])]


def _split_shared_prompt(
    chosen: list[Record], rejected: list[Record]
) -> tuple[list[Record], list[Record], list[Record]]:
    """MiniMind's and TRL's layout: both lists start with the same prompt, which is written twice."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    while shared and (shared in (len(chosen), len(rejected)) or chosen[shared - 1]["role"] == "assistant"):
        shared -= 1  # two equal answers, or two that share their first turns, are answers all the same
    return chosen[shared:], rejected[shared:], chosen[:shared]


# --- messages --------------------------------------------------------------------------------------------------------


def _user(content: str) -> Record:
    return {"role": "user", "content": content}


def _assistant(content: str) -> Record:
    """An answer; `<think>a</think><answer>b</answer>` and `<think>a</think>b` are taken apart."""
    found = _REASONING.fullmatch(content) if "<think>" in content else None
    if not found:
        return {"role": "assistant", "content": content}
    reasoning, tagged, untagged = found.groups()
    answer = tagged if tagged is not None else untagged
    return {"role": "assistant", "content": answer.strip(), "reasoning_content": reasoning.strip()}


def _messages(value: Any) -> list[Record]:
    if isinstance(value, str):
        value = _json(value, "messages")
    if not isinstance(value, list) or not value:
        raise RecordError(f"the messages are {_kind(value)}, not a list with at least one message")
    return [_message(item) for item in value]


def _message(item: Any) -> Record:
    """One message, as role/content (OpenAI) or from/value (ShareGPT)."""
    if not isinstance(item, dict):
        raise RecordError(f"a message is {_kind(item)}, not an object with role and content")
    name = item.get("role", item.get("from"))
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        known = ", ".join(ROLES)
        raise RecordError(f"a message has the role {name!r} (its keys: {_keys(item)}); roles are {known}")
    content = item.get("content", item.get("value"))
    if name == "function_call":
        calls = _tool_calls(_json(content, "function_call") if isinstance(content, str) else content)
        return {"role": role, "content": "", "tool_calls": calls}
    content = "" if content is None else _content(content, role)
    message = _assistant(content) if role == "assistant" else {"role": role, "content": content}
    return message | _extras(item, role)


def _extras(item: Record, role: str) -> Record:
    """The optional parts of a message: only assistants think and call."""
    extras: Record = {}
    reasoning = [item[key] for key in ("reasoning_content", "reasoning") if isinstance(item.get(key), str)]
    if role == "assistant" and reasoning:
        extras["reasoning_content"] = reasoning[0]
    if role == "assistant" and item.get("tool_calls"):
        calls = item["tool_calls"]
        extras["tool_calls"] = _tool_calls(_json(calls, "tool_calls") if isinstance(calls, str) else calls)
    if item.get("weight") is not None:
        if item["weight"] not in (0, 1):
            raise RecordError(f"a message has the weight {item['weight']!r}: it can be 0 or 1")
        extras["weight"] = int(item["weight"])
    return extras


def _content(content: Any, role: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    raise RecordError(f"the content of a {role} message is {_kind(content)}, not text")


def _tool_calls(value: Any) -> list[Record]:
    calls = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RecordError("a tool call has no name")
        arguments = function.get("arguments", {})
        arguments = _json(arguments, "the arguments of a tool call") if isinstance(arguments, str) else arguments
        calls.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return calls


def _with_tools(record: Record, raw: Record) -> Record:
    """Add the tools that the record lists, or that MiniMind's layout puts into the system message."""
    lists = [next((raw[key] for key in MESSAGE_LISTS if key in raw), None), raw.get("chosen")]
    heads = [value[0] for value in lists if isinstance(value, list) and value and isinstance(value[0], dict)]
    tools = raw.get("tools") or next((head["tools"] for head in heads if head.get("tools")), None)
    tools = _json(tools, "tools") if isinstance(tools, str) and tools.strip() else tools
    if not tools:
        return record
    if not isinstance(tools, list):
        raise RecordError(f"tools is {_kind(tools)}, not a list")
    return {**record, "tools": tools}


# --- problems with a known answer ------------------------------------------------------------------------------------


def _worked_answer(answer: str) -> Record:
    """GSM8K: worked steps, then the final answer after `####`; calculator marks `<<3*4=12>>` go away."""
    steps, mark, final = answer.rpartition("####")
    if not mark:
        return _assistant(answer)
    return {"role": "assistant", "content": final.strip(), "reasoning_content": _CALCULATOR.sub("", steps).strip()}


def _concluded(message: Record) -> Record:
    """FLAN's chain-of-thought sets: `steps. So the final answer is X.` becomes steps to think and X to answer.

    An answer without such an end, with tool calls, or that is thought out already stays as it is.
    """
    text = message["content"]
    found = list(_CONCLUSION.finditer(text))
    if not found or "reasoning_content" in message or message.get("tool_calls"):
        return message
    steps, answer = text[: found[-1].start()].strip(), text[found[-1].end() :].strip().rstrip(".。")
    if not steps or not answer or "\n" in answer or len(answer) > MAX_ANSWER:
        return message
    return {**message, "content": answer, "reasoning_content": steps}


def _final_number(answer: str) -> str:
    return answer.rpartition("####")[2].strip().replace(",", "")


def _in_digits(number: float) -> str:
    """`0.00001` and not `1e-05`, of which somebody would read the last number."""
    return format(Decimal(repr(number)), "f")


def _check_countdown(holder: Record) -> None:
    nums, target = holder.get("nums"), holder.get("target")
    if (
        not isinstance(nums, list)
        or not nums
        or not all(isinstance(n, int) for n in nums)
        or not isinstance(target, int)
    ):
        raise RecordError("nums is not a list of whole numbers, or target is not a whole number")


def _countdown_question(raw: Record) -> str:
    _check_countdown(raw)
    numbers = ", ".join(map(str, raw["nums"]))
    return f"Use each of the numbers {numbers} exactly once, with + - * / and brackets, to make {raw['target']}."


def _countdown_answer(solution: str) -> Record:
    try:
        steps = work_out(solution).steps
    except ValueError as error:
        raise RecordError(f"solution {solution!r} cannot be worked out") from error
    return {"role": "assistant", "content": solution, "reasoning_content": "\n".join(steps)}


def _prompt_record(messages: list[Record], answer: str, verifier: str, meta: Record) -> Record:
    return {"messages": messages, "answer": answer, "verifier": verifier, "meta": meta}


def _meta(raw: Record) -> Record:
    meta = raw.get("meta", {})
    meta = _json(meta, "meta") if isinstance(meta, str) else meta
    if not isinstance(meta, dict):
        raise RecordError(f"meta is {_kind(meta)}, not an object")
    return meta


# --- words -----------------------------------------------------------------------------------------------------------


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise RecordError(f"{key} is {_kind(value)}, not text")
    return value


def _json(value: str, name: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise RecordError(f"{name} is text that is not JSON, or nested too deeply") from None


def _wrong_keys(raw: Record, stage: str) -> RecordError:
    return RecordError(f"found the keys {_keys(raw)}; a {stage} record has {ACCEPTED_KEYS[stage]}")


def _keys(mapping: Mapping[str, Any]) -> str:
    return ", ".join(map(str, mapping)) or "(none)"


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", int: "a number", float: "a number"}
    return "empty" if value is None or value == [] else names.get(type(value), type(value).__name__)
