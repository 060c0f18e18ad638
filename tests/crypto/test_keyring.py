"""What is sealed opens only where it was sealed, through every rotation."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tidings.server.crypto.base import AppKeyNotLoaded, CryptoError, RootKeyMissing, Tampered
from tidings.server.crypto.keyfile import KeyFile
from tidings.server.crypto.keyring import (
    APP_BOX_OVERHEAD_BYTES,
    KEY_VERSION_MAX,
    STREAM_BOX_OVERHEAD_BYTES,
    KeyPurpose,
    Keyring,
)

APP = "app_clinic"
STREAM = "4711"
ITEM = b"message m_01"
PLAIN = "Grüß Gott, the results are back.".encode()

# The fixtures hold keys only; sharing them between examples is what a server does too.
shared_keys = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def load_new_app(keyring: Keyring, app_id: str) -> None:
    keyring.load_app_key(app_id, keyring.new_app_key(app_id))
    keyring.load_app_key(app_id, keyring.new_index_key(app_id))


@pytest.fixture
def root(tmp_path: Path) -> KeyFile:
    return KeyFile(tmp_path / "root.key")


@pytest.fixture
def keyring(root: KeyFile) -> Keyring:
    """A keyring with one app loaded."""
    keyring = Keyring(root)
    load_new_app(keyring, APP)
    return keyring


def flip(box: bytes, bit: int) -> bytes:
    changed = bytearray(box)
    changed[bit // 8] ^= 1 << (bit % 8)
    return bytes(changed)


class TestStreamRows:
    @shared_keys
    @given(plain=st.binary(max_size=2000), item=st.binary(max_size=64))
    def test_a_row_opens_as_it_was_sealed(self, keyring: Keyring, plain: bytes, item: bytes) -> None:
        cipher = keyring.cipher(APP, STREAM, keyring.new_stream_key(APP, STREAM))
        box = cipher.seal(plain, item)
        assert len(box) == len(plain) + STREAM_BOX_OVERHEAD_BYTES
        assert cipher.open(box, item) == plain

    def test_the_text_is_not_in_the_box_and_no_two_boxes_are_equal(self, keyring: Keyring) -> None:
        cipher = keyring.cipher(APP, STREAM, keyring.new_stream_key(APP, STREAM))
        boxes = {cipher.seal(PLAIN, ITEM) for _ in range(1000)}
        assert len(boxes) == 1000
        assert not any(PLAIN[:8] in box for box in boxes)

    def test_every_flipped_bit_is_refused(self, keyring: Keyring) -> None:
        cipher = keyring.cipher(APP, STREAM, keyring.new_stream_key(APP, STREAM))
        box = cipher.seal(PLAIN, ITEM)
        for bit in range(8 * len(box)):
            with pytest.raises(Tampered):
                cipher.open(flip(box, bit), ITEM)

    @shared_keys
    @given(garbage=st.binary(max_size=200))
    def test_garbage_is_refused(self, keyring: Keyring, garbage: bytes) -> None:
        cipher = keyring.cipher(APP, STREAM, keyring.new_stream_key(APP, STREAM))
        with pytest.raises(Tampered):
            cipher.open(garbage, ITEM)
        with pytest.raises(Tampered):
            keyring.app_cipher(APP).open(b"\x02\x00\x01" + garbage, ITEM)

    def test_a_shortened_or_lengthened_box_is_refused(self, keyring: Keyring) -> None:
        cipher = keyring.cipher(APP, STREAM, keyring.new_stream_key(APP, STREAM))
        box = cipher.seal(PLAIN, ITEM)
        for cut in range(len(box)):
            with pytest.raises(Tampered):
                cipher.open(box[:cut], ITEM)
        with pytest.raises(Tampered):
            cipher.open(box + b"\0", ITEM)

    def test_a_box_moved_to_another_item_is_refused_naming_the_row_and_not_the_text(self, keyring: Keyring) -> None:
        cipher = keyring.cipher(APP, STREAM, keyring.new_stream_key(APP, STREAM))
        box = cipher.seal(PLAIN, ITEM)
        with pytest.raises(Tampered, match=r"app app_clinic, stream 4711, item b'message m_02'") as refusal:
            cipher.open(box, b"message m_02")
        assert "results" not in str(refusal.value)

    def test_a_box_moved_to_another_stream_or_app_is_refused(self, keyring: Keyring) -> None:
        load_new_app(keyring, "app_other")
        box = keyring.cipher(APP, STREAM, keyring.new_stream_key(APP, STREAM)).seal(PLAIN, ITEM)
        for app, stream in [(APP, "4712"), ("app_other", STREAM)]:
            elsewhere = keyring.cipher(app, stream, keyring.new_stream_key(app, stream))
            with pytest.raises(Tampered):
                elsewhere.open(box, ITEM)

    def test_a_stream_key_moved_to_another_stream_or_app_is_refused(self, keyring: Keyring) -> None:
        load_new_app(keyring, "app_other")
        stored = keyring.new_stream_key(APP, STREAM)
        for app, stream in [(APP, "4712"), ("app_other", STREAM)]:
            with pytest.raises(Tampered):
                keyring.cipher(app, stream, stored)

    def test_every_flipped_bit_of_a_stored_stream_key_is_refused(self, keyring: Keyring) -> None:
        stored = keyring.new_stream_key(APP, STREAM)
        keyring.cipher(APP, STREAM, stored)
        for bit in range(8 * len(stored.wrapped)):
            with pytest.raises(Tampered):
                keyring.cipher(APP, STREAM, msgspec.structs.replace(stored, wrapped=flip(stored.wrapped, bit)))

    def test_names_that_run_together_are_still_two_names(self, keyring: Keyring) -> None:
        """`app_a` with stream `b1` and `app_ab` with stream `1` have the same letters."""
        load_new_app(keyring, "app_a")
        for wrapped in (keyring.new_app_key("app_a"), keyring.new_index_key("app_ab")):
            with pytest.raises(Tampered):
                keyring.load_app_key("app_ab" if wrapped.purpose is KeyPurpose.DATA else "app_a", wrapped)
        stored = keyring.new_stream_key("app_a", "b1")
        with pytest.raises(Tampered):
            keyring.cipher("app_a", "b", stored)

    def test_a_second_key_version_of_a_stream_does_not_open_what_the_first_sealed(self, keyring: Keyring) -> None:
        first, second = (keyring.new_stream_key(APP, STREAM, version=version) for version in (1, 2))
        box = keyring.cipher(APP, STREAM, first).seal(PLAIN, ITEM)
        relabelled = box[:1] + (2).to_bytes(2, "big") + box[3:]
        for tried in (box, relabelled):
            with pytest.raises(Tampered):
                keyring.cipher(APP, STREAM, second).open(tried, ITEM)
        with pytest.raises(Tampered):
            keyring.cipher(APP, STREAM, msgspec.structs.replace(first, version=2))
        assert keyring.cipher(APP, STREAM, first).open(box, ITEM) == PLAIN

    def test_a_stream_made_again_under_its_old_name_seals_with_its_new_key(self, keyring: Keyring) -> None:
        old = keyring.new_stream_key(APP, STREAM)
        keyring.cipher(APP, STREAM, old)
        new = keyring.new_stream_key(APP, STREAM)
        box = keyring.cipher(APP, STREAM, new).seal(PLAIN, ITEM)
        keyring.forget_stream(APP, STREAM)
        assert keyring.cipher(APP, STREAM, new).open(box, ITEM) == PLAIN
        with pytest.raises(Tampered):
            keyring.cipher(APP, STREAM, old).open(box, ITEM)

    @pytest.mark.parametrize("version", [0, -1, KEY_VERSION_MAX + 1])
    def test_a_key_version_out_of_bounds_is_refused(self, keyring: Keyring, version: int) -> None:
        with pytest.raises(CryptoError, match="key version"):
            keyring.new_stream_key(APP, STREAM, version=version)
        stored = msgspec.structs.replace(keyring.new_stream_key(APP, STREAM), version=version)
        with pytest.raises(CryptoError, match="key version"):
            keyring.cipher(APP, STREAM, stored)


class TestAppRows:
    @shared_keys
    @given(plain=st.binary(max_size=2000), item=st.binary(max_size=64))
    def test_a_row_opens_as_it_was_sealed(self, keyring: Keyring, plain: bytes, item: bytes) -> None:
        cipher = keyring.app_cipher(APP)
        box = cipher.seal(plain, item)
        assert len(box) == len(plain) + APP_BOX_OVERHEAD_BYTES
        assert cipher.open(box, item) == plain

    def test_every_flipped_bit_is_refused(self, keyring: Keyring) -> None:
        cipher = keyring.app_cipher(APP)
        box = cipher.seal(PLAIN, b"profile alice")
        for bit in range(8 * len(box)):
            # A flip in the key version may name a version that is not loaded: no plaintext either way.
            with pytest.raises(AppKeyNotLoaded if 8 <= bit < 24 else Tampered):
                cipher.open(flip(box, bit), b"profile alice")

    def test_a_box_moved_to_another_item_or_app_is_refused(self, keyring: Keyring) -> None:
        load_new_app(keyring, "app_other")
        box = keyring.app_cipher(APP).seal(PLAIN, b"profile alice")
        with pytest.raises(Tampered):
            keyring.app_cipher(APP).open(box, b"profile bob")
        with pytest.raises(Tampered):
            keyring.app_cipher("app_other").open(box, b"profile alice")

    def test_a_stream_key_does_not_open_as_an_app_row(self, keyring: Keyring) -> None:
        stored = keyring.new_stream_key(APP, STREAM)
        for item in (b"", STREAM.encode(), b"\0\0\0\x044711\0\0\0\x04\0\0\0\x01"):
            with pytest.raises(Tampered):
                keyring.app_cipher(APP).open(stored.wrapped, item)

    def test_relabelling_a_box_with_another_loaded_key_version_is_refused(self, keyring: Keyring) -> None:
        cipher = keyring.app_cipher(APP)
        old = cipher.seal(PLAIN, ITEM)
        keyring.load_app_key(APP, keyring.new_app_key(APP))
        new = cipher.seal(PLAIN, ITEM)
        for box, version in ((old, 2), (new, 1)):
            with pytest.raises(Tampered):
                cipher.open(box[:1] + version.to_bytes(2, "big") + box[3:], ITEM)


class TestFingerprints:
    def test_equal_values_agree_and_others_differ(self, keyring: Keyring) -> None:
        cipher = keyring.app_cipher(APP)
        assert cipher.fingerprint(b"yes") == cipher.fingerprint(b"yes")
        assert len({cipher.fingerprint(value) for value in (b"yes", b"no", b"", b"yes ")}) == 4
        assert len(cipher.fingerprint(b"yes")) == 32

    def test_another_app_gives_another_fingerprint(self, keyring: Keyring) -> None:
        load_new_app(keyring, "app_other")
        assert keyring.app_cipher(APP).fingerprint(b"yes") != keyring.app_cipher("app_other").fingerprint(b"yes")

    def test_it_stays_the_same_through_every_rotation_and_restart(self, tmp_path: Path) -> None:
        root = KeyFile(tmp_path / "root.key")
        keyring = Keyring(root)
        data, index = keyring.new_app_key(APP), keyring.new_index_key(APP)
        for wrapped in (data, index):
            keyring.load_app_key(APP, wrapped)
        before = keyring.app_cipher(APP).fingerprint(b"yes")

        keyring.load_app_key(APP, keyring.new_app_key(APP))
        assert keyring.app_cipher(APP).fingerprint(b"yes") == before
        root.add_version()
        restarted = Keyring(KeyFile(tmp_path / "root.key"))
        restarted.load_app_key(APP, keyring.rewrap_app_key(APP, index))
        assert restarted.app_cipher(APP).fingerprint(b"yes") == before

    def test_an_app_has_one_index_key(self, keyring: Keyring) -> None:
        with pytest.raises(CryptoError, match="must stay the same"):
            keyring.new_index_key(APP)
        with pytest.raises(CryptoError, match="already has another index key"):
            keyring.load_app_key(APP, Keyring(keyring._root).new_index_key(APP))

    def test_a_data_key_does_not_pass_for_an_index_key(self, root: KeyFile) -> None:
        keyring = Keyring(root)
        data = keyring.new_app_key(APP)
        with pytest.raises(Tampered):
            keyring.load_app_key(APP, msgspec.structs.replace(data, purpose=KeyPurpose.INDEX))


class TestRotation:
    def test_rotating_root_and_app_keys_keeps_everything_readable(self, tmp_path: Path) -> None:
        root = KeyFile(tmp_path / "root.key")
        keyring = Keyring(root)
        app_keys = [keyring.new_app_key(APP)]
        keyring.load_app_key(APP, app_keys[0])
        stream_key = keyring.new_stream_key(APP, STREAM)
        rows = [keyring.cipher(APP, STREAM, stream_key).seal(PLAIN, ITEM)]
        profiles = [keyring.app_cipher(APP).seal(PLAIN, ITEM)]

        for _ in range(3):
            first_root = root.current_kid
            root.add_version()
            app_keys = [keyring.rewrap_app_key(APP, key) for key in app_keys]
            root.retire(first_root)
            app_keys.append(keyring.new_app_key(APP))
            keyring.load_app_key(APP, app_keys[-1])
            stream_key = keyring.rewrap_stream_key(APP, STREAM, stream_key)
            rows.append(keyring.cipher(APP, STREAM, stream_key).seal(PLAIN, ITEM))
            profiles.append(keyring.app_cipher(APP).seal(PLAIN, ITEM))

        assert [key.version for key in app_keys] == [1, 2, 3, 4]
        assert stream_key.app_key_version == 4
        restarted = Keyring(KeyFile(tmp_path / "root.key"))
        for key in app_keys:
            assert key.root_kid == root.current_kid
            restarted.load_app_key(APP, key)
        for holder in (keyring, restarted):
            assert [holder.cipher(APP, STREAM, stream_key).open(row, ITEM) for row in rows] == [PLAIN] * 4
            assert [holder.app_cipher(APP).open(row, ITEM) for row in profiles] == [PLAIN] * 4

    def test_rewrapping_what_is_current_gives_back_the_same_object(self, keyring: Keyring) -> None:
        app_key, stream_key = keyring.new_app_key(APP), keyring.new_stream_key(APP, STREAM)
        assert keyring.rewrap_app_key(APP, app_key) is app_key
        assert keyring.rewrap_stream_key(APP, STREAM, stream_key) is stream_key
        row = keyring.app_cipher(APP).seal(PLAIN, ITEM)
        assert keyring.app_cipher(APP).reseal(row, ITEM) is row

    def test_resealing_moves_a_row_to_the_newest_key_so_that_the_old_one_can_go(self, root: KeyFile) -> None:
        keyring, later = Keyring(root), Keyring(root)
        keyring.load_app_key(APP, keyring.new_app_key(APP))
        row = keyring.app_cipher(APP).seal(PLAIN, ITEM)
        newest = keyring.new_app_key(APP)
        keyring.load_app_key(APP, newest)
        later.load_app_key(APP, newest)
        with pytest.raises(AppKeyNotLoaded):
            later.app_cipher(APP).open(row, ITEM)
        assert later.app_cipher(APP).open(keyring.app_cipher(APP).reseal(row, ITEM), ITEM) == PLAIN

    def test_a_new_app_key_is_not_used_before_it_is_loaded(self, keyring: Keyring) -> None:
        stored = keyring.new_app_key(APP)
        assert stored.version == 2
        assert keyring.app_cipher(APP).key_version == 1
        keyring.load_app_key(APP, stored)
        assert keyring.app_cipher(APP).key_version == 2

    def test_loading_older_versions_later_does_not_bring_them_back_into_use(self, root: KeyFile) -> None:
        first = Keyring(root)
        keys = []
        for _ in range(3):
            keys.append(first.new_app_key(APP))
            first.load_app_key(APP, keys[-1])
        second = Keyring(root)
        for key in reversed(keys):
            second.load_app_key(APP, key)
        assert second.app_cipher(APP).key_version == 3

    def test_a_stored_app_key_presented_as_another_version_or_app_is_refused(self, keyring: Keyring) -> None:
        stored = keyring.new_app_key(APP)
        with pytest.raises(Tampered):
            keyring.load_app_key(APP, msgspec.structs.replace(stored, version=3))
        with pytest.raises(Tampered):
            keyring.load_app_key("app_other", stored)
        assert keyring.app_cipher(APP).key_version == 1

    def test_a_stream_key_presented_under_another_app_key_version_is_refused(self, keyring: Keyring) -> None:
        old = keyring.new_stream_key(APP, STREAM)
        keyring.load_app_key(APP, keyring.new_app_key(APP))
        new = keyring.rewrap_stream_key(APP, STREAM, old)
        for stored, version in ((old, 2), (new, 1)):
            relabelled = stored.wrapped[:1] + version.to_bytes(2, "big") + stored.wrapped[3:]
            for wrapped in (stored.wrapped, relabelled):
                with pytest.raises(Tampered):
                    keyring.cipher(
                        APP, STREAM, msgspec.structs.replace(stored, app_key_version=version, wrapped=wrapped)
                    )

    def test_a_version_rotated_by_another_process_is_named_so_that_it_can_be_loaded(self, root: KeyFile) -> None:
        server, command = Keyring(root), Keyring(root)
        first = server.new_app_key(APP)
        server.load_app_key(APP, first)
        command.load_app_key(APP, first)
        second = command.new_app_key(APP)
        command.load_app_key(APP, second)
        stored = command.rewrap_stream_key(APP, STREAM, server.new_stream_key(APP, STREAM))

        with pytest.raises(AppKeyNotLoaded) as missing:
            server.cipher(APP, STREAM, stored)
        assert (missing.value.app_id, missing.value.version) == (APP, 2)
        server.load_app_key(APP, second)
        box = command.cipher(APP, STREAM, stored).seal(PLAIN, ITEM)
        assert server.cipher(APP, STREAM, stored).open(box, ITEM) == PLAIN

    def test_two_different_keys_under_one_version_are_refused(self, root: KeyFile) -> None:
        keyring = Keyring(root)
        one, other = keyring.new_app_key(APP), keyring.new_app_key(APP)
        keyring.load_app_key(APP, one)
        keyring.load_app_key(APP, one)
        with pytest.raises(CryptoError, match="already has another data key with version 1"):
            keyring.load_app_key(APP, other)

    def test_a_lost_root_key_says_which_one_and_what_to_do(self, keyring: Keyring, root: KeyFile) -> None:
        stored = keyring.new_app_key(APP)
        lost = root.current_kid
        root.path.unlink()
        found = KeyFile(root.path)
        with pytest.raises(RootKeyMissing, match=f"{lost} is not in .*put back the key file") as missing:
            Keyring(found).load_app_key(APP, stored)
        assert missing.value.kid == lost


class TestMemory:
    def test_a_forgotten_app_is_refused_everywhere(self, keyring: Keyring) -> None:
        load_new_app(keyring, "app_other")
        stored = keyring.new_stream_key(APP, STREAM)
        kept = keyring.new_stream_key("app_other", STREAM)
        keyring.cipher(APP, STREAM, stored)
        other = keyring.cipher("app_other", STREAM, kept)
        held = keyring.app_cipher(APP)
        box = held.seal(PLAIN, ITEM)
        keyring.forget_app(APP)

        uses: list[Callable[[], object]] = [
            lambda: keyring.cipher(APP, STREAM, stored),
            lambda: keyring.new_stream_key(APP, STREAM),
            lambda: keyring.rewrap_stream_key(APP, STREAM, stored),
            lambda: keyring.app_cipher(APP),
            lambda: held.seal(PLAIN, ITEM),
            lambda: held.open(box, ITEM),
            lambda: held.fingerprint(b"yes"),
        ]
        for use in uses:
            with pytest.raises(AppKeyNotLoaded):
                use()
        assert keyring.cipher("app_other", STREAM, kept) is other

    def test_stream_ciphers_are_bounded_and_those_in_use_stay(self, root: KeyFile) -> None:
        keyring = Keyring(root, stream_ciphers_max=100)
        load_new_app(keyring, APP)
        busy_key = keyring.new_stream_key(APP, "busy")
        busy = keyring.cipher(APP, "busy", busy_key)
        quiet_key = keyring.new_stream_key(APP, "quiet")
        quiet = keyring.cipher(APP, "quiet", quiet_key)
        for number in range(1000):
            keyring.cipher(APP, str(number), keyring.new_stream_key(APP, str(number)))
            assert keyring.cipher(APP, "busy", busy_key) is busy
            assert len(keyring._young) + len(keyring._old) <= 100
        assert keyring.cipher(APP, "quiet", quiet_key) is not quiet

    def test_keys_do_not_show_in_representations(self, keyring: Keyring) -> None:
        app = keyring.app_cipher(APP)
        secret = app._current_key().secret
        shown = "".join(map(repr, (app, app._current_key(), keyring, keyring._root, keyring._root.__dict__)))
        assert repr(secret)[2:-1] not in shown
        assert secret.hex() not in shown

    def test_threads_share_one_keyring_without_mixing_streams(self, root: KeyFile) -> None:
        """Few cache places, many streams and rotations, so that every path runs beside every other."""
        keyring = Keyring(root, stream_ciphers_max=4)
        load_new_app(keyring, APP)
        keys = {str(number): keyring.new_stream_key(APP, str(number)) for number in range(12)}
        together = threading.Barrier(5)

        def converse(thread: int) -> None:
            together.wait()
            for turn in range(400):
                stream = str((thread * 5 + turn) % 12)
                text = f"{thread} {turn}".encode()
                box = keyring.cipher(APP, stream, keys[stream]).seal(text, ITEM)
                assert keyring.cipher(APP, stream, keys[stream]).open(box, ITEM) == text

        def rotate() -> None:
            together.wait()
            for _ in range(20):
                keyring.load_app_key(APP, keyring.new_app_key(APP))
                for stream, key in keys.items():
                    keys[stream] = keyring.rewrap_stream_key(APP, stream, key)

        with ThreadPoolExecutor(5) as pool:
            running = [pool.submit(converse, thread) for thread in range(4)]
            running.append(pool.submit(rotate))
            for each in running:
                each.result(timeout=60)
