"""The server harness with a real, tiny HTTP server as its child: nothing is left behind, whatever happens."""

import asyncio
import gc
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tidings.testing.process import ServerFailed, ServerProcess

PATIENCE_S = 10.0

# Ready at the second question; /spin burns CPU in a thread; SIGTERM ends it with code 3;
# it counts its starts in its data folder.
SERVER = textwrap.dedent("""
    import http.server, os, pathlib, signal, subprocess, sys, threading, time
    port, data = int(sys.argv[1]), pathlib.Path(sys.argv[2])
    starts = data / "starts"
    starts.write_text(str(int(starts.read_text()) + 1 if starts.exists() else 1))
    asked = 0
    def spin():
        until = time.thread_time() + 0.2
        while time.thread_time() < until:
            pass
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            global asked
            asked += 1
            if self.path == "/spin":
                thread = threading.Thread(target=spin); thread.start(); thread.join()
            if self.path == "/child":
                child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
                body = str(child.pid).encode()
            else:
                body = starts.read_bytes()
            self.send_response(503 if self.path == "/readyz" and asked == 1 else 200)
            self.end_headers()
            self.wfile.write(body)
        def log_message(self, *words):
            pass
    def stop(*_):
        print("stopping", flush=True)
        os._exit(3)
    signal.signal(signal.SIGTERM, signal.SIG_IGN if os.environ.get("STUBBORN") else stop)
    print("says hello", os.environ.get("GREETING", ""), flush=True)
    http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
""")
COMMAND = (sys.executable, "-c", SERVER, "{port}", "{data}")


def make(tmp_path: Path, **more: object) -> ServerProcess:
    return ServerProcess(tmp_path / "data", command=COMMAND, **more)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


async def wait_until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.01)  # why: polls a condition


async def ask(server: ServerProcess, path: str = "/") -> str:
    async with httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=PATIENCE_S) as client:
        return (await client.get(path)).text


async def test_a_server_is_started_found_ready_and_gone_at_the_end(tmp_path: Path) -> None:
    async with make(tmp_path, environment={"GREETING": "to all"}) as server:
        assert server.running
        assert await ask(server) == "1"
        pid = server.pid
        assert "says hello to all" in server.stdout_path.read_text()
    assert not is_alive(pid)
    assert server.exit_code == -signal.SIGKILL


async def test_a_killed_server_comes_back_on_the_same_port_with_its_data(tmp_path: Path) -> None:
    async with make(tmp_path) as server:
        port, pid = server.port, server.pid
        server.kill9()
        assert await server.wait_exit() == -signal.SIGKILL
        assert not server.running
        with pytest.raises(httpx.ConnectError):
            await ask(server)
        assert await server.restart() > 0
        assert (server.port, server.starts) == (port, 2)
        assert server.pid != pid
        assert await ask(server) == "2"
        await server.restart(graceful=True)
        assert server.stdout_path.read_text().count("stopping") == 1


async def test_a_graceful_stop_gives_the_exit_code(tmp_path: Path) -> None:
    async with make(tmp_path) as server:
        assert await server.terminate() == 3


async def test_a_server_that_will_not_stop_is_killed_and_reported(tmp_path: Path) -> None:
    async with make(tmp_path, environment={"STUBBORN": "1"}) as server:
        with pytest.raises(ServerFailed, match="did not stop"):
            await server.terminate(timeout_s=0.2)
        assert not server.running


async def test_a_server_that_ends_before_it_is_ready_is_reported_with_its_words(tmp_path: Path) -> None:
    command = (sys.executable, "-c", "import sys; sys.exit('no such setting: volume')")
    with pytest.raises(ServerFailed, match="no such setting: volume"):
        async with ServerProcess(tmp_path / "data", command=command):
            pass


async def test_a_server_that_never_gets_ready_is_reported_and_killed(tmp_path: Path) -> None:
    command = (sys.executable, "-c", "import time; time.sleep(600)")
    server = ServerProcess(tmp_path / "data", command=command, ready_timeout_s=0.3)
    with pytest.raises(ServerFailed, match="was not ready"):
        async with server:
            pass
    assert not server.running


async def test_a_frozen_server_answers_when_it_is_let_go(tmp_path: Path) -> None:
    async with make(tmp_path) as server:
        server.sigstop()
        asking = asyncio.create_task(ask(server))
        done, _ = await asyncio.wait([asking], timeout=0.2)
        assert not done
        server.sigcont()
        assert await asking == "1"


async def test_cpu_time_counts_all_threads_and_ended_ones(tmp_path: Path) -> None:
    async with make(tmp_path) as server:
        before = server.cpu_time()
        await ask(server, "/spin")
        spent = server.cpu_time() - before
        assert 0.2 <= spent.total_s < 1
        assert spent.user_s + spent.system_s == pytest.approx(spent.total_s, abs=0.03)


async def test_memory_is_what_a_python_process_takes(tmp_path: Path) -> None:
    async with make(tmp_path) as server:
        memory = server.memory()
        assert 4 << 20 < memory.private <= memory.rss < 200 << 20
        assert memory.private <= memory.pss <= memory.rss
        server.kill9()
        await server.wait_exit()
        with pytest.raises(ProcessLookupError):
            server.memory()
        with pytest.raises(ProcessLookupError):
            server.cpu_time()


@pytest.mark.parametrize("how", ["kill9", "terminate"])
async def test_what_the_server_started_goes_with_it(tmp_path: Path, how: str) -> None:
    async with make(tmp_path) as server:
        child = int(await ask(server, "/child"))
        assert is_alive(child)
        if how == "kill9":
            server.kill9()
        else:
            await server.terminate()
        await wait_until(lambda: not is_alive(child))


async def test_what_a_server_started_goes_though_it_had_ended_before_anybody_looked(tmp_path: Path) -> None:
    async with make(tmp_path) as server:
        child, leader = int(await ask(server, "/child")), server.pid
        os.kill(leader, signal.SIGKILL)
        # Ended, and not yet reaped: from the reaping on, nothing could be sent to its group.
        os.waitid(os.P_PID, leader, os.WEXITED | os.WNOWAIT)
        assert await server.wait_exit() == -signal.SIGKILL
        await wait_until(lambda: not is_alive(child))


async def test_a_forgotten_server_is_killed_with_its_object(tmp_path: Path) -> None:
    server = make(tmp_path)
    await server.start()
    pid = server.pid
    # The Popen is held back only to reap the process; the harness is what is forgotten.
    process = server._process
    assert process is not None
    server._reserved.close()
    del server
    gc.collect()
    await wait_until(lambda: not is_alive(pid))
    process.wait()


async def test_a_server_does_not_outlive_a_killed_test_program(tmp_path: Path) -> None:
    program = textwrap.dedent(f"""
        import asyncio, pathlib, sys
        from tidings.testing.process import ServerProcess
        async def main():
            async with ServerProcess(pathlib.Path({str(tmp_path / "data")!r}), command={COMMAND!r}) as server:
                print(server.pid, flush=True)
                await asyncio.sleep(600)
        asyncio.run(main())
    """)
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as starter:
        assert starter.stdout is not None
        pid = int(await asyncio.to_thread(starter.stdout.readline))
        assert is_alive(pid)
        os.kill(starter.pid, signal.SIGKILL)
        await wait_until(lambda: not is_alive(pid))


async def test_starting_twice_is_refused_and_nothing_started_is_said(tmp_path: Path) -> None:
    server = make(tmp_path)
    with pytest.raises(RuntimeError, match="not started"):
        _ = server.pid
    async with server:
        with pytest.raises(RuntimeError, match="runs already"):
            server.launch()


async def test_starting_reports_how_long_it_took(tmp_path: Path) -> None:
    server = make(tmp_path)
    began = time.monotonic()
    took = await server.start()
    assert 0 < took <= time.monotonic() - began
    await server.close()
