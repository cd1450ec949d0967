"""`lumina-engine chat` and `serve` on a real tiny checkpoint (C101, C102, C104, C110, R33, R35)."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lumina_engine import cli
from lumina_engine.chat.client import probe, server_sockets, socket_path
from lumina_engine.chat.loading import choose_device, choose_precision, open_backend, tune_threads
from lumina_engine.chat.modes import ChatError
from lumina_engine.data.tokenizer import ConversationTokenizer
from lumina_engine.model.transformer import DeepSeekTransformer
from tests.chat.models import make_model, save_model
from tests.waiting import until

DEADLINE = 60.0
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tokenizer() -> ConversationTokenizer:
    return ConversationTokenizer("lumina-1k")


@pytest.fixture(scope="module")
def model(tokenizer: ConversationTokenizer) -> DeepSeekTransformer:
    return make_model(tokenizer)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: DeepSeekTransformer, tokenizer: ConversationTokenizer) -> Path:
    """A runs root with two runs; `winter` was updated last. The working folder is another one."""
    runs, home = tmp_path / "runs", tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    monkeypatch.setenv("LUMINA_RUNS", str(runs))
    monkeypatch.setenv("LUMINA_SOCKETS", str(tmp_path / "sockets"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    save_model(model, tokenizer, runs / "autumn")
    save_model(model, tokenizer, runs / "winter", step=7)
    os.utime(runs / "autumn" / "checkpoints", (1, 1))
    return runs


def chat(*arguments: str) -> int:
    return cli.main(["chat", *arguments])


# choosing and answering


def test_c101_the_best_of_the_newest_run_is_taken_and_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat("--prompt", "hi", "--max-new-tokens", "8", "--seed", "1") == 0
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert lines[0] == "step-000007: best of run winter, the most recently updated of 2 runs"
    path = root.resolve() / "winter/checkpoints/step-000007"
    assert lines[1].startswith(f"{path} | step 7 | eval_loss 2.5000 | ") and lines[1].endswith("active | fp32 | cpu")
    assert out.strip() and len(lines) == 3 and "cut off: --max-new-tokens (8)" in lines[2]


@pytest.mark.parametrize("reference", ["autumn", "autumn@best", "autumn@step-000100", "path", "--checkpoint"])
def test_c102_every_way_to_name_a_checkpoint(root: Path, capsys: pytest.CaptureFixture[str], reference: str) -> None:
    path = str(root / "autumn/checkpoints/step-000100")
    names = {"path": [path], "--checkpoint": ["--checkpoint", path]}.get(reference, [reference])
    assert chat(*names, "--prompt", "hi", "--max-new-tokens", "2") == 0
    assert "autumn/checkpoints/step-000100 | step 100" in capsys.readouterr().err


def test_c104_same_prompt_seed_and_mode_same_text(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(*more: str) -> str:
        assert chat("autumn", "--prompt", "hi", "--max-new-tokens", "12", *more) == 0
        return capsys.readouterr().out

    assert answer("--seed", "1", "--mode", "creative") == answer("--seed", "1", "--mode=creative")
    assert answer("--seed", "1", "--mode", "creative") != answer("--seed", "2", "--mode", "creative")
    assert answer("--temperature", "0", "--seed", "1") == answer("--temperature", "0", "--seed", "2")


def test_c104_prompt_from_stdin_as_json(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hi there\n"))
    assert (
        chat("autumn", "--prompt", "-", "--json", "--max-new-tokens", "3", "--top-k", "0", "--system_prompt", "Be brief.") == 0
    )
    reply = json.loads(capsys.readouterr().out)
    assert reply["tokens"] == 3 and reply["reason"] == "length" and reply["mode"] == "standard"
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n/save talk\n"))
    assert chat("autumn", "--max-new-tokens", "2", "--max-history", "4", "--repetition-penalty", "1.3", "--top-p", "0.8") == 0
    saved = json.loads(Path("chats/talk.json").read_text())
    assert saved["checkpoint"]["step"] == 100 and len(saved["checkpoint"]["digest"]) == 64
    assert saved["sampling"]["repetition_penalty"] == 1.3 and saved["sampling"]["top_p"] == 0.8


def test_c102_the_loaded_model_computes_what_the_saved_one_did(
    root: Path, model: DeepSeekTransformer, tokenizer: ConversationTokenizer
) -> None:
    backend = open_backend(root / "autumn/checkpoints/step-000100", "cpu")
    ids = torch.tensor([tokenizer.encode("what is seven?")])
    with torch.inference_mode():
        assert torch.equal(backend.model(ids), model(ids))
    assert backend.info.context_limit == 128 and backend.info.run == "autumn" and backend.info.tokenizer == "lumina-1k"
    half = open_backend(root / "autumn/checkpoints/step-000100", "cpu", "bf16")
    assert half.info.precision == "bf16" and next(half.model.parameters()).dtype is torch.bfloat16
    assert half.info.weights_bytes is not None and backend.info.weights_bytes == 2 * half.info.weights_bytes


# bad input: one line, the right exit code, nothing loaded


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["nowhere"], 65, "no run 'nowhere'"),
        (["autum"], 65, "did you mean autumn?"),
        (["autumn@step-000999"], 65, "has no step-000999"),
        (["model.pt"], 65, "pickle files are never opened here"),
        (["autumn", "--checkpoint", "winter"], 2, "give one"),
        (["--mode", "precice"], 2, "did you mean precise?"),
        (["--temperature", "-1"], 2, "temperature must lie between 0.0 and 10.0"),
        (["--top-p", "0"], 2, "top_p must be above 0"),
        (["--max-history", "0"], 2, "max-history must be 1 or more"),
        (["--seed", "-3"], 2, "seed"),
        (["--prompt", " "], 2, "the prompt is empty"),
        (["--device", "tpu"], 2, "device 'tpu' is unknown"),
        (["--device", "cuda:7"], 2, "use --device cpu"),
        (["--precision", "int4"], 2, "precision 'int4' is unknown"),
        (["--precision", "fp16"], 2, "precision fp16 is for GPUs"),
    ],
)
def test_c110_wrong_arguments_are_one_line(
    root: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, text: str
) -> None:
    if "--prompt" not in arguments:
        arguments = [*arguments, "--prompt", "hi"]
    assert chat(*arguments) == code
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert out == "" and last.startswith("lumina-engine: ") and text in last and "Traceback" not in err


def test_c110_no_checkpoint_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LUMINA_RUNS", str(tmp_path / "none"))
    assert chat("--prompt", "hi") == 65
    assert "train one with `lumina-engine train`" in capsys.readouterr().err


def test_r33_r35_a_damaged_checkpoint_never_answers(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = root / "autumn/checkpoints/step-000100/model/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    assert chat("autumn", "--prompt", "hi") == 65
    out, err = capsys.readouterr()
    assert out == "" and "model.safetensors" in err.splitlines()[-1]


def test_c110_devices_and_precisions() -> None:
    cpu = choose_device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda") and choose_precision("auto", cpu) == "fp32"
    assert [choose_precision(name, torch.device("cuda")) for name in ("fp32", "bf16", "fp16")] == ["fp32", "bf16", "fp16"]
    with pytest.raises(ChatError, match="not supported"):
        choose_device("meta")


def test_threads_are_chosen_by_measurement_unless_the_user_set_them(
    model: DeepSeekTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    try:
        torch.set_num_threads(2)
        for slow in (1, 2):
            torch.set_num_threads(2)
            monkeypatch.setattr(
                "lumina_engine.chat.loading._one_token", lambda model, slow=slow: 1.0 + (torch.get_num_threads() == slow)
            )
            assert tune_threads(model) == 3 - slow == torch.get_num_threads()
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        torch.set_num_threads(2)
        assert tune_threads(model) == 2
    finally:
        torch.set_num_threads(before)


# the server, for real


def test_c136_serve_answers_lives_on_and_leaves(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "autumn", "--detach", "--json", "--idle-timeout", "300"]) == 0
    answer = json.loads(capfd.readouterr().out)
    place = Path(answer["socket"])
    path = (root / "autumn/checkpoints/step-000100").resolve()
    assert place == socket_path(path) and server_sockets() == [place] and answer["checkpoint"] == str(path)
    try:
        assert os.getsid(answer["pid"]) != os.getsid(0)
        assert cli.main(["serve", "autumn"]) == 0  # it is there already
        out, err = capfd.readouterr()
        assert out == f"{place}\n" and f"served already by process {answer['pid']}" in err
        assert chat("autumn", "--prompt", "hi", "--seed", "1", "--max-new-tokens", "6") == 0  # waits until it is loaded
        through, err = capfd.readouterr()
        assert f"through the chat server that has it loaded (process {answer['pid']})" in err
    finally:
        os.kill(answer["pid"], signal.SIGTERM)
    until(lambda: not place.exists(), "the server leaves")
    until(lambda: probe(place) is None)
    until(lambda: "stopped by SIGTERM" in place.with_suffix(".log").read_text(), "its last word")
    assert oct(place.with_suffix(".log").stat().st_mode & 0o777) == "0o600"
    assert chat("autumn", "--prompt", "hi", "--seed", "1", "--max-new-tokens", "6") == 0
    assert capfd.readouterr().out == through  # the same text without the server


def test_c110_serve_refuses_in_one_line(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "nowhere"]) == 65
    assert cli.main(["serve", "autumn", "--idle-timeout", "-1"]) == 2
    assert cli.main(["serve", "autumn", "--detach", "--device", "cuda:9"]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.splitlines()[-1].startswith("lumina-engine: device cuda:9: torch sees")
    assert server_sockets() == []


def test_help_needs_nothing_heavy() -> None:
    code = (
        "import sys\nfrom lumina_engine import cli\n"
        "for verb in ('chat', 'serve'):\n"
        "    try:\n        cli.main([verb, '--help'])\n    except SystemExit:\n        pass\n"
        "assert not {'torch', 'pydantic', 'numpy', 'msgspec'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=DEADLINE, stdout=subprocess.DEVNULL)
