"""Pictures and clips as arrays, and files that are whole or not there."""

import io
import os
import re
import struct
import subprocess
import wave

import cases
import imageio.v3 as imageio
import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from cosmos3_jax import make_mesh, media
from cosmos3_jax.checkpoint import BUILT_IN, load
from cosmos3_jax.config import TINY, TINY_SOUND, TINY_VAE
from cosmos3_jax.errors import InputError
from cosmos3_jax.networks import abstract_networks
from cosmos3_jax.pipeline import decode_sound
from cosmos3_jax.published import PublishedWeights

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # imageio leaves its pipes to the collector
LEVEL = 2 / 255  # one uint8 level in [-1, 1]


def noise(*shape: int) -> np.ndarray:
    return np.random.RandomState(0).randint(0, 256, (*shape, 3)).astype(np.uint8)


def smooth(count: int, height: int = 32, width: int = 48) -> np.ndarray:
    """A clip that H.264 keeps: frame i is gray level 20 i, with a soft ramp of colours across."""
    ramp = np.linspace(0, 40, width)[None, None, :, None] * np.array([1.0, 0.5, 0.0])
    return np.broadcast_to(20.0 * np.arange(count)[:, None, None, None] + ramp, (count, height, width, 3)).astype(np.uint8)


# As the reference does it


@pytest.mark.parametrize(("height", "width"), cases.SIZES)
def test_conditioning_is_the_reference_to_the_bit(goldens, height, width):
    expected = goldens("media")
    np.testing.assert_array_equal(media.fit_image(cases.IMAGE, height, width), expected[f"image_{height}x{width}"])
    np.testing.assert_array_equal(media.fit_clip(cases.CLIP[:1], height, width), expected[f"clip_{height}x{width}"])


# Pictures to arrays


@pytest.mark.parametrize(
    "convention",
    [
        lambda x: x,
        lambda x: x.astype(int),
        lambda x: x.astype(float),
        lambda x: x / 255,
        lambda x: x / 127.5 - 1,
        lambda x: (x / 255).astype(np.float32),
        Image.fromarray,
    ],
    ids=["uint8", "int", "float 255", "float 1", "float -1 1", "float32", "PIL"],
)
def test_a_picture_of_the_asked_size_stays_as_it_is(convention):
    picture = noise(32, 48)
    fitted = media.fit_image(convention(picture), 32, 48)
    assert fitted.dtype == np.float32
    np.testing.assert_array_equal(fitted, picture / np.float32(127.5) - 1)


SIZES = [(32, 48), (100, 150), (33, 200), (200, 33), (7, 5)]


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("value", [0, 1, 100, 255])
def test_fit_image_keeps_a_constant(height, width, value):
    fitted = media.fit_image(np.full((height, width, 3), value, np.uint8), 48, 64)
    np.testing.assert_array_equal(fitted, np.full((48, 64, 3), value / np.float32(127.5) - 1, np.float32))


@pytest.mark.parametrize("height", [24, 32, 48, 96, 200])  # an even number of columns is cut off
def test_fit_image_keeps_a_symmetry(height):
    half = noise(height, 100)
    fitted = media.fit_image(np.concatenate([half, half[:, ::-1]], axis=1), 48, 64)
    # a level: positions in float32 are not symmetric to the last bit, and that decides a rounding
    np.testing.assert_allclose(fitted, fitted[:, ::-1], atol=1.01 * LEVEL)


@pytest.mark.parametrize("axis", [0, 1])
def test_fit_image_crops_at_the_centre(axis):
    picture = np.moveaxis(noise(56, 16), 0, axis)
    centre = np.moveaxis(np.moveaxis(picture, axis, 0)[20:36], 0, axis)
    np.testing.assert_array_equal(media.fit_image(picture, 16, 16), media.fit_image(centre, 16, 16))


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_fit_image_covers(height, width):
    """Against Pillow's filter, which is the same up to a rounding: resized to cover, cropped at the centre."""
    picture = noise(height, width)
    scale = max(48 / height, 64 / width)
    rows, columns = np.ceil([scale * height, scale * width]).astype(int).tolist()
    covering = Image.fromarray(picture).resize((columns, rows), Image.Resampling.BILINEAR)
    top, left = round((rows - 48) / 2), round((columns - 64) / 2)
    cropped = np.asarray(covering.crop((left, top, left + 64, top + 48)))
    np.testing.assert_allclose(media.fit_image(picture, 48, 64), cropped / 127.5 - 1, atol=1.01 * LEVEL)


# Clips to arrays


def test_a_clip_is_stretched_by_pillow():
    clip = noise(3, 40, 50)
    pictures = [Image.fromarray(frame) for frame in clip]
    stretched = np.stack([np.asarray(picture.resize((64, 32), Image.Resampling.BILINEAR)) for picture in pictures])
    for frames in (clip, list(clip), pictures):
        fitted = media.fit_clip(frames, 32, 64)
        assert fitted.dtype == np.float32
        np.testing.assert_allclose(fitted, stretched / 127.5 - 1, atol=1e-6)  # divided by 255 and doubled, in float32


def test_floats_take_their_nearest_pixels():
    clip = np.random.RandomState(0).random_sample((2, 8, 6, 3)).astype(np.float32)
    larger = clip.repeat(2, axis=1).repeat(3, axis=2)
    np.testing.assert_array_equal(media.fit_clip(clip, 16, 18), 2 * larger - 1)
    np.testing.assert_array_equal(media.fit_clip(larger, 8, 6), 2 * clip - 1)


def test_floats_below_zero_are_taken_as_they_are():
    clip = np.random.RandomState(0).uniform(-1, 1, (2, 8, 6, 3)).astype(np.float32)
    np.testing.assert_array_equal(media.fit_clip(clip, 8, 6), clip)


@pytest.mark.parametrize(
    ("fit", "what", "shape"),
    [
        (fit, what, shape)
        for fit, what, shapes in (
            (media.fit_image, "image", [(8, 6), (8, 6, 4), (0, 6, 3), (1, 8, 6, 3)]),
            (media.fit_clip, "video", [(8, 6, 3), (2, 8, 6, 4), (0, 8, 6, 3)]),
        )
        for shape in shapes
    ],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_arrays_of_another_shape_are_refused(fit, what, shape, dtype):
    with pytest.raises(
        InputError, match=rf"^{what}: PIL images, or an array .* expected, not \[{', '.join(map(str, shape))}\] of "
    ):
        fit(np.zeros(shape, dtype), 16, 16)


@pytest.mark.parametrize(
    "clip",
    [[], [noise(8, 6), noise(9, 6)], [Image.new("RGB", (6, 8)), noise(9, 6)], Image.new("RGB", (6, 8)), 7],
    ids=["empty", "arrays", "mixed", "picture", "number"],
)
def test_lists_that_are_no_clip_are_refused(clip):
    with pytest.raises(InputError, match=r"^video: "):
        media.fit_clip(clip, 16, 16)


def test_a_strip_of_an_image_is_cut_before_it_is_resized():
    """It would be 80 x 4,800,000; only the part that is kept is made."""
    assert media.fit_image(np.full((1, 100_000, 3), 255, np.uint8), 48, 80).min() == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, 256.0, -2.0])
def test_arrays_of_other_values_are_refused(value):
    with pytest.raises(InputError, match=r"^image: integers in \[0, 255\], or floats"):
        media.fit_image(np.full((8, 6, 3), value), 16, 16)
    with pytest.raises(InputError, match=r"^video: .*floats in \[0, 1\] or \[-1, 1\]"):
        media.fit_clip(np.full((2, 8, 6, 3), value), 16, 16)


# Files to pictures and clips


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [(1, lambda x: x), (2, np.fliplr), (3, lambda x: np.rot90(x, 2)), (6, lambda x: np.rot90(x, -1)), (8, np.rot90)],
)
def test_a_photograph_is_turned_upright(tmp_path, orientation, upright):
    picture = noise(8, 6)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(media.open_image(tmp_path / "a.png")), upright(picture))


@pytest.mark.parametrize(
    ("mode", "options"),
    [("L", {}), ("1", {}), ("LA", {}), ("RGBA", {}), ("P", {}), ("P", {"transparency": 0}), ("P", {"transparency": b"\0\x80"})],
)
def test_every_kind_of_png_has_its_colours(tmp_path, mode, options):
    """What is transparent keeps the colour that is stored for it."""
    picture = Image.fromarray(noise(16, 16))
    picture = picture.quantize(8) if mode == "P" else picture.convert(mode)
    if mode == "RGBA":
        picture.putalpha(Image.fromarray(noise(16, 16)[..., 0]))
    picture.save(tmp_path / "a.png", **options)
    np.testing.assert_array_equal(np.asarray(media.open_image(tmp_path / "a.png")), np.asarray(picture.convert("RGB")))


def png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(noise(16, 16)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [b"", b"no picture, no clip", png()[:200], re.sub(rb".IDAT", b"\0IDAT", png(), flags=re.DOTALL)],
    ids=["empty", "text", "truncated", "wrong length of a chunk"],
)
def test_a_file_that_is_no_image(tmp_path, content):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"^image {path}: not a readable image; PNG, JPEG or WebP is expected"):
        media.open_image(path)


@pytest.mark.parametrize("content", [b"", b"no picture, no clip"], ids=["empty", "text"])
def test_a_file_that_is_no_clip(tmp_path, content):
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"^video {path}: not a readable video; MP4 with H.264 is expected$"):
        media.open_clip(path, 5)


def test_a_clip_without_frames(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").touch()
    monkeypatch.setattr(media.imageio, "imiter", lambda *_, **__: (frame for frame in ()))
    with pytest.raises(InputError, match=r"^video .*a.mp4: it has no frames$"):
        media.open_clip(tmp_path / "a.mp4", 5)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(InputError, match=r"^image .*a.png: there is no such file$"):
        media.open_image(tmp_path / "a.png")
    for path in (tmp_path / "a.mp4", tmp_path):
        with pytest.raises(InputError, match=rf"^video {path}: there is no such file$"):
            media.open_clip(path, 5)


@pytest.mark.parametrize(("count", "keep", "taken"), [(3, "first", [0, 1, 2]), (3, "last", [4, 5, 6]), (9, "last", range(7))])
def test_open_clip_takes_an_end(tmp_path, count, keep, taken):
    clip = smooth(7)
    media.write(tmp_path / "a.mp4", clip, 24)
    frames = np.stack(media.open_clip(tmp_path / "a.mp4", count, keep))
    assert len(frames) == len(taken)
    # frames are 20 levels apart; H.264 and its colours are a few off
    np.testing.assert_allclose(frames.astype(float).mean((1, 2)), clip[list(taken)].astype(float).mean((1, 2)), atol=5)


# Arrays to files


@pytest.mark.filterwarnings("ignore:.*fork:RuntimeWarning")  # of imageio beside JAX
@pytest.mark.parametrize(("name", "fps"), [("a.mp4", 24.0), ("B.MP4", 12.5)])
def test_a_clip_that_is_read_back(tmp_path, name, fps):
    clip = smooth(9, 48, 80)
    media.write(tmp_path / name, clip, fps)
    found = imageio.immeta(tmp_path / name, plugin="FFMPEG")
    assert (found["codec"], found["size"], found["fps"]) == ("h264", (80, 48), fps)
    assert found["pix_fmt"].startswith("yuv420p")  # plays everywhere
    frames = np.stack(media.open_clip(tmp_path / name, 100))
    assert frames.shape == clip.shape
    assert np.abs(frames.astype(float) - clip).mean() < 3  # of 255, at quality 8


@pytest.mark.parametrize(("name", "error"), [("a.png", 0), ("a.PNG", 0), ("a.jpg", 8), ("a.jpeg", 8), ("a.webp", 8)])
def test_a_picture_that_is_read_back(tmp_path, name, error):
    picture = smooth(1)
    media.write(tmp_path / name, picture, 24)
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
        lambda: media.check_writable(tmp_path / name, count),
        lambda: media.write(tmp_path / name, noise(count, 16, 16), 24),
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
    monkeypatch.setattr(media.imageio, "imwrite", half_written)
    monkeypatch.setattr(Image.Image, "save", lambda self, path, **_: half_written(path))
    with pytest.raises(InputError, match="no space left"):
        media.write(path, noise(count, 16, 16), 24)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == ({name: before} if before else {})


def test_an_encoder_that_fails_changes_nothing(tmp_path):
    """yuv420p takes no odd sizes: ffmpeg says so when it is closed, and imageio does not."""
    path = tmp_path / "a.mp4"
    path.write_bytes(b"a good one")
    with pytest.raises(InputError, match="ffmpeg wrote 0 of 5 frames"):
        media.write(path, noise(5, 31, 31), 24)
    assert path.read_bytes() == b"a good one"


def test_a_file_is_replaced_and_open_to_others(tmp_path):
    """As the umask has it; the temporary file was private."""
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    umask = os.umask(0o027)
    try:
        media.write(path, noise(1, 16, 16), 24)
    finally:
        assert os.umask(umask) == 0o027  # left as it was
    assert path.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [path]


# Arrays to files: sound


def white(seconds: float, sample_rate: int, channels: int = 2) -> media.Sound:
    """White noise, which no encoder likes."""
    samples = np.random.RandomState(1).standard_normal((channels, round(seconds * sample_rate)))
    return media.Sound((0.2 * samples).astype(np.float32), sample_rate)


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
    media.write(path, smooth(13), 24, white(13 / 24, sample_rate, channels))
    found = streams(path)
    assert set(found) == {"Video", "Audio"}
    assert re.match(r"h264 .*yuv420p", found["Video"])
    assert re.match(rf"aac .*, {sample_rate} Hz, {['mono', 'stereo'][channels - 1]}", found["Audio"])
    assert len(media.open_clip(path, 100)) == 13
    kinds = boxes(path.read_bytes(), "*")
    assert kinds.index(b"moov") < kinds.index(b"mdat")  # plays while it loads


def test_a_video_without_sound_has_none(tmp_path):
    media.write(tmp_path / "a.mp4", smooth(5), 24)
    assert set(streams(tmp_path / "a.mp4")) == {"Video"}


@pytest.mark.parametrize("sample_rate", [8000, 48000])
@pytest.mark.parametrize("fps", [12.0, 24.0, 30.0, 23.976])
def test_sound_is_as_long_as_the_video(tmp_path, fps, sample_rate):
    for count in (1, 5, 9, 25, 49):
        media.write(tmp_path / "a.mp4", smooth(1).repeat(count, axis=0), fps, white(count / fps, sample_rate))
        shown, played = durations(tmp_path / "a.mp4")
        assert abs(shown - count / fps) < 0.002  # in thousandths of a second
        assert abs(played - shown) < 1 / fps
        # all of it, and of the last AAC frame no more than a video frame's time
        assert -1 <= heard(tmp_path / "a.mp4").shape[1] - count / fps * sample_rate < media.AAC_FRAME


@pytest.mark.parametrize("count", [1, 5, 49])
@pytest.mark.parametrize("sample_rate", [8000, 16000, 24000, 44100, 48000])
def test_white_noise_that_is_heard_again(tmp_path, sample_rate, count):
    noise = white(count / 24, sample_rate)
    media.write(tmp_path / "a.mp4", smooth(1).repeat(count, axis=0), 24, noise)
    same(heard(tmp_path / "a.mp4"), noise.wave_cn)


def same(x: np.ndarray, wave_cn: np.ndarray) -> None:
    n = wave_cn.shape[1]
    assert len(x) == len(wave_cn)
    assert lag(wave_cn, x) == 0
    for channel, expected in zip(x, wave_cn, strict=True):
        assert np.corrcoef(channel[:n], expected)[0, 1] > 0.99  # at six bits a sample
        assert 0.9 < channel[:n].std() / expected.std() < 1.05  # what is above its highest frequency is lost


def test_the_built_in_checkpoints_sound_is_heard_again(tmp_path):
    decoder = load(
        PublishedWeights(BUILT_IN, TINY), "sound", abstract_networks(TINY, TINY_VAE, make_mesh(), "float32", TINY_SOUND).sound
    )
    noise = media.Sound(np.asarray(decode_sound(decoder, cases.sound_latents(50))).T, TINY_SOUND.sampling_rate)  # two seconds
    media.write(tmp_path / "a.mp4", smooth(1).repeat(48, axis=0), 24, noise)
    same(heard(tmp_path / "a.mp4"), noise.wave_cn)


@pytest.mark.parametrize("factor", [0.1, 0.5, 2.0])
def test_sound_of_another_length_is_cut_or_goes_on_in_silence(tmp_path, factor):
    seconds, rate = 25 / 24, 48000
    noise, long = white(factor * seconds, rate), round(seconds * rate)
    media.write(tmp_path / "a.mp4", smooth(1).repeat(25, axis=0), 24, noise)
    decoded, given = heard(tmp_path / "a.mp4"), min(long, noise.wave_cn.shape[1])
    assert 0 <= decoded.shape[1] - long < media.AAC_FRAME
    same(decoded[:, :given], noise.wave_cn[:, :given])
    silence = decoded[:, given + media.AAC_FRAME : long]  # an AAC frame may carry an echo of what came before
    assert np.abs(silence).max(initial=0) < 0.01


def test_a_sample_rate_that_aac_lacks_is_raised(tmp_path):
    noise = white(1, 10000)
    media.write(tmp_path / "a.mp4", smooth(1).repeat(24, axis=0), 24, noise)
    assert "11025 Hz" in streams(tmp_path / "a.mp4")["Audio"]
    assert abs(heard(tmp_path / "a.mp4").shape[1] - 11025) < media.AAC_FRAME
    media.write(tmp_path / "a.wav", smooth(1), 24, noise)
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
    media.write(tmp_path / name, smooth(9), 24, noise)
    found, rate = pcm(tmp_path / name)
    assert rate == sample_rate
    np.testing.assert_allclose(found, np.clip(noise.wave_cn, -1, 1), atol=0.5001 / 32767)


def test_loud_sound_is_clipped(tmp_path):
    """And does not go over from the highest value to the lowest."""
    loud = media.Sound(5 * white(1, 48000).wave_cn, 48000)
    clipped = np.clip(loud.wave_cn, -1, 1)
    assert (np.abs(clipped) == 1).mean() > 0.2
    media.write(tmp_path / "a.wav", smooth(1), 24, loud)
    np.testing.assert_allclose(pcm(tmp_path / "a.wav")[0], clipped, atol=0.5001 / 32767)
    media.write(tmp_path / "a.mp4", smooth(1).repeat(24, axis=0), 24, loud)
    same(heard(tmp_path / "a.mp4"), clipped)


def tone(hertz: float, loudness: float, channels: int = 2) -> media.Sound:
    """A second of a sine."""
    wave_n = loudness * np.sin(2 * np.pi * hertz * np.arange(48000) / 48000, dtype=np.float32)
    return media.Sound(np.broadcast_to(wave_n, (channels, 48000)), 48000)


@pytest.mark.parametrize("loudness", [0.01, 0.3, 0.9])
@pytest.mark.parametrize("hertz", [110, 223, 1003])
def test_a_tone_that_is_heard_again(tmp_path, hertz, loudness):
    """All its strength is in one place of the spectrum, where an encoder may have no numbers for it."""
    media.write(tmp_path / "a.mp4", smooth(1).repeat(24, axis=0), 24, tone(hertz, loudness))
    found, expected = heard(tmp_path / "a.mp4")[:, :48000], tone(hertz, loudness).wave_cn
    assert abs(found.std() / expected.std() - 1) < 0.05
    assert np.corrcoef(found[0], expected[0])[0, 1] > 0.99


def test_sound_is_not_taken_for_another_kind_of_file(tmp_path):
    """Every 192 bytes the same: ffmpeg would rather believe in MPEG-TS, whose packets begin with 0x47, than in a .wav."""
    period = np.zeros((2, 48), np.float32)
    period[:, 0] = 0x0147 / 32767, 0x1000 / 32767
    click = media.Sound(np.tile(period, 1000), 48000)
    media.write(tmp_path / "a.mp4", smooth(1).repeat(24, axis=0), 24, click)
    same(heard(tmp_path / "a.mp4"), click.wave_cn)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["a.mp4", "a.wav"])
def test_sound_that_is_no_number_is_refused(tmp_path, name, value):
    noise = white(5 / 24, 8000)
    noise.wave_cn[1, 77] = value
    with pytest.raises(InputError, match=f"{name}: the sound has values that are no numbers$"):
        media.write(tmp_path / name, smooth(5), 24, noise)
    assert list(tmp_path.iterdir()) == []


def half_of_it(folder, sound, encode=media._encode_sound):
    return encode(folder, media.Sound(sound.wave_cn[:, :25000], sound.sample_rate))


@pytest.mark.parametrize("before", [None, b"a good one"], ids=["new", "existing"])
@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("_pcm", lambda sound, pcm=media._pcm: pcm(sound)[:20_000]),
        ("_pcm", lambda sound, pcm=media._pcm: 2 * pcm(sound)),
        ("_encode_sound", half_of_it),
    ],
    ids=["too little encoded", "too much encoded", "half of it beside the video"],
)
def test_sound_that_fails_changes_nothing(tmp_path, monkeypatch, capfd, name, instead, before):
    path = tmp_path / "a.mp4"
    if before:
        path.write_bytes(before)
    monkeypatch.setattr(media, name, instead)
    with pytest.raises(InputError, match=r"a.mp4: could not be written \(ffmpeg wrote \d+ of 50000 samples of sound"):
        media.write(path, smooth(25), 24, white(25 / 24, 48000))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == ({"a.mp4": before} if before else {})


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("name", ["a.mp4", "A.WAV"])
def test_where_sound_can_be_written(tmp_path, name, count):
    media.check_writable(tmp_path / name, count, has_sound=True)


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
        lambda: media.check_writable(tmp_path / name, count, has_sound=has_sound),
        lambda: media.write(tmp_path / name, smooth(count), 24, white(0.1, 8000) if has_sound else None),
    ):
        with pytest.raises(InputError, match=f"{name}: {reason}"):
            attempt()
    assert list(tmp_path.iterdir()) == []
