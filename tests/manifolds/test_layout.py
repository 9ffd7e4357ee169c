import pytest
import torch

from manifold_opt.manifolds.layout import BlockLayout, PointMap, SliceLayout, get_points, is_viewable, set_points_

from ..helpers import pairs


def block_view(tensor, blocks, dim=0):
    """The blocks of a tensor as wide matrices."""
    return BlockLayout(tensor.shape[dim] // blocks, dim).view(tensor)


def test_gates_by_hand():
    x = torch.arange(24.0).view(6, 4)
    view = block_view(x, 3)
    assert view.shape == (3, 2, 4)
    assert torch.equal(view[1], x[2:4])


def test_tall_blocks_come_transposed():
    x = torch.arange(24.0).view(12, 2)
    view = block_view(x, 3)
    assert view.shape == (3, 2, 4)
    assert torch.equal(view[1], x[4:8].mT)


def test_blocks_along_the_columns():
    x = torch.arange(24.0).view(2, 12)
    view = block_view(x, 3, dim=1)
    assert view.shape == (3, 2, 4)
    assert torch.equal(view[2], x[:, 8:])


def test_more_dimensions_are_flattened_to_first_and_rest():
    x = torch.arange(36.0).view(2, 2, 3, 3)
    assert torch.equal(block_view(x, 1)[0], x.flatten(1))


@pairs(shape=[(6, 4), (12, 2), (3, 5, 7)], dim=[0, 1], layout=["contiguous", "transposed", "sliced"])
def test_writing_through_the_view_writes_the_tensor(shape, dim, layout):
    if len(shape) > 2 and (dim == 1 or layout != "contiguous"):
        pytest.skip("only contiguous rows can be flattened")
    x = {
        "contiguous": lambda: torch.zeros(shape),
        "transposed": lambda: torch.zeros(shape[::-1]).mT,
        "sliced": lambda: torch.zeros(shape[0], 2 * shape[1])[:, ::2],
    }[layout]()
    view = block_view(x, shape[dim] // 1 if dim == 0 else 1, dim)
    view.fill_(1)
    assert bool((x == 1).all())


@pytest.mark.parametrize(
    "part",
    [
        SliceLayout(3),
        SliceLayout(3, 0),
        SliceLayout(3, 1),
        SliceLayout(3, 2),
        SliceLayout(4),
        SliceLayout(0),
        BlockLayout(2),
        BlockLayout(3, row_dim=1),
    ],
)
def test_rows_and_back(part):
    x = torch.arange(120.0).view(2, 3, 4, 5)
    assert torch.equal(part.from_rows(part.to_rows(x, copy=True), x.shape), x)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    "part",
    [SliceLayout(1), SliceLayout(1, 2), SliceLayout(2, 1, 0, 2), BlockLayout(2), BlockLayout(3, row_dim=1),
     BlockLayout(20, dim=1), BlockLayout(1, start=1, length=1), BlockLayout(2, flatten=False)],
)  # fmt: skip
def test_the_points_of_several_tensors_are_those_of_each(part, count):
    tensors = [torch.arange(120.0).view(2, 3, 4, 5) + 1000 * k for k in range(count)]
    points = PointMap(part, tensors[0], count).points(tensors)
    assert torch.equal(points, torch.cat([get_points(part, tensor) for tensor in tensors]))
    expected = [tensor.clone() for tensor in tensors]
    for tensor in expected:
        set_points_(part, tensor, ..., -get_points(part, tensor))
    many = PointMap(part, tensors[0], count)
    if many.covers:
        assert all(map(torch.equal, many.split(-many.copy(tensors)), expected))
    if is_viewable(part, tensors[0]):
        many.write_(tensors, -many.points(tensors))
        assert all(map(torch.equal, tensors, expected))


def test_the_points_of_one_tensor_are_a_view_and_those_of_several_are_written_to_a_buffer():
    tensors = [torch.zeros(6, 3) for _ in range(2)]
    PointMap(BlockLayout(3), tensors[0], 1).points(tensors[:1]).fill_(1)
    assert bool((tensors[0] == 1).all())
    many = PointMap(BlockLayout(3), tensors[0], 2)
    buffer = torch.empty(many.buffer_shape)
    assert many.points(tensors, buffer).data_ptr() == buffer.data_ptr()
    assert not PointMap(BlockLayout(2), torch.zeros(4, 6, 3).mT, 1).is_view  # flattening its strides needs a copy
