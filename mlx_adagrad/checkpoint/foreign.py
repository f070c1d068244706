"""What every dialect comes down to: another framework's state by parameter, and which of them is which here."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import mlx.core as mx

from .safetensors import Entry

# Ours for theirs: {their index or name: our path, or (our path, order of the axes)}, or our paths in their order.
Names: TypeAlias = "Mapping[Any, str | tuple[str, Sequence[int]]] | Sequence[str | tuple[str, Sequence[int]] | None]"
Key: TypeAlias = Any  # an index or a name
Matched: TypeAlias = "dict[str, tuple[Key, tuple[int, ...] | None]]"  # our path: their parameter and its axes

# torch.compile, FSDP and checkpoint_wrapper insert these; "module." of DataParallel is an ordinary shared prefix
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
LARGEST_RATE = 3.4e38  # of fp32
FEW = 6
V, AVERAGE, GRADIENT = "v", "average", "gradient"  # the kinds of arrays that go with a parameter


@dataclass(frozen=True)
class Foreign:
    """A checkpoint of another framework.

    Args:
        tensors: For each parameter, in their order, what it has, by kind.
        steps: Updates made, in all or by parameter.
        rates: Learning rates in force, by parameter.
        options: Hyperparameters that must be the same here, by parameter.
        counters: What wrappers keep beside: the wrapper's class, the key in its own state, the value.

    Raises:
        ValueError: If an array has no floating dtype, a count or a learning rate is negative or far too large.
    """

    tensors: dict[Key, dict[str, Entry]]
    steps: int | dict[Key, int]
    rates: dict[Key, float] = field(default_factory=dict)
    options: dict[Key, dict[str, Any]] = field(default_factory=dict)
    counters: list[tuple[type, str, mx.array]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for key, kinds in self.tensors.items():
            for kind, entry in kinds.items():
                if not mx.issubdtype(entry.dtype, mx.inexact):
                    raise ValueError(f"the {kind} of {key!r:.80} is {entry.dtype}")
        for step in self.steps.values() if isinstance(self.steps, dict) else [self.steps]:
            if not 0 <= step < 2**63:
                raise ValueError(f"a step count of {step} cannot be")
        for key, rate in self.rates.items():
            if not 0 <= rate <= LARGEST_RATE:
                raise ValueError(f"the learning rate of {key!r:.80} is {rate}")


def match(theirs: Iterable[Key], ours: Iterable[str], names: Names | None) -> Matched:
    """Their parameter and the order of its axes, for each path of ours: by name, in order where they have no names.

    Raises:
        ValueError: If a path has no counterpart, or ``names`` holds an unknown one or anything twice.
    """
    theirs, ours = list(theirs), list(ours)
    if names is None:
        named = any(isinstance(key, str) for key in theirs)
        names = matching_names(theirs, ours) if named else ours
    if not isinstance(names, Mapping):
        if len(names) != len(theirs):
            raise ValueError(f"it has {len(theirs)} parameters ({few(theirs)}) for {len(names)} here ({few(names)})")
        names = {key: path for key, path in zip(theirs, names, strict=True) if path is not None}
    matched: Matched = {}
    known_there, known_here = set(theirs), set(ours)
    for key, value in names.items():
        path, axes = (value, None) if isinstance(value, str) else value
        if key not in known_there:
            raise ValueError(f"'names' has {key!r}, which is no parameter in the file ({few(theirs)})")
        if path not in known_here:
            raise ValueError(f"'names' has {path!r}, which is no parameter of the optimizer ({few(ours)})")
        if path in matched:
            raise ValueError(f"'names' has {path!r} twice")
        matched[path] = key, None if axes is None else tuple(axes)
    lacking = [path for path in ours if path not in matched]
    if lacking:
        raise ValueError(f"'names' lacks {few(lacking)}")
    return matched


def matching_names(theirs: list[Key], ours: list[str]) -> dict[Key, str]:
    """Our path for each of their names: the same one, but for a prefix that all on one side share.

    Raises:
        ValueError: If any name on either side has no counterpart: the order may not stand in for a name.
    """
    plain = [_without_wrappers(key) for key in theirs]
    deeper = _depth(plain) - _depth(ours)
    there = _from(plain, deeper) if 0 < deeper <= _shared(plain) else theirs if deeper > 0 else plain
    here = _from(ours, -deeper) if 0 < -deeper <= _shared(ours) else ours
    path_of, known = dict(zip(here, ours, strict=True)), Counter(there)
    if known.keys() == path_of.keys() and len(known) == len(there):
        return {key: path_of[name] for key, name in zip(theirs, there, strict=True)}
    extra = [key for key, name in zip(theirs, there, strict=True) if name not in path_of or known[name] > 1]
    lacking = [path for name, path in path_of.items() if name not in known]
    raise ValueError(
        f"its names of parameters are not those here: only in the file: {few(extra) or 'none'}; "
        f"only here: {few(lacking) or 'none'}. Say which is which with 'names': {{theirs: ours, ...}} may leave out "
        "some of theirs, a list has ours in their order"
    )


def _without_wrappers(key: Key) -> Key:
    """A name without the parts that torch's wrappers of modules (compile, FSDP, activation checkpoints) put into it."""
    if not isinstance(key, str):
        return key
    parts = key.split(".")
    return ".".join([part for part in parts[:-1] if part not in WRAPPERS] + parts[-1:])


def _depth(names: list[Key]) -> int:
    return max((name.count(".") for name in names if isinstance(name, str)), default=0)


def _shared(names: list[Key]) -> int:
    """How many leading parts all names have in common."""
    if not names or not all(isinstance(name, str) for name in names):
        return 0
    first, last = (name.split(".")[:-1] for name in (min(names), max(names)))  # all others lie between them
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))


def _from(names: list[Key], count: int) -> list[Key]:
    return [name.split(".", count)[-1] for name in names]


def few(names: Iterable[Any]) -> str:
    """Some of many names, for an error message."""
    some = list(itertools.islice(names, FEW + 1))
    return ", ".join(f"{name!s:.80}" for name in some[:FEW]) + (", ..." if len(some) > FEW else "")
