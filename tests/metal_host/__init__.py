"""Runs Metal kernels on a Linux CPU: the very source that MLX would hand to Metal, compiled by clang.

What it proves: the source compiles with real address spaces, its arithmetic, its bounds, its races, which
elements it writes and how many bytes it moves. What it cannot tell: speed, what only Apple's compiler
refuses, and exact rounding: Apple may fuse a multiplication and an addition, and flushes denormal numbers, which
`HostMetal(contract=True)` and `HostMetal(flush=True)` do here.
"""

from .errors import HostError
from .host import HostKernel, HostMetal, Launch

__all__ = ["HostError", "HostKernel", "HostMetal", "Launch"]
