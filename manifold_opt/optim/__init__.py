"""Optimizers of torch.optim that keep marked parameters on their manifold."""

from .optimizers import SGD, Adam, AdamW

__all__ = ["SGD", "Adam", "AdamW"]
