"""The JavaScript packages: types, their own tests under Node, and how large they are."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

import pytest

# `make mutants` names another one.
SDK = Path(os.environ.get("MUTANTS_SDK", Path(__file__).parents[2] / "sdk"))
SECONDS = 110


async def run(*command: str) -> tuple[int, str]:
    """A command in `sdk/`; its status and what it said."""
    process = await asyncio.create_subprocess_exec(
        *command, cwd=SDK, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        said, _ = await asyncio.wait_for(process.communicate(), SECONDS)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode, said.decode()


@pytest.fixture(autouse=True)
def node() -> None:
    if shutil.which("node") is None or not (SDK / "node_modules").is_dir():
        pytest.skip("Node is not installed: `make setup` says what is missing")


@pytest.mark.parametrize("package", ["js", "components", "react"])
async def test_the_types_are_right(package: str) -> None:
    status, said = await run("node_modules/.bin/tsc", "-p", package)
    assert status == 0, said


async def test_the_tests_under_node_pass() -> None:
    files = sorted(str(path.relative_to(SDK)) for path in SDK.glob("*/test/*.test.js"))
    status, said = await run("node", "--test", *files)
    assert status == 0, said
    assert "# skipped 0" in said


def test_the_lock_file_names_no_place_but_the_registry() -> None:
    assert "http" not in (SDK / "package-lock.json").read_text().replace("https://registry.npmjs.org/", "").replace(
        "https://", "funding "
    )
