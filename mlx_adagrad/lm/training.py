"""mlx-lm's ``train``, for runs that are saved whole and go on bit for bit after whatever stopped them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.nn import Module
from mlx.optimizers import Optimizer

from .. import checkpoint
from ..adagrad import Adagrad
from ..configurable import Configurable
from ..wrappers import DynamicLossScale, LossScale
from . import known, run_file
from .position import Batches

# Which arguments of mlx-lm's training change the numbers; the others may differ when a run is resumed.
NUMBERS = ("batch_size", "max_seq_length", "grad_accumulation_steps", "steps_per_eval", "val_batches")


def train(
    model: Module,
    optimizer: Optimizer,
    train_dataset: Any,
    val_dataset: Any = None,
    args: Any = None,
    loss: Callable[..., Any] | None = None,
    iterate_batches: Callable[..., Any] | None = None,
    training_callback: Any = None,
    *,
    resume: bool = False,
    options: Mapping[str, Any] | None = None,
) -> None:
    """``mlx_lm.tuner.trainer.train``, with the same arguments and the same steps, for runs that can be resumed.

    Beside ``args.adapter_file`` lies ``resume.safetensors``, replaced at every ``steps_per_save`` and at the end. It
    holds the whole run: trainable weights, optimizer state, random state and the position in the data. With
    ``resume=True`` a run goes on from there, and ends bit for bit as the run that never stopped. Gradients that mlx-lm
    is accumulating are not in it: the file is that of the last update before, and the calls since are repeated.

    With an :class:`~mlx_adagrad.wrappers.ExponentialMovingAverage` the averages are what is evaluated and what the
    adapter files hold, and what the model holds at the end. A loss scale is applied to the loss here; the loss that is
    reported is the plain one.

    Args:
        model, optimizer, train_dataset, val_dataset, args, loss, iterate_batches, training_callback: As mlx-lm takes
            them; ``iterate_batches`` must draw from numpy's global generator, as mlx-lm's does.
        resume: Go on from ``resume.safetensors``; without one, begin. Default: ``False``.
        options: Further options, in the types of JSON, that must be the same in a resumed run. Default: ``None``.

    Raises:
        ValueError: If the saved run does not fit, with all that differs; nothing has changed then.
        FileExistsError: If there are adapters but no saved run beside them, which would then be overwritten.
        RuntimeError: If the installed mlx-lm is not known here.
    """
    trainer = known.trainer()
    args = trainer.TrainingArgs() if args is None else args
    adagrad = _inside(optimizer, (Adagrad,))
    if adagrad is not None:
        adagrad.groups.check_matches(model)  # the first step would, after the first validation
    run = Run(model, optimizer, args, _options(args, train_dataset, val_dataset, options))
    batches = Batches(iterate_batches or trainer.iterate_batches, run.after)
    run.batches = batches
    if resume:
        run.resume()
    unfinished = run.adapters.with_name(".unfinished.safetensors")  # mlx-lm's last save; ours come from `run`
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    unfinished.touch()  # a folder that cannot be written must not end the run at its first save
    loss = _with_loss_scale(optimizer, loss or trainer.default_loss)
    with ExitStack() as stack:
        stack.callback(unfinished.unlink, missing_ok=True)
        batches.begin = stack.enter_context(known.counting_from(trainer, batches.iterations, args.iters))
        stack.enter_context(patched(trainer, evaluate=run.evaluating(trainer.evaluate)))
        trainer.train(
            model=model,
            optimizer=optimizer,
            train_dataset=train_dataset,
            val_dataset=val_dataset,
            args=replace(args, adapter_file=str(unfinished), steps_per_save=args.iters + 1),
            loss=loss,
            iterate_batches=batches,
            training_callback=training_callback,
        )
    run.finish()


@contextmanager
def patched(module: Any, **values: Any) -> Iterator[None]:
    """Other values for names of a module, as long as the block lasts."""
    before = {name: vars(module).get(name, ...) for name in values}
    vars(module).update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is ...:
                delattr(module, name)
            else:
                setattr(module, name, value)


class Run:
    """What is saved of a run, and when."""

    batches: Batches

    def __init__(self, model: Module, optimizer: Optimizer, args: Any, options: Mapping[str, Any]):
        self.model = model
        self.optimizer = optimizer
        self.args = args
        self.options = options
        self.adapters = Path(args.adapter_file)
        self.file = self.adapters.with_name(run_file.NAME)
        self.main = mx.distributed.init().rank() == 0
        self.before_last_validation: Any = None

    def resume(self) -> None:
        """Go on from the saved run, if there is one."""
        if not self.file.exists():
            check_nothing_is_lost(self.adapters)
            self._check_ranks(0)
            self._say(f"There is no {self.file} yet: starting at iteration 1.")
            return
        notes = run_file.read_notes(self.file)
        run_file.check_options(self.file, notes["options"], self.options)
        checkpoint.load(self.file, self.optimizer, self.model)
        self.batches.resume(notes["iterations"], notes["position"])
        self._check_ranks(notes["iterations"])
        done, iters = notes["iterations"], self.args.iters
        whole = ": nothing is left to do" if done >= iters else ""
        self._say(f"Resuming {self.file} after iteration {done} of {iters}{whole}.")
        self._save_adapters(notes["iterations"])  # the run may have died between its two files

    def _check_ranks(self, iterations: int) -> None:
        bounds: Any = mx.distributed.all_max(mx.array([iterations, -iterations]), stream=mx.cpu).tolist()
        if sum(bounds):
            raise ValueError(f"[train] the machines hold different runs: here '{self.file}' is at {iterations}.")

    def after(self, iterations: int) -> None:
        """Save what is due after so many iterations."""
        if self._is_due(iterations) and self.main:
            self._save_run(iterations)
        self._save_adapters(iterations)

    def _is_due(self, iterations: int) -> bool:
        """Whether no gradient is being accumulated, and a save comes before that is so again."""
        window, every = self.args.grad_accumulation_steps, self.args.steps_per_save
        ahead = min(-iterations % every, self.args.iters - iterations)
        return iterations % window == 0 and ahead < window

    def _save_run(self, iterations: int) -> None:
        position = self.batches.position(self.before_last_validation)
        notes = {"iterations": iterations, "position": position, "options": self.options}
        run_file.save(self.file, self.optimizer, self.model, notes)

    def _save_adapters(self, iterations: int) -> None:
        if not self.main or iterations % self.args.steps_per_save:
            return
        numbered = self.adapters.with_name(f"{iterations:07d}_adapters.safetensors")
        with self.averaged():
            for path in (self.adapters, numbered):
                run_file.save_adapters(path, self.model)
        self._say(f"Iter {iterations}: saved {self.adapters}, {numbered.name} and {self.file.name}.")

    def finish(self) -> None:
        """Save the end of the run, and leave the averages in the model if there are any."""
        if self.batches.iterations < self.args.iters:
            self.batches.iterations = self.args.iters
            self.after(self.args.iters)
        if isinstance(self.optimizer, Configurable):
            self.optimizer.finalize_variable_values(self.model)
        if self.main:
            run_file.save_adapters(self.adapters, self.model)
            self._say(f"Saved the final weights to {self.adapters}.")

    def averaged(self) -> AbstractContextManager[Any]:
        """The averages in the model, if there are any, for as long as the block lasts."""
        return self.optimizer.averaged(self.model) if isinstance(self.optimizer, Configurable) else nullcontext()

    def evaluating(self, evaluate: Callable[..., Any]) -> Callable[..., Any]:
        """mlx-lm's ``evaluate`` of the averages. The validation at the very end draws random numbers that a longer run
        would not have drawn there: a run that is to become longer goes on from before it.
        """
        import numpy as np

        def evaluated(*args: Any, **kwargs: Any) -> Any:
            iteration = self.batches.iterations + 1
            if iteration == self.args.iters and iteration % self.args.steps_per_eval and iteration != 1:
                self.before_last_validation = np.random.get_state()
            with self.averaged():
                return evaluate(*args, **kwargs)

        return evaluated

    def _say(self, line: str) -> None:
        if self.main:
            print(line, flush=True)


def check_nothing_is_lost(adapters: Path) -> None:
    """Raise FileExistsError for adapters of a run that cannot be resumed, which starting again would overwrite."""
    if adapters.exists():
        how = "load its weights with --resume-adapter-file, or name another folder"
        raise FileExistsError(f"[train] '{adapters}' has no {run_file.NAME} beside it to resume: {how}.")


def _options(args: Any, train_dataset: Any, val_dataset: Any, options: Mapping[str, Any] | None) -> dict[str, Any]:
    own: dict[str, Any] = {name: getattr(args, name) for name in NUMBERS}
    sets = {"training examples": train_dataset, "validation examples": val_dataset}
    own |= {name: len(dataset) if dataset is not None else 0 for name, dataset in sets.items()}
    return {**own, "machines": mx.distributed.init().size(), **(options or {})}


def _inside(optimizer: Any, kinds: tuple[type, ...]) -> Any:
    """The outermost of these kinds among an optimizer and those that it wraps; None without one."""
    while optimizer is not None and not isinstance(optimizer, kinds):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def _with_loss_scale(optimizer: Any, loss: Callable[..., Any]) -> Callable[..., Any]:
    """The loss whose gradient is that of the scaled one, and whose value is its own."""
    if _inside(optimizer, (LossScale, DynamicLossScale)) is None:
        return loss

    def scaled_loss(model: Module, *batch: Any) -> Any:
        value, *rest = loss(model, *batch)
        scaled = optimizer.scale_loss(value)
        return (mx.stop_gradient(value) + (scaled - mx.stop_gradient(scaled)), *rest)

    return scaled_loss
