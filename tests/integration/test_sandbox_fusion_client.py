"""SandboxFusion's own client, as released, against our executor: programs written for that one work unchanged."""

import asyncio
import base64

import pytest
import sandbox_fusion as fusion
from sandbox_server import executor_with

PYTHON_WORDS = fusion.SummaryMapping(Success="passed", Failed="failed", RunTimeout="timed out")


@pytest.fixture(scope="module")
def endpoint():
    with executor_with("auto", "--workers", "2", "--preload", "") as executor:
        yield executor.url


@pytest.mark.parametrize(
    ("code", "summary", "return_code", "stdout"),
    [
        ("print(input().upper())", "passed", 0, "HI\n"),
        ("print(1)\n1 / 0", "failed", 1, "1\n"),
        ("import sys; sys.exit(3)", "failed", 3, ""),
        ("print('before', flush=True)\nwhile True: pass", "timed out", None, "before\n"),
    ],
)
def test_it_understands_how_a_program_ended(endpoint, code, summary, return_code, stdout):
    for run_timeout in (0.5, 2.0, 8.0) if summary == "timed out" else (20.0,):
        request = fusion.RunCodeRequest(code=code, language="python", stdin="hi\n", run_timeout=run_timeout)
        answer = fusion.run_code(request, endpoint=endpoint, max_attempts=1)
        if answer.run_result.stdout:  # a busy machine may need more time until it prints
            break
    assert fusion.summary_run_code_result(answer, PYTHON_WORDS) == summary
    assert (answer.run_result.return_code, answer.run_result.stdout) == (return_code, stdout)


def test_what_cannot_be_run_raises_and_says_why(endpoint):
    request = fusion.RunCodeRequest(code="int main() {}", language="cpp")
    with pytest.raises(Exception, match="'cpp' is not supported"):
        fusion.run_code(request, endpoint=endpoint, max_attempts=1)


def test_files_are_given_and_fetched(endpoint):
    request = fusion.RunCodeRequest(
        code="import tools; open('sub/out.txt', 'w').write(tools.double(open('sub/in.txt').read()))",
        language="python",
        files={
            "tools.py": base64.b64encode(b"def double(text): return 2 * text").decode(),
            "sub/in.txt": base64.b64encode("grün".encode()).decode(),
            "none": None,
        },
        fetch_files=["sub/out.txt", "none"],
    )
    answer = fusion.run_code(request, endpoint=endpoint, max_attempts=1)
    assert answer.status is fusion.RunStatus.Success, answer
    assert {path: base64.b64decode(content).decode() for path, content in answer.files.items()} == {
        "sub/out.txt": "grüngrün"
    }


def test_a_file_outside_the_working_directory_raises_and_says_why(endpoint):
    request = fusion.RunCodeRequest(code="", language="python", fetch_files=["../../etc/passwd"])
    with pytest.raises(Exception, match=r"'\.\./\.\./etc/passwd' is refused"):
        fusion.run_code(request, endpoint=endpoint, max_attempts=1)


def test_many_calls_at_once_each_get_their_own_answer(endpoint):
    async def ask(number: int) -> str:
        request = fusion.RunCodeRequest(code=f"print({number} ** 2)", language="python")
        answer = await fusion.run_code_async(request, endpoint=endpoint, max_attempts=1)
        return answer.run_result.stdout

    async def ask_all() -> list[str]:
        return await asyncio.gather(*map(ask, range(50)))

    assert asyncio.run(ask_all()) == [f"{number**2}\n" for number in range(50)]
