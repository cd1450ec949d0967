"""C29: Open Assistant trees, nested, flat and linear, to conversations; made-up trees for each rule, and the real ones."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter

import pytest

from lumina_engine.data.conversation import DataError
from lumina_engine.data.formats import convert, detect_format, process_oasst_data, read_conversations
from lumina_engine.data.oasst import OasstOptions
from lumina_engine.data.tally import Tally

BELOW = "below a message that is left out"
NOT_BEST = "not on the best path"


def says(name, text="", replies=(), **more):
    """A message of a tree; prompter and assistant follow from where it hangs."""
    return {"message_id": name, "text": text or name, "replies": list(replies), **more}


def tree(root, state="ready_for_export", name=None):
    """The nested record of a tree, with roles and parents filled in."""

    def filled(node, parent, role):
        replies = [filled(r, node["message_id"], "assistant" if role == "prompter" else "prompter") for r in node["replies"]]
        return {"parent_id": parent, "role": role, **node, "replies": replies}

    return {"message_tree_id": name or root["message_id"], "tree_state": state, "prompt": filled(root, None, "prompter")}


def flat(*trees):
    """The same messages as flat rows, parents first."""
    rows = []

    def add(node, record):
        row = {key: value for key, value in node.items() if key != "replies"}
        rows.append({**row, "message_tree_id": record["message_tree_id"], "tree_state": record["tree_state"]})
        for reply in node["replies"]:
            add(reply, record)

    for record in trees:
        add(record["prompt"], record)
    return rows


def read(path, **options):
    """(conversations as texts joined by " ", tally)"""
    tally = Tally()
    found = read_conversations(path, tally=tally, oasst=OasstOptions(**options))
    return [" ".join(m.content for m in c.messages) for c in found], tally


RANKED = tree(says("q", replies=[says("b", rank=1), says("n"), says("a", rank=0, replies=[says("f", replies=[says("g")])])]))


@pytest.mark.parametrize(
    ("case", "record", "texts", "left_out", "dropped"),
    [
        ("smallest rank", RANKED, ["q a f g"], {NOT_BEST: 2}, {}),
        ("null rank last", tree(says("q", replies=[says("n"), says("b", rank=7)])), ["q b"], {NOT_BEST: 1}, {}),
        ("ties: file order", tree(says("q", replies=[says("b", rank=1), says("c", rank=1)])), ["q b"], {NOT_BEST: 1}, {}),
        (
            "deleted, with what hangs below",
            tree(says("q", replies=[says("a", rank=0, deleted=True, replies=[says("x")]), says("b", rank=1)])),
            ["q b"],
            {"deleted": 1, BELOW: 1},
            {},
        ),
        (
            "rejected",
            tree(says("q", replies=[says("a", rank=0, review_result=False), says("b", review_result=None)])),
            ["q b"],
            {"rejected in review": 1},
            {},
        ),
        ("empty", tree(says("q", replies=[says("a", " \n", rank=0), says("b", rank=1)])), ["q b"], {"empty": 1}, {}),
        ("unanswered end", tree(says("q", replies=[says("a", replies=[says("f")])])), ["q a"], {NOT_BEST: 1}, {}),
        ("no answer", tree(says("q")), [], {"its tree was dropped": 1}, {"no answer": 1}),
        (
            "deleted root",
            tree(says("q", deleted=True, replies=[says("a")])),
            [],
            {"its tree was dropped": 2},
            {"first message: deleted": 1},
        ),
        (
            "state",
            tree(says("q", replies=[says("a")]), "growing"),
            [],
            {"its tree was dropped": 2},
            {"tree state 'growing'": 1},
        ),
        ("no state", tree(says("q", replies=[says("a")]), None), ["q a"], {}, {}),
        (
            "same role as the parent",
            tree(says("q", replies=[says("x", role="prompter", replies=[says("y")]), says("a")])),
            ["q a"],
            {"same role as its parent": 1, BELOW: 1},
            {},
        ),
        (
            "begins with an answer",
            tree(says("q", role="assistant", replies=[says("a")])),
            [],
            {"its tree was dropped": 2},
            {"tree begins with an answer": 1},
        ),
    ],
)
def test_c029_rules(write, case, record, texts, left_out, dropped):
    """Nested and flat, in any order of the rows, they give the same."""
    nested, tally = read(write("t.jsonl", [record]))
    assert (nested, dict(tally.left_out), dict(tally.dropped)) == (texts, left_out, dropped)
    assert tally.read == len(texts) + tally.dropped.total()
    rows = flat(record)
    assert tally.used + tally.left_out.total() == len(rows)
    order = {row["message_id"]: n for n, row in enumerate(rows)}
    for seed in range(5):
        shuffled = sorted(rows, key=lambda row: (random.Random(f"{seed}{row['parent_id']}").random(), order[row["message_id"]]))
        assert read(write(f"f{seed}.jsonl", shuffled)) == (nested, tally)  # siblings keep their order, parents may come last


def test_c029_languages_ranks_reviews_and_states_by_option(write):
    record = tree(
        says(
            "q",
            lang="pt-BR",
            replies=[
                says("a", rank=0, lang="en"),
                says("b", rank=1, lang="PT", deleted=True),
                says("c", rank=2, lang="pt", synthetic=True, review_result=True),
                says("d", rank=3, lang="pt", review_result=False),
                says("e", lang="pt"),
            ],
        ),
        "growing",
    )
    path = write("t.jsonl", [record])
    every = {"tree_states": ("growing",)}
    assert read(path)[0] == []
    assert read(path, **every)[0] == ["q a"]
    assert read(path, **every, languages=("pt",))[0] == ["q c"]
    assert read(path, **every, languages=("pt",), deleted=True)[0] == ["q b"]
    assert read(path, **every, languages=("pt",), synthetic=False)[0] == ["q e"]
    assert read(path, **every, languages=("pt",), synthetic=False, rejected=True)[0] == ["q d"]
    assert read(path, **every, languages=("pt",), max_rank=1)[0] == ["q e"]  # an answer without a rank stays
    assert read(path, **every, languages=("de",))[1].dropped == {"first message: other language": 1}
    reviewed = tree(says("q", review_result=True, replies=[says("a", rank=0), says("b", rank=1, review_result=True)]))
    assert read(write("r.jsonl", [reviewed]), reviewed=True)[0] == ["q b"]


def test_c029_all_paths_each_once_and_of_one_id(write):
    record = tree(says("q", replies=[says("a", replies=[says("f"), says("g"), says("h", replies=[says("i")])]), says("b")]))
    texts, tally = read(write("t.jsonl", [record]), paths="all")
    assert texts == ["q a", "q a h i", "q b"]  # f and g leave the same path
    assert (tally.used, dict(tally.left_out)) == (5, {"without an answer": 2})
    found = list(read_conversations(write("u.jsonl", [record]), oasst=OasstOptions(paths="all")))
    assert {c.id for c in found} == {"q"}  # so that a split keeps a tree on one side


def test_c029_orphans_cycles_and_repeats_in_flat_files(write):
    rows = flat(tree(says("q", replies=[says("a", replies=[says("f", replies=[says("g")])])])))
    without = [row for row in rows if row["message_id"] != "f"]
    texts, tally = read(write("o.jsonl", without))
    assert (texts, dict(tally.left_out)) == (["q a"], {"its parent is missing": 1})
    loop = [*rows, {**rows[1], "message_id": "x", "parent_id": "y"}, {**rows[1], "message_id": "y", "parent_id": "x"}]
    assert dict(read(write("l.jsonl", loop))[1].left_out) == {"its parent is missing": 2}
    assert dict(read(write("r.jsonl", [*rows, rows[1]]))[1].left_out) == {"repeated message": 1}
    again = tree(says("q", replies=[says("a"), says("z")]))
    tally = Tally()
    paths = [write("one.jsonl", rows), write("two.jsonl", [again])]
    assert len(list(read_conversations(paths, tally=tally))) == 1 and tally.dropped == {"repeated tree": 1}


def test_c029_linear_threads_and_bare_trees(write):
    turns = [("prompter", "q"), ("assistant", "a"), ("prompter", "f")]
    linear = {"conversation_id": "c", "messages": [{"turn": n, "role": r, "content": t} for n, (r, t) in enumerate(turns, 1)]}
    thread = {"thread_id": "t", "thread": [{"message_id": t, "role": r, "text": t} for r, t in turns]}
    bare = tree(says("q", replies=[says("a")]))["prompt"]
    for record in (linear, thread, bare):
        assert read(write("x.jsonl", [record]))[0] == ["q a"]
    assert read(write("mixed.jsonl", [linear, {**thread, "thread_id": "u"}, bare]))[0] == ["q a"] * 3


def test_c029_a_conversation_id_alone_makes_no_tree(write, tmp_path):
    """Records of messages stay such: weights, task, system prompt and calls are kept, and an id may come again."""
    record = {
        "conversation_id": "c",
        "task": "chat",
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a", "weight": 0},
            {"role": "user", "content": "r"},
            {"role": "assistant", "content": "b"},
        ],
    }
    path = write("x.jsonl", [record, record])
    assert detect_format(path) == "messages"
    found = list(read_conversations(path))
    assert [(c.task, [m.role for m in c.messages], c.messages[2].weight) for c in found] == [
        ("chat", ["system", "user", "assistant", "user", "assistant"], 0.0)
    ] * 2
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    tools = {"conversation_id": "d", "messages": [{"role": "user", "content": "q"}, call]}
    convert(write("y.jsonl", [tools]), tmp_path / "o.jsonl")
    assert read(tmp_path / "o.jsonl")[0] == ['q {"name": "f", "arguments": {}}']


@pytest.mark.parametrize(
    ("of_record", "of_answer", "key"),
    [
        ({"weight": 0.5}, {}, "weight"),
        ({"task": "t"}, {}, "task"),
        ({}, {"weight": 0}, "weight"),
        ({}, {"tool_calls": [1]}, "tool_calls"),
    ],
)
def test_c029_what_a_linear_conversation_has_no_place_for_is_an_error(write, of_record, of_answer, key):
    turns = [{"role": "prompter", "content": "q"}, {"role": "assistant", "content": "a", **of_answer}]
    path = write("x.jsonl", [{"conversation_id": "c", "messages": turns, **of_record}])
    with pytest.raises(DataError, match=rf"x.jsonl:1: an OASST conversation has no '{key}', it would be lost"):
        read(path)
    turns[1] = {"role": "assistant", "content": "a", "tool_calls": None, "weight": None}  # columns of a table without a value
    assert read(write("y.jsonl", [{"conversation_id": "c", "messages": turns, "task": None}]))[0] == ["q a"]


def test_c029_a_deep_tree_is_no_matter(write):
    chain = flat(tree(says("m0", replies=[says("m1")])))
    for number in range(2, 20_000):
        role = "prompter" if number % 2 == 0 else "assistant"
        chain.append({**chain[-1], "message_id": f"m{number}", "parent_id": f"m{number - 1}", "role": role, "text": "x"})
    texts, tally = read(write("deep.jsonl", chain))
    assert len(texts) == 1 and tally.used == 20_000


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"message_id": 3, "role": "prompter", "text": "q"}, "message_id is 3, not text"),
        ({"message_id": "a", "role": "promter", "text": "q"}, "unknown role 'promter'; did you mean 'prompter'?"),
        ({"message_id": "a", "role": "prompter", "text": 5}, "the text of message 'a' is 5"),
        ({"message_id": "a", "role": "prompter", "text": "q", "rank": "0"}, "the rank of message 'a' is '0'"),
        ({"message_id": "a", "role": "prompter", "text": "q", "rank": 10**400}, "the rank of message 'a' is 1000"),
        ({"message_id": "a", "role": "prompter", "text": "q", "replies": "x"}, "the replies of message 'a' are 'x'"),
        ({"message_tree_id": "t", "prompt": {"text": "q"}}, "a message has no 'message_id'"),
        ({"conversation_id": "t", "messages": []}, "'messages' is list; write a list of messages"),
        ({"message_id": "a", "role": "prompter", "text": "\ud800", "replies": []}, "half of a character"),
    ],
)
def test_c029_malformed_records_name_the_place(write, record, text):
    good = tree(says("q", replies=[says("a")]))
    path = write("x.jsonl", [good, record])
    with pytest.raises(DataError) as caught:
        list(read_conversations(path, "oasst"))
    assert text in str(caught.value) and str(caught.value).startswith(f"{path}:2: ")
    errors: list[DataError] = []
    assert len(list(read_conversations(path, "oasst", on_error=errors.append))) == 1 and len(errors) == 1


# the real files

SHA = {
    40: "a69ce935e66ed15db1311eaac60ec1118394cfb82205e383253831205e105eae",
    100: "5c42089985495b6a7d01531e813cbda6e0bfa981dc0aeb1517c4a5bc6a9e17da",
}
TREES, FLAT = "oasst/oasst1_en_val_40trees.trees.jsonl", "oasst/oasst1_en_val_40trees.messages.jsonl"


def _ids(path, found):
    """The ids of the messages of `found`, in order: told by text within a tree."""
    names = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        todo = [record["prompt"]]
        while todo:
            node = todo.pop(0)
            names.setdefault((record["message_tree_id"], node["text"]), node["message_id"])
            todo += node.get("replies") or []
    return [names[c.id, m.content] for c in found for m in c.messages]


@pytest.mark.parametrize(("name", "count"), [("oasst/en_100_tree.jsonl", 100), (TREES, 40)])
def test_c029_best_paths_of_real_trees(shared, name, count):
    found = list(read_conversations(shared / name))
    assert len(found) == count
    assert Counter(len(c.messages) for c in found) == ({2: 58, 4: 42} if count == 100 else {2: 22, 4: 18})
    assert hashlib.sha256("\n".join(_ids(shared / name, found)).encode()).hexdigest() == SHA[count]


def test_c029_all_paths_of_real_trees(shared):
    for name, count in (("oasst/en_100_tree.jsonl", 564), (TREES, 216), (FLAT, 216)):
        assert len(read(shared / name, paths="all")[0]) == count


def test_c029_five_ways_in_give_the_same(shared):
    ways = [
        "messages/oasst1_en_val_top1.messages.jsonl",
        "sharegpt/oasst1_en_val_top1.sharegpt.json",
        "oasst/oasst1_en_val_top1.conversations.jsonl",
        TREES,
        FLAT,
    ]
    first, *others = [list(read_conversations(shared / name)) for name in ways]
    assert len(first) == 40 and all(other == first for other in others)


def test_c029_both_real_sets_together_drop_the_shared_trees(shared, tmp_path):
    done = convert([shared / "oasst/en_100_tree.jsonl", shared / FLAT], tmp_path / "o.jsonl")
    assert (done.written, done.tally.dropped) == (134, {"repeated tree": 6})
    assert done.tally.used + done.tally.left_out.total() == 1167 + 459
    rejects = [json.loads(line) for line in done.rejects.read_text().splitlines()]
    assert len(rejects) == 6 and all(r["reason"] == "repeated tree" and r["file"] and r["line"] for r in rejects)


def test_c029_the_public_name_returns_the_count(shared, tmp_path):
    import lumina_engine

    assert lumina_engine.process_oasst_data is process_oasst_data
    assert process_oasst_data(str(shared / FLAT), str(tmp_path / "o.jsonl")) == 40
    assert read(tmp_path / "o.jsonl")[0] == read(shared / TREES)[0]
