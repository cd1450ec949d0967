"""Traced replies: probabilities, alternatives and experts of each token, against full forwards (C136)."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor

from lumina_engine.chat.client import ServerBackend, _request_line
from lumina_engine.chat.events import (
    TRACE_ALTERNATIVES,
    Done,
    Event,
    Loading,
    Message,
    ModelInfo,
    Routed,
    ServerHello,
    Token,
    decode_answer,
    decode_request,
    encode_line,
)
from lumina_engine.chat.generate import LocalBackend, generate
from lumina_engine.chat.loading import open_backend
from lumina_engine.chat.modes import Sampling
from lumina_engine.chat.sampling import chance, choose, nucleus
from lumina_engine.chat.server import TRACE_QUEUE, ChatServer
from lumina_engine.chat.session import ChatSession
from lumina_engine.data.tokenizer import ConversationTokenizer
from lumina_engine.model.transformer import DeepSeekTransformer
from tests.chat.models import make_model, save_model

TALK: list[Message] = [{"role": "user", "content": "What is 7 + 8?"}]
SAMPLING = Sampling(temperature=0.9, top_p=0.95, top_k=60, repetition_penalty=1.2, max_new_tokens=24)


@pytest.fixture(scope="module")
def tokenizer() -> ConversationTokenizer:
    return ConversationTokenizer("lumina-1k")


def traced(
    model: DeepSeekTransformer, tokenizer: ConversationTokenizer, sampling: Sampling = SAMPLING, seed: int = 3, **more: object
) -> list[Event]:
    return list(generate(model, tokenizer, TALK, sampling, seed, trace=True, stop=[], **more))  # type: ignore[arg-type]


def full_forward(model: DeepSeekTransformer, ids: list[int]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Logits (S, V), and per expert layer the routers' (experts, gates) (S, K), read from the routers themselves."""
    seen: list[tuple[Tensor, Tensor]] = []
    hooks = [layer.router.register_forward_hook(lambda _m, _i, out: seen.append(out[2:])) for layer in model.expert_layers]
    with torch.inference_mode():
        logits = model(torch.tensor([ids]))[0]
    for hook in hooks:
        hook.remove()
    return logits, seen


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"moe_top_k": 1},
        {"num_dense_layers": 1, "num_layers": 4, "num_shared_experts": 1},
        {"use_moe": False},
        {"moe_dropless": False, "capacity_factor": 1.0},
    ],
    ids=["top-2", "top-1", "dense-layer-and-shared", "dense", "capacity"],
)
def test_c136_a_trace_equals_the_full_forward(tokenizer: ConversationTokenizer, changes: dict[str, object]) -> None:
    model = make_model(tokenizer, **changes)
    prompt = tokenizer.encode_conversation(TALK, add_generation_prompt=True)
    events = traced(model, tokenizer)
    tokens = [event for event in events if isinstance(event, Token)]
    routed = [event for event in events if isinstance(event, Routed)]
    assert len(tokens) == SAMPLING.max_new_tokens
    logits, seen = full_forward(model, prompt + [token.token for token in tokens])
    probabilities = logits[len(prompt) - 1 :].float().softmax(-1)
    for index, token in enumerate(tokens):
        assert token.probability == pytest.approx(float(probabilities[index, token.token]), abs=1e-5)
        assert len(token.alternatives) == TRACE_ALTERNATIVES
        for other in token.alternatives:
            assert other.probability == pytest.approx(float(probabilities[index, other.id]), abs=1e-5)
            assert other.text == tokenizer.decode([other.id])
        likeliest = {other.id for other in token.alternatives}
        assert likeliest == set(probabilities[index].topk(TRACE_ALTERNATIVES).indices.tolist())
    if not model.expert_layers:
        assert routed == []
        return
    assert [event.index for event in routed] == list(range(len(tokens)))  # every token, also the last one
    numbers = [number for number in range(model.config.num_layers) if number >= model.config.num_dense_layers]
    for event in routed:
        assert event.experts == 4 and [route.layer for route in event.routes] == numbers
        for route, (experts, gates) in zip(event.routes, seen, strict=True):
            at = len(prompt) + event.index
            assert route.experts == experts[at].tolist()
            assert route.gates == pytest.approx(gates[at].tolist(), abs=1e-5)


def test_c136_the_chance_is_that_of_the_draw(tokenizer: ConversationTokenizer) -> None:
    logits = torch.randn(4000, 12, generator=torch.Generator().manual_seed(0)).mul(2)[:1].expand(4000, -1)
    sampling = Sampling(temperature=0.7, top_k=6, top_p=0.9)
    drawn = choose(logits, sampling, torch.linspace(0, 1 - 1e-9, 4000, dtype=torch.float64))
    probabilities, ids = nucleus(logits[:1], sampling)
    for probability, index in zip(probabilities[0].tolist(), ids[0].tolist(), strict=True):
        told = float(chance(logits[:1], sampling, torch.tensor([index])))
        assert told == pytest.approx(probability, abs=1e-6)
        assert float((drawn == index).float().mean()) == pytest.approx(told, abs=1e-3)
    cut = next(index for index in range(12) if index not in ids[0].tolist())
    assert float(chance(logits[:1], sampling, torch.tensor([cut]))) == 0
    greedy = traced(make_model(tokenizer), tokenizer, Sampling(temperature=0, max_new_tokens=3))
    assert [event.chance for event in greedy if isinstance(event, Token)] == [1.0, 1.0, 1.0]


def test_c136_a_trace_changes_no_token_and_no_trace_costs_no_event(tokenizer: ConversationTokenizer) -> None:
    model = make_model(tokenizer)
    plain = list(generate(model, tokenizer, TALK, SAMPLING, 3, stop=[]))
    with_trace = traced(model, tokenizer)
    texts = [[(e.token, e.text) for e in events if isinstance(e, Token)] for events in (plain, with_trace)]
    assert texts[0] == texts[1]
    assert not any(isinstance(event, Routed) for event in plain)
    assert all(event.chance is None and event.probability is None for event in plain if isinstance(event, Token))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("ending", ["stop", "cancelled", "context"])
def test_c136_every_token_is_routed_however_the_reply_ends(tokenizer: ConversationTokenizer, ending: str) -> None:
    model = make_model(tokenizer)
    first = [event.token for event in traced(model, tokenizer) if isinstance(event, Token)]
    more: dict[str, object] = {}
    sampling = SAMPLING
    if ending == "stop":
        more = {"stop": [first[5]]}
    elif ending == "context":
        sampling = Sampling(temperature=0.9, max_new_tokens=500)
    asked = iter(range(1000))
    if ending == "cancelled":
        more = {"cancelled": lambda: next(asked) >= 4}
    events = list(generate(model, tokenizer, TALK, sampling, 3, trace=True, **{"stop": [], **more}))  # type: ignore[arg-type]
    assert isinstance(events[-1], Done) and events[-1].reason == ending
    indices = [event.index for event in events if isinstance(event, Routed)]
    assert indices == list(range(events[-1].tokens)) and indices


# through the socket


@pytest.fixture
def place(tmp_path: Path) -> Path:
    folder = tmp_path / "sockets"
    folder.mkdir(mode=0o700)
    return folder / "a.chat.sock"


@pytest.fixture
def serve(place: Path) -> Iterator[Callable[[object], None]]:
    servers: list[tuple[ChatServer, threading.Thread]] = []

    def start(backend: object) -> None:
        server = ChatServer(place, lambda say: backend)  # type: ignore[arg-type, return-value]
        thread = threading.Thread(target=server.serve, daemon=True)
        thread.start()
        servers.append((server, thread))

    yield start
    for server, thread in servers:
        server.stop("over")
        thread.join(20)


def test_c136_the_trace_comes_through_a_server_and_a_real_checkpoint(
    tokenizer: ConversationTokenizer, tmp_path: Path, place: Path, serve: Callable[[object], None]
) -> None:
    path = save_model(make_model(tokenizer), tokenizer, tmp_path / "runs/tiny")
    told: list[Loading] = []
    local = open_backend(path, "cpu", "fp32", told.append)
    serve(local)
    backend = ServerBackend(place)
    assert backend.traces
    session = ChatSession(backend, seed=3, overrides={"max_new_tokens": 12}, trace=True, chats_dir=tmp_path)
    events = [msgspec.structs.replace(event, id="") for event in session.send("What is 7 + 8?")]
    direct = list(local.generate(TALK, session.sampling, 3, trace=True))
    assert [event for event in events if not isinstance(event, Done)] == direct[:-1]
    session.trace = False
    assert not any(isinstance(event, Routed) for event in session.send("And 1 + 1?"))
    backend.close()
    # loading told the bytes it read, in order, up to all of them
    counted = [(progress.bytes_read, progress.bytes_total) for progress in told if progress.bytes_total]
    size = sum(file.stat().st_size for file in (path / "model").iterdir())
    assert all(total == size for _, total in counted) and all(a[0] < b[0] for a, b in pairwise(counted))
    assert told[-1].detail.startswith("placing step-000100 on cpu")


class Wordy:
    """Answers with so many traced tokens that a client that does not read falls behind."""

    def __init__(self, tokens: int) -> None:
        self.info = ModelInfo(path="x", context_limit=64)
        self.tokens = tokens
        self.given = threading.Event()

    def generate(self, messages: object, sampling: object, seed: int, **_: object) -> Iterator[Event]:
        from lumina_engine.chat.events import Alternative, Route, Start

        yield Start(prompt_tokens=1, context_limit=64)
        for index in range(self.tokens):
            yield Token(text="a", token=1, probability=0.5, alternatives=[Alternative("b" * 100, 1, 0.5)] * 5)
            yield Routed(index=index, experts=64, routes=[Route(layer, [1] * 8, [0.125] * 8) for layer in range(64)])
        self.given.set()
        yield Done(reason="stop", tokens=self.tokens, seconds=1.0)

    def cancel(self) -> None:
        self.tokens = 0

    def close(self) -> None:
        return


def test_c136_a_client_that_falls_behind_loses_the_trace_not_the_reply(place: Path, serve: Callable[[object], None]) -> None:
    backend = Wordy(2000)  # 8 MB of trace: far above what is kept for one client
    serve(backend)
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(str(place))
        raw.settimeout(20)
        line, _ = _request_line("1", TALK, SAMPLING, 0, 0, True)
        raw.sendall(b'{"op":"hello","proto":1}\n' + line)
        assert backend.given.wait(20)
        with raw.makefile("rb") as lines:
            counts = {"token": 0, "routed": 0}
            for text in lines:
                op = json.loads(text)["op"]
                if op == "done":
                    break
                counts[op] = counts.get(op, 0) + 1
    assert counts["token"] == 2000 and 0 < counts["routed"] < 2000 and TRACE_QUEUE > 0


def test_c136_an_older_server_is_not_asked_for_what_it_does_not_know() -> None:
    assert decode_answer(b'{"op":"hello","proto":1,"pid":7,"state":"ready"}') == ServerHello(pid=7, state="ready")
    assert b"trace" not in _request_line("1", TALK, SAMPLING, 0, 0, False)[0]
    line = _request_line("1", TALK, SAMPLING, 0, 0, True)[0]
    assert decode_request(line).trace is True  # type: ignore[union-attr]
    assert decode_request(line.replace(b',"trace":true', b"")).trace is False  # type: ignore[union-attr]
    routed = decode_answer(b'{"op":"routed","index":3,"experts":4,"routes":[[1,[0,2],[0.5,0.5]]],"id":"1"}')
    assert isinstance(routed, Routed) and decode_answer(encode_line(routed)) == routed


def test_c136_a_local_backend_traces_too(tokenizer: ConversationTokenizer) -> None:
    backend = LocalBackend(make_model(tokenizer), tokenizer, ModelInfo(path="x"))
    events = list(backend.generate(TALK, SAMPLING, 1, trace=True))
    assert any(isinstance(event, Routed) for event in events)
