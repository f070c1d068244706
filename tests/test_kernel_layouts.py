"""What a fused step of a whole model launches and moves: gradients are read where MLX's layers leave them."""

import itertools
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from cases import assert_near, to_numpy
from mlx_adagrad import Adagrad, RowWise
from reference import adagrad


def normal(*shape):
    return mx.random.normal(shape)


MODELS: dict[str, Any] = {
    "Linear": lambda: (nn.Linear(5, 7), [normal(2, 3, 5)]),
    "Bilinear": lambda: (nn.Bilinear(4, 5, 6), [normal(3, 4), normal(3, 5)]),
    "Conv1d": lambda: (nn.Conv1d(5, 7, 3), [normal(2, 9, 5)]),
    "Conv2d": lambda: (nn.Conv2d(5, 7, 3), [normal(2, 9, 9, 5)]),
    "Conv3d": lambda: (nn.Conv3d(5, 7, 3), [normal(2, 6, 6, 6, 5)]),
    "Conv2d, groups": lambda: (nn.Conv2d(6, 6, 3, groups=3), [normal(2, 9, 9, 6)]),
    "ConvTranspose1d": lambda: (nn.ConvTranspose1d(5, 7, 3), [normal(2, 6, 5)]),
    "ConvTranspose3d": lambda: (nn.ConvTranspose3d(5, 7, 3), [normal(2, 6, 6, 6, 5)]),
    "Embedding": lambda: (nn.Embedding(9, 4), [mx.array([1, 2, 1])]),
    "MultiHeadAttention": lambda: (nn.MultiHeadAttention(8, 2, bias=True), [normal(2, 3, 8)] * 3),
    "LayerNorm": lambda: (nn.LayerNorm(8), [normal(2, 3, 8)]),
    "RMSNorm": lambda: (nn.RMSNorm(8), [normal(2, 3, 8)]),
    "BatchNorm": lambda: (nn.BatchNorm(8), [normal(2, 3, 8)]),
    "GroupNorm": lambda: (nn.GroupNorm(2, 8), [normal(2, 3, 8)]),
    "LSTM": lambda: (nn.LSTM(4, 5), [normal(2, 3, 4)]),
    "transformer block": lambda: (nn.TransformerEncoderLayer(16, 2), [normal(2, 3, 16), None]),
    "CNN": lambda: (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), lambda x: x.flatten(1), nn.Linear(288, 10)),
        [normal(2, 10, 10, 3)],
    ),
}
models = pytest.mark.parametrize("name", MODELS)


def gradients(model: nn.Module, inputs: list) -> Any:
    def loss(model, *inputs):
        out = model(*inputs)
        return mx.sin(out[0] if isinstance(out, tuple) else out).sum()

    return nn.value_and_grad(model, loss)(model, *inputs)[1]


def is_transposed(array):
    return not np.asarray(array).flags.c_contiguous


def test_most_layers_leave_gradients_that_are_not_contiguous():
    """Else the law below proves nothing: these are the layouts that MLX copied before a launch."""
    for name in ("Linear", "Bilinear", "Conv2d, groups", "ConvTranspose3d", "MultiHeadAttention", "LSTM"):
        assert any(is_transposed(g) for _, g in tree_flatten(gradients(*MODELS[name]()))), name


@models
@pytest.mark.parametrize("dtype, promised", [(mx.float32, 20), (mx.bfloat16, 14)], ids=["float32", "bfloat16"])
def test_a_step_of_a_model_launches_once_a_tensor_and_moves_each_element_once(host, name, dtype, promised):
    model, inputs = MODELS[name]()
    model.set_dtype(dtype)
    inputs = [x if x is None or x.dtype == mx.int32 else x.astype(dtype) for x in inputs]
    optimizer = Adagrad(0.1, fused=True)
    for _ in range(2):  # the second step meets the weights and the state that the kernel wrote
        grads, tensors = gradients(model, inputs), dict(tree_flatten(model.trainable_parameters()))
        mx.eval(grads)
        host.clear()
        optimizer.update(model, grads)
        assert sum(launch.launches for launch in host.launches) == len(tensors)
        moved = sum(launch.traffic("w", "g", "v") for launch in host.launches)
        assert moved == promised * sum(w.size for w in tensors.values())


@models
@pytest.mark.parametrize("accumulator", [None, RowWise()], ids=["dense", "row-wise"])
def test_a_step_of_a_model_is_that_of_float64(kernel_device, name, accumulator):
    model, inputs = MODELS[name]()
    start = dict(tree_flatten(model.trainable_parameters()))
    grads = gradients(model, inputs)
    Adagrad(0.1, accumulator=accumulator, fused=True).update(model, grads)
    trained, grads = dict(tree_flatten(model.trainable_parameters())), dict(tree_flatten(grads))
    for path, w in start.items():
        row_wise = accumulator is not None and w.ndim > 1
        want, _ = adagrad(to_numpy(w), [to_numpy(grads[path])], row_wise=row_wise)[-1]
        assert_near(trained[path], want)


def views(shape):
    """The same values in every layout: axes in any order, backwards, with gaps, and broadcast."""
    array = normal(*shape)
    for order in itertools.permutations(range(len(shape))):
        back = np.argsort(order).tolist()
        yield mx.contiguous(array.transpose(order)).transpose(back)
    flip = tuple(slice(None, None, -1) for _ in shape)
    yield array[flip]
    yield mx.concatenate([array, array], axis=-1)[..., ::2]
    yield mx.broadcast_to(array[..., :1], shape)
    yield mx.broadcast_to(normal(1), shape)


@pytest.mark.parametrize("shape", [(7,), (5, 9), (3, 4, 5), (2, 3, 4, 3), (2, 3, 2, 3, 2)], ids=str)
def test_no_layout_is_copied(host, shape):
    plain = normal(*shape)
    for view in views(shape):
        for w, g, v in ((plain, view, plain), (view, plain, view), (view, view, view)):
            optimizer = Adagrad(0.1, fused=True)
            state: Any = optimizer.state
            state["w"] = {"v": mx.square(v)}
            assert_one_launch_without_copies(host, optimizer, w, g, to_numpy(g) ** 2)


@pytest.mark.parametrize("shape", [(5, 9), (3, 4, 5), (2, 3, 4, 3), (2, 3, 2, 3, 2)], ids=str)
def test_no_layout_is_copied_where_a_row_has_one_accumulator(host, shape):
    plain = normal(*shape)
    for view in views(shape):
        for w, g in ((plain, view), (view, plain), (view, view)):
            optimizer = Adagrad(0.1, accumulator=RowWise(), fused=True)
            optimizer.init({"w": w})
            mean = (to_numpy(g) ** 2).mean(axis=tuple(range(1, len(shape))), keepdims=True)
            assert_one_launch_without_copies(host, optimizer, w, g, mean)


def assert_one_launch_without_copies(host, optimizer, w, g, square):
    v = to_numpy(optimizer.state["w"]["v"])
    host.clear()
    new = optimizer.apply_gradients({"w": g}, {"w": w})["w"]
    (launch,) = host.launches
    assert not launch.copies
    root = np.sqrt(v.reshape(square.shape) + square)
    assert_near(new, to_numpy(w) - 0.1 * to_numpy(g) / (root + 1e-8), steps=2)


def test_the_harness_counts_the_copies_of_mlx(host):
    body = "y[thread_position_in_grid.x] = 2 * x[thread_position_in_grid.x];"
    kernel: Any = mx.fast.metal_kernel(name="twice", input_names=["x"], output_names=["y"], source=body)
    x = mx.arange(12.0).reshape(3, 4)
    for view, copies in ((x, {}), (x.T, {"x": 96}), (x[1:], {}), (x[:, 1:], {"x": 72}), (x[:, :1][::1], {"x": 24})):
        host.clear()
        where: Any = {"grid": (view.size, 1, 1), "threadgroup": (32, 1, 1)}
        (y,) = kernel(inputs=[view], output_shapes=[view.shape], output_dtypes=[view.dtype], **where)
        assert mx.array_equal(y, 2 * view) and host.launches[0].copies == copies
        assert host.launches[0].launches == 1 + len(copies)
