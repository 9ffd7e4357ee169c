"""Linear and embedding layers whose weights are rotated by a bank in every forward pass, and merged later."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (its usual name)

from ..constraints.tag import constraint_of
from .bank import RotationBank
from .rounding import RoundToNearest


class RotatedLinear(nn.Module):
    r"""A linear layer between rotated coordinates: it takes :math:`x R_1` and returns :math:`y R_2`.

    With the weight W and the bias b of ``linear``, it computes

    .. math:: x \mapsto x\,(R_2^\top W \operatorname{diag}(g) R_1)^\top + b R_2.

    If ``linear`` maps :math:`x \operatorname{diag}(g)` to y, this layer maps :math:`x R_1` to :math:`y R_2`. The
    rotated weight is computed in every forward pass, in float32 at least, so that the rotations get gradients. The
    weight and the bias stay as they are, until :func:`merge_rotations` replaces the layer by a plain one.

    Args:
        linear: the layer, whose parameters are taken over.
        bank: holds the rotations. The layer refers to it, and does not contain it as a submodule.
        inputs: name of the rotation :math:`R_1` of the inputs, or None.
        outputs: name of the rotation :math:`R_2` of the outputs, or None.
        scale: g, factors of the inputs ``(in_features,)``, such as the weight of an RMSNorm before the layer, or None.

    Attributes:
        round_weight: rounding of the rotated weight, or None; set by :func:`simulate_rounding`.
        round_inputs: rounding of the inputs, or None.

    Raises:
        KeyError: the bank has no rotation of a name.
        ValueError: a rotation does not fit the layer, or its weight is quantized, marked or no plain parameter.

    >>> import torch
    >>> from manifold_opt.rotations import RotatedLinear, RotationBank
    >>> bank = RotationBank()
    >>> rotation = bank.add("inputs", 8)
    >>> linear, x = torch.nn.Linear(8, 3), torch.randn(2, 8)
    >>> torch.allclose(RotatedLinear(linear, bank, inputs="inputs")(x @ rotation), linear(x), atol=1e-5)
    True
    """

    def __init__(
        self,
        linear: nn.Linear,
        bank: RotationBank,
        *,
        inputs: str | None = None,
        outputs: str | None = None,
        scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        _check_weight(linear)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.inputs, self.outputs = inputs, outputs
        self.register_buffer("scale", scale, persistent=True)
        self.round_weight: RoundToNearest | None = None
        self.round_inputs: RoundToNearest | None = None
        self._bank = (bank,)  # in a tuple, so that it does not become a submodule
        self.train(linear.training)
        for name, width in ((inputs, self.in_features), (outputs, self.out_features)):
            if name is not None:
                bank.repeats(name, width)

    scale: Tensor | None

    @property
    def bank(self) -> RotationBank:
        """The bank of the rotations."""
        return self._bank[0]

    def rotated_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        r"""Return :math:`R_2^\top W \operatorname{diag}(g) R_1`, in ``dtype`` at least."""
        weight = self.weight.to(torch.promote_types(self.weight.dtype, dtype))
        if self.scale is not None:
            weight = weight * self.scale.to(weight)
        if self.inputs is not None:
            weight = self.bank(weight, self.inputs)
        if self.outputs is not None:
            weight = self.bank(weight.mT, self.outputs).mT
        return weight

    def rotated_bias(self) -> Tensor | None:
        r"""Return :math:`b R_2`, or None without a bias."""
        if self.bias is None or self.outputs is None:
            return self.bias
        bias: Tensor = self.bank(self.bias, self.outputs)
        return bias

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs for rotated inputs, ``(..., in_features)`` to ``(..., out_features)``, dtype of x."""
        weight, bias = self.rotated_weight(), self.rotated_bias()
        if self.round_weight is not None:
            weight = self.round_weight(weight)
        if self.round_inputs is not None:
            x = self.round_inputs(x)
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Return a plain linear layer with the rotated weight, computed in float64 and rounded once to its dtype."""
        plain = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        plain.weight, plain.bias = self.weight, self.bias
        if self.inputs or self.outputs or self.scale is not None:
            plain.weight = _like(self.rotated_weight(torch.float64), self.weight)
        if self.outputs and self.bias is not None:
            plain.bias = _like(self.bank(self.bias.double(), self.outputs), self.bias)
        return plain.train(self.training)

    def extra_repr(self) -> str:
        """Return the sizes and the rotations."""
        return f"{self.in_features}, {self.out_features}, inputs={self.inputs}, outputs={self.outputs}"


class RotatedEmbedding(nn.Module):
    r"""An embedding whose rows are rotated: it returns :math:`e R`, in the dtype of the weight.

    Args:
        embedding: the layer, whose weight is taken over.
        bank: holds the rotation. The layer refers to it, and does not contain it as a submodule.
        outputs: name of the rotation R.

    >>> import torch
    >>> from manifold_opt.rotations import RotatedEmbedding, RotationBank
    >>> bank = RotationBank()
    >>> rotation = bank.add("residual", 8)
    >>> embedding = torch.nn.Embedding(5, 8)
    >>> rotated = RotatedEmbedding(embedding, bank, outputs="residual")
    >>> torch.allclose(rotated(torch.tensor([3])), embedding.weight[3] @ rotation)
    True
    """

    def __init__(self, embedding: nn.Embedding, bank: RotationBank, *, outputs: str) -> None:
        super().__init__()
        self.embedding, self.outputs = embedding, outputs
        self._bank = (bank,)
        self.train(embedding.training)
        bank.repeats(outputs, embedding.embedding_dim)

    @property
    def bank(self) -> RotationBank:
        """The bank of the rotation."""
        return self._bank[0]

    @property
    def weight(self) -> Tensor:
        """The weight of the embedding, not rotated."""
        return self.embedding.weight

    def forward(self, index: Tensor) -> Tensor:
        """Return the rotated rows, ``(...)`` to ``(..., embedding_dim)``."""
        rows = self.embedding(index)
        rotated: Tensor = self._bank[0](rows, self.outputs)
        return rotated.to(rows.dtype)

    @torch.no_grad()
    def merged(self) -> nn.Embedding:
        """Return an embedding with the rotated rows, computed in float64 and rounded once to their dtype."""
        plain = copy.copy(self.embedding)
        plain._parameters = {"weight": _like(self._bank[0](self.weight.double(), self.outputs), self.weight)}
        return plain


def _check_weight(linear: nn.Linear) -> None:
    """Raise a ValueError if the weight of a layer cannot be rotated and merged."""
    weight, kind = linear.weight, type(linear).__name__
    if not weight.is_floating_point():
        raise ValueError(
            f"RotatedLinear: the weight of {kind} has the dtype {weight.dtype}, so it is quantized already. Rotate "
            "before a model is quantized."
        )
    if not isinstance(weight, nn.Parameter):
        raise ValueError(
            f"RotatedLinear: the weight of {kind} is computed from other parameters, by a parametrization or by "
            "pruning. Make it a parameter first, for example with torch.nn.utils.parametrize.remove_parametrizations."
        )
    if constraint_of(weight) is not None:
        raise ValueError(
            f"RotatedLinear: the weight of {kind} is marked as {constraint_of(weight)}, which a rotation need not "
            "keep. Call unmark on it first."
        )


def _like(values: Tensor, parameter: Any) -> nn.Parameter:
    return nn.Parameter(values.to(parameter.dtype).contiguous(), requires_grad=parameter.requires_grad)
