"""The Stiefel manifold: its geometry, and retractions."""

from .geometry import coordinates, error, project, random, transport

__all__ = ["coordinates", "error", "project", "random", "transport"]
