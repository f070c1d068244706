"""Configs of presets: what made an optimizer, as JSON and back."""

import copy
import json
import pickle

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest

from mlx_adagrad import Adagrad, presets, schedules
from mlx_adagrad.checkpoint.config import describe
from mlx_adagrad.wrappers import (
    ClipByGlobalNorm,
    ClipByNorm,
    ClipByValue,
    Constraint,
    DynamicLossScale,
    ExponentialMovingAverage,
    GradientAccumulation,
    LossScale,
    MaxNorm,
    SkipNonFinite,
)
from test_presets import EVERYTHING, NAMES, SIGNATURES, ExponentialDecay, make, train

GROUPS = [
    {"params": "*bias", "lr": 0.3, "weight_decay": 0.0},
    {"params": ["*kernel", "*.gamma"], "lr_decay": 0.2, "eps": 0.01, "maximize": True},
]
DECAY = {"initial_learning_rate": 0.3, "decay_steps": 5, "decay_rate": 0.8}


def join():
    return optim.join_schedules([optim.linear_schedule(0.0, 0.2, 2), optim.cosine_decay(0.2, 9)], [2])


MADE = {
    "keras": lambda: presets.keras(**EVERYTHING),
    "keras-schedule": lambda: presets.keras(ExponentialDecay(**DECAY), clipnorm=1.0, weight_decay=0.1),
    "keras-constraint": lambda: presets.keras(0.5, constraints={"*kernel": MaxNorm(1.5, axis=-1), "*": "unit_norm"}),
    "tf_keras": lambda: presets.tf_keras(0.2, decay=0.1, clipvalue=0.5, clipnorm=0.3),
    "torch": lambda: presets.torch(0.1, 0.1, 0.2, 0.3, 1e-3, maximize=True, state_dtype="float32"),
    "torch-groups": lambda: presets.torch(0.1, weight_decay=0.1, groups=GROUPS),
    "torch-schedule": lambda: presets.torch(
        schedules.torch_step_lr(0.1, 2), groups=[{"params": "*bias", "lr": optim.exponential_decay(0.2, 0.5)}]
    ),
    "mindspore": lambda: presets.mindspore(0.1, 0.1, groups=GROUPS),
    "mindspore_nn": lambda: presets.mindspore_nn(0.2, join(), False, 8.0, 0.1),
    "mlx": lambda: presets.mlx(optim.step_decay(0.1, 0.5, 2)),
    "optax": lambda: presets.optax(schedules.optax_linear_schedule(0.1, 0.0, 9), eps=0),
    "paper": lambda: presets.paper(),
}


def no_step():
    return 0.1


UNPICKLED = ["torch-schedule", "mindspore_nn", "mlx"]  # MLX's schedules are closures, which pickle cannot hold
PICKLED = {name: made for name, made in MADE.items() if name not in UNPICKLED} | {
    "keras-function": lambda: presets.keras(no_step),
    "mindspore_nn-number": lambda: presets.mindspore_nn(0.2, 0.1, False, 8.0, 0.1),
    "mlx-number": lambda: presets.mlx(0.1),
}


@pytest.mark.parametrize("name", MADE)
def test_round_trip(name):
    config = json.loads(json.dumps(MADE[name]().get_config()))
    again = presets.from_config(config)
    assert type(again) is type(MADE[name]())
    assert again.get_config() == config
    assert train(again, 5) == train(MADE[name](), 5)


@pytest.mark.parametrize("name", NAMES)
def test_defaults_are_spelled_out_and_may_be_left_out(name):
    config = make(name).get_config()
    assert config["preset"] == name
    assert list(config)[1:] and set(config) - {"preset"} == {
        word.split("=")[0] for word in SIGNATURES[name].split(", ") if word != "*"
    }
    rate = {key: config[key] for key in ("lr", "learning_rate") if key in config}
    assert list(rate.values()) == [0.1]
    assert presets.from_config({"preset": name} | rate).get_config() == config


@pytest.mark.parametrize("name", NAMES)
def test_unknown_keys_and_presets_are_refused(name):
    config = make(name).get_config()
    with pytest.raises(ValueError, match=rf"\[presets\] {name} does not know 'momentum'"):
        presets.from_config(config | {"momentum": 0.9})
    for wrong in ("Keras", None, 3, ["keras"]):
        with pytest.raises(ValueError, match=r"\[presets\] there is no preset .*, only keras, mindspore"):
            presets.from_config(config | {"preset": wrong})


@pytest.mark.parametrize(
    "config, error, message",
    [
        ("keras", TypeError, "a config must be a dict"),
        ({}, ValueError, "there is no preset None"),
        ({"preset": "torch", "eps": -1.0}, ValueError, "'eps' must be non-negative"),
        ({"preset": "torch", "eps": "1e-3"}, TypeError, "'eps' must be a real number"),
        ({"preset": "torch", "lr": {"name": "torch_step_lr"}}, ValueError, "must have 'name' and 'config'"),
        ({"preset": "torch", "lr": {"name": "noisy", "config": {}}}, ValueError, "no schedule 'noisy'"),
        ({"preset": "torch", "groups": [{"params": "*", "momentum": 1}]}, ValueError, "unknown key 'momentum'"),
        ({"preset": "torch", "groups": ["*"]}, TypeError, "a group must be a dict"),
        ({"preset": "keras", "constraints": {"*": {"name": "min_norm"}}}, ValueError, "no constraint 'min_norm'"),
        ({"preset": "keras", "constraints": {"*": {"name": "max_norm", "eps": 1}}}, ValueError, "not know 'eps'"),
        ({"preset": "mlx"}, TypeError, r"\[presets.mlx\] missing a required argument: 'learning_rate'."),
        ({"preset": "torch", "groups": 5}, TypeError, r"\[presets.torch\] 'groups' must be a list of dicts but got 5."),
        ({"preset": "keras", "groups": "*"}, TypeError, r"\[presets.keras\] 'groups' must be a list of dicts but"),
        ({"preset": "mindspore", "groups": {"params": "*"}}, TypeError, "'groups' must be a list of dicts but got"),
    ],
)
def test_wrong_configs_are_refused(config, error, message):
    with pytest.raises(error, match=message):
        presets.from_config(config)


def test_what_was_set_since_is_in_the_config():
    optimizer = presets.torch(schedules.torch_step_lr(0.1, 2), groups=[{"params": "*kernel", "lr": 0.2}])
    optimizer.learning_rate = 0.5
    optimizer.set_group(0, lr=0.25)
    optimizer.add_group({"params": "*bias", "weight_decay": 0.5})
    config = optimizer.get_config()
    assert config["lr"] == 0.5
    assert config["groups"] == [{"params": ["*kernel"], "lr": 0.25}, {"params": ["*bias"], "weight_decay": 0.5}]
    assert train(presets.from_config(config)) == train(optimizer)


def test_numbers_are_in_the_config_as_they_were_given():
    groups = [{"params": "*kernel", "lr": 0.02}, {"params": "*bias", "lr": 1 / 3}]
    optimizer = presets.torch(0.1, groups=iter(groups))
    optimizer.add_group({"params": "*", "lr": 0.07})
    config = optimizer.get_config()
    assert [group["lr"] for group in config["groups"]] == [0.02, 1 / 3, 0.07]
    assert presets.from_config(config).get_config() == config
    optimizer.learning_rate = 0.3
    optimizer.set_group(0, lr=1e-3)
    config = optimizer.get_config()
    assert config["lr"] == 0.3 and config["groups"][0]["lr"] == 1e-3


def test_groups_added_to_a_preset_without_such_an_argument():
    optimizer = presets.keras(0.1, clipnorm=1.0)
    assert "groups" not in optimizer.get_config()
    optimizer.add_group({"params": "*bias", "lr": schedules.torch_exponential_lr(0.1, 0.5)})
    config = json.loads(json.dumps(optimizer.get_config()))
    assert train(presets.from_config(config)) == train(optimizer)


def test_a_config_of_keras_itself_can_be_given():
    """``keras.optimizers.Adagrad(...).get_config()``, of a recorded one."""
    theirs = {
        "name": "adagrad",
        "learning_rate": {
            "module": "keras.optimizers.schedules",
            "class_name": "ExponentialDecay",
            "config": DECAY | {"staircase": False, "name": "ExponentialDecay"},
            "registered_name": None,
        },
        "weight_decay": 0.1,
        "clipnorm": None,
        "global_clipnorm": None,
        "clipvalue": None,
        "use_ema": False,
        "ema_momentum": 0.99,
        "ema_overwrite_frequency": None,
        "loss_scale_factor": None,
        "gradient_accumulation_steps": None,
        "initial_accumulator_value": 0.1,
        "epsilon": 1e-07,
    }
    ours = presets.keras(ExponentialDecay(**DECAY), weight_decay=0.1)
    assert train(presets.from_config({"preset": "keras"} | theirs)) == train(presets.keras(**theirs)) == train(ours)


@pytest.mark.parametrize(
    "optimizer",
    [
        presets.keras(lambda: 0.1),
        presets.torch(lambda step: 0.1),
        presets.torch(groups=[{"params": lambda path, w: w.ndim > 1, "lr": 0.1}]),
        presets.keras(constraints={"*": mx.abs}),
        presets.keras(constraints={lambda path, w: True: "non_neg"}),
    ],
    ids=["callable", "schedule", "predicate", "constraint", "pattern"],
)
def test_a_function_cannot_be_saved(optimizer):
    with pytest.raises(TypeError, match="saved|cannot"):
        optimizer.get_config()


@pytest.mark.parametrize("remade", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
@pytest.mark.parametrize("name", PICKLED)
def test_a_copy_and_a_pickle_go_on(name, remade):
    optimizer = PICKLED[name]()
    train(optimizer, 3)
    twin = remade(optimizer)
    assert train(twin, 3) == train(optimizer, 3)


@pytest.mark.parametrize("name", UNPICKLED)
def test_a_copy_goes_on_with_closures_too(name):
    optimizer = MADE[name]()
    train(optimizer, 3)
    assert train(copy.deepcopy(optimizer), 3) == train(optimizer, 3)


def test_only_presets_have_a_config():
    for optimizer in (Adagrad(0.1), SkipNonFinite(Adagrad(0.1))):
        with pytest.raises(TypeError, match="only an optimizer that mlx_adagrad.presets returned"):
            optimizer.get_config()


def test_a_copy_is_a_run_of_its_own():
    for optimizer in (presets.keras(**EVERYTHING), presets.torch(groups=GROUPS)):
        train(optimizer, 3)
        twin = copy.deepcopy(optimizer)
        assert twin.get_config() == optimizer.get_config()
        assert train(twin, 3) == train(optimizer, 3)
        twin.learning_rate = 0.5
        assert optimizer.learning_rate.item() == pytest.approx(optimizer.get_config().get("lr", 0.1))


# ---- wrappers around a preset

WRAPPED = {
    "dynamic": lambda o: DynamicLossScale(o, 8.0, 3),
    "dynamic-defaults": lambda o: DynamicLossScale(o),
    "loss scale": lambda o: LossScale(o, 4.0),
    "value": lambda o: ClipByValue(o, 0.5),
    "no clip": lambda o: ClipByNorm(o, None),
    "norm": lambda o: ClipByNorm(o, mx.array([0.5])),  # type: ignore[arg-type]
    "global norm": lambda o: ClipByGlobalNorm(o, 0.5, rule="torch"),
    "accumulation": lambda o: GradientAccumulation(o, 2, schedule_counts="updates"),
    "average": lambda o: ExponentialMovingAverage(o, 0.9, 2),
    "constraint": lambda o: Constraint(o, {"*kernel": MaxNorm(1.5, axis=-1), "*": "unit_norm"}),
    "skip": lambda o: SkipNonFinite(o),
    "stack": lambda o: SkipNonFinite(ExponentialMovingAverage(GradientAccumulation(ClipByGlobalNorm(o, 1.0), 2), 0.5)),
}


@pytest.mark.parametrize("inner", ["keras", "torch-groups"])
@pytest.mark.parametrize("name", WRAPPED)
def test_round_trip_of_wrappers_around_a_preset(name, inner):
    optimizer = WRAPPED[name](MADE[inner]())
    config = json.loads(json.dumps(optimizer.get_config(), allow_nan=False))
    again = presets.from_config(config)
    assert type(again) is type(optimizer) and again.get_config() == config == optimizer.get_config()
    if inner == "torch-groups":
        assert train(again) == train(WRAPPED[name](MADE[inner]()))


def test_what_was_set_since_is_in_the_config_of_a_wrapper():
    optimizer = ClipByNorm(presets.torch(0.1, groups=[{"params": "*bias", "lr": 0.2}]), 1.0)
    optimizer.learning_rate = 0.5
    optimizer.set_group(0, weight_decay=0.25)
    inner = optimizer.get_config()["optimizer"]
    assert inner["lr"] == 0.5 and inner["groups"] == [{"params": ["*bias"], "lr": 0.2, "weight_decay": 0.25}]


def test_arrays_of_one_element_are_numbers_in_a_config():
    numbers = {"eps": mx.array([0.5]), "weight_decay": np.float32(0.125)}
    config = presets.torch(mx.array([0.25]), **numbers).get_config()  # type: ignore[arg-type]
    assert json.loads(json.dumps(config)) == presets.torch(0.25, eps=0.5, weight_decay=0.125).get_config()


class Mine(ClipByNorm):
    pass


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ClipByNorm(Adagrad(0.1), 1.0), r"\[Adagrad\] only an optimizer that mlx_adagrad.presets returned has"),
        (lambda: ClipByNorm(optim.Adam(0.1), 1.0), r"\[ClipByNorm\] Adam inside has no config"),
        (lambda: Mine(presets.mlx(0.1), 1.0), r"\[Mine\] only wrappers of mlx_adagrad have a config"),
        (
            lambda: SkipNonFinite(presets.mlx(0.1), print),
            "'on_skip' holds <built-in function print>",
        ),
        (lambda: Constraint(presets.mlx(0.1), {"*": lambda w: w}), r"\[Constraint\] 'constraints' holds <function"),
        (lambda: Constraint(presets.mlx(0.1), {(lambda p, w: True): "non_neg"}), "'constraints' holds <function"),
        (
            lambda: SkipNonFinite(presets.mlx(0.1), group=mx.distributed.init()),
            r"\[SkipNonFinite\] 'group' holds <mlx.core.distributed.Group",
        ),
    ],
)
def test_wrappers_without_a_config(make, message):
    with pytest.raises(TypeError, match=message):
        make().get_config()


MLX = {"preset": "mlx", "learning_rate": 0.1}


@pytest.mark.parametrize(
    "config, error, message",
    [
        ({"wrapper": "Clip", "optimizer": MLX}, ValueError, "no wrapper 'Clip', only GradientAccumulation"),
        ({"wrapper": ["ClipByNorm"], "optimizer": MLX}, ValueError, "no wrapper"),
        ({"wrapper": "ClipByNorm", "max_norm": 1.0}, ValueError, "ClipByNorm lacks 'optimizer'"),
        ({"wrapper": "ClipByNorm", "optimizer": MLX}, ValueError, "ClipByNorm lacks 'max_norm'"),
        ({"wrapper": "ClipByNorm", "max_norm": 1, "x": 2, "optimizer": MLX}, ValueError, "does not know 'x'"),
        ({"wrapper": "ClipByNorm", "max_norm": -1.0, "optimizer": MLX}, ValueError, "'max_norm' must be non-negative"),
        ({"wrapper": "ClipByNorm", "max_norm": 1.0, "optimizer": {}}, ValueError, "no preset None"),
        ({"wrapper": "ClipByNorm", "max_norm": 1.0, "optimizer": 3}, TypeError, "a config must be a dict but got 3"),
    ],
)
def test_wrong_configs_of_wrappers_are_refused(config, error, message):
    with pytest.raises(error, match=message):
        presets.from_config(config)


def test_files_describe_wrappers_around_a_preset_as_version_0_1_did():
    described = describe(ClipByNorm(presets.mlx(0.1), 1.0))
    assert described == {"class": "ClipByNorm", "max_norm": 1.0, "optimizer": presets.mlx(0.1).get_config()}
