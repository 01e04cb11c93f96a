"""The verifier with its real processes: right scores, deadlines kept, nothing left running."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import psutil
import pytest

from megatron_ztrl.config.schema import RewardConfig
from megatron_ztrl.rewards import math_verifier
from megatron_ztrl.rewards.math_verifier import MathVerifier

HANGS = r"\boxed{9^{9^{9^9}}}"


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    before = set(psutil.Process().children(recursive=True))
    yield
    assert set(psutil.Process().children(recursive=True)) <= before


def _run(
    body: Callable[[MathVerifier], Awaitable[None]], *, timeout_seconds: float = 10.0, workers: int = 1
) -> MathVerifier:
    async def main() -> MathVerifier:
        verifier = MathVerifier(
            RewardConfig(
                require_answer_tags=False, verify_timeout_seconds=timeout_seconds, verifier_workers=workers
            )
        )
        try:
            await body(verifier)
        finally:
            verifier.close()
        return verifier

    return asyncio.run(main())


def _children() -> list[int]:
    return [
        child.pid for child in psutil.Process().children() if "verify_worker" in " ".join(child.cmdline())
    ]


def test_strings_are_settled_without_starting_a_process():
    async def body(verifier: MathVerifier) -> None:
        assert await verifier.score(r"so it is \boxed{\dfrac{1}{2}}", "0.5") == 1.0
        assert await verifier.score(r"so it is \boxed{41}", "42") == 0.0
        assert await verifier.score("it is 42", "42") == 0.0
        assert _children() == []

    counts = _run(body).counts
    assert (counts.settled_by_string, counts.no_answer, counts.settled_by_math_verify) == (2, 1, 0)


def test_algebra_is_settled_by_math_verify_in_one_process_that_is_used_again():
    async def body(verifier: MathVerifier) -> None:
        assert await verifier.score(r"\boxed{2\sqrt{3}}", r"\sqrt{12}") == 1.0
        [pid] = _children()
        assert await verifier.score(r"\boxed{2\sqrt{3}}", r"\sqrt{13}") == 0.0
        assert await verifier.score(r"\boxed{\frac{1+\sqrt5}{2}}", r"\frac{\sqrt{5}+1}{2}") == 1.0
        assert await verifier.score(r"\boxed{\{2, 1\}}", r"\{1,2\}") == 1.0
        assert await verifier.score(r"\boxed{)(}", "x+1") == 0.0
        assert _children() == [pid]

    assert _run(body).counts.settled_by_math_verify == 5


def test_the_answer_tags_gate_follows_the_configuration():
    async def score(require_answer_tags: bool) -> float:
        verifier = MathVerifier(RewardConfig(require_answer_tags=require_answer_tags))
        return await verifier.score(r"\boxed{42}", "42")

    assert [asyncio.run(score(required)) for required in (False, True)] == [1.0, 0.0]


def test_an_answer_that_hangs_is_wrong_by_the_deadline_and_counted_and_its_process_replaced():
    async def body(verifier: MathVerifier) -> None:
        for answer in ("9^{9^{9^9}}", "100000000!"):
            assert await verifier.score(r"\boxed{x+x}", "2x") == 1.0  # a process is up
            [pid] = _children()
            started = time.monotonic()
            assert await verifier.score(rf"\boxed{{{answer}}}", "3") == 0.0
            assert 4.0 <= time.monotonic() - started < 60.0
            assert pid not in _children()

    counts = _run(body, timeout_seconds=4.0).counts  # enough for the good answers on a busy machine
    assert (counts.timeouts, counts.settled_by_math_verify, counts.crashes) == (2, 2, 0)


def test_many_scores_at_once_use_no_more_processes_than_configured():
    async def body(verifier: MathVerifier) -> None:
        pairs = [(f"{n}x+x", f"{n + 1}x") for n in range(2, 22)] + [
            (f"{n}x+x", f"{n}x") for n in range(2, 22)
        ]
        scores = await asyncio.gather(*(verifier.score(rf"\boxed{{{a}}}", t) for a, t in pairs))
        assert scores == [1.0] * 20 + [0.0] * 20
        assert len(_children()) == 2

    _run(body, workers=2)


def test_a_cancelled_score_does_not_leave_its_reply_to_the_next_question():
    async def body(verifier: MathVerifier) -> None:
        assert await verifier.score(r"\boxed{x+x}", "2x") == 1.0
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await verifier.score(HANGS, "3")
        assert _children() == []
        assert await verifier.score(r"\boxed{x+x}", "3x") == 0.0

    assert _run(body).counts.timeouts == 0


def test_a_process_that_something_else_killed_costs_no_reward():
    async def body(verifier: MathVerifier) -> None:
        assert await verifier.score(r"\boxed{x+x}", "2x") == 1.0
        os.kill(_children()[0], signal.SIGKILL)
        assert await verifier.score(r"\boxed{x+x+x}", "3x") == 1.0

    assert _run(body).counts.crashes == 0


def test_closing_ends_a_score_that_is_waiting():
    async def body(verifier: MathVerifier) -> None:
        assert await verifier.score(r"\boxed{x+x}", "2x") == 1.0
        waiting = asyncio.create_task(verifier.score(HANGS, "3"))
        await asyncio.sleep(0)  # lets it ask
        verifier.close()
        with pytest.raises(RuntimeError, match="closed"):
            await waiting

    _run(body)


def test_a_process_that_cannot_start_is_an_error_not_a_wrong_answer(tmp_path: Path, monkeypatch):
    broken = tmp_path / "verify_worker.py"
    broken.write_text("raise SystemExit(3)")
    monkeypatch.setattr(math_verifier, "_PROGRAM", broken)

    async def body(verifier: MathVerifier) -> None:
        with pytest.raises(RuntimeError, match="ended with code 3 before it was ready"):
            await verifier.score(r"\boxed{x+x}", "2x")

    _run(body)


def test_a_process_whose_parent_is_gone_ends_by_itself_in_mid_calculation_and_when_idle():
    def start() -> subprocess.Popen[bytes]:
        program = [sys.executable, "-P", str(math_verifier._PROGRAM), "0.3"]
        process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout.read(1) == b"r"
        return process

    with start() as busy:
        busy.stdin.write(b'["9^{9^{9^9}}", "3"]\n')
        busy.stdin.flush()
        assert busy.wait(timeout=60) == -signal.SIGALRM
    with start() as idle:
        idle.stdin.close()
        assert idle.wait(timeout=60) == 0
