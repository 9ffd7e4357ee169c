"""The Stiefel manifold: its geometry, and retractions."""

from .geometry import coordinates, error, random, riemannian_gradient, transport

__all__ = ["coordinates", "error", "random", "riemannian_gradient", "transport"]
