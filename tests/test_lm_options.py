"""``optimizer_config: {adagrad: {...}}`` of a configuration file: the optimizer that it makes, and what it refuses."""

import json
import re
from typing import Any

import mlx.optimizers as optim
import pytest

import mlx_adagrad
from mlx_adagrad import Adagrad, RowWise, schedules, wrappers
from mlx_adagrad.checkpoint.config import describe
from mlx_adagrad.lm.options import WRAPPERS, optimizer_of, sparse_embedding

KERAS = {"initial_learning_rate": 0.1, "decay_steps": 5, "decay_rate": 0.5}
SCHEDULE = {"name": "cosine_decay", "arguments": [0.1, 100]}


def build_schedule(config):
    return getattr(optim, config["name"])(*config["arguments"])


def made(options: Any, rate: Any = 0.1) -> Any:
    return optimizer_of(json.loads(json.dumps(options)), rate, build_schedule)


def test_every_keyword_of_adagrad_reaches_it():
    options: dict[str, Any] = {
        "eps": 1e-6,
        "lr_decay": 0.01,
        "weight_decay": 0.02,
        "decoupled_weight_decay": True,
        "initial_accumulator_value": 0.5,
        "eps_inside_sqrt": True,
        "maximize": True,
        "accumulator": "RowWise",
        "groups": [{"params": ["*.lora_a", "*.bias"], "lr": 0.3, "weight_decay": 0}],
        "lazy": False,
        "fused": False,
        "differentiable": True,
    }
    optimizer = made(options)
    expected: dict[str, Any] = options | {"accumulator": RowWise()}
    assert describe(optimizer) == describe(Adagrad(0.1, **expected))
    assert optimizer.fused is False and optimizer.differentiable is True


@pytest.mark.parametrize("options", [{}, None, {"ema": None, "clip_norm": None, "skip_non_finite": False}])
def test_nothing_given_is_adagrad_alone(options):
    assert describe(made(options)) == describe(Adagrad(0.1))


def test_accumulators_by_name_with_arguments():
    assert made({"accumulator": {"name": "RowWise", "dtype": "parameter"}}).accumulator == RowWise("parameter")
    assert made({"accumulator": None}).accumulator == mlx_adagrad.Dense()


@pytest.mark.parametrize(
    "rate, rates",
    [
        (SCHEDULE, optim.cosine_decay(0.1, 100)),
        (schedules.torch_step_lr(0.2, step_size=3).get_config(), schedules.torch_step_lr(0.2, step_size=3)),
        (
            {"class_name": "ExponentialDecay", "config": dict(KERAS)},
            schedules.keras_exponential_decay(0.1, 5, 0.5),
        ),
    ],
    ids=["mlx-lm", "ours", "keras"],
)
def test_groups_take_schedules(rate, rates):
    optimizer = made({"groups": [{"params": "*", "lr": rate}]})
    expected = Adagrad(0.1, groups=[{"params": "*", "lr": rates}])
    assert describe(optimizer) == describe(expected)


def test_the_wrappers_stand_in_keras_order_whatever_the_order_in_the_file():
    options = {
        "skip_non_finite": True,
        "loss_scale": 128,
        "constraints": {"*.weight": {"name": "max_norm", "max_value": 1.5, "axis": -1}, "*": "non_neg"},
        "ema": {"momentum": 0.9, "overwrite_frequency": 7},
        "accumulate": 4,
        "clip_value": 0.5,
        "clip_norm": {"max_norm": 2, "rule": "torch"},
        "clip_norm_each": 3,
    }
    assert set(options) == set(WRAPPERS)
    w = wrappers
    expected = w.ClipByGlobalNorm(w.ClipByNorm(Adagrad(0.1), 3), 2, rule="torch")
    expected = w.ExponentialMovingAverage(w.GradientAccumulation(w.ClipByValue(expected, 0.5), 4), 0.9, 7)
    constraints = {"*.weight": w.MaxNorm(1.5, axis=-1), "*": w.NonNeg()}
    expected = w.SkipNonFinite(w.LossScale(w.Constraint(expected, constraints), 128))
    assert describe(made(options)) == describe(expected)


@pytest.mark.parametrize(
    "value, expected",
    [
        ("dynamic", wrappers.DynamicLossScale(Adagrad(0.1))),
        ({"initial_scale": 8, "dynamic_growth_steps": 5}, wrappers.DynamicLossScale(Adagrad(0.1), 8, 5)),
        ({"factor": 4}, wrappers.LossScale(Adagrad(0.1), 4)),
    ],
)
def test_loss_scales(value, expected):
    assert describe(made({"loss_scale": value})) == describe(expected)


def test_a_schedule_may_be_the_learning_rate():
    assert made({"ema": 0.9}, optim.cosine_decay(0.5, 10)).learning_rate.item() == 0.5


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"epss": 1e-8}, ValueError, "[optimizer_config.adagrad] there is no option 'epss', only eps, lr_decay"),
        ({"learning_rate": 1}, ValueError, "'learning_rate' cannot be given here: it stands outside"),
        ({"weight_decay_mask": "x"}, ValueError, "'weight_decay_mask' cannot be given here: it is a function"),
        ({"weight_decay": -1}, ValueError, "[Adagrad] 'weight_decay' must be non-negative but got -1.0."),
        ({"eps": "1e-8"}, TypeError, "[Adagrad] 'eps' must be a real number but got '1e-8'."),
        ({"maximize": "yes"}, TypeError, "'maximize' must be True or False but got 'yes'."),
        ({"accumulator": "Sparse"}, ValueError, "accumulator] must be one of Dense, "),
        ({"accumulator": {"name": "RowWise", "rank": 2}}, ValueError, "RowWise does not know 'rank'."),
        ({"groups": [{"params": "*", "momentum": 1}]}, ValueError, "[Adagrad groups[0]] unknown key 'momentum'"),
        ({"clip_norm": -1}, ValueError, "[ClipByGlobalNorm] 'max_norm' must be non-negative but got -1.0."),
        ({"clip_norm": {"norm": 1}}, ValueError, "ClipByGlobalNorm does not know 'norm'."),
        ({"ema": 1.5}, ValueError, "[ExponentialMovingAverage] 'momentum' must be in the range [0, 1] but got 1.5."),
        ({"accumulate": 0.5}, TypeError, "[GradientAccumulation] 'steps' must be an integer but got 0.5."),
        ({"skip_non_finite": 1}, TypeError, "'skip_non_finite' must be True or False but got 1."),
        ({"skip_non_finite": True, "loss_scale": "dynamic"}, ValueError, "leave SkipNonFinite out"),
        ({"loss_scale": "static"}, TypeError, "[LossScale] 'factor' must be a real number but got 'static'."),
        ({"constraints": {"*": "max"}}, ValueError, "constraints['*']] must be one of non_neg, max_norm, unit_norm"),
        ({"constraints": "non_neg"}, TypeError, "[Constraint] 'constraints' must map patterns to constraints"),
        ({"sparse_embedding": "yes"}, TypeError, "'sparse_embedding' must be True or False but got 'yes'."),
        ([1], TypeError, "[optimizer_config.adagrad] must be a mapping of options but got [1]."),
    ],
)
def test_wrong_options_are_refused_in_our_words(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        made(options)


def test_a_sparse_embedding_is_asked_for():
    assert sparse_embedding({"sparse_embedding": True}) is True
    assert sparse_embedding({"sparse_embedding": None}) is sparse_embedding({}) is sparse_embedding(None) is False
    assert describe(made({"sparse_embedding": True})) == describe(Adagrad(0.1))
