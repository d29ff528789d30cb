"""Files that are whole or not there, with what made them, in pictures and in sound."""

import contextlib
import json
import os
import re
import resource
import struct
import subprocess
import tracemalloc
import wave
from collections.abc import Iterator

import cases
import imageio_ffmpeg
import numpy as np
import pytest
from films import encoded, instead, made, noise, smooth
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from cosmos3_jax import make_mesh, media, result_files
from cosmos3_jax.checkpoint import load
from cosmos3_jax.config import TINY, TINY_SOUND, TINY_VAE
from cosmos3_jax.errors import InputError, RunError
from cosmos3_jax.networks import abstract_networks
from cosmos3_jax.pipeline import decode_sound
from cosmos3_jax.published import PublishedWeights

pytestmark = pytest.mark.usefixtures("no_process_is_left")


@pytest.mark.parametrize(("name", "fps"), [("a.mp4", 24.0), ("B.MP4", 12.5)])
def test_a_clip_that_is_read_back(tmp_path, name, fps):
    clip = smooth(9, 48, 80)
    result_files.write(tmp_path / name, clip, fps)
    # yuv420p plays everywhere
    assert re.match(rf"h264 .*, yuv420p\b.*, 80x48\b.*, {fps:g}0* fps\b", streams(tmp_path / name)["Video"])
    frames = np.stack(media.open_clip(tmp_path / name, 100))
    assert frames.shape == clip.shape
    assert np.abs(frames.astype(float) - clip).mean() < 3  # of 255, at quality 8


@pytest.mark.parametrize(("name", "error"), [("a.png", 0), ("a.PNG", 0), ("a.jpg", 8), ("a.jpeg", 8), ("a.webp", 8)])
def test_a_picture_that_is_read_back(tmp_path, name, error):
    picture = smooth(1)
    result_files.write(tmp_path / name, picture, 24)
    np.testing.assert_allclose(np.asarray(media.open_image(tmp_path / name)), picture[0].astype(float), atol=error)


@pytest.mark.parametrize(
    ("name", "count", "reason"),
    [
        ("a.gif", 5, "5 frames cannot be written as .gif; use .mp4$"),
        ("a.png", 5, "5 frames cannot be written as .png; use .mp4$"),
        ("a.txt", 1, "one frame cannot be written as .txt; use .mp4, .png, .jpg, .jpeg, .webp$"),
        ("a", 1, "one frame cannot be written as that; use .mp4"),
        ("no/a.mp4", 5, "the folder .*no does not exist; create it first"),
        ("folder.mp4", 5, "no file can be written there"),
        ("a" * 300 + ".mp4", 5, "no file can be written there"),
        ("a\0.mp4", 5, "no file can be written there"),
    ],
)
def test_where_nothing_can_be_written(tmp_path, name, count, reason):
    (tmp_path / "folder.mp4").mkdir()
    for attempt in (
        lambda: result_files.check_writable(tmp_path / name, count),
        lambda: result_files.write(tmp_path / name, noise(count, 16, 16), 24),
    ):
        with pytest.raises(InputError, match=f"{name}: {reason}"):
            attempt()
    assert [path.name for path in tmp_path.iterdir()] == ["folder.mp4"]


def half_written(path, *_, **__):
    path.write_bytes(b"half")
    raise OSError("no space left on device")


@pytest.mark.parametrize("before", [None, b"a good one"], ids=["new", "existing"])
@pytest.mark.parametrize(("name", "count"), [("a.mp4", 5), ("a.png", 1)])
def test_a_write_that_fails_changes_nothing(tmp_path, monkeypatch, name, count, before):
    path = tmp_path / name
    if before:
        path.write_bytes(before)
    monkeypatch.setattr(result_files, "_encode", half_written)
    monkeypatch.setattr(result_files, "_write_image", half_written)
    with pytest.raises(RunError, match="no space left"):
        result_files.write(path, noise(count, 16, 16), 24)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == ({name: before} if before else {})


def test_an_encoder_that_fails_changes_nothing(tmp_path):
    """yuv420p takes no odd sizes."""
    path = tmp_path / "a.mp4"
    path.write_bytes(b"a good one")
    with pytest.raises(RunError, match=r"a.mp4: could not be written \(ffmpeg ended with \d+: width not divisible by 2"):
        result_files.write(path, noise(5, 31, 31), 24)
    assert path.read_bytes() == b"a good one"


@contextlib.contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """Gives this process and its children so many bytes to a file; not longer than need be: pytest writes to one too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("part", [0, 0.01, 0.3, 0.6, 0.99, 1])
@pytest.mark.parametrize("name", ["a.mp4", "sound.mp4", "a.wav", "a.png", "a.jpg", "a.webp"])
def test_a_disk_that_is_full_changes_nothing(tmp_path, name, part):
    path = tmp_path / name
    frames = noise(1 if path.suffix in result_files.IMAGE_SUFFIXES else 5, 64, 64)
    sound = white(5 / 24, 48000) if name in ("sound.mp4", "a.wav") else None
    result_files.write(path, frames, 24, sound)
    size = path.stat().st_size
    path.write_bytes(b"a good one")
    message = rf"{name}: could not be written \("
    with pytest.raises(RunError, match=message), files_end_at(round(part * (size - 1))):
        result_files.write(path, frames, 24, sound)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {name: b"a good one"}
    with files_end_at(2 * size):
        result_files.write(path, frames, 24, sound)
    assert path.stat().st_size == size


@pytest.mark.parametrize("blocks", [0, 1, 5, 20, 40])
def test_an_ffmpeg_that_cannot_write_fails(tmp_path, monkeypatch, blocks):
    """It hears of it here; above, the signal that comes with the limit ends it."""
    instead(monkeypatch, tmp_path, f'trap "" XFSZ; ulimit -f {blocks}; exec "$FFMPEG" "$@"')
    with pytest.raises(RunError, match=r"a.mp4: could not be written \(ffmpeg ended with \d+: .*File too large"):
        result_files.write(tmp_path / "a.mp4", noise(24, 64, 64), 24)
    assert [path.name for path in tmp_path.iterdir()] == ["ffmpeg.sh"]


def test_an_ffmpeg_that_hides_that_it_cannot_write_fails(tmp_path, monkeypatch):
    """As version 4.2 does, which imageio-ffmpeg brought until 2024."""
    instead(monkeypatch, tmp_path, '"$FFMPEG" "$@"; echo "Error writing trailer of a.mp4: No space left on device" >&2; exit 0')
    with pytest.raises(RunError, match=r"Error writing trailer of a.mp4: No space left on device"):
        result_files.write(tmp_path / "a.mp4", smooth(5), 24)


def test_a_picture_that_its_format_cannot_hold(tmp_path):
    with pytest.raises(RunError, match=r"a.webp: could not be written \(.*16383"):
        result_files.write(tmp_path / "a.webp", np.zeros((1, 1, 17_000, 3), np.uint8), 24)
    assert list(tmp_path.iterdir()) == []


def test_frames_need_not_lie_in_a_row(tmp_path):
    clip = smooth(9)
    result_files.write(tmp_path / "a.mp4", clip[::-2, ::-1], 24)
    result_files.write(tmp_path / "b.mp4", np.ascontiguousarray(clip[::-2, ::-1]), 24)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_frames_are_not_copied(tmp_path):
    clip = np.zeros((20, 256, 256, 3), np.uint8)
    result_files.write(tmp_path / "a.mp4", clip[:1], 24)
    tracemalloc.start()
    try:
        result_files.write(tmp_path / "a.mp4", clip, 24)
        assert tracemalloc.get_traced_memory()[1] < clip.nbytes / 4
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["http:/a.mp4", "a%03d.mp4", "-y.mp4", "a b'c.mp4", "pipe:.mp4", "ä😀.mp4"])
def test_names_that_mean_more_to_ffmpeg(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "http:").mkdir()
    path = media.Path(name)
    result_files.write(path, smooth(5), 24, white(5 / 24, 48000), {"a": 1})
    assert len(media.open_clip(path, 9)) == 5
    assert media.read_metadata(path) == {"a": 1}


# Metadata


METADATA = [
    {},
    {"prompt": "a ball", "seed": 2**70, "steps": [1, None, 1.5, {"deep": True}]},
    {"a=b;c#d\\e": "=;#\\\n\r\t\"' \0 é😀 \ud800 [STREAM]\ncomment=no\n;FFMETADATA1\\"},
    {"prompt": 50_000 * "x\n=;"},
    {"prompt": 250_000 * "é#\\\n"},
]


def size_of(value) -> str:
    return f"{len(json.dumps(value))} characters"


@pytest.mark.parametrize("metadata", METADATA, ids=size_of)
@pytest.mark.parametrize("name", ["a.mp4", "A.MP4", "sound.mp4", "a.png", "A.PNG"])
def test_metadata_is_read_back(tmp_path, name, metadata):
    path = tmp_path / name
    sound = white(1 / 24, 48000) if name == "sound.mp4" else None
    result_files.write(path, smooth(1), 24, sound, metadata)
    assert media.read_metadata(path) == metadata
    if path.suffix.lower() == ".png":
        with Image.open(path) as file:
            assert json.loads(file.text["comment"]) == metadata
    else:
        assert json.dumps(metadata).encode("ascii") in path.read_bytes()
        assert ("Audio" in streams(path)) == (sound is not None)
        assert len(media.open_clip(path, 5)) == 1


@pytest.mark.parametrize("name", ["a.mp4", "a.png", "a.jpg", "a.webp", "a.wav"])
@pytest.mark.parametrize("metadata", [None, {"prompt": "a ball"}])
def test_the_same_makes_the_same_file(tmp_path, name, metadata):
    made_twice = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        sound = white(1 / 24, 48000) if name in ("a.mp4", "a.wav") else None
        result_files.write(tmp_path / folder / name, smooth(1), 24, sound, metadata)
        made_twice.append((tmp_path / folder / name).read_bytes())
    assert made_twice[0] == made_twice[1]
    assert (b"a ball" in made_twice[0]) == (metadata is not None and name in ("a.mp4", "a.png"))


def test_metadata_changes_no_frame(tmp_path):
    result_files.write(tmp_path / "a.mp4", smooth(9), 24)
    result_files.write(tmp_path / "b.mp4", smooth(9), 24, None, {"prompt": "a ball"})
    assert boxes((tmp_path / "a.mp4").read_bytes(), "mdat") == boxes((tmp_path / "b.mp4").read_bytes(), "mdat")


def commented(text: str) -> bytes:
    info = PngInfo()
    info.add_text("comment", text)
    return encoded("PNG", pnginfo=info)


@pytest.mark.parametrize(
    "content",
    [b"", b"no picture", encoded("PNG"), encoded("GIF", comment=b"{}"), *map(commented, ("no", "[1]", "{", "", 10_000 * "["))],
)
def test_pictures_without_metadata(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(InputError, match=r"^file .*a.png: (holds no metadata; an .mp4 or .png|not a readable image)"):
        media.read_metadata(tmp_path / "a.png")


@pytest.mark.parametrize("tag", [None, "comment=no", "comment={", "comment=[1]", "comment={\n}", "title={}"])
def test_clips_without_metadata(tmp_path, capfd, tag):
    made(tmp_path / "a.mp4", *(["-metadata", tag] if tag else []))
    with pytest.raises(InputError, match=r"^file .*a.mp4: holds no metadata; an .mp4 or .png that this project wrote is expe"):
        media.read_metadata(tmp_path / "a.mp4")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["a.mp4", "a.jpg", "a", "b.mp4"])
def test_files_without_metadata(tmp_path, name):
    (tmp_path / "a.mp4").write_bytes(b"no clip")
    (tmp_path / "a.jpg").write_bytes(encoded("JPEG"))
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(InputError, match=rf"^file .*{name}: (holds no metadata|there is no such file)"):
        media.read_metadata(tmp_path / name)


def test_a_file_is_replaced_and_open_to_others(tmp_path):
    """As the umask has it; the temporary file was private."""
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    umask = os.umask(0o027)
    try:
        result_files.write(path, noise(1, 16, 16), 24)
    finally:
        assert os.umask(umask) == 0o027  # left as it was
    assert path.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [path]


# Sound


def white(seconds: float, sample_rate: int, channels: int = 2) -> result_files.Sound:
    """White noise, which no encoder likes."""
    samples = np.random.RandomState(1).standard_normal((channels, round(seconds * sample_rate)))
    return result_files.Sound((0.2 * samples).astype(np.float32), sample_rate)


def heard(path) -> np.ndarray:
    """What a file's sound decodes to, [channels, samples]."""
    channels = {"mono": 1, "stereo": 2}[re.search(r"Hz, (\w+)", streams(path)["Audio"])[1]]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", path, "-map", "0:a:0", "-f", "f32le", "-"]
    decoded = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True).stdout
    return np.frombuffer(decoded, "<f4").reshape(-1, channels).T


def streams(path) -> dict[str, str]:
    """What ffmpeg says of the streams of a file, by their kind, which must be one each."""
    shown = subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-i", path], stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    found = re.findall(r"Stream #\S+ (\w+): (.*)", shown.stderr.decode())
    assert len(dict(found)) == len(found)
    return dict(found)


def boxes(data: bytes, *path: str) -> list[bytes]:
    """The contents of the boxes of an MP4 file at `path`; with "*" last, their names."""
    found, start = [], 0
    while start < len(data):
        size, kind = struct.unpack(">I4s", data[start : start + 8])
        assert size >= 8
        if path[0] == "*":
            found.append(kind)
        elif kind == path[0].encode():
            content = data[start + 8 : start + size]
            found += boxes(content, *path[1:]) if path[1:] else [content]
        start += size
    return found


def durations(path) -> list[float]:
    """The seconds for which each track of a file is shown; that of AAC is cut to what was put in, with its priming."""
    data = path.read_bytes()
    (header,) = boxes(data, "moov", "mvhd")
    assert header[0] == 0
    (units,) = struct.unpack(">I", header[12:16])
    tracks = [struct.unpack(">I", box[20:24])[0] / units for box in boxes(data, "moov", "trak", "tkhd")]
    edits = [struct.unpack(">I", box[8:12])[0] / units for box in boxes(data, "moov", "trak", "edts", "elst")]
    assert edits == tracks
    return tracks


def lag(x: np.ndarray, y: np.ndarray) -> int:
    """By how many samples the first channel of `y` comes after that of `x`."""
    n = min(x.shape[1], y.shape[1])
    spectrum = np.conj(np.fft.rfft(x[0, :n], 2 * n)) * np.fft.rfft(y[0, :n], 2 * n)
    return int((np.argmax(np.fft.irfft(spectrum)) + n) % (2 * n) - n)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("sample_rate", [8000, 44100, 48000])
def test_a_video_has_one_picture_and_one_sound(tmp_path, sample_rate, channels):
    path = tmp_path / "a.mp4"
    result_files.write(path, smooth(13), 24, white(13 / 24, sample_rate, channels))
    found = streams(path)
    assert set(found) == {"Video", "Audio"}
    assert re.match(r"h264 .*yuv420p", found["Video"])
    assert re.match(rf"aac .*, {sample_rate} Hz, {['mono', 'stereo'][channels - 1]}", found["Audio"])
    assert len(media.open_clip(path, 100)) == 13
    kinds = boxes(path.read_bytes(), "*")
    assert kinds.index(b"moov") < kinds.index(b"mdat")  # plays while it loads


def test_a_video_without_sound_has_none(tmp_path):
    result_files.write(tmp_path / "a.mp4", smooth(5), 24)
    assert set(streams(tmp_path / "a.mp4")) == {"Video"}


@pytest.mark.parametrize("sample_rate", [8000, 48000])
@pytest.mark.parametrize("fps", [12.0, 24.0, 30.0, 23.976])
def test_sound_is_as_long_as_the_video(tmp_path, fps, sample_rate):
    for count in (1, 5, 9, 25, 49):
        result_files.write(tmp_path / "a.mp4", smooth(1).repeat(count, axis=0), fps, white(count / fps, sample_rate))
        shown, played = durations(tmp_path / "a.mp4")
        assert abs(shown - count / fps) < 0.002  # in thousandths of a second
        assert abs(played - shown) < 1 / fps
        # all of it, and of the last AAC frame no more than a video frame's time
        assert -1 <= heard(tmp_path / "a.mp4").shape[1] - count / fps * sample_rate < result_files.AAC_FRAME


@pytest.mark.parametrize("count", [1, 5, 49])
@pytest.mark.parametrize("sample_rate", [8000, 16000, 24000, 44100, 48000])
def test_white_noise_that_is_heard_again(tmp_path, sample_rate, count):
    noise = white(count / 24, sample_rate)
    result_files.write(tmp_path / "a.mp4", smooth(1).repeat(count, axis=0), 24, noise)
    same(heard(tmp_path / "a.mp4"), noise.wave_cn)


def same(x: np.ndarray, wave_cn: np.ndarray) -> None:
    n = wave_cn.shape[1]
    assert len(x) == len(wave_cn)
    assert lag(wave_cn, x) == 0
    for channel, expected in zip(x, wave_cn, strict=True):
        assert np.corrcoef(channel[:n], expected)[0, 1] > 0.99  # at six bits a sample
        assert 0.9 < channel[:n].std() / expected.std() < 1.05  # what is above its highest frequency is lost


def test_the_sound_of_random_weights_is_heard_again(tmp_path, folders):
    networks = abstract_networks(TINY, TINY_VAE, make_mesh(), "float32", TINY_SOUND)
    decoder = load(PublishedWeights(folders("small"), TINY), "sound", networks.sound)
    noise = result_files.Sound(
        np.asarray(decode_sound(decoder, cases.sound_latents(50))).T, TINY_SOUND.sampling_rate
    )  # two seconds
    result_files.write(tmp_path / "a.mp4", smooth(1).repeat(48, axis=0), 24, noise)
    same(heard(tmp_path / "a.mp4"), noise.wave_cn)


@pytest.mark.parametrize("factor", [0.1, 0.5, 2.0])
def test_sound_of_another_length_is_cut_or_goes_on_in_silence(tmp_path, factor):
    seconds, rate = 25 / 24, 48000
    noise, long = white(factor * seconds, rate), round(seconds * rate)
    result_files.write(tmp_path / "a.mp4", smooth(1).repeat(25, axis=0), 24, noise)
    decoded, given = heard(tmp_path / "a.mp4"), min(long, noise.wave_cn.shape[1])
    assert 0 <= decoded.shape[1] - long < result_files.AAC_FRAME
    same(decoded[:, :given], noise.wave_cn[:, :given])
    silence = decoded[:, given + result_files.AAC_FRAME : long]  # an AAC frame may carry an echo of what came before
    assert np.abs(silence).max(initial=0) < 0.01


def test_a_sample_rate_that_aac_lacks_is_raised(tmp_path):
    noise = white(1, 10000)
    result_files.write(tmp_path / "a.mp4", smooth(1).repeat(24, axis=0), 24, noise)
    assert "11025 Hz" in streams(tmp_path / "a.mp4")["Audio"]
    assert abs(heard(tmp_path / "a.mp4").shape[1] - 11025) < result_files.AAC_FRAME
    result_files.write(tmp_path / "a.wav", smooth(1), 24, noise)
    with wave.open(str(tmp_path / "a.wav")) as file:
        assert file.getframerate() == 10000


def pcm(path) -> tuple[np.ndarray, int]:
    """The waveform of a .wav and its sample rate, as the standard library reads them."""
    with wave.open(str(path)) as file:
        assert (file.getsampwidth(), file.getcomptype()) == (2, "NONE")
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2").reshape(-1, file.getnchannels())
        return samples.T / 32767, file.getframerate()


@pytest.mark.parametrize(("name", "sample_rate", "channels"), [("a.wav", 48000, 2), ("B.WAV", 8000, 1), ("a.wav", 16000, 3)])
def test_a_wav_that_is_read_back(tmp_path, name, sample_rate, channels):
    noise = white(0.7, sample_rate, channels)  # as long as it is, whatever the video
    result_files.write(tmp_path / name, smooth(9), 24, noise)
    found, rate = pcm(tmp_path / name)
    assert rate == sample_rate
    np.testing.assert_allclose(found, np.clip(noise.wave_cn, -1, 1), atol=0.5001 / 32767)


def test_loud_sound_is_clipped(tmp_path):
    """And does not go over from the highest value to the lowest."""
    loud = result_files.Sound(5 * white(1, 48000).wave_cn, 48000)
    clipped = np.clip(loud.wave_cn, -1, 1)
    assert (np.abs(clipped) == 1).mean() > 0.2
    result_files.write(tmp_path / "a.wav", smooth(1), 24, loud)
    np.testing.assert_allclose(pcm(tmp_path / "a.wav")[0], clipped, atol=0.5001 / 32767)
    result_files.write(tmp_path / "a.mp4", smooth(1).repeat(24, axis=0), 24, loud)
    same(heard(tmp_path / "a.mp4"), clipped)


def tone(hertz: float, loudness: float, channels: int = 2) -> result_files.Sound:
    """A second of a sine."""
    wave_n = loudness * np.sin(2 * np.pi * hertz * np.arange(48000) / 48000, dtype=np.float32)
    return result_files.Sound(np.broadcast_to(wave_n, (channels, 48000)), 48000)


@pytest.mark.parametrize("loudness", [0.01, 0.3, 0.9])
@pytest.mark.parametrize("hertz", [110, 223, 1003])
def test_a_tone_that_is_heard_again(tmp_path, hertz, loudness):
    """All its strength is in one place of the spectrum, where an encoder may have no numbers for it."""
    result_files.write(tmp_path / "a.mp4", smooth(1).repeat(24, axis=0), 24, tone(hertz, loudness))
    found, expected = heard(tmp_path / "a.mp4")[:, :48000], tone(hertz, loudness).wave_cn
    assert abs(found.std() / expected.std() - 1) < 0.05
    assert np.corrcoef(found[0], expected[0])[0, 1] > 0.99


def test_sound_is_not_taken_for_another_kind_of_file(tmp_path):
    """Every 192 bytes the same: ffmpeg would rather believe in MPEG-TS, whose packets begin with 0x47, than in a .wav."""
    period = np.zeros((2, 48), np.float32)
    period[:, 0] = 0x0147 / 32767, 0x1000 / 32767
    click = result_files.Sound(np.tile(period, 1000), 48000)
    result_files.write(tmp_path / "a.mp4", smooth(1).repeat(24, axis=0), 24, click)
    same(heard(tmp_path / "a.mp4"), click.wave_cn)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["a.mp4", "a.wav"])
def test_sound_that_is_no_number_is_refused(tmp_path, name, value):
    noise = white(5 / 24, 8000)
    noise.wave_cn[1, 77] = value
    with pytest.raises(RunError, match=f"{name}: the sound has values that are no numbers$"):
        result_files.write(tmp_path / name, smooth(5), 24, noise)
    assert list(tmp_path.iterdir()) == []


def half_of_it(folder, sound, encode=result_files._encode_sound):
    return encode(folder, result_files.Sound(sound.wave_cn[:, :25000], sound.sample_rate))


@pytest.mark.parametrize("before", [None, b"a good one"], ids=["new", "existing"])
@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("_pcm", lambda sound, pcm=result_files._pcm: pcm(sound)[:20_000]),
        ("_pcm", lambda sound, pcm=result_files._pcm: 2 * pcm(sound)),
        ("_encode_sound", half_of_it),
    ],
    ids=["too little encoded", "too much encoded", "half of it beside the video"],
)
def test_sound_that_fails_changes_nothing(tmp_path, monkeypatch, capfd, name, instead, before):
    path = tmp_path / "a.mp4"
    if before:
        path.write_bytes(before)
    monkeypatch.setattr(result_files, name, instead)
    with pytest.raises(RunError, match=r"a.mp4: could not be written \(ffmpeg wrote \d+ of 50000 samples of sound"):
        result_files.write(path, smooth(25), 24, white(25 / 24, 48000))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == ({"a.mp4": before} if before else {})


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("name", ["a.mp4", "A.WAV"])
def test_where_sound_can_be_written(tmp_path, name, count):
    result_files.check_writable(tmp_path / name, count, has_sound=True)


@pytest.mark.parametrize(
    ("name", "count", "has_sound", "reason"),
    [
        ("a.png", 1, True, "one frame with sound cannot be written as .png; use .mp4, .wav$"),
        ("a.mp3", 5, True, "5 frames with sound cannot be written as .mp3; use .mp4, .wav$"),
        ("a", 5, True, "5 frames with sound cannot be written as that; use .mp4, .wav$"),
        ("a.wav", 5, False, "5 frames cannot be written as .wav; use .mp4$"),
        ("a.wav", 1, False, "one frame cannot be written as .wav; use .mp4, .png, .jpg, .jpeg, .webp$"),
        ("no/a.wav", 5, True, "the folder .*no does not exist; create it first"),
    ],
)
def test_where_no_sound_can_be_written(tmp_path, name, count, has_sound, reason):
    for attempt in (
        lambda: result_files.check_writable(tmp_path / name, count, has_sound=has_sound),
        lambda: result_files.write(tmp_path / name, smooth(count), 24, white(0.1, 8000) if has_sound else None),
    ):
        with pytest.raises(InputError, match=f"{name}: {reason}"):
            attempt()
    assert list(tmp_path.iterdir()) == []
