"""Runs recorded cases through the public API: which optimizer of ours each is, and whether it goes the same way."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_adagrad import Adagrad, RowSparse, RowWise, presets, schedules
from mlx_adagrad.presets import recipe
from mlx_adagrad.update.rule import Rule
from mlx_adagrad.wrappers import (
    ClipByGlobalNorm,
    ClipByValue,
    DynamicLossScale,
    ExponentialMovingAverage,
    GradientAccumulation,
    Wrapper,
)
from recorded import Case, assert_close

# Every recorded case that is not run here, with the reason.
NOT_RUN = {
    "torch_fp16_zero_grad_nan": "torch's unfused fp16 gives NaN for a gradient of 0, ours an update of 0 on purpose; "
    "its fused form, `torch_fp16_zero_grad_fused`, is run",
    "paddle_l1": "there is no L1 decay here; add `l1 * sign(w)` to the gradient",
    "paddle_clipvalue": "recorded with a lower bound of -0.2 beside an upper one of 0.5; `ClipByValue` is symmetric",
    "tf_sparse_v2_dups": "TensorFlow's raw op applies duplicate indices one after another; here, as in its own Keras "
    "layer, in torch and in FBGEMM, they are summed first",
    "bnb8": "8-bit block-wise state is not offered",
}


@dataclass
class Setup:
    """An optimizer that does what a recorded one did, and what the recording did to it before call t."""

    optimizer: Any
    before_call: Callable[[int], None] = lambda t: None


def replay(case: Case, compiled: bool = False) -> int:
    """Run ``case`` and assert that every recorded quantity agrees after every call.

    Args:
        case: The recorded case.
        compiled: Make the step with ``mx.compile``, the state made and captured before.

    Returns:
        How often the step's Python code ran.
    """
    setup = SETUPS[case.framework](copy.deepcopy(case))  # which may take its hyperparameters apart
    optimizer, ran = setup.optimizer, 0
    parameters = dict(zip(case.names, case.initial(), strict=True))

    def step(gradients: Any) -> None:
        nonlocal ran
        ran += 1
        tree = tree_unflatten(list(parameters.items()))
        # a parameter without a gradient may be missing from what comes back
        parameters.update(tree_flatten(optimizer.apply_gradients(gradients, tree)))

    run: Callable[[Any], Any] = step
    if compiled:
        optimizer.init(tree_unflatten(list(parameters.items())))
        captured = [parameters, optimizer.state]
        run = mx.compile(step, inputs=captured, outputs=captured)
    for t in range(case.steps):
        setup.before_call(t)
        run(gradients(case, t, absent_as_none=not compiled))
        mx.eval(parameters, optimizer.state)
        check(case, optimizer, t, [parameters[name] for name in case.names])
    if "final" in case.entry["arrays"]:
        final = optimizer.finalize_variable_values(tree_unflatten(list(parameters.items())))
        assert_close(case, [dict(tree_flatten(final))[name] for name in case.names], case.final())
    return ran


def gradients(case: Case, t: int, absent_as_none: bool) -> Any:
    """The tree of gradients of call ``t``; what is absent is None or, as ``mx.compile`` wants it, left out."""
    if case.sparse:
        indices, values = case.gradients(t)
        return {case.names[0]: RowSparse(indices, values, case.initial()[0].shape[0])}
    late = case.hp.get("late_group", {}).get("params", []) if t < case.hp.get("late_at", 0) else []
    leaves = [None if i in late else g for i, g in enumerate(case.gradients(t))]
    pairs = zip(case.names, leaves, strict=True)
    return tree_unflatten([(name, g) for name, g in pairs if absent_as_none or g is not None])


def check(case: Case, optimizer: Any, t: int, parameters: list[mx.array]) -> None:
    """Assert that ``parameters``, accumulators and all else that was recorded after call ``t`` agree."""
    arrays, adagrad = case.entry["arrays"], recipe.innermost(optimizer)
    assert_close(case, parameters, case.params(t))
    states = [state_of(adagrad, name) for name in case.names]
    start = adagrad.rule.initial_accumulator_value
    fresh = [adagrad.accumulator.init(w, start) for w in case.initial()]  # ours come with the first gradient
    assert_close(case, [state.get("v", v) for state, v in zip(states, fresh, strict=True)], case.acc(t))
    if "lr" in arrays:
        check_rates(case, adagrad, t)
    if "step" in arrays:
        for i, state in enumerate(states):
            recorded = case.recorded(f"step/{i}")[t]  # NaN before its group was added
            steps = state["step"].item() if state else 0
            assert steps == (0 if np.isnan(recorded) else recorded), f"{case} at call {t}: {case.names[i]}"
    if case.framework == "keras":
        check_keras(case, optimizer, t)


def check_rates(case: Case, adagrad: Adagrad, t: int) -> None:
    """The rate of each group. Where gradients are accumulated it is known at the updates only."""
    if (t + 1) % (case.hp.get("gradient_accumulation_steps") or 1):
        return
    own = adagrad.groups.states(adagrad.state)
    groups = len(case.hp.get("groups", [0])) if case.framework in ("torch", "mindspore") else 1
    got = [own[i].get("learning_rate", adagrad.learning_rate) if own else adagrad.learning_rate for i in range(groups)]
    assert case.lr is not None
    for rate, recorded in zip(got, case.lr[t].reshape(-1), strict=False):
        assert abs(rate.item() - recorded) <= 1e-6 * abs(recorded) + 1e-12, f"{case} at call {t}"


def check_keras(case: Case, optimizer: Any, t: int) -> None:
    """What only Keras has: averages, sums of gradients, counters."""
    arrays, wrappers = case.entry["arrays"], {type(w): w.state["_mlx_adagrad"] for w in layers(optimizer)}
    flat = ["/" + name.replace(".", "/") for name in case.names]
    if "ema" in arrays:
        averages = wrappers[ExponentialMovingAverage]["averages"]
        assert_close(case, [averages[name] for name in flat], case.ema(t))
    if "gacc" in arrays:
        sums = wrappers[GradientAccumulation]["gradients"]
        zeros = [mx.zeros(w.shape) for w in case.initial()]
        assert_close(case, [sums.get(name, zero) for name, zero in zip(flat, zeros, strict=True)], case.gacc(t))
    every = case.hp.get("gradient_accumulation_steps") or 1
    assert optimizer.iterations.item() == case.recorded("iterations")[t] // every
    for counter in ("dynamic_scale", "step_counter"):
        if counter in arrays:
            assert wrappers[DynamicLossScale][counter].item() == case.recorded(counter)[t]


def layers(optimizer: Any) -> list[Any]:
    """The wrappers around the innermost optimizer, outermost first."""
    return [optimizer, *layers(optimizer.optimizer)] if isinstance(optimizer, Wrapper) else []


def state_of(adagrad: Adagrad, name: str) -> dict[str, Any]:
    """The state of a parameter, empty before its first gradient."""
    node: Any = adagrad.state
    for key in name.split("."):
        node = node.get(key) or {}
    return node


def torch(case: Case) -> Setup:
    hp, names = case.hp, case.names
    for how in ("fused", "foreach"):  # how torch computes it, not what
        hp.pop(how, None)
    late, late_at = hp.pop("late_group", None), hp.pop("late_at", None)
    clip_norm, clip_value = hp.pop("clip_grad_norm_", None), hp.pop("clip_grad_value_", None)
    scheduled = torch_schedule(hp.pop("scheduler", None))
    groups = [scheduled(named(group, names)) for group in hp.pop("groups", [])]
    optimizer: Any = presets.torch(**scheduled({"lr": 1e-2} | hp), groups=groups or None)
    if clip_norm:
        optimizer = ClipByGlobalNorm(optimizer, clip_norm, rule="torch")
    if clip_value:
        optimizer = ClipByValue(optimizer, clip_value)

    def before_call(t: int) -> None:
        if late and t == late_at:
            optimizer.add_group(named(late, names))

    return Setup(optimizer, before_call)


def named(group: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """A group with paths in place of indices."""
    return group | {"params": [names[i] for i in group["params"]]}


def torch_schedule(scheduler: dict[str, Any] | None, framework: str = "torch") -> Callable[[dict], dict]:
    """Puts the rate of a group on the scheduler that the recording had."""
    if scheduler is None:
        return lambda options: options
    words = {"StepLR": "step_lr", "ExponentialLR": "exponential_lr", "CosineAnnealingLR": "cosine_annealing_lr"}
    make = getattr(schedules, f"{framework}_{words[scheduler['name']]}")
    rest = {key: value for key, value in scheduler.items() if key != "name"}
    return lambda options: options | ({"lr": make(options["lr"], **rest)} if "lr" in options else {})


def mindspore(case: Case) -> Setup:
    hp = case.hp
    if hp.pop("api") == "nn":
        hp.pop("names", None)
        return Setup(presets.mindspore_nn(**hp))
    scheduled = torch_schedule(hp.pop("scheduler", None), "mindspore")
    groups = [scheduled(named(group, case.names)) for group in hp.pop("groups", [])]
    return Setup(presets.mindspore(**scheduled({"lr": 1e-2} | hp), groups=groups or None))


def keras_rate(learning_rate: Any) -> Any:
    """A number as it is, a schedule as Keras serialises it."""
    if not isinstance(learning_rate, dict):
        return learning_rate
    config = {key: value for key, value in learning_rate.items() if key != "name"}
    return {"class_name": learning_rate["name"], "config": config}


def keras(case: Case) -> Setup:
    hp, names, now = case.hp, case.names, {"call": 0}
    for around in ("names", "finalize"):  # not of the constructor
        hp.pop(around, None)
    set_lr, dynamic = hp.pop("set_lr", {}), hp.pop("loss_scale_optimizer", None)
    rate = hp.get("learning_rate", 0.001)
    if isinstance(rate, dict) and "callable" in rate:
        table = rate["callable"]
        hp["learning_rate"] = lambda: table[min(now["call"], len(table) - 1)]
    else:
        hp["learning_rate"] = keras_rate(rate)
    excluded = hp.pop("exclude_names", None) or [f"^{names[i]}$" for i in hp.pop("exclude_vars", [])] or None
    constraints = {names[int(i)]: constraint for i, constraint in hp.pop("constraints", {}).items()} or None
    optimizer: Any = presets.keras(**hp, exclude_from_weight_decay=excluded, constraints=constraints)
    if dynamic:
        optimizer = DynamicLossScale(optimizer, **dynamic)

    def before_call(t: int) -> None:
        now["call"] = t
        if str(t) in set_lr:
            optimizer.learning_rate = set_lr[str(t)]

    return Setup(optimizer, before_call)


def tf_keras(case: Case) -> Setup:
    hp = case.hp
    legacy = hp.pop("legacy", True)
    if "learning_rate" in hp:
        hp["learning_rate"] = keras_rate(hp["learning_rate"])
    return Setup(presets.tf_keras(**hp) if legacy else presets.keras(**hp))


def mlx(case: Case) -> Setup:
    hp = case.hp
    rate, clip = hp.pop("learning_rate"), hp.pop("clip_grad_norm", None)
    if isinstance(rate, dict):
        rate = getattr(optim, rate.pop("name"))(**rate)
    optimizer: Any = presets.mlx(rate, **hp)
    return Setup(ClipByGlobalNorm(optimizer, clip, rule="torch") if clip else optimizer)


def optax(case: Case) -> Setup:
    hp = case.hp
    rate, clip = hp.pop("learning_rate"), hp.pop("clip_by_global_norm", None)
    decay, every = hp.pop("add_decayed_weights", None), hp.pop("multi_steps", None)
    if isinstance(rate, dict):
        rate = getattr(schedules, "optax_" + rate.pop("name"))(**rate)
    optimizer: Any = presets.optax(rate, **hp)
    if decay:  # a link of its own in optax's chain
        start = hp.get("initial_accumulator_value", 0.1)
        inside = {"eps_inside_sqrt": True, "initial_accumulator_value": start, "weight_decay": decay}
        optimizer = Adagrad(rate, hp.get("eps", 1e-7), **inside)
    if clip:
        optimizer = ClipByGlobalNorm(optimizer, clip)
    return Setup(GradientAccumulation(optimizer, every) if every else optimizer)


def paddle(case: Case) -> Setup:
    hp = case.hp
    rate, clip = hp.pop("learning_rate"), hp.pop("grad_clip", None)
    groups = [named(group, case.names) for group in hp.pop("groups", [])]
    for group in groups:  # paddle's group rate is a factor
        if "learning_rate" in group:
            group["lr"] = rate * group.pop("learning_rate")
    if isinstance(rate, dict):
        rate = schedules.torch_exponential_lr(rate["learning_rate"], rate["gamma"])
    hp = {"eps": hp.pop("epsilon", 1e-6)} | hp
    optimizer: Any = Adagrad(rate, **hp, groups=groups)
    return Setup(ClipByGlobalNorm(optimizer, clip[1]["clip_norm"]) if clip else optimizer)


def tf(case: Case) -> Setup:
    hp = case.hp
    hp.pop("op")
    rule = Rule(
        eps=hp["epsilon"],
        initial_accumulator_value=hp["initial_accumulator_value"],
        update_accumulator=hp.get("update_slots", True),
    )
    return Setup(Adagrad.from_rule(hp["lr"], rule))


def bitsandbytes(case: Case) -> Setup:
    return Setup(Adagrad(case.hp["lr"], 1e-10, weight_decay=case.hp.get("weight_decay", 0.0)))


def fbgemm(case: Case) -> Setup:
    hp = case.hp
    mode = hp.get("weight_decay_mode")
    optimizer = Adagrad(
        hp["learning_rate"],
        hp["eps"],
        weight_decay=hp.get("weight_decay", 0.0),
        decoupled_weight_decay=mode == "DECOUPLE",
        accumulator=RowWise() if "ROWWISE" in hp["optimizer"] else None,
    )
    return Setup(optimizer)


SETUPS: dict[str, Callable[[Case], Setup]] = {
    function.__name__: function
    for function in (torch, mindspore, keras, tf_keras, mlx, optax, paddle, tf, bitsandbytes, fbgemm)
} | {"fbgemm_derived": fbgemm}
