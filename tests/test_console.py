"""What the command line prints of what is logged, and where."""

import logging
import warnings

import pytest

from cosmos3_jax import console
from cosmos3_jax.console import speaking

log = logging.getLogger("cosmos3_jax.somewhere")

SAID = {
    "": ("I %s\n", "warning: W\nwarning: python\nerror: E\n"),
    "verbose": ("I %s\n", "debug: D\nwarning: W\nwarning: python\nerror: E\n"),
    "quiet": ("", "error: E\n"),
}


@pytest.mark.filterwarnings("always::UserWarning")
@pytest.mark.parametrize("how", SAID)
def test_what_is_said(capsys, how):
    with speaking(verbose=how == "verbose", quiet=how == "quiet"):
        log.debug("D")
        log.info("I %s", "%s")
        log.warning("W")
        warnings.warn("python", stacklevel=1)
        log.error("E")
    assert tuple(capsys.readouterr()) == SAID[how]


@pytest.mark.parametrize("fails", [False, True])
def test_afterwards_logging_is_as_before(capsys, caplog, fails):
    """Also where main is called from a program that has a logging of its own."""
    before = (console.LOGGER.level, console.LOGGER.propagate, list(console.LOGGER.handlers), warnings.showwarning)
    try:
        with speaking(verbose=True):
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert (console.LOGGER.level, console.LOGGER.propagate, list(console.LOGGER.handlers), warnings.showwarning) == before
    log.error("mine")
    assert capsys.readouterr().out == ""
    assert "mine" in caplog.text


def test_only_the_first_process_speaks_but_each_tells_its_errors(capsys, monkeypatch):
    monkeypatch.setattr(console, "is_first", lambda: False)
    with speaking(verbose=True):
        log.debug("D")
        log.info("I")
        log.warning("W")
        log.error("E")
    assert tuple(capsys.readouterr()) == ("", "error: E\n")
