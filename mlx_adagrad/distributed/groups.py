"""The processes that a function is told of."""

from __future__ import annotations

import mlx.core as mx


def group_or_global(owner: str, group: mx.distributed.Group | None) -> mx.distributed.Group:
    """``group``, or the global group where there is none.

    Raises:
        TypeError: If it is no group.
    """
    check_group(owner, group)
    return mx.distributed.init() if group is None else group


def check_group(owner: str, group: object) -> None:
    """Raise TypeError for what is neither a group nor None."""
    if group is not None and not isinstance(group, mx.distributed.Group):
        given = type(group).__name__
        raise TypeError(f"[{owner}] 'group' must be an mlx.core.distributed.Group but got {given}.")
