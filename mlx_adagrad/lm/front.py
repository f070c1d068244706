"""mlx-lm's own command line, with ``optimizer: adagrad`` and ``--resume``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..by_name import stand_in
from ..checks import boolean, shown
from . import known, options, run_file, sparse, training

NAME = "adagrad"
# What changes the numbers of a run, beside the arguments of train: the same where it is resumed.
NUMBERS = ("learning_rate", "lr_schedule", "seed", "fine_tune_type", "num_layers", "lora_parameters", "mask_prompt")


class Refused(ValueError):
    """A command that cannot be run, said in a sentence before the model is loaded."""


def command_line() -> None:
    """Run ``mlx_lm``'s command line with the arguments of this process.

    Raises:
        Refused: For options that are wrong, or other ones than those of the run to be resumed.
        NotKnown: If mlx-lm is missing, or another one than this package knows.
    """
    cli = known.mlx_lm("cli")
    if sys.argv[1:2] == ["lora"]:
        with _hooked(known.mlx_lm("lora")):
            cli.main()
    else:
        cli.main()


@contextmanager
def _hooked(lora: Any) -> Iterator[None]:
    """``mlx_lm.lora`` that knows our optimizer, and trains with our ``train``."""
    known.trainer()
    real_parser, real_run = lora.build_parser, lora.run
    defaults = {**lora.CONFIG_DEFAULTS, "resume": False}
    defaults["optimizer_config"] = {**defaults["optimizer_config"], NAME: {}}

    def build_parser() -> Any:
        parser = real_parser()
        known.optimizer_choices(parser).append(NAME)
        parser.add_argument(
            "--resume",
            action="store_true",
            default=None,
            help=f"Go on from {run_file.NAME} in the adapter path, as if the run had never stopped.",
        )
        return parser

    def run(args: Any, training_callback: Any = None) -> None:
        if args.train:
            _run_training(lora, real_run, args, training_callback)
        else:
            real_run(args, training_callback)

    with training.patched(lora, build_parser=build_parser, run=run, CONFIG_DEFAULTS=defaults):
        yield


def _run_training(lora: Any, real_run: Any, args: Any, training_callback: Any) -> None:
    numbers = _numbers(args)
    try:
        optimizer = _optimizer(lora, args)
        _check_resume(args, numbers)
    except (TypeError, ValueError, OSError) as error:
        raise Refused(str(error)) from error
    wants_sparse = optimizer is not None and options.sparse_embedding(args.optimizer_config.get(NAME))

    def train(**given: Any) -> None:
        with sparse.embedding(given["model"], given["args"]) if wants_sparse else ExitStack():
            training.train(**given, resume=bool(args.resume), options=numbers)

    with ExitStack() as stack:
        stack.enter_context(training.patched(lora, train=train))
        if optimizer is not None:
            args.optimizer = _Name(args.optimizer)
            stack.enter_context(stand_in("SGD", lambda **_: optimizer))
        real_run(args, training_callback)


class _Name(str):
    """``"adagrad"`` in the header and in adapter_config.json; where mlx-lm looks it up, an optimizer that it knows."""

    def lower(self) -> str:
        return "sgd"


def _optimizer(lora: Any, args: Any) -> Any:
    """Our optimizer if it is asked for, else None."""
    if str(args.optimizer).lower() != NAME:
        return None
    config = args.optimizer_config.get(NAME) if isinstance(args.optimizer_config, dict) else args.optimizer_config

    def schedule(described: Any) -> Any:
        try:
            return lora.build_schedule(described)
        except Exception as error:
            got = f"{shown(described)}: {error!r}"
            raise ValueError(f"[{options.OWNER}] mlx-lm cannot build the schedule {got}.") from error

    rate = schedule(args.lr_schedule) if args.lr_schedule else args.learning_rate
    optimizer = options.optimizer_of(config, rate, schedule)
    if options.sparse_embedding(config) and args.fine_tune_type != "full":
        raise ValueError(f"[{options.OWNER}] '{options.SPARSE}' needs fine_tune_type: full.")
    return optimizer


def _numbers(args: Any) -> dict[str, Any]:
    numbers = {name: getattr(args, name) for name in (*NUMBERS, *training.NUMBERS)}
    numbers["model"] = Path(args.model).name  # it may lie elsewhere now
    name = str(args.optimizer).lower()
    config = args.optimizer_config if isinstance(args.optimizer_config, dict) else {}
    return {**numbers, "optimizer": name, "optimizer_config": {name: config.get(name)}}


def _check_resume(args: Any, numbers: dict[str, Any]) -> None:
    """Refuse what cannot be resumed before the model is loaded; :func:`training.train` checks the rest."""
    boolean("lora", "resume", args.resume)
    adapters = Path(args.adapter_path) / "adapters.safetensors"
    file = adapters.with_name(run_file.NAME)
    if not args.resume:
        return
    if not file.exists():
        training.check_nothing_is_lost(adapters)
        return
    saved = run_file.read_notes(file)["options"]
    run_file.check_options(file, {name: saved.get(name) for name in numbers}, numbers)
