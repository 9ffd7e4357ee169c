"""What the examples on recurrent nets share: how they start."""

from __future__ import annotations

from torch import nn

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
