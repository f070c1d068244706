"""What MLX's own tests ask of every optimizer, asked of ours; and ours against ``mlx.optimizers.Adagrad``."""

from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from cases import assert_near, flat, tensors, to_numpy
from mlx_adagrad import Adagrad

NOTHING: Any = {}
PARAMS = {"first": [mx.zeros((10,)), mx.zeros((1,))], "second": mx.zeros((1,))}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.l1 = nn.Linear(2, 2)
        self.drop = nn.Dropout(p=0.5)
        self.l2 = nn.Linear(2, 2)
        self.vals = [nn.Linear(2, 2), nn.ReLU(), nn.ReLU()]


def test_state_is_a_plain_settable_tree():
    optimizer = Adagrad(0.1)
    state: Any = optimizer.state
    state["hello"] = "world"
    assert optimizer.state["hello"] == "world"
    anything: Any = {0: 1}
    optimizer.state = anything
    assert optimizer.state == {0: 1}


def test_update_keeps_shapes():
    updated = Adagrad(0.1).apply_gradients(tree_map(mx.ones_like, PARAMS), PARAMS)
    assert tree_map(lambda w: w.shape, updated) == tree_map(lambda w: w.shape, PARAMS)


def test_types_are_conserved():
    params = {"w": mx.ones((5, 5), mx.float16)}
    assert Adagrad(0.1).apply_gradients(tree_map(mx.ones_like, params), params)["w"].dtype == mx.float16


def test_explicit_init_starts_from_zero():
    optimizer = Adagrad(1e-2)
    optimizer.init(PARAMS)
    for (path, w), (v_path, v) in zip(flat(PARAMS), flat(optimizer.state)[2:], strict=True):
        assert v_path == f"{path}.v" and mx.array_equal(v, mx.zeros_like(w))
    assert list(optimizer.state) == ["step", "learning_rate", "first", "second"]


@pytest.mark.parametrize("eps", [-1.0, 0.0])
def test_eps_is_validated(eps):
    with pytest.raises(ValueError, match=">0"):
        Adagrad(learning_rate=1e-2, eps=eps)


def test_schedules_are_followed():
    params = {"w": mx.ones((5, 5))}
    optimizer = Adagrad(optim.step_decay(1e-1, 0.9, 1))
    for step in range(10):
        optimizer.apply_gradients(tree_map(mx.ones_like, params), params)
        assert abs(optimizer.learning_rate.item() - 0.1 * 0.9**step) < 1e-7


def test_schedules_are_followed_inside_compile():
    schedule = optim.exponential_decay(1e-1, 0.9)
    optimizer, traces = Adagrad(schedule), []

    @partial(mx.compile, inputs=optimizer.state, outputs=optimizer.state)
    def update():
        traces.append(1)
        optimizer.update(NOTHING, NOTHING)

    for step in range(5):
        update()
        assert abs(0.1 * 0.9**step - optimizer.learning_rate.item()) < 1e-7
    assert len(traces) == 1


def test_joined_schedules():
    warmup, cosine = optim.linear_schedule(0.0, 1e-5, 100), optim.cosine_decay(1e-5, 100)
    optimizer = Adagrad(optim.join_schedules([warmup, cosine], [101]))
    for _ in range(100):
        optimizer.update(NOTHING, NOTHING)
    assert abs(optimizer.learning_rate.item() - 0.99e-5) < 1e-9


def test_a_new_learning_rate_reaches_a_compiled_step():
    params = {"w": mx.ones((5, 5))}
    optimizer, traces = Adagrad(1.0), []
    optimizer.init(params)

    @partial(mx.compile, inputs=optimizer.state, outputs=optimizer.state)
    def update(gradients):
        traces.append(1)
        return optimizer.apply_gradients(gradients, params)

    assert mx.allclose(update(tree_map(mx.ones_like, params))["w"], mx.zeros((5, 5)))
    optimizer.learning_rate = 2.0
    assert mx.allclose(update(tree_map(mx.ones_like, params))["w"], mx.full((5, 5), 1 - 2 / 2**0.5))
    assert len(traces) == 1


def test_state_survives_flattening():
    model = Model()
    first = Adagrad(3e-4)
    first.init(model.trainable_parameters())
    second = Adagrad(3e-4)
    second.state = tree_unflatten(tree_flatten(first.state))
    second.update(model, model.trainable_parameters())


def test_multi_optimizer_splits_the_state():
    model = Model()
    optimizer = optim.MultiOptimizer([Adagrad(0.001), Adagrad(0.1)], [lambda name, weight: weight.ndim > 1])
    optimizer.init(model.trainable_parameters())
    weights, biases = (dict(tree_flatten(s)) for s in optimizer.state["states"])
    assert len(weights) == len(biases) == 5
    assert not any("bias" in k for k in weights) and not any("weight" in k for k in biases)
    optimizer.learning_rate = 0.5
    assert all(o.learning_rate.item() == 0.5 for o in optimizer.optimizers)


def test_multi_optimizer_with_layers_without_parameters():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    optimizer = optim.MultiOptimizer([Adagrad(0.01), Adagrad(0.01)], [lambda _, w: w.ndim >= 2])
    _, gradients = nn.value_and_grad(model, lambda m, x: m(x).sum())(model, mx.ones((1, 4)))
    before = model.layers[0].weight
    for _ in range(2):
        optimizer.update(model, gradients)
    assert not mx.array_equal(before, model.layers[0].weight)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_same_trajectory_as_stock(dtype):
    w, gradients = tensors((7, 3), (dtype, dtype), steps=8)
    params, stock_params = {"w": w}, {"w": w}
    ours, stock = Adagrad(0.1, eps=1e-3), optim.Adagrad(0.1, eps=1e-3)
    for g in gradients:
        params = ours.apply_gradients({"w": g}, params)
        stock_params = stock.apply_gradients({"w": g}, stock_params)
    assert list(ours.state) == list(stock.state) and ours.state["step"].dtype == stock.state["step"].dtype
    # stock rounds every operation to the parameter's dtype
    assert_near(params["w"], to_numpy(stock_params["w"]), dtype, steps=8 if dtype == mx.float32 else 32)


def test_never_more_traces_than_stock():
    def traces(make):
        params, count = {"w": mx.ones((3,), mx.bfloat16)}, []
        optimizer = make(optim.exponential_decay(0.1, 0.9))
        optimizer.init(params)

        @partial(mx.compile, inputs=optimizer.state, outputs=optimizer.state)
        def step(p):
            count.append(1)
            return optimizer.apply_gradients(p, p)

        for _ in range(4):
            mx.eval(step(params), optimizer.state)
        return len(count)

    assert traces(Adagrad) <= traces(optim.Adagrad) == 1
