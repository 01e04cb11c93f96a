"""Scores maths answers: strings first, math-verify in killable processes where strings cannot tell."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_ztrl.config.schema import RewardConfig
from megatron_ztrl.rewards.answers import same_answer
from megatron_ztrl.rewards.format import extract_answer

_PROGRAM = Path(__file__).with_name("verify_worker.py")
_STARTUP_TIMEOUT_SECONDS = 120.0
_READY, _EQUAL, _DIED = b"r", b"1", b""


@dataclass(kw_only=True, slots=True)
class VerifierCounts:
    """What became of the responses scored so far."""

    no_answer: int = 0
    """No box, or the format gate was shut."""
    settled_by_string: int = 0
    settled_by_math_verify: int = 0
    timeouts: int = 0
    """Scored as wrong."""
    crashes: int = 0
    """The process died twice over the same answer (out of memory, say). Scored as wrong."""


class MathVerifier:
    r"""Reward 1.0 if the boxed answer equals the ground truth, else 0.0.

    Normalised strings and exact numbers settle nearly every pair; the others go to math-verify. That one can
    hang for ever (``9^{9^{9^9}}``), so it runs in ``reward.verifier_workers`` processes that start when first
    needed, are killed at the deadline and are replaced. They are plain subprocesses, not a fork of the driver
    with its threads. Use it from one event loop.
    """

    def __init__(self, config: RewardConfig) -> None:
        self._require_answer_tags = config.require_answer_tags
        self._timeout_seconds = config.verify_timeout_seconds
        self._slots = asyncio.Semaphore(config.verifier_workers)
        self._idle: list[_Worker] = []
        self._busy: set[_Worker] = set()
        self._closed = False
        self.counts = VerifierCounts()

    async def score(self, response_text: str, ground_truth: str) -> float:
        """The reward of one response.

        Args:
            response_text: What followed the prompt.
            ground_truth: The answer, without a box.

        Raises:
            RuntimeError: A verifier process cannot start.
        """
        answer = extract_answer(response_text, require_answer_tags=self._require_answer_tags)
        if answer is None:
            self.counts.no_answer += 1
            return 0.0
        equal = same_answer(answer, ground_truth)
        if equal is not None:
            self.counts.settled_by_string += 1
        else:
            equal = await self._verify(answer, ground_truth)
        return float(equal)

    def close(self) -> None:
        """Ends all processes. A ``score`` that is still waiting for one raises RuntimeError."""
        for worker in (*self._idle, *self._busy):
            worker.kill()
        for worker in self._idle:
            worker.release()
        self._idle.clear()
        self._closed = True

    async def _verify(self, answer: str, truth: str) -> bool:
        async with self._slots:
            for _attempt in range(2):  # a death may have been the node's doing, a second one is the answer's
                try:
                    reply = await self._ask(answer, truth)
                except TimeoutError:
                    self.counts.timeouts += 1
                    return False
                if reply != _DIED:
                    self.counts.settled_by_math_verify += 1
                    return reply == _EQUAL
            self.counts.crashes += 1
            return False

    async def _ask(self, answer: str, truth: str) -> bytes:
        """The reply of one process, which is idle again afterwards, or dead if it did not reply."""
        if self._closed:
            raise RuntimeError("the verifier is closed")
        worker = self._idle.pop() if self._idle else _Worker(self._timeout_seconds)
        self._busy.add(worker)
        reply = _DIED
        try:
            await worker.ready()
            async with asyncio.timeout(self._timeout_seconds):
                reply = await worker.ask(answer, truth)
        finally:
            # Also when cancelled: the reply that is still to come must not answer the next question.
            self._busy.remove(worker)
            if reply == _DIED:
                worker.kill()
                worker.release()
            else:
                self._idle.append(worker)
        return reply


class _Worker:
    """One verifier process; see ``verify_worker`` for what it says."""

    def __init__(self, timeout_seconds: float) -> None:
        # One second more than our own deadline: its alarm is for the case that we are gone.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_PROGRAM), str(timeout_seconds + 1.0)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        assert self._process.stdin
        assert self._process.stdout
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._is_ready = False

    async def ready(self) -> None:
        """Waits until math-verify is imported, which is not on the answer's clock."""
        if not self._is_ready:
            try:
                async with asyncio.timeout(_STARTUP_TIMEOUT_SECONDS):
                    said = await self._read()
            except TimeoutError as error:
                raise RuntimeError(
                    f"a verifier process was not ready after {_STARTUP_TIMEOUT_SECONDS:.0f} seconds"
                ) from error
            if said != _READY:
                raise RuntimeError(
                    f"a verifier process ended with code {self._process.wait()} before it was ready; its "
                    "error is on standard error (is math-verify installed?)"
                )
            self._is_ready = True

    async def ask(self, answer: str, truth: str) -> bytes:
        """One byte, or nothing if the process died."""
        try:
            self._stdin.write(json.dumps([answer, truth]).encode() + b"\n")
        except BrokenPipeError:
            return _DIED
        return await self._read()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def release(self) -> None:
        """Closes the pipes of a dead process."""
        self._stdin.close()
        self._stdout.close()

    async def _read(self) -> bytes:
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        loop.add_reader(self._stdout, readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(self._stdout)
        return self._stdout.read(1)
