"""Throughput, latency and truthfulness of the executor on this machine, through HTTP.

The same program as ``ztrl-sandbox bench``: trivial, sympy and mixed load (endless loops and memory bombs among
it) from 1 to 2,048 callers, beside the machine's fork floor and the targets. ``--json FILE`` also writes the
numbers; ``--url URL --protocol sandboxfusion`` measures another server instead.

    python benchmarks/sandbox_throughput.py --workers 2
"""

from __future__ import annotations

import argparse
import sys

from ztrl_sandbox import bench


def main() -> int:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    bench.add_arguments(parser)
    return bench.run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
