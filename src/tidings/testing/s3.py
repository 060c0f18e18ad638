"""A server that speaks S3 as a child process, from the wheel `moto`: no account, no root, nothing leaves the machine.

async with S3Process(tmp_path) as s3:
    await s3.make_bucket("files")
    environment = s3.environment       # for whoever opens s3://files
"""

import sys
from collections.abc import Mapping
from pathlib import Path

import httpx

from tidings.testing.chaos import LOOPBACK
from tidings.testing.process import ServerProcess


class S3Process(ServerProcess):
    """S3 on one loopback port. It keeps everything in memory: a restart empties it."""

    def __init__(self, folder: Path) -> None:
        command = (sys.executable, "-m", "moto.server", "-H", LOOPBACK, "-p", "{port}")
        super().__init__(folder, command=command, ready_path="/moto-api/data.json")

    @property
    def environment(self) -> Mapping[str, str]:
        """What S3's own tools and `blob/objects.py` look for."""
        return {
            "AWS_ENDPOINT_URL": f"http://{LOOPBACK}:{self.port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "not-much-of-a-secret",
            "AWS_REGION": "us-east-1",
        }

    async def make_bucket(self, name: str) -> None:
        """A new, empty bucket."""
        async with httpx.AsyncClient(trust_env=False) as client:
            answer = await client.put(f"{self.environment['AWS_ENDPOINT_URL']}/{name}")
            answer.raise_for_status()
