"""Exceptions at any line of the package."""

import sys
from pathlib import Path

import mlx_adagrad

PACKAGE = str(Path(mlx_adagrad.__file__).parent)


class Interrupt:
    """Notes the lines of the package that run on this thread, and raises a KeyboardInterrupt at one of them."""

    def __init__(self, at=None):
        self.at, self.lines = at, []

    def __call__(self, frame, event, _):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            self.lines.append((frame.f_code.co_filename, frame.f_lineno))
            if len(self.lines) == self.at:
                raise KeyboardInterrupt
        return self

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self)
        return self

    def __exit__(self, *_):
        sys.settrace(self.before)

    def places(self):
        """The number of the first and of the last time that each line ran."""
        last = {line: at for at, line in enumerate(self.lines, 1)}
        first = {line: at for at, line in reversed([*enumerate(self.lines, 1)])}
        return sorted({*first.values(), *last.values()})
