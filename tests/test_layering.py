"""Which folder may import which: none imports from one to its right, and no modules import one another in a circle."""

import ast
import graphlib
import sys
from pathlib import Path

import pytest

import manifold_opt

PACKAGE = Path(manifold_opt.__file__).parent
LAYERS = ("linalg", "stiefel", "manifolds", "constraints", "optim", "rotations", "compare")
MODULES = {path.relative_to(PACKAGE).with_suffix("").parts: path for path in PACKAGE.rglob("*.py")}


def imports_of(module: tuple[str, ...]) -> set[tuple[str, ...]]:
    """The modules of the package that one imports, and ``("torch",)`` and the like for others."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {(alias.name.split(".")[0],) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(((node.module or "").split(".")[0],))
        elif isinstance(node, ast.ImportFrom):
            base = (*module[: len(module) - node.level], *(node.module.split(".") if node.module else ()))
            for alias in node.names:
                inside = ((*base, alias.name), base, (*base, "__init__"))
                found.add(next(place for place in inside if place in MODULES))
    return found


def test_the_folders_are_those_of_the_layers():
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(LAYERS)
    assert {path.name for path in PACKAGE.iterdir() if path.is_file()} == {
        *("__init__.py", "__main__.py", "init.py", "py.typed")
    }


@pytest.mark.parametrize("layer", LAYERS)
def test_no_import_runs_up(layer):
    above = LAYERS[LAYERS.index(layer) + 1 :]
    for module in MODULES:
        if module[0] == layer:
            assert not [place for place in imports_of(module) if place[0] in above]


def test_no_import_runs_in_a_circle():
    inside = {module for module in MODULES if module != ("__init__",)}
    list(graphlib.TopologicalSorter({m: imports_of(m) & inside for m in inside}).static_order())


def test_the_comparison_uses_public_names_only():
    for module in MODULES:
        if module[0] == "compare":
            below = {place for place in imports_of(module) if place in MODULES and place[0] != "compare"}
            assert below <= {("__init__",), ("init",)}


@pytest.mark.parametrize("layer", ["linalg", "stiefel"])
def test_the_mathematics_needs_torch_only(layer):
    others = {place for m in MODULES if m[0] == layer for place in imports_of(m) if place not in MODULES}
    assert {name for (name,) in others} - {"torch"} <= sys.stdlib_module_names


def test_modules_and_functions_can_be_read_in_one_go():
    for module, path in MODULES.items():
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 350, module
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                docstring = node.body[0] if ast.get_docstring(node) else None
                lines = node.end_lineno - node.lineno + 1
                lines -= docstring.end_lineno - docstring.lineno + 1 if docstring else 0
                assert lines <= 50, (module, node.name)
