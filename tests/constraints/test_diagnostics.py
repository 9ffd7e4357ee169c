import math

import pytest
import torch
from torch import nn

from manifold_opt import SGD, mark_orthogonal, orthogonality_error, unmark


def test_by_hand():
    assert orthogonality_error(torch.diag(torch.tensor([2.0, 1.0]))) == 3.0
    assert orthogonality_error(torch.zeros(3, 4)) == pytest.approx(3**0.5)
    assert orthogonality_error(torch.zeros(4, 3)) == pytest.approx(3**0.5)


def test_the_worst_of_a_batch():
    assert orthogonality_error(torch.stack([torch.eye(2), 3 * torch.eye(2)])) == pytest.approx(8 * 2**0.5)


def test_a_marked_parameter_is_measured_block_by_block_after_its_gain():
    weight = mark_orthogonal(nn.Parameter(torch.randn(12, 4)), blocks=3, gain=2.5)
    assert orthogonality_error(weight) < 1e-6
    assert orthogonality_error(unmark(weight)) > 1


def test_a_module_reports_its_marked_parameters_by_name():
    net = nn.Sequential(nn.Linear(4, 4), nn.GRU(4, 4))
    assert orthogonality_error(net) == {}
    mark_orthogonal(net, "1.weight_hh_l0")
    assert list(orthogonality_error(net)) == ["1.weight_hh_l0"]


def test_nan_is_not_hidden():
    assert math.isnan(orthogonality_error(torch.full((2, 2), float("nan"))))
    assert math.isnan(orthogonality_error(torch.stack([torch.eye(2), torch.full((2, 2), float("nan"))])))


def test_nan_is_not_hidden_in_a_block_after_others():
    weight = mark_orthogonal(nn.Parameter(torch.eye(6)), blocks=(2, 4))
    weight.data[5, 5] = torch.nan
    assert math.isnan(orthogonality_error(weight))
    assert math.isnan(SGD([weight], lr=0.1).metrics()["orthogonality_error"])


def test_refuses_vectors():
    with pytest.raises(ValueError, match="matrices"):
        orthogonality_error(torch.ones(3))


def test_blocks_of_an_unmarked_stack():
    stack = torch.cat([torch.eye(3), 2 * torch.eye(3), torch.eye(3)])
    assert orthogonality_error(stack, blocks=3) == pytest.approx(3 * 3**0.5)
    assert orthogonality_error(stack) == pytest.approx(5 * 3**0.5)
    weight = mark_orthogonal(nn.Parameter(torch.randn(9, 3)), blocks=3)
    assert orthogonality_error(weight, blocks=3) == orthogonality_error(weight)
    for x, blocks in ((stack, 2), (stack, 0), (weight, 1), (nn.Linear(2, 2), 1)):
        with pytest.raises(ValueError, match="blocks"):
            orthogonality_error(x, blocks=blocks)


def test_of_no_matrices_none_is_off():
    assert orthogonality_error(torch.empty(0, 3, 3)) == 0
