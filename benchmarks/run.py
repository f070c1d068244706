"""Every benchmark in turn: what ``make bench`` runs. Tables in Markdown on stdout, JSON and PNG files in out/."""

from __future__ import annotations

import dense
import distributed
import host
import rows
from report import bullets, machine, options

SCRIPTS = (dense, rows, host, distributed)


def main() -> None:
    """Print the machine, then let each script measure, print and write its files."""
    chosen = options(__doc__)
    facts = machine()
    print(f"# mlx_adagrad benchmarks\n\n{bullets(facts)}\n", flush=True)
    for script in SCRIPTS:
        script.run(chosen, facts)


if __name__ == "__main__":
    main()
