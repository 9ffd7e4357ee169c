"""The oracle: one matrix at a time, in float64, by the textbook, with no thought of speed.

A point is ``(p, n)`` with ``p <= n`` and orthonormal rows. Nothing here is shared with the package.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def tangent_projection(w: Tensor, g: Tensor) -> Tensor:
    """G - sym(G W^T) W, Edelman, Arias & Smith (1998), eq. 2.2."""
    product = g @ w.T
    return g - 0.5 * (product + product.T) @ w


def gradient(w: Tensor, g: Tensor, metric: str) -> Tensor:
    """Riemannian gradient: eq. 2.53 for the canonical metric."""
    return g - w @ g.T @ w if metric == "canonical" else tangent_projection(w, g)


def generator(w: Tensor, v: Tensor) -> Tensor:
    """The n x n skew A with W A = V: (P V)^T W - W^T (P V), P = I - W^T W / 2 from the right (Wen & Yin 2013)."""
    half = v @ (torch.eye(w.shape[1], dtype=w.dtype) - 0.5 * w.T @ w)
    return w.T @ half - half.T @ w


def qr(w: Tensor, v: Tensor) -> Tensor:
    q, r = torch.linalg.qr((w + v).T)
    sign = torch.tensor([-1.0 if entry < 0 else 1.0 for entry in r.diagonal()], dtype=w.dtype)
    return (q * sign).T


def polar(w: Tensor, v: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(w + v, full_matrices=False)
    return u @ vh


def cayley(w: Tensor, v: Tensor) -> Tensor:
    a = generator(w, v)
    identity = torch.eye(len(a), dtype=w.dtype)
    return torch.linalg.solve((identity - a / 2).T, (w @ (identity + a / 2)).T).T


def cayley_iterative(w: Tensor, v: Tensor) -> Tensor:
    a = generator(w, v)
    y = w + v
    for _ in range(2):
        y = w + 0.5 * (w + y) @ a
    return orthogonalizer(y, 0.5)


def exp(w: Tensor, v: Tensor, metric: str) -> Tensor:
    """Geodesics: of the canonical metric W exp(A); of the Euclidean one by integrating its equation of motion."""
    if metric == "canonical" or w.shape[0] == w.shape[1]:
        a = generator(w, v)
        # Of a batch of two: torch 2.13 is off by 2e-11 on a lone matrix.
        return w @ torch.linalg.matrix_exp(torch.stack([a, a]))[0]
    return euclidean_geodesic(w, v)


def euclidean_geodesic(w: Tensor, v: Tensor) -> Tensor:
    """Solve W'' + (W' W'^T) W = 0 (eq. 2.7) from W, W' = V to time one: Runge-Kutta 4, Richardson-extrapolated."""

    def integrate(steps: int) -> Tensor:
        h, x, y = 1.0 / steps, w.clone(), v.clone()
        for _ in range(steps):
            k1x, k1y = y, -(y @ y.T) @ x
            k2x = y + h / 2 * k1y
            k2y = -(k2x @ k2x.T) @ (x + h / 2 * k1x)
            k3x = y + h / 2 * k2y
            k3y = -(k3x @ k3x.T) @ (x + h / 2 * k2x)
            k4x = y + h * k3y
            k4y = -(k4x @ k4x.T) @ (x + h * k3x)
            x = x + h / 6 * (k1x + 2 * k2x + 2 * k3x + k4x)
            y = y + h / 6 * (k1y + 2 * k2y + 2 * k3y + k4y)
        return x

    steps = max(64, math.ceil(200 * float(torch.linalg.matrix_norm(v, 2))))
    return integrate(2 * steps) + (integrate(2 * steps) - integrate(steps)) / 15


def orthogonalizer(x: Tensor, beta: float) -> Tensor:
    return (1 + beta) * x - beta * x @ x.T @ x


def retract(w: Tensor, v: Tensor, method: str, metric: str = "euclidean") -> Tensor:
    """Every scheme by name, with the package's default options."""
    if method == "exp":
        return exp(w, v, metric)
    if method == "orthogonalizer":
        return orthogonalizer(w + v, 0.5)
    return {"qr": qr, "polar": polar, "cayley": cayley, "cayley_iterative": cayley_iterative}[method](w, v)


class Momentum:
    """SGD with momentum: the buffer is transported to each new point, then the new gradient is added."""

    def __init__(self, momentum: float, dampening: float, nesterov: bool) -> None:
        self.momentum, self.dampening, self.nesterov = momentum, dampening, nesterov
        self.buffer: Tensor | None = None

    def direction(self, w: Tensor, g: Tensor) -> Tensor:
        xi = tangent_projection(w, g)
        if self.momentum == 0:
            return xi
        if self.buffer is None:
            self.buffer = xi
        else:
            self.buffer = self.momentum * tangent_projection(w, self.buffer) + (1 - self.dampening) * xi
        return xi + self.momentum * self.buffer if self.nesterov else self.buffer


class Adam:
    """Adam with either second moment, entry by entry where it is element-wise."""

    def __init__(self, beta1: float, beta2: float, eps: float, second_moment: str, amsgrad: bool) -> None:
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        self.second_moment, self.amsgrad = second_moment, amsgrad
        self.m: Tensor | None = None
        self.v = self.largest = torch.zeros(())
        self.t = 0

    def direction(self, w: Tensor, g: Tensor) -> Tensor:
        self.t += 1
        block = self.second_moment == "block"
        g = tangent_projection(w, g) if block else g
        if self.m is None:
            self.m = torch.zeros_like(g)
            self.v = self.largest = torch.zeros((), dtype=g.dtype) if block else torch.zeros_like(g)
        if block:
            self.m = tangent_projection(w, self.m)
        self.m = self.beta1 * self.m + (1 - self.beta1) * g
        self.v = self.beta2 * self.v + (1 - self.beta2) * (g.square().mean() if block else g.square())
        self.largest = torch.maximum(self.largest, self.v)
        m_hat = self.m / (1 - self.beta1**self.t)
        v_hat = (self.largest if self.amsgrad else self.v) / (1 - self.beta2**self.t)
        d = m_hat / (v_hat.sqrt() + self.eps)
        return d if block else self._descending(w, d, m_hat, v_hat)

    def _descending(self, w: Tensor, d: Tensor, m: Tensor, v: Tensor) -> Tensor:
        p, n = w.shape
        omega_d, omega_m = 0.5 * (d @ w.T - w @ d.T), 0.5 * (m @ w.T - w @ m.T)
        rows = [float(row.mean()) for row in v]
        omega = torch.zeros(p, p, dtype=w.dtype)
        for i in range(p):
            for j in range(p):
                rms = ((rows[i] + rows[j]) / 4) ** 0.5
                omega[i, j] = self._entry(float(omega_d[i, j]), float(omega_m[i, j]) / (rms + self.eps))
        tangent = omega @ w
        if p < n:
            normal_d, normal_m = d - d @ w.T @ w, m - m @ w.T @ w
            normal = torch.zeros(p, n, dtype=w.dtype)
            for i in range(p):
                for j in range(n):
                    f = float(normal_m[i, j]) / ((rows[i] * (1 - p / n)) ** 0.5 + self.eps)
                    normal[i, j] = self._entry(float(normal_d[i, j]), f)
            tangent = tangent + normal - normal @ w.T @ w
        return tangent

    @staticmethod
    def _entry(a: float, f: float) -> float:
        """The larger of the two where both point the same way, at most 100 f; f where they do not."""
        if a * f <= 0 or abs(a) < abs(f):
            return f
        return a if abs(a) <= 100 * abs(f) else 100 * f


def in_metric(w: Tensor, tangent: Tensor, metric: str) -> Tensor:
    """The canonical gradient has twice the rotational part: Omega W + N -> 2 Omega W + N."""
    return tangent if metric == "euclidean" else tangent + (tangent @ w.T) @ w
