"""Optimizers of torch.optim with marked parameters constrained to a manifold."""

from .adam import Adam, AdamW
from .sgd import SGD

__all__ = ["SGD", "Adam", "AdamW"]
