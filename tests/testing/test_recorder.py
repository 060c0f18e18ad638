"""What clients record is what the checker reads, from any thread, whatever happened to the call."""

import threading
from pathlib import Path

import pytest

from tidings.testing.checker import check, check_files
from tidings.testing.history import Fail, Info, Invoke, LogEvent, Ok, Send, body_digest, read_entries
from tidings.testing.recorder import Recorder

SEND = Send("c", "ann", "k1", body_digest("hello"))


def test_a_recorded_conversation_can_be_judged(tmp_path: Path) -> None:
    with Recorder(tmp_path / "log.jsonl") as recorder:
        recorder.device_start(device="d", user="bob", channel="c", position=0)
        with recorder.operation("p", SEND) as sending:
            sending.ok(message_id="m1", seq=1)
        recorder.observe(
            device="d",
            user="bob",
            channel="c",
            epoch="e",
            seq=1,
            event_type="message.created",
            message_id="m1",
            key="k1",
            sender="ann",
            digest=SEND.digest,
        )
        recorder.receipt(device="d", channel="c", user="bob", which="read", position=1)
        recorder.device_final(device="d", user="bob", channel="c", position=1)
        recorder.final_log("c", [LogEvent(1, "message.created", "m1", "k1", "ann", SEND.digest)], epoch="e")
    verdict = check_files([tmp_path / "log.jsonl"])
    assert verdict.ok, verdict.render()
    assert verdict.seen["acknowledged"] == verdict.seen["observed"] == verdict.seen["receipts"] == 1


def test_each_outcome_is_recorded_and_an_exception_is_an_unknown_one() -> None:
    recorder = Recorder()
    with recorder.operation("p", SEND) as operation:
        operation.fail("forbidden")
    with recorder.operation("p", SEND):
        pass
    with pytest.raises(TimeoutError), recorder.operation("p", SEND):
        raise TimeoutError
    outcomes = [entry for entry in recorder.entries if not isinstance(entry, Invoke)]
    assert [type(entry) for entry in outcomes] == [Fail, Info, Info]
    assert [entry.reason for entry in outcomes if isinstance(entry, Info)] == ["no outcome", "TimeoutError"]
    assert check(recorder.entries).ok


def test_an_outcome_that_was_recorded_stays_although_the_block_fails_later() -> None:
    recorder = Recorder()
    operations = recorder.operation("p", SEND)
    operations.__enter__().ok(message_id="m", seq=1)
    error = ValueError()
    assert not operations.__exit__(ValueError, error, None)
    assert [type(entry) for entry in recorder.entries] == [Invoke, Ok]


def test_a_second_outcome_is_refused() -> None:
    operation = Recorder().invoke("p", SEND)
    operation.ok()
    with pytest.raises(RuntimeError, match="outcome already"):
        operation.info()


def test_many_threads_write_whole_lines_with_ids_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    recorder = Recorder(path, name="many")

    def work() -> None:
        for _ in range(500):
            recorder.invoke("p", SEND).ok()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    recorder.flush()
    entries = list(read_entries(path))
    assert len(entries) == 4000
    assert len({entry.id for entry in entries if isinstance(entry, Invoke)}) == 2000
    with pytest.raises(RuntimeError, match="read the file"):
        _ = recorder.entries
    recorder.close()
    recorder.close()


def test_time_comes_from_the_given_clock() -> None:
    ticks = iter([5, 9])
    recorder = Recorder(clock=lambda: next(ticks))
    recorder.invoke("p", SEND).ok()
    assert [entry.at for entry in recorder.entries if isinstance(entry, Invoke | Ok)] == [5, 9]
