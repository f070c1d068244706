"""What several processes find out together about a gradient of which each has parts: norms, and whether it is finite.

Wrappers that take ``group`` ask here. The outermost of them exchanges what all of them need, in one ``all_gather`` a
step, and hands it inward with the modifiers; replicated tensors, which are equal everywhere, count once.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import mlx.core as mx

from ..distributed.groups import check_group
from ..distributed.sharding import Sharded, cuts_of, is_sharded
from ..trees import Keys, dotted, present
from ..update.modifiers import UNMODIFIED, Modifiers, at
from ..update.rule import SMALLEST_NORMAL
from . import reductions


class Findings(NamedTuple):
    """What the processes have found out about a gradient, before any modifiers.

    Args:
        gradients: The tree that it is about.
        finite: Whether it is finite in every process, 0-d bool.
        norms: The 2-norm of each gradient, of all its parts together; empty where nobody asks.
    """

    gradients: Any
    finite: mx.array
    norms: dict[Keys, mx.array]


class Agreement:
    """The processes that a wrapper agrees with, and which parameters each has a part of.

    Args:
        owner: The name of the wrapper.
        group: The processes; None: this one decides alone, and sharded models are refused.
        sharded: A module, or a predicate (path, array) as those of ``shard_inplace``. None: the model that is updated
            tells, where it is a module; in a tree of arrays nothing is sharded.

    Raises:
        TypeError: If ``group`` is no group, or ``sharded`` neither a module nor callable.
        ValueError: If ``sharded`` is given without ``group``.
    """

    def __init__(self, owner: str, group: mx.distributed.Group | None, sharded: Sharded | None):
        check_group(owner, group)
        is_sharded(sharded)
        if sharded is not None and group is None:
            raise ValueError(f"[{owner}] 'sharded' needs 'group', the processes that have the parts.")
        self.owner, self.group, self.sharded = owner, group, sharded

    @property
    def active(self) -> bool:
        """Whether there is anybody to agree with."""
        return self.group is not None and self.group.size() > 1

    def check(self, parameters: Any) -> None:
        """Raise ValueError for a model with sharded parameters if there is no group."""
        if self.group is not None:
            return
        for keys in cuts_of(parameters):
            raise ValueError(
                f"[{self.owner}] '{dotted(keys)}' is sharded, so each process has a part of its gradient: give "
                "'group', the processes that must decide alike."
            )

    def finite(
        self, gradients: Any, parameters: Any, modifiers: Modifiers, norms: bool
    ) -> tuple[mx.array, Modifiers]:
        """Whether the gradients are finite in every process, and the modifiers to hand inward.

        Args:
            gradients: The gradients, coalesced.
            parameters: The parameters, or the model.
            modifiers: What the wrappers outside ask for.
            norms: Whether a wrapper inside will ask for norms.
        """
        if not self.active:
            return reductions.all_finite(gradients, modifiers), modifiers
        findings = self._findings(gradients, parameters, modifiers, norms)
        return findings.finite, replace(modifiers, findings=findings)

    def norms(self, gradients: Any, parameters: Any, modifiers: Modifiers) -> tuple[dict[Keys, mx.array], Modifiers]:
        """The norms of the gradients as the update will see them, and the modifiers to hand inward."""
        if not self.active:
            return reductions.norms(gradients, modifiers), modifiers
        if modifiers.low is not None:  # norms of clipped elements do not follow from those before
            return self._exchanged(gradients, parameters, modifiers, modifiers, True).norms, modifiers
        findings = self._findings(gradients, parameters, modifiers, True)
        norms = dict(findings.norms)
        for keys in norms:
            scale = at(modifiers.scale, keys)
            norms[keys] = norms[keys] if scale is None else norms[keys] * mx.abs(scale)
        return norms, replace(modifiers, findings=findings)

    def _findings(self, gradients: Any, parameters: Any, modifiers: Modifiers, norms: bool) -> Findings:
        known = modifiers.findings
        if known is not None and known.gradients is gradients and (known.norms or not norms):
            return known
        return self._exchanged(gradients, parameters, modifiers, UNMODIFIED, norms)

    def _exchanged(
        self, gradients: Any, parameters: Any, modifiers: Modifiers, of_norms: Modifiers, norms: bool
    ) -> Findings:
        """One exchange: of a flag, and of the norms of the parts that this process has."""
        cuts = cuts_of(parameters)
        is_part = is_sharded(self.sharded) if self.sharded is not None else lambda keys, g: keys in cuts
        known = reductions.norms(gradients, of_norms) if norms else {}
        parts = [keys for keys, g in present(gradients) if keys in known and is_part(keys, g)]
        finite = reductions.all_finite(gradients, modifiers).astype(mx.float32)
        told = mx.stack([finite, *(known[keys].astype(mx.float32) for keys in parts)])
        by_rank = mx.distributed.all_gather(told[None], group=self.group)
        together = norm_of_norms(by_rank[:, 1:])
        known |= {keys: together[i] for i, keys in enumerate(parts)}
        return Findings(gradients, mx.all(by_rank[:, 0] > 0), known)


# what wrappers have that were pickled before they took a group
ALONE = Agreement("Wrapper", None, None)


def global_norm(norms: dict[Keys, mx.array]) -> mx.array:
    """The 2-norm of all gradients together."""
    return norm_of_norms(mx.stack(list(norms.values()))[:, None])[0] if norms else mx.array(0.0)


def norm_of_norms(norms: mx.array) -> mx.array:
    """The 2-norm along the first axis; squares of the quotients by the largest neither overflow nor vanish."""
    largest = mx.maximum(mx.max(norms, axis=0), SMALLEST_NORMAL[mx.float32])
    norm = largest * mx.sqrt(mx.sum(mx.square(norms / largest), axis=0))
    return mx.where(mx.isinf(largest), largest, norm)
