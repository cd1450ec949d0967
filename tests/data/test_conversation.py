"""C27: the strict reader of the messages layout."""

from __future__ import annotations

import pytest

from lumina_engine.data.conversation import Conversation, DataError, Message, parse_conversation

U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
S, T = {"role": "system", "content": "s"}, {"role": "tool", "content": "t"}


def m(*messages, **more):
    return {"messages": list(messages), **more}


BROKEN = [
    (None, "the record is None, not an object"),
    ([], "the record is list, not an object"),
    ("text", "the record is 'text', not an object"),
    (7, "the record is 7, not an object"),
    ({}, "the record has no 'messages'"),
    ({"message": [U, A]}, "rename 'message' to 'messages'"),
    ({"conversations": [U, A]}, "or name its format"),
    ({"messages": None}, "'messages' is None, not a list"),
    ({"messages": "hello"}, "'messages' is 'hello', not a list"),
    ({"messages": {"role": "user"}}, "'messages' is dict, not a list"),
    ({"messages": []}, "'messages' is empty"),
    (m(U), "no assistant message"),
    (m(S, U), "no assistant message"),
    (m(S), "no assistant message"),
    (m(U, A, U), "the last message is a user message without an answer"),
    (m(U, A, T), "the last message is a tool message without an answer"),
    (m(U, U, A), "messages 1 and 2 are both user messages; join them"),
    (m(U, A, A), "messages 2 and 3 are both assistant messages"),
    (m(U, A, S, U, A), "message 3 is a system message; only the first"),
    (m(S, S, U, A), "message 2 is a system message"),
    (m(T, A), "message 1 is a tool message after no message"),
    (m(U, T, A), "message 2 is a tool message after a user message"),
    (m(S, T, A), "message 2 is a tool message after a system message"),
    (m(U, A, T, U, A), "message 4 is a user message after a tool message"),
    (m("q", A), "message 1 is 'q', not an object"),
    (m(U, None), "message 2 is None, not an object"),
    (m(U, [A]), "message 2 is list, not an object"),
    (m({"content": "q"}, A), "message 1 has no 'role'; add 'role'"),
    (m({"Role": "user", "content": "q"}, A), "rename 'Role' to 'role'"),
    (m({"role": "user"}, A), "message 1 has no 'content'"),
    (m({"role": "user", "contents": "q"}, A), "rename 'contents' to 'content'"),
    (m({"from": "human", "value": "q"}, A), "converted by `lumina-engine data convert`"),
    (m({"role": "human", "content": "q"}, A), "unknown role 'human'; did you mean 'user'?"),
    (m({"role": "User", "content": "q"}, A), "unknown role 'User'; did you mean 'user'?"),
    (m(U, {"role": "gpt", "content": "a"}), "did you mean 'assistant'?"),
    (m(U, {"role": "asistant", "content": "a"}), "unknown role 'asistant'; did you mean 'assistant'?"),
    (m({"role": "developer", "content": "s"}, U, A), "did you mean 'system'?"),
    (m(U, A, {"role": "function", "content": "t"}, A), "did you mean 'tool'?"),
    (m({"role": "", "content": "q"}, A), "unknown role ''; roles are system, user, assistant, tool"),
    (m({"role": None, "content": "q"}, A), "unknown role None"),
    (m({"role": 1, "content": "q"}, A), "unknown role 1"),
    (m({"role": ["user"], "content": "q"}, A), "unknown role list"),
    (m({"role": "user", "content": ""}, A), "message 1 (user) is empty"),
    (m(U, {"role": "assistant", "content": ""}), "message 2 (assistant) is empty"),
    (m(U, {"role": "assistant", "content": " \n\t"}), "message 2 (assistant) is empty"),
    (m({"role": "system", "content": ""}, U, A), "message 1 (system) is empty"),
    (m({"role": "user", "content": []}, A), "message 1 (user) is empty"),
    (m(U, {"role": "assistant", "content": None}), "the content of message 2 is null, not text"),
    (m({"role": "user", "content": 5}, A), "the content of message 1 is 5, not text"),
    (m({"role": "user", "content": {"text": "q"}}, A), "the content of message 1 is dict, not text"),
    (
        m({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, A),
        "part 1 of the content of message 1 is not text",
    ),
    (m({"role": "user", "content": ["q", 1]}, A), "part 2 of the content of message 1 is not text: 1"),
    (m({"role": "user", "content": "\ud83d"}, A), "message 1 holds half of a character"),
    (m(U, {"role": "assistant", "content": None, "tool_calls": [{}]}), "message 2 calls a tool by a structure"),
    (m(U, {**A, "weight": "1"}), "weight of message 2 is '1'"),
    (m(U, {**A, "weight": -1}), "weight of message 2 is -1"),
    (m(U, {**A, "weight": 11}), "use a number from 0 to 10"),
    (m(U, {**A, "weight": float("nan")}), "weight of message 2 is nan"),
    (m(U, {**A, "weight": True}), "weight of message 2 is True"),
    (m({**U, "weight": 1}, A), "message 1 (user) has a weight"),
    (m(U, {**A, "weight": 0}), "every assistant message has weight 0"),
    (m(U, A, weight=0), "every assistant message has weight 0"),
    (m(U, A, weight=[1]), "weight of the record is list"),
    (m(U, A, id=1.5), "id is 1.5"),
    (m(U, A, id=""), "id is ''"),
    (m(U, A, id=True), "id is True"),
    (m(U, A, task=3), "task is 3"),
]


def test_c027_there_are_sixty_broken_records():
    assert len(BROKEN) >= 60


@pytest.mark.parametrize(("record", "text"), BROKEN, ids=range(len(BROKEN)))
def test_c027_broken_records_name_line_cause_and_fix(record, text):
    with pytest.raises(DataError) as caught:
        parse_conversation(record, "d.jsonl", 12)
    error = caught.value
    assert str(error).startswith("d.jsonl:12: ") and text in str(error)
    assert "\n" not in str(error) and len(str(error)) < 250
    assert error.fix and error.reason and (error.path, error.line) == ("d.jsonl", 12)


@pytest.mark.parametrize(
    "record",
    [
        m(U, A),
        m(S, U, A),
        m(S, A),
        m(A, U, A),
        m(U, A, T, A),
        m(U, A, T, T, A, U, A),
        m(U, A, {"role": "tool", "content": ""}, A),
        m(U, {**A, "weight": 0}, U, A),
        m({**U, "name": "ann"}, {**A, "weight": None}, source="here", weight=None, task=None, id=None),
    ],
)
def test_c027_good_records_are_kept_as_they_are(record):
    conversation = parse_conversation(record)
    assert [(x.role, x.content) for x in conversation.messages] == [(x["role"], x["content"]) for x in record["messages"]]


def test_c027_parts_are_joined_and_labels_read():
    record = m({"role": "user", "content": [{"type": "text", "text": "a "}, "b"]}, A, id=7, task="code")
    assert parse_conversation(record) == Conversation((Message("user", "a b"), Message("assistant", "a")), "7", "code")


def test_c027_record_weight_goes_to_answers_without_their_own():
    conversation = parse_conversation(m(U, {**A, "weight": 2}, U, A, weight=0.5))
    assert [x.weight for x in conversation.messages] == [None, 2.0, None, 0.5]


def test_c027_text_is_never_changed():
    text = "  <|im_end|>\r\n\x00 \u2028 \ufeff é "
    assert parse_conversation(m({"role": "user", "content": text}, A)).messages[0].content == text


def test_c027_to_record_reads_back():
    conversation = parse_conversation(m(S, U, {**A, "weight": 0.5}, id="x", task="t"))
    assert parse_conversation(conversation.to_record()) == conversation


def test_digest_depends_on_borders_not_on_id():
    one = Conversation((Message("user", "ab"), Message("assistant", "c")))
    other = Conversation((Message("user", "a"), Message("assistant", "bc")))
    assert one.digest() != other.digest()
    assert Conversation(one.messages, "id").digest() == one.digest()
