"""What must stay true of the source of `lumina_tui`: small screens, dumb widgets, no shared state, nothing dangerous."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TUI = Path(__file__).resolve().parents[2] / "lumina_tui"
FILES = sorted(TUI.rglob("*.py"))
SCREENS = sorted((TUI / "screens").glob("*.py"))
WIDGETS = sorted((TUI / "widgets").glob("*.py"))
LINES_OF_A_SCREEN = 300

# widgets that take text as markup unless they are told not to, or are given a Content
MARKUP_WIDGETS = {"Static", "Label", "Button", "Checkbox", "RadioButton", "Option", "Tab"}
READING = {
    "open",
    "read_text",
    "read_bytes",
    "scandir",
    "listdir",
    "iterdir",
    "glob",
    "rglob",
    "stat",
    "exists",
    "is_file",
    "is_dir",
}
READING_MODULES = {"json", "yaml", "os", "shutil", "subprocess", "socket", "sqlite3", "csv", "lumina_engine.config.yaml_text"}


def name_of(path: Path) -> str:
    return str(path.relative_to(TUI))


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def where(path: Path, node: ast.AST) -> str:
    return f"{name_of(path)}:{getattr(node, 'lineno', 0)}"


@pytest.mark.parametrize("path", SCREENS, ids=name_of)
def test_a_screen_is_layout_and_routing(path: Path) -> None:
    count = len(path.read_text(encoding="utf-8").splitlines())
    assert count <= LINES_OF_A_SCREEN, f"{name_of(path)} has {count} lines: move logic into a module without Textual"


def called(node: ast.Call) -> str:
    return node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_se06_no_forbidden_call_and_no_markup(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Attribute | ast.Name):
            word = node.attr if isinstance(node, ast.Attribute) else node.id
            assert word not in ("call_from_thread", "from_markup", "suspend_process"), where(path, node)
        if not isinstance(node, ast.Call):
            continue
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        assert "shell" not in keywords, where(path, node)
        markup = keywords.get("markup")
        assert markup is None or (isinstance(markup, ast.Constant) and markup.value is False), f"{where(path, node)}: markup"
        if called(node) in MARKUP_WIDGETS and node.args:
            plain = isinstance(node.args[0], ast.Constant) or (markup is not None)
            content = isinstance(node.args[0], ast.Call) and called(node.args[0]) == "Content"
            assert plain or content, f"{where(path, node)}: outside text into {called(node)} needs markup=False or Content"
        if called(node) == "notify":
            assert markup is not None, f"{where(path, node)}: notify without markup=False"


def stateful(node: ast.expr) -> bool:
    """Whether a value at module level can change."""
    if isinstance(node, ast.List | ast.Set | ast.ListComp | ast.SetComp | ast.DictComp | ast.Dict):
        return True
    return isinstance(node, ast.Call) and called(node) in {
        "list",
        "dict",
        "set",
        "deque",
        "defaultdict",
        "Counter",
        "OrderedDict",
    }


def module_level(tree: ast.Module) -> Iterator[tuple[ast.stmt, str, ast.expr | None, str]]:
    """(statement, name, value, annotation) of what a module assigns."""
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node, node.target.id, node.value, ast.unparse(node.annotation)
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    yield node, target.id, node.value, ""


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_state_at_module_level(path: Path) -> None:
    """A table at module level is a constant: in capitals, and nothing in its module writes to it. `global` is not used."""
    tree = tree_of(path)
    tables = set()
    for node, name, value, _ in module_level(tree):
        if value is not None and stateful(value) and name != "__all__":
            assert name.lstrip("_").isupper(), (
                f"{where(path, node)}: {name} can change; make it a constant or part of an object"
            )
            tables.add(name)
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Global), f"{where(path, node)}: global"
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AugAssign):
            targets = [node.target]
        elif isinstance(node, ast.Delete):
            targets = node.targets
        for target in targets:
            if isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name):
                assert target.value.id not in tables, f"{where(path, node)}: writes to the constant {target.value.id}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            changing = node.func.attr in {"append", "add", "update", "pop", "clear", "setdefault", "extend", "remove", "insert"}
            assert not (changing and node.func.value.id in tables), f"{where(path, node)}: changes {node.func.value.id}"


@pytest.mark.parametrize("path", WIDGETS, ids=name_of)
def test_widgets_read_no_files_and_no_data(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            assert not {alias.name for alias in node.names} & READING_MODULES, where(path, node)
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "") not in READING_MODULES, where(path, node)
        elif isinstance(node, ast.Call) and called(node) in READING:
            receiver = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
            assert receiver and "self" in receiver and called(node) == "open", f"{where(path, node)}: {ast.unparse(node.func)}"


def test_no_heavy_library_in_the_process() -> None:
    """Importing every module of the program brings none of them in."""
    modules = [
        ".".join(("lumina_tui", *path.relative_to(TUI).with_suffix("").parts)) for path in FILES if path.stem != "__init__"
    ]
    heavy = ("torch", "deepspeed", "transformers", "plotext", "safetensors", "tiktoken")
    code = f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
    code += f"print(*[name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_the_private_parts_of_textual_are_used_in_few_places() -> None:
    """Each of these has one wrapper; a new one needs a reason here."""
    known = {
        "pace.py": {"_driver"},  # the writer's queue
        "talking.py": {"_notifications", "_unnotify"},  # three toasts at most
    }
    private = {
        "_compositor",
        "_driver",
        "_notifications",
        "_unnotify",
        "_writer_thread",
        "_screen_stack",
        "_bindings",
        "_keymap",
        "_filters",
    }
    for path in FILES:
        used = {node.attr for node in ast.walk(tree_of(path)) if isinstance(node, ast.Attribute)} & private
        assert used <= known.get(name_of(path), set()), f"{name_of(path)}: {used}"
