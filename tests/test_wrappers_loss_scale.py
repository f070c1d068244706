"""A loss scale that nobody uses divides the gradients all the same: it says so, once."""

import pickle
import warnings

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_adagrad import Adagrad
from mlx_adagrad.wrappers import ClipByNorm, DynamicLossScale, ExponentialMovingAverage, LossScale, SkipNonFinite

GRADIENT = {"w": mx.ones((2,))}

SCALES = {
    "fixed": lambda: LossScale(Adagrad(0.1), 8),
    "dynamic": lambda: DynamicLossScale(Adagrad(0.1)),
    "inside": lambda: SkipNonFinite(ExponentialMovingAverage(LossScale(ClipByNorm(Adagrad(0.1), 1.0), 8))),
    "outside": lambda: DynamicLossScale(ClipByNorm(Adagrad(0.1), 1.0)),
}


def step(optimizer):
    return optimizer.apply_gradients(GRADIENT, {"w": mx.zeros((2,))})


@pytest.mark.parametrize("make", SCALES.values(), ids=SCALES)
def test_it_says_once_that_the_loss_was_not_scaled(make):
    optimizer = make()
    said = r"^\[(Dynamic)?LossScale\] divides the gradients, but nobody has scaled the loss: differentiate "
    with pytest.warns(UserWarning, match=said + r"optimizer.scale_loss\(loss\), or leave (Dynamic)?LossScale out.$"):
        step(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(optimizer)
        step(pickle.loads(pickle.dumps(optimizer)))


@pytest.mark.parametrize("make", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_loss_that_was_scaled_is_nothing_to_speak_of(make, compiled):
    model, optimizer = nn.Linear(2, 1), make()

    def train(x):
        _, gradients = nn.value_and_grad(model, lambda x: optimizer.scale_loss(model(x).sum()))(x)
        optimizer.update(model, gradients)

    state = [model.state, optimizer.state]
    train = mx.compile(train, inputs=state, outputs=state) if compiled else train
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            train(mx.ones((3, 2)))
            mx.eval(state)


def test_who_reads_the_scale_may_scale_by_hand_and_a_scale_of_1_divides_nothing():
    by_hand = DynamicLossScale(Adagrad(0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert by_hand.dynamic_scale.item() == 2**15
        step(by_hand)
        step(LossScale(Adagrad(0.1), 1))


def test_where_warnings_are_errors_nothing_has_changed():
    for make in SCALES.values():
        optimizer = make()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserWarning):
                step(optimizer)
        assert optimizer.step.item() == 0
