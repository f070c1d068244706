"""An exception may come at any line of a step or of a swap: the optimizer and the model work on."""

from contextlib import suppress

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from cases import bits
from interrupt import Interrupt
from mlx_adagrad import Adagrad
from mlx_adagrad.wrappers import ExponentialMovingAverage, GradientAccumulation


def interrupted(run):
    """Once for each line: run it until there."""
    run()  # what runs only once
    with Interrupt() as interrupt:
        run()
    places = interrupt.places()
    assert len(places) > 10
    for at in places:
        with suppress(KeyboardInterrupt), Interrupt(at):
            run()
        yield at


def test_averages_leave_the_model():
    model = nn.Linear(3, 2)
    optimizer = ExponentialMovingAverage(Adagrad(0.1))
    for _ in range(2):
        optimizer.update(model, model.parameters())
    mx.eval(model.parameters(), optimizer.state)
    own = bits(model.parameters())

    def evaluate():
        with optimizer.averaged(model):
            assert bits(model.parameters()) != own

    for at in interrupted(evaluate):
        assert bits(model.parameters()) == own, at
        evaluate()


def test_schedules_are_those_of_the_optimizer_again():
    inner = optim.SGD(optim.exponential_decay(0.1, 0.5))
    optimizer, w = GradientAccumulation(inner, 1), {"w": mx.ones((2,))}
    schedules = inner._schedulers
    for at in interrupted(lambda: optimizer.apply_gradients(w, w)):
        assert inner._schedulers is schedules, at


def test_a_subclass_may_update_one_tensor_afterwards():
    class Sub(Adagrad):
        def apply_single(self, gradient, parameter, state):
            return super().apply_single(gradient, parameter, state)

    optimizer, w = Sub(0.1), {"w": mx.ones((2,))}
    for at in interrupted(lambda: optimizer.apply_gradients(w, w)):
        assert optimizer._in_progress is None, at
