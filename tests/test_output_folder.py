"""A folder of results and records: what counts as finished, whose turn it is, and that nothing is left of the killed."""

import fcntl
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cosmos3_jax import InputError, output_folder
from cosmos3_jax.errors import RunError
from cosmos3_jax.folder import beside, write_json
from cosmos3_jax.output_folder import OutputFolder

METADATA = {"prompt": "waves", "seed": 1}


@pytest.fixture
def folder(tmp_path) -> OutputFolder:
    return OutputFolder(tmp_path / "new" / "out")


def make(folder: OutputFolder, name: str = "car", suffix: str = ".mp4", content: bytes = b"frames", metadata=METADATA) -> None:
    (folder.folder / (name + suffix)).write_bytes(content)
    folder.done(name, name + suffix, metadata)


def record(folder: OutputFolder, name: str = "car") -> Path:
    return folder.folder / f"{name}.json"


def listed(folder: OutputFolder) -> list[str]:
    return sorted(os.listdir(folder.folder))


def asked(metadata) -> bool:
    return metadata == METADATA


# What is finished


def test_what_is_on_record(folder):
    make(folder)
    assert listed(folder) == ["car.json", "car.mp4"]
    assert json.loads(record(folder).read_text()) == {
        "name": "car",
        "status": "done",
        "file": "car.mp4",
        "sha256": hashlib.sha256(b"frames").hexdigest(),
        "metadata": METADATA,
    }
    assert folder.status("car") == "done"
    assert folder.has("car", asked)


def test_nothing_is_finished_at_first(folder):
    assert (folder.status("car"), folder.stamp("car"), folder.has("car", lambda _: True)) == (None, None, False)


def edit(folder: OutputFolder, **changes) -> None:
    record(folder).write_text(json.dumps(json.loads(record(folder).read_text()) | changes))


def another_file(folder: OutputFolder) -> None:
    make(folder, "bus")
    edit(folder, file="bus.mp4")


DAMAGE = {
    "no file": lambda folder: (folder.folder / "car.mp4").unlink(),
    "another content": lambda folder: (folder.folder / "car.mp4").write_bytes(b"framez"),
    "cut off": lambda folder: (folder.folder / "car.mp4").write_bytes(b"frame"),
    "a folder in its place": lambda folder: ((folder.folder / "car.mp4").unlink(), (folder.folder / "car.mp4").mkdir()),
    "no record": lambda folder: record(folder).unlink(),
    "an empty record": lambda folder: record(folder).write_text(""),
    "half a record": lambda folder: record(folder).write_bytes(record(folder).read_bytes()[:50]),
    "a record that is no text": lambda folder: record(folder).write_bytes(b"\xff\xfe\x00"),
    "a record of many brackets": lambda folder: record(folder).write_text("[" * 100_000),
    "a record that is a list": lambda folder: record(folder).write_text("[1]"),
    "somebody else's record": lambda folder: record(folder).write_text('{"caption": "a car"}'),
    "another status": lambda folder: edit(folder, status="failed"),
    "a status that is none": lambda folder: edit(folder, status=["done"]),
    "another checksum": lambda folder: edit(folder, sha256="0" * 64),
    "no checksum": lambda folder: edit(folder, sha256=None),
    "other metadata": lambda folder: edit(folder, metadata=METADATA | {"seed": 2}),
    "metadata that is none": lambda folder: edit(folder, metadata="waves"),
    "another's file": another_file,
    "a file elsewhere": lambda folder: edit(folder, file="/etc/hostname", sha256=output_folder.checksum(Path("/etc/hostname"))),
    "a file that is none": lambda folder: edit(folder, file=7),
    "an empty file name": lambda folder: edit(folder, file=""),
    "a name that no file can have": lambda folder: edit(folder, file="car\0.mp4"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_not_as_it_was_is_not_finished(folder, damage):
    """And can be made anew."""
    make(folder)
    DAMAGE[damage](folder)
    assert not folder.has("car", asked)
    if damage != "a folder in its place":
        make(folder)
        assert folder.has("car", asked)


def test_what_cannot_be_compared_is_not_finished(folder):
    """A picture that was given is not there any more, say."""

    def fits(metadata):
        raise InputError("image a.png: there is no such file")

    make(folder)
    assert not folder.has("car", fits)


def test_a_picture_takes_the_place_of_a_video(folder):
    make(folder)
    make(folder, "bus")
    with pytest.raises(RunError, match="could not be read again"):
        folder.done("car", "car.png", METADATA)  # which is not there: the video stays
    assert listed(folder) == ["bus.json", "bus.mp4", "car.json", "car.mp4"]
    make(folder, suffix=".png")
    assert listed(folder) == ["bus.json", "bus.mp4", "car.json", "car.png"]


# What failed


def test_a_failure_on_record(folder):
    folder.failed("car", InputError("seed=-1: no"))
    assert listed(folder) == ["car.json"]
    record_of_it = {"name": "car", "status": "failed", "kind": "InputError", "error": "seed=-1: no"}
    assert json.loads(record(folder).read_text()) == record_of_it
    assert folder.status("car") == "failed"
    assert not folder.has("car", asked)
    make(folder)
    assert folder.has("car", asked)


def test_a_failure_does_not_cost_what_there_is(folder):
    """A slip in a flag fails every request; once it is corrected, they are as finished as before."""
    make(folder)
    before = record(folder).read_bytes()
    for _ in range(2):
        folder.failed("car", InputError("tp=3"))
        assert folder.status("car") == "failed"
        assert listed(folder) == ["car.json", "car.mp4"]
        assert not folder.has("car", lambda metadata: False)
        assert folder.status("car") == "failed"
    assert folder.has("car", asked)
    assert record(folder).read_bytes() == before


def test_each_writing_of_a_record_has_its_own_stamp(folder):
    stamps = [folder.stamp("car")]
    for _ in range(20):
        folder.failed("car", InputError("no"))
        stamps.append(folder.stamp("car"))
    assert len(set(stamps)) == 21
    assert folder.stamp("car") == stamps[-1]


# What cannot be written


@pytest.mark.parametrize("place", ["a file", "a file/below", "/proc", "/proc/new", "/sys/new", "/dev/null/new", "n\0l"])
def test_a_folder_that_cannot_be_used_is_refused(tmp_path, place):
    (tmp_path / "a file").write_text("")
    with pytest.raises(InputError, match=f"{place.replace(chr(0), '.*')}': no folder that can be written to"):
        OutputFolder(tmp_path / place)
    assert [file.name for file in tmp_path.iterdir()] == ["a file"]


def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(InputError, match=r"could not be locked .*Function not implemented"):
        OutputFolder(tmp_path)


def test_a_folder_where_a_record_should_be_is_refused(folder):
    record(folder).mkdir()
    with pytest.raises(InputError, match=r"car\.json: no file, so that nothing can be put on record there"):
        folder.stamp("car")


@pytest.mark.parametrize("what", ["done", "failed"])
def test_a_full_disk(folder, monkeypatch, what):
    """It is said, and the record that there was is left as it was."""

    def full(path, value):
        path.write_text("{")
        raise OSError(28, "No space left on device")

    make(folder)
    before = record(folder).read_bytes()
    monkeypatch.setattr(output_folder, "write_json", full)
    with pytest.raises(RunError, match=r"car\.json: could not be written .*No space left"):
        make(folder) if what == "done" else folder.failed("car", InputError("no"))
    assert record(folder).read_bytes() == before
    assert listed(folder) == ["car.json", "car.mp4"]


def test_a_file_that_went_away_is_not_put_on_record(folder):
    with pytest.raises(RunError, match=r"car\.mp4: could not be read again"):
        folder.done("car", "car.mp4", METADATA)
    assert listed(folder) == []


def test_a_folder_that_went_away(folder):
    folder.folder.rmdir()
    with pytest.raises(RunError, match="could not be locked"), folder.claimed("car"):
        pass


# Whose it is


def test_one_at_a_time(folder):
    other = OutputFolder(folder.folder)
    with folder.claimed("car") as mine:
        assert mine
        assert listed(folder) == [".claim.car"]
        for again in (folder, other):
            with again.claimed("car") as also:
                assert not also
        with other.claimed("bus") as another:
            assert another
        assert listed(folder) == [".claim.car"]
        assert listed(OutputFolder(folder.folder)) == [".claim.car"]  # a third one starts, and leaves it alone
    assert listed(folder) == []
    with other.claimed("car") as mine:
        assert mine


def test_a_claim_ends_with_what_was_done_under_it(folder):
    with pytest.raises(RuntimeError), folder.claimed("car"):
        raise RuntimeError
    assert listed(folder) == []


HOLDS = """
import sys, time
from pathlib import Path
from cosmos3_jax.folder import beside
from cosmos3_jax.output_folder import OutputFolder

folder = OutputFolder(Path(sys.argv[1]))
with folder.claimed("car") as mine, beside(folder.folder / "car.mp4") as partial:
    partial.write_bytes(b"fra")
    print("holds" if mine else "", flush=True)
    time.sleep(60)
"""


def test_a_killed_process_leaves_nothing_that_lasts(folder):
    """What it held is its own while it lives, and is gone once the next one has started."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, folder.folder], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
    ) as process:
        assert process.stdout.readline() == "holds\n"
        held = listed(folder)
        assert len(held) == 2
        assert all(name.startswith(".") for name in held)
        assert listed(OutputFolder(folder.folder)) == held
        with folder.claimed("car") as mine:
            assert not mine
        process.kill()
        process.wait()
    assert listed(folder) == held
    assert listed(OutputFolder(folder.folder)) == []


def test_a_lock_that_its_last_owner_removed_is_not_taken_for_one(folder, monkeypatch):
    """Between opening a file and locking it, its owner may have removed it: a lock on it would keep nobody out."""
    flock, removed = fcntl.flock, []

    def late(file, how):
        if not removed:
            removed.append(file)
            (folder.folder / ".claim.car").unlink()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with folder.claimed("car") as mine:
        assert mine
        with OutputFolder(folder.folder).claimed("car") as also:
            assert not also
    assert listed(folder) == []


# Files that are whole or not there


def test_a_partial_file_that_was_taken_for_a_left_one(folder, monkeypatch):
    """Another process may start in the moment between making it and locking it."""
    flock, removed = fcntl.flock, []

    def late(file, how):
        if not removed:
            removed.extend(folder.folder.glob(".cosmos3.*"))
            removed[0].unlink()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with beside(folder.folder / "a.json") as partial:
        assert partial not in removed
        OutputFolder(folder.folder)
        write_json(partial, {})
        OutputFolder(folder.folder)
    assert listed(folder) == ["a.json"]


def test_two_write_the_same_file(folder):
    with beside(folder.folder / "a.json") as one, beside(folder.folder / "a.json") as other:
        write_json(one, 1)
        write_json(other, 2)
    assert listed(folder) == ["a.json"]
    assert (folder.folder / "a.json").read_text() == "1\n"  # it was finished last
