"""The records of a run: one declaration for the log file, the socket, viewers and reports.

A record is one JSON object on one line (JSON Lines). Every record has `seq` (1, 2, 3 … without gaps in one run), `t` (unix
seconds), `inc` (incarnation: how often the run has been started, from 1) and `type`. JSON has no NaN, so non-finite numbers are
written as the strings "nan", "inf" and "-inf"; `decode` gives them back as floats. A field that is unknown is left out.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Union, get_args

import msgspec

RunState = Literal[
    "preparing", "compiling", "running", "paused", "stopping", "finished", "failed", "crashed", "preempted"
]  # the values of Run.state; the last four are final unless a new incarnation starts
FINAL_STATES = frozenset({"finished", "failed", "crashed", "preempted"})
Severity = Literal["info", "warning", "critical"]


class RecordError(ValueError):
    """A line that is no record. The message says why; the caller knows file and byte offset."""


# a longer number on a line makes it no record: the readers' columns hold 64 bits
Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


class _Record(msgspec.Struct, kw_only=True, omit_defaults=True, tag_field="type"):
    seq: Int64 = 0
    t: float = 0.0
    inc: Int64 = 0


class Run(_Record, tag="run"):
    """A change of the run's state. `reason` is one line for a person; `exit_code` is set with a final state."""

    state: str
    reason: str | None = None
    exit_code: Int64 | None = None
    total_steps: Int64 | None = None
    total_tokens: Int64 | None = None
    world: Int64 | None = None
    adaptive: str | None = None  # mode of the rate controller, when a trainer begins; versions without one write none
    id: str | None = None  # the command that caused it


class Step(_Record, tag="step"):
    """One optimizer step. Loss in nats per trained token; rates per second; times in seconds; lengths in tokens.

    The four times of its parts are rank 0's, over all micro batches; what remains of `step_time` is counting, records and
    waiting. On a GPU they are device time, and `optimizer_time` is that of the update whose kernels ran in this step's time:
    the one before.
    """

    step: Int64
    epoch: Int64 = 0
    tokens: Int64 = 0  # non-padding tokens processed since step 1, over all ranks
    loss: float | None = None  # language loss only
    aux_loss: float | None = None  # unweighted: 1.0 = balanced
    z_loss: float | None = None  # unweighted mean of logsumexp squared
    lr: float | None = None
    grad_norm: float | None = None  # before clipping
    step_time: float | None = None
    tokens_per_s: float | None = None  # non-padding tokens of the global batch / step_time
    mfu: float | None = None  # share of the device's peak, 0-1; left out where the peak is unknown
    seq_length: Int64 | None = None
    batch: Int64 | None = None  # rows in the global batch
    skipped: bool = False  # the update was not applied (non-finite loss or gradient)
    data_time: float | None = None
    forward_time: float | None = None
    backward_time: float | None = None
    optimizer_time: float | None = None
    repeats: Int64 | None = None  # an earlier step of this epoch that had exactly these tokens (of rank 0)
    frozen: list[str] = []  # parts of the model in which nothing changed over the last 32 steps, while others did


class Eval(_Record, tag="eval"):
    """One evaluation. `tasks` maps a task name to its loss."""

    step: Int64
    loss: float | None = None
    perplexity: float | None = None
    bits_per_byte: float | None = None
    accuracy: float | None = None
    tokens: Int64 | None = None
    tasks: dict[str, float] | None = None
    seconds: float | None = None


class Experts(_Record, tag="experts"):
    """Routing since the previous `experts` record; lists have one entry per expert layer, first layer first."""

    step: Int64
    layers: list[Int64] = []  # index of each expert layer in the model (a line is split by layer when it grows too long)
    load: list[list[float]] = []  # tokens per expert (choices, padding not counted)
    imbalance: list[float] = []  # max / mean
    entropy: list[float] = []  # of the load shares, divided by log E: 1.0 = balanced
    dead: list[Int64] = []  # experts without a token
    dropped: list[float] = []  # share of choices dropped by capacity
    bias_range: list[float] = []
    confidence: list[float] = []  # mean top score


class Device(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One accelerator. Utilisation 0-100 %, memory in bytes, power in watts, temperature in °C, link in bytes/s."""

    index: Int64
    name: str
    utilisation: float | None = None
    memory_used: Int64 | None = None
    memory_total: Int64 | None = None
    power: float | None = None
    power_limit: float | None = None
    temperature: float | None = None
    link_rx: float | None = None
    link_tx: float | None = None


class Hardware(_Record, tag="hardware"):
    """Devices and host. Percentages 0-100; memory and disk in bytes; rss is the sum over the run's processes."""

    devices: list[Device] = []
    cpu: float | None = None
    cpu_count: Int64 | None = None
    memory_used: Int64 | None = None
    memory_total: Int64 | None = None
    rss: Int64 | None = None
    disk_free: Int64 | None = None
    disk_total: Int64 | None = None
    net_rx: float | None = None  # bytes/s
    net_tx: float | None = None


class Checkpoint(_Record, tag="checkpoint"):
    """A checkpoint was committed, or failed (then `failed` says why and nothing else changed)."""

    step: Int64
    path: str | None = None
    bytes: Int64 | None = None
    seconds: float | None = None  # of its work
    span: float | None = None  # from its beginning to this record, the waits for boundaries with it
    blocking: float | None = None  # seconds for which training stood still
    verified: bool = False
    best: bool = False
    failed: str | None = None
    id: str | None = None


class Alert(_Record, tag="alert"):
    severity: Severity
    code: str
    message: str
    recommendation: str | None = None
    step: Int64 | None = None


class Change(_Record, tag="change"):
    """Something was changed at run time. `by` is user, adaptive or recovery; `id` is the command's id.

    `evidence` is what a decision of the adaptive controller rests on: rule, statistic, threshold, window, cooldown, factor, and
    what it was compared with.
    """

    what: str
    step: Int64 | None = None
    before: Any = None
    after: Any = None
    by: str | None = None
    id: str | None = None
    reason: str | None = None
    evidence: dict[str, Any] | None = None


class Rewind(_Record, tag="rewind"):
    """The run goes on from `to_step`: records of later steps written before this one belong to an abandoned branch.

    A rollback (the run went back by itself, at `failed_step`) also says what it leaves out from there on: `skip` are ranges
    [begin, end) of global row numbers.
    """

    to_step: Int64
    reason: str | None = None
    failed_step: Int64 | None = None
    skip: list[tuple[int, int]] | None = None
    early_stop: bool = True  # the checkpoint has the state of early stop; one of a version without it has not
    evaluated: bool = False  # early stop has the evaluation of `to_step` in the checkpoint; a save of an interval is before it


class Resume(_Record, tag="resume"):
    """The proof of a resume, before its first step: where the run stands, and how that differs from the checkpoint.

    Digests are the first 16 hex digits of SHA-256. `changed` maps what is another now than in the checkpoint (configuration
    keys, versions, data) to the values then and now; nothing is, in an exact resume. A key that the checkpoint's version did
    not know had its default.
    """

    step: Int64
    path: str | None = None  # the checkpoint
    tokens: Int64 = 0
    epoch: Int64 = 0
    index: Int64 = 0  # the next row of the epoch
    lr: float | None = None  # of the next step
    samples: list[Int64] = []  # the first samples of the next step
    rows_digest: str = ""  # of all its rows, of all ranks
    rng: list[str] = []  # digest of all generators of each rank
    data: str = ""  # fingerprint
    config: str = ""  # digest of the configuration in force
    skipped_rows: Int64 = 0  # left out by rollbacks so far
    changed: dict[str, tuple[Any, Any]] = {}


class Note(_Record, tag="note"):
    message: str
    step: Int64 | None = None
    id: str | None = None


Record = Union[Run, Step, Eval, Experts, Hardware, Checkpoint, Alert, Change, Rewind, Resume, Note]  # noqa: UP007
RECORD_TYPES: dict[str, type] = {cls.__struct_config__.tag: cls for cls in get_args(Record)}

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Record, strict=False)


def _spell(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, dict):
        return {key: _spell(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_spell(item) for item in value]
    return value


def _builtins(value: Any) -> Any:
    if isinstance(value, msgspec.Struct):
        fields = {name: _builtins(item) for name, item in msgspec.structs.asdict(value).items()}
        tag = value.__struct_config__.tag
        defaults = {f.encode_name: f.default for f in msgspec.structs.fields(value)}
        fields = {key: item for key, item in fields.items() if item is not defaults.get(key)}
        return {"type": tag, **fields} if tag else fields
    if isinstance(value, list | tuple):
        return [_builtins(item) for item in value]
    if isinstance(value, dict):
        return {key: _builtins(item) for key, item in value.items()}
    return value


def encode(record: Record) -> bytes:
    """One line of JSON, with its newline. Non-finite numbers become strings."""
    line = _encoder.encode(record)
    if b"null" in line:  # msgspec writes non-finite floats as null, and defaults (None) are left out
        line = _encoder.encode(_spell(_builtins(record)))
    return line + b"\n"


def decode(line: bytes | str) -> Record:
    """The record on a line.

    Raises:
        RecordError: the line is not JSON, has no known `type`, or a field has the wrong kind of value.
    """
    try:
        return _decoder.decode(line)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError) as error:
        raise RecordError(str(error)) from error


def decode_lines(data: bytes) -> list[Record]:
    """The records of whole lines at once: several times faster than line by line, for those who read a long log.

    Raises:
        RecordError: at least one line is no record; `decode` each to learn which.
    """
    try:
        found: list[Record] = _decoder.decode_lines(data)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError) as error:
        raise RecordError(str(error)) from error
    return found
