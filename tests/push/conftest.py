"""Providers over the network to stubs on loopback, with a clock that stands still until told."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tidings.server.clock import ManualClock
from tidings.server.domain.netguard import OutboundPolicy
from tidings.server.push.base import Notification, Provider
from tidings.server.push.factory import PushProviders
from tidings.testing.push_stubs import ApnsStub, FcmStub, HookStub, WebPushStub
from tidings.testing.push_stubs.apns import KEY_ID, TEAM, TOPIC
from tidings.wire.push import ApnsConfig, FcmConfig, HttpConfig, ServiceAccount, WebPushConfig

# What the operator of a test lists: this machine.
POLICY = OutboundPolicy(networks=("127.0.0.1/32",))
FCM_TOKEN = "fcm-registration-token:" + "a" * 120
APNS_TOKEN = "0a" * 32
VAPID_KEY = "q1dXpw3UpT5VOmu_cf_v6ih07Aems3njxI-JWgLcM94"  # of RFC 8291, appendix A: any 32 bytes do
HELLO = Notification(id="p1", title="Clinic", body="You have a new message", data={"channel": "ch_1", "message": "m_1"})


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def fcm(clock: ManualClock) -> AsyncIterator[FcmStub]:
    async with FcmStub(now=lambda: clock.now_ms() / 1000) as stub:
        yield stub


@pytest.fixture
async def apns(clock: ManualClock, tmp_path: Path) -> AsyncIterator[ApnsStub]:
    async with ApnsStub(tmp_path, now=lambda: clock.now_ms() / 1000) as stub:
        yield stub


@pytest.fixture
async def webpush(clock: ManualClock) -> AsyncIterator[WebPushStub]:
    async with WebPushStub(now=lambda: clock.now_ms() / 1000) as stub:
        yield stub


@pytest.fixture
async def hook(clock: ManualClock) -> AsyncIterator[HookStub]:
    async with HookStub(now=lambda: clock.now_ms() / 1000) as stub:
        yield stub


@pytest.fixture
async def providers(clock: ManualClock) -> AsyncIterator[PushProviders]:
    made = PushProviders(POLICY, clock)
    yield made
    await made.aclose()


@pytest.fixture
def fcm_config(fcm: FcmStub) -> FcmConfig:
    account = {k: v for k, v in fcm.service_account().items() if k in ServiceAccount.__struct_fields__}
    return FcmConfig(service_account=ServiceAccount(**account), endpoint=fcm.url)


@pytest.fixture
def fcm_provider(fcm_config: FcmConfig, providers: PushProviders) -> Provider:
    return providers.open(providers.check(fcm_config))


@pytest.fixture
def apns_config(apns: ApnsStub) -> ApnsConfig:
    key = apns.private_key()
    return ApnsConfig(team_id=TEAM, key_id=KEY_ID, topic=TOPIC, private_key=key, endpoint=apns.url)


@pytest.fixture
async def apns_provider(apns_config: ApnsConfig, apns: ApnsStub, clock: ManualClock) -> AsyncIterator[Provider]:
    made = PushProviders(POLICY, clock, trusted=str(apns.certificate))
    yield made.open(made.check(apns_config))
    await made.aclose()


@pytest.fixture
def webpush_config() -> WebPushConfig:
    return WebPushConfig(subject="mailto:push@clinic.example", private_key=VAPID_KEY)


@pytest.fixture
def webpush_provider(webpush_config: WebPushConfig, providers: PushProviders) -> Provider:
    return providers.open(providers.check(webpush_config))


@pytest.fixture
def hook_config(hook: HookStub) -> HttpConfig:
    return HttpConfig(url=f"{hook.url}/push", secrets=[hook.secret])


@pytest.fixture
def hook_provider(hook_config: HttpConfig, providers: PushProviders) -> Provider:
    return providers.open(providers.check(hook_config))
