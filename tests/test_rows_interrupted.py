"""An exception may come at any line of ``value_and_grad``: the next call works, on any thread."""

from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import mlx.nn as nn
import pytest

from cases import bits
from interrupt import Interrupt
from mlx_adagrad import RowSparse, SparseEmbedding, value_and_grad
from mlx_adagrad.sparse import look_ups


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.other = SparseEmbedding(6, 3), SparseEmbedding(5, 3)
        self.linear = nn.Linear(3, 1)

    def __call__(self, x):
        return self.linear(self.table(x) + self.other(x) + self.table(x + 1))


def failing(model):
    raise ValueError("the user's own")


def nested(model):
    """A loss that takes a gradient of the same tables itself."""
    value_and_grad(model, lambda: model(mx.array([1])).sum())()
    return model(mx.array([0, 2])).sum()


LOSSES = {"plain": lambda model: model(mx.array([0, 2, 2])).sum(), "nested": nested, "failing": failing}


def gradients_of(model):
    _, gradients = value_and_grad(model, lambda: model(mx.array([0, 2, 2])).sum())()
    dense = {key: g["weight"] for key, g in gradients.items()}
    return bits({key: g.to_dense() if isinstance(g, RowSparse) else g for key, g in dense.items()})


@pytest.mark.parametrize("exportable", [False, True], ids=["", "exportable"])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_an_exception_at_any_line_leaves_the_next_call_alone(loss, exportable):
    model = Model()
    mx.eval(model.parameters())
    weights, want = bits(model.parameters()), gradients_of(model)
    step = value_and_grad(model, lambda: loss(model), exportable=exportable)

    def run(interrupt):
        with interrupt, pytest.raises((KeyboardInterrupt, ValueError)):
            step()
            raise KeyboardInterrupt  # for the run that only counts
        return interrupt

    places = run(Interrupt()).places()
    assert len(places) > 50
    with ThreadPoolExecutor(1) as pool:
        for at in places:
            run(Interrupt(at))
            assert not look_ups._owners and not look_ups._calls() and not look_ups.differentiates_plainly(), at
            assert bits(model.parameters()) == weights, at
            assert pool.submit(gradients_of, model).result() == want, at
        assert gradients_of(model) == want
