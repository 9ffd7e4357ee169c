"""Who may import whom: the mathematics knows no optimizer, and nothing knows the face."""

import ast
from pathlib import Path

import pytest

import manifold_opt

PACKAGE = Path(manifold_opt.__file__).parent

ALLOWED = {
    "stiefel": set(),
    "products": {"stiefel"},
    "precision": set(),
    "tally": {"products"},
    "workspace": {"products"},
    "orthogonalizer": {"products", "stiefel"},
    "polynomials": set(),
    "rotation": {"polynomials", "products", "stiefel", "workspace"},
    "polar_factor": {"polynomials", "products", "rotation", "stiefel", "workspace"},
    "schemes": {"orthogonalizer", "polar_factor", "products", "stiefel", "workspace"},
    "retractions": {
        *("orthogonalizer", "polar_factor", "products", "rotation", "schemes", "stiefel", "tally", "workspace"),
    },
    "direction": {"products", "stiefel", "workspace"},
    "spectral": {"products", "stiefel"},
    "blocks": set(),
    "manifolds": {"blocks", "orthogonalizer", "precision", "schemes", "spectral", "stiefel"},
    "records": {"manifolds"},
    "constraint": {"blocks", "manifolds", "orthogonalizer", "precision", "records", "stiefel"},
    "survival": {"constraint", "manifolds"},
    "door": {"blocks", "constraint", "manifolds", "survival"},
    "marking": {"door", "manifolds"},
    "marks": {"door", "manifolds"},
    "migration": {"constraint", "marking", "stiefel"},
    "init": {"blocks", "constraint", "manifolds", "orthogonalizer", "stiefel"},
    "diagnostics": {"blocks", "constraint", "manifolds", "stiefel", "survival"},
    "options": {"blocks", "constraint", "direction", "manifolds", "precision", "retractions", "survival"},
    "average": {"constraint", "survival"},
    "health": {"constraint", "manifolds", "moments", "options", "precision", "retractions", "survival"},
    "riemannian": {"direction", "manifolds"},
    "buckets": {"blocks", "constraint", "manifolds", "precision", "products", "workspace"},
    "moments": {"blocks", "buckets", "constraint", "direction", "manifolds", "options", "precision", "records"},
    "plan": {
        *("buckets", "constraint", "moments", "options", "products", "retractions", "survival", "tally", "workspace"),
    },
    "rules": {"buckets", "direction", "options", "products", "riemannian"},
    "unmarked": {"moments", "options", "plan", "precision"},
    "context": {"blocks", "options", "products", "tally", "workspace"},
    "update": {
        *("buckets", "context", "direction", "manifolds", "options", "products", "retractions", "rotation", "rules"),
        "workspace",
    },
    "general": {"buckets", "context", "direction", "options", "precision", "products", "riemannian"},
    "step": {
        *("blocks", "buckets", "constraint", "context", "general", "options", "plan", "precision"),
        *("products", "retractions", "unmarked", "update", "workspace"),
    },
    "metrics": {"blocks", "constraint", "diagnostics", "manifolds", "precision", "tally"},
    "loading": {"constraint", "moments", "options", "precision", "records"},
    "optim": {
        *("direction", "loading", "metrics", "moments", "options", "plan", "rules", "step", "stiefel", "unmarked"),
    },
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
    "table": {"results"},
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
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == level
        for name in ([node.module] if node.module else [alias.name for alias in node.names])
    }


def test_every_module_has_its_place():
    assert {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"} == set(ALLOWED) - {"manifolds"}
    assert {path.stem for path in (PACKAGE / "compare").glob("*.py")} - {"__init__"} == set(COMPARE)


@pytest.mark.parametrize("module", sorted(set(ALLOWED) - {"manifolds"}))
def test_imports_go_down_only(module):
    assert imports_of(module) <= ALLOWED[module]


@pytest.mark.parametrize("module", sorted(path.stem for path in (PACKAGE / "manifolds").glob("*.py")))
def test_a_manifold_knows_the_mathematics_only(module):
    assert imports_of(f"manifolds/{module}", level=2) <= ALLOWED["manifolds"]


@pytest.mark.parametrize("module", sorted(COMPARE))
def test_the_comparison_stands_on_the_face(module):
    assert imports_of(f"compare/{module}") <= COMPARE[module]
    assert imports_of(f"compare/{module}", level=2) <= {*manifold_opt.__all__, "__version__"}


@pytest.mark.parametrize(
    "module",
    [
        *("stiefel", "tally", "workspace", "products", "orthogonalizer", "polynomials", "rotation", "polar_factor"),
        *("spectral", "schemes", "retractions", "direction"),
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
