"""Imports point down only, heavy libraries stay in their layer, and forbidden calls are absent (reliability S9)."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "lumina_engine").rglob("*.py")) + sorted((ROOT / "lumina_tui").rglob("*.py"))

# Third-party packages that a layer must not import anywhere, not even lazily.
BANNED = {
    "lumina_tui": {"torch", "deepspeed", "plotext", "transformers", "safetensors"},
    "lumina_engine.config": {"torch", "deepspeed", "textual", "numpy", "msgspec", "psutil"},
    "lumina_engine.secrets": {"torch", "deepspeed", "textual", "numpy", "msgspec", "pydantic", "yaml"},
    "lumina_engine.text": {"torch", "deepspeed", "textual", "numpy", "msgspec", "pydantic", "yaml"},
    "lumina_engine.mounts": {"torch", "deepspeed", "textual", "numpy", "msgspec", "pydantic", "yaml"},
    "lumina_engine.checkpoint.commit": {"torch", "deepspeed", "textual", "numpy", "msgspec", "pydantic", "yaml"},
    "lumina_engine.monitoring": {"torch", "deepspeed", "textual"},
    "lumina_engine.run": {"torch", "deepspeed", "textual"},
    "lumina_engine.data": {"deepspeed", "textual"},
    "lumina_engine.model": {"deepspeed", "textual"},
    "lumina_engine.checkpoint": {"deepspeed", "textual"},
    "lumina_engine.chat": {"deepspeed", "textual"},
    "lumina_engine.doctor": {"torch", "deepspeed", "textual"},
    "lumina_engine.commands": {"deepspeed", "textual"},
    "lumina_engine.bench": {"torch", "deepspeed", "textual"},
}
# Rooms of ours, lowest first; a room may import itself and those before it. Rooms on one rung may not import each other
# unless named together.
RANK = {
    "config": 0,
    "text": 0,
    "secrets": -1,
    "mounts": -1,
    "commit": 1,
    "monitoring": 2,
    "run": 3,
    "data": 4,
    "model": 4,
    "checkpoint": 5,
    "chat": 6,
    "doctor": 6,
    "training": 7,
}


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> list[tuple[str, int]]:
    """Every imported module with its line, relative imports made absolute; inside `if TYPE_CHECKING` counts too."""
    name = module_name(path)
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            target = ".".join([*base, *([node.module] if node.module else [])])
            found += [(f"{target}.{alias.name}", node.lineno) for alias in node.names]
    return found


def room(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] != "lumina_engine" or len(parts) < 2:
        return None
    if (
        parts[1] == "checkpoint"
        and len(parts) > 2
        and parts[2] in {"commit", "digest", "direct", "files", "verify", "keep", "header"}
    ):
        return "commit"
    return parts[1] if parts[1] in RANK else None


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_down(path: Path) -> None:
    name = module_name(path)
    here = room(name)
    for target, line in imports(path):
        where = f"{path.relative_to(ROOT)}:{line} imports {target}"
        for layer, banned in BANNED.items():
            if name == layer or name.startswith(layer + "."):
                assert target.split(".")[0] not in banned, where
        if name.startswith("lumina_engine"):
            assert not target.startswith("lumina_tui"), where
        there = room(target)
        if here and there and here != there:
            assert RANK[there] < RANK[here] or {here, there} <= {"data", "model"}, where


@pytest.mark.parametrize("path", [path for path in FILES if room(module_name(path)) == "commit"], ids=module_name)
def test_what_a_checkpoint_is_judged_by_needs_nothing_but_python_and_its_digests(path: Path) -> None:
    own = {"blake3"} if path.stem == "digest" else set[str]()
    for target, line in imports(path):
        package = target.split(".")[0]
        assert package in sys.stdlib_module_names | {"lumina_engine", "__future__"} | own, (
            f"{path.name}:{line} imports {target}"
        )
        assert package != "lumina_engine" or room(target) in ("commit", "mounts", None), f"{path.name}:{line} {target}"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_se06_forbidden_calls(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
            assert not {"pickle", "dill", "cloudpickle", "marshal", "shelve"} & set(names), where
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            forbidden = {"eval", "exec", "os.system", "os.popen", "torch.load"}
            if path.name == "pickles.py":  # the one importer, in a process of its own (S3)
                forbidden -= {"torch.load"}
                assert called != "torch.load" or any(word.arg == "weights_only" for word in node.keywords), where
            assert called not in forbidden, f"{where} {called}"
            assert called not in {"yaml.load", "yaml.unsafe_load", "yaml.full_load"}, f"{where} {called}"
            if called.rpartition(".")[2] in {"extractall", "extract", "unpack_archive"}:
                filters = [ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg == "filter"]
                assert filters == ["'data'"], f"{where} {called} without filter='data'"
            for keyword in node.keywords:
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                assert not (keyword.arg in {"shell", "trust_remote_code"} and value is True), where
                assert not (keyword.arg == "weights_only" and value is False), where


def loaded_after(code: str, *names: str) -> list[str]:
    """Which of `names` are in sys.modules after `code` ran in a process of its own."""
    script = f"import sys\n{code}\nprint(*[n for n in {names!r} if n in sys.modules])"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    return out.stdout.split()


def test_c150_import_is_lazy() -> None:
    heavy = ("torch", "deepspeed", "textual", "pydantic", "numpy", "yaml", "msgspec", "tiktoken")
    assert loaded_after("import lumina_engine", *heavy) == []


def test_c150_public_names_resolve() -> None:
    import lumina_engine

    for name in lumina_engine.__all__:
        assert getattr(lumina_engine, name) is not None


def test_help_is_light() -> None:
    code = "import lumina_engine.cli as c\ntry:\n    c.main(['--help'])\nexcept SystemExit:\n    pass"
    script = f"import sys\n{code}\nprint('LOADED', *[n for n in ('torch', 'textual', 'pydantic', 'numpy') if n in sys.modules])"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.splitlines()[-1].split() == ["LOADED"]


def test_tui_and_supervisor_never_load_torch() -> None:
    heavy = ("torch", "deepspeed", "transformers", "plotext")
    assert loaded_after("import lumina_tui.app, lumina_tui.screens.home, lumina_tui.screens.monitor", *heavy) == []
    assert loaded_after("import lumina_engine.run.supervisor", *heavy, "textual") == []
