"""A training step in a file, for apps in C++ and Swift: what writes it, and what runs it from Python.

``step.py`` traces and writes, ``inputs.py`` gives every array of a run its name; ``rates.py``, ``randomness.py`` and
``devices.py`` say where a trace takes learning rates and random numbers from, and for which device it is; ``run.py``
runs an exported step.
"""

from .run import ExportedStep, load_step
from .step import export_step

__all__ = ["ExportedStep", "export_step", "load_step"]
