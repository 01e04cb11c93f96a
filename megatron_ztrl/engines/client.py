"""The HTTP API of one SGLang server: tokens in, tokens out, and the controls of a weight update."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import aiohttp
import orjson

from megatron_ztrl.types import Completion, FinishReason, VersionSpan

KEEPALIVE_SECONDS = 300.0
"""Shorter than the server's (see ``server``): an idle connection is dropped by us, never under a new
request.
"""

ABORT_ROUNDS = 20
ABORT_ROUND_SECONDS = 0.05


class EngineError(RuntimeError):
    """The engine could not be reached, or refused a request; the message names the endpoint."""


class EngineUnreachable(EngineError):
    """Nobody is there, or nobody any more: whatever the engine did with the request, no answer will come."""


class EngineClient:
    """One server, one connection pool. Create it inside the event loop that uses it, and close it.

    Every method raises ``EngineError``.
    """

    def __init__(self, url: str, *, request_timeout_seconds: float) -> None:
        self.url = url
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_SECONDS),
            timeout=aiohttp.ClientTimeout(total=request_timeout_seconds),
            headers={"Content-Type": "application/json"},
            auto_decompress=False,
        )
        self._in_flight: set[asyncio.Future[None]] = set()
        """One for each ``generate`` that has not returned."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()

    async def generate(
        self,
        input_ids: Sequence[int],
        *,
        max_new_tokens: int,
        stop_patterns: Sequence[str] = (),
        temperature: float,
        top_p: float = 1.0,
        request_id: str,
        seed: int | None = None,
    ) -> Completion:
        """Sample one continuation.

        A stop pattern ends the call with the token that completes a match. That token is kept whole, so when
        it also holds characters past the match those stay; no token after it is returned. Patterns match
        however the model spells the text, token by token, which SGLang's plain stop strings do not: it looks
        for those only in the last ``n + 1`` tokens, ``n`` being the length of the *canonical* tokenization,
        and misses any longer spelling. A match that begins in ``input_ids`` is not seen.

        Args:
            input_ids: [P]
            max_new_tokens: the most tokens to sample.
            stop_patterns: ASCII regular expressions of bounded length.
            temperature: 0 is greedy. Log-probs are after temperature.
            top_p: nucleus; log-probs are of the whole distribution.
            request_id: unique; ``abort`` takes it.
            seed: fixed sampling, on a server started with ``enable_deterministic_inference``.

        Returns:
            The tokens, up to and including the one that completed a stop pattern or ended the sequence.
        """
        parameters: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
        }
        for pattern in stop_patterns:
            if not pattern.isascii():  # SGLang counts one token for a character when it bounds the search
                raise ValueError(f"stop pattern {pattern!r} is not ASCII")
        if stop_patterns:
            parameters["stop_regex"] = list(stop_patterns)
        if seed is not None:
            parameters["sampling_seed"] = seed
        returned = asyncio.get_running_loop().create_future()
        self._in_flight.add(returned)
        try:
            reply = await self._post(
                "/generate",
                {
                    "rid": request_id,
                    "input_ids": list(input_ids),
                    "sampling_params": parameters,
                    "return_logprob": True,
                    "logprob_start_len": -1,
                },
            )
        finally:
            self._in_flight.discard(returned)
            returned.set_result(None)
        return _completion(reply)

    async def prompt_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Return the log-prob of every token after the first, [L - 1], at temperature 1."""
        reply = await self._post(
            "/generate",
            {
                "input_ids": list(token_ids),
                "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
                "return_logprob": True,
                "logprob_start_len": 0,
            },
        )
        return [entry[0] for entry in reply["meta_info"]["input_token_logprobs"][1:]]

    async def abort(self, request_id: str | None) -> None:
        """End one request, or with None all; each returns the tokens it has, with ``FinishReason.ABORT``."""
        await self._post("/abort_request", {"abort_all": True} if request_id is None else {"rid": request_id})

    async def abort_in_flight(self) -> None:
        """End all requests, and wait until those that this client has sent are back.

        A request that is on its way when the server ends the others runs on, so this asks again, for about a
        second; what is still running then (say, because the server is paused) goes on.
        """
        waiting = set(self._in_flight)
        for _ in range(ABORT_ROUNDS):
            if not waiting:
                return
            await self.abort(None)
            _, waiting = await asyncio.wait(waiting, timeout=ABORT_ROUND_SECONDS)

    async def pause(self, mode: Literal["retract", "in_place"]) -> None:
        """Stop sampling, and hold back requests that arrive; see ``interruption``.

        ``retract`` frees the KV of the running requests, and computes it anew on ``resume``; ``in_place``
        keeps it.
        """
        await self._post("/pause_generation", {"mode": mode})

    async def resume(self) -> None:
        """Go on after ``pause``."""
        await self._post("/continue_generation", {})

    async def begin_weight_update(self) -> None:
        """Open a weight update, which SGLang wants around every change of parameters."""
        await self._post("/begin_weight_update", {})

    async def end_weight_update(self) -> None:
        """Close the weight update."""
        await self._post("/end_weight_update", {})

    async def load_weights(self, payloads: Sequence[str], *, loader: str, version: int | None) -> None:
        """Run the custom weight loader in every rank. Cached KV stays: see ``interruption.pause``.

        Args:
            payloads: one for each tensor-parallel rank (see ``weight_receiver``).
            loader: dotted name of the loader, as the server was started with.
            version: tokens sampled from now on carry it; None leaves it.
        """
        await self._post(
            "/update_weights_from_tensor",
            {
                "serialized_named_tensors": list(payloads),
                "load_format": loader,
                "weight_version": None if version is None else str(version),
                "flush_cache": False,  # it would kill the server where it cannot be done
            },
        )

    async def join_broadcast_group(
        self,
        name: str,
        *,
        address: str,
        port: int,
        rank_offset: int,
        world_size: int,
        backend: Literal["gloo", "nccl"],
    ) -> None:
        """Let the server's ranks join a process group as ``rank_offset`` and following; returns when all have."""
        await self._post(
            "/init_weights_update_group",
            {
                "group_name": name,
                "master_address": address,
                "master_port": port,
                "rank_offset": rank_offset,
                "world_size": world_size,
                "backend": backend,
            },
        )

    async def load_broadcast(
        self,
        group_name: str,
        names: Sequence[str],
        shapes: Sequence[Sequence[int]],
        *,
        dtype: str,
        version: int | None,
    ) -> None:
        """Receive whole tensors, one behind the other in one message, from rank 0 of a group.

        Args:
            group_name: of ``join_broadcast_group``.
            names: Hugging Face's.
            shapes: of the tensors.
            dtype: of all of them.
            version: tokens sampled from now on carry it; None leaves it.
        """
        await self._post(
            "/update_weights_from_distributed",
            {
                "group_name": group_name,
                "names": list(names),
                "dtypes": [dtype] * len(names),
                "shapes": [list(shape) for shape in shapes],
                "load_format": "flattened_bucket",
                "weight_version": None if version is None else str(version),
                "flush_cache": False,
            },
        )

    async def load_checkpoint(self, directory: Path, *, version: int) -> None:
        """Read the weights of a Hugging Face checkpoint; tokens sampled from now on carry ``version``."""
        await self._post(
            "/update_weights_from_disk",
            {"model_path": str(directory), "weight_version": str(version), "flush_cache": False},
        )

    async def flush_cache(self) -> None:
        """Forget all cached KV; an error while requests run, or wait in a server that is not paused."""
        await self._post("/flush_cache", {})

    async def healthy(self) -> bool:
        """Whether the engine samples: it is asked for one token if it has nothing else to do.

        False within 20 s while it is paused, or hangs.
        """
        try:
            await self._request("GET", "/health", None)
        except EngineError:
            return False
        return True

    async def weight_version(self) -> int:
        """Return the version that new tokens carry."""
        return int((await self._request("GET", "/model_info", None))["weight_version"])

    async def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        return await self._request("POST", path, orjson.dumps(body))

    async def _request(self, method: str, path: str, data: bytes | None) -> Any:
        if self._session.closed:
            raise EngineUnreachable(f"{self.url}{path}: the client is closed")
        try:
            async with self._session.request(method, self.url + path, data=data) as response:
                content = await response.read()
                if response.status != 200:
                    raise EngineError(
                        f"{self.url}{path}: {response.status} {content[:500].decode(errors='replace')}"
                    )
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
            raise EngineUnreachable(f"{self.url}{path}: {type(error).__name__}: {error}") from error
        except (aiohttp.ClientError, TimeoutError) as error:
            raise EngineError(f"{self.url}{path}: {type(error).__name__}: {error}") from error
        return orjson.loads(content) if content[:1] in (b"{", b"[") else None


def _completion(reply: Mapping[str, Any]) -> Completion:
    meta = reply["meta_info"]
    finish = meta["finish_reason"]
    return Completion(
        token_ids=reply["output_ids"],
        logprobs=[entry[0] for entry in meta.get("output_token_logprobs", [])],
        finish_reason=FinishReason(finish["type"]),
        matched_stop=finish.get("matched"),
        version_spans=[
            VersionSpan(version=int(span["version"]), start=span["start"], end=span["end"])
            for span in meta.get("weight_versions") or []
        ],
        cached_tokens=meta.get("cached_tokens", 0),
    )
