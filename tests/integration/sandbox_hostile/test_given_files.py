"""Files put into a snippet's working directory and fetched from it, through SandboxFusion's protocol."""

import base64

import pytest
from hostile import ALL, on_tiers, undisturbed

on_every_tier = pytest.mark.parametrize("executor", ALL, indirect=True)


def run(executor, code: str, given: dict[str, bytes] | None = None, fetch=(), **options) -> dict:
    """The answer, with the contents of its files decoded."""
    encoded = {path: base64.b64encode(content).decode() for path, content in (given or {}).items()}
    status, answer, _ = executor.post(
        "/run_code", code=code, language="python", files=encoded, fetch_files=list(fetch), **options
    )
    assert status == 200, answer
    answer["files"] = {path: base64.b64decode(content) for path, content in answer["files"].items()}
    return answer


USES = """
import os, pathlib, helper, package.inner
for path in ("data/in.bin", "helper.py"):
    assert os.stat(path).st_uid == os.getuid()
data = pathlib.Path("data/in.bin").read_bytes()
pathlib.Path("data/in.bin").write_bytes(data[::-1])
os.makedirs("out/deep")
pathlib.Path("out/deep/a.txt").write_text(helper.word() + package.inner.WORD)
os.remove("helper.py")
print(len(data))
"""


@on_every_tier
def test_files_are_there_to_read_import_and_change_and_come_back_as_the_code_left_them(executor):
    data = bytes(range(256)) * 1000
    given = {
        "data/in.bin": data,
        "helper.py": b"def word(): return 'hel'",
        "package/__init__.py": b"",
        "package/inner.py": b"WORD = 'lo'",
    }
    wanted = ["./data/in.bin", "out/deep/a.txt", "package/inner.py", "helper.py", "never"]
    with undisturbed(executor):
        answer = run(executor, USES, given, wanted)
    assert (answer["status"], answer["message"]) == ("Success", ""), answer
    assert answer["run_result"]["stdout"] == "256000\n"
    assert answer["files"] == {
        "./data/in.bin": data[::-1],
        "out/deep/a.txt": b"hello",
        "package/inner.py": b"WORD = 'lo'",
    }
    assert run(executor, "import os; print(os.listdir())")["run_result"]["stdout"] == "[]\n"


@on_every_tier
@pytest.mark.parametrize(
    ("end", "return_code"),
    [
        ("1 / 0", 1),
        ("import os; os._exit(5)", 5),
        ("import os; os.kill(os.getpid(), 9)", -9),
        ("x = bytearray(1 << 33)", 1),
        ("while True: pass", None),
        ("import os, time\nif os.fork() == 0: time.sleep(60)\nos._exit(0)", 0),
        ("import os\nfor fd in range(64):\n  try: os.close(fd)\n  except OSError: pass\nos._exit(7)", 7),
    ],
)
def test_however_the_code_ends_what_it_has_written_is_fetched(executor, end, return_code):
    code = f"open('out', 'w').write('written')\nopen('given', 'a').write('!')\n{end}"
    run_timeout = 2 if return_code is None else 20
    answer = run(executor, code, {"given": b"1"}, ["out", "given"], run_timeout=run_timeout)
    assert answer["run_result"]["return_code"] == return_code, answer
    assert (answer["files"], answer["message"]) == ({"out": b"written", "given": b"1!"}, "")


PLANT = """
import os
os.symlink({secret!r}, "link")
os.symlink({directory!r}, "door")
os.symlink("/proc/self/environ", "environment")
os.symlink("/proc/self/fd/0", "descriptor")
os.symlink("/dev/zero", "zeros")
os.symlink("loop", "loop")
os.mkfifo("pipe")
os.mkdir("directory")
import socket
socket.socket(socket.AF_UNIX).bind("socket")
with open("sparse", "wb") as file:
    file.truncate(60 << 20)
open("closed", "w").write("x")
os.chmod("closed", 0)
print(os.access("closed", os.R_OK))
open("good", "w").write("fine")
"""
PLANTED = [
    "link",
    "door/secret",
    "environment",
    "descriptor",
    "zeros",
    "loop",
    "pipe",
    "directory",
    "socket",
    "sparse",
]


@on_every_tier
def test_nothing_that_a_snippet_plants_is_followed_waited_for_or_too_large(executor, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("s3cr3t")
    code = PLANT.format(secret=str(secret), directory=str(tmp_path))
    with undisturbed(executor):
        answer = run(executor, code, fetch=[*PLANTED, "closed", "good"])
    assert answer["status"] == "Success", answer
    its_own_to_read = answer["run_result"]["stdout"] == "True\n"  # as root, in basic
    assert answer["files"] == {"good": b"fine", **({"closed": b"x"} if its_own_to_read else {})}
    assert ("closed: Permission denied" in answer["message"]) != its_own_to_read
    assert all(f"{name}: " in answer["message"] for name in PLANTED), answer["message"]


SWAPS = """
import os
open("file", "w").write("fine")
if os.fork() == 0:
    os.setsid()
    while True:
        os.symlink({secret!r}, "swapped")
        os.rename("swapped", "file")
        open("swapped", "w").write("fine")
        os.rename("swapped", "file")
"""


@on_every_tier
def test_a_process_left_behind_that_swaps_a_file_for_a_link_is_dead_when_the_file_is_read(executor, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("s3cr3t")
    with undisturbed(executor):
        for _ in range(10):
            answer = run(executor, SWAPS.format(secret=str(secret)), fetch=["file"])
            assert answer["status"] == "Success", answer
            assert answer["files"].get("file", b"fine") in (b"fine", b""), answer


GONE = {
    "removed": "import os; os.rmdir(os.getcwd())",
    "closed": "import os; open('file', 'w').write('x'); os.chmod('.', 0)",
    "replaced": """
import os
work = os.getcwd()
os.rename(work, work + "-away")
os.symlink("/etc", work)
""",
}


@on_tiers("residue elsewhere")
@pytest.mark.parametrize("how", GONE)
def test_a_working_directory_that_is_gone_harms_nobody(executor, how):
    with undisturbed(executor):
        answer = run(executor, GONE[how], fetch=["file", "passwd"])
    assert answer["status"] in ("Success", "Failed"), answer
    assert "file" not in answer["files"]
    assert b"root" not in answer["files"].get("passwd", b"")  # the slot's own tree, without the host's users


@on_every_tier
def test_more_than_the_limit_is_named_and_the_rest_comes(executor):
    code = "for name in 'ab': open(name, 'wb').write(bytes(10 << 20))"
    answer = run(executor, code, fetch=["a", "b"])
    assert answer["files"] == {"a": bytes(10 << 20)}
    assert answer["message"].startswith(
        "not fetched: b: 10485760 bytes, with those before it more than the limit"
    )


@on_every_tier
def test_files_that_cannot_be_put_there_are_refused_and_the_code_does_not_run(executor):
    with undisturbed(executor):
        answer = run(executor, "print(1)", {"a": b"", "a/b": b""}, ["a"])
    assert (answer["status"], answer["run_result"], answer["files"]) == ("SandboxError", None, {})
    assert answer["message"].startswith("the files cannot be put into the working directory: ")
    assert "'a" in answer["message"]


@on_tiers("scratch space")
def test_more_than_the_scratch_directory_holds_is_refused(executor):
    given = {f"{number}/{'d/' * 400}x": b"" for number in range(20)}  # more directories than it has inodes
    with undisturbed(executor):
        answer = run(executor, "print(1)", given)
    assert (answer["status"], answer["run_result"]) == ("SandboxError", None)
    assert "No space left on device" in answer["message"]


@on_every_tier
@pytest.mark.parametrize("path", ["../x", "/tmp/ztrl-x", "a/../../x", "", "a\0b"])
def test_a_path_that_leads_elsewhere_is_refused(executor, path):
    for answer in (run(executor, "print(1)", {path: b""}), run(executor, "print(1)", fetch=[path])):
        assert (answer["status"], answer["run_result"]) == ("SandboxError", None)
        assert repr(path) in answer["message"]


@on_every_tier
def test_code_cannot_pretend_that_it_was_not_begun(executor):
    code = """
import os, sys
for fd in range(3, 256):
    try:
        os.write(fd, b"forged")
    except OSError:
        pass
sys.exit(1)
"""
    with undisturbed(executor):
        answer = run(executor, code, {"a": b"1"}, ["a"])
    assert (answer["status"], answer["run_result"]["return_code"]) == ("Failed", 1)
    assert answer["files"] == {"a": b"1"}


@on_every_tier
def test_calls_that_end_before_their_code_is_taken_leave_nothing_to_the_next(executor):
    with undisturbed(executor):
        for number in range(30):
            late = run(executor, "print('late')", fetch=["late"], run_timeout=1e-9)
            assert late["status"] in ("Failed", "Success"), late
            assert executor.execute(f"print({number})")["stdout"] == f"{number}\n"
