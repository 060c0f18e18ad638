"""What an operator may write, and what the server says when it is wrong."""

import itertools
from collections.abc import Mapping
from pathlib import Path

import pytest

from tidings.server.config import SETTINGS, Config, ConfigError, is_loopback, load_config, reference


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(file: str | None = None, env: Mapping[str, str] | None = None, **overrides: object) -> Config:
    path = None
    if file is not None:
        path = Path("tidings.toml")
        path.write_text(file)
    return load_config(file=path, environ=env or {}, overrides=overrides)


def complaint(file: str | None = None, env: Mapping[str, str] | None = None, **overrides: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load(file, env, **overrides)
    return str(caught.value)


def test_nothing_needs_to_be_set() -> None:
    config = load()
    assert (config.host, config.port, config.url) == ("127.0.0.1", 8080, "http://127.0.0.1:8080")
    assert config.store_synchronous == "full"
    assert config.key_file == Path("data/root.key")


def test_each_place_overrides_the_one_before() -> None:
    file, env = "port = 1001\nstore_readers = 2\nrest_burst = 7", {"TIDINGS_PORT": "1002", "TIDINGS_STORE_READERS": "3"}
    config = load(file, env, port=1003)
    assert (config.port, config.store_readers, config.rest_burst) == (1003, 3, 7)


def test_an_option_that_was_not_given_overrides_nothing() -> None:
    assert load(env={"TIDINGS_PORT": "1002"}, port=None).port == 1002


def test_the_file_is_found_in_the_working_directory_or_by_name(tmp_path: Path) -> None:
    Path("tidings.toml").write_text("port = 1001")
    assert load_config(environ={}).port == 1001
    (tmp_path / "other.toml").write_text("port = 1002")
    assert load_config(environ={"TIDINGS_CONFIG": str(tmp_path / "other.toml")}).port == 1002


def test_a_named_file_that_is_missing_is_an_error() -> None:
    assert "gone.toml" in complaint(env={"TIDINGS_CONFIG": "gone.toml"})


def test_paths_in_a_file_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/tidings.toml").write_text('data_dir = "d"')
    config = load_config(file=tmp_path / "etc/tidings.toml", environ={})
    assert config.data_dir == tmp_path / "etc/d"
    assert config.key_file == tmp_path / "etc/d/root.key"


@pytest.mark.parametrize("setting", [s for s in SETTINGS if s.kind in (int, float)], ids=lambda s: s.name)
def test_every_number_has_a_bound_and_keeps_it(setting: object) -> None:
    s = next(s for s in SETTINGS if s is setting)
    assert s.low is not None
    assert s.high is not None
    assert s.low <= s.default <= s.high
    for raw in (s.low - 1, s.high + 1, "many", "nan", "", True):
        said = complaint(**{s.name: raw})
        assert s.name in said
        assert s.accepts in said
    for raw in (s.low - 1, s.high + 1):
        said = complaint(env={s.env: str(raw)})
        assert s.env in said


def test_every_setting_has_help_a_reason_and_a_place_in_the_reference() -> None:
    page = reference()
    for setting in SETTINGS:
        assert setting.help.endswith(".")
        assert setting.why.endswith(".")
        assert f"## `{setting.name}`" in page
        assert setting.env in page


def test_the_reference_page_is_up_to_date() -> None:
    page = Path(__file__).parents[2] / "docs/reference/configuration.md"
    assert page.read_text() == reference(), "run: make docs"


def test_every_default_passes_through_text_and_back() -> None:
    for setting in SETTINGS:
        default = getattr(Config(), setting.name)
        if default is None or default == ():
            continue
        text = ",".join(default) if isinstance(default, tuple) else str(default)
        config = load(env={setting.env: text}) if default != "" else Config()
        assert getattr(config, setting.name) == default


def test_an_unknown_setting_is_refused_with_a_suggestion_and_its_line() -> None:
    said = complaint("port = 1\n\nheartbeat_second = 3")
    assert "heartbeat_second (tidings.toml, line 3)" in said
    assert "did you mean heartbeat_seconds?" in said
    assert "did you mean TIDINGS_STORE_READERS?" in complaint(env={"TIDINGS_STORE_READER": "3"})


def test_everything_wrong_is_said_at_once() -> None:
    said = complaint('port = "x"\nrest_burst = 0', {"TIDINGS_LOG_LEVEL": "warn"})
    assert "port (tidings.toml, line 1)" in said
    assert "rest_burst (tidings.toml, line 2)" in said
    assert "did you mean warning?" in said


def test_the_value_of_an_unknown_variable_is_never_repeated() -> None:
    assert "hunter2" not in complaint(env={"TIDINGS_PASSWORD": "hunter2"})
    assert "hunter2" not in complaint(public_url="https://me:hunter2@example.com")
    assert "hunter2" not in complaint(bus="nats://me:hunter2@nats-1:4222")


def test_what_kubernetes_puts_into_the_environment_is_not_ours() -> None:
    env = {"TIDINGS_PORT": "tcp://10.0.0.1:80", "TIDINGS_PORT_80_TCP_ADDR": "10.0.0.1", "TIDINGS_SERVICE_HOST": "x"}
    assert load(env=env).port == 8080


@pytest.mark.parametrize(("text", "size"), [("64KiB", 65536), ("1 MiB", 1 << 20), ("70000", 70000), ("100kb", 100_000)])
def test_sizes_may_carry_a_unit(text: str, size: int) -> None:
    assert load(env={"TIDINGS_FRAME_BYTES_MAX": text}).frame_bytes_max == size


@pytest.mark.parametrize(
    ("word", "value"), [("true", True), ("ON", True), ("1", True), ("no", False), ("0", False), ("False", False)]
)
def test_booleans_are_words(word: str, value: bool) -> None:
    assert load(env={"TIDINGS_TRACING": word}).tracing is value


@pytest.mark.parametrize("synchronous", ["normal", "off"])
def test_an_unsafe_store_must_be_asked_for_by_name(synchronous: str) -> None:
    said = complaint(store_synchronous=synchronous)
    assert "store_synchronous" in said
    assert "allow_unsafe_store" in said
    assert load(store_synchronous=synchronous, allow_unsafe_store=True).store_synchronous == synchronous


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "chat.example.com"])
def test_listening_beyond_loopback_needs_tls_or_a_proxy(host: str, tmp_path: Path) -> None:
    said = complaint(host=host)
    assert "host" in said
    assert "tls_cert" in said
    assert load(host=host, behind_proxy=True).host == host
    for name in ("cert", "key"):
        (tmp_path / name).write_text("pem")
    assert load(host=host, tls_cert="cert", tls_key="key").tls


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_neither(host: str) -> None:
    assert is_loopback(host)
    assert load(host=host).host == host


CONTRADICTIONS: list[tuple[str, dict[str, object]]] = [
    ("tls_key", {"tls_cert": "tidings.toml"}),
    ("tls_cert", {"tls_cert": "missing.pem", "tls_key": "tidings.toml"}),
    ("development", {"development": True, "host": "::", "behind_proxy": True}),
    ("trusted_proxies", {"trusted_proxies": "10.0.0.0/8"}),
    ("trusted_proxies", {"trusted_proxies": "ten", "behind_proxy": True}),
    ("public_url", {"public_url": "chat.example.com"}),
    ("public_url", {"public_url": "https://chat.example.com/base"}),
    ("public_url", {"public_url": "https://chat.example.com:99999"}),
    ("bus", {"bus": "nats-1:4222"}),
    ("bus", {"bus": "nats://nats-1:4222,http://nats-2"}),
    ("bus", {"bus": "nats://nats-1:99999"}),
    ("bus", {"bus": ","}),
    ("bus_credentials", {"bus_credentials": "tidings.toml"}),
    ("bus_credentials", {"bus": "nats://nats-1", "bus_credentials": "missing"}),
    ("bus_ca", {"bus": "nats://nats-1", "bus_ca": "missing"}),
    ("cluster", {"cluster": "my.cluster"}),
    ("cluster", {"cluster": ">"}),
    ("node", {"node": "node-1"}),
    ("node", {"node": "n" * 33}),
    ("jwks_allow_hosts", {"jwks_allow_hosts": "https://idp"}),
    ("connections_per_address", {"connections_per_address": 11, "connections_max": 10}),
    ("outbox_bytes_max", {"outbox_bytes_max": "64KiB", "frame_bytes_max": "65KiB"}),
    ("data_dir", {"data_dir": "tidings.toml"}),
    ("key_file", {"key_file": "/"}),
]


@pytest.mark.parametrize(("name", "given"), CONTRADICTIONS, ids=itertools.count())
def test_values_that_contradict_each_other_are_refused_by_name(name: str, given: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        load("", **given)
    assert [problem.setting for problem in caught.value.problems] == [name]


def test_the_bus_is_local_or_a_list_of_servers() -> None:
    assert Config().bus_servers == ()
    assert load(bus="nats://nats-1, tls://10.0.0.7:4223").bus_servers == ("nats://nats-1", "tls://10.0.0.7:4223")
    Path("nats.creds").write_text("token")
    assert load(bus="nats://nats-1", bus_credentials="nats.creds").bus_credentials == Path("nats.creds")


def test_a_list_may_be_written_with_commas_or_as_toml() -> None:
    env = {"TIDINGS_TRUSTED_PROXIES": "10.0.0.0/8, ::1", "TIDINGS_BEHIND_PROXY": "yes"}
    assert load(env=env).trusted_proxies == ("10.0.0.0/8", "::1")
    assert load('behind_proxy = true\ntrusted_proxies = ["::1"]').trusted_proxies == ("::1",)


@pytest.mark.parametrize("text", ["port = ", "[server]\nport = 1", "\udcff"])
def test_a_file_that_cannot_be_used_is_named(text: str) -> None:
    Path("tidings.toml").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=r"tidings\.toml"):
        load_config(environ={})


def test_several_workers_need_a_store_and_a_bus_that_processes_can_share() -> None:
    shared = {"store": "postgres://t@db/t", "bus": "nats://n:4222"}
    for missing in ({}, {"bus": shared["bus"]}, {"store": shared["store"]}):
        said = complaint(workers=2, **missing)
        assert "store = postgres://…" in said
        assert "bus = nats://…" in said
    assert load(workers=2, **shared).workers == 2
    assert load(workers=1).workers == 1


def test_each_worker_is_a_node_with_a_name_and_a_port_of_its_own() -> None:
    config = load(workers=3, store="postgres://t@db/t", bus="nats://n:4222", node="web", worker_port=9000)
    each = [config.of_worker(number, 8080) for number in (1, 2, 3)]
    assert [(one.node, one.worker_port, one.port) for one in each] == [
        ("webw1", 9000, 8080),
        ("webw2", 9001, 8080),
        ("webw3", 9002, 8080),
    ]
    assert load(workers=3, store="postgres://t@db/t", bus="nats://n:4222").of_worker(2, 1).node == ""
    assert "worker_port" in complaint(worker_port=8080)
    assert "worker_port" in complaint(workers=3, store="postgres://t@db/t", bus="nats://n:4222", worker_port=65534)
    assert "node" in complaint(workers=3, store="postgres://t@db/t", bus="nats://n:4222", node="n" * 30)
