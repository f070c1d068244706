"""Tensors are launched many in one compiled call: right for every mixture, and with a bounded number of functions."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from cases import assert_near, to_numpy
from mlx_adagrad import Adagrad, RowSparse, RowWise
from mlx_adagrad.update.batches import LARGEST, MOST_SETS, KnownSets, split
from mlx_adagrad.update.rule import Rule
from mlx_adagrad.wrappers import ClipByNorm, ClipByValue, SkipNonFinite

OPTIMIZERS: dict[str, Any] = {
    "plain": lambda fused: Adagrad(0.1, fused=fused),
    "row-wise": lambda fused: Adagrad(0.1, accumulator=RowWise(), fused=fused),
    "groups": lambda fused: Adagrad(0.1, groups=[{"params": ["*1*", "*2*"], "lr": 0.3}], weight_decay=0.1, fused=fused),
    "mask": lambda fused: Adagrad(0.1, weight_decay=0.1, weight_decay_mask=lambda path, w: w.ndim > 1, fused=fused),
    "norms": lambda fused: ClipByNorm(Adagrad(0.1, fused=fused), 0.5),
    "norms, bounds": lambda fused: ClipByValue(ClipByNorm(Adagrad(0.1, fused=fused), 0.5), 0.1),
    "bounds, norms": lambda fused: ClipByNorm(ClipByValue(Adagrad(0.1, fused=fused), 0.1), 0.5),
    "skipped": lambda fused: SkipNonFinite(ClipByNorm(Adagrad(0.1, fused=fused), 0.5)),
}


def draw(count, dtypes=(mx.float32,), seed=0):
    """Tensors of four shapes and these dtypes, and gradients for them."""
    rng = np.random.default_rng(seed)
    shapes = [(5,), (3, 4), (2, 3), ()]

    def tree():
        arrays = [mx.array(rng.normal(size=shapes[i % 4]), mx.float32) for i in range(count)]
        return {f"p{i}": x.astype(dtypes[i % len(dtypes)]) for i, x in enumerate(arrays)}

    return tree(), tree()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("count", [3, 45])
def test_batches_are_right(kernel_device, name, count):
    results = []
    for fused in (True, False):
        parameters, gradients = draw(count)
        optimizer = OPTIMIZERS[name](fused)
        for _ in range(3):  # the second step knows the set
            parameters = optimizer.apply_gradients(gradients, parameters)
        results.append(parameters)
    for key in results[0]:
        assert_near(results[0][key], to_numpy(results[1][key]), steps=2)


def test_dtypes_and_row_sparse_gradients_among_them(kernel_device):
    results = []
    for fused in (None, False):
        parameters, gradients = draw(24, (mx.float32, mx.bfloat16, mx.float16))
        parameters["table"] = mx.ones((6, 2))
        gradients["p1"] = gradients["p1"].astype(mx.float32)
        mixed: Any = {**gradients, "table": RowSparse(mx.array([1, 4, 1]), mx.ones((3, 2)), 6)}
        optimizer = Adagrad(0.1, fused=fused)
        for _ in range(3):
            parameters = optimizer.apply_gradients(mixed, parameters)
        results.append(parameters)
    for key, w in results[0].items():
        assert w.dtype == results[1][key].dtype
        assert_near(w, to_numpy(results[1][key]), w.dtype, steps=1)


def test_parameters_that_count_their_own_steps(kernel_device):
    results = []
    for fused in (True, False):
        parameters, gradients = draw(9)
        optimizer = Adagrad.from_rule(mx.array(0.1), Rule(lr_decay=0.5, step_per_parameter=True))
        optimizer.fused = fused
        for keys in (list(parameters)[:4], list(parameters), list(parameters)):
            parameters = parameters | optimizer.apply_gradients({key: gradients[key] for key in keys}, parameters)
        results.append((parameters, optimizer.state))
    (fused, state), (plain, _) = results
    assert state["p0"]["step"].item() == 3 and state["p8"]["step"].item() == 2
    for key in plain:
        assert_near(fused[key], to_numpy(plain[key]), steps=1)


def test_a_set_of_tensors_that_changes_compiles_a_bounded_number_of_functions(host):
    parameters, gradients = draw(40)
    optimizer, rng = Adagrad(0.1, fused=True), np.random.default_rng(0)
    for step in range(60):
        chosen = rng.permutation(40)[: rng.integers(1, 41)]
        optimizer.apply_gradients({f"p{i}": gradients[f"p{i}"] for i in chosen}, parameters)
        if step == 30:
            at_half = host.traces
    assert host.traces <= 5 * 4  # 16, 8, 4, 2 and 1 tensors of four shapes
    assert host.traces == at_half


def test_sets_that_come_again_are_bounded_too(host):
    parameters, gradients = draw(40)
    optimizer, rng = Adagrad(0.1, fused=True), np.random.default_rng(0)
    optimizer.init(parameters)
    for _ in range(30):
        chosen = rng.permutation(40)[: rng.integers(17, 41)]
        for _ in range(3):
            optimizer.apply_gradients({f"p{i}": gradients[f"p{i}"] for i in chosen}, parameters)
    assert host.traces <= 5 * 4 + MOST_SETS * -(-40 // LARGEST)


def test_a_model_takes_a_call_for_16_tensors(host):
    parameters, gradients = draw(40)
    optimizer = Adagrad(0.1, fused=True)
    optimizer.init(parameters)
    traces = []
    for _ in range(3):
        optimizer.apply_gradients(gradients, parameters)
        traces.append(host.traces)
    assert traces == [8, 10, 10]  # 8 and 2 of each shape; then 16 of all shapes, twice, and 8
    assert [len(places) for places in split(["a", "b"] * 20, KnownSets())] == [16, 4, 16, 4]
    sets = KnownSets()
    assert (*["a", "b"] * 20,) not in sets
    assert [len(places) for places in split(["a", "b"] * 20, sets)] == [16, 16, 8]


def test_a_user_may_compile_the_step_on_the_host(host):
    parameters, gradients = draw(3)
    optimizer = Adagrad(0.1, fused=True)
    optimizer.init(parameters)
    step = mx.compile(lambda g, w: optimizer.apply_gradients(g, w), inputs=optimizer.state, outputs=optimizer.state)
    new = step(gradients, parameters)
    assert_near(new["p0"], to_numpy(parameters["p0"]) - 0.1 * np.sign(to_numpy(gradients["p0"])))
    step(gradients, new)
    assert len(host.launches) == 6 and optimizer.step.item() == 2
