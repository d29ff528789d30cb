"""The time of a stage, and what is said where memory ends."""

import logging
import time

import jax
import pytest

from cosmos3_jax.errors import DeviceError, OutOfMemoryError
from cosmos3_jax.stage import failures_told, timed

XLA = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123 bytes.\nBufferAssignment OOM Debugging."


def test_seconds_add_up_and_are_logged(caplog):
    seconds = {}
    with caplog.at_level(logging.DEBUG, logger="cosmos3_jax"):
        for _ in range(2):
            with timed(seconds, "decode"):
                time.sleep(0.01)
    assert seconds.keys() == {"decode"}
    assert 0.02 <= seconds["decode"] < 1
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["decode", "decode"]


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (jax.errors.JaxRuntimeError(XLA), r"decode: out of memory \(RESOURCE_EXHAUSTED: Out of memory .* 123 bytes\.\)"),
        (MemoryError("Unable to allocate 9 TiB"), r"decode: out of memory \(Unable to allocate 9 TiB\)"),
        (MemoryError(), r"decode: out of memory \(of the host\)"),
    ],
    ids=["device", "numpy", "python"],
)
@pytest.mark.parametrize("around", [failures_told, lambda stage: timed({}, stage)], ids=["told", "timed"])
def test_memory_that_ends_is_one_sentence(around, error, sentence):
    with pytest.raises(OutOfMemoryError, match=f"^{sentence}$") as raised, around("decode"):
        raise error
    assert raised.value.stage == "decode"


def test_another_failure_of_the_device_is_one_sentence():
    error = jax.errors.JaxRuntimeError("INTERNAL: CUDA_ERROR_ILLEGAL_ADDRESS\nmore of it")
    message = r"^decode: the device failed \(INTERNAL: CUDA_ERROR_ILLEGAL_ADDRESS\); "
    with pytest.raises(DeviceError, match=message) as raised, failures_told("decode"):
        raise error
    assert not isinstance(raised.value, OutOfMemoryError)
    assert raised.value.__cause__ is error


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()], ids=repr)
def test_what_is_of_no_device_stays_what_it_is(error):
    with pytest.raises(type(error)) as raised, failures_told("decode"):
        raise error
    assert raised.value is error
