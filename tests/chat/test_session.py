"""The conversation itself: modes, commands, statistics, saved files, context (capabilities 5.1 to 5.5). No torch."""

from __future__ import annotations

import json
import stat
import threading
from datetime import datetime
from pathlib import Path

import pytest

from lumina_engine.chat.context import fit_prompt, recent
from lumina_engine.chat.events import Done, Start, Token
from lumina_engine.chat.modes import MODES, ChatError, Sampling, check_mode, overrides_of, sampling_for
from lumina_engine.chat.session import COMMANDS, ChatSession, Outcome
from tests.chat.fakes import FakeBackend, LetterTokenizer


class Clock:
    """Seconds that move only when told to."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


def make(backend: FakeBackend, tmp_path: Path, **options: object) -> ChatSession:
    return ChatSession(backend, chats_dir=tmp_path / "chats", now=lambda: datetime(2026, 8, 1, 12, 30, 5), **options)  # type: ignore[arg-type]


def say(session: ChatSession, text: str) -> str:
    events = list(session.send(text))
    assert isinstance(events[0], Start) and isinstance(events[-1], Done)
    return "".join(event.text for event in events if isinstance(event, Token)) + events[-1].tail


def do(session: ChatSession, line: str) -> Outcome:
    outcome = session.command(line)
    assert outcome is not None
    return outcome


# -- 5.1 modes


@pytest.mark.parametrize(
    ("mode", "numbers"),
    [("standard", (0.8, 0.9, 50)), ("creative", (1.0, 0.95, 100)), ("analytical", (0.3, 0.7, 20)), ("precise", (0.1, 0.5, 10))],
)
def test_c105_modes_have_their_numbers(mode: str, numbers: tuple[float, float, int]) -> None:
    sampling = MODES[mode]
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == numbers
    assert (sampling.repetition_penalty, sampling.max_new_tokens) == (1.0, 512)
    assert list(MODES) == ["standard", "creative", "analytical", "precise"]


def test_c104_overrides_win_over_the_mode() -> None:
    sampling = sampling_for("precise", {"temperature": 0, "top_k": None, "max_new_tokens": 7})
    assert sampling == Sampling(temperature=0, top_p=0.5, top_k=10, max_new_tokens=7)
    assert overrides_of("precise", sampling) == {"temperature": 0, "max_new_tokens": 7}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("top_k", 1.5),
        ("repetition_penalty", 0),
        ("max_new_tokens", 0),
        ("max_new_tokens", True),
    ],
)
def test_c104_settings_out_of_bounds_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ChatError, match=name) as error:
        sampling_for("standard", {name: value})
    assert error.value.exit_code == 2


def test_c105_unknown_mode_lists_the_modes() -> None:
    with pytest.raises(ChatError, match=r"did you mean precise\?\); modes: standard, creative, analytical, precise"):
        check_mode("precice")
    with pytest.raises(ChatError, match="unknown sampling setting 'heat'"):
        sampling_for("standard", {"heat": 1})


# -- sending


def test_c106_a_turn_goes_through_history_and_backend(backend: FakeBackend, tmp_path: Path) -> None:
    session = make(backend, tmp_path, system_prompt="Be brief.", mode="analytical", seed=7)
    assert say(session, "hello") == "answer 1 to hello"
    assert say(session, "again") == "answer 2 to again"
    messages, sampling, seed = backend.asked[1]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert messages[0]["content"] == "Be brief."
    assert sampling == MODES["analytical"] and seed == 7
    assert session.context_used == 40 + 4


def test_c104_max_history_counts_messages_without_the_system_prompt(backend: FakeBackend, tmp_path: Path) -> None:
    session = make(backend, tmp_path, system_prompt="s", max_history=4)
    for number in range(5):
        say(session, f"m{number}")
    sent = [message["content"] for message in backend.asked[-1][0]]
    assert sent == ["s", "m3", "answer 4 to m3", "m4"]  # 4 would begin with an answer: it goes
    assert len(session.history) == 10  # nothing is forgotten, only not sent
    assert recent(session.history, 20) == session.history
    with pytest.raises(ChatError, match="max-history"):
        make(backend, tmp_path, max_history=0)


def test_c104_without_a_seed_each_reply_draws_its_own_and_says_which(backend: FakeBackend, tmp_path: Path) -> None:
    session = make(backend, tmp_path)
    say(session, "a")
    say(session, "b")
    assert backend.asked[0][2] != backend.asked[1][2]
    assert session.last is not None and session.last.seed == backend.asked[1][2]


def test_c106_empty_message_and_second_message_during_a_reply_are_refused(backend: FakeBackend, tmp_path: Path) -> None:
    session = make(backend, tmp_path)
    with pytest.raises(ChatError, match="empty"):
        next(session.send("  \n"))
    stream = session.send("a")
    next(stream)
    with pytest.raises(ChatError, match="still being written"):
        next(session.send("b"))
    assert do(session, "/clear").ok is False and session.history
    stream.close()
    assert session.unsent == "a" and not session.busy


def test_c110_a_cancelled_reply_is_kept_as_far_as_it_came(backend: FakeBackend, tmp_path: Path) -> None:
    session = make(backend, tmp_path)
    events = []
    for event in session.send("hello"):
        events.append(event)
        if isinstance(event, Token) and event.text.startswith("1"):
            session.cancel()
    assert isinstance(events[-1], Done) and events[-1].reason == "cancelled"
    assert session.history[-1] == {"role": "assistant", "content": "answer 1 "}


def test_c110_a_failed_reply_keeps_the_conversation_and_the_message(backend: FakeBackend, tmp_path: Path) -> None:
    session = make(backend, tmp_path)
    say(session, "one")
    backend.fail, backend.fail_after = ChatError("server gone: start it again"), 2
    with pytest.raises(ChatError, match="server gone"):
        say(session, "two")
    assert [message["content"] for message in session.history] == ["one", "answer 1 to one"]
    assert session.unsent == "two" and session.can_retry
    backend.fail = None
    list(session.retry())
    assert [message["content"] for message in session.history][2:] == ["two", "answer 3 to two"]


# -- 5.2 commands


def test_c106_help_names_every_command(backend: FakeBackend, tmp_path: Path) -> None:
    text = do(make(backend, tmp_path), "/help").text
    for name in ("/help", "/quit", "/exit", "/clear", "/stats", "/mode", "/system", "/save", "/retry", "/load"):
        assert name in text
    assert {command.name for command in COMMANDS} == {line.split()[0] for line in text.splitlines() if line.startswith("/")}


def test_c106_quit_and_exit(backend: FakeBackend, tmp_path: Path) -> None:
    session = make(backend, tmp_path)
    assert do(session, "/quit").action == do(session, " /exit".strip()).action == "quit"


def test_c106_clear_forgets_the_conversation_not_the_system_prompt(backend: FakeBackend, tmp_path: Path) -> None:
    session = make(backend, tmp_path, system_prompt="s")
    say(session, "a")
    assert do(session, "/clear").action == "clear"
    assert session.history == [] and session.system_prompt == "s" and session.context_used == 0
    assert session.statistics()["messages_sent"] == 1


def test_c106_mode_changes_shows_and_refuses(backend: FakeBackend, tmp_path: Path) -> None:
    session = make(backend, tmp_path)
    assert do(session, "/mode CREATIVE").ok and session.mode == "creative"
    assert "creative" in do(session, "/mode").text
    wrong = do(session, "/mode nice")
    assert not wrong.ok and "standard, creative, analytical, precise" in wrong.text and session.mode == "creative"
    say(session, "x")
    assert backend.asked[-1][1] == MODES["creative"]


def test_c106_system_sets_and_shows(backend: FakeBackend, tmp_path: Path) -> None:
    session = make(backend, tmp_path)
    assert do(session, "/system").text == "no system prompt is set"
    assert do(session, "/system  Answer in capitals. ").ok
    assert session.system_prompt == "Answer in capitals."
    assert do(session, "/system").text == "system prompt: Answer in capitals."
    assert session.system_prompt == "Answer in capitals."


def test_c106_unknown_command_lists_the_valid_ones_and_changes_nothing(backend: FakeBackend, tmp_path: Path) -> None:
    session = make(backend, tmp_path)
    outcome = do(session, "/sytem be nice")
    assert not outcome.ok and "did you mean /system?" in outcome.text and "/load" in outcome.text
    assert session.system_prompt is None and session.history == []
    assert session.command("hello") is None and session.command(" /path is text") is None


def test_c106_retry_replaces_the_last_reply_with_other_random_numbers(backend: FakeBackend, tmp_path: Path) -> None:
    session = make(backend, tmp_path, seed=7)
    assert do(session, "/retry").ok is False
    say(session, "a")
    assert do(session, "/retry").action == "retry"
    list(session.retry())
    list(session.retry())
    assert [message["content"] for message in session.history] == ["a", "answer 3 to a"]
    assert [seed for _, _, seed in backend.asked] == [7, 8, 9]
    assert session.statistics()["messages_sent"] == 1
    say(session, "b")
    assert backend.asked[-1][2] == 7


def test_c106_a_retry_that_fails_leaves_the_first_answer(backend: FakeBackend, tmp_path: Path) -> None:
    session = make(backend, tmp_path)
    say(session, "a")
    backend.fail = ChatError("gone")
    with pytest.raises(ChatError):
        list(session.retry())
    assert [message["content"] for message in session.history] == ["a", "answer 1 to a"]
    assert session.unsent is None


# -- 5.3 statistics


def test_c107_statistics_have_their_keys_and_count(backend: FakeBackend, tmp_path: Path) -> None:
    clock = Clock()
    session = make(backend, tmp_path, clock=clock)
    empty = session.statistics()
    assert list(empty) == [
        "messages_sent",
        "tokens_generated",
        "avg_response_time",
        "session_duration",
        "current_mode",
        "tokens_per_s",
        "first_token_ms",
    ]
    assert empty["messages_sent"] == 0 and empty["avg_response_time"] == 0.0
    assert empty["tokens_per_s"] is None and empty["first_token_ms"] is None
    for text, seconds in (("a", 2.0), ("b", 4.0)):
        for event in session.send(text):
            if isinstance(event, Start):
                clock.seconds += seconds
    clock.seconds += 3600
    assert session.statistics() == {
        "messages_sent": 2,
        "tokens_generated": 8,
        "avg_response_time": 3.0,
        "session_duration": "01:00:06",
        "current_mode": "standard",
        "tokens_per_s": 8 / 6,
        "first_token_ms": 250.0,
    }
    assert "session_duration: 01:00:06" in do(session, "/stats").text


# -- 5.4 saved JSON


def test_c108_saved_file_has_its_keys_mode_and_default_name(backend: FakeBackend, tmp_path: Path) -> None:
    session = make(backend, tmp_path, system_prompt="s", mode="precise", overrides={"top_k": 3})
    say(session, "hällo \x1b[2J")
    outcome = do(session, "/save")
    path = tmp_path / "chats" / "chat_20260801_123005.json"
    assert outcome.text == f"saved to {path}"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    content = json.loads(path.read_text("utf-8"))
    assert content["name"] == "chat_20260801_123005"
    assert content["conversation"] == session.history
    assert content["mode"] == "precise" and content["system_prompt"] == "s"
    assert content["checkpoint"] == {"path": backend.info.path, "step": 100, "digest": "aa"}
    assert content["sampling"]["top_k"] == 3
    assert content["statistics"]["messages_sent"] == 1
    assert list(path.parent.iterdir()) == [path]  # no temporary file is left


def test_c108_a_saved_file_loads_again_and_continues(backend: FakeBackend, tmp_path: Path) -> None:
    session = make(backend, tmp_path, system_prompt="s", mode="precise", overrides={"top_k": 3})
    say(session, "a")
    path = session.save("talk")
    other = make(FakeBackend(digest="bb"), tmp_path)
    outcome = do(other, f"/load {path}")
    assert outcome.ok and outcome.action == "load" and "another checkpoint (step 100)" in outcome.text
    assert other.history == session.history and other.system_prompt == "s"
    assert other.sampling == session.sampling and other.mode == "precise"
    say(other, "b")
    assert len(other.history) == 4
    assert other.save() == path  # the same conversation goes on in its file
    assert len(json.loads(path.read_text("utf-8"))["conversation"]) == 4


def test_c108_saving_never_overwrites_another_conversation(backend: FakeBackend, tmp_path: Path) -> None:
    first = make(backend, tmp_path)
    say(first, "a")
    assert do(first, "/save talk").ok
    assert do(first, "/save talk").ok  # its own file
    second = make(backend, tmp_path)
    assert "exists already" in do(second, "/save talk").text
    assert first.save("other").name == "other.json"
    made = {make(backend, tmp_path).save().name for _ in range(2)}
    assert made == {"chat_20260801_123005.json", "chat_20260801_123005_2.json"}


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "x" * 65, "a b", "a.json", "-"])
def test_c108_a_name_is_one_plain_file_name(backend: FakeBackend, tmp_path: Path, name: str) -> None:
    outcome = do(make(backend, tmp_path), f"/save {name}")
    assert not outcome.ok and "letters, digits" in outcome.text
    assert not (tmp_path / "chats").exists()


def test_c108_an_unanswered_message_is_saved_too(backend: FakeBackend, tmp_path: Path) -> None:
    session = make(backend, tmp_path)
    backend.fail = ChatError("gone")
    with pytest.raises(ChatError):
        say(session, "important")
    path = session.save("lost")
    other = make(FakeBackend(), tmp_path)
    assert do(other, f"/load {path}").ok
    assert other.unsent == "important" and other.can_retry and other.history == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("nonsense", "no JSON"),
        ("[]", "not a JSON object"),
        ("{}", "conversation: a list"),
        ('{"conversation": [{"role": "robot", "content": "x"}]}', r"conversation\[0\]"),
        ('{"conversation": [{"role": "user", "content": 3}]}', r"conversation\[0\]"),
        ('{"conversation": [], "mode": "wild"}', "mode"),
        ('{"conversation": [], "sampling": {"top_p": 9}}', "top_p"),
        ('{"conversation": [], "sampling": {"heat": 9}}', "sampling"),
        ('{"conversation": [], "system_prompt": 1}', "system_prompt"),
        ('{"conversation": [], "seed": -1}', "seed"),
        ('{"conversation": [], "second": []}', "second"),
        ('{"conversation": [], "second": {"conversation": [], "second": {}}}', "second"),
        ('{"conversation": [], "second": {"conversation": 7}}', "conversation"),
        ('{"conversation": [], "versions": [{"turn": 0, "replies": [{"text": "x"}]}]}', "turn 0 is no answer"),
        (
            '{"conversation": [{"role": "assistant", "content": "a"}], "versions": [{"turn": 0, "replies": []}]}',
            "turn 0 is not",
        ),
        ('{"conversation": [{"role": "assistant", "content": "a"}], "versions": [{"turn": 0, "replies": [{}]}]}', "versions"),
        ('{"conversation": [], "versions": 5}', "versions"),
        ("[" * 100_000, "no JSON"),
    ],
)
def test_c108_a_file_that_is_no_conversation_is_refused_and_changes_nothing(
    backend: FakeBackend, tmp_path: Path, content: str, reason: str
) -> None:
    session = make(backend, tmp_path, system_prompt="s")
    say(session, "a")
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(ChatError, match=reason):
        session.load(tmp_path / "bad.json")
    assert "\n" not in do(session, f"/load {tmp_path / 'bad.json'}").text
    assert len(session.history) == 2 and session.system_prompt == "s"
    assert "No such file" in do(session, "/load missing.json").text and "needs the path" in do(session, "/load").text


# -- versions of an answer, and a second checkpoint


def test_c106_retry_keeps_the_answer_before_as_a_version(backend: FakeBackend, tmp_path: Path) -> None:
    session = make(backend, tmp_path, seed=7)
    assert session.version == (0, 0)
    say(session, "a")
    list(session.retry())
    list(session.retry(seed=99))
    assert session.version == (3, 3) and [seed for _, _, seed in backend.asked] == [7, 8, 99]
    assert session.choose_version(-2) and session.version == (1, 3) and not session.choose_version(-1)
    assert session.history[-1]["content"] == "answer 1 to a" and session.context_used is None
    list(session.retry())
    assert session.version == (4, 4) and backend.asked[-1][2] == 10  # never the numbers of another version
    assert session.choose_version(-3)
    say(session, "b")
    assert backend.asked[-1][0][1]["content"] == "answer 1 to a"
    assert session.version == (1, 1) and not session.choose_version(1)


def test_c108_versions_are_saved_and_come_back(backend: FakeBackend, tmp_path: Path) -> None:
    session = make(backend, tmp_path, seed=7)
    say(session, "a")
    list(session.retry())
    session.choose_version(-1)
    path = session.save("talk")
    content = json.loads(path.read_text())
    assert content["conversation"][1] == {"role": "assistant", "content": "answer 1 to a"}
    [entry] = content["versions"]
    assert (
        entry["turn"] == 1
        and entry["chosen"] == 0
        and [reply["text"] for reply in entry["replies"]]
        == [
            "answer 1 to a",
            "answer 2 to a",
        ]
    )
    assert entry["replies"][1] == {
        "text": "answer 2 to a",
        "source": "x step-000100",
        "reason": "stop",
        "tokens": 4,
        "seconds": 0.5,
        "first_token_s": 0.25,
        "seed": 8,
    }
    other = make(FakeBackend(), tmp_path)
    other.load(path)
    assert other.version == (1, 2) and other.seed == 7 and other.choose_version(1)
    assert other.versions[1].replies[1].done is not None
    list(other.retry())
    assert other.version == (3, 3)
    old = dict(content)
    del old["versions"], old["seed"]  # a file of before there were versions
    (tmp_path / "old.json").write_text(json.dumps(old))
    third = make(FakeBackend(), tmp_path)
    third.load(tmp_path / "old.json")
    list(third.retry())
    assert third.version == (2, 2) and third.choose_version(-1) and third.history[-1]["content"] == "answer 1 to a"


def test_c136_a_second_checkpoint_is_saved_with_the_first_and_never_lost(backend: FakeBackend, tmp_path: Path) -> None:
    left, right = make(backend, tmp_path), make(FakeBackend("bb", 200), tmp_path)
    left.second = right
    say(left, "a")
    say(right, "a")
    path = left.save("talk")
    content = json.loads(path.read_text())
    assert content["second"]["checkpoint"]["step"] == 200 and len(content["second"]["conversation"]) == 2
    alone = make(FakeBackend(), tmp_path)  # a front end that shows one checkpoint only
    assert alone.load(path).second is not None
    say(alone, "b")
    alone.save()
    kept = json.loads(path.read_text())
    assert kept["second"] == content["second"] and len(kept["conversation"]) == 4
    assert "the other checkpoint" in alone.export_markdown().read_text()
    alone.clear()
    say(alone, "c")
    assert "second" not in json.loads(alone.save("new").read_text())


def test_c136_two_replies_that_end_together_are_saved_in_one_file(backend: FakeBackend, tmp_path: Path) -> None:
    session = make(backend, tmp_path)
    say(session, "a")
    threads = [threading.Thread(target=session.save) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.name for path in (tmp_path / "chats").iterdir()] == ["chat_20260801_123005.json"]


# -- 5.5 context


def talk(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    head = [{"role": "system", "content": system}] if system is not None else []
    return head + [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]


def test_c110_the_oldest_pairs_go_and_the_system_prompt_stays() -> None:
    messages = talk("a" * 20, "b" * 20, "c" * 20, "d" * 20, "e" * 20, system="s" * 6)
    whole = fit_prompt(LetterTokenizer(), messages, 1000, 512)
    assert whole.dropped == 0 and whole.room == 512
    tight = fit_prompt(LetterTokenizer(), messages, 120, 20)
    kept = LetterTokenizer().encode_conversation(messages[:1] + messages[3:], add_generation_prompt=True)
    assert tight.ids == kept and tight.dropped == 2 and tight.room == 20
    last = fit_prompt(LetterTokenizer(), messages, 50, 512)
    assert last.dropped == 4 and last.room == 50 - len(last.ids) == 14


def test_c110_fitting_equals_dropping_one_pair_after_the_other() -> None:
    tokenizer = LetterTokenizer()
    messages = talk(*("x" * (5 + 7 * number % 23) for number in range(31)), system="sys")
    for limit in range(40, 700, 13):
        kept = list(messages)
        reserve = min(64, limit // 4)
        while len(tokenizer.encode_conversation(kept, True)) + reserve > limit and len(kept) > 2:
            kept = [kept[0], *kept[3:]]
        prompt = fit_prompt(tokenizer, messages, limit, 64)
        assert prompt.ids == tokenizer.encode_conversation(kept, True)
        assert prompt.dropped == len(messages) - len(kept)


def test_c110_a_message_that_fits_not_even_alone_is_refused_with_the_numbers() -> None:
    with pytest.raises(ChatError, match=r"the last message needs 306 tokens, but the model's context holds 256: shorten it"):
        fit_prompt(LetterTokenizer(), talk("x" * 300), 256, 64)
    with pytest.raises(ChatError, match="the system prompt and the last message"):
        fit_prompt(LetterTokenizer(), talk("x" * 100, system="s" * 200), 256, 64)


def test_c110_the_reply_says_what_was_left_out() -> None:
    assert Start(prompt_tokens=1, context_limit=256).notice() is None
    notice = Start(prompt_tokens=1, context_limit=2048, dropped=4).notice()
    assert notice == "the oldest 4 messages were left out: the context holds 2,048 tokens"
