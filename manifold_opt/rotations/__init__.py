"""Rotations of a transformer's weights, learned so that low-bit rounding costs less.

bank = insert_rotations(model)                # the function of the model stays the same
simulate_rounding(model, weights=RoundToNearest(4))
opt = Adam(bank.parameters(), lr=1e-3)        # train on the loss of the rounded model
merge_rotations(model)                        # a model of its own class again
round_linears_(model, RoundToNearest(4))
"""

from .bank import RotationBank
from .hadamard import random_hadamard
from .insertion import insert_rotations, merge_rotations
from .linear import RotatedEmbedding, RotatedLinear
from .rounding import RoundToNearest
from .sgdg import SGDG
from .simulation import round_linears_, simulate_rounding

__all__ = [
    "SGDG",
    "RotatedEmbedding",
    "RotatedLinear",
    "RotationBank",
    "RoundToNearest",
    "insert_rotations",
    "merge_rotations",
    "random_hadamard",
    "round_linears_",
    "simulate_rounding",
]
