"""What answers look like, for the description at /openapi.json.

The routes write their JSON themselves, for speed; so nothing but the tests holds them to this. A field with a default
may be missing.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """The answer where there is no other."""

    error: ErrorDetail


class PromptTokensDetails(BaseModel):
    """Of the prompt's tokens."""

    cached_tokens: int


class KVUsage(BaseModel):
    """What a KV policy did."""

    policy: dict[str, Any]
    evicted_tokens: int
    slots: int


class Usage(BaseModel):
    """The tokens of all choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    kv: KVUsage | None = None


class CompletionLogprobs(BaseModel):
    """Aligned arrays, one entry per token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One continuation of one prompt."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class CompletionChunkChoice(CompletionChoice):
    """What is new of it."""

    finish_reason: Literal["stop", "length"] | None  # type: ignore[assignment]


class Completion(BaseModel):
    """Of POST /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunk(BaseModel):
    """The same, streamed; the usage comes last, if it was asked for."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChunkChoice]
    usage: Usage | None = None


class TokenAlternative(BaseModel):
    """A token that could have come."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenToken(TokenAlternative):
    """The one that came."""

    top_logprobs: list[TokenAlternative]


class ChatLogprobs(BaseModel):
    """Of every token of an answer."""

    content: list[ChosenToken]


class CalledFunction(BaseModel):
    """What the model calls; the arguments are JSON."""

    name: str
    arguments: str


class MessageToolCall(BaseModel):
    """One call."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(BaseModel):
    """What the model says."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[MessageToolCall] | None = None


FinishReason = Literal["stop", "length", "tool_calls"]


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """Of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CalledFunctionDelta(BaseModel):
    """More of the arguments; the name comes with the first."""

    name: str | None = None
    arguments: str


class ToolCallDelta(BaseModel):
    """What is new of a call."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunctionDelta


class Delta(BaseModel):
    """What is new of a message; the role comes first."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(BaseModel):
    """What is new of an answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatCompletionChunk(BaseModel):
    """An answer, streamed; the usage comes last, if it was asked for."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class Embedding(BaseModel):
    """Of one input: numbers, or the text of their bytes."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """The tokens of all inputs."""

    prompt_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    kv: KVUsage | None = None


class Embeddings(BaseModel):
    """Of POST /v1/embeddings."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage


class ResponseAnswer(BaseModel):
    """Of POST /v1/responses: what every response has beside what was asked for."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: Literal["completed", "incomplete"]
    output: list[dict[str, Any]]
    error: None
    incomplete_details: dict[str, str] | None
    usage: dict[str, Any]


class ResponseEvent(BaseModel):
    """Of its stream; what else it holds depends on its type."""

    model_config = ConfigDict(extra="allow")

    type: str
    sequence_number: int


class Model(BaseModel):
    """A name that requests may use."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(BaseModel):
    """All of them."""

    object: Literal["list"]
    data: list[Model]


class Tokens(BaseModel):
    """Of POST /tokenize."""

    tokens: list[int]
    count: int
    max_model_len: int


class Text(BaseModel):
    """Of POST /detokenize."""

    prompt: str


class TokenizerInfo(BaseModel):
    """Of GET /tokenizer_info; the texts of special tokens, and the template in Jinja."""

    bos_token: str | None
    eos_token: str | None
    chat_template: str | None


class Status(BaseModel):
    """Of the probes, when all is well."""

    status: Literal["ok", "ready"]


class Version(BaseModel):
    """Which Octavo this is."""

    version: str
