"""A constraint as primitives: what a parameter is tagged with, and what an optimizer's state holds.

A record is a tuple of the constraint's name and of what it is made of. A parameter is tagged with that, so that one
saved by itself loads with ``weights_only=True``, and where this package is not installed. An optimizer's state has the
bytes of its JSON, for states hold tensors.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from . import MANIFOLDS, Manifold

Record = tuple[Any, ...]
_OWN = frozenset(MANIFOLDS.values()) - {MANIFOLDS["geoopt"]}  # those that their record says in full
_constraints: dict[Record, Manifold] = {}  # by their tags: the same object every time, for every step asks
_read: dict[bytes, Record | None] = {}  # what tensors hold


def serialize(constraint: Manifold | None) -> Record | None:
    """A constraint as primitives: its name, and what it is made of. None of None."""
    if constraint is None:
        return None
    kind = type(constraint)
    name = next((name for name, known in MANIFOLDS.items() if known is kind), kind.__qualname__)
    return (name, *constraint.config())


def deserialize(record: Record) -> Manifold | None:
    """The constraint that a record says, where it is of this package or known by its name; None of another."""
    name, *options = record
    if name not in MANIFOLDS or MANIFOLDS[name] is MANIFOLDS["geoopt"]:
        return None
    try:
        return MANIFOLDS[name](*options)
    except TypeError:  # of another version, which makes it of something else
        return None


def describe(record: Record) -> str:
    """A record in words, for a message."""
    known = deserialize(record)
    return repr(known) if known is not None else f"{record[0]}({', '.join(map(str, record[1:]))})"


def is_record_of(record: Record, constraint: Manifold | None) -> bool:
    """Return True if a record says this constraint; one of an earlier version may have fewer options."""
    known, full = deserialize(record), serialize(constraint)
    return record == full or known == constraint or (full is not None and record == full[: len(record)])


def constraint_to_tag(constraint: Manifold) -> Any:
    """What a parameter is tagged with: a record, or the constraint itself where a record does not say it in full."""
    return serialize(constraint) if type(constraint) in _OWN else constraint


def constraint_from_tag(tag: Any) -> Any:
    """The inverse of :func:`constraint_to_tag`."""
    if type(tag) is not tuple:
        return tag
    known = _constraints.get(tag)
    if known is None:
        known = deserialize(tag)
        if known is None:
            raise ValueError(
                f"constraint_of: a parameter was saved with the mark {tag!r}, which this version of manifold_opt does "
                "not have. Install the version that saved it, or delete its attribute _manifold_opt_constraint."
            )
        _constraints[tag] = known
    return known


def record_to_tensor(record: Record) -> Tensor:
    """Return a record as a tensor: the bytes of its JSON, on the CPU.

    They are float32, as the other entries of a state are floating-point: code that scales or averages all of them can.

    >>> from manifold_opt.manifolds.records import record_to_tensor
    >>> bytes(record_to_tensor(("unit_norm", 0)).byte().tolist()).decode()
    '["unit_norm", 0]'
    """
    return torch.tensor(list(json.dumps(record).encode()), dtype=torch.float32, device="cpu")


def record_from_tensor(tensor: Any) -> Record | None:
    """Return the record that a tensor holds, whatever dtype it was loaded as; None if it holds none.

    A checkpoint of an earlier version has a single one there, and code that resets or averages all tensors of a state
    has written to it.
    """
    if not isinstance(tensor, Tensor) or tensor.ndim == 0 or tensor.is_meta:
        return None
    rounded = tensor.to("cpu", torch.float32).round().clamp(0, 255).nan_to_num(nan=0)
    text = bytes(rounded.byte().flatten().tolist())
    if text not in _read:
        try:
            record = to_tuples(json.loads(text))
        except ValueError:
            record = None
        _read[text] = record if isinstance(record, tuple) and record and isinstance(record[0], str) else None
    return _read[text]


def to_tuples(record: Any) -> Any:
    """A record whose tuples have become lists on a way that knows none, like JSON's."""
    return tuple(map(to_tuples, record)) if isinstance(record, (list, tuple)) else record
