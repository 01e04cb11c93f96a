"""The stock SGLang server behind ``EngineServer`` and ``EngineClient``, against Hugging Face's
implementation.
"""

import asyncio
import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from engine_configs import engine_config
from tiny_model import byte_tokenizer, logprobs_under

from megatron_ztrl.engines import tether
from megatron_ztrl.engines.client import EngineError
from megatron_ztrl.engines.server import EngineDied, EngineServer
from megatron_ztrl.engines.tether import session_members
from megatron_ztrl.trainer.topology import ENGINE_RESERVE_TOKENS
from megatron_ztrl.types import FinishReason, VersionSpan

PROMPT = [10, 20, 30, 40, 50]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
async def test_sampled_logprobs_equal_those_of_hugging_face_after_temperature(client, model, temperature):
    completion = await client.generate(
        PROMPT, max_new_tokens=40, temperature=temperature, request_id=f"temperature-{temperature}"
    )
    expected = logprobs_under(model, PROMPT, completion.token_ids, temperature)
    assert completion.logprobs == pytest.approx(expected, abs=1e-4)
    assert completion.version_spans == [VersionSpan(version=0, start=0, end=len(completion.token_ids))]


async def test_requests_of_different_lengths_computed_together_have_the_logprobs_of_each_alone(client, model):
    prompts = [[(7 * i + j) % 250 for j in range(1 + 9 * i)] for i in range(12)]
    completions = await asyncio.gather(
        *(
            client.generate(prompt, max_new_tokens=10 + i, temperature=1.0, request_id=f"ragged-{i}")
            for i, prompt in enumerate(prompts)
        )
    )
    for prompt, completion in zip(prompts, completions, strict=True):
        assert completion.logprobs == pytest.approx(
            logprobs_under(model, prompt, completion.token_ids), abs=1e-4
        )


async def test_a_continued_sequence_reuses_its_cached_prefix_and_keeps_its_logprobs(client, model):
    first = await client.generate(PROMPT, max_new_tokens=30, temperature=1.0, request_id="turn-1")
    resumed = PROMPT + first.token_ids + [60, 61, 62]
    second = await client.generate(resumed, max_new_tokens=10, temperature=1.0, request_id="turn-2")
    assert second.cached_tokens >= len(PROMPT) + len(first.token_ids) - 1
    assert second.logprobs == pytest.approx(logprobs_under(model, resumed, second.token_ids), abs=1e-4)


async def test_prompt_logprobs_equal_those_of_hugging_face(client, model):
    tokens = list(range(5, 200, 7))
    assert await client.prompt_logprobs(tokens) == pytest.approx(
        logprobs_under(model, tokens[:1], tokens[1:]), abs=1e-4
    )


async def test_the_token_that_completes_a_stop_pattern_is_kept_whole_and_is_the_last(client, model):
    tokenizer = byte_tokenizer()
    prompt, greedy, position = find_greedy_token(model, tokenizer, min_characters=2)
    piece = tokenizer.decode([greedy[position]])
    stop = piece[:1]  # complete one character into the token
    completion = await client.generate(
        prompt,
        max_new_tokens=len(greedy),
        stop_patterns=[re.escape(stop), "never"],
        temperature=0,
        request_id="mid-token",
    )
    assert completion.token_ids == greedy[: position + 1]
    assert completion.finish_reason is FinishReason.STOP
    assert completion.matched_stop == re.escape(stop)
    assert len(completion.logprobs) == position + 1


async def test_the_token_budget_ends_a_call(client):
    completion = await client.generate(PROMPT, max_new_tokens=7, temperature=0, request_id="length")
    assert (len(completion.token_ids), completion.finish_reason) == (7, FinishReason.LENGTH)


async def test_the_context_may_be_used_but_for_what_the_configuration_keeps_free(client, model):
    longest = model.config.max_position_embeddings - ENGINE_RESERVE_TOKENS  # tokens of prompt and response
    last_call = [7] * (longest - 1)
    completion = await client.generate(last_call, max_new_tokens=1, temperature=1.0, request_id="fits")
    assert len(completion.token_ids) == 1
    with pytest.raises(EngineError, match="length"):
        await client.generate([*last_call, 7], max_new_tokens=1, temperature=1.0, request_id="too-long")


async def test_an_aborted_request_returns_its_tokens_so_far_with_their_logprobs(client, model):
    task = asyncio.create_task(
        client.generate(
            PROMPT, max_new_tokens=1000, temperature=0, request_id="long", stop_patterns=["never"]
        )
    )
    await client.generate([1, 2], max_new_tokens=20, temperature=0, request_id="meanwhile")
    await client.abort("long")
    completion = await task
    assert completion.finish_reason is FinishReason.ABORT
    assert 0 < len(completion.token_ids) < 1000
    assert completion.logprobs == pytest.approx(
        logprobs_under(model, PROMPT, completion.token_ids, 1.0), abs=1e-4
    )


async def test_a_refused_request_raises_with_the_reason(client):
    with pytest.raises(EngineError, match=r"/generate: 400 .*context length"):
        await client.generate([1] * 2000, max_new_tokens=5, temperature=1.0, request_id="too-long")
    with pytest.raises(ValueError, match="not ASCII"):
        await client.generate([1], max_new_tokens=5, stop_patterns=["→"], temperature=1.0, request_id="arrow")


def test_a_taken_port_is_refused_before_anything_starts(run_directory):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        server = EngineServer(engine_config(run_directory, port=port), log_path=run_directory / "taken.log")
        with pytest.raises(ValueError, match=rf"engine.port: 127.0.0.1:{port} is taken"):
            server.start()
        assert not server.alive


def test_a_server_that_dies_at_its_start_is_noticed_with_the_end_of_its_log(tmp_path):
    server = EngineServer(engine_config(tmp_path), log_path=tmp_path / "engine.log")  # there is no model
    server.start()
    with pytest.raises(EngineDied, match=r"(?s)ended with code \d+.*end of .*engine.log.*Error"):
        server.wait_healthy()
    assert not server.alive
    server.stop()


def test_a_stopped_server_leaves_no_process(config, tmp_path, model):
    server = EngineServer(config, log_path=tmp_path / "engine.log")
    server.start()
    process = psutil.Process(server.pid)
    server.stop()
    assert not process.is_running()
    assert not server.alive


def test_a_server_that_is_killed_while_it_starts_leaves_no_process(config, tmp_path, model, monkeypatch):
    monkeypatch.setenv("SGLANG_PLUGINS", "megatron_ztrl_cpu_attention")  # not forking, as where there is CUDA
    server = EngineServer(config, log_path=tmp_path / "engine.log")
    server.start()
    launcher = psutil.Process(server.pid)
    while not any("spawn_main" in word for child in launcher.children() for word in command(child)):
        time.sleep(0.02)  # they will import for seconds before they tie themselves to the launcher
    (guard,) = (child for child in launcher.children() if tether.__file__ in command(child))
    guard.kill()  # with it nothing would be left to see
    launcher.kill()
    assert "code -9" in server.wait()
    assert list(session_members(launcher.pid))
    server.stop()
    assert not list(session_members(launcher.pid))


def command(process):
    with contextlib.suppress(psutil.Error):  # children come and go
        return process.cmdline()
    return []


def test_what_a_tethered_process_has_started_dies_with_it():
    command = ("sh", "-c", "sleep 600 & sleep 600 & echo started; wait")
    launcher = subprocess.Popen(
        [sys.executable, tether.__file__, str(os.getpid()), *command],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert launcher.stdout.readline() == b"started\n"
    assert len(list(session_members(launcher.pid))) == 4  # with the guard
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 60
    while list(session_members(launcher.pid)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not list(session_members(launcher.pid))


def test_what_killed_processes_shared_through_memory_is_removed_though_nobody_is_left_to_stop_them(tmp_path):
    shared, foreign, listing = (tmp_path / name for name in ("shared", "foreign", "listing"))
    shared.touch()
    foreign.touch()
    launcher = subprocess.Popen(
        [sys.executable, tether.__file__, str(os.getpid()), "sh", "-c", "echo started; sleep 600"],
        env={**os.environ, tether.SHARED_FILES_VARIABLE: str(listing)},
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert launcher.stdout.readline() == b"started\n"
    listing.write_text(f"{shared}\n{tmp_path / 'gone already'}\n")  # later than the start, as a server does
    launcher.kill()
    launcher.wait()
    assert launcher.stdout.read() == b""  # returns when the guard, too, has ended
    assert not shared.exists()
    assert foreign.exists()


def test_a_server_lists_what_its_processes_share_through_memory(server):
    listing = Path(psutil.Process(server.pid).environ()[tether.SHARED_FILES_VARIABLE])
    listed = listing.read_text().splitlines()
    assert any("sglang_loads" in path for path in listed)
    mapped = "".join(Path(f"/proc/{pid}/maps").read_text() for pid in session_members(server.pid))
    assert set(listed) == set(re.findall("/dev/shm/.*", mapped))


def test_a_server_imports_no_model_but_those_that_are_trained(server, run_directory):
    """Some of the others cannot be imported on a CPU, and SGLang says so."""
    assert "error when loading sglang.srt.models" not in (run_directory / "engine.log").read_text()


def test_the_processes_of_a_server_are_forked_from_it(server):
    """The kernel puts a page of its own somewhere else in every program that is started, but not in a fork."""
    launcher = psutil.Process(server.pid)
    forks = [each for each in launcher.children() if each.cmdline()[0].startswith("sglang::")]
    assert sorted(fork.cmdline()[0] for fork in forks) == ["sglang::detokenizer", "sglang::scheduler"]
    assert {kernel_page(fork.pid) for fork in forks} == {kernel_page(server.pid)}


def kernel_page(pid):
    (line,) = (line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "[vdso]" in line)
    return line


def test_a_tethered_process_dies_with_its_parent():
    program = (
        "import os, subprocess, sys;"
        f"child = subprocess.Popen([sys.executable, {tether.__file__!r}, str(os.getpid()), 'sleep', '600']);"
        "print(child.pid, flush=True); child.wait()"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(parent.stdout.readline()))
    while child.name() != "sleep":  # tied before it becomes the command
        time.sleep(0.01)
    parent.kill()
    parent.wait()
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)


def test_the_weight_receiver_imports_without_sglang():
    program = "import sys, megatron_ztrl.engines.weight_receiver; sys.exit('sglang' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], check=True)


@torch.no_grad()
def find_greedy_token(model, tokenizer, min_characters, length=12):
    """(prompt, greedy tokens, position of a token of so many characters whose first is new in the text)."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, 256, (512, 4), generator=generator)
    tokens = prompts
    for _ in range(length):
        tokens = torch.cat([tokens, model(tokens).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    for prompt, greedy in zip(prompts.tolist(), tokens[:, prompts.shape[1] :].tolist(), strict=True):
        for position, token in enumerate(greedy):
            piece = tokenizer.decode([token])
            before = tokenizer.decode(greedy[:position])
            plain = piece.isascii() and not piece.startswith("<|") and tokenizer.eos_token_id not in greedy
            if position >= 2 and len(piece) >= min_characters and plain and piece[0] not in before:
                return prompt, greedy, position
    raise AssertionError("no greedy continuation fits: choose another seed")
