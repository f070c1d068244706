"""SparseEmbeddingBag and SparseEmbedding against torch's own layers; skipped where torch is not installed."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_adagrad import SparseEmbedding, SparseEmbeddingBag, value_and_grad
from mlx_adagrad.presets import torch as adagrad

torch: Any = pytest.importorskip("torch")
ROWS, DIMS = 13, 6


RNG = np.random.default_rng(1)
TABLE = RNG.normal(size=(ROWS, DIMS)).astype(np.float32)
TWO_AXES = RNG.integers(0, ROWS, (5, 4)), None
RAGGED = RNG.integers(0, ROWS, 11), np.array([0, 2, 2, 3, 9, 11])


def table(padding_idx):
    """The padding row is 0, as both have it from the constructor on: torch applies max_norm to it, we do not."""
    return np.where(np.arange(ROWS)[:, None] == (-1 if padding_idx is None else padding_idx % ROWS), 0, TABLE)


def near(got: Any, want: Any):
    np.testing.assert_allclose(np.array(got), want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("norm", [{}, {"max_norm": 1.5}, {"max_norm": 1.0, "norm_type": 1.0}], ids=str)
@pytest.mark.parametrize("padding_idx", [None, 2, -4])
@pytest.mark.parametrize("mode", ["sum", "mean", "max", "weighted"])
@pytest.mark.parametrize("given, last", [(TWO_AXES, False), (RAGGED, False), (RAGGED, True)])
def test_bag(mode, given, padding_idx, norm, last):
    x, offsets = given
    factors = RNG.normal(size=x.shape).astype(np.float32) if mode == "weighted" else None
    mode = "sum" if mode == "weighted" else mode
    options = {"padding_idx": padding_idx, "include_last_offset": last, **norm}
    theirs = torch.nn.EmbeddingBag(ROWS, DIMS, mode=mode, _weight=torch.tensor(table(padding_idx)), **options)
    ours = SparseEmbeddingBag(ROWS, DIMS, mode, **options)
    assert ours.padding_idx == theirs.padding_idx
    ours.weight = mx.array(table(padding_idx))
    their_factors: Any = None if factors is None else torch.tensor(factors, requires_grad=True)
    their_offsets = None if offsets is None else torch.tensor(offsets)
    out = theirs(torch.tensor(x), their_offsets, their_factors)
    wanted = RNG.normal(size=out.shape).astype(np.float32)
    (out * torch.tensor(wanted)).sum().backward()

    def loss(model, x, offsets, factors):
        return (model(x, offsets, factors) * mx.array(wanted)).sum()

    arrays: list[Any] = [None if a is None else mx.array(a) for a in (x, offsets, factors)]
    near(ours(*arrays), out.detach().numpy())
    for differentiate in (nn.value_and_grad, value_and_grad):
        _, g = differentiate(ours, loss)(ours, *arrays)
        dense: Any = g["weight"] if differentiate is nn.value_and_grad else g["weight"].to_dense()
        near(dense, theirs.weight.grad.numpy())
    near(ours.weight, theirs.weight.detach().numpy())  # max_norm: stored, as torch does
    if their_factors is not None:
        gradient: Any = mx.grad(lambda f: loss(ours, arrays[0], arrays[1], f))
        near(gradient(arrays[2]), their_factors.grad.numpy())


@pytest.mark.parametrize("norm", [{}, {"max_norm": 1.5}, {"max_norm": 1.0, "norm_type": np.inf}], ids=str)
@pytest.mark.parametrize("padding_idx", [None, 2, -4])
def test_training(padding_idx, norm):
    """A look-up and a bag with torch's sparse Adagrad: the same weights and sums of squares after some steps."""
    theirs = torch.nn.ModuleList(
        [
            torch.nn.Embedding(
                ROWS, DIMS, _weight=torch.tensor(table(padding_idx)), sparse=True, padding_idx=padding_idx, **norm
            ),
            torch.nn.EmbeddingBag(
                ROWS, DIMS, _weight=torch.tensor(table(padding_idx) / 2), sparse=True, padding_idx=padding_idx, **norm
            ),
        ]
    )
    ours: Any = nn.Sequential(
        SparseEmbedding(ROWS, DIMS, padding_idx, **norm),
        SparseEmbeddingBag(ROWS, DIMS, padding_idx=padding_idx, **norm),
    )
    ours.layers[0].weight, ours.layers[1].weight = mx.array(table(padding_idx)), mx.array(table(padding_idx) / 2)
    their_optimizer, optimizer = torch.optim.Adagrad(theirs.parameters(), lr=0.2), adagrad(lr=0.2)

    def run(layers, x, tanh):
        return (tanh(layers[0](x)).sum(1) * layers[1](x)).sum()

    for seed in range(5):
        x = np.random.default_rng(seed).integers(0, ROWS, (4, 3))
        their_optimizer.zero_grad()
        loss = run(theirs, torch.tensor(x), torch.tanh)
        loss.backward()
        their_optimizer.step()
        got, g = value_and_grad(ours, lambda x: run(ours.layers, x, mx.tanh))(mx.array(x))
        near(got, loss.item())
        optimizer.update(ours, g)
        mx.eval(ours.parameters(), optimizer.state)
    for layer, their_layer in zip(ours.layers, theirs, strict=True):
        near(layer.weight, their_layer.weight.detach().numpy())


def test_parameters_with_one_axis():
    """torch's tests of its sparse Adagrad train a vector."""
    theirs = torch.nn.Parameter(torch.tensor(TABLE[:, 0].copy()))
    their_optimizer, optimizer = torch.optim.Adagrad([theirs], lr=0.2), adagrad(lr=0.2)
    from mlx_adagrad import RowSparse

    w = mx.array(TABLE[:, 0])
    for seed in range(5):
        rng = np.random.default_rng(seed)
        indices, values = rng.integers(0, ROWS, 7), rng.normal(size=7).astype(np.float32)
        theirs.grad = torch.sparse_coo_tensor(indices[None], values, (ROWS,))
        their_optimizer.step()
        w = optimizer.apply_gradients({"w": RowSparse(mx.array(indices), mx.array(values), ROWS)}, {"w": w})["w"]
    near(w, theirs.detach().numpy())
