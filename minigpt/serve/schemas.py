"""What a request may hold. Whatever does not fit is answered with status 400 and a sentence, before the model sees it.

Field names and meanings are OpenAI's; `top_k`, `min_p`, `repetition_penalty`, `ignore_eos` and `chat_template_kwargs`
are those of vLLM. Fields that nobody here knows are passed over, as clients send many. Fields that are known but would
change the answer in a way that this server cannot are refused: an answer that silently differs is worse than none.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

MAX_BODY_BYTES = 1 << 20
MAX_MESSAGES = 1024
MAX_PROMPTS = 64
MAX_TOOLS = 64
MAX_BIASED = 1024
MAX_STOP = 8
MAX_STOP_LENGTH = 256

Text = Annotated[str, Field(max_length=MAX_BODY_BYTES)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
Ids = Annotated[list[int], Field(min_length=1)]


class ApiError(Exception):
    """A request that is not answered: HTTP status, sentence, and `param` and `code` of OpenAI's error object."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code
        self.headers = headers or {}


class Lenient(BaseModel):
    """JSON types are taken as they are (no "0.5" for 0.5); unknown fields are passed over."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class TextPart(Lenient):
    """One part of a message's content."""

    type: Literal["text", "input_text"]
    text: Text


class FunctionCall(Lenient):
    """The call inside of an assistant's message."""

    name: Text
    arguments: Text


class ToolCall(Lenient):
    """A call that an assistant made earlier in the conversation."""

    function: FunctionCall


class ChatMessage(Lenient):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES)] | None = None
    reasoning_content: Text | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None

    def as_message(self) -> dict[str, Any]:
        """The message as `ChatEncoder` takes it."""
        content = self.content
        text = "".join(part.text for part in content) if isinstance(content, list) else content or ""
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": text}
        if self.role == "assistant" and self.reasoning_content is not None:
            message["reasoning_content"] = self.reasoning_content
        if self.role == "assistant" and self.tool_calls:
            message["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        return message


class FunctionSchema(Lenient):
    """A function that the assistant may call; `parameters` is a JSON schema and only shown to the model."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    name: Text


class Tool(Lenient):
    """An entry of `tools`."""

    type: Literal["function"]
    function: FunctionSchema


class StreamOptions(Lenient):
    """Token counts in the last event (`include_usage`), or in every one (`continuous_usage_stats`)."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class ResponseFormat(Lenient):
    """Free text is the only one."""

    type: Literal["text"]


class TemplateArguments(Lenient):
    """`enable_thinking`: true opens the thinking part, false closes it, null leaves it to the model; left out, it is as
    the server was started."""

    enable_thinking: bool | None = None


class SamplingRequest(Lenient):
    """What both endpoints share. None: the server's default."""

    model: Text | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=5)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1_000_000)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[TokenId, Bias], Field(max_length=MAX_BIASED)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOP)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    ignore_eos: bool | None = None

    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def token_limit(self) -> int | None:
        """Most tokens of an answer, where the request says so."""
        return self.max_tokens

    def refuse_what_is_missing(self) -> None:
        """Raises ApiError for settings that would be ignored."""
        for name in ("presence_penalty", "frequency_penalty"):
            if getattr(self, name):
                raise ApiError(f"{name} is not supported: leave it out, or use repetition_penalty", param=name)


class ChatRequest(SamplingRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: TemplateArguments | None = None

    def token_limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    def refuse_what_is_missing(self) -> None:
        super().refuse_what_is_missing()
        if self.top_logprobs and not self.logprobs:
            raise ApiError("top_logprobs needs logprobs: true", param="top_logprobs")


class CompletionRequest(SamplingRequest):
    """POST /v1/completions."""

    prompt: Text | Annotated[list[Text], Field(min_length=1)] | Ids | Annotated[list[Ids], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    echo: bool | None = None
    suffix: Text | None = None

    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or several, as texts or ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]

    def refuse_what_is_missing(self) -> None:
        super().refuse_what_is_missing()
        if self.echo:
            raise ApiError("echo is not supported: put the prompt before the text yourself", param="echo")
        if self.suffix:
            raise ApiError("suffix is not supported: the model continues texts at their end", param="suffix")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ApiError("best_of is not supported: ask for n texts and choose", param="best_of")
        if len(self.prompts()) > MAX_PROMPTS:
            raise ApiError(f"prompt holds more than {MAX_PROMPTS} prompts: send several requests", param="prompt")


def parse(kind: type[SamplingRequest], body: bytes) -> Any:
    """A request from its JSON text.

    Raises:
        ApiError: with one sentence about the first thing that is wrong.
    """
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        raise _as_api_error(error) from None
    request.refuse_what_is_missing()
    return request


def _as_api_error(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        return ApiError(f"the body is not valid JSON: {message.removeprefix('Invalid JSON: ')}", code="invalid_json")
    path = ""
    for part in first["loc"]:
        # unions add the names of their branches, which nobody asked for
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "int", "list", "constrained-str"):
            path += f".{part}" if path else part
    if not path:
        return ApiError("the body is not a JSON object", code="invalid_json")
    if first["type"] == "missing":
        return ApiError(f"{path} is missing", param=path)
    code = "array_above_max_length" if first["type"] == "too_long" else None
    return ApiError(f"{path}: {message[:1].lower()}{message[1:]}", param=path, code=code)
