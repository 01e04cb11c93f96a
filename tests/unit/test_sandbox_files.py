"""Which files go into a working directory and come out of it, and which do not."""

import base64
import gc
import os

import pytest
from ztrl_sandbox import files
from ztrl_sandbox.protocol import ExecutionResult, Status
from ztrl_sandbox.schemas import RunCodeBody, fusion_shape


@pytest.fixture
def work(tmp_path, monkeypatch):
    """The working directory, with a secret beside it."""
    (tmp_path / "secret").write_text("s3cr3t")
    directory = tmp_path / "work"
    directory.mkdir()
    monkeypatch.chdir(directory)
    return directory


def put(given: dict[str, bytes]) -> None:
    packed = files.pack(given)
    try:
        files.unpack(packed)
    finally:
        os.close(packed)


def fetch(*paths: str, limit_bytes: int = 100) -> tuple[dict[str, bytes], str]:
    collection = files.Collection(paths)
    wanted, collected = collection.fds
    files.collect(wanted, limit_bytes, collected)
    return collection.finish()


@pytest.mark.parametrize(
    ("path", "parts"),
    [("a", ["a"]), ("./a//b.txt", ["a", "b.txt"]), ("...", ["..."]), ("ä b/\n", ["ä b", "\n"])],
)
def test_a_relative_path_names_a_file(path, parts):
    assert files.path_parts(path) == parts


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("../x", "relative"),
        ("a/../../x", "relative"),
        ("a/..", "relative"),
        ("/etc/passwd", "relative"),
        ("//x", "relative"),
        ("a\0b", "NUL"),
        ("", "names no file"),
        (".", "names no file"),
        ("/", "names no file"),
        ("a/", "names no file"),
        ("a/.", "names no file"),
        ("\ud800", "Unicode"),
        ("a" * 1025, "more than 1024 bytes"),
    ],
)
def test_a_path_that_leads_elsewhere_is_refused(path, why):
    with pytest.raises(ValueError, match=why):
        files.path_parts(path)


def test_files_arrive_as_they_are_and_can_be_fetched_again(work):
    given = {"a.txt": b"one\n", "deep/er/b.bin": bytes(range(256)) * 9000, "empty": b"", "./ä": b"\xff"}
    put(given)
    assert (work / "deep" / "er" / "b.bin").read_bytes() == given["deep/er/b.bin"]
    assert sorted(path.name for path in work.iterdir()) == ["a.txt", "deep", "empty", "ä"]
    assert fetch(*given, limit_bytes=10_000_000) == (given, "")


def test_a_file_in_the_path_of_another_is_an_error(work):
    with pytest.raises(OSError, match="a"):
        put({"a": b"", "a/b": b""})


def test_a_missing_file_is_absent(work):
    put({"here": b"1"})
    assert fetch("here", "missing", "no/such/directory", "here") == ({"here": b"1"}, "")


def test_links_and_special_files_are_named_and_not_read(work):
    put({"good": b"1", "directory/inner": b"2"})
    os.symlink("../secret", "link")
    os.symlink("..", "parent")
    os.symlink("directory", "alias")
    os.symlink("loop", "loop")
    os.mkfifo("pipe")
    fetched, remarks = fetch("link", "parent/secret", "alias/inner", "loop", "pipe", "directory", "good")
    assert fetched == {"good": b"1"}
    assert remarks == (
        "not fetched: link: not a regular file; parent/secret: Not a directory; alias/inner: Not a directory; "
        "loop: not a regular file; pipe: not a regular file; directory: not a regular file"
    )


def test_what_does_not_fit_is_left_out_and_the_rest_is_fetched(work):
    put({"a": b"1" * 60, "b": b"2" * 60, "c": b"3" * 40})
    os.truncate(os.open("giant", os.O_CREAT | os.O_WRONLY), 1 << 40)
    fetched, remarks = fetch("giant", "a", "b", "c", limit_bytes=100)
    assert fetched == {"a": b"1" * 60, "c": b"3" * 40}
    assert "giant: 1099511627776 bytes" in remarks and "b: 60 bytes" in remarks and "limit of 100" in remarks


@pytest.mark.parametrize("written_bytes", [0, 10, 17, 25])
def test_a_collection_that_was_cut_short_gives_nothing(work, written_bytes):
    put({"a": b"1234", "b": b"5678"})
    collection = files.Collection(["a", "b"])
    wanted, collected = collection.fds
    files.collect(wanted, 100, collected)
    os.truncate(collected, written_bytes)
    assert collection.finish() == ({}, "the files could not be fetched")


def test_no_descriptor_stays_open(work):
    gc.collect()  # what another test left may be closed at any time
    before = set(os.listdir("/proc/self/fd"))
    put({"a": b"1", "b/c": b"2"})
    fetch("a", "b/c", "b", "missing/x")
    assert set(os.listdir("/proc/self/fd")) <= before


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


def test_a_request_carries_decoded_files_without_those_that_are_null():
    body = RunCodeBody(code="", files={"a": encoded(b"\0\1"), "b": None}, fetch_files=["c"])
    request = body.request()
    assert (request.files, list(request.fetch_files)) == ({"a": b"\0\1"}, ["c"])


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"files": {"../a": ""}}, "'../a' is refused"),
        ({"fetch_files": ["/etc/shadow"]}, "'/etc/shadow' is refused"),
        ({"files": {"a": "abc"}}, "content of 'a' is not base64"),
        ({"files": {"a": "ä"}}, "content of 'a' is not base64"),
        ({"files": {str(number): "" for number in range(1025)}}, "files: there are 1025; at most 1024"),
        ({"fetch_files": ["a"] * 1025}, "fetch_files: there are 1025; at most 1024"),
    ],
)
def test_a_request_that_cannot_be_carried_out_says_why(fields, why):
    with pytest.raises(ValueError, match=why):
        RunCodeBody(code="", **fields).request()


def test_an_answer_holds_the_files_in_base64_and_what_is_missing():
    result = ExecutionResult(status=Status.OK, exit_code=0, message="not fetched: b: x", files={"a": b"\0\1"})
    answer = fusion_shape(result)
    assert (answer["status"], answer["message"]) == ("Success", "not fetched: b: x")
    assert answer["files"] == {"a": encoded(b"\0\1")}
