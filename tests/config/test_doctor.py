"""What the doctor finds, each on a machine that has it and on one that has not."""

import datetime
import os
import socket
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tidings.server import doctor
from tidings.server.clock import ManualClock
from tidings.server.doctor import Finding, examine, has_wal_reset_bug, worst


@pytest.mark.parametrize(
    ("version", "affected"),
    [
        ((3, 6, 23), False),
        ((3, 7, 0), True),
        ((3, 40, 1), True),
        ((3, 44, 5), True),
        ((3, 44, 6), False),
        ((3, 45, 0), True),
        ((3, 50, 6), True),
        ((3, 50, 7), False),
        ((3, 51, 2), True),
        ((3, 51, 3), False),
        ((3, 53, 0), False),
    ],
)
def test_the_wal_reset_bug_is_known_by_version(version: tuple[int, int, int], affected: bool) -> None:
    assert has_wal_reset_bug(version) is affected


def test_versions() -> None:
    assert doctor.check_python((3, 10, 9)).status == "fail"
    assert doctor.check_python().status == "ok"
    assert doctor.check_sqlite((3, 34, 1)).status == "fail"
    assert doctor.check_sqlite((3, 40, 1)).status == "warn"
    assert doctor.check_sqlite((3, 51, 3)).status == "ok"


def test_a_data_directory_that_others_can_read_is_a_warning(tmp_path: Path) -> None:
    data = tmp_path / "data"
    assert doctor.check_data_dir(data).status == "ok"
    data.mkdir(mode=0o700)
    assert doctor.check_data_dir(data).status == "ok"
    data.chmod(0o750)
    assert "0750" in doctor.check_data_dir(data).what
    assert doctor.check_data_dir(data).status == "warn"
    (tmp_path / "file").touch()
    assert doctor.check_data_dir(tmp_path / "file").status == "fail"
    assert doctor.check_data_dir(tmp_path / "file/below").status == "fail"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a file of another user")
def test_a_data_directory_of_somebody_else_is_a_warning(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    os.chown(tmp_path, 12345, 12345)
    assert "12345" in doctor.check_data_dir(tmp_path).what


def test_a_root_key_that_others_can_read_is_a_failure(tmp_path: Path) -> None:
    key = tmp_path / "root.key"
    assert doctor.check_key_file(key).status == "ok"
    key.touch(mode=0o600)
    assert doctor.check_key_file(key).status == "ok"
    key.chmod(0o640)
    assert doctor.check_key_file(key) == Finding(
        "fail",
        "root key",
        f"{key} is open to others (mode 0640)",
        f"chmod 600 {key}; if others could read it, rotate it with `tidings keys rotate-root`.",
    )
    assert doctor.check_key_file(tmp_path).status == "fail"


@pytest.mark.parametrize(
    ("total", "free", "status"),
    [(10**12, 5 * 10**11, "ok"), (10**12, 5 * 10**10, "warn"), (10**10, 9 * 10**8, "warn"), (10**12, 10**7, "fail")],
)
def test_little_space_is_a_warning_and_hardly_any_a_failure(tmp_path: Path, total: int, free: int, status: str) -> None:
    assert doctor.check_disk_space(tmp_path / "new", lambda _: (total, total - free, free)).status == status


def test_the_filesystem_is_the_one_of_the_nearest_mount(tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()
    mounts = f"/dev/sda / ext4 rw 0 0\nserver:/x {str(tmp_path / 'a b').replace(' ', chr(92) + '040')} nfs4 rw 0 0\n"
    assert doctor.filesystem_of(tmp_path, mounts) == "ext4"
    assert doctor.filesystem_of(tmp_path / "a b" / "new", mounts) == "nfs4"
    assert doctor.filesystem_of(tmp_path) != ""


@pytest.mark.parametrize(
    ("kind", "status"),
    [("ext4", "ok"), ("nfs4", "warn"), ("fuse.sshfs", "warn"), ("tmpfs", "warn"), ("overlay", "warn")],
)
def test_a_filesystem_that_does_not_keep_things_is_a_warning(kind: str, status: str, tmp_path: Path) -> None:
    assert doctor.check_filesystem(tmp_path, kind).status == status


@pytest.mark.parametrize(("seconds", "status"), [(0.001, "ok"), (0.05, "warn"), (0.000_001, "warn")])
def test_an_fsync_that_is_slow_or_too_fast_is_a_warning(seconds: float, status: str, tmp_path: Path) -> None:
    assert doctor.check_fsync(tmp_path, lambda _: seconds).status == status


def test_fsync_is_measured_and_leaves_nothing_behind(tmp_path: Path) -> None:
    assert doctor.measure_fsync(tmp_path) > 0
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    assert doctor.check_fsync(tmp_path / "file").status == "fail"


def test_a_clock_that_is_wrong_or_jumps_is_found() -> None:
    clock = ManualClock(1_800_000_000_000)
    assert doctor.check_clock(clock, clock.advance).status == "ok"
    assert doctor.check_clock(clock, lambda _: clock.set_wall(clock.now_ms() + 60_000)).status == "warn"
    clock = ManualClock(0)
    assert doctor.check_clock(clock, clock.advance).status == "fail"


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (("echo", "yes"), "ok"),
        (("echo", "no"), "warn"),
        (("false",), "ok"),
        (("no-such-command-here",), "ok"),
    ],
)
def test_a_clock_that_nobody_keeps_is_a_warning(command: tuple[str, ...], status: str) -> None:
    assert doctor.check_time_sync(command).status == status


@pytest.mark.parametrize(("limits", "status"), [((99_999, 99_999), "ok"), ((1024, 99_999), "warn"), ((9, 9), "warn")])
def test_too_few_open_files_is_a_warning(limits: tuple[int, int], status: str) -> None:
    assert doctor.check_open_files(20_000, limits).status == status


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert doctor.check_port("127.0.0.1", port).status == "warn"
    assert doctor.check_port("127.0.0.1", port).status == "ok"
    assert doctor.check_port("192.0.2.1", port).status == "warn"


def test_a_certificate_is_looked_at_before_it_expires(tmp_path: Path) -> None:
    path, begin = tmp_path / "cert.pem", datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, begin, begin + datetime.timedelta(days=90))
    ).sign(key, hashes.SHA256())
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    expected = {-1: "fail", 1: "ok", 68: "ok", 75: "warn", 90: "fail"}
    found = {day: doctor.check_certificate(path, begin + datetime.timedelta(days=day)).status for day in expected}
    assert found == expected
    path.write_text("nothing")
    assert doctor.check_certificate(path, begin).status == "fail"


def test_what_tracing_needs_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_tracing().status == "ok"
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert doctor.check_tracing().do == "pip install 'tidings[otel]'"


def test_a_whole_examination_says_what_to_do_about_everything_that_is_not_well(tmp_path: Path) -> None:
    environ = {"TIDINGS_DATA_DIR": str(tmp_path / "data"), "TIDINGS_PORT": "0"}
    findings = list(examine(environ=environ))
    assert findings[0] == Finding("ok", "configuration", "valid")
    assert len(findings) > 8
    assert all(finding.do for finding in findings if finding.status != "ok")
    assert worst(findings) != "fail"
    broken = list(examine(environ=environ | {"TIDINGS_LOG_LEVEL": "loud"}))
    assert "log_level" in broken[0].what
    assert worst(broken) == "fail"
    assert len(broken) > 8  # the rest is examined all the same
    assert not (tmp_path / "data").exists()
