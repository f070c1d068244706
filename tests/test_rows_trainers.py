"""sparse_gradients: trainers that call nn.value_and_grad get ours, for as long as the context lasts."""

import sys
import threading
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.nn.utils
import pytest
from mlx.nn.utils import value_and_grad as stock
from mlx.utils import tree_flatten, tree_map

from cases import assert_near, to_numpy
from mlx_adagrad import Adagrad, RowSparse, SparseEmbedding, sparse_gradients, value_and_grad
from mlx_adagrad.sparse import trainers
from mlx_adagrad.wrappers import GradientAccumulation

ROWS = 12


def make():
    mx.random.seed(1)
    return nn.Sequential(SparseEmbedding(ROWS, 4), nn.Linear(4, ROWS))


def loss(model, x):
    return nn.losses.cross_entropy(model(x[:, :-1]), x[:, 1:]).mean()


def trainer(model, optimizer, batches, accumulate=1):
    """What mlx-lm's does: nn.value_and_grad by name, a compiled step that may hand gradients to the next."""
    gradient = nn.value_and_grad(model, loss)
    state = [model.state, optimizer.state, mx.random.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(batch, before, update):
        value, g = gradient(model, batch)
        if before is not None:
            g = tree_map(lambda x, y: x + y, g, before)
        if update:
            optimizer.update(model, tree_map(lambda x: x / accumulate, g) if accumulate > 1 else g)
            g = None
        return value, g

    sums = None
    for i, batch in enumerate(batches, 1):
        value, sums = step(batch, sums, i % accumulate == 0)
        mx.eval(state, value, sums)
    return model


def is_sparse():
    model = make()
    _, g = nn.value_and_grad(model, loss)(model, mx.array([[1, 2]]))
    _, h = mlx.nn.utils.value_and_grad(model, loss)(model, mx.array([[1, 2]]))
    kinds = {isinstance(tree["layers"][0]["weight"], RowSparse) for tree in (g, h)}
    assert len(kinds) == 1
    return kinds.pop()


def is_stock():
    return nn.value_and_grad is mlx.nn.utils.value_and_grad is stock


def batches(n=6):
    mx.random.seed(2)
    return [mx.random.randint(0, ROWS, (2, 5)) for _ in range(n)]


def test_a_trainer_gets_them_and_trains_the_same():
    want = trainer(make(), Adagrad(0.1), batches())
    seen = []

    class Spy(Adagrad):
        def apply_gradients(self, gradients, parameters):
            seen.append(type(gradients["layers"][0]["weight"]))
            return super().apply_gradients(gradients, parameters)

    with sparse_gradients():
        got = trainer(make(), Spy(0.1), batches())
    assert is_stock() and set(seen) == {RowSparse}
    assert_same(got, want)


def assert_same(got, want):
    pairs: Any = zip(tree_flatten(got.parameters()), tree_flatten(want.parameters()), strict=True)
    for (_, a), (_, b) in pairs:
        assert_near(a, to_numpy(b))


def test_accumulation_in_a_compiled_step_is_explained():
    message = r"^\[sparse_gradients\] .* mlx_adagrad\.wrappers\.GradientAccumulation\(optimizer, steps\)"
    with pytest.raises(TypeError, match=message), sparse_gradients():
        trainer(make(), Adagrad(0.1), batches(), accumulate=3)
    assert is_stock()
    want = trainer(make(), Adagrad(0.1), batches(), accumulate=3)
    with sparse_gradients():
        got = trainer(make(), GradientAccumulation(Adagrad(0.1), 3), batches())
    assert_same(got, want)


def test_it_ends_whatever_ends_it():
    for error in (ValueError("mine"), KeyboardInterrupt(), GeneratorExit(), RuntimeError("received type RowSparse")):
        with pytest.raises(type(error)) as raised, sparse_gradients():
            assert is_sparse()
            raise error
        assert raised.value is error and is_stock()

    @sparse_gradients()
    def decorated():
        return is_sparse()

    assert decorated() and decorated() and is_stock()


def test_an_interrupt_at_any_line_leaves_what_mlx_does():
    """At each line of the way in and out; the next context ends as any other."""
    lines = 0
    while True:
        left = [lines]

        def interrupt(frame, event, _):
            if frame.f_code.co_filename != trainers.__file__ or frame.f_code.co_name.startswith("_sparse"):
                return None
            if event == "line":
                left[0] -= 1  # noqa: B023
                if left[0] < 0:  # noqa: B023
                    raise KeyboardInterrupt
            return interrupt  # noqa: B023

        sys.settrace(interrupt)
        try:
            with sparse_gradients():
                pass
            done = left[0] >= 0
        except KeyboardInterrupt:
            done = False
        finally:
            sys.settrace(None)
        assert not is_sparse()
        with sparse_gradients():
            assert is_sparse()
        assert is_stock()
        if done:
            break
        lines += 1
    assert lines > 10


def test_contexts_may_be_nested_and_overlap():
    first, second = sparse_gradients(), sparse_gradients()
    with sparse_gradients():
        with sparse_gradients():
            assert is_sparse()
        assert is_sparse()
    assert is_stock()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert is_sparse()
    second.__exit__(None, None, None)
    assert is_stock()


def test_threads_may_use_it_at_once():
    wrong = []

    def run():
        for _ in range(300):
            with sparse_gradients():
                if nn.value_and_grad is stock:
                    wrong.append(1)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and is_stock()


def test_what_others_put_there_stays(monkeypatch):
    def theirs(model, fn):
        return stock(model, fn)

    monkeypatch.setattr(nn, "value_and_grad", stock)  # so that it is put back at the end
    with sparse_gradients():
        ours: Any = nn.value_and_grad
        monkeypatch.setattr(nn, "value_and_grad", theirs)
    assert nn.value_and_grad is theirs and mlx.nn.utils.value_and_grad is stock
    monkeypatch.setattr(nn, "value_and_grad", ours)  # as a patch of theirs would that ends after ours
    monkeypatch.setattr(mlx.nn.utils, "value_and_grad", ours)
    assert not is_sparse()


def test_functions_stay_as_they_were_made():
    model, x = make(), mx.array([[1, 2]])
    before = nn.value_and_grad(model, loss)
    with sparse_gradients():
        inside = nn.value_and_grad(model, loss)
        _, g = before(model, x)
        assert isinstance(g["layers"][0]["weight"], mx.array)
        plain = nn.Linear(2, 1)  # without a table it is MLX's
        _, g = nn.value_and_grad(plain, lambda x: plain(x).sum())(mx.ones((1, 2)))
        assert g["weight"].shape == (1, 2)
    _, g = inside(model, x)
    assert isinstance(g["layers"][0]["weight"], RowSparse)


def test_mlx_lm_trains_with_them():
    mlx_lm = pytest.importorskip("mlx_lm.tuner.trainer")

    def run(model, optimizer, **options):
        class Examples:
            def __len__(self):
                return 8

        def iterate(dataset, batch_size, max_seq_length, **_):
            while True:
                for batch in batches(4):
                    yield batch, mx.array([[0, 4], [0, 4]])

        args = mlx_lm.TrainingArgs(
            batch_size=2, iters=6, val_batches=0, steps_per_report=100, steps_per_save=100, **options
        )
        mlx_lm.train(model, optimizer, Examples(), None, args, iterate_batches=iterate)
        return model

    args: Any = {"adapter_file": None}
    want = run(make(), Adagrad(0.1), **args)
    with sparse_gradients():
        assert_same(run(make(), Adagrad(0.1), **args), want)
        with pytest.raises(TypeError, match="GradientAccumulation"), sparse_gradients():
            run(make(), Adagrad(0.1), grad_accumulation_steps=3, **args)
        got = run(make(), GradientAccumulation(Adagrad(0.1), 3), **args)
    assert is_stock()
    assert_same(got, run(make(), Adagrad(0.1), grad_accumulation_steps=3, **args))


# --- arguments --------------------------------------------------------------------------------------------------------


def test_arguments_in_the_wrong_order():
    wrong: Any = (make(), loss), (loss, make()), (loss, loss), ([make()], loss), (make(), None)
    for given, message in zip(
        wrong[1:],
        (
            r"'model' must be an mlx.nn.Module but got function: the model comes first, value_and_grad\(model, fn\)",
            r"'model' must be an mlx.nn.Module but got function\.",
            r"'model' must be an mlx.nn.Module but got list\.",
            r"'fn' must be a function but got NoneType\.",
        ),
        strict=True,
    ):
        with pytest.raises(TypeError, match=r"^\[value_and_grad\] " + message):
            value_and_grad(*given)


@pytest.mark.parametrize("x", [mx.array([1.0]), mx.array([True]), [0.5, 1.0], 2.0, mx.array([])], ids=repr)
def test_indices_must_be_integers(x):
    model = make()
    for call in (model.layers[0], lambda x: value_and_grad(model, lambda x: model.layers[0](x).sum())(x)):
        with pytest.raises(TypeError, match=r"^\[SparseEmbedding\] 'x' must hold integers, .* but is"):
            call(x)
    assert mx.array_equal(model.layers[0]([1, 2]), model.layers[0](mx.array([1, 2], mx.uint8)))
