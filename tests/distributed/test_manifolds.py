"""Constraints of every kind on sharded weights: the same steps, metrics and errors as on one rank."""

import functools
import math

import geoopt
import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from manifold_opt import (
    check,
    constraint_of,
    mark_fixed_spectrum,
    mark_manifold,
    mark_orthogonal,
    mark_positive,
    mark_spectral,
    mark_unit_norm,
    orthogonality_error,
    project_to_manifold_,
)

from ..helpers import gaussian
from .layouts import columns, hybrid, like, optimizer, rows, train, whole
from .workers import run

WAYS = {"rows": rows, "columns": columns, "hybrid": hybrid}
MARKS = {
    "gates": ((24, 8), mark_orthogonal, {"blocks": 3}),
    "uneven blocks": ((14, 8), mark_orthogonal, {"blocks": (2, 5, 7)}),
    "some blocks": ((24, 8), mark_orthogonal, {"blocks": 3, "which": (0, 2)}),
    "along columns": ((4, 12), mark_orthogonal, {"blocks": 3, "dim": 1}),
    "gain": ((5, 8), mark_orthogonal, {"gain": 2.0}),
    "batch": ((3, 8, 4), mark_orthogonal, {"flatten": False}),
    "filters": ((6, 4, 3, 3), mark_orthogonal, {}),
    "unit rows": ((9, 4), mark_unit_norm, {}),
    "unit columns": ((9, 4), mark_unit_norm, {"dim": 1}),
    "padded rows": ((9, 4), mark_unit_norm, {"padding_idx": 5}),
    "positive": ((7,), mark_positive, {}),
    "positive matrix": ((7, 4), mark_positive, {}),
    "spectral": ((9, 12), mark_spectral, {"bound": 0.7}),
    "spectral filters": ((9, 4, 2, 2), mark_spectral, {"bound": 0.7}),
    "rotated rows": ((6, 8), mark_fixed_spectrum, {"side": "left"}),
    "rotated columns": ((6, 8), mark_fixed_spectrum, {"side": "right"}),
    "rotated": ((12, 8), mark_fixed_spectrum, {"blocks": 2, "side": "both"}),
    "spheres": ((5, 4), mark_manifold, {"manifold": geoopt.Sphere()}),
    "frames": ((5, 8, 4), mark_manifold, {"manifold": geoopt.CanonicalStiefel()}),
}
RULES = {
    "SGD": {},
    "Adam": {"amsgrad": True},
    "AdamW": {"metric": "canonical", "weight_decay": 0.1},
    "by block": {"second_moment": "block"},
    "Muon": {},
}


class Weights(nn.Module):
    def __init__(self, marks):
        super().__init__()
        for k, name in enumerate(marks):
            shape, mark, _ = MARKS[name]
            value = gaussian(*shape, dtype=torch.float32, seed=k)
            setattr(self, name, nn.Parameter(value.abs() + 0.1 if mark is mark_positive else value))


def takes(rule, name):
    """Whether an optimizer takes weights with a mark."""
    if rule == "Muon":
        return MARKS[name][1] in (mark_orthogonal, mark_fixed_spectrum)
    return rule != "by block" or name not in ("some blocks", "padded rows", "rotated")


def mark_all(net):
    for name, _ in net.named_parameters():
        _, mark, options = MARKS[name]
        mark(net, name, **options)


def trained(way, world, rule, marked_first):
    """What is known of the weights after 8 steps."""
    net = Weights([name for name in MARKS if takes(rule, name)])
    if marked_first:
        mark_all(net)
    if world:
        WAYS[way](net, world)
        assert all(isinstance(p, DTensor) for p in net.parameters())
    if not marked_first:
        mark_all(net)
    opt = optimizer("Adam" if rule == "by block" else rule, net.parameters(), **RULES[rule])
    assert len(constraint_of(net)) == len(list(net.parameters()))
    started = [whole(p) for p in net.parameters()]
    train(net.parameters(), opt, 8)
    assert check(net, opt) == []
    found = {
        "started": started,
        "trained": [whole(p) for p in net.parameters()],
        "orthogonality": orthogonality_error(net),
    }
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.3)
    project_to_manifold_(net)
    return {**found, "projected": [whole(p) for p in net.parameters()], "marks": constraint_of(net)}


single = functools.cache(functools.partial(trained, None, 0))


@pytest.mark.parametrize(
    ("way", "world", "rule", "marked_first"),
    [
        ("rows", 4, "SGD", True),
        ("rows", 2, "Adam", False),
        ("columns", 4, "AdamW", False),
        ("hybrid", 4, "by block", True),
        ("columns", 2, "SGD", True),
        ("rows", 4, "Muon", True),
    ],
)
def test_every_constraint(way, world, rule, marked_first):
    expected = single(rule, marked_first)
    for found in run(world, trained, way, world, rule, marked_first):
        assert found["marks"] == expected["marks"]
        for key in ("started", "trained", "projected"):
            for name, one, other in zip(expected["marks"], expected[key], found[key], strict=True):
                # Rounding of sums and products in batches of other sizes; lengths up to the gain of 2.
                atol = 2 * 8 * torch.finfo(one.dtype).eps * math.sqrt(max(one.shape))
                torch.testing.assert_close(
                    other, one, rtol=0, atol=atol, msg=lambda text, at=(key, name): f"{at}: {text}"
                )
        assert found["orthogonality"] == pytest.approx(expected["orthogonality"], abs=1e-5)


def measured(world):
    """Metrics before a step, after steps, one of which has a gradient that is not finite and a long one."""
    net = Weights(MARKS)
    mark_all(net)
    if world:
        rows(net, world)
    opt = optimizer("SGD", net.parameters(), lr=0.01, retraction="orthogonalizer")  # whose steps have a longest one
    found = [opt.metrics()]
    train(net.parameters(), opt, 2)
    found.append(opt.metrics())
    bad = gaussian(24, 8, dtype=torch.float32)
    bad[9] = torch.nan
    net.gates.grad = like(bad, net.gates)
    net.gain.grad = like(gaussian(5, 8, dtype=torch.float32) * 1e4, net.gain)
    opt.step()
    return [*found, opt.metrics()]


@pytest.mark.parametrize("world", [2, 4])
def test_metrics(world):
    expected = measured(0)
    assert expected[-1]["skipped_blocks"] == 1
    assert expected[-1]["clamped_steps"] > 0
    for found in run(world, measured, world):
        for one, other in zip(expected, found, strict=True):
            assert other == pytest.approx(one, rel=1e-3, abs=1e-5, nan_ok=True)
