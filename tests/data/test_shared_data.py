"""The equalities of the shared data: one set of conversations in several layouts. No message text is printed here."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from lumina_engine.data.batch import ConversationDataset, TrainLoader
from lumina_engine.data.formats import convert, read_conversations
from lumina_engine.data.rows import RowOptions, RowPlan
from lumina_engine.data.store import open_data, open_train
from lumina_engine.data.tally import Tally

SHAREGPT = "sharegpt/oasst1_en_val_top1.sharegpt.json"
MESSAGES = "messages/oasst1_en_val_top1.messages.jsonl"

# user tokens, assistant tokens, longest content, SHA-256 of all content ids as uint32 little endian (shared README 3.1)
CONTENT = {
    "gpt-4": (3098, 11272, 2042, "b3d788505c26985ea965d2b2c9d252be828ccaa631df455828955a7d7ea94cd4"),
    "gpt-4o": (3090, 11168, 2038, "4b9a22124a51c86f11b8f71f04305b360e5b96eb945810204f458deb3f242d62"),
}


@pytest.fixture(scope="module", params=["gpt-4", "gpt-4o"])
def real(request):
    from lumina_engine.data.tokenizer import ConversationTokenizer

    return ConversationTokenizer(request.param)


@pytest.fixture(scope="module")
def gpt4():
    from lumina_engine.data.tokenizer import ConversationTokenizer

    return ConversationTokenizer("gpt-4")


def test_c028_conversations_are_the_forty(shared):
    one, other = list(read_conversations(shared / SHAREGPT)), list(read_conversations(shared / MESSAGES))
    assert one == other and len(one) == 40 and len({c.id for c in one}) == 40
    assert sum(len(c.messages) for c in one) == 116
    lines = (shared / "oasst/oasst1_en_val_40trees.trees.jsonl").read_text().splitlines()
    import json

    assert [c.id for c in one] == [json.loads(line)["message_tree_id"] for line in lines]


def test_r09_content_ids_and_counts(shared, real):
    user, assistant, longest, digest = CONTENT[real.name]
    counts = {"user": 0, "assistant": 0}
    state = hashlib.sha256()
    lengths = []
    for conversation in read_conversations(shared / MESSAGES):
        encoded = [(m.role, real.encode(m.content)) for m in conversation.messages]
        for role, ids in encoded:
            counts[role] += len(ids)
            state.update(np.array(ids, dtype="<u4").tobytes())
        lengths.append(sum(len(ids) for _, ids in encoded))
    assert (counts["user"], counts["assistant"], max(lengths)) == (user, assistant, longest)
    assert state.hexdigest() == digest


def test_shown_by_8_same_ids_and_masks_from_both_layouts(shared, real, settings, tmp_path):
    """Directly and after conversion: the same stores, so the same rows."""
    paths = [shared / SHAREGPT, shared / MESSAGES]
    for number, path in enumerate(paths[:2]):
        done = convert(path, tmp_path / f"{number}.jsonl")
        assert (done.tally.read, done.written, done.tally.dropped, done.tally.changed) == (40, 40, {}, {})
        paths.append(tmp_path / f"{number}.jsonl")
    stores = [open_data(settings(train_data_path=str(path), seq_length=4096), real).train for path in paths]
    first = stores[0]
    for other in stores[1:]:
        assert np.array_equal(first.tokens, other.tokens)
        assert np.array_equal(first.mask, other.mask)
        assert np.array_equal(first.offsets, other.offsets)
        assert first.fingerprint == other.fingerprint
    assert len(first) == 40 and first.num_trained == CONTENT[real.name][1] + 58
    steps = [list(TrainLoader(store, settings(seq_length=4096))) for store in stores[:2]]
    for one, other in zip(*steps, strict=True):
        assert all(
            torch.equal(a.input_ids_BS, b.input_ids_BS) and torch.equal(a.labels_BS, b.labels_BS)
            for a, b in zip(one, other, strict=True)
        )


def test_c032_masked_ids_are_the_answers_and_their_end(shared, real, settings, tmp_path):
    config = settings(seq_length=4096, packing="none", data_cache_dir=str(tmp_path))
    dataset = ConversationDataset(data_path=str(shared / SHAREGPT), tokenizer=real, config=config)
    conversations = list(read_conversations(shared / SHAREGPT))
    assert len(dataset) == 40
    for index, conversation in enumerate(conversations):
        labels = dataset[index]["labels"]
        expected = []
        for message in conversation.messages:
            if message.role == "assistant":
                expected += [*real.encode(message.content), real.im_end_id]
        assert labels[labels >= 0].tolist() == expected


def test_r08_truncation_shows_at_2048(shared, gpt4, settings):
    data = open_data(settings(train_data_path=str(shared / MESSAGES), seq_length=2048), gpt4)
    assert any("1 of 40 conversations are longer than seq_length 2,048" in note for note in data.notes)


@pytest.mark.parametrize("folder", ["alpaca", "messages", "oasst", "sharegpt", "text", "text/code"])
def test_c035_packing_takes_the_fewest_rows(shared, gpt4, settings, folder):
    """At 2048. What is below 97 % then is so small that its last row, which nothing can fill, is a share of it."""
    for file in sorted(path for path in (shared / folder).iterdir() if path.is_file()):
        store, _ = open_train(str(file), gpt4, settings(seq_length=2048))
        plan = RowPlan(store, RowOptions(2048, "fit"))
        kept = int(plan.samples.lengths.sum())
        assert kept + plan.samples.lost_tokens == store.num_tokens
        assert plan.num_rows == -(-kept // 2048), file.name
        assert kept / (plan.num_rows * 2048) >= 0.97 or kept > (plan.num_rows - 1) * 2048


@pytest.mark.parametrize(
    ("name", "kept", "changed"),
    [
        ("alpaca/instruction-data.json", 1100, {}),
        ("alpaca/identity.json", 91, {}),
        ("alpaca/seed_tasks.jsonl", 175, {}),
        ("sharegpt/dummy_conversation.json", 500, {}),
        ("sharegpt/glaive_toolcall_en_demo.json", 300, {}),
        ("sharegpt/axolotl_conversation.json", 1, {}),
        ("sharegpt/axolotl_conversation.missingturns.json", 1, {"exchange with an empty turn removed": 1}),
        ("messages/toy_chat_fine_tuning.jsonl", 5, {}),
        ("text/c4_demo.jsonl", 300, {}),
    ],
)
def test_c028_every_file_is_read_in_full(shared, name, kept, changed):
    tally = Tally()
    documents = list(read_conversations(shared / name, tally=tally))
    assert (len(documents), tally.read, dict(tally.dropped), dict(tally.changed)) == (kept, kept, {}, changed)
    assert all(m.content.strip() for d in documents for m in getattr(d, "messages", ()) if m.role == "assistant")


# Every file of the folder but the vocabularies and the model: conversations (of text: documents of at most 32,768 characters).
# The rows of the folder's own table, but for trees, which become one conversation each.
TABLE = {
    "alpaca/identity.json": 91,
    "alpaca/instruction-data.json": 1100,
    "alpaca/seed_tasks.jsonl": 175,
    "messages/oasst1_en_val_top1.messages.jsonl": 40,
    "messages/toy_chat_fine_tuning.jsonl": 5,
    "oasst/en_100_tree.jsonl": 100,
    "oasst/oasst1_en_val_40trees.messages.jsonl": 40,
    "oasst/oasst1_en_val_40trees.trees.jsonl": 40,
    "oasst/oasst1_en_val_top1.conversations.jsonl": 40,
    "sharegpt/axolotl_conversation.json": 1,
    "sharegpt/axolotl_conversation.missingturns.json": 1,
    "sharegpt/dummy_conversation.json": 500,
    "sharegpt/glaive_toolcall_en_demo.json": 300,
    "sharegpt/oasst1_en_val_top1.sharegpt.json": 40,
    "text/c4_demo.jsonl": 300,
    "text/code/export.py": None,
    "text/code/model.py": None,
    "text/code/run.c": None,
    "text/code/tinystories.py": None,
    "text/devils_dictionary.txt": None,
    "text/jargon-4.4.7.txt": None,
    "text/the-verdict.txt": None,
    "text/tinyshakespeare.txt": None,
    "text/udhr_20langs.txt": None,
}


def test_shown_by_1_every_file_converts_with_the_counts_of_its_table(shared, tmp_path):
    folders = ("alpaca", "messages", "oasst", "sharegpt", "text")
    assert {str(p.relative_to(shared)) for f in folders for p in (shared / f).rglob("*") if p.is_file()} == set(TABLE)
    for name, rows in TABLE.items():
        done = convert(shared / name, tmp_path / "out.jsonl")
        written = list(read_conversations(tmp_path / "out.jsonl"))
        assert done.written == len(written) and done.tally.dropped == {} and done.rejects is None, name
        if rows is None:
            assert "".join(d.text for d in written) == (shared / name).read_text(encoding="utf-8"), name
            assert len(written) == done.tally.read and max(len(d.text) for d in written) <= 1 << 15
        else:
            assert done.written == done.tally.read == rows, name


def test_c028_placeholders_are_plain_text(shared):
    texts = [m.content for d in read_conversations(shared / "alpaca/identity.json") for m in d.messages]
    assert sum("{{name}}" in t for t in texts) > 0 and sum("{{author}}" in t for t in texts) > 0


def test_c028_plain_text_loses_nothing(shared):
    for name in ("tinyshakespeare.txt", "udhr_20langs.txt", "the-verdict.txt"):
        path = shared / "text" / name
        assert "".join(d.text for d in read_conversations(path)) == path.read_text(encoding="utf-8")
