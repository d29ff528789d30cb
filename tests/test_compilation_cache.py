"""Compiled programs on disk: a second process loads what the first one compiled, and where and when none are kept."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from cosmos3_jax.compilation_cache import SHORTEST, use_compilation_cache

ROOT = Path(__file__).parents[1]
NAMES = ("jax_enable_compilation_cache", "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")

# A small video by the command line, and one JSON line: each program that was compiled or loaded, and which of them it was.
PROGRAM = """
import json, sys
import jax
from cosmos3_jax import generate, media, result_files

events, programs = [], []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event.rpartition("/")[2]))

def compiled(event, seconds, fun_name=None, **_):
    if event.endswith("backend_compile_duration"):
        programs.append((fun_name, "cache_hits" in events, "cache_misses" in events))
        events.clear()

jax.monitoring.register_event_duration_secs_listener(compiled)
result_files.write = lambda path, frames, *_: frames.tofile(path)
code = generate.main(["--num-frames", "5", "--height", "32", "--width", "32", "--steps", "2", *sys.argv[1:]])
print(json.dumps({"code": code, "programs": programs}))
"""


def run(home: Path, *flags: str, **variables: str) -> dict[str, set[str]]:
    """What a process found in the cache ("hits") and what it put there ("misses"), of a user whose cache folder is in `home`.

    Its video is `home`/a.mp4, as bytes.
    """
    environment = {name: value for name, value in os.environ.items() if "CACHE" not in name}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "XDG_CACHE_HOME": str(home / "cache")}
    command = [sys.executable, "-c", PROGRAM, "--out", str(home / "a.mp4"), *flags]
    done = subprocess.run(command, cwd=ROOT, env=environment | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["code"] == 0, done.stderr
    names = [(name.removeprefix("jit(").removesuffix(")"), hit, missed) for name, hit, missed in told["programs"]]
    return {"hits": {name for name, hit, _ in names if hit}, "misses": {name for name, _, missed in names if missed}}


BIG = {"prefill", "run_steps", "decode"}  # programs that take long enough to compile


def folder_of(home: Path) -> Path:
    return home / "cache" / "cosmos3_jax" / "programs"


# Processes


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A user's first process: his home, what it found, and its video."""
    home = tmp_path_factory.mktemp("first")
    found = run(home)
    return home, found, (home / "a.mp4").read_bytes()


def test_the_first_process_keeps_what_took_long(first):
    home, found, _ = first
    assert found["hits"] == set()
    assert found["misses"] >= BIG
    kept = {file.name.split("-")[0].removeprefix("jit_") for file in folder_of(home).iterdir()}
    assert kept >= BIG
    assert stat.S_IMODE(folder_of(home).stat().st_mode) == 0o700


def test_the_second_process_compiles_none_of_it_and_makes_the_same_video(first):
    home, _, video = first
    again = run(home, "--prompt", "A red ball rolls to the right.")
    assert again["hits"] >= BIG
    assert not again["misses"] & BIG
    assert (home / "a.mp4").read_bytes() == video
    assert len(video) == 5 * 32 * 32 * 3


@pytest.mark.parametrize("how", ["flag", "variable", "unwritable"])
def test_nothing_is_kept(how, tmp_path, first):
    """If JAX or the command line is told so, or where the folder cannot be made: a file stands in its way."""
    if how == "unwritable":
        (tmp_path / "cache").write_text("in the way")
    flags = ["--no-compilation-cache"] if how == "flag" else []
    variables = {"JAX_ENABLE_COMPILATION_CACHE": "0"} if how == "variable" else {}
    assert run(tmp_path, *flags, **variables) == {"hits": set(), "misses": set()}
    assert (tmp_path / "a.mp4").read_bytes() == first[2]
    assert {path.name for path in tmp_path.iterdir()} == {"a.mp4"} | ({"cache"} if how == "unwritable" else set())


def test_a_folder_of_the_users_own_is_taken(tmp_path):
    run(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own"))
    assert not (tmp_path / "cache").exists()
    assert any(file.name.startswith("jit_decode") for file in (tmp_path / "own").iterdir())


# The choice


@pytest.fixture(autouse=True)
def settings(monkeypatch, tmp_path):
    """JAX as it is without any setting, and as it was afterwards; the user's cache folder does not exist yet."""
    before = {name: getattr(jax.config, name) for name in NAMES}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, value in zip(NAMES, (True, None, 1.0), strict=True):
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def chosen() -> str | None:
    return jax.config.jax_compilation_cache_dir


def test_programs_are_kept_in_the_users_cache_folder(tmp_path):
    assert use_compilation_cache() == folder_of(tmp_path)
    assert chosen() == str(folder_of(tmp_path))
    assert jax.config.jax_persistent_cache_min_compile_time_secs == SHORTEST
    assert stat.S_IMODE(folder_of(tmp_path).stat().st_mode) == 0o700
    assert use_compilation_cache() == folder_of(tmp_path)  # asked again, as by another pipeline


@pytest.mark.parametrize("value", [None, ""])
def test_without_a_cache_folder_of_its_own_that_is_in_the_home(value, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME")
    if value is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert use_compilation_cache() == tmp_path / ".cache" / "cosmos3_jax" / "programs"


def test_none_where_jax_keeps_none(tmp_path):
    jax.config.update("jax_enable_compilation_cache", False)
    assert use_compilation_cache() is None
    assert (chosen(), list(tmp_path.iterdir())) == (None, [])


def test_the_folder_that_jax_was_given(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    assert use_compilation_cache() == tmp_path / "own"
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 1.0
    assert not (tmp_path / "cache").exists()


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


HINDRANCES = {
    "a file in its place": lambda patch, cache: (cache / "cosmos3_jax" / "programs").write_text(""),
    "a file above it": lambda patch, cache: (cache.rmdir(), cache.write_text("")),
    "no home": lambda patch, cache: (patch.delenv("XDG_CACHE_HOME"), patch.setattr(Path, "home", no_home)),
    "another user's": lambda patch, cache: patch.setattr(os, "getuid", lambda: os.stat(cache).st_uid + 1),
    "not to be written": lambda patch, cache: patch.setattr(os, "access", lambda path, mode: mode != os.W_OK),
}


@pytest.mark.parametrize("hindrance", HINDRANCES)
def test_none_where_none_can_be_written(hindrance, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    cache.mkdir()
    if hindrance == "a file in its place":
        (cache / "cosmos3_jax").mkdir()
    with monkeypatch.context() as patch:
        HINDRANCES[hindrance](patch, cache)
        assert use_compilation_cache() is None
    assert chosen() is None
