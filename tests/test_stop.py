"""Ctrl-C and SIGTERM: the end comes between two steps, with the exit code of the signal, and leaves nothing half done."""

import functools
import json
import os
import re
import signal
import threading
import time

import pytest
from test_processes import Process, start, wait_until  # noqa: F401

from cosmos3_jax import StoppedError, stop
from cosmos3_jax.stop import stoppable

SIGNALS = [signal.SIGINT, signal.SIGTERM]
HANDLERS = signal.default_int_handler, signal.SIG_DFL


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture
def heeded():
    """Signals are not ignored, as they are where the tests run in the background. This process is then as it was before."""
    before = [signal.signal(number, handler) for number, handler in zip(SIGNALS, HANDLERS, strict=True)]
    yield
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def nothing_is_left(heeded):
    threads = threading.active_count()
    yield
    assert tuple(signal.getsignal(number) for number in SIGNALS) == HANDLERS
    assert signal.set_wakeup_fd(-1) == -1
    assert threading.active_count() == threads


def sleep_through(*numbers: int) -> None:
    """Signals during a long sleep without checks."""
    with stoppable():
        for number in numbers:
            send(number)
        time.sleep(60)


# In this process


def test_without_a_signal_nothing_happens(capfd):
    with stoppable() as check:
        check()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("number", SIGNALS)
def test_one_signal_is_met_at_the_next_check(capfd, number):
    with stoppable() as check:
        send(number)
        time.sleep(0.1)  # a step goes on
        for _ in range(2):
            with pytest.raises(StoppedError, match=f"stopped by {number.name}") as error:
                check()
            assert error.value.exit_code == 128 + number
    assert capfd.readouterr().err == "\nending after this step; once more ends at once\n"


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_a_second_signal_is_met_at_once(first, second):
    with pytest.raises(StoppedError, match=f"stopped by {second.name}"):
        sleep_through(first, second)


def test_a_signal_that_is_to_be_ignored_is():
    """As under nohup, or in the background of a script."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stoppable() as check:
            send(signal.SIGINT)
            check()
            send(signal.SIGTERM)
            with pytest.raises(StoppedError):
                check()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_of_several_processes_each_is_ended_as_ever(monkeypatch):
    monkeypatch.setattr(stop, "are_several", lambda: True)
    with pytest.raises(KeyboardInterrupt):
        sleep_through(signal.SIGINT)


def test_in_a_thread_it_does_nothing():
    """Python has handlers in the main thread alone."""
    raised = []

    def inside():
        try:
            with stoppable() as check:
                check()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert raised == []


def test_it_can_be_used_again():
    for _ in range(2):
        with stoppable() as check:
            send(signal.SIGINT)
            with pytest.raises(StoppedError):
                check()
        with stoppable() as check:
            check()


# In processes of their own

CLI = ["-m", "cosmos3_jax.generate", "--num-frames", 5, "--height", 32, "--width", 32]
LONG = {"name": "long", "prompt": "waves", "num_inference_steps": 1000}
SHORT = {"name": "short", "prompt": "a red ball", "num_inference_steps": 2}


def in_the_middle(process: Process) -> bool:
    """Whether it has done some of the many steps."""
    return re.search(r"\| [1-9]\d*/1000 ", process.err) is not None


def told_to_end(process: Process, *numbers: int) -> float:
    """The seconds that it goes on."""
    wait_until(functools.partial(in_the_middle, process), process)
    begun = time.monotonic()
    for number in numbers:
        process.popen.send_signal(number)
    process.popen.wait(timeout=30)
    return time.monotonic() - begun


def check_end(process: Process, number: int) -> None:
    assert process.popen.returncode == 128 + number, process.err
    assert process.err.endswith(f"error: stopped by {number.name}\n")
    assert "Traceback" not in process.err


@pytest.mark.parametrize("numbers", [SIGNALS[:1], SIGNALS[1:], SIGNALS[:1] * 2], ids=["SIGINT", "SIGTERM", "twice"])
def test_a_single_request_leaves_nothing(start, tmp_path, numbers):  # noqa: F811
    process = start([*CLI, "--steps", 1000, "--height", 64, "--width", 64, "--out", tmp_path / "a.mp4"], 1)
    assert told_to_end(process, *numbers) < 10
    check_end(process, numbers[-1])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", SIGNALS)
def test_a_batch_leaves_what_is_done_and_can_be_gone_on_with(start, tmp_path, number):  # noqa: F811
    requests, out = tmp_path / "requests.jsonl", tmp_path / "out"
    requests.write_text("\n".join(map(json.dumps, [SHORT, LONG, SHORT | {"name": "last"}])))
    process = start([*CLI, "--requests", requests, "--out-dir", out], 1)
    assert told_to_end(process, number) < 10
    check_end(process, number)
    assert sorted(os.listdir(out)) == ["short.json", "short.mp4"]
    requests.write_text(requests.read_text().replace("1000", "3"))
    again = start([*CLI, "--requests", requests, "--out-dir", out], 1)
    assert again.code() == 0, again.err
    told = json.loads(again.out.splitlines()[-1])
    assert (told["finished_before"], told["done"]) == (["short"], ["long", "last"])
    assert sorted(os.listdir(out)) == sorted(
        f"{name}.{suffix}" for name in ("short", "long", "last") for suffix in ("json", "mp4")
    )


RUNS_IN_C = """
import jax
from cosmos3_jax.stop import stoppable

with stoppable() as check:
    print("runs", flush=True)
    jax.jit(lambda x: jax.lax.while_loop(lambda x: x >= 0, lambda x: (x + 1) % 7, x))(1).block_until_ready()
"""


def test_a_second_signal_ends_what_python_cannot(start):  # noqa: F811
    """A step of minutes, or a program that is being compiled: Python's handlers would wait for its end."""
    process = start(["-c", RUNS_IN_C], 1)
    wait_until(lambda: "runs" in process.out, process)
    time.sleep(1)  # it does
    process.popen.send_signal(signal.SIGINT)
    wait_until(lambda: "once more ends at once" in process.err, process)
    process.popen.send_signal(signal.SIGINT)
    assert process.code(seconds=stop.GRACE_SECONDS + 5) == 130
