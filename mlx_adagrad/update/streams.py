"""What the update does on CPUs only: work spread over several streams, so that all cores are busy, and large tensors
updated in place. On a GPU nothing here acts.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import mlx.core as mx

from .devices import on_cpu
from .rule import SMALLEST_NORMAL, STAND_IN, Scalars

# From here on (32 MiB of fp32) two single-output functions win over one function of two outputs: a primitive with one
# output writes into its input's buffer, while glibc maps allocations of this size afresh each time (measured on Linux
# x86-64, MLX 0.32.4: at 8.0M elements 18 ms in one pass and 26 in place, at 8.5M 45 and 22).
IN_PLACE_ELEMENTS = 2**23
# Work on this many elements (a tensor, or a batch of small ones) goes to the stream with the least work; for less it
# does not pay.
PARALLEL_ELEMENTS = 32_768
# More streams than the two cores this was measured on: while one stream waits for its next task, another has one (448
# tensors of 8 x 512 take 7 % less time than on two streams, large tensors the same).
CPU_STREAMS = 4

_thread = threading.local()


class StreamScheduler:
    """Gives each piece of work to the CPU stream with the least work so far; one for each call of an optimizer.

    The streams belong to the calling thread, since MLX lets no other thread use them.
    """

    def __init__(self) -> None:
        self.work = [0] * CPU_STREAMS  # elements given to each stream
        self.active = on_cpu()
        self._scalars: dict[tuple[int, int], tuple[Scalars, Scalars]] = {}

    def assign(self, size: int, scalars: Scalars) -> tuple[AbstractContextManager, Scalars]:
        """The stream on which to update ``size`` elements, as a context, and the scalars to use there."""
        if size < PARALLEL_ELEMENTS or not self.active:
            return nullcontext(), scalars
        least = self.work.index(min(self.work))
        self.work[least] += size
        if least == 0:
            return nullcontext(), scalars
        return mx.stream(_extra_streams()[least - 1]), self._scalars_on(least - 1, scalars)

    def _scalars_on(self, extra: int, scalars: Scalars) -> Scalars:
        # Inside a user's mx.compile equal operations on one array become one, on whichever stream, and what crosses
        # streams is not fused: 1.2 times slower (12 tensors of 1024 x 1024). Aliases keep the scalars apart, for each
        # stream one more alias of an alias, since equal ones would become one too.
        key = extra, id(scalars)
        if key not in self._scalars:
            dtype = scalars.lr.dtype
            constants = {
                "smallest": mx.array(SMALLEST_NORMAL[dtype], dtype),
                "stand_in": mx.array(STAND_IN[dtype], dtype),
            }
            given = {name: s for name, s in scalars._replace(**constants)._asdict().items() if s is not None}
            with mx.stream(_extra_streams()[extra]):
                for _ in range(extra + 1):
                    # an alias that, unlike mx.contiguous, can be exported
                    given = {name: _alias(s) for name, s in given.items()}
            aliases = scalars._replace(**given)
            self._scalars[key] = scalars, aliases  # both: once freed, other scalars could get that id
        return self._scalars[key][1]


def _alias(scalar: Any) -> Any:
    return [_alias(s) for s in scalar] if isinstance(scalar, list) else mx.squeeze(mx.expand_dims(scalar, 0), 0)


def in_place(size: int) -> bool:
    """Whether a tensor is updated in two passes that write into its own buffers: on a CPU, where it is large."""
    return size >= IN_PLACE_ELEMENTS and on_cpu()


def second_stream(size: int) -> AbstractContextManager:
    """For work on ``size`` elements that need not wait for other work: a second stream of the CPU, as a context."""
    return mx.stream(_extra_streams()[0]) if size >= PARALLEL_ELEMENTS and on_cpu() else nullcontext()


def _extra_streams() -> list[mx.Stream]:
    """The CPU streams beside the default one, the calling thread's own."""
    if not hasattr(_thread, "streams"):
        _thread.streams = [mx.new_stream(mx.cpu) for _ in range(CPU_STREAMS - 1)]
    return _thread.streams
