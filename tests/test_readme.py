"""The first message in five minutes: the README's commands and program, as they stand there, against a real server."""

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path

from tidings.testing.process import ServerProcess

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
# Longest that anything awaited here takes on a busy machine, seconds.
PATIENCE = 30


def block(language: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert found
    return found[1]


async def run(*command: str) -> str:
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    async with asyncio.timeout(PATIENCE):
        output, _ = await process.communicate()
    assert process.returncode == 0
    return output.decode()


async def test_the_first_message_arrives_as_the_readme_says(tmp_path: Path) -> None:
    async with ServerProcess(tmp_path / "data") as server:
        key = re.search(r"tk_\w+_[\w-]+", server.tail())
        assert key, server.tail()
        script = block("sh").replace("tk_…", key[0]).replace("http://127.0.0.1:8080", server.url)
        answers = await run("sh", "-ec", script)
        assert '"code"' not in answers
        token = json.loads(answers[answers.rindex('{"token"') :])["token"]

        program = block("python").replace("http://127.0.0.1:8080", server.url)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-u", "-c", program, token, stdout=subprocess.PIPE
        )
        try:
            assert process.stdout is not None
            async with asyncio.timeout(PATIENCE):
                lines = [(await process.stdout.readline()).decode().strip() for _ in range(2)]
        finally:
            process.kill()
            await process.wait()
        assert lines == ["alice says Hello, Bob!", "bob says Hello, Alice!"]
