"""``python -m mlx_adagrad.lm``, also installed as ``mlx-adagrad``."""

from __future__ import annotations

import sys

from .front import Refused, command_line
from .known import NotKnown


def main() -> None:
    """Run mlx-lm's command line with the arguments of this process."""
    if len(sys.argv) < 2:
        sys.argv.append("--help")
    try:
        command_line()
    except (NotKnown, Refused) as error:
        sys.exit(f"mlx-adagrad: {error}")


if __name__ == "__main__":
    main()
