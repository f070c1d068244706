"""Row-sparse gradients: only the named rows change, and they change as numpy float64 says."""

import copy
import gc
import pickle
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_unflatten

import recorded
import row_cases
from cases import GPU_DTYPES, assert_near, bits, options, to_numpy
from mlx_adagrad import Adagrad, Dense, RowSparse, RowWise
from mlx_adagrad.sparse import gradient as gradient_rows
from mlx_adagrad.sparse import ops as row_ops
from mlx_adagrad.update import streams
from mlx_adagrad.update.modifiers import Modifiers
from mlx_adagrad.update.rule import Rule

accumulators = pytest.mark.parametrize("accumulator", [Dense(), RowWise()], ids=lambda a: type(a).__name__)


def sparse(gradient, rows):
    indices, values = gradient
    return RowSparse(indices, values, rows)


def run(optimizer, table, gradients):
    for gradient in gradients:
        table = optimizer.apply_gradients({"w": sparse(gradient, len(table))}, {"w": table})["w"]
        mx.eval(table, optimizer.state)
    return table, optimizer.state["w"]["v"]


# --- the gradient -----------------------------------------------------------------------------------------------------


def test_shape_dtype_and_arithmetic():
    indices, values = mx.array([3, 1, 3]), mx.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], mx.float16)
    g = RowSparse(indices, values, 5)
    assert (g.shape, g.ndim, g.size, g.dtype, g.num_rows) == ((5, 2), 2, 10, mx.float16, 5)
    assert repr(g) == "RowSparse(3 rows of (5, 2), mlx.core.float16)"
    want = np.array([[0, 0], [3, 4], [0, 0], [6, 8], [0, 0]])
    for made, factor in ((g, 1), (g * 2, 2), (2 * g, 2), (g * mx.array(3.0), 3), (g / 2, 0.5), (g + g / 2, 1.5)):
        assert np.array_equal(to_numpy(made.to_dense()), factor * want)
        assert made.to_dense().shape == g.shape and made.to_dense().dtype == made.dtype
    assert (g + g).values.shape == (6, 2)
    coalesced = g.coalesce()
    assert (coalesced * 2).coalesce().values.tolist() == [[6, 8], [12, 16], [0, 0]]
    assert np.array_equal(to_numpy((coalesced + g).to_dense()), 2 * want)


@pytest.mark.parametrize("dtype", [*GPU_DTYPES, mx.float64], ids=str)
def test_coalesce_sums_duplicates_in_fp32(dtype, cpu):
    _, ((indices, values),) = row_cases.draw(20, k=15, steps=1, dtype=dtype)
    g = RowSparse(indices, values, 20).coalesce()
    names = row_cases.named(indices, 20)
    found = names.sum()
    assert g.dtype == (mx.float64 if dtype == mx.float64 else mx.float32) and g.values.shape == (15, 6)
    assert g.indices.tolist() == np.flatnonzero(names).tolist() + [20] * (15 - found)
    want = row_cases.dense(indices, values, 20)
    np.testing.assert_allclose(np.array(g.values)[:found], want[names], rtol=1e-5, atol=1e-6)
    assert not np.array(g.values)[found:].any()
    np.testing.assert_allclose(np.linalg.norm(np.array(g.values)), np.linalg.norm(want), rtol=1e-5)
    assert g.coalesce() is g


def test_half_precision_duplicates_do_not_stall():
    g = RowSparse(mx.zeros((5000,), mx.int32), mx.ones((5000, 2), mx.bfloat16), 3)
    assert g.coalesce().values[0].tolist() == [5000, 5000]


@pytest.mark.parametrize("columns", [(1,), (3,), (4,), (2, 3), (3, 1, 2)], ids=str)
@pytest.mark.parametrize("rows, k", [(1, 1), (1, 9), (5, 0), (5, 3), (5, 40), (300, 7)])
def test_to_dense_for_every_shape(rows, k, columns):
    _, ((indices, values),) = row_cases.draw(rows, columns, k=k, steps=1)
    g = RowSparse(indices, values, rows)
    assert g.coalesce().values.shape == (min(k, rows), *columns)
    assert_near(g.to_dense(), row_cases.dense(indices, values, rows))


@pytest.mark.parametrize("differentiable", [False, True])
def test_both_ways_to_sum_agree(differentiable):
    _, ((indices, values),) = row_cases.draw(9, (4,), k=20, steps=1)
    g = RowSparse(indices, values, 9).coalesced_by(False, differentiable)
    assert_near(g.to_dense(), row_cases.dense(indices, values, 9))


UNSIGNED = [mx.uint8, mx.uint16, mx.uint32, mx.uint64]


@pytest.mark.parametrize("dtype", [mx.int8, mx.int16, mx.int32, mx.int64, *UNSIGNED], ids=str)
def test_every_integer_dtype(dtype):
    ids = [3, 1, 3, 100]
    if dtype not in UNSIGNED:
        ids += [-1, -128]
    if dtype.size >= 4:
        ids += [1000, 2**31 - 1]
    if dtype == mx.uint32:
        ids += [2**32 - 1]
    if dtype.size == 8:
        ids += [2**32 + 3, 2**62]  # not to be taken for 3 and 0
    values = mx.random.normal((len(ids), 2))
    for rows in (101, 1000):
        want = np.zeros((rows, 2))
        np.add.at(want, ids[:4], np.array(values)[:4])
        assert_near(RowSparse(mx.array(ids, dtype), values, rows).to_dense(), want)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (([1], mx.ones((1, 2)), 3), TypeError, "'indices' must be an array but got list"),
        ((mx.array([1]), [[1.0]], 3), TypeError, "'values' must be an array but got list"),
        ((mx.array([1.0]), mx.ones((1, 2)), 3), TypeError, "'indices' must be integers but got mlx.core.float32"),
        ((mx.array([True]), mx.ones((1, 2)), 3), TypeError, "'indices' must be integers but got mlx.core.bool"),
        ((mx.array([1]), mx.ones((1, 2), mx.int32), 3), TypeError, "'values' must be floating but got mlx.core.int32"),
        ((mx.array([1]), mx.ones((1, 2), mx.complex64), 3), TypeError, "must be floating but got mlx.core.complex64"),
        ((mx.array([1]), mx.ones((1, 2)), 3.0), TypeError, "'num_rows' must be an int but got 3.0"),
        ((mx.array([1]), mx.ones((1, 2)), True), TypeError, "'num_rows' must be an int but got True"),
        ((mx.array([1]), mx.ones((1, 2)), -1), ValueError, "'num_rows' must be between 0 and 2^31 - 1 but got -1"),
        ((mx.array([1]), mx.ones((1, 2)), 2**31), ValueError, "'num_rows' must be between 0 and 2^31 - 1"),
        ((mx.array([1]), mx.ones((1, 2)), 0), ValueError, "a table of 0 rows has no row for 1 indices"),
        ((mx.array([[1]]), mx.ones((1, 2)), 3), ValueError, "have shapes (K,) and (K, ...) but got (1, 1) and (1, 2)"),
        ((mx.array([1]), mx.array(1.0), 3), ValueError, "but got (1,) and ()"),
        ((mx.array([1]), mx.ones((2, 2)), 3), ValueError, "but got (1,) and (2, 2)"),
    ],
)
def test_bad_gradients_are_refused(arguments, error, message):
    with pytest.raises(error) as raised:
        RowSparse(*arguments)
    assert str(raised.value).startswith("[RowSparse] ") and message in str(raised.value)


def test_bad_arithmetic_is_refused():
    g = RowSparse(mx.array([1]), mx.ones((1, 2)), 3)
    with pytest.raises(ValueError, match=r"only scalars multiply and divide it, not an array of shape \(2,\)"):
        _ = g * mx.ones((2,))
    with pytest.raises(TypeError, match="only scalars multiply and divide it, not str"):
        _ = g / "2"  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"tables of shape \(3, 2\) and \(4, 2\)"):
        _ = g + RowSparse(mx.array([1]), mx.ones((1, 2)), 4)
    with pytest.raises(TypeError):
        _ = g + 1.0  # type: ignore[operator]


def test_stock_functions_refuse_it_in_our_words(monkeypatch):
    average: Any = nn.average_gradients
    wide, narrow = RowSparse(mx.array([1]), mx.ones((1, 2)), 3), mx.ones((2,), mx.float16)

    class Group:
        def size(self):
            return 2

    monkeypatch.setattr(mx.distributed, "all_sum", lambda x, **_: mx.array(x))  # that of a group needs two processes
    for gradients in ({"table": wide}, {"table": wide, "bias": narrow}, {"bias": mx.ones((2,)), "table": wide}):
        for size in (32 * 1024**2, 0):
            with pytest.raises(TypeError, match=r"^\[RowSparse\] .* mlx_adagrad\.distributed\.average_gradients"):
                average(gradients, Group(), size)
    functions: Any = mx.distributed.all_sum, lambda g: mx.ones((3, 2)) + g, lambda g: g + mx.ones((3, 2)), mx.square
    for function in functions:
        with pytest.raises(TypeError, match=r"^\[RowSparse\] it is no array\. .* to_dense"):
            function(wide)
    clip: Any = optim.clip_grad_norm
    with pytest.raises(AttributeError, match=r"^\[RowSparse\] there is no attribute 'square'\. .* mlx_adagrad\.wr"):
        clip({"table": wide}, 1.0)
    with pytest.raises(AttributeError, match=r"^\[RowSparse\] there is no attribute 'colour'\.$"):
        _ = wide.colour
    assert not hasattr(wide, "astype") and getattr(wide, "T", None) is None
    again = pickle.loads(pickle.dumps(copy.deepcopy(wide.coalesce())))
    assert mx.array_equal(again.to_dense(), wide.to_dense())


# --- the update -------------------------------------------------------------------------------------------------------


@options
@accumulators
@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
def test_equals_float64(options, accumulator, dtype):
    table, gradients = row_cases.draw(30, dtype=dtype)
    row_wise = isinstance(accumulator, RowWise)
    got_w, got_v = run(Adagrad(0.1, **options, accumulator=accumulator), table, gradients)
    want_w, want_v = row_cases.adagrad(table, gradients, row_wise=row_wise, **options)
    assert got_w.dtype == dtype and got_v.dtype == mx.float32
    assert got_v.shape == ((30,) if row_wise else (30, 6))
    assert_near(got_w, want_w, dtype)
    assert_near(got_v, want_v, dtype if options.get("weight_decay") else mx.float32)


@options
@accumulators
@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
def test_parameters_with_one_axis_equal_float64(options, accumulator, dtype):
    table, gradients = row_cases.draw(30, (), dtype=dtype)
    got_w, got_v = run(Adagrad(0.1, **options, accumulator=accumulator), table, gradients)
    want_w, want_v = row_cases.adagrad(table, gradients, **options)
    assert got_w.shape == got_v.shape == (30,) and got_w.dtype == dtype
    assert_near(got_w, want_w, dtype)
    assert_near(got_v, want_v, dtype if options.get("weight_decay") else mx.float32)
    with pytest.raises(ValueError, match="cannot add gradients"):
        _ = sparse(gradients[0], 30) + RowSparse(mx.array([1]), mx.ones((1, 1)), 30)


@options
def test_float64_tables_are_computed_in_float64(options, cpu):
    table, gradients = row_cases.draw(30, dtype=mx.float64)
    optimizer = Adagrad(0.1, **options)
    got_w, got_v = run(optimizer, table, gradients)
    lr: Any = optimizer.learning_rate.item()  # fp32
    want_w, want_v = row_cases.adagrad(table, gradients, learning_rate=lr, **options)
    assert got_w.dtype == got_v.dtype == mx.float64
    assert_near(got_w, want_w, mx.float64)
    assert_near(got_v, want_v, mx.float64)


@pytest.mark.parametrize("columns", [(), (1,), (3,), (8,), (2, 3)], ids=str)
@pytest.mark.parametrize("rows, k", [(1, 1), (1, 9), (5, 40), (300, 7)])
@accumulators
def test_every_shape(rows, k, columns, accumulator):
    table, gradients = row_cases.draw(rows, columns, k=k)
    got_w, got_v = run(Adagrad(0.1, accumulator=accumulator), table, gradients)
    want_w, want_v = row_cases.adagrad(table, gradients, row_wise=isinstance(accumulator, RowWise))
    assert got_w.shape == table.shape
    assert_near(got_w, want_w)
    assert_near(got_v, want_v)


@accumulators
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
def test_rows_that_are_not_named_keep_every_bit(accumulator, weight_decay, dtype):
    odd = mx.array([-0.0, float("nan"), float("inf"), 1e-30, 0.0], dtype)
    table = mx.concatenate([mx.ones((3, 5), dtype), mx.broadcast_to(odd, (3, 5))])
    for indices in ([0, 2, 2, 0], [-1, 6, 77, -6], [6] * 4, [1, -1, 6, 1]):
        optimizer = Adagrad(0.1, weight_decay=weight_decay, accumulator=accumulator, initial_accumulator_value=0.5)
        optimizer.init({"w": table})
        v = mx.array(optimizer.state["w"]["v"])
        new = optimizer.apply_gradients({"w": RowSparse(mx.array(indices), mx.ones((4, 5), dtype), 6)}, {"w": table})
        idle = mx.array(np.flatnonzero(~row_cases.named(indices, 6)))
        assert bits(new["w"][idle]) == bits(table[idle])
        assert bits(optimizer.state["w"]["v"][idle]) == bits(v[idle])
        assert not mx.array_equal(new["w"][:3], table[:3]) or not row_cases.named(indices, 6).any()


@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
@accumulators
def test_equals_the_dense_update_where_nothing_decays(dtype, accumulator):
    table, gradients = row_cases.draw(30, dtype=dtype)
    got_w, got_v = run(Adagrad(0.1, accumulator=accumulator), table, gradients)
    dense = Adagrad(0.1, accumulator=accumulator)
    for gradient in gradients:
        g = sparse(gradient, 30).coalesce().to_dense()
        table = dense.apply_gradients({"w": g}, {"w": table})["w"]
    assert_near(got_w, to_numpy(table), dtype, steps=1)
    assert_near(got_v, to_numpy(dense.state["w"]["v"]), steps=1)


@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
def test_duplicates_may_come_in_any_order_and_in_parts(dtype):
    table, ((indices, values),) = row_cases.draw(8, k=40, steps=1, dtype=dtype)
    want = [to_numpy(x) for x in run(Adagrad(0.1), table, [(indices, values)])]
    rng = np.random.default_rng(1)
    order = mx.array(rng.permutation(40))
    halves = mx.concatenate([indices, indices]), mx.concatenate([values, values]) / 2
    unique = RowSparse(indices, values, 8).coalesce()
    for variant in ((indices[order], values[order]), halves, (unique.indices, unique.values)):
        for got, w in zip(run(Adagrad(0.1), table, [variant]), want, strict=True):
            assert_near(got, w, dtype, steps=1)


def test_an_empty_gradient_changes_nothing_but_counts():
    table, _ = row_cases.draw(5)
    empty = (mx.zeros((0,), mx.int32), mx.zeros((0, 6)))
    optimizer = Adagrad(optim.exponential_decay(0.1, 0.5), weight_decay=0.1)
    new, v = run(optimizer, table, [empty, empty])
    assert bits(new) == bits(table) and not v.any().item()
    assert optimizer.step.item() == 2 and optimizer.learning_rate.item() == pytest.approx(0.05)


def test_tables_without_elements():
    for shape in ((0, 3), (4, 0)):
        g = RowSparse(mx.zeros((0,), mx.int32), mx.zeros((0, shape[1])), shape[0])
        assert Adagrad(0.1).apply_gradients({"w": g}, {"w": mx.zeros(shape)})["w"].shape == shape
    g = RowSparse(mx.array([1, 1]), mx.zeros((2, 0)), 4)
    assert Adagrad(0.1).apply_gradients({"w": g}, {"w": mx.zeros((4, 0))})["w"].shape == (4, 0)


def test_row_wise_state_is_one_number_a_row():
    optimizer = Adagrad(0.1, accumulator=RowWise())
    optimizer.init({"w": mx.zeros((50, 64))})
    assert optimizer.state["w"]["v"].size == 50


def test_accumulator_in_the_parameters_dtype():
    for accumulator in (Dense("parameter"), RowWise("parameter")):
        table, gradients = row_cases.draw(30, dtype=mx.bfloat16, steps=1)
        w, v = run(Adagrad(0.1, accumulator=accumulator), table, gradients)
        dense = Adagrad(0.1, accumulator=accumulator)
        g = sparse(gradients[0], 30).coalesce().to_dense()
        want = dense.apply_gradients({"w": g}, {"w": table})["w"]
        assert v.dtype == mx.bfloat16
        assert_near(v, to_numpy(dense.state["w"]["v"]), mx.bfloat16, steps=1)
        assert_near(w, to_numpy(want), mx.bfloat16, steps=1)


def test_half_precision_is_rounded_once():
    # w + bf16(change) would give 1.0078125 here
    table = mx.ones((2, 1), mx.bfloat16)
    g = RowSparse(mx.array([0]), mx.array([[-1.0]]), 2)
    new = Adagrad(2**-8 * (1 - 2**-12)).apply_gradients({"w": g}, {"w": table})["w"]
    assert new[0].item() == 1.0
    above = Adagrad(2**-8 * (1 + 2**-12)).apply_gradients({"w": g}, {"w": table})["w"]
    assert above[0].item() == 1.0078125


def test_bf16_accumulator_from_a_stock_checkpoint_continues_in_fp32():
    table, gradients = row_cases.draw(5, steps=1)
    optimizer = Adagrad(0.1)
    state: Any = optimizer.state
    state["w"] = {"v": mx.full((5, 6), 0.5, mx.bfloat16)}
    _, v = run(optimizer, table, gradients)
    assert v.dtype == mx.float32
    assert_near(v, row_cases.adagrad(table, gradients, initial_accumulator_value=0.5)[1])


def test_a_run_may_switch_between_dense_and_sparse():
    table, gradients = row_cases.draw(20, steps=6)
    want = row_cases.adagrad(table, gradients)[0]
    optimizer = Adagrad(0.1)
    for t, gradient in enumerate(gradients):
        g = sparse(gradient, 20)
        table = optimizer.apply_gradients({"w": g if t % 2 else g.to_dense()}, {"w": table})["w"]
    assert_near(table, want)


@options
def test_not_lazy_means_the_dense_gradient(options):
    table, gradients = row_cases.draw(20)
    got_w, got_v = run(Adagrad(0.1, lazy=False, **options), table, gradients)
    dense = Adagrad(0.1, **options)
    for gradient in gradients:
        table = dense.apply_gradients({"w": sparse(gradient, 20).to_dense()}, {"w": table})["w"]
    assert bits([got_w, got_v]) == bits([table, dense.state["w"]["v"]])


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
@accumulators
def test_modifiers_enter_as_scalars(weight_decay, dtype, accumulator):
    table, (gradient, *_) = row_cases.draw(9, dtype=dtype)
    table = mx.concatenate([table[:8], mx.full((1, 6), -0.0, dtype)])
    gradient = mx.concatenate([gradient[0], mx.array([8])]), mx.concatenate([gradient[1], gradient[1][:1]])
    modifiers = Modifiers(scale=mx.array(0.5)).clipped(mx.array(-0.2), mx.array(0.3)).scaled(mx.array(2.0))
    for apply in (True, False):
        optimizer = Adagrad(0.1, weight_decay=weight_decay, accumulator=accumulator)
        optimizer.init({"w": table})
        held = modifiers.gated(mx.array(apply))
        new = optimizer.apply_modified({"w": sparse(gradient, 9)}, {"w": table}, held)["w"]
        v = optimizer.state["w"]["v"]
        if apply:
            clipped = row_cases.dense(*gradient, 9)
            clipped = 2 * np.clip(0.5 * clipped, -0.2, 0.3)
            names = np.flatnonzero(row_cases.named(gradient[0], 9))
            unique = mx.array(names), mx.array(clipped[names], mx.float32)
            want_w, want_v = row_cases.adagrad(
                table, [unique], weight_decay=weight_decay, row_wise=isinstance(accumulator, RowWise)
            )
            assert_near(new, want_w, dtype)
            assert_near(v, want_v)
        else:
            assert bits(new) == bits(table) and not v.any().item()
        assert optimizer.step.item() == apply


def test_a_held_back_step_survives_what_is_not_finite():
    table = mx.ones((3, 2))
    optimizer = Adagrad(0.1)
    g = RowSparse(mx.array([0, 5]), mx.array([[float("nan"), float("inf")]] * 2), 3)
    new = optimizer.apply_modified({"w": g}, {"w": table}, Modifiers(apply=mx.array(False)))["w"]
    assert mx.array_equal(new, table) and not optimizer.state["w"]["v"].any().item()
    new = optimizer.apply_gradients({"w": g}, {"w": table})["w"]
    assert mx.isnan(new).tolist() == [[True, True], [False, False], [False, False]]


def test_not_finite_values_without_a_row_harm_none():
    g = RowSparse(mx.array([-1, 1, 3]), mx.array([[float("nan")], [1.0], [float("inf")]]), 3)
    assert g.to_dense().tolist() == [[0], [1], [0]]
    assert not mx.isnan(Adagrad(0.1).apply_gradients({"w": g}, {"w": mx.ones((3, 1))})["w"]).any().item()


def test_groups_and_masks_hold_for_tables_too():
    table, gradients = row_cases.draw(9)
    optimizer = Adagrad(
        0.1,
        weight_decay=0.2,
        groups=[{"params": "a", "lr": 0.3}, {"params": "b", "maximize": True}],
        weight_decay_mask=lambda path, w: path != "c",
    )
    params = dict.fromkeys("abc", table)
    for gradient in gradients:
        params = optimizer.apply_gradients({name: sparse(gradient, 9) for name in params}, params)
    differences: dict[str, Any] = {
        "a": {"learning_rate": 0.3, "weight_decay": 0.2},
        "b": {"maximize": True, "weight_decay": 0.2},
        "c": {},
    }
    for name, differs in differences.items():
        assert_near(params[name], row_cases.adagrad(table, gradients, **differs)[0])


def test_an_accumulator_that_does_not_grow():
    table, gradients = row_cases.draw(9, steps=1)
    rule = Rule(update_accumulator=False, initial_accumulator_value=0.5, eps=0.0)
    new, v = run(Adagrad.from_rule(0.1, rule), table, gradients)
    assert mx.array_equal(v, mx.full((9, 6), 0.5))
    ((indices, values),) = gradients
    assert_near(new, to_numpy(table) - 0.1 * row_cases.dense(indices, values, 9) / np.sqrt(0.5))


def test_steps_per_parameter_count_calls_not_rows():
    table, gradients = row_cases.draw(9)
    rule = Rule(step_per_parameter=True, lr_decay=0.3)
    optimizer = Adagrad.from_rule(0.1, rule)
    got, _ = run(optimizer, table, gradients)
    assert optimizer.state["w"]["step"].item() == 4
    assert_near(got, row_cases.adagrad(table, gradients, lr_decay=0.3)[0])


@pytest.mark.parametrize(
    "table, error, message",
    [
        (mx.ones((4, 2)), ValueError, r"gradient of 'b' has shape \(3, 2\) but the parameter \(4, 2\)"),
        (mx.ones((3, 4)), ValueError, r"gradient of 'b' has shape \(3, 2\) but the parameter \(3, 4\)"),
        (mx.ones((3,)), ValueError, r"gradient of 'b' has shape \(3, 2\) but the parameter \(3,\)"),
        (mx.ones((3, 2), mx.int32), ValueError, "only floating and complex parameters"),
        (mx.ones((3, 2), mx.complex64), ValueError, "gradient of 'b' is row-sparse but the parameter complex64"),
        ([[1.0]], TypeError, "parameter of 'b' must be an array but got list"),
    ],
)
def test_a_bad_step_changes_nothing(table, error, message):
    optimizer = Adagrad(0.1)
    g = RowSparse(mx.array([1]), mx.ones((1, 2)), 3)
    with pytest.raises(error, match=message):
        optimizer.apply_gradients({"a": g, "b": g}, {"a": mx.ones((3, 2)), "b": table})
    assert list(optimizer.state) == ["step", "learning_rate"] and optimizer.step.item() == 0


def test_bad_arguments():
    with pytest.raises(TypeError, match="'lazy' must be True or False but got 1"):
        Adagrad(0.1, lazy=1)  # type: ignore[arg-type]
    optimizer = Adagrad(0.1, accumulator=RowWise())
    state: Any = optimizer.state
    state["w"] = {"v": mx.zeros((3, 2))}
    with pytest.raises(ValueError, match=r"has shape \(3, 2\) but must have \(3,\)"):
        optimizer.apply_gradients({"w": RowSparse(mx.array([1]), mx.ones((1, 2)), 3)}, {"w": mx.ones((3, 2))})


# --- saving, compile, derivatives, memory -----------------------------------------------------------------------------


@accumulators
@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
def test_saved_loaded_and_continued_equals_never_stopped(accumulator, dtype, tmp_path):
    table, gradients = row_cases.draw(20, steps=8, dtype=dtype)

    def new():
        return Adagrad(optim.exponential_decay(0.2, 0.9), accumulator=accumulator, weight_decay=0.01)

    straight, first, second = new(), new(), new()
    whole, _ = run(straight, table, gradients)
    half, _ = run(first, table, gradients[:4])
    file = str(tmp_path / "s.safetensors")
    mx.save_safetensors(file, {"half": half, **dict(tree_flatten({"s": first.state}))})
    loaded: Any = mx.load(file)
    half = loaded.pop("half")
    second.state = tree_unflatten(list(loaded.items()))["s"]
    half, _ = run(second, half, gradients[4:])
    assert bits(half) == bits(whole) and bits(second.state) == bits(straight.state)


@options
@accumulators
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_compiled_equals_plain(options, accumulator, dtype):
    table, gradients = row_cases.draw(20, dtype=dtype)
    plain, plain_v = run(Adagrad(0.1, **options, accumulator=accumulator), table, gradients)
    optimizer = Adagrad(0.1, **options, accumulator=accumulator)
    optimizer.init({"w": table})
    traces = []

    @partial(mx.compile, inputs=optimizer.state, outputs=optimizer.state)
    def step(table, indices, values):
        traces.append(1)
        return optimizer.apply_gradients({"w": RowSparse(indices, values, 20)}, {"w": table})["w"]

    for gradient in gradients:
        table = step(table, *gradient)
    assert len(traces) == 1
    assert_near(table, to_numpy(plain), dtype, steps=1)
    assert_near(optimizer.state["w"]["v"], to_numpy(plain_v), dtype if options.get("weight_decay") else None, steps=1)


def test_one_that_a_compiled_function_returned_is_of_no_use():
    g = mx.compile(lambda i, x: RowSparse(i, x, 3))(mx.array([1]), mx.ones((1, 2)))
    with pytest.raises(RuntimeError, match="If you are compiling a function, make sure all the inputs and outputs"):
        mx.eval(g.to_dense())


@accumulators
def test_derivatives_with_respect_to_everything(accumulator, cpu):
    indices = mx.array([1, 3, 1, 9, -1])
    table, values = mx.random.normal((6, 4)), mx.random.normal((5, 4))

    def loss(lr, table, values, sparse):
        optimizer = Adagrad(0.1, weight_decay=0.1, accumulator=accumulator, differentiable=True)
        optimizer.learning_rate = lr
        g = RowSparse(indices, values, 6)
        for _ in range(2):
            table = optimizer.apply_gradients({"w": g if sparse else g.to_dense()}, {"w": table})["w"]
        return (table[1::2] ** 3).sum()  # rows 1, 3 and 5; 5 is not named, and decays where the gradient is dense

    arguments = mx.array(0.3), table, values
    table[5] = 0.0
    for i in range(3):
        got, want = (mx.grad(loss, argnums=i)(*arguments, sparse) for sparse in (True, False))
        assert mx.abs(want).max() > 0.01
        assert_near(got[:5] if i == 1 else got, to_numpy(want[:5] if i == 1 else want), steps=20)


def test_derivatives_need_the_flag(cpu):
    g = RowSparse(mx.array([1]), mx.ones((1, 2)), 3)

    def loss(lr, differentiable):
        optimizer = Adagrad(0.1, differentiable=differentiable)
        optimizer.learning_rate = lr
        return optimizer.apply_gradients({"w": g}, {"w": mx.ones((3, 2))})["w"].sum()

    assert mx.grad(loss)(mx.array(0.3), True).item() == pytest.approx(-2)
    with pytest.raises(ValueError, match="Not implemented for View"):
        mx.grad(loss)(mx.array(0.3), False)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
@pytest.mark.parametrize("accumulator", [Dense(), Dense("parameter"), RowWise()], ids=str)
def test_tables_are_updated_in_place(weight_decay, dtype, accumulator, cpu):
    rows, columns, k = 100_000, 64, 640
    params = {"w": mx.random.normal((rows, columns)).astype(dtype)}
    optimizer = Adagrad(0.1, weight_decay=weight_decay, accumulator=accumulator)
    optimizer.init(params)
    mx.eval(params, optimizer.state)
    for step in range(3):
        g = RowSparse(mx.random.randint(0, rows, (k,)), mx.random.normal((k, columns)), rows)
        mx.eval(g.indices, g.values)
        gc.collect()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        params = optimizer.apply_gradients({"w": g}, params)
        mx.eval(params, optimizer.state)
        assert mx.get_peak_memory() - before < 0.1 * params["w"].nbytes, step


@options
@pytest.mark.parametrize("accumulator", [Dense(), Dense("parameter"), RowWise()], ids=str)
@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
def test_many_rows_are_replaced_as_few_are_added_to(options, accumulator, dtype, cpu, monkeypatch):
    table, gradients = row_cases.draw(30, dtype=dtype)
    want = run(Adagrad(0.1, **options, accumulator=accumulator), table, gradients)
    replaced = []
    monkeypatch.setattr(streams, "PARALLEL_ELEMENTS", 1)
    monkeypatch.setattr(row_ops, "put_rows", lambda *a, put=row_ops.put_rows: replaced.append(1) or put(*a))
    got = run(Adagrad(0.1, **options, accumulator=accumulator), table, gradients)
    assert len(replaced) == 2 * len(gradients)
    if options.get("decoupled_weight_decay"):  # what is added is rounded once more
        assert_near(got[0], to_numpy(want[0]), dtype)
    else:
        assert bits(got) == bits(want)


@pytest.mark.parametrize("how", ["replaced", "added to", "compiled"])
@pytest.mark.parametrize("accumulator", [Dense("parameter"), RowWise("parameter")], ids=str)
@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
def test_v_in_half_precision_is_rounded_after_the_update(accumulator, dtype, how):
    table = mx.zeros((5, 4), dtype)
    optimizer = Adagrad(0.1, accumulator=accumulator, fused=False, differentiable=how == "added to")
    optimizer.init({"w": table})

    def step(indices, values, table):
        return optimizer.apply_gradients({"w": RowSparse(indices, values, 5)}, {"w": table})["w"]

    if how == "compiled":
        step = mx.compile(step, inputs=optimizer.state, outputs=optimizer.state)
    new = step(mx.array([3, 1]), mx.full((2, 4), 1e-4, dtype), table)  # g² is 0 in fp16
    want = np.zeros((5, 4))
    want[[1, 3]] = -0.1
    assert_near(new, want, dtype)


def test_not_lazy_sums_half_precision_in_fp32():
    indices, values = mx.zeros((3000,), mx.int32), mx.random.normal((3000, 4)).astype(mx.bfloat16)
    g = RowSparse(indices, values, 3)
    optimizers = [Adagrad(0.1, lazy=lazy) for lazy in (True, False)]
    for optimizer in optimizers:
        optimizer.apply_gradients({"w": g}, {"w": mx.zeros((3, 4))})
    assert_near(optimizers[1].state["w"]["v"], to_numpy(optimizers[0].state["w"]["v"]))


def test_nothing_is_replaced_where_no_row_is_named(cpu, monkeypatch):
    monkeypatch.setattr(streams, "PARALLEL_ELEMENTS", 1)
    table, _ = row_cases.draw(30)
    g = RowSparse(mx.array([-1, 30, 99]), mx.ones((3, *table.shape[1:])), 30)
    optimizer = Adagrad(0.1, weight_decay=0.1)
    new = optimizer.apply_gradients({"w": g}, {"w": table})
    assert bits(new) == bits({"w": table})
    assert not optimizer.state["w"]["v"].any()


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.float64], ids=str)
@pytest.mark.parametrize("shape", [(9,), (9, 1), (9, 3), (9, 4), (9, 3, 2), (9, 2, 3)], ids=str)
def test_rows_are_put_where_they_belong(shape, dtype, cpu):
    table, new = mx.random.normal(shape).astype(dtype), mx.random.normal((3, *shape[1:])).astype(dtype)
    want = to_numpy(table).copy()
    want[[7, 0, 4]] = to_numpy(new)
    got = gradient_rows.put_rows(table, mx.array([7, 0, 4]), new)
    assert got.dtype == dtype and got.shape == shape and np.array_equal(to_numpy(got), want)


def test_the_last_of_many_words_can_be_named(cpu):
    words = mx.zeros((2**31 // 32 - 1, 32))  # never evaluated
    assert gradient_rows._words(words, mx.int64) is not None
    assert gradient_rows._index(words, mx.array([len(words) - 1])).tolist() == list(range(2**31 - 64, 2**31 - 32))


def test_a_table_may_have_more_elements_than_an_axis(cpu):
    table, targets = mx.zeros((2**27, 64)), mx.array([5])  # MLX counts an axis in 32 bits; never evaluated
    assert gradient_rows.put_rows(table, targets, mx.ones((1, 64))).shape == table.shape
    assert gradient_rows._flat_sum(table, targets, mx.ones((1, 64))).shape == table.shape


def test_rows_are_not_replaced_while_something_traces(cpu, monkeypatch):
    table, gradients = row_cases.draw(30)
    want, want_v = run(Adagrad(0.1), table, gradients)
    monkeypatch.setattr(streams, "PARALLEL_ELEMENTS", 1)
    monkeypatch.setattr(row_ops, "put_rows", lambda *_: pytest.fail("replaced inside a trace"))
    optimizer = Adagrad(0.1)
    optimizer.init({"w": table})

    @partial(mx.compile, inputs=optimizer.state, outputs=optimizer.state)
    def step(table, indices, values):
        return optimizer.apply_gradients({"w": RowSparse(indices, values, 30)}, {"w": table})["w"]

    for gradient in gradients:
        table = step(table, *gradient)
    assert_near(table, to_numpy(want), steps=1)
    assert_near(optimizer.state["w"]["v"], to_numpy(want_v), steps=1)


def test_nothing_is_evaluated_inside_a_small_update(cpu, monkeypatch):
    table, gradients = row_cases.draw(20)
    optimizer = Adagrad(0.1)
    with monkeypatch.context() as patch:
        patch.setattr(mx, "eval", lambda *_: pytest.fail("evaluated"))
        new = optimizer.apply_gradients({"w": sparse(gradients[0], 20)}, {"w": table})["w"]
    assert_near(new, row_cases.adagrad(table, gradients[:1])[0])


# --- fuzz and recordings ----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_gradient(data):
    rows = data.draw(st.integers(1, 40), "rows")
    columns = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=2), "columns")
    ids = data.draw(st.lists(st.integers(-3, rows + 3), max_size=60), "indices")
    dtype = data.draw(st.sampled_from([mx.int32, mx.int64, mx.int16, mx.uint32]), "index dtype")
    w_dtype, g_dtype = (data.draw(st.sampled_from(GPU_DTYPES), name) for name in ("table", "values"))
    row_wise = data.draw(st.booleans(), "row-wise")
    extra: Any = {"weight_decay": 0.1} if data.draw(st.booleans(), "decay") else {}
    rng = np.random.default_rng(data.draw(st.integers(0, 99), "seed"))
    if dtype == mx.uint32:
        ids = [i % 2**32 for i in ids]
    table = mx.array(rng.normal(size=(rows, *columns)), mx.float32).astype(w_dtype)
    values = mx.array(rng.normal(size=(len(ids), *columns)), mx.float32).astype(g_dtype)
    gradients = [(mx.array(ids, dtype) if ids else mx.zeros((0,), dtype), values)] * 2
    accumulator = RowWise() if row_wise else Dense()
    got_w, got_v = run(Adagrad(0.1, accumulator=accumulator, **extra), table, gradients)
    want_w, want_v = row_cases.adagrad(table, gradients, row_wise=row_wise, **extra)
    assert_near(got_w, want_w, w_dtype)
    assert_near(got_v, want_v, w_dtype if extra else mx.float32)
    idle = mx.array(~row_cases.named(ids, rows)).reshape(-1, *(1,) * len(columns))
    assert mx.where(idle, got_w == table, True).all().item()


RECORDED: dict[str, Any] = {
    "torch_sparse": {"eps": 1e-10},
    "torch_sparse_lrd_iav": {"eps": 0.01, "lr_decay": 0.1, "initial_accumulator_value": 0.2},
    "torch_sparse_max": {"eps": 1e-10, "maximize": True},
    "tfk_legacy_sparse": {"eps": 1e-7, "initial_accumulator_value": 0.1},
    "tfk_new_sparse_wd": {
        "eps": 0.1, "initial_accumulator_value": 0.1, "eps_inside_sqrt": True, "weight_decay": 0.02,
        "decoupled_weight_decay": True, "lazy": False,
    },
    "fb_exact": {"eps": 1e-3},
    "fb_rowwise": {"accumulator": RowWise()},
    "fbd_rowwise_none": {"accumulator": RowWise()},
    "fbd_rowwise_l2": {"accumulator": RowWise(), "eps": 0.05, "weight_decay": 0.1},
    "fbd_rowwise_decouple": {
        "accumulator": RowWise(), "eps": 0.05, "weight_decay": 0.1, "decoupled_weight_decay": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("id", RECORDED)
def test_recorded_trajectories(id):
    case = recorded.case(id)
    optimizer = Adagrad(0.1, **RECORDED[id])
    (table,) = case.initial()
    duplicates = 0
    for t in range(case.steps):
        indices, values = case.gradients(t)
        duplicates += len(indices) - len(set(indices.tolist()))
        table = optimizer.apply_gradients({"w": RowSparse(indices, values, len(table))}, {"w": table})["w"]
        recorded.assert_close(case, [table], case.params(t))
        (wanted,) = case.acc(t)
        if wanted is not None:
            recorded.assert_close(case, [optimizer.state["w"]["v"].reshape(wanted.shape)], [wanted])
    assert duplicates
