"""A tokenizer of bytes with the real template, so that tests of the data path need no vocabulary."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lumina_engine.data.conversation import Conversation, Message


class ByteTokenizer:
    """Ids 0-255 are bytes; 256 and 257 open and close a turn, 258 pads, 259 ends a text."""

    name = "bytes"
    digest = hashlib.sha256(b"bytes").hexdigest()
    im_start_id, im_end_id, pad_id, eot_id = 256, 257, 258, 259
    padded_vocab_size = 384

    def get_vocab_size(self) -> int:
        return 260

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Any) -> str:
        names = {256: b"<S>", 257: b"<E>", 258: b"<P>", 259: b"<T>"}
        return b"".join(names.get(i) or bytes([i]) for i in ids).decode("utf-8", "replace")

    def encode_with_mask(self, conversation: Any) -> tuple[list[int], list[bool]]:
        messages = getattr(conversation, "messages", conversation)
        ids: list[int] = []
        mask: list[bool] = []
        for message in messages:
            role = message["role"] if isinstance(message, dict) else message.role
            content = message["content"] if isinstance(message, dict) else message.content
            weight = message.get("weight") if isinstance(message, dict) else message.weight
            trained = role == "assistant" and weight != 0
            header, body = [256, *self.encode(role + "\n")], [*self.encode(content), 257]
            ids += [*header, *body, 10]
            mask += [False] * len(header) + [trained] * len(body) + [False]
        return ids, mask

    def encode_conversation(self, conversation: Any) -> list[int]:
        return self.encode_with_mask(conversation)[0]


@pytest.fixture(scope="session")
def tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the repository."""
    folder = Path(__file__).resolve().parents[3] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the folder {folder}, which a checkout does not have")
    return folder


@pytest.fixture
def talk():
    """`talk("question", "answer", …)`: a conversation; `system=`, `id=` as given."""

    def make(
        *turns: str, system: str | None = None, id: str | None = None, weights: dict[int, float] | None = None
    ) -> Conversation:
        messages = [Message("system", system)] if system is not None else []
        for number, text in enumerate(turns):
            messages.append(Message("user" if number % 2 == 0 else "assistant", text, (weights or {}).get(number)))
        return Conversation(tuple(messages), id)

    return make


@pytest.fixture
def write(tmp_path):
    """`write(name, records or text)`: a JSON Lines file of records, a JSON file for .json, or the text as it is."""

    def make(name: str, content: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        elif name.endswith(".json"):
            path.write_text(json.dumps(content, indent=1), encoding="utf-8")
        else:
            path.write_text("".join(json.dumps(record) + "\n" for record in content), encoding="utf-8")
        return path

    return make


@pytest.fixture
def settings(tmp_path):
    """The keys of a Config that the data path reads, with room to change them."""

    def make(**changes: Any) -> SimpleNamespace:
        values = {
            "seq_length": 64,
            "packing": "fit",
            "train_on": "assistant",
            "assistant_loss_weight": 1.0,
            "seed": 0,
            "batch_size": 2,
            "gradient_accumulation_steps": 1,
            "num_epochs": 1,
            "num_workers": 0,
            "prefetch_batches": 2,
            "train_data_path": None,
            "eval_data_path": None,
            "eval_split": 0.0,
            "data_format": "auto",
            "streaming_threshold_gb": 5.0,
            "data_cache_dir": str(tmp_path / "cache"),
            "vocab_size": "auto",
        }
        return SimpleNamespace(**{**values, **changes})

    return make
