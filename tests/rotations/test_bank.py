"""RotationBank and random Hadamard matrices."""

import copy

import pytest
import torch
from torch import nn

from manifold_opt import SGD, Adam, check, constraint_of, init, orthogonality_error
from manifold_opt.rotations import RotatedLinear, RotationBank, random_hadamard

from ..helpers import gaussian, seeded


@pytest.mark.parametrize("n", [1, 2, 4, 12, 20, 28, 36, 44, 64, 96, 384, 896])
def test_hadamard(n):
    h = random_hadamard(n, generator=seeded(), dtype=torch.float64)
    torch.testing.assert_close(h @ h.mT, torch.eye(n).double(), atol=1e-14 * n, rtol=0)
    torch.testing.assert_close(h.abs(), torch.full_like(h, n**-0.5), atol=1e-14, rtol=0)
    assert float(torch.linalg.det(h)) > 0


def test_hadamard_is_random():
    assert not torch.equal(random_hadamard(16), random_hadamard(16))
    assert torch.equal(random_hadamard(16, generator=seeded()), random_hadamard(16, generator=seeded()))


@pytest.mark.parametrize("n", [0, 3, 6, 52, -4])
def test_orders_without_a_construction(n):
    with pytest.raises(ValueError, match=f"no construction of order {n} here"):
        random_hadamard(n)


@pytest.mark.parametrize("start", ["hadamard", "identity", "haar"])
def test_every_block_is_a_rotation_and_stays_one(start):
    bank = RotationBank()
    weight = bank.add("heads", 4, blocks=3, start=start, generator=seeded())
    assert weight is bank["heads"]
    assert constraint_of(weight).blocks == 3
    opt = Adam(bank.parameters(), lr=0.5)
    for seed in range(5):
        opt.zero_grad()
        (bank(gaussian(7, 12, dtype=torch.float32, seed=seed), "heads") ** 3).sum().backward()
        opt.step()
    assert [round(float(torch.linalg.det(block.detach())), 4) for block in weight.unflatten(0, (3, 4))] == [1, 1, 1]
    assert orthogonality_error(weight) < 1e-5
    assert check(bank, opt) == []


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("blocks", [1, 2])
def test_rows_are_multiplied_with_the_blocks_on_the_diagonal(blocks, repeats):
    bank = RotationBank()
    weight = bank.add("r", 4, blocks=blocks, start="haar")
    x = gaussian(2, 5, 4 * blocks * repeats, dtype=torch.float32)
    diagonal = torch.block_diag(*(block for block in weight.unflatten(0, (blocks, 4)) for _ in range(repeats)))
    torch.testing.assert_close(bank(x, "r"), x @ diagonal, atol=1e-6, rtol=0)
    assert bank(x.bfloat16(), "r").dtype == torch.float32
    assert bank(x.double(), "r").dtype == torch.float64


def test_a_given_start_is_copied():
    start = init.orthogonal_(torch.empty(8, 4), 2, det=1)
    bank = RotationBank()
    weight = bank.add("r", 4, blocks=2, start=start)
    torch.testing.assert_close(weight.detach(), start, atol=1e-6, rtol=0)
    assert weight.data_ptr() != start.data_ptr()


REFLECTION = torch.diag(torch.tensor([1.0, -1.0]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a", 4), "'a' is in use or not valid"),
        (("a.b", 4), "'a.b' is in use or not valid"),
        (("forward", 4), "'forward' is in use"),
        (("b", 0), "at least 1, got 0 and 1"),
        (("b", 52), "no construction of order 52"),
        (("b", 4, "zeros"), "start must be one of hadamard, identity, haar or a tensor, got 'zeros'"),
        (("b", 4, torch.eye(3)), r"shape \(4, 4\), got \(3, 3\)"),
        (("b", 2, 2 * torch.eye(2)), "a block of the start is not orthogonal with determinant"),
        (("b", 2, REFLECTION), "a block of the start is not orthogonal with determinant"),
        (("b", 2, torch.full((2, 2), torch.nan)), "a block of the start is not orthogonal with determinant"),
    ],
)
def test_bad_arguments_leave_the_bank_as_it_is(arguments, message):
    bank = RotationBank()
    bank.add("a", 2)
    name, size, *start = arguments
    with pytest.raises(ValueError, match=message):
        bank.add(name, size, **({"start": start[0]} if start else {}))
    assert bank.names == ("a",)
    assert len(list(bank.parameters())) == 1


def test_rows_that_do_not_fit_and_unknown_names():
    bank = RotationBank()
    bank.add("a", 4, blocks=2)
    with pytest.raises(ValueError, match=r"2 block\(s\) of 4 and cannot turn rows of 12 entries"):
        bank(torch.ones(3, 12), "a")
    with pytest.raises(KeyError, match="no rotation 'b'; the bank has a"):
        bank(torch.ones(3, 8), "b")
    with pytest.raises(ValueError, match="cannot turn rows of 5 entries"):
        RotatedLinear(nn.Linear(5, 3), bank, inputs="a")
    assert "a" in bank
    assert list(bank) == ["a"]


def test_rotations_stay_in_float32_when_the_model_is_cast():
    bank = RotationBank()
    bank.add("a", 4)
    before = bank["a"].detach().clone()
    net = nn.ModuleDict({"bank": bank, "other": nn.Linear(2, 2)}).bfloat16()
    assert net["other"].weight.dtype == torch.bfloat16
    assert bank["a"].dtype == torch.float32
    assert torch.equal(bank["a"], before)
    assert net.double()["bank"]["a"].dtype == torch.float64
    assert constraint_of(bank["a"]) is not None


def test_autocast_does_not_reach_the_product():
    bank = RotationBank()
    bank.add("a", 16)
    layer, x = RotatedLinear(nn.Linear(16, 4), bank, inputs="a"), gaussian(3, 16, dtype=torch.float32)
    exact = layer.rotated_weight()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.rotated_weight(), exact)
        assert layer(x).dtype == torch.bfloat16


def test_another_default_device():
    bank = RotationBank(device="cpu")
    with torch.device("meta"):
        for start in ("hadamard", "identity", "haar"):
            assert bank.add(start, 4, start=start).device.type == "cpu"


def test_a_copy_is_marked_and_independent():
    bank = RotationBank()
    bank.add("a", 4, start="identity")
    net = nn.ModuleDict({"bank": bank, "layer": RotatedLinear(nn.Linear(4, 4), bank, inputs="a")})
    other = copy.deepcopy(net)
    assert other["layer"].bank is other["bank"]
    opt = SGD(other["bank"].parameters(), lr=0.1)
    other["layer"](torch.ones(1, 4)).square().sum().backward()
    opt.step()
    assert not torch.equal(other["bank"]["a"], bank["a"])
    assert torch.equal(bank["a"], torch.eye(4))
    other["bank"].load_state_dict(bank.state_dict())
    assert torch.equal(other["bank"]["a"], bank["a"])
