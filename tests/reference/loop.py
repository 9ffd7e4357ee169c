"""The oracle: one matrix at a time, in float64 or complex128, by the textbook, with no thought of speed.

A point is ``(p, n)`` with ``p <= n`` and orthonormal rows. ^H is the conjugate transpose, of real matrices the
transpose. Nothing here is shared with the package.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def tangent_projection(w: Tensor, g: Tensor) -> Tensor:
    """G - sym(G W^H) W, Edelman, Arias & Smith (1998), eq. 2.2."""
    product = g @ w.mH
    return g - 0.5 * (product + product.mH) @ w


def gradient(w: Tensor, g: Tensor, metric: str) -> Tensor:
    """Riemannian gradient: eq. 2.53 for the canonical metric."""
    return g - w @ g.mH @ w if metric == "canonical" else tangent_projection(w, g)


def generator(w: Tensor, v: Tensor) -> Tensor:
    """The n x n skew A with W A = V: (P V)^H W - W^H (P V), P = I - W^H W / 2 from the right (Wen & Yin 2013)."""
    half = v @ (torch.eye(w.shape[1], dtype=w.dtype) - 0.5 * w.mH @ w)
    return w.mH @ half - half.mH @ w


def qr(w: Tensor, v: Tensor) -> Tensor:
    """The factor Q^H of (W + V)^H = Q R with a diagonal of R that is real and positive."""
    q, r = torch.linalg.qr((w + v).mH)
    phase = torch.tensor([complex(x / x.abs()) if x != 0 else 1.0 for x in r.diagonal()], dtype=torch.complex128)
    return (q * (phase if w.is_complex() else phase.real).to(w.dtype)).mH


def polar(w: Tensor, v: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(w + v, full_matrices=False)
    return u @ vh


def orthographic(w: Tensor, v: Tensor) -> Tensor:
    """(Omega + (I - B)^(1/2)) W, B = Omega Omega^H, of a square matrix while a bound on B is at most 0.49; else polar.

    The eigenvalues of a real B are double, so that the largest is at most |B|_F / sqrt(2), and its square at most
    |B^2|_F / sqrt(2).
    """
    if w.shape[0] != w.shape[1]:
        return polar(w, v)
    omega = 0.5 * (v @ w.mH - w @ v.mH)
    eigenvalues, basis = torch.linalg.eigh(omega @ omega.mH)
    multiplicity = 1 if w.is_complex() else 2
    size, size_of_square = ((eigenvalues**k).norm() / math.sqrt(multiplicity) for k in (1, 2))
    if min(size, size_of_square.sqrt()) > 0.49:
        return polar(w, v)
    return (omega + (basis * (1 - eigenvalues).sqrt()) @ basis.mH) @ w


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
    """Solve W'' + (W' W'^H) W = 0 (eq. 2.7) from W, W' = V to time one: Runge-Kutta 4, Richardson-extrapolated."""

    def integrate(steps: int) -> Tensor:
        h, x, y = 1.0 / steps, w.clone(), v.clone()
        for _ in range(steps):
            k1x, k1y = y, -(y @ y.mH) @ x
            k2x = y + h / 2 * k1y
            k2y = -(k2x @ k2x.mH) @ (x + h / 2 * k1x)
            k3x = y + h / 2 * k2y
            k3y = -(k3x @ k3x.mH) @ (x + h / 2 * k2x)
            k4x = y + h * k3y
            k4y = -(k4x @ k4x.mH) @ (x + h * k3x)
            x = x + h / 6 * (k1x + 2 * k2x + 2 * k3x + k4x)
            y = y + h / 6 * (k1y + 2 * k2y + 2 * k3y + k4y)
        return x

    steps = max(64, math.ceil(200 * float(torch.linalg.matrix_norm(v, 2))))
    fine = integrate(2 * steps)
    return fine + (fine - integrate(steps)) / 15


def orthogonalizer(x: Tensor, beta: float) -> Tensor:
    return (1 + beta) * x - beta * x @ x.mH @ x


def retract(w: Tensor, v: Tensor, method: str, metric: str = "euclidean") -> Tensor:
    """Every scheme by name, with the package's default options."""
    if method == "exp":
        return exp(w, v, metric)
    if method == "orthogonalizer":
        return orthogonalizer(w + v, 0.5)
    schemes = {"qr": qr, "polar": polar, "orthographic": orthographic}
    return {**schemes, "cayley": cayley, "cayley_iterative": cayley_iterative}[method](w, v)


class Momentum:
    """SGD with momentum.

    Square: the buffer is one of the gradient in the frame, G W^H, of which the step takes the skew part. Otherwise
    it is transported to each new point, then the new gradient is added.
    """

    def __init__(self, momentum: float, dampening: float, nesterov: bool) -> None:
        self.momentum, self.dampening, self.nesterov = momentum, dampening, nesterov
        self.buffer: Tensor | None = None

    def direction(self, w: Tensor, g: Tensor) -> Tensor:
        square = w.shape[0] == w.shape[1]
        new = g @ w.mH if square else tangent_projection(w, g)
        if self.momentum == 0:
            return tangent_projection(w, g)
        if self.buffer is None:
            self.buffer = new
        else:
            old = self.buffer if square else tangent_projection(w, self.buffer)
            self.buffer = self.momentum * old + (1 - self.dampening) * new
        step = new + self.momentum * self.buffer if self.nesterov else self.buffer
        return 0.5 * (step - step.mH) @ w if square else step


class Adam:
    """Adam with either second moment, entry by entry where it is element-wise, and there part by part if complex."""

    def __init__(self, beta1: float, beta2: float, eps: float, second_moment: str, amsgrad: bool) -> None:
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        self.block, self.amsgrad = second_moment == "block", amsgrad
        self.m: Tensor | float = 0.0
        self.v: list[Tensor] | None = None
        self.largest: list[Tensor] | None = None
        self.t = 0

    def direction(self, w: Tensor, g: Tensor) -> Tensor:
        self.t += 1
        square = w.shape[0] == w.shape[1]
        if square:
            g = g @ w.mH
            if self.block:
                g = 0.5 * (g - g.mH)
        elif self.block:
            g = tangent_projection(w, g)
            self.m = tangent_projection(w, self.m) if self.t > 1 else self.m
        self.m = self.beta1 * self.m + (1 - self.beta1) * g
        squares = [part.square() for part in parts(g)]
        if self.block:
            squares = [torch.stack(squares).mean()]
        zeros = [torch.zeros_like(square) for square in squares]
        self.v = [self.beta2 * old + (1 - self.beta2) * new for old, new in zip(self.v or zeros, squares, strict=True)]
        self.largest = [torch.maximum(old, new) for old, new in zip(self.largest or zeros, self.v, strict=True)]
        m = self.m / (1 - self.beta1**self.t)
        v = [x / (1 - self.beta2**self.t) for x in (self.largest if self.amsgrad else self.v)]
        if self.block:
            d = m / (v[0].sqrt() + self.eps)
            return d @ w if square else d
        if square:
            return self.rotation(m, [x.sqrt() for x in v]) @ w
        means = [float(sum(x[i].mean() for x in v)) / len(v) for i in range(w.shape[0])]
        rows = torch.tensor(means, dtype=v[0].dtype).sqrt()
        normal = m - m @ w.mH @ w
        for part, scale in zip(parts(normal), v, strict=True):
            for i in range(w.shape[0]):
                for j in range(w.shape[1]):
                    part[i, j] = self.bounded(float(part[i, j]), max(float(scale[i, j]), means[i] / 100) ** 0.5)
        rotation = self.rotation(m @ w.mH, [rows[:, None].expand(-1, len(rows))] * len(v))
        return rotation @ w + normal - normal @ w.mH @ w

    def rotation(self, m: Tensor, scales: list[Tensor]) -> Tensor:
        """Omega_ij from M_ij - conj(M_ji), each part over the smaller of the two entries' scales of that part."""
        omega = m - m.mH
        for part, scale in zip(parts(omega), scales, strict=True):
            for i in range(len(m)):
                for j in range(len(m)):
                    part[i, j] = self.bounded(float(part[i, j]), min(float(scale[i, j]), float(scale[j, i])))
        return omega

    def bounded(self, value: float, scale: float) -> float:
        return max(-1.0, min(1.0, value / (scale + self.eps)))


class Muon:
    """W exp(-lr sign(W^H M - M^H W)) by a singular value decomposition, for means M as torch.optim.Muon forms them.

    Square: of the gradient in the frame, G W^H. Reference: arXiv 2608.06218.
    """

    def __init__(self, momentum: float, nesterov: bool) -> None:
        self.momentum, self.nesterov = momentum, nesterov
        self.buffer: Tensor | float = 0.0

    def step(self, w: Tensor, g: Tensor, lr: float) -> Tensor:
        square = w.shape[0] == w.shape[1]
        new = g @ w.mH if square else g
        self.buffer = self.momentum * self.buffer + (1 - self.momentum) * new
        mean = (1 - self.momentum) * new + self.momentum * self.buffer if self.nesterov else self.buffer
        m = mean @ w if square else mean
        u, s, vh = torch.linalg.svd(w.mH @ m - m.mH @ w)
        rank = int((s > 1e-9 * s[0]).sum())
        y = -u[:, :rank] @ vh[:rank]
        return w @ torch.linalg.matrix_exp(torch.stack([lr * y, lr * y]))[0]


def parts(x: Tensor) -> list[Tensor]:
    """Views of the real and the imaginary part, or of all there is."""
    return [x.real, x.imag] if x.is_complex() else [x]


def in_metric(w: Tensor, tangent: Tensor, metric: str) -> Tensor:
    """The canonical gradient has twice the rotational part: Omega W + N -> 2 Omega W + N."""
    return tangent if metric == "euclidean" else tangent + (tangent @ w.mH) @ w


def train(
    w: Tensor, gradients: list[Tensor], name: str, options: dict, retraction: str, metric: str = "euclidean"
) -> Tensor:
    """One block, wide or tall, after steps of an optimizer by its name."""
    if w.shape[0] > w.shape[1]:
        return train(w.mT, [g.mT for g in gradients], name, options, retraction, metric).mT
    if name == "Muon":
        muon = Muon(options.get("momentum", 0.95), options.get("nesterov", True))
        for g in gradients:
            w = muon.step(w, g, options["lr"])
        return w
    if name == "SGD":
        rule = Momentum(options.get("momentum", 0), options.get("dampening", 0), options.get("nesterov", False))
    else:
        rule = Adam(0.9, 0.999, 1e-8, options.get("second_moment", "element"), options.get("amsgrad", False))
    for g in gradients:
        d = in_metric(w, rule.direction(w, -g if options.get("maximize") else g), metric)
        w = retract(w, -options["lr"] * d, retraction, metric)
    return w
