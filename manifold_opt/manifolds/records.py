"""Records: constraints as tuples of primitives, for the tags of parameters and for optimizer state.

A record is a tuple of the constraint's name and the values of its fields. Parameters are tagged with records, so that
a saved parameter loads with ``weights_only=True`` and without this package. Optimizer state contains the bytes of the
record's JSON, because its entries have to be tensors.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from . import MANIFOLDS, Manifold

Record = tuple[Any, ...]
_OWN = frozenset(MANIFOLDS.values()) - {MANIFOLDS["geoopt"]}  # constraints that their record determines completely
_constraints: dict[Record, Manifold] = {}  # by tag; cached because every step reads it
_read: dict[bytes, Record | None] = {}  # cache of record_from_tensor


def serialize(constraint: Manifold | None) -> Record | None:
    """Return the record of a constraint: its name and the values of its fields. None for None."""
    if constraint is None:
        return None
    kind = type(constraint)
    name = next((name for name, known in MANIFOLDS.items() if known is kind), kind.__qualname__)
    return (name, *constraint.config())


def deserialize(record: Record) -> Manifold | None:
    """Return the constraint of a record; None if its class is not in ``MANIFOLDS`` or its fields do not fit."""
    name, *options = record
    if name not in MANIFOLDS or MANIFOLDS[name] is MANIFOLDS["geoopt"]:
        return None
    try:
        return MANIFOLDS[name](*options)
    except TypeError:  # another version has other fields
        return None


def format_constraint(record: Record) -> str:
    """Return a record as text for a message."""
    known = deserialize(record)
    return repr(known) if known is not None else f"{record[0]}({', '.join(map(str, record[1:]))})"


def is_record_of(record: Record, constraint: Manifold | None) -> bool:
    """Return True if a record is that of this constraint; earlier versions recorded fewer fields."""
    known, full = deserialize(record), serialize(constraint)
    return record == full or known == constraint or (full is not None and record == full[: len(record)])


def constraint_to_tag(constraint: Manifold) -> Any:
    """Return the tag of a parameter: a record, or the constraint itself if a record does not determine it."""
    return serialize(constraint) if type(constraint) in _OWN else constraint


def constraint_from_tag(tag: Any) -> Any:
    """Return the constraint of a tag, the inverse of :func:`constraint_to_tag`; raise a ValueError if it is unknown."""
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

    They are float32, because some code scales or averages all entries of a state.

    >>> from manifold_opt.manifolds.records import record_to_tensor
    >>> bytes(record_to_tensor(("unit_norm", 0)).byte().tolist()).decode()
    '["unit_norm", 0]'
    """
    return torch.tensor(list(json.dumps(record).encode()), dtype=torch.float32, device="cpu")


def record_from_tensor(tensor: Any) -> Record | None:
    """Return the record that a tensor encodes, whatever dtype it was loaded as; None if it encodes none.

    That is so for checkpoints of earlier versions, which contain a single one, and after code has reset or averaged
    all tensors of a state.
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
    """Convert the lists of a record that was read from JSON back to tuples."""
    return tuple(map(to_tuples, record)) if isinstance(record, (list, tuple)) else record
