"""What a reply consists of, and the lines of the chat socket. One declaration for engine, server, client and terminal.

A reply is a stream of events: one `Start`, any number of `Token`, one `Done`; in a traced reply of a model with experts a
`Routed` follows each `Token`. On the socket each event is one JSON object on one line, told apart by `op`; so are the requests.
Unknown fields and wrong types of a request are refused by the decoder, so nesting is bounded by these declarations; unknown
fields of an answer are passed over, so that a server may say more than its client knows. No torch here.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Literal, Protocol, TypeAlias

import msgspec

from .modes import Sampling

PROTO = 1
MAX_LINE = 65_536  # bytes in one line of a client
MAX_MESSAGES = 4_096
MAX_ALTERNATIVES = 20
TRACE_ALTERNATIVES = 5  # of a traced reply that asks for no number

Message: TypeAlias = dict[str, str]  # {"role": system | user | assistant | tool, "content": text}
StopReason: TypeAlias = Literal["stop", "length", "context", "cancelled"]


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The loaded checkpoint. Unknown is None, never a guess."""

    path: str
    run: str | None = None
    step: int | None = None
    loss: float | None = None  # nats per token, from the checkpoint's metrics
    loss_name: str | None = None  # which metric that is: eval_loss or loss
    parameters: int = 0
    active_parameters: int | None = None
    weights_bytes: int | None = None
    precision: str = "fp32"
    device: str = "cpu"
    context_limit: int = 0  # tokens
    tokenizer: str = ""
    digest: str | None = None  # SHA-256 of the checkpoint's manifest

    @property
    def name(self) -> str:
        """Short name for people: `run step-000123`."""
        parts = [self.run or "", f"step-{self.step:06d}" if self.step is not None else ""]
        return " ".join(part for part in parts if part) or self.path

    def line(self) -> str:
        """Checkpoint, step, loss, parameters, precision and device in one line."""
        step = f"step {self.step:,}" if self.step is not None else "step -"
        loss = f"{self.loss_name or 'loss'} {self.loss:.4f}" if self.loss is not None else "loss -"
        active = f", {self.active_parameters:,} active" if self.active_parameters is not None else ""
        return f"{self.path} | {step} | {loss} | {self.parameters:,} parameters{active} | {self.precision} | {self.device}"


class Alternative(msgspec.Struct, frozen=True, array_like=True):
    """A token that could have been chosen, with the model's own probability (before penalty, temperature and cuts)."""

    text: str
    id: int
    probability: float


class Start(msgspec.Struct, frozen=True, kw_only=True, tag="start", tag_field="op"):
    """The prompt is read. `dropped` counts the oldest messages left out because the context is full."""

    prompt_tokens: int
    context_limit: int
    dropped: int = 0
    id: str = ""

    def notice(self) -> str | None:
        """What the reply says when messages were left out."""
        if not self.dropped:
            return None
        what = "message was" if self.dropped == 1 else f"{self.dropped} messages were"
        return f"the oldest {what} left out: the context holds {self.context_limit:,} tokens"


class Token(msgspec.Struct, frozen=True, kw_only=True, tag="token", tag_field="op", omit_defaults=True):
    """One sampled token. `text` holds the whole characters that it completes: it may be empty, or hold several.

    probability: the model's own, the softmax of its raw logits: at temperature 1, over all ids, before penalty and cuts.
    chance: with which it was drawn here: after mask, penalty, temperature, top-k and top-p; 1 at temperature 0. Traced only.
    """

    text: str = ""
    token: int = 0
    probability: float | None = None
    chance: float | None = None
    alternatives: list[Alternative] = []
    id: str = ""


class Route(msgspec.Struct, frozen=True, array_like=True):
    """The experts that one token was routed to in one layer, and the gates that their outputs were multiplied by.

    layer: of all layers of the model, counted from 0; layers without experts are left out.
    """

    layer: int
    experts: list[int]
    gates: list[float]


class Routed(msgspec.Struct, frozen=True, kw_only=True, tag="routed", tag_field="op"):
    """Where the sampled token number `index` (from 0) of a traced reply went, layer by layer; of `experts` experts each.

    It comes after its `Token`: a token is routed when the model reads it, which is one step after it was chosen. Dense models
    send none.
    """

    index: int
    experts: int
    routes: list[Route]
    id: str = ""


class Done(msgspec.Struct, frozen=True, kw_only=True, tag="done", tag_field="op"):
    """The end of a reply. `tail` is text that was held back: bytes of a character that never became whole.

    reason: stop (the model ended its turn), length (`max_new_tokens`), context (no room left), cancelled.
    tokens: sampled tokens, the end-of-turn token not counted. Times in seconds, from the request on.
    """

    reason: StopReason
    tokens: int
    seconds: float
    first_token_s: float | None = None
    seed: int = 0
    tail: str = ""
    id: str = ""

    @property
    def tokens_per_s(self) -> float | None:
        return self.tokens / self.seconds if self.seconds > 0 and self.tokens else None


Event: TypeAlias = Start | Token | Routed | Done


class Backend(Protocol):
    """Something that answers: the model in this process (`LocalBackend`) or a chat server (`ServerBackend`)."""

    @property
    def info(self) -> ModelInfo: ...

    def generate(
        self, messages: Sequence[Message], sampling: Sampling, seed: int, *, alternatives: int = 0, trace: bool = False
    ) -> Generator[Event, None, None]:
        """Answer the conversation: Start, Tokens (each followed by its Routed, if traced), Done. Raises ChatError."""
        ...

    def cancel(self) -> None:
        """End the reply that is being generated; it closes with `Done(reason="cancelled")`. Safe from any thread."""
        ...

    def close(self) -> None: ...


# -- the socket


class ClientHello(msgspec.Struct, frozen=True, tag="hello", tag_field="op", forbid_unknown_fields=True):
    proto: int
    client: str = ""


class WireMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: Literal["system", "user", "assistant", "tool"]
    content: str


class Generate(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    tag="generate",
    tag_field="op",
    forbid_unknown_fields=True,
    omit_defaults=True,  # a server that knows no `trace` must not see it
):
    """Ask for a reply. `trace` adds probabilities, alternatives and a `routed` line to each token; see `ServerHello.trace`."""

    id: str
    messages: list[WireMessage]
    sampling: Sampling
    seed: int
    alternatives: int = 0
    trace: bool = False


class Cancel(msgspec.Struct, frozen=True, tag="cancel", tag_field="op", forbid_unknown_fields=True):
    id: str


class Bye(msgspec.Struct, frozen=True, tag="bye", tag_field="op", omit_defaults=True):
    """Last line before a side closes."""

    reason: str = ""


Request: TypeAlias = ClientHello | Generate | Cancel | Bye


class ServerHello(msgspec.Struct, frozen=True, kw_only=True, tag="hello", tag_field="op"):
    """Answer to the client's hello. `info` comes with `ready`, once the weights are loaded.

    trace: whether this server understands `Generate.trace`; those that do not say so refuse it.
    """

    proto: int = PROTO
    pid: int = 0
    state: Literal["loading", "ready"] = "loading"
    detail: str = ""
    idle_timeout_s: float = 0.0
    trace: bool = False


class Loading(msgspec.Struct, frozen=True, tag="loading", tag_field="op", omit_defaults=True):
    """What is being done, since when, and how many bytes of weights of how many were read and found sound so far."""

    detail: str
    seconds: float
    bytes_read: int | None = None
    bytes_total: int | None = None


class Ready(msgspec.Struct, frozen=True, tag="ready", tag_field="op"):
    info: ModelInfo


class Queued(msgspec.Struct, frozen=True, tag="queued", tag_field="op"):
    """Another reply is being generated; `ahead` requests come first."""

    id: str
    ahead: int


class Failed(msgspec.Struct, frozen=True, tag="error", tag_field="op"):
    """A request was refused or failed. `id` is empty when the line could not be read."""

    error: str
    id: str = ""


Answer: TypeAlias = ServerHello | Loading | Ready | Queued | Start | Token | Routed | Done | Failed | Bye

_encoder = msgspec.json.Encoder()
_requests: msgspec.json.Decoder[Request] = msgspec.json.Decoder(Request)
_answers: msgspec.json.Decoder[Answer] = msgspec.json.Decoder(Answer)


class WireError(ValueError):
    """A line that is no request or answer of this protocol. The message says why."""


def encode_line(item: msgspec.Struct) -> bytes:
    """One JSON object with its newline."""
    return _encoder.encode(item) + b"\n"


def decode_request(line: bytes) -> Request:
    """What a client sent.

    Raises:
        WireError: not JSON, an unknown `op`, a missing or unknown field, a wrong type or a value out of bounds.
    """
    try:
        request = _requests.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise WireError(str(error) or type(error).__name__) from error
    if isinstance(request, Generate):
        if not 1 <= len(request.messages) <= MAX_MESSAGES:
            raise WireError(f"messages: 1 to {MAX_MESSAGES:,} expected, got {len(request.messages):,}")
        if not 0 <= request.alternatives <= MAX_ALTERNATIVES:
            raise WireError(f"alternatives: 0 to {MAX_ALTERNATIVES} expected, got {request.alternatives}")
        if not 0 <= request.seed < 2**63:
            raise WireError(f"seed: 0 to 2^63 - 1 expected, got {request.seed}")
        if not 1 <= len(request.id) <= 64:
            raise WireError("id: 1 to 64 characters expected")
    return request


def decode_answer(line: bytes) -> Answer:
    """What a server sent.

    Raises:
        WireError: as `decode_request`.
    """
    try:
        return _answers.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise WireError(str(error) or type(error).__name__) from error
