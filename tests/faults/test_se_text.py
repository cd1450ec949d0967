"""SE01: text that comes with a checkpoint or a vocabulary, on a real terminal (commands; the screens are in tests/tui)."""

from __future__ import annotations

import base64
import json
import os
import pty
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from lumina_engine.data.tokenizer import ConversationTokenizer
from tests.chat.fakes import commit_checkpoint
from tests.hostile import MARKUP, PAYLOADS, hostile_manifest, hostile_vocabulary, obeyed


def on_a_terminal(words: Sequence[str]) -> tuple[bytes, int]:
    """What `lumina-engine` writes to a terminal, output and errors, and its exit code."""
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "lumina_engine.cli", *words]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=slave, stderr=slave) as shown:
        os.close(slave)
        output = b""
        while True:
            try:
                piece = os.read(master, 65_536)
            except OSError:  # the other end is closed
                break
            output += piece
        code = shown.wait(60)
    os.close(master)
    return output, code


def test_se01_the_metadata_of_a_checkpoint_on_a_terminal(tmp_path: Path) -> None:
    """Its manifest, names of files in it and beside it, its configuration: sound, then damaged."""
    metadata = dict(zip(PAYLOADS, PAYLOADS, strict=True))
    weights = save({payload: np.zeros(3, np.float32) for payload in PAYLOADS}, metadata)
    path = commit_checkpoint(tmp_path, "r", 30, best=True, manifest=hostile_manifest(), weights=weights)
    for number, payload in enumerate(PAYLOADS):
        name = payload.replace("/", "|").replace("\x00", "0")
        (path / name).write_text(payload)  # strays
        (path / "model" / f"{number}{name}").write_text(payload)
    for action in ("list", "verify"):
        output, code = on_a_terminal(["checkpoint", action, str(tmp_path / "r")])
        assert code == 0 and obeyed(output) == [], action
        assert "␛]0;own00␇".encode() in output, action
    body = bytearray((path / "model" / "model.safetensors").read_bytes())
    body[-1] ^= 1  # in the last tensor, whose name the report tells
    (path / "model" / "model.safetensors").write_bytes(body)
    output, code = on_a_terminal(["checkpoint", "verify", str(tmp_path / "r")])
    assert code != 0 and obeyed(output) == [] and any(f"own{number:02d}".encode() in output for number in range(40))
    manifest = json.loads((path / "MANIFEST.json").read_text())
    files = [{**manifest["files"][0], "path": payload} for payload in PAYLOADS]
    (path / "MANIFEST.json").write_text(
        json.dumps({**manifest, "files": files, "format": PAYLOADS[1], "algorithm": PAYLOADS[2]})
    )
    output, code = on_a_terminal(["checkpoint", "verify", str(tmp_path / "r")])
    assert code != 0 and obeyed(output) == []


def test_se01_a_vocabulary_on_a_terminal(tmp_path: Path) -> None:
    """Tokens that are escapes; a vocabulary with one in its place."""
    file, ids = hostile_vocabulary(tmp_path / "v.tiktoken")
    tokenizer = ConversationTokenizer(str(file))
    assert [tokenizer.decode([token]) for token in ids] == PAYLOADS, "each is one token"
    data = tmp_path / "d.jsonl"
    texts = [*PAYLOADS, MARKUP[0]]
    rows = [{"messages": [{"role": role, "content": text} for role in ("user", "assistant")]} for text in texts]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output, code = on_a_terminal(["data", "preview", str(data), "seq_length=256", "--rows", "60", "--tokenizer", str(file)])
    assert code == 0 and b"own39" in output and obeyed(output) == []
    file.write_bytes(base64.b64encode(b"\x1b[2J") + b" \x1b[2J\n")
    output, code = on_a_terminal(["data", "preview", str(data), "--tokenizer", str(file)])
    assert code != 0 and b"v.tiktoken" in output and obeyed(output) == []
