"""What the examples on recurrent nets share: how they start, and how a weight gets a learning rate of its own."""

from __future__ import annotations

from torch import Tensor, nn

from manifold_opt import init


def orthogonal_start_(net: nn.Module, *, gates: int = 1, scheme: str = "henaff") -> None:
    """Recurrent weights orthogonal, gate by gate; other matrices as Xavier has them; biases zero."""
    for name, parameter in net.named_parameters():
        if "bias" in name:
            nn.init.zeros_(parameter)
        elif "weight_hh" in name:
            init.orthogonal_(parameter, blocks=gates, scheme=scheme)
        else:
            nn.init.xavier_uniform_(parameter)


def apart(net: nn.Module, weight: Tensor, lr: float, lr_of_weight: float) -> list[dict[str, object]]:
    """Two groups, for optimizers that know no scale: everything else, and this weight."""
    rest = [parameter for parameter in net.parameters() if parameter is not weight]
    return [{"params": rest, "lr": lr}, {"params": [weight], "lr": lr_of_weight}]
