"""The program of one verifier process: asks math-verify whether two answers are equal.

Reads one JSON list ``[answer, truth]`` a line from standard input. Writes one byte for each: ``1`` equal,
``0`` not; and ``r`` once when it is ready. Ends with its standard input. Run as a script, which imports
math-verify only.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys

_MEMORY_LIMIT_BYTES = 4 << 30
"""A tower of powers must fail to allocate before it eats the node."""


def main(deadline_seconds: float) -> None:
    """Serves until standard input ends, or one answer takes longer than ``deadline_seconds``."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_LIMIT_BYTES, _MEMORY_LIMIT_BYTES))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # a library that prints must not look like a reply
    logging.disable(logging.CRITICAL)
    from math_verify import parse, verify

    def equal(answer: str, truth: str) -> bool:
        # math-verify's own time-outs need SIGALRM and miss long C calls; None leaves the alarm to us.
        parsed_truth = parse(f"\\boxed{{{truth}}}", parsing_timeout=None)
        parsed_answer = parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
        return verify(parsed_truth, parsed_answer, timeout_seconds=None)

    equal(r"\sqrt{2}", r"\frac{x}{2}")  # the first parse builds tables: half a second, on nobody's clock
    replies.write(b"r")
    for line in sys.stdin:
        answer, truth = json.loads(line)
        # The alarm's default action ends the process even inside a C call, and even when the parent is gone.
        signal.setitimer(signal.ITIMER_REAL, deadline_seconds)
        reply = b"1" if equal(answer, truth) else b"0"
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(reply)


if __name__ == "__main__":
    main(float(sys.argv[1]))
