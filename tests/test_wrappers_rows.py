"""Wrappers around an Adagrad whose gradients are row-sparse: they see the dense gradient that it stands for."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_adagrad import Adagrad, RowSparse
from mlx_adagrad.wrappers import (
    ClipByGlobalNorm,
    ClipByNorm,
    ClipByValue,
    Constraint,
    DynamicLossScale,
    ExponentialMovingAverage,
    LossScale,
    SkipNonFinite,
)

WRAPPED = {
    "value": lambda o: ClipByValue(o, 0.8),
    "norm": lambda o: ClipByNorm(o, 1.0),
    "global_norm": lambda o: ClipByGlobalNorm(o, 1.0),
    "global_norm_torch": lambda o: ClipByGlobalNorm(o, 1.0, rule="torch"),
    "average": lambda o: ExponentialMovingAverage(o, 0.5, 2),
    "loss_scale": lambda o: LossScale(o, 8.0),
    "dynamic_loss_scale": lambda o: DynamicLossScale(o, 8.0, 3),
    "skip": lambda o: SkipNonFinite(o),
    "constraint": lambda o: Constraint(o, {"table": "non_neg"}),
    "all": lambda o: SkipNonFinite(ClipByValue(ClipByNorm(ExponentialMovingAverage(LossScale(o, 2.0), 0.5), 1.0), 0.8)),
}
ROWS = 9


def batches(bad=None):
    """Indices with duplicates and one that names no row; dense gradients beside."""
    rng = np.random.default_rng(4)
    for t in range(6):
        indices = mx.array([3, 1, 3, ROWS + 2, 0, 3], mx.int32)
        values = mx.array(rng.normal(size=(6, 4)), mx.float32)
        if t == 2 and bad is not None:
            values[1] = bad
        yield {"table": RowSparse(indices, values, ROWS), "bias": mx.array(rng.normal(size=(4,)), mx.float32)}


def parameters():
    rng = np.random.default_rng(1)
    return {"table": mx.array(rng.normal(size=(ROWS, 4)), mx.float32), "bias": mx.zeros((4,))}


def train(optimizer, gradients, dense=False):
    w = parameters()
    for g in gradients:
        if dense:
            g = g | {"table": g["table"].to_dense()}
        w = w | optimizer.apply_gradients(g, w)
        mx.eval(w, optimizer.state)
    return w


@pytest.mark.parametrize("bad", [None, mx.nan, mx.inf], ids=str)
@pytest.mark.parametrize("wrapper", WRAPPED)
def test_sparse_equals_dense(wrapper, bad):
    sparse, dense = (WRAPPED[wrapper](Adagrad(0.1)) for _ in range(2))
    if bad is not None and wrapper not in ("skip", "dynamic_loss_scale", "all"):
        bad = 1e6
    got, want = train(sparse, batches(bad)), train(dense, batches(bad), dense=True)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-6)
    assert sparse.step.item() == dense.step.item() == (5 if bad is not None and bad != 1e6 else 6)


def test_a_norm_is_that_of_the_summed_rows():
    twice = RowSparse(mx.array([2, 2]), mx.array([[3.0, 0.0], [0.0, 4.0]]), 5)  # 5, not sqrt(3² + 4²) by rows only
    cancelling = RowSparse(mx.array([1, 1]), mx.array([[1e4, 0.0], [-1e4, 0.0]]), 5)  # 0
    seen = []

    class Spy(Adagrad):
        def apply_modified(self, gradients, parameters, modifiers):
            seen.append(modifiers.scale)
            return super().apply_modified(gradients, parameters, modifiers)

    gradients = {"a": RowSparse(mx.array([2, 2]), mx.array([[3.0, 0.0], [3.0, 8.0]]), 5), "b": cancelling, "c": twice}
    w = {name: mx.zeros((5, 2)) for name in gradients}
    ClipByNorm(Spy(0.1), 1.0).apply_gradients(gradients, w)
    np.testing.assert_allclose([seen[0][k,].item() for k in "abc"], [0.1, 1.0, 0.2], rtol=1e-6)
    ClipByGlobalNorm(Spy(0.1), 1.0).apply_gradients(gradients, w)
    np.testing.assert_allclose(seen[1].item(), 1 / np.sqrt(125), rtol=1e-6)


def test_rows_are_summed_once_for_all(monkeypatch):
    calls = []
    combine = RowSparse.coalesced_by

    def counted(self, *args, **kwargs):
        calls.append(self._coalesced)
        return combine(self, *args, **kwargs)

    monkeypatch.setattr(RowSparse, "coalesced_by", counted)
    optimizer = SkipNonFinite(ClipByGlobalNorm(ClipByNorm(Adagrad(0.1), 1.0), 1.0))
    optimizer.apply_gradients(next(batches()), parameters())
    assert calls.count(False) == 1 and len(calls) > 1
