"""From the command to the first answer on /readyz: on an empty data folder, and on one that exists."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import time

from bench.measure import Findings, at_most
from bench.plan import Plan
from bench.server import BenchServer, scratch

POLL_SECONDS = 0.005
DEADLINE_SECONDS = 30.0
# Lines of the import profile shown.
SHOWN = 10
MODULES = "tidings.server.cli, tidings.server.commands.serve, tidings.server.app, tidings.server.rest, uvloop"
_IMPORT = re.compile(r"^import time:\s+(\d+) \|\s+(\d+) \|(\s+)(\S+)$", re.MULTILINE)


async def run(plan: Plan, findings: Findings) -> None:
    for _ in range(max(3, plan.runs)):
        with scratch() as folder:
            for which in ("first start", "existing data"):
                server = BenchServer(folder / "server")
                try:
                    began = time.perf_counter()
                    server.launch()
                    await answer(server)
                    findings.add(f"{which}: until it answers", time.perf_counter() - began, "s", at_most(1.5))
                    findings.add(f"{which}: CPU until then", server.cpu_time().total_s, "s")
                    await server.terminate()
                finally:
                    await server.close()
    findings.note("Slowest imports, ms with what they import: " + ", ".join(slowest_imports()))
    loaded, compiled = modules()
    findings.note(f"{loaded} modules are loaded, of which {loaded - compiled} have no bytecode and are compiled anew")


async def answer(server: BenchServer) -> None:
    """Wait for a 200 from /readyz, asking again and again. Raises RuntimeError."""
    deadline = time.perf_counter() + DEADLINE_SECONDS
    while time.perf_counter() < deadline and server.running:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        except ConnectionError:
            await asyncio.sleep(POLL_SECONDS)
            continue
        try:
            writer.write(b"GET /readyz HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
            if (await reader.readline()).split()[1:2] == [b"200"]:
                return
        except ConnectionError:
            pass
        finally:
            writer.close()
        await asyncio.sleep(POLL_SECONDS)
    raise RuntimeError(f"no answer\n{server.tail()}")


def slowest_imports() -> list[str]:
    """The imports of the server's own modules' dependencies that take longest, by `python -X importtime`."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", f"import {MODULES}"], capture_output=True, text=True, check=True
    )
    found = {name: int(total) / 1000 for _, total, _, name in _IMPORT.findall(done.stderr)}
    # Packages, without their parts: a part's time is in its package's.
    packages = {name: ms for name, ms in found.items() if "." not in name}
    everything = sorted(packages.items(), key=lambda item: -item[1])[:SHOWN]
    return [f"{name} {ms:.0f}" for name, ms in everything]


def modules() -> tuple[int, int]:
    """How many Python modules these imports load, and for how many of them Python finds bytecode that is up to date."""
    program = f"""
import {MODULES}, os, sys
def is_compiled(source, cached):
    try:
        with open(cached, "rb") as file:
            return int.from_bytes(file.read(12)[8:], "little") == int(os.stat(source).st_mtime) & 0xFFFFFFFF
    except FileNotFoundError:
        return False
specs = [spec for one in list(sys.modules.values()) if (spec := getattr(one, "__spec__", None)) and spec.cached]
print(len(specs), sum(is_compiled(spec.origin, spec.cached) for spec in specs))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded, compiled = done.stdout.split()
    return int(loaded), int(compiled)
