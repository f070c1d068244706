"""Clipping of gradients: by value, by the norm of each, by the norm of all."""

from __future__ import annotations

import mlx.core as mx
from mlx.optimizers import Optimizer

from .. import checks
from ..distributed.sharding import Sharded
from ..update.modifiers import Modifiers
from . import reductions
from .agreement import ALONE, Agreement, global_norm
from .base import Wrapper


class ClipByValue(Wrapper):
    r"""Clips every element of the gradients: :math:`g \leftarrow \min(\max(g, -c), c)`.

    Args:
        optimizer: The optimizer inside.
        value: :math:`c \ge 0`; 0 and None switch the clip off.

    Raises:
        ValueError: If ``value`` is negative, infinite or NaN.
    """

    def __init__(self, optimizer: Optimizer, value: float | None):
        self.value = _limit(self, "value", value)
        super().__init__(optimizer)

    def apply_modified(self, gradients: dict, parameters: dict, modifiers: Modifiers) -> dict:
        if self.value and modifiers.apply is not False:
            modifiers = modifiers.clipped(mx.array(-self.value), mx.array(self.value))
        return super().apply_modified(gradients, parameters, modifiers)


class ClipByNorm(Wrapper):
    r"""Scales down each gradient whose 2-norm exceeds a limit: :math:`g \leftarrow g\, c / \max(\|g\|, c)`.

    Args:
        optimizer: The optimizer inside.
        max_norm: :math:`c \ge 0`; 0 and None switch the clip off.
        group: Processes that each have a part of some gradients, or might see a NaN alone: all of them decide alike.
            Default: ``None``, this process decides alone.
        sharded: Which parameters each process has a part of: a module, or a predicate (path, array). Default: ``None``,
            the model that is updated tells (``fully_shard``, ``shard_linear``, ``shard_embedding``).

    Raises:
        ValueError: If ``max_norm`` is negative, infinite or NaN; before a step without ``group`` in a sharded model.
    """

    needs_norms = True
    _agreement = ALONE

    def __init__(
        self,
        optimizer: Optimizer,
        max_norm: float | None,
        *,
        group: mx.distributed.Group | None = None,
        sharded: Sharded | None = None,
    ):
        self.max_norm = _limit(self, "max_norm", max_norm)
        self._agreement = Agreement(self._name, group, sharded)
        super().__init__(optimizer)

    def apply_modified(self, gradients: dict, parameters: dict, modifiers: Modifiers) -> dict:
        if self.max_norm and modifiers.apply is not False:
            self._agreement.check(parameters)
            gradients = reductions.coalesced(self._name, gradients)
            if self._agreement.active:
                norms, modifiers = self._agreement.norms(gradients, parameters, modifiers)
                factors = {keys: reductions.down_to(self.max_norm, norm) for keys, norm in norms.items()}
            else:
                factors = reductions.factors_to(self.max_norm, gradients, modifiers)
            modifiers = modifiers.scaled(factors)
        return super().apply_modified(gradients, parameters, modifiers)


class ClipByGlobalNorm(Wrapper):
    r"""Scales down all gradients together where their common 2-norm :math:`N` exceeds a limit :math:`c`.

    Keras's rule is :math:`g \leftarrow g\, c / \max(N, c)`, and NaN for every gradient where N is infinite or NaN.
    torch's, which ``mlx.optimizers.clip_grad_norm`` has too, is :math:`g \leftarrow g \min(1, c / (N + 10^{-6}))`.

    Args:
        optimizer: The optimizer inside.
        max_norm: :math:`c \ge 0`; 0 and None switch the clip off.
        rule: ``"keras"`` or ``"torch"``. Default: ``"keras"``.
        group: Processes that each have a part of some gradients, or might see a NaN alone: all of them decide alike.
            Default: ``None``, this process decides alone.
        sharded: Which parameters each process has a part of: a module, or a predicate (path, array). Default: ``None``,
            the model that is updated tells (``fully_shard``, ``shard_linear``, ``shard_embedding``).

    Raises:
        ValueError: If ``max_norm`` is negative, infinite or NaN, or ``rule`` is neither; before a step without
            ``group`` in a sharded model.
    """

    needs_norms = True
    _agreement = ALONE

    def __init__(
        self,
        optimizer: Optimizer,
        max_norm: float | None,
        rule: str = "keras",
        *,
        group: mx.distributed.Group | None = None,
        sharded: Sharded | None = None,
    ):
        self.rule = checks.one_of(self._name, "rule", rule, ("keras", "torch"))
        self.max_norm = _limit(self, "max_norm", max_norm)
        self._agreement = Agreement(self._name, group, sharded)
        super().__init__(optimizer)

    def apply_modified(self, gradients: dict, parameters: dict, modifiers: Modifiers) -> dict:
        if self.max_norm and modifiers.apply is not False:
            self._agreement.check(parameters)
            gradients = reductions.coalesced(self._name, gradients)
            norm, modifiers = self._norm(gradients, parameters, modifiers)
            modifiers = modifiers.scaled(self._factor(norm))
        return super().apply_modified(gradients, parameters, modifiers)

    def _norm(self, gradients: dict, parameters: dict, modifiers: Modifiers) -> tuple[mx.array, Modifiers]:
        if not self._agreement.active:
            return reductions.global_norm(gradients, modifiers), modifiers
        norms, modifiers = self._agreement.norms(gradients, parameters, modifiers)
        return global_norm(norms), modifiers

    def _factor(self, norm: mx.array) -> mx.array:
        if self.rule == "torch":
            return mx.minimum(self.max_norm / (norm + 1e-6), 1.0)
        return reductions.down_to(self.max_norm, norm) + (norm - norm)  # 0, or NaN where the norm is not finite


def _limit(wrapper: Wrapper, name: str, value: float | None) -> float:
    return 0.0 if value is None else checks.non_negative(wrapper._name, name, value)
