"""Have Python compile what `tidings serve` loads, by starting a server as far as listening, on data that goes away.

Some first start would compile it anyway; here nobody waits for that one. And where Python is told to write no bytecode
(PYTHONDONTWRITEBYTECODE), every start would compile it again, which is then most of what a start takes.
"""

import io
import sys
import tempfile
from pathlib import Path

sys.dont_write_bytecode = False


async def start(data: Path) -> None:
    """All of a first start but the listening."""
    from tidings.server.app import Server, open_core
    from tidings.server.commands import panels, serve
    from tidings.server.config import Config
    from tidings.server.media import child, film, images, pdf, sound

    config = Config(data_dir=data)
    # The command itself, which is loaded and not called: it would listen.
    assert serve.run
    # What each child loads that looks into a file, which may write nothing itself.
    assert all((child, film, images, pdf, sound))
    async with open_core(config) as core:
        new = await core.services.admin.create_first_app("First app", via="serve")
        Server(config, core)
        panels.welcome(config, new, file=io.StringIO())


if __name__ == "__main__":
    import uvloop

    with tempfile.TemporaryDirectory() as folder:
        uvloop.run(start(Path(folder) / "data"))
