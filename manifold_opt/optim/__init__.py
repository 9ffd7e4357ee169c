"""Optimizers of torch.optim that keep marked parameters on their manifold."""

from .adam import Adam, AdamW
from .sgd import SGD

__all__ = ["SGD", "Adam", "AdamW"]
