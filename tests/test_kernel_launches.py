"""How many kernels Metal runs for a whole fused step, counted from the graph that MLX records without Metal."""

from collections import Counter
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from cases import HALF
from metal_host import graph
from mlx_adagrad import Adagrad, Dense, RowSparse, RowWise
from mlx_adagrad.update import devices
from mlx_adagrad.update.modifiers import Modifiers
from mlx_adagrad.update.rule import Rule

pytestmark = pytest.mark.skipif(mx.metal.is_available(), reason="Metal is here: the graph is recorded without it")


def recorded(optimizer, parameters: dict, modifiers: Any = None) -> list[graph.Primitive]:
    """The graph of one step of an optimizer that has made some: its state is there."""
    gradients = {name: mx.ones_like(w) for name, w in parameters.items()}
    optimizer.init(parameters)
    mx.eval(parameters, gradients, optimizer.state)
    names = list(parameters)

    def step(*arrays):
        gradients = dict(zip(names, arrays, strict=True))
        if modifiers is None:
            new = optimizer.apply_gradients(gradients, parameters)
        else:
            new = optimizer.apply_modified(gradients, parameters, modifiers)
        return [array for _, array in tree_flatten([new, optimizer.state])]

    with devices.traced_for_gpu():
        return graph.record(step, *gradients.values())


def recorded_rows(optimizer, table, k, dtype=mx.int32) -> list[graph.Primitive]:
    """The graph of one step with a row-sparse gradient of K rows."""
    optimizer.init({"w": table})
    mx.eval(table, optimizer.state)

    def step(indices, values):
        new = optimizer.apply_gradients({"w": RowSparse(indices, values, len(table))}, {"w": table})
        return [new["w"], optimizer.state["w"]["v"]]

    with devices.traced_for_gpu():
        return graph.record(step, mx.zeros((k,), dtype), mx.zeros((k, table.shape[1])))


def tensors(count, dtype=mx.float32):
    return {str(i): mx.ones((4, 3) if i % 2 else (5,), dtype) for i in range(count)}


OPTIMIZERS: dict[str, Any] = {
    "plain": lambda: Adagrad(0.1, fused=True),
    "lr_decay": lambda: Adagrad(0.1, lr_decay=0.1, fused=True),
    "schedule": lambda: Adagrad(optim.exponential_decay(0.1, 0.9), fused=True),
    "decay": lambda: Adagrad(0.1, weight_decay=0.1, weight_decay_mask=lambda path, w: w.ndim > 1, fused=True),
    "groups": lambda: Adagrad(0.1, groups=[{"params": "1*", "lr": 0.2}, {"params": "2*", "eps": 0.1}], fused=True),
}
optimizers = pytest.mark.parametrize("name", OPTIMIZERS)
MODIFIERS = {
    "none": Modifiers(),
    "all": Modifiers(mx.array(0.5), mx.array(-1.0), mx.array(1.0), mx.array(True)),
}


@optimizers
@pytest.mark.parametrize("modifiers", MODIFIERS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_the_numbers_of_a_step_cost_no_launch_a_tensor(name, modifiers, dtype):
    counts = []
    for count in (6, 26):
        found = recorded(OPTIMIZERS[name](), tensors(count, dtype), MODIFIERS[modifiers])
        kernels = Counter(p.kernel for p in found if p.kernel)
        assert kernels == {"mlx_adagrad_dense": count}
        counts.append(graph.launches(found) - count)
    few, many = counts
    assert few == many
    assert few <= {"lr_decay": 5, "schedule": 8}.get(name, 1) + 2 * (modifiers == "all")  # the step count, the rate


def test_numbers_that_differ_from_tensor_to_tensor_cost_nothing_either():
    """As after a clip by the norm of each gradient."""
    parameters = tensors(10)
    paths = {(key,): mx.array(0.5) for key in parameters}
    modifiers = Modifiers(paths).clipped(paths, paths)
    found = recorded(Adagrad(0.1, fused=True), parameters, modifiers)
    assert graph.launches(found) == 10 + 1


@pytest.mark.parametrize("k, launches", [(2048, 5), (4096, 8)])
@pytest.mark.parametrize("dtype", [mx.int32, mx.uint32], ids=str)
def test_a_row_sparse_step_takes_few_launches(k, launches, dtype):
    """Sort, accumulate, add to v, descend, add to w; nothing is compacted. 0.3 MiB a thousand rows of 64 columns."""
    found = recorded_rows(Adagrad(0.1, fused=True), mx.ones((10_000, 64)), k, dtype)
    assert graph.launches(found) == launches
    assert len(found) <= 11
    written = sum(np.prod(shape) * d.size for p in found if p.kernel for _, shape, d in p.outputs)
    assert written <= 3.1 * k * 64 * 4  # the sums, what is added to v and what is added to w


@pytest.mark.parametrize("options", [{"weight_decay": 0.1}, {"update_accumulator": False}, {}], ids=str)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("accumulator", [Dense(), RowWise(), Dense("parameter")], ids=str)
def test_whatever_the_table_a_row_sparse_step_takes_few(options, dtype, accumulator):
    rule = Rule(initial_accumulator_value=0.1, **options)
    optimizer = Adagrad.from_rule(mx.array(0.1), rule, accumulator=accumulator)
    found = recorded_rows(optimizer, mx.ones((10_000, 64), dtype), 2048)
    rows = 8 if options.get("weight_decay") or dtype in HALF else 0  # which rows are read: checked, gathered
    assert graph.launches(found) <= 5 + rows


def test_a_graph_is_counted_by_the_rules_of_mlx():
    def launches(function, *inputs):
        return graph.launches(graph.record(function, *inputs))

    x = mx.ones((3, 4))
    assert launches(lambda x: x.T[1:].reshape(-1)[None], x) == 0
    assert launches(lambda x: mx.stack([x, x, x]), x) == 3
    assert launches(lambda x: x * 2 + x, x) == 2
    for size, dtype, count in ((2048, mx.int32, 1), (4096, mx.int32, 4), (4097, mx.int32, 6), (4096, mx.int64, 6)):
        assert launches(mx.argsort, mx.zeros((size,), dtype)) == count
    assert launches(mx.sum, mx.ones((4096,))) == 1 and launches(mx.sum, mx.ones((4097,))) == 2
    with pytest.raises(AssertionError, match="how many kernels Metal runs for Matmul is not known"):
        launches(lambda x: x @ x.T, x)
