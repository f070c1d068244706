"""The learning rate schedules of Keras, torch, MindSpore and optax, as functions of the step like MLX's own.

Each function is named after the framework's and takes the framework's arguments; torch's and MindSpore's begin with the
learning rate that their schedulers take from the optimizer. The schedule that it returns is called with the step, a
uint64 array or an int, 0 first, and returns a 0-d fp32 array, inside ``mx.compile`` too::

    optimizer = Adagrad(schedules.torch_step_lr(0.1, step_size=30))

Wrong arguments are refused at once: TypeError for a wrong type, ValueError for a value out of range, as negative
rates, factors and exponents are throughout. Where MLX has the same function, MLX's is called.
:class:`ReduceLROnPlateau`, which goes by a metric and not by the step, is an object beside the optimizer, as in torch.

What belongs here: one module for each framework, or two where one would be too long. Each function is a formula of
``(step, arguments...)`` under ``@named``, which makes it a function of the arguments alone. To add one, write the
formula in its framework's module with the framework's argument names, each annotated with its check
(``arguments.py``); take the curve from ``curves.py``, where each stands once; name it below; and record the framework's
own values with ``tests/golden/record_schedules.py``. Equality with them, tracing, saving and pickling are then tested
without further code.
"""

from .keras import (
    from_keras,
    keras_cosine_decay,
    keras_cosine_decay_restarts,
    keras_exponential_decay,
    keras_inverse_time_decay,
    keras_piecewise_constant_decay,
    keras_polynomial_decay,
)
from .mindspore import mindspore_exponential_lr, mindspore_step_lr
from .named import NamedSchedule, call_with, from_config, get_config
from .optax import (
    optax_constant_schedule,
    optax_cosine_decay_schedule,
    optax_exponential_decay,
    optax_linear_schedule,
    optax_piecewise_constant_schedule,
    optax_polynomial_schedule,
)
from .optax_joined import (
    optax_cosine_onecycle_schedule,
    optax_join_schedules,
    optax_linear_onecycle_schedule,
    optax_piecewise_interpolate_schedule,
    optax_sgdr_schedule,
    optax_warmup_constant_schedule,
    optax_warmup_cosine_decay_schedule,
    optax_warmup_exponential_decay_schedule,
)
from .plateau import ReduceLROnPlateau
from .torch import (
    torch_constant_lr,
    torch_exponential_lr,
    torch_lambda_lr,
    torch_linear_lr,
    torch_multi_step_lr,
    torch_multiplicative_lr,
    torch_polynomial_lr,
    torch_step_lr,
)
from .torch_cyclic import (
    torch_chained_scheduler,
    torch_cosine_annealing_lr,
    torch_cosine_annealing_warm_restarts,
    torch_cyclic_lr,
    torch_one_cycle_lr,
    torch_sequential_lr,
)

__all__ = [
    "NamedSchedule",
    "ReduceLROnPlateau",
    "call_with",
    "from_config",
    "from_keras",
    "get_config",
    "keras_cosine_decay",
    "keras_cosine_decay_restarts",
    "keras_exponential_decay",
    "keras_inverse_time_decay",
    "keras_piecewise_constant_decay",
    "keras_polynomial_decay",
    "mindspore_exponential_lr",
    "mindspore_step_lr",
    "optax_constant_schedule",
    "optax_cosine_decay_schedule",
    "optax_cosine_onecycle_schedule",
    "optax_exponential_decay",
    "optax_join_schedules",
    "optax_linear_onecycle_schedule",
    "optax_linear_schedule",
    "optax_piecewise_constant_schedule",
    "optax_piecewise_interpolate_schedule",
    "optax_polynomial_schedule",
    "optax_sgdr_schedule",
    "optax_warmup_constant_schedule",
    "optax_warmup_cosine_decay_schedule",
    "optax_warmup_exponential_decay_schedule",
    "torch_chained_scheduler",
    "torch_constant_lr",
    "torch_cosine_annealing_lr",
    "torch_cosine_annealing_warm_restarts",
    "torch_cyclic_lr",
    "torch_exponential_lr",
    "torch_lambda_lr",
    "torch_linear_lr",
    "torch_multi_step_lr",
    "torch_multiplicative_lr",
    "torch_one_cycle_lr",
    "torch_polynomial_lr",
    "torch_sequential_lr",
    "torch_step_lr",
]
