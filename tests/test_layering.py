"""Who may import whom: the mathematics knows no optimizer, and nothing knows the face."""

import ast
from pathlib import Path

import pytest

import manifold_opt

PACKAGE = Path(manifold_opt.__file__).parent

ALLOWED = {
    "stiefel": set(),
    "products": set(),
    "precision": set(),
    "tally": {"products"},
    "room": {"products"},
    "orthogonalizer": {"products", "stiefel"},
    "polar_factor": {"orthogonalizer", "products", "room", "stiefel", "tally"},
    "schemes": {"orthogonalizer", "polar_factor", "products", "room", "stiefel", "tally"},
    "orthographic": {"orthogonalizer", "polar_factor", "products", "room", "schemes", "stiefel"},
    "retractions": {"orthogonalizer", "orthographic", "products", "schemes", "stiefel", "tally"},
    "direction": {"products", "room", "stiefel"},
    "blocks": set(),
    "constraint": {"blocks", "orthogonalizer", "precision", "stiefel"},
    "survival": {"constraint"},
    "marking": {"constraint", "survival"},
    "health": {"constraint", "options", "retractions", "survival"},
    "diagnostics": {"blocks", "constraint", "stiefel"},
    "init": {"blocks", "constraint", "stiefel"},
    "options": {"constraint", "direction", "retractions"},
    "buckets": {"blocks", "constraint", "products", "room"},
    "moments": {"buckets", "constraint", "direction", "precision"},
    "plan": {"buckets", "constraint", "moments", "options", "retractions", "room", "tally"},
    "rules": {"buckets", "direction", "options", "products"},
    "unmarked": {"options"},
    "step": {
        *("buckets", "constraint", "options", "orthographic", "plan", "precision", "products"),
        *("retractions", "room", "rules", "schemes", "tally", "unmarked"),
    },
    "metrics": {"constraint", "diagnostics", "precision", "stiefel", "tally"},
    "optim": {"direction", "metrics", "moments", "options", "plan", "rules", "step", "stiefel", "unmarked"},
}


COMPARE = {
    "results": set(),
    "contenders": set(),
    "data": set(),
    "progress": set(),
    "tasks": {"data"},
    "runner": {"contenders", "results", "tasks"},
    "cost": {"contenders", "results"},
    "session": {"contenders", "cost", "results", "runner", "tasks"},
    "words": {"results"},
    "plots": {"results"},
    "table": {"results", "words"},
    "page": {"plots", "results", "words"},
    "api": {"contenders", "page", "plots", "results", "runner", "session", "table", "tasks"},
    "cli": {
        *("api", "contenders", "cost", "data", "page", "plots", "progress"),
        *("results", "runner", "session", "tasks"),
    },
}


def imports_of(module: str, level: int = 1) -> set[str]:
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    return {
        name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == level
        for name in ([node.module] if node.module else [alias.name for alias in node.names])
    }


def test_every_module_has_its_place():
    assert {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"} == set(ALLOWED)
    assert {path.stem for path in (PACKAGE / "compare").glob("*.py")} - {"__init__"} == set(COMPARE)


@pytest.mark.parametrize("module", sorted(ALLOWED))
def test_imports_go_down_only(module):
    assert imports_of(module) <= ALLOWED[module]


@pytest.mark.parametrize("module", sorted(COMPARE))
def test_the_comparison_stands_on_the_face(module):
    assert imports_of(f"compare/{module}") <= COMPARE[module]
    face = {*manifold_opt.__all__, "__version__", "stiefel", "init"}
    assert imports_of(f"compare/{module}", level=2) <= face | {"constraint"}


@pytest.mark.parametrize(
    "module",
    [
        *("stiefel", "tally", "room", "products", "orthogonalizer", "polar_factor"),
        *("schemes", "orthographic", "retractions", "direction"),
    ],
)
def test_the_mathematics_needs_torch_only(module):
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    roots = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom) and not node.level
            else []
        )
    }
    assert roots <= {"torch", "functools", "collections", "dataclasses", "typing", "__future__", "math", "itertools"}
