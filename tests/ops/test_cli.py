"""The command line: what a newcomer sees, and how it says what is wrong."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.ops.conftest import Place, start_tidings, tidings
from tidings.testing.process import ServerProcess


async def test_the_first_start_shows_secrets_once_and_commands_that_work(tmp_path: Path) -> None:
    async with ServerProcess(tmp_path / "data", logs=tmp_path / "logs") as server:
        said = server.stderr_path.read_text()
        assert "\x1b" not in said
        key = re.search(r"API key +(tk_\S+)", said)
        secret = re.search(r"Signing secret +(\S+)", said)
        assert key is not None
        assert secret is not None
        steps = said[said.index("  KEY=") : said.index("\n\n", said.index("  KEY="))]
        if shutil.which("curl"):
            done = await asyncio.to_thread(
                subprocess.run, ["sh", "-euc", steps], capture_output=True, text=True, check=True
            )
            assert '"seq":' in done.stdout
            assert '"status":' not in done.stdout
        minted = re.search(r"tidings (token mint .*)", said)
        assert minted is not None
        done_mint = await tidings(*minted[1].split())
        assert (done_mint.status, done_mint.out.count(".")) == (0, 2), done_mint.err
        # In the log, which is JSON line by line, there is neither.
        logged = [line for line in said.splitlines() if line.startswith("{")] + server.stdout_path.read_text().split()
        assert not [line for line in logged if key[1] in line or secret[1] in line]
        await server.restart(graceful=True)
        later = server.stderr_path.read_text()[len(said) :]
        assert key[1] not in later
        assert secret[1] not in later


async def test_one_directory_has_one_server(place: Place) -> None:
    await place.server.start()
    done = await tidings("serve", "--port", "0", "--data-dir", place.data)
    assert done.status == 1
    assert f"in use by a server at {place.server.url}, pid {place.server.pid}" in done.err
    done = await tidings("user", "create", "alice", "--data-dir", place.data)
    assert done.status == 0, done.err
    place.server.kill9()
    await place.server.wait_exit()
    # The lock ends with the process, however it ended.
    await place.server.start()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_stopped_server_ends_cleanly(place: Place, number: signal.Signals) -> None:
    await place.server.start()
    os.kill(place.server.pid, number)
    assert await place.server.wait_exit() == 0
    assert "Traceback" not in place.server.tail()


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["serve", "--port", "99999"], 2, "port (command line, --port): must be an integer from 0 to 65535"),
        (["serve", "--host", "0.0.0.0"], 2, "there is no certificate"),
        (["serve", "--prot", "1"], 2, "--prot"),
        (["nonsense"], 2, "nonsense"),
        (["backup", "x"], 1, "There is no database in"),
        (["restore", "x"], 1, "is not a backup"),
        (["keys", "list"], 1, "There is no database in"),
        (["user", "list"], 1, "There is no app yet"),
    ],
)
async def test_what_is_wrong_is_said_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], status: int, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = await tidings(*arguments)
    assert done.status == status, done.err
    assert says in re.sub(r"[\s│]+", " ", done.err + done.out)
    assert "Traceback" not in done.err


async def test_a_missing_or_open_key_file_is_named(place: Place) -> None:
    key = place.data / "root.key"
    key.chmod(0o644)
    done = await tidings("serve", "--port", "0", "--data-dir", place.data)
    assert (done.status, "chmod 600" in done.err, "Traceback" in done.err) == (1, True, False)
    done = await tidings("doctor", "--json", "--data-dir", place.data)
    assert done.status == 1
    (finding,) = [item for item in json.loads(done.out) if item["name"] == "root key"]
    assert (finding["status"], "chmod 600" in finding["do"]) == ("fail", True)
    key.chmod(0o600)
    key.rename(place.data / "elsewhere")
    done = await tidings("serve", "--port", "0", "--data-dir", place.data)
    assert (done.status, "does not exist" in done.err, key.exists()) == (1, True, False)


async def test_the_doctor_is_content_with_a_good_directory(place: Place) -> None:
    done = await tidings("doctor", "--port", "0", "--data-dir", place.data)
    assert (done.status, "root key" in done.out) == (0, True), done.out


async def test_every_command_teaches_with_an_example() -> None:
    for command in (
        "serve",
        "demo",
        "cluster",
        "backup",
        "restore",
        "doctor",
        "migrate",
        "keys rotate-root",
        "keys rotate-app",
        "renew-epochs",
    ):
        done = await tidings(*command.split(), "--help")
        # Its first line is the usage, which is no example.
        assert (done.status, f"tidings {command}" in done.out.partition("\n")[2]) == (0, True), done.out


async def test_the_demo_shows_a_conversation_that_survives_a_cut(tmp_path: Path) -> None:
    done = await tidings("demo", "--fast")
    assert done.status == 0, done.err
    lines = done.out.splitlines()
    assert "\x1b" not in done.out
    assert sum("(missed, caught up)" in line for line in lines) == 3
    assert any("[Ada's phone]" in line and "waits in the outbox" in line for line in lines)
    assert any("is typing" in line for line in lines)
    assert any("read by Dr. Marek" in line for line in lines)
    assert "same 8 messages" in done.out
    assert lines[-1].startswith("Next")


async def test_the_demo_can_be_left_at_any_time() -> None:
    process = await start_tidings("demo")
    assert process.stdout is not None
    async with asyncio.timeout(40):
        while b"is typing" not in await process.stdout.readline():
            pass
    process.send_signal(signal.SIGINT)
    _, err = await asyncio.wait_for(process.communicate(), 20)
    assert (process.returncode, b"Traceback" in err) == (130, False), err.decode()
