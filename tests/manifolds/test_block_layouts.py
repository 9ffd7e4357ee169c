"""Blocks of unequal size, some of them free, along columns, in batches, of layers: where they lie, how they move."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import manifold_opt
from manifold_opt import (
    RETRACTIONS,
    Orthogonal,
    constraint_of,
    init,
    mark_orthogonal,
    nearest_orthogonal,
    orthogonality_error,
    project_to_manifold_,
    unmark,
)
from manifold_opt.linalg.matrices import float64
from manifold_opt.stiefel.geometry import error

from ..helpers import DTYPES, each, gaussian, rounding
from ..reference import loop as reference

LAYOUTS = {
    "uneven": ((16, 5), {"blocks": (4, 4, 8)}),
    "wide, square and tall": ((14, 5), {"blocks": (2, 5, 7)}),
    "one of three": ((12, 4), {"blocks": 3, "which": (1,)}),
    "the first and the last": ((16, 6), {"blocks": (4, 6, 6), "which": (0, -1)}),
    "columns": ((5, 16), {"blocks": (4, 5, 7), "dim": 1}),
    "some columns": ((4, 12), {"blocks": 3, "which": (0, 2), "dim": 1}),
    "a batch": ((3, 4, 6), {"flatten": False}),
    "a batch of batches, tall": ((2, 2, 7, 3), {"flatten": False}),
    "a matrix as a batch of one": ((4, 4), {"flatten": False}),
    "gates of an ensemble": ((2, 12, 4), {"blocks": 3, "flatten": False}),
    "wide blocks of a batch": ((3, 4, 5), {"blocks": 2, "flatten": False}),
    "filters in groups": ((8, 2, 3), {"blocks": 2}),
    "filters, uneven": ((6, 2, 2, 3), {"blocks": (1, 5)}),
    "some filters of three dimensions": ((4, 2, 2, 1, 2), {"blocks": 4, "which": (3,)}),
}

RULES = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.2}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}),
    ("Adam", {"lr": 0.05, "amsgrad": True}),
    ("Adam", {"lr": 0.05, "second_moment": "block"}),
    ("AdamW", {"lr": 0.05, "maximize": True}),
]


def cut(tensor, options):
    """The blocks of a tensor and which of them are free, by the words of the documentation: views."""
    if not options.get("flatten", True):
        each = tensor.shape[-2] // options.get("blocks", 1)
        return [block for m in tensor.reshape(-1, *tensor.shape[-2:]) for block in m.split(each)], []
    matrix, dim, blocks = tensor.flatten(1), options.get("dim", 0), options["blocks"]
    each = matrix.shape[dim] // blocks if isinstance(blocks, int) else list(blocks)
    every = matrix.split(each, dim)
    which = [k % len(every) for k in options.get("which", range(len(every)))]
    return [every[k] for k in which], [block for k, block in enumerate(every) if k not in which]


def marked(layout, dtype=torch.float64, gain=1.0, seed=0):
    shape, options = LAYOUTS[layout]
    return mark_orthogonal(nn.Parameter(gaussian(*shape, dtype=dtype, seed=seed)), **options, gain=gain)


# Where they lie.


@each(layout=LAYOUTS, dtype=[*DTYPES, torch.complex64], gain=[1.0, 1.7])
def test_every_block_becomes_its_polar_factor_and_the_others_keep_their_bits(layout, dtype, gain):
    shape, options = LAYOUTS[layout]
    before = cut(gaussian(*shape, dtype=dtype, seed=0), options)
    weight = marked(layout, dtype, gain)
    blocks, free = cut(weight.detach(), options)
    for block, old in zip(blocks, before[0], strict=True):
        atol = 64 * gain * torch.finfo(dtype).eps  # in float64 over the smallest singular value, here 0.05 at least
        torch.testing.assert_close(block, gain * nearest_orthogonal(old), rtol=0, atol=atol)
        assert float(error(block / gain)) < rounding(block)
    assert all(torch.equal(block, old) for block, old in zip(free, before[1], strict=True))
    largest = max(float(error(float64(block) / gain)) for block in blocks)
    assert orthogonality_error(weight) == pytest.approx(largest, rel=1e-6, abs=2e-15)  # float64 measures itself


def test_by_hand():
    """The second block is a rotation by a quarter, stretched; the first stays, the last is one wide row of (3, 4)."""
    value = torch.tensor([[7.0, 8.0], [0.0, 2.0], [-3.0, 0.0], [3.0, 4.0]])
    weight = mark_orthogonal(nn.Parameter(value), blocks=(1, 2, 1), which=(2, 1))
    torch.testing.assert_close(weight.detach(), torch.tensor([[7.0, 8.0], [0.0, 1.0], [-1.0, 0.0], [0.6, 0.8]]))
    assert constraint_of(weight) == Orthogonal((1, 2, 1), which=(1, 2))
    assert repr(constraint_of(weight)) == "Orthogonal(blocks=(1, 2, 1), dim=0, gain=1.0, which=(1, 2))"


def test_all_blocks_by_number_are_all_blocks():
    for which in ((0, 1, 2), (2, 1, 0, 0), (-1, -2, -3), range(3), torch.arange(3)):
        assert constraint_of(mark_orthogonal(nn.Parameter(gaussian(9, 3)), 3, which=which)) == Orthogonal(3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_initialized_and_projected_where_they_lie(layout):
    weight = marked(layout, gain=2.0)
    free = [block.clone() for block in cut(weight.detach(), LAYOUTS[layout][1])[1]]
    init.orthogonal_(weight)
    blocks, others = cut(weight.detach(), LAYOUTS[layout][1])
    assert max(float(error(block / 2)) for block in blocks) < 1e-13
    net = nn.ParameterList([weight])
    before = weight.detach().clone()
    with torch.no_grad():
        blocks[-1] *= 1.5
    assert orthogonality_error(weight) > 1
    project_to_manifold_(net)
    torch.testing.assert_close(weight.detach(), before, rtol=0, atol=1e-14)
    assert all(torch.equal(block, old) for block, old in zip(others, free, strict=True))


@pytest.mark.parametrize("options", [{"blocks": (3, 5)}, {"blocks": 2, "which": (1,)}])
def test_put_back_in_a_memory_format_that_hides_them(options):
    conv = nn.Conv2d(3, 8, 3, dtype=torch.float64)
    mark_orthogonal(conv, "weight", **options)
    expected = conv.weight.detach().clone()
    conv.to(memory_format=torch.channels_last)
    with torch.no_grad():
        conv.weight[4:] *= 3
    project_to_manifold_(conv)
    torch.testing.assert_close(conv.weight.detach()[4:], expected[4:], rtol=0, atol=1e-14)
    assert torch.equal(conv.weight.detach()[:3], expected[:3])


# How they move.


@each({"name, options": RULES}, layout=LAYOUTS, retraction=["orthographic", "cayley"])
def test_every_block_steps_as_the_reference(layout, name, options, retraction):
    if "which" in LAYOUTS[layout][1] and options.get("second_moment") == "block":
        pytest.skip("is refused")
    weight = marked(layout)
    where = LAYOUTS[layout][1]
    start = [block.clone() for block in cut(weight.detach(), where)[0]]
    gradients = [gaussian(*weight.shape, seed=k + 1) for k in range(4)]
    opt = getattr(manifold_opt, name)([weight], retraction=retraction, **options)
    for gradient in gradients:
        weight.grad = gradient.clone()
        opt.step()
        assert torch.equal(weight.grad, gradient)
    for k, block in enumerate(cut(weight.detach(), where)[0]):
        own = [cut(gradient, where)[0][k] for gradient in gradients]
        # Four steps of about a hundred products of rounding 2e-16 each; with the root of a second moment, its root.
        torch.testing.assert_close(block, reference.train(start[k], own, name, options, retraction), rtol=0, atol=1e-9)


@each(layout=LAYOUTS, metric=["euclidean", "canonical"], retraction=RETRACTIONS, gain=[1.0, 0.4])
def test_every_block_steps_as_a_parameter_of_its_own(layout, metric, retraction, gain):
    where = LAYOUTS[layout][1]
    weight = marked(layout, gain=gain)
    apart = [mark_orthogonal(nn.Parameter(block.clone()), 1, gain=gain) for block in cut(weight.detach(), where)[0]]
    options = {"lr": 0.03, "momentum": 0.9, "metric": metric, "retraction": retraction, "orthogonal_lr_scale": 0.5}
    opt, single = manifold_opt.SGD([weight], **options), manifold_opt.SGD(apart, **options)
    for step in range(6):
        weight.grad = gaussian(*weight.shape, seed=step)
        for p, gradient in zip(apart, cut(weight.grad, where)[0], strict=True):
            p.grad = gradient.clone()
        opt.step()
        single.step()
    for block, p in zip(cut(weight.detach(), where)[0], apart, strict=True):
        torch.testing.assert_close(block, p.detach(), rtol=0, atol=1e-11)  # products of another batch are summed anew


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_parameter_stays_where_it_is_and_on_its_manifold(layout):
    weight = marked(layout, torch.float32)
    pointer, plans = weight.data_ptr(), []
    opt = manifold_opt.Adam([weight], lr=0.1)
    for step in range(30):
        weight.grad = gaussian(*weight.shape, dtype=torch.float32, seed=step)
        opt.step()
        plans.append(opt._engine.plan)
    assert weight.data_ptr() == pointer
    assert plans[-1] is plans[0]  # nothing is found anew, or converted, in a step
    assert all(float(error(block)) < rounding(block) for block in cut(weight.detach(), LAYOUTS[layout][1])[0])


# Layers.


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = {
    **{kind.__name__: (kind, (4, 8, 3)) for kind in CONVOLUTIONS},
    "Embedding": (nn.Embedding, (10, 4)),
    "Bilinear": (nn.Bilinear, (3, 4, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("flatten", [True, False])
def test_layers(name, flatten):
    kind, arguments = LAYERS[name]
    torch.manual_seed(0)
    layer = kind(*arguments)
    mark_orthogonal(layer, "weight", flatten=flatten)
    opt = manifold_opt.Adam(layer.parameters(), lr=0.01)
    for step in range(3):
        layer.weight.grad = gaussian(*layer.weight.shape, dtype=torch.float32, seed=step)
        opt.step()
    weight = layer.weight.detach()
    assert float(error(weight.flatten(1) if flatten else weight).max()) < 1e-5
    assert manifold_opt.check(layer, opt) == []


@pytest.mark.parametrize("layer", [(nn.Linear, 5, 3), (nn.Linear, 3, 5), (nn.Conv1d, 2, 3, 4), (nn.Conv2d, 2, 3, 4)])
@pytest.mark.parametrize("orthogonal_map", ["householder", "cayley", "matrix_exp"])
def test_a_batch_is_what_torchs_parametrization_takes_for_one(layer, orthogonal_map):
    """What it has made orthogonal is so to us, and keeps its bits."""
    torch.manual_seed(0)
    kind, *arguments = layer
    made = kind(*arguments).double()
    parametrizations.orthogonal(made, orthogonal_map=orthogonal_map)
    value = made.weight.detach().contiguous()
    assert torch.equal(mark_orthogonal(nn.Parameter(value.clone()), flatten=False).detach(), value)


# What is refused, before anything is written.


def test_a_gain_that_the_dtype_has_no_number_for_is_refused():
    """Nothing is written; and a start with it is refused likewise."""
    weight = nn.Parameter(gaussian(4, 4, dtype=torch.float16))
    before = weight.detach().clone()
    for give in (mark_orthogonal, init.orthogonal_):
        with pytest.raises(ValueError, match=r"has dtype torch.float16, in which gain=100000.0 is infinite"):
            give(weight, gain=1e5)
    assert torch.equal(weight, before)


@pytest.mark.parametrize(
    ("shape", "options", "match"),
    [
        ((9, 3), {"blocks": (3, 3)}, r"blocks=\(3, 3\) must add up to the 9 of dim 0, not 6"),
        ((3, 9), {"blocks": (3, 3), "dim": 1}, r"blocks=\(3, 3\) must add up to the 9 of dim 1, not 6"),
        ((9, 3), {"blocks": (9, 0)}, r"whole numbers of rows >= 1 for its blocks, got blocks=\(9, 0\)"),
        ((9, 3), {"blocks": (10, -1)}, "whole numbers of rows >= 1"),
        ((9, 3), {"blocks": ()}, "whole numbers of rows >= 1"),
        ((9, 3), {"blocks": (4.5, 4.5)}, "whole numbers of rows >= 1"),
        ((9, 3), {"blocks": (8, True)}, "whole numbers of rows >= 1"),
        ((9, 3), {"blocks": 2}, r"must divide dim 0.*blocks=\(64, 64, 128\)"),
        ((9, 3), {"blocks": 3, "which": (3,)}, r"3 blocks: which=\(3,\) must name some of 0 to 2\."),
        ((9, 3), {"blocks": 3, "which": (0, -4)}, r"which=\(0, -4\) must name"),
        ((9, 3), {"blocks": (3, 6), "which": (2,)}, r"2 blocks: which=\(2,\) must name some of 0 to 1"),
        ((9, 3), {"blocks": 3, "which": ()}, r"which=\(\) must name some"),
        ((9, 3), {"blocks": 3, "which": 1}, "which=1 must name"),
        ((9, 3), {"blocks": 3, "which": "012"}, "which='012' must name"),
        ((9, 3), {"blocks": 3, "which": (1.0,)}, r"which=\(1.0,\) must name"),
        ((9, 3), {"blocks": 3, "which": (False,)}, r"which=\(False,\) must name"),
        ((3, 3, 3), {"blocks": 3, "dim": 1}, "along dim 0, or dim 1 of a matrix"),
        ((3, 3, 3), {"blocks": (1, 2), "flatten": False}, "batch of matrices with flatten=False"),
        ((3, 3, 3), {"blocks": 3, "which": (0,), "flatten": False}, "batch of matrices with flatten=False"),
        ((6, 4, 4), {"blocks": 3, "flatten": False}, "blocks=3 must divide dim 1"),
        ((3, 3), {"flatten": False, "dim": 1}, "leave out which and dim"),
        ((3, 3), {"flatten": 0}, "flatten=True or False, got 0"),
        ((3,), {"flatten": False}, "at least 2 dimensions"),
    ],
)
def test_refuses_with_the_rule_and_writes_nothing(shape, options, match):
    weight = nn.Parameter(gaussian(*shape))
    before = weight.detach().clone()
    with pytest.raises(ValueError, match=match):
        mark_orthogonal(weight, **options)
    assert torch.equal(weight, before)
    assert constraint_of(weight) is None


def test_a_rank_deficient_block_is_refused_only_where_it_is_to_be_orthogonal():
    value = gaussian(9, 3)
    value[3:6] = 0
    weight = nn.Parameter(value.clone())
    with pytest.raises(ValueError, match="rank-deficient"):
        mark_orthogonal(weight, (3, 3, 3), which=(0, 1))
    assert torch.equal(weight, value)
    mark_orthogonal(weight, (3, 3, 3), which=(0, 2))
    assert torch.equal(weight[3:6], value[3:6])


def test_another_layout_on_a_marked_parameter_is_refused():
    weight = marked("one of three")
    with pytest.raises(ValueError, match=r"already marked as .*which=\(1,\).*call unmark"):
        mark_orthogonal(weight, 3)
    with pytest.raises(ValueError, match="already marked"):
        mark_orthogonal(weight, (4, 4, 4), which=(1,))
    mark_orthogonal(weight, 3, which=(-2,))
    mark_orthogonal(unmark(weight), 3)
