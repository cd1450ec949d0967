"""A conversation with a model: history, commands, statistics, saving. The same one serves command line, terminal and grader.

No torch here: the model sits behind a `Backend`, in this process or behind a socket.
"""

from __future__ import annotations

import difflib
import secrets
import threading
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from . import saved
from .context import recent
from .events import Backend, Done, Event, Message, Start, Token
from .modes import DEFAULT_MODE, MODES, ChatError, Sampling, check_mode, overrides_of, sampling_for
from .saved import Version, Versions

MAX_HISTORY = 20


@dataclass(frozen=True)
class Command:
    """One slash command: the help text and the dispatch both come from this table."""

    name: str
    argument: str
    help: str


COMMANDS = (
    Command("/help", "", "this list"),
    Command("/quit", "", "leave"),
    Command("/exit", "", "leave"),
    Command("/clear", "", "forget the conversation, keep the system prompt"),
    Command("/stats", "", "messages, tokens, times"),
    Command("/mode", "<mode>", "sampling: " + ", ".join(MODES)),
    Command("/system", "<text>", "set the system prompt; without text: show it"),
    Command("/save", "[name]", "write the conversation to chats/<name>.json"),
    Command("/retry", "", "answer the last message again, with other random numbers"),
    Command("/load", "PATH", "continue a saved conversation"),
)
_NAMES = tuple(command.name for command in COMMANDS)


@dataclass(frozen=True)
class Outcome:
    """What a command did. `ok` false: nothing was changed. `action` is left to the front end."""

    text: str
    ok: bool = True
    action: str | None = None  # quit | retry | clear | load


@dataclass
class _Statistics:
    started: float
    messages_sent: int = 0
    replies: int = 0
    tokens: int = 0
    seconds: float = 0.0
    first_token_s: list[float] = field(default_factory=list)


class ChatSession:
    """Keeps a conversation and asks a backend to answer.

    Args:
        backend: answers; the session never looks at the model.
        overrides: sampling values that win over the mode's (None = the mode's).
        max_history: messages sent to the model, the system prompt not counted.
        seed: the same conversation, mode and seed give the same text; None draws a new seed for each reply.
        trace: ask for probabilities, alternatives and experts of each token.
        chats_dir: where `/save` writes.

    `second` may be set to a session in which another checkpoint answers the same messages: it is saved with this one.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        mode: str = DEFAULT_MODE,
        system_prompt: str | None = None,
        max_history: int = MAX_HISTORY,
        overrides: Mapping[str, float | None] | None = None,
        seed: int | None = None,
        alternatives: int = 0,
        trace: bool = False,
        chats_dir: Path | str = "chats",
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        self.backend = backend
        self.mode = check_mode(mode)
        self.overrides = {name: value for name, value in (overrides or {}).items() if value is not None}
        sampling_for(self.mode, self.overrides)  # a wrong value is refused here, not at the first reply
        if max_history < 1:
            raise ChatError(f"max-history must be 1 or more, not {max_history}", 2)
        if seed is not None and not 0 <= seed < 2**62:
            raise ChatError(f"seed must lie between 0 and 2^62, not {seed}", 2)
        self.system_prompt = system_prompt or None
        self.max_history = max_history
        self.seed = seed
        self.alternatives = alternatives
        self.trace = trace
        self.second: ChatSession | None = None
        self._second_read: dict[str, Any] | None = None  # what a file said of another checkpoint, kept for the next save
        self.versions: dict[int, Versions] = {}  # by the answer's index in the history
        self.chats_dir = Path(chats_dir)
        self.history: list[Message] = []
        self.unsent: str | None = None  # a message whose reply failed; /retry sends it again
        self.name: str | None = None  # of the file this conversation was last saved to
        self.last: Done | None = None
        self.context_used: int | None = 0  # tokens of the last prompt and its reply; None: not known
        self._attempt = 0
        self._busy = False
        self._saving = threading.Lock()
        self._clock, self._now = clock, now
        self._stats = _Statistics(started=clock())

    # -- replies

    @property
    def sampling(self) -> Sampling:
        """The mode's numbers with this session's overrides."""
        return sampling_for(self.mode, self.overrides)

    def settings_text(self) -> str:
        """Sampling and seed as `modes.parse_settings` reads them."""
        values = {**self.sampling.to_dict(), "seed": "none" if self.seed is None else self.seed}
        return " ".join(f"{name}={value}" for name, value in values.items())

    @property
    def busy(self) -> bool:
        return self._busy

    def messages(self) -> list[Message]:
        """What is sent to the model for the history as it is."""
        head: list[Message] = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        return head + recent(self.history, self.max_history)

    def send(self, text: str, seed: int | None = None) -> Generator[Event, None, None]:
        """Add a user's message and stream the reply; the history holds both once the reply has ended.

        A reply that was cancelled is kept as far as it came. If the backend fails, the message moves to `unsent`. `seed` is
        for this reply only.

        Raises:
            ChatError: a reply is still being generated, or the backend failed.
        """
        self._ready()
        if not text.strip():
            raise ChatError("the message is empty: type something to send", 2)
        self._attempt = 0
        self.history.append({"role": "user", "content": text})
        self._stats.messages_sent += 1
        yield from self._reply(seed)

    def retry(self, seed: int | None = None) -> Generator[Event, None, None]:
        """Answer the last message again: a message that failed is sent again, else the last reply gets another version.

        Raises:
            ChatError: there is nothing to answer, or as `send`.
        """
        self._ready()
        if self.unsent is not None:
            text, self.unsent, self._attempt = self.unsent, None, 0
            self.history.append({"role": "user", "content": text})
            yield from self._reply(seed)
            return
        if not self.can_retry:
            raise ChatError("nothing to answer again: send a message first", 2)
        previous = self.history.pop()
        self._attempt = len(self._versions_at(len(self.history), previous["content"]).replies)
        try:
            yield from self._reply(seed)
        finally:
            if self.unsent is not None:  # the second try failed: the first answer stays
                self.history += [{"role": "user", "content": self.unsent}, previous]
                self.unsent = None

    def _versions_at(self, turn: int, text: str) -> Versions:
        """The versions of an answer; of one that was loaded without any, itself."""
        return self.versions.setdefault(turn, Versions(turn=turn, replies=[Version(text=text)]))

    @property
    def version(self) -> tuple[int, int]:
        """Which version of the last answer stands in the history, counted from 1, of how many; (0, 0) without an answer."""
        if not self.history or self.history[-1]["role"] != "assistant":
            return 0, 0
        entry = self._versions_at(len(self.history) - 1, self.history[-1]["content"])
        return entry.chosen + 1, len(entry.replies)

    def choose_version(self, step: int) -> bool:
        """Put the version `step` further (or back) of the last answer into the history; false if there is none.

        Raises:
            ChatError: a reply is still being generated.
        """
        self._ready()
        chosen, total = self.version
        if not 1 <= chosen + step <= total:
            return False
        entry = self.versions[len(self.history) - 1]
        entry.chosen += step
        self.history[-1] = {"role": "assistant", "content": entry.replies[entry.chosen].text}
        self.context_used = None
        return True

    @property
    def can_retry(self) -> bool:
        return self.unsent is not None or (bool(self.history) and self.history[-1]["role"] == "assistant")

    def cancel(self) -> None:
        """End the reply that is being generated. Safe from a signal handler and from any thread."""
        self.backend.cancel()

    def _ready(self) -> None:
        if self._busy:
            raise ChatError("a reply is still being written: stop it first", 2)

    def reply_seed(self, again: bool = False) -> int:
        """The seed of the next reply, `again`: of another version of the last one. Drawn, if the session has none."""
        if self.seed is None:
            return secrets.randbits(31)
        return self.seed + (self.version[1] if again and self.unsent is None else 0)

    def _reply(self, seed: int | None) -> Generator[Event, None, None]:
        """Stream one answer to the last message of the history; see `send`."""
        self._busy = True
        started = self._clock()
        parts: list[str] = []
        done: Done | None = None
        prompt_tokens = 0
        if seed is None:
            seed = secrets.randbits(31) if self.seed is None else self.seed + self._attempt
        stream = self.backend.generate(self.messages(), self.sampling, seed, alternatives=self.alternatives, trace=self.trace)
        try:
            for event in stream:
                if isinstance(event, Start):
                    prompt_tokens = event.prompt_tokens
                elif isinstance(event, Token):
                    parts.append(event.text)
                elif isinstance(event, Done):
                    done = event
                    parts.append(event.tail)
                    self._finish("".join(parts), event, prompt_tokens, self._clock() - started)
                yield event
        finally:
            stream.close()
            self._busy = False
            if done is None:  # failed, or the reader went away before the end
                self.unsent = self.history.pop()["content"]

    def _finish(self, text: str, done: Done, prompt_tokens: int, seconds: float) -> None:
        version = Version.of(text, done, self.backend.info.name)
        turn = len(self.history)
        entry = self.versions.get(turn)
        if entry is not None and self._attempt:
            entry.replies.append(version)
            entry.chosen = len(entry.replies) - 1
        else:
            self.versions[turn] = Versions(turn=turn, replies=[version])
        self.history.append({"role": "assistant", "content": text})
        self.last = done
        self.unsent = None
        self.context_used = prompt_tokens + done.tokens
        stats = self._stats
        stats.replies += 1
        stats.tokens += done.tokens
        stats.seconds += seconds
        if done.first_token_s is not None:
            stats.first_token_s.append(done.first_token_s)

    # -- statistics

    def statistics(self) -> dict[str, Any]:
        """Numbers of this session (capabilities 5.3). None where nothing was measured yet.

        messages_sent (of the user), tokens_generated, avg_response_time (s), session_duration (HH:MM:SS), current_mode,
        tokens_per_s, first_token_ms (mean).
        """
        stats = self._stats
        duration = max(0, int(self._clock() - stats.started))
        first = stats.first_token_s
        return {
            "messages_sent": stats.messages_sent,
            "tokens_generated": stats.tokens,
            "avg_response_time": stats.seconds / stats.replies if stats.replies else 0.0,
            "session_duration": f"{duration // 3600:02d}:{duration // 60 % 60:02d}:{duration % 60:02d}",
            "current_mode": self.mode,
            "tokens_per_s": stats.tokens / stats.seconds if stats.seconds > 0 else None,
            "first_token_ms": 1000 * sum(first) / len(first) if first else None,
        }

    # -- commands

    def command(self, line: str) -> Outcome | None:
        """Run a slash command. None if the line is a message (a leading space sends a line that begins with `/`)."""
        if not line.startswith("/"):
            return None
        name, _, argument = line.strip().partition(" ")
        argument = argument.strip()
        if name not in _NAMES:
            near = difflib.get_close_matches(name, _NAMES, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            return Outcome(f"unknown command {name}{hint}; commands: {' '.join(_NAMES)}", ok=False)
        if self._busy and name not in ("/help", "/stats", "/quit", "/exit"):
            return Outcome("a reply is still being written: stop it first", ok=False)
        try:
            return self._run(name, argument)
        except ChatError as error:
            return Outcome(str(error), ok=False)

    def _run(self, name: str, argument: str) -> Outcome:
        if name in ("/quit", "/exit"):
            return Outcome("", action="quit")
        if name == "/help":
            return Outcome(help_text())
        if name == "/clear":
            self.clear()
            kept = "; the system prompt stays" if self.system_prompt else ""
            return Outcome(f"conversation forgotten{kept}", action="clear")
        if name == "/stats":
            return Outcome("\n".join(f"{key}: {_shown(value)}" for key, value in self.statistics().items()))
        if name == "/mode":
            return self._set_mode(argument)
        if name == "/system":
            if not argument:
                return Outcome(f"system prompt: {self.system_prompt}" if self.system_prompt else "no system prompt is set")
            self.system_prompt = argument
            return Outcome("system prompt set")
        if name == "/save":
            return Outcome(f"saved to {self.save(argument or None)}")
        if name == "/load":
            return self._load(argument)
        if not self.can_retry:
            return Outcome("nothing to answer again: send a message first", ok=False)
        return Outcome("", action="retry")

    def clear(self) -> None:
        """Forget the conversation, not the system prompt; the next save is another file."""
        self.history.clear()
        self.versions.clear()
        self._second_read = None
        self.unsent = None
        self.name = None
        self.last = None
        self.context_used = 0

    def _set_mode(self, argument: str) -> Outcome:
        if not argument:
            return Outcome(f"mode {self.mode}: {_sampling_text(self.sampling)}; modes: {', '.join(MODES)}")
        self.mode = check_mode(argument)
        note = f" (set by hand: {', '.join(sorted(self.overrides))})" if self.overrides else ""
        return Outcome(f"mode {self.mode}: {_sampling_text(self.sampling)}{note}")

    def _load(self, argument: str) -> Outcome:
        if not argument:
            raise ChatError("/load needs the path of a saved conversation", 2)
        chat = self.load(Path(argument).expanduser())
        digest = chat.checkpoint.get("digest")
        other = digest is not None and self.backend.info.digest is not None and digest != self.backend.info.digest
        note = f"; it was with another checkpoint (step {chat.checkpoint.get('step')})" if other else ""
        return Outcome(f"{len(chat.conversation)} messages loaded, mode {self.mode}{note}", action="load")

    # -- files

    def save(self, name: str | None = None) -> Path:
        """Write the conversation and return the path. Without a name: the one it already has, else `chat_YYYYMMDD_HHMMSS`.

        Raises:
            ChatError: a name that is no file name, one that another conversation has, or a folder that cannot be written.
        """
        with self._saving:  # two sessions of one conversation may end their replies at the same time
            if name is None:
                name = self.name or saved.free_name(self.chats_dir, saved.default_name(self._now()))
            name = saved.check_name(name)
            path = saved.write(self.chats_dir / f"{name}.json", self.document(name), replace=name == self.name)
            self.name = name
            return path

    def export_markdown(self) -> Path:
        """Write the conversation as Markdown beside the saved JSON, for people; returns the path.

        Raises:
            ChatError: as `save`.
        """
        name = self.save().stem
        return saved.write(self.chats_dir / f"{name}.md", saved.markdown(self.document(name)), replace=True)

    def document(self, name: str) -> dict[str, Any]:
        """What `save` writes."""
        history = list(self.history)
        content = saved.document(
            name=name,
            conversation=[*history, *([{"role": "user", "content": self.unsent}] if self.unsent else [])],
            mode=self.mode,
            system_prompt=self.system_prompt,
            info=self.backend.info,
            sampling=self.sampling,
            statistics=self.statistics(),
            seed=self.seed,
            versions=[entry for turn, entry in sorted(self.versions.items()) if turn < len(history)],
        )
        second = self._second_read if self.second is None else self.second.document(name)
        return content if second is None else {**content, "second": second}

    def load(self, path: Path) -> saved.SavedChat:
        """Continue a saved conversation: history, mode, sampling and system prompt are replaced.

        Raises:
            ChatError: the file cannot be used; then nothing changed.
        """
        chat = saved.read(path)
        self.restore(chat)
        here = path.resolve().parent == self.chats_dir.resolve() and path.suffix == ".json"
        self.name = path.stem if here else None
        return chat

    def restore(self, chat: saved.SavedChat) -> None:
        """Continue a conversation that was read: history, versions, mode, sampling, seed and system prompt are replaced."""
        overrides = overrides_of(chat.mode, chat.sampling) if chat.sampling else {}
        self.clear()
        self._second_read = chat.second.content if chat.second is not None else None
        self.history = list(chat.conversation)
        self.versions = {
            entry.turn: Versions(turn=entry.turn, replies=list(entry.replies), chosen=entry.chosen) for entry in chat.versions
        }
        self.mode, self.overrides, self.system_prompt, self.seed = chat.mode, overrides, chat.system_prompt, chat.seed
        if self.history and self.history[-1]["role"] == "user":
            self.unsent = self.history.pop()["content"]  # /retry answers it
        self.context_used = None if self.history else 0  # no tokenizer has seen it yet


def help_text() -> str:
    """All commands, one a line."""
    width = max(len(f"{command.name} {command.argument}") for command in COMMANDS)
    rows = [f"{f'{command.name} {command.argument}':<{width}}  {command.help}" for command in COMMANDS]
    return "\n".join([*rows, "a leading space sends a line that begins with /"])


def _sampling_text(sampling: Sampling) -> str:
    text = f"temperature {sampling.temperature:g}, top-p {sampling.top_p:g}, top-k {sampling.top_k}"
    return text + (f", repetition penalty {sampling.repetition_penalty:g}" if sampling.repetition_penalty != 1 else "")


def _shown(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
