"""An optimizer of ours in the place of a class that a trainer looks up by name."""

import inspect

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest

import mlx_adagrad
from mlx_adagrad import stand_in
from mlx_adagrad.wrappers import SkipNonFinite

ADAMW = optim.AdamW


def trainer(model: nn.Module) -> optim.Optimizer:
    """What trainers do: look the class up by name, hand it what they know of, check what came."""
    found = {"adam": optim.Adam, "adamw": optim.AdamW}["adamw"]
    optimizer = found(learning_rate=0.5, weight_decay=0.1, betas=[0.9, 0.95])
    optimizer.update(model, {"weight": mx.ones((1, 2))})
    return optimizer


def test_the_trainer_gets_ours_with_its_own_arguments_and_the_class_comes_back():
    given = {}

    def make(learning_rate, **ignored):
        given.update(ignored)
        return mlx_adagrad.Adagrad(learning_rate)

    model = nn.Linear(2, 1, bias=False)
    before = model.weight
    with stand_in("AdamW", make):
        assert isinstance(trainer(model), mlx_adagrad.Adagrad)
        assert optim.AdamW is not ADAMW
    assert given == {"weight_decay": 0.1, "betas": [0.9, 0.95]}
    assert mx.allclose(model.weight, before - 0.5)  # the first step of Adagrad: g / |g|
    assert optim.AdamW is ADAMW


def test_inside_the_factory_the_class_is_the_real_one():
    with stand_in("AdamW", lambda **given: SkipNonFinite(optim.AdamW(**given))):
        optimizer = trainer(nn.Linear(2, 1, bias=False))
    assert isinstance(optimizer, SkipNonFinite) and type(optimizer.optimizer) is ADAMW


def test_the_class_comes_back_after_an_error_and_blocks_can_be_nested():
    with pytest.raises(KeyError), stand_in("AdamW", lambda *_: mlx_adagrad.Adagrad(0.1)):
        with stand_in("AdamW", lambda *_: mlx_adagrad.Adagrad(0.2)):
            assert optim.AdamW(1.0).learning_rate.item() == pytest.approx(0.2)
        assert optim.AdamW(1.0).learning_rate.item() == pytest.approx(0.1)
        raise KeyError
    assert optim.AdamW is ADAMW


def test_asked_about_it_is_the_class_that_it_stands_for():
    real = ADAMW(0.1)
    signature = inspect.signature(ADAMW.__init__)
    with stand_in("AdamW", lambda *_: mlx_adagrad.Adagrad(0.1)):
        assert isinstance(real, optim.AdamW) and not isinstance(optim.AdamW(1.0), optim.AdamW)
        assert issubclass(optim.AdamW, optim.Adam) and issubclass(ADAMW, optim.AdamW)
        assert optim.AdamW.__name__ == "AdamW" and inspect.signature(optim.AdamW.__init__) == signature

        class Own(optim.AdamW):
            pass

        assert type(Own(0.1)) is Own  # a subclass is nobody's stand-in
        assert isinstance(Own(0.1), Own) and not isinstance(real, Own)


@pytest.mark.parametrize("name", ["adamw", "step_decay", "Optimizer2", 3])
def test_a_name_that_is_no_optimizer_is_refused(name):
    with pytest.raises(ValueError, match=r"\[stand_in\] 'name' must be that of an optimizer in mlx.optimizers but got"):
        with stand_in(name, lambda *_: mlx_adagrad.Adagrad(0.1)):
            pass


def test_what_is_no_factory_or_makes_no_optimizer_is_refused():
    with pytest.raises(TypeError, match=r"\[stand_in\] 'make' must be callable with the arguments of AdamW but got"):
        with stand_in("AdamW", mlx_adagrad.Adagrad(0.1)):  # type: ignore[arg-type]
            pass
    with pytest.raises(TypeError, match=r"\[stand_in\] 'make' must return an mlx.optimizers.Optimizer but got None"):
        with stand_in("AdamW", lambda **_: None):  # type: ignore[arg-type,return-value]
            optim.AdamW(learning_rate=0.1)
    assert optim.AdamW is ADAMW
