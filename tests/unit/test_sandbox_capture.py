"""What is kept of a snippet's output, and how the cut is stated."""

import asyncio
import contextlib
import gc
import os
import threading

import pytest
from ztrl_sandbox.capture import CappedOutput, PipeReader
from ztrl_sandbox.pool import PoolConfig
from ztrl_sandbox.protocol import Limits, Status


def captured(data: bytes, limit_bytes: int, chunk_bytes: int = 7) -> CappedOutput:
    output = CappedOutput(limit_bytes)
    for start in range(0, len(data), chunk_bytes):
        output.feed(data[start : start + chunk_bytes])
    return output


def test_output_up_to_the_limit_is_returned_whole():
    output = captured(b"0123456789", limit_bytes=10)
    assert not output.truncated
    assert output.text() == "0123456789"


def test_longer_output_keeps_both_ends_and_says_how_much_was_cut():
    output = captured(b"abcde" + b"x" * 1000 + b"vwxyz", limit_bytes=10)
    assert output.truncated
    assert output.total_bytes == 1010
    assert output.text() == "abcde\n... [1000 bytes of output cut] ...\nvwxyz"


def test_the_kept_end_is_exact_however_the_stream_was_chunked():
    data = bytes(range(48, 58)) * 100_000
    expected = f"{data[:50].decode()}\n... [{len(data) - 100} bytes of output cut] ...\n{data[-50:].decode()}"
    for chunk_bytes in (1 << 16, 99_991, len(data)):
        assert captured(data, limit_bytes=100, chunk_bytes=chunk_bytes).text() == expected


def test_memory_stays_bounded_while_a_stream_floods():
    output = CappedOutput(1000)
    for _ in range(1000):
        output.feed(b"y" * 65536)
        assert len(output._head) + len(output._tail) < 200_000
    assert output.total_bytes == 65_536_000


def test_invalid_utf8_is_repaired_and_nul_kept():
    assert captured(b"a\xff\x00b\xc3", limit_bytes=100).text() == "a\ufffd\x00b\ufffd"


@pytest.mark.parametrize("character", ["é", "€", "😀"])
def test_a_character_split_by_the_cut_is_dropped_not_mangled(character):
    for offset in range(8):
        text = captured(b"a" * offset + character.encode() * 100, limit_bytes=40).text()
        assert "\ufffd" not in text
        head, _, tail = text.partition("\n... [")
        assert set(head) <= {"a", character} and set(tail.partition("...\n")[2]) == {character}


def test_a_pipe_is_read_while_its_writer_waits_for_room_and_to_its_end():
    data = bytes(range(256)) * 4096  # sixteen times what a pipe holds

    async def scenario() -> PipeReader:
        reader = PipeReader(2 * len(data), len(data), lambda: None)
        end = os.dup(reader.write_fd)
        reader.close_write_end()

        def write() -> None:
            with open(end, "wb", buffering=0) as pipe:
                pipe.write(data)

        await asyncio.to_thread(write)
        reader.finish()
        return reader

    reader = asyncio.run(scenario())
    assert (reader.output.total_bytes, reader.flooded) == (len(data), False)
    assert bytes(reader.output._head + reader.output._tail) == data


def test_what_lies_in_a_pipe_is_taken_at_the_end_though_nobody_watched_and_no_descriptor_stays():
    async def scenario() -> str:
        reader = PipeReader(100, 1000, lambda: None)
        os.write(reader.write_fd, b"quick")
        reader.close_write_end()
        reader.finish()
        await asyncio.sleep(0)
        return reader.output.text()

    gc.collect()  # what another test left may be closed at any time
    before = set(os.listdir("/proc/self/fd"))
    assert asyncio.run(scenario()) == "quick"
    assert set(os.listdir("/proc/self/fd")) <= before


def test_a_flood_is_told_once_while_it_flows():
    async def scenario() -> int:
        floods = []
        flooded = asyncio.Event()

        def on_flood() -> None:
            floods.append(1)
            flooded.set()

        reader = PipeReader(100, 1 << 17, on_flood)
        end = os.dup(reader.write_fd)
        reader.close_write_end()

        def write_until_nobody_reads() -> None:
            with contextlib.suppress(BrokenPipeError), open(end, "wb", buffering=0) as pipe:
                while True:
                    pipe.write(bytes(1 << 16))

        writer = threading.Thread(target=write_until_nobody_reads)
        writer.start()
        await flooded.wait()
        reader.finish()
        await asyncio.to_thread(writer.join)
        return len(floods)

    assert asyncio.run(scenario()) == 1


def test_only_rejected_and_sandbox_error_are_the_infrastructures_fault():
    assert {status for status in Status if status.is_infrastructure} == {
        Status.REJECTED,
        Status.SANDBOX_ERROR,
    }


def test_impossible_settings_are_refused_by_name():
    with pytest.raises(ValueError, match="limits.open_files"):
        Limits(open_files=0)
    with pytest.raises(ValueError, match="workers"):
        PoolConfig(workers=0)
