"""Push providers to test against: FCM, APNs, Web Push and an endpoint of the app's own.

They speak the real protocols, refuse what the real ones refuse (a bad signature, a missing header, a body that does not
decrypt), keep what arrives, and answer what a test tells them to. In the test's own loop:

    async with FcmStub() as fcm:
        provider = …FcmConfig(service_account=fcm.service_account(), endpoint=fcm.url)…
        fcm.answer(token, Answer(404, …))
        assert fcm.received[0].payload["message"]["data"] == …

or as a process of their own, with `python -m tidings.testing.push_stubs` (see `__main__.py`).
"""

from .apns import ApnsStub
from .base import Answer, PushStub, Received
from .fcm import FcmStub
from .hook import HookStub
from .webpush import WebPushStub

__all__ = ["Answer", "ApnsStub", "FcmStub", "HookStub", "PushStub", "Received", "WebPushStub"]
