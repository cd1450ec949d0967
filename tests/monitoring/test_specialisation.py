"""What experts specialise in (C24): planted causes are found, chance is not taken for one; and the report of a real run."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from lumina_engine.cli import main
from lumina_engine.monitoring.specialisation import information, kept_experts, octaves, pairs, specialisation
from lumina_engine.run.directory import RunDirectory
from tests.faults.tiny import Tiny


@pytest.mark.parametrize("seed", range(10))
def test_c024_chance_tells_nothing_and_a_cause_all(seed: int) -> None:
    draw = np.random.default_rng(seed)
    experts, tokens = int(draw.integers(2, 17)), int(draw.integers(300, 3_000))
    token_N = draw.integers(0, 200, tokens)
    free_N1, tied_N1 = draw.integers(0, experts, (tokens, 1)), (token_N % experts)[:, None]
    free, tied = information(token_N, free_N1), information(token_N, tied_N1)
    assert free["share"] < 0.02 and free["chance"] > 0
    entropy = np.log2(experts)
    assert tied["bits"] == pytest.approx(entropy - tied["chance"], abs=0.05)
    half = np.where(draw.random(tokens) < 0.5, token_N % experts, draw.integers(0, experts, tokens))[:, None]
    assert free["bits"] < information(token_N, half)["bits"] < tied["bits"]


def test_c024_each_expert_is_named_by_what_it_serves() -> None:
    draw = np.random.default_rng(3)
    token_N, position_N, task_N = draw.integers(0, 40, 4_000), draw.integers(0, 100, 4_000), draw.integers(0, 2, 4_000)
    by_token = np.where(token_N == 7, 0, 1 + draw.integers(0, 3, 4_000))
    by_position = np.minimum(octaves(position_N), 3)
    by_task = 2 * task_N + draw.integers(0, 2, 4_000)
    chosen = np.stack([by_token, by_position, by_task])[:, :, None]
    found = specialisation([1, 2, 4], 4, chosen, token_N, position_N, task_N, ["ask", "tell"], lambda token: f"<{token}>")
    first, second, third = found["layers"]
    assert [layer["layer"] for layer in found["layers"]] == [1, 2, 4]
    assert first["experts"][0]["top_tokens"][0]["text"] == "<7>" and first["experts"][0]["share"] == np.mean(token_N == 7)
    assert first["experts"][0]["top_tokens"][0]["lift"] == pytest.approx(1 / np.mean(token_N == 7))
    for layer, cause in ((first, "token"), (second, "position"), (third, "task")):
        assert max(layer["told_by"], key=lambda name: layer["told_by"][name]["bits"]) == cause
    assert third["experts"][3]["task_lift"]["ask"] == 0 and first["pairs"] == []
    assert second["experts"][3]["median_position"] > second["experts"][0]["median_position"]


def test_c024_experts_that_work_together_are_told_from_busy_ones() -> None:
    draw = np.random.default_rng(5)
    one_N = draw.choice(6, 6_000, p=[0.4, 0.2, 0.1, 0.1, 0.1, 0.1])
    free_NK = np.array([[e, draw.choice([f for f in range(6) if f != e])] for e in one_N])
    tied_NK = np.where((free_NK[:, :1] == 4), np.array([[4, 5]]), free_NK)
    first = pairs(tied_NK, 6)[0]
    assert first["experts"] == [4, 5] and first["count"] == np.sum((np.sort(tied_NK) == [4, 5]).all(-1))
    assert first["lift"] > 1.5 > 1.25 > max(row["lift"] for row in pairs(free_NK, 6))
    assert pairs(free_NK[:, ::-1], 6) == pairs(free_NK, 6)


def test_c024_tokens_that_keep_their_experts() -> None:
    draw = np.random.default_rng(7)
    before = np.stack([draw.permuted(np.arange(8)[None].repeat(2_000, 0), axis=1)[:, :2] for _ in range(2)])
    after = before[:, :, ::-1].copy()  # the same sets in another order
    after[1, :500] = (before[1, :500] + 4) % 8
    kept = kept_experts(before, after, 8)
    assert kept["same"][0] == 1 and 0.75 <= kept["same"][1] < 0.8
    assert kept["overlap"][0] == 1 and kept["chance"] == pytest.approx([0.25, 0.25], abs=0.01)


class Tags(HTMLParser):
    """The text of every heading, and every address in the page."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.seen.append(data)


def test_c024_report_of_a_run_puts_rows_through_its_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = Tiny(tmp_path, "mine", max_steps=12, save_interval=6, eval_split=0.25)
    tiny.train()
    (tmp_path / "mine" / "run.json").write_text(json.dumps({"format": 1, "id": "mine", "name": "mine", "state": "finished"}))
    tiny.config.save(RunDirectory(tmp_path / "mine").config_path)
    assert main(["report", str(tmp_path / "mine"), "--moe", "--rows", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["moe"]
    assert (found["checkpoint"], found["rows"], found["held_out"]) == ("step-000012", 8, True)
    for layer in found["specialisation"]["layers"]:
        assert sum(row["share"] for row in layer["experts"]) == pytest.approx(1)
        assert sum(row["tokens"] for row in layer["experts"]) == 2 * found["specialisation"]["tokens"]
    assert found["kept_experts"]["from"] == "step-000006" and all(0 < s <= 1 for s in found["kept_experts"]["same"])
    page = Tags()
    page.feed((tmp_path / "mine" / "reports" / "report.html").read_text())
    assert any(text.startswith("Tokens that keep their experts from step-000006") for text in page.seen) and page.links == []
    (tmp_path / "mine" / "emergency").mkdir(exist_ok=True)
    (tmp_path / "mine" / "checkpoints" / "step-000012").rename(tmp_path / "mine" / "emergency" / "step-000012")
    assert main(["report", str(tmp_path / "mine"), "--moe", "--rows", "8", "--json"]) == 0
    of_emergency = json.loads(capsys.readouterr().out)["moe"]
    assert of_emergency["checkpoint"] == of_emergency["kept_experts"]["to"] == "emergency/step-000012"
    saved = json.loads((tmp_path / "mine" / "reports" / "report.json").read_text())["checkpoints"]["on_disk"]
    assert saved == ["step-000006", "emergency/step-000012"]
    (tmp_path / "train.jsonl").unlink()
    assert main(["report", str(tmp_path / "mine"), "--moe"]) == 0
    assert "left out  specialisation: " in capsys.readouterr().out
