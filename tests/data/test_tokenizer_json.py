"""A `tokenizer.json`: the ids of its own library, every text comes back, what cannot be is refused by its cause."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lumina_engine.data import sample
from lumina_engine.data.tokenizer import ConversationTokenizer, StreamDecoder, TokenizerError
from lumina_engine.data.tokenizer_json import JsonEncoding, Unusable

tokenizers = pytest.importorskip("tokenizers")

LLAMA_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_pad|>"]
LLAMA = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{n}|>" for n in range(5)), "<|eot_id|>"]
CHAT = [{"role": "user", "content": "2 + 3? <|im_end|>"}, {"role": "assistant", "content": "It's 5."}]


def corpus() -> Iterator[str]:
    for number, conversation in enumerate(sample.conversations("train")):
        if number == 300:
            return
        yield from (message.content for message in conversation.messages)


def trained(specials: list[str], split: bool = True, nfc: bool = False, more: list[Any] | None = None) -> Any:
    """A byte-level BPE of 600 ids, as Llama 3 or Qwen (split by an expression) or GPT-2 (by the library's own) is built."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    made = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split)
    made.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA_PATTERN), "isolated"), level]) if split else level
    )
    made.normalizer = normalizers.NFC() if nfc else None
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False))
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    made.add_tokens(more or [])
    if specials:  # what the file's own way of use puts around each text, and cuts
        made.post_processor = processors.TemplateProcessing(
            f"{specials[0]} $A", special_tokens=[(specials[0], made.token_to_id(specials[0]))]
        )
        made.enable_truncation(8)
    return made


KINDS: dict[str, Callable[[], Any]] = {
    "llama": lambda: trained(LLAMA),
    "qwen": lambda: trained(QWEN, nfc=True, more=["<tool_call>"]),
    "gpt2": lambda: trained(["<|endoftext|>"], split=False),
    "bare": lambda: trained([]),
}


@pytest.fixture(scope="module", params=KINDS)
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param) / "tokenizer.json"
    KINDS[request.param]().save(str(path))
    return path


any_text = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
        st.sampled_from(
            [*QWEN, *LLAMA, "<tool_call>", "🫠日", "e\u0301", "\x00\x1b[31m", "\r\n", " \t ", "don't", "  a", "٣٤", "123456"]
        ),
    ),
    max_size=6,
).map("".join)


@given(text=any_text)
@settings(deadline=None, derandomize=True, max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_c040_r09_every_text_comes_back_and_makes_no_special(file: Path, text: str) -> None:
    tokenizer = ConversationTokenizer(str(file))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not (tokenizer.special_ids | tokenizer.unused_ids) & set(ids)
    stream = StreamDecoder(tokenizer)
    assert "".join(map(stream.push, ids)) + stream.flush() == text


def test_c040_ids_are_those_of_the_files_own_library(file: Path) -> None:
    own = tokenizers.Tokenizer.from_file(str(file))
    own.no_truncation()
    tokenizer = ConversationTokenizer(str(file))
    texts = [*corpus(), "naïve 12345 café 日本 <tool_call>x</tool_call>\n\n  def f(x):\n\treturn x"]
    assert len(texts) > 600
    assert [tokenizer.encode(text) for text in texts] == [own.encode(text, add_special_tokens=False).ids for text in texts]
    assert tokenizer.encode_batch(texts) == tokenizer.encode_batch(texts, num_threads=1) == list(map(tokenizer.encode, texts))


def test_c042_turn_tokens_are_the_files_then_its_spare_ones_then_new_ones(file: Path) -> None:
    own = tokenizers.Tokenizer.from_file(str(file))
    tokenizer = ConversationTokenizer(str(file))
    turns = [tokenizer.eot_id, tokenizer.im_start_id, tokenizer.im_end_id, tokenizer.pad_id]
    size, reserved = own.get_vocab_size(), [own.token_to_id(name) for name in LLAMA if "reserved" in name]
    expected = {
        "llama": reserved[:4],
        "qwen": [*(own.token_to_id(name) for name in QWEN[:3]), size],
        "gpt2": [own.token_to_id("<|endoftext|>"), size, size + 1, size + 2],
        "bare": [size, size + 1, size + 2, size + 3],
    }
    kind = next(kind for kind in KINDS if file.parent.name.startswith(kind))
    assert turns == expected[kind]
    assert tokenizer.get_vocab_size() == max(size, *(id_ + 1 for id_ in turns))
    assert tokenizer.special_ids == {*turns, *(own.token_to_id(name) for name in (QWEN if kind == "qwen" else []))} | (
        {own.token_to_id(name) for name in LLAMA} if kind == "llama" else set()
    )
    ids, mask = tokenizer.encode_with_mask(CHAT)
    assert tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m]) == "It's 5.<|im_end|>"
    assert [i for i in ids if i in tokenizer.special_ids] == [tokenizer.im_start_id, tokenizer.im_end_id] * 2


def test_c044_every_id_has_bytes_and_none_raises(file: Path) -> None:
    tokenizer = ConversationTokenizer(str(file))
    ids = range(tokenizer.padded_vocab_size + 1)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode("utf-8", "replace") == tokenizer.decode(ids)
    assert tokenizer.decode([-1, tokenizer.padded_vocab_size, 10**12]) == "\ufffd" * 3
    assert tokenizer.decode(tokenizer.encode("a\ud83d b")) == "a\ufffd b"
    assert tokenizer.encode_batch(["a\ud83d b", "c"]) == [tokenizer.encode("a\ufffd b"), tokenizer.encode("c")]


def test_r11_the_digest_is_of_what_decides_the_ids(tmp_path: Path) -> None:
    spec = json.loads(KINDS["qwen"]().to_str())

    def digest(**changed: Any) -> str:
        path = tmp_path / "tokenizer.json"
        path.unlink(missing_ok=True)
        path.write_text(json.dumps({**spec, **changed}, indent=len(changed)))
        return ConversationTokenizer(str(path)).digest

    first = digest()
    assert digest(truncation=None) == first == digest(post_processor=None, version="1.0")
    merges = spec["model"]["merges"]
    assert digest(model={**spec["model"], "merges": merges[:-1]}) != first
    assert digest(added_tokens=spec["added_tokens"][:-1]) != first


@lru_cache(maxsize=1)
def _bare() -> dict[str, Any]:
    return dict(json.loads(KINDS["bare"]().to_str()))


def _changed(**changed: Any) -> bytes:
    return json.dumps({**_bare(), **changed}).encode()


def _model(**changed: Any) -> bytes:
    return _changed(model={**_bare()["model"], **changed})


def _vocab(change: Callable[[dict[str, int]], Any]) -> bytes:
    vocab = dict(_bare()["model"]["vocab"])
    change(vocab)
    return _model(vocab=vocab)


PIECE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BEHAVIORS = ["Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"]


def _steps(*steps: dict[str, Any]) -> dict[str, Any]:
    """A pre-tokenizer of the steps and, unless one has it, bytes at the end."""
    return {"type": "Sequence", "pretokenizers": [*steps, *([] if "ByteLevel" in str(steps) else [LEVEL])]}


def _split(pattern: str, behavior: str, invert: bool = False) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: b"{", "no tokenizer.json: not valid JSON"),
        (lambda: b'{"a": 1}', "no model with a vocab"),
        (lambda: _changed(pre_tokenizer=None), r"not of bytes \(BPE\)"),
        (lambda: _changed(pre_tokenizer=PIECE), r"not of bytes \(BPE/Metaspace\)"),
        (lambda: _model(type="WordPiece"), r"not of bytes \(WordPiece/"),
        (lambda: _changed(normalizer={"type": "Lowercase"}), r"changes the text \(Lowercase\)"),
        (lambda: _model(dropout=0.1), r"changes the text \(dropout\)"),
        (lambda: _model(end_of_word_suffix="</w>"), "end_of_word_suffix"),
        (lambda: _changed(pre_tokenizer={**LEVEL, "add_prefix_space": True}), "a space before each text"),
        (lambda: _changed(pre_tokenizer=_steps({"type": "WhitespaceSplit"})), r"may leave out text \(WhitespaceSplit\)"),
        (lambda: _changed(pre_tokenizer=_steps({"type": "CharDelimiterSplit", "delimiter": "@"})), r"\(CharDelimiterSplit\)"),
        (lambda: _changed(pre_tokenizer=_steps(_split("q", "Removed"))), r"may leave out text \(Split Removed\)"),
        (lambda: _changed(pre_tokenizer=_steps(_steps({"type": "Punctuation", "behavior": "Removed"}))), "Punctuation Removed"),
        (lambda: _vocab(lambda vocab: vocab.pop("!")), "1 of the 256 single bytes are missing"),
        (lambda: _vocab(lambda vocab: vocab.update({"!": 5})), "two of its tokens have one id"),
        (lambda: _vocab(lambda vocab: vocab.update({"!": 2**40})), r"the id of '!' is 1099511627776; ids are whole numbers"),
        (lambda: _vocab(lambda vocab: vocab.update({"x\u4e00": 700})), "is not made of bytes"),
        (lambda: _model(merges=[["qq", "zz"]]), "no tokenizer.json that can be read"),
        *(
            (lambda bad=bad: _changed(added_tokens=bad), "its added_tokens are no list")
            for bad in (5, 0, "", {}, {"a": 1}, True)
        ),
        (lambda: _changed(added_tokens=[{"id": 1}]), "an entry of its added_tokens has no content or no id"),
        (
            lambda: _changed(added_tokens=[{"id": 600, "content": "<x>", "special": False, "lstrip": True}]),
            "text does not come back",
        ),
    ],
)
def test_c040_what_cannot_be_the_tokenizer_is_refused_by_its_cause(
    tmp_path: Path, content: Callable[[], bytes], message: str
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content())
    with pytest.raises(TokenizerError, match=message) as error:
        ConversationTokenizer(str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


step = st.one_of(
    st.builds(
        _split, st.sampled_from(["q", r"\s+", r"\p{L}+", r"\d", LLAMA_PATTERN]), st.sampled_from(BEHAVIORS), st.booleans()
    ),
    st.fixed_dictionaries({"type": st.just("Punctuation"), "behavior": st.sampled_from(BEHAVIORS)}),
    st.fixed_dictionaries({"type": st.just("Digits"), "individual_digits": st.booleans()}),
    st.fixed_dictionaries({"type": st.just("CharDelimiterSplit"), "delimiter": st.sampled_from("@q ")}),
    st.sampled_from([{"type": "UnicodeScripts"}, {"type": "Whitespace"}, {"type": "FixedLength", "length": 3}]),
)


@given(before=st.lists(step, max_size=2), behind=st.lists(step, max_size=1), text=any_text)
@settings(deadline=None, derandomize=True, max_examples=150)
def test_c040_a_pre_tokenizer_is_refused_or_every_text_comes_back(before: Any, behind: Any, text: str) -> None:
    try:
        encoding = JsonEncoding(_changed(pre_tokenizer=_steps(*before, LEVEL, *behind)))
    except Unusable as error:
        assert "may leave out text" in error.cause, error.cause
        return
    for each in (text, f"{text} quick a@b.de 12"):
        assert encoding.decode_bytes(encoding.encode_ordinary(each)).decode() == each


def test_c040_a_split_that_keeps_its_matches_gives_the_ids_of_its_own_library() -> None:
    """Published conversions of GPT-4's vocabulary split so, by an expression that covers every text."""
    level = {**LEVEL, "use_regex": False}
    data = _changed(pre_tokenizer=_steps(_split(LLAMA_PATTERN, "Removed", invert=True), level))
    own = tokenizers.Tokenizer.from_buffer(data)
    own.no_truncation()
    encoding = JsonEncoding(data)
    assert all(encoding.encode_ordinary(text) == own.encode(text, add_special_tokens=False).ids for text in corpus())


def test_r09_a_special_token_that_text_can_spell_is_refused(tmp_path: Path) -> None:
    made = json.loads(trained(["hello"]).to_str())
    made["model"] |= {"ignore_merges": True, "vocab": {**made["model"]["vocab"], "hello": made["added_tokens"][0]["id"]}}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(made))
    with pytest.raises(TokenizerError, match="a text that spells hello becomes that token"):
        ConversationTokenizer(str(path))


def test_c040_without_the_library_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(_changed())
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(TokenizerError, match=r"needs tokenizers; pip install 'lumina\[tokenizers\]'"):
        ConversationTokenizer(str(path))
