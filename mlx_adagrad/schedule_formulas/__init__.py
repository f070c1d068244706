"""The formulas behind :mod:`mlx_adagrad.schedules`, one file a framework."""
