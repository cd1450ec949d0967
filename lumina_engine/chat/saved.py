"""Saved conversations: one JSON file each, 0600, replaced atomically. No torch here."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from .events import Done, Message, ModelInfo, StopReason
from .modes import MODES, SAMPLING_NAMES, ChatError, Sampling

MAX_FILE_BYTES = 16 << 20
ROLES = ("system", "user", "assistant", "tool")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Version(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One answer to a message, how it went (None: not known) and which checkpoint gave it. Times in seconds."""

    text: str
    source: str = ""
    reason: StopReason | None = None
    tokens: int | None = None
    seconds: float | None = None
    first_token_s: float | None = None
    seed: int | None = None

    @property
    def done(self) -> Done | None:
        """The end of the reply as it was told, if it is known."""
        if self.reason is None or self.tokens is None or self.seconds is None:
            return None
        return Done(
            reason=self.reason,
            tokens=self.tokens,
            seconds=self.seconds,
            first_token_s=self.first_token_s,
            seed=self.seed or 0,
        )

    @classmethod
    def of(cls, text: str, done: Done, source: str) -> Version:
        """The version that a reply became."""
        return cls(
            text=text,
            source=source,
            reason=done.reason,
            tokens=done.tokens,
            seconds=done.seconds,
            first_token_s=done.first_token_s,
            seed=done.seed,
        )


class Versions(msgspec.Struct, kw_only=True):
    """All answers to one message. `turn` is the index of the answer in the conversation, `chosen` the one that stands there."""

    turn: int
    replies: list[Version]
    chosen: int = 0


@dataclass(frozen=True)
class SavedChat:
    """What a saved file says, checked. `checkpoint` has path, step and digest.

    `versions` by the index of the answer; `second` is what another checkpoint answered to the same messages. `content` is all
    that the file says.
    """

    name: str
    conversation: list[Message]
    mode: str
    system_prompt: str | None
    sampling: Sampling | None
    checkpoint: dict[str, Any]
    seed: int | None = None
    versions: tuple[Versions, ...] = ()
    second: SavedChat | None = None
    content: dict[str, Any] = field(default_factory=dict)


def default_name(now: datetime) -> str:
    return f"chat_{now:%Y%m%d_%H%M%S}"


def check_name(name: str) -> str:
    """The name, if it can be a file name of ours.

    Raises:
        ChatError: anything but letters, digits, `.`, `_`, `-`, or longer than 64.
    """
    if not _NAME.fullmatch(name) or name.endswith(".json"):
        raise ChatError(f"name {name!r}: 1 to 64 letters, digits, '.', '_' or '-', without a folder and without .json", 2)
    return name


def free_name(folder: Path, name: str) -> str:
    """`name`, or the first of name_2, name_3 … that no file has."""
    number, free = 1, name
    while (folder / f"{free}.json").exists():
        number += 1
        free = f"{name}_{number}"
    return free


def document(
    *,
    name: str,
    conversation: list[Message],
    mode: str,
    system_prompt: str | None,
    info: ModelInfo,
    sampling: Sampling,
    statistics: dict[str, Any],
    seed: int | None = None,
    versions: list[Versions] | None = None,
) -> dict[str, Any]:
    """The saved JSON. `conversation` holds the chosen answers; `versions` all of them, where there is more to say."""
    return {
        "name": name,
        "conversation": conversation,
        "mode": mode,
        "system_prompt": system_prompt,
        "checkpoint": {"path": info.path, "step": info.step, "digest": info.digest},
        "sampling": sampling.to_dict(),
        "seed": seed,
        "statistics": statistics,
        "versions": msgspec.to_builtins(versions or []),
    }


def write(path: Path, content: dict[str, Any] | str, *, replace: bool) -> Path:
    """Write JSON (a mapping) or text, whole or not at all; folders are made 0700, files 0600.

    Raises:
        ChatError: the file exists and `replace` is false, or the folder cannot be written.
    """
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, indent=2) + "\n"
    data = text.encode("utf-8", errors="replace")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if replace:
                temporary.replace(path)
            else:
                os.link(temporary, path, follow_symlinks=False)  # unlike a rename, never onto an existing file
        finally:
            temporary.unlink(missing_ok=True)
    except FileExistsError as error:
        raise ChatError(f"{path} exists already: choose another name", 2) from error
    except OSError as error:
        fix = "free some space" if error.errno == errno.ENOSPC else "choose a folder that you may write to"
        raise ChatError(f"{path} cannot be written ({error.strerror}): {fix}") from error
    return path


def read(path: Path) -> SavedChat:
    """A saved conversation.

    Raises:
        ChatError: not there, too large, no JSON, or not a conversation of this kind; names the file and the field.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ChatError(f"{path}: {error.strerror}; give the path that /save printed", 2) from error
    if len(data) > MAX_FILE_BYTES:
        raise ChatError(f"{path}: larger than {MAX_FILE_BYTES >> 20} MiB, so no saved conversation", 65)
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ChatError(f"{path}: no JSON ({error}); give a file that /save wrote", 65) from error
    try:
        return _checked(content, path)
    except ValueError as error:
        raise ChatError(f"{path}: {error}; give a file that /save wrote", 65) from error


def _checked(content: Any, path: Path) -> SavedChat:
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    turns = content.get("conversation")
    if not isinstance(turns, list):
        raise ValueError("conversation: a list is expected")
    conversation: list[Message] = []
    for index, turn in enumerate(turns):
        role, text = (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, None)
        if role not in ROLES or not isinstance(text, str):
            raise ValueError(f"conversation[{index}]: role ({', '.join(ROLES)}) and content (text) are expected")
        conversation.append({"role": role, "content": text})
    mode = content.get("mode", "standard")
    if mode not in MODES:
        raise ValueError(f"mode: one of {', '.join(MODES)} is expected")
    system_prompt = content.get("system_prompt")
    if system_prompt is not None and not isinstance(system_prompt, str):
        raise ValueError("system_prompt: text is expected")
    sampling = content.get("sampling")
    settings: Sampling | None = None
    if sampling is not None:
        if not isinstance(sampling, dict) or not set(sampling) <= set(SAMPLING_NAMES):
            raise ValueError(f"sampling: only {', '.join(SAMPLING_NAMES)} are expected")
        settings = Sampling(**sampling)
    checkpoint = content.get("checkpoint")
    name = content.get("name")
    seed = content.get("seed")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**62):
        raise ValueError("seed: a whole number from 0 on, or null, is expected")
    second = content.get("second")
    if second is not None and (not isinstance(second, dict) or "second" in second):
        raise ValueError("second: the conversation with another checkpoint is expected")
    return SavedChat(
        name=name if isinstance(name, str) and _NAME.fullmatch(name) else path.stem,
        conversation=conversation,
        mode=mode,
        system_prompt=system_prompt or None,
        sampling=settings,
        checkpoint=checkpoint if isinstance(checkpoint, dict) else {},
        seed=seed,
        versions=_versions(content.get("versions") or [], conversation),
        second=None if second is None else _checked(second, path),
        content=content,
    )


def _versions(content: Any, conversation: list[Message]) -> tuple[Versions, ...]:
    """The versions of answers that are in the conversation.

    Raises:
        ValueError: of another kind, or of no answer.
    """
    try:
        found = msgspec.convert(content, list[Versions])
    except msgspec.ValidationError as error:
        raise ValueError(f"versions: {error}") from error
    for entry in found:
        there = conversation[entry.turn] if 0 <= entry.turn < len(conversation) else None
        if there is None or there["role"] != "assistant":
            raise ValueError(f"versions: turn {entry.turn} is no answer")
        if not 0 <= entry.chosen < len(entry.replies) or entry.replies[entry.chosen].text != there["content"]:
            raise ValueError(f"versions: the chosen one of turn {entry.turn} is not the answer in the conversation")
    return tuple(found)


def markdown(content: dict[str, Any]) -> str:
    """A saved conversation for people: a heading per turn, the text as it is."""
    heads = {"user": "You", "assistant": "Assistant", "system": "System", "tool": "Tool"}
    checkpoint = content["checkpoint"]
    lines = [
        f"# {content['name']}",
        "",
        f"Checkpoint {checkpoint['path']}, step {checkpoint['step']}, mode {content['mode']}.",
        "",
    ]
    if content["system_prompt"]:
        lines += ["## System", "", content["system_prompt"], ""]
    for turn in content["conversation"]:
        lines += [f"## {heads[turn['role']]}", "", turn["content"], ""]
    if second := content.get("second"):
        lines += ["---", "", markdown({**second, "name": f"{content['name']}, the other checkpoint"})]
    return "\n".join(lines)
