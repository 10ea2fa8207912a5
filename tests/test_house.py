"""The house's own rules, read off the sources: who may import whom, and how long things may be."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("scripts", "stages", "model", "sharding")  # each may import those behind it, and itself
FILES = sorted(p for room in ROOMS for p in (ROOT / room).rglob("*.py"))
STAGES = ("stages/sample.py", "stages/rank.py", "stages/pairs.py", "stages/dpo.py")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def module_file(module: str) -> Path | None:
    path = ROOT / module.replace(".", "/")
    found = [p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()]
    return found[0] if found else None


@cache
def imports(path: Path) -> frozenset[Path]:
    """The project's files that a file imports, wherever in it."""
    modules = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    inner = {module_file(m) for m in modules if m.split(".")[0] in ROOMS}
    return frozenset(inner - {None, path})


def room(path: Path) -> int:
    return ROOMS.index(path.relative_to(ROOT).parts[0])


def test_no_import_goes_up():
    up = [f"{name(a)} → {name(b)}" for a in FILES for b in imports(a) if room(b) < room(a)]
    assert up == []


def test_no_imports_go_in_a_circle():
    done: set[Path] = set()

    def visit(path: Path, way: tuple[Path, ...]) -> None:
        assert path not in way, " → ".join(map(name, (*way[way.index(path) :], path)))
        if path not in done:
            for other in sorted(imports(path)):
                visit(other, (*way, path))
            done.add(path)

    for path in FILES:
        visit(path, ())


def test_a_stage_imports_no_other_stage_and_nothing_that_the_loop_does_not_need():
    stages = {ROOT / stage for stage in STAGES}
    for stage in stages:
        assert not imports(stage) & stages, name(stage)
        closure, todo = set(), [stage]
        while todo:
            path = todo.pop()
            closure.add(path)
            todo += imports(path) - closure
        beside = [
            name(p) for p in closure if "evaluate" in name(p) or name(p).startswith("scripts")
        ]
        assert beside == []


def test_functions_and_files_are_short_enough_to_read():
    assert [name(p) for p in FILES if len(p.read_text().splitlines()) > 600] == []
    long = []
    for path in FILES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > (150 if node.name == "main" else 100):
                    long.append(f"{name(path)}: {node.name} has {lines} lines")
    assert long == []


def test_an_import_inside_a_function_says_why():
    silent = []
    for path in FILES:
        lines = path.read_text().splitlines()
        for function in ast.walk(tree(path)):
            if not isinstance(function, ast.FunctionDef):
                continue
            block_says = False
            for node in ast.walk(function):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    here = lines[node.lineno - 2 : node.end_lineno]
                    block_says = block_says or any("#" in line for line in here)
                    if not block_says:
                        silent.append(f"{name(path)}, line {node.lineno}")
    assert silent == []


def test_no_line_is_exempt_from_the_formatter_or_the_linter():
    marks = [f"# {mark}" for mark in ("fmt:", "noqa")]
    exempt = [
        f"{name(path)}: {line.strip()}"
        for path in [*FILES, *sorted((ROOT / "tests").rglob("*.py"))]
        for line in path.read_text().splitlines()
        if any(mark in line for mark in marks)
    ]
    assert exempt == []


@pytest.mark.parametrize("stage", STAGES)
def test_help_loads_nothing_heavy(stage):
    """Loading JAX or transformers takes seconds, which --help and a wrong flag must not."""
    module = stage.removesuffix(".py").replace("/", ".")
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['x', '--help']\n"
        f"try: runpy.run_module({module!r}, run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'jax', 'flax', 'transformers', 'torch', 'scipy', 'datasets', 'orbax'}\n"
        "sys.exit(', '.join(heavy & sys.modules.keys()) or 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
