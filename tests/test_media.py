"""Pictures, clips and sounds, from files to arrays."""

import os
import random
import re
import struct
import tracemalloc
import weakref
import zlib

import cases
import imageio_ffmpeg
import numpy as np
import pytest
from films import encoded, instead, made, noise, smooth
from PIL import Image, ImageSequence
from PIL.PngImagePlugin import PngInfo

from cosmos3_jax import media, result_files
from cosmos3_jax.errors import InputError, RunError

pytestmark = pytest.mark.usefixtures("no_process_is_left")
LEVEL = 2 / 255  # one uint8 level in [-1, 1]


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
    [
        (1, lambda x: x),
        (2, np.fliplr),
        (3, lambda x: np.rot90(x, 2)),
        (4, np.flipud),
        (5, lambda x: x.swapaxes(0, 1)),
        (6, lambda x: np.rot90(x, -1)),
        (7, lambda x: np.rot90(x, 2).swapaxes(0, 1)),
        (8, np.rot90),
    ],
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


def chunk(kind: bytes, content: bytes) -> bytes:
    """A part of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def bilevel_png(width: int, height: int) -> bytes:
    """A black PNG of one bit a pixel, written without making the picture."""
    header, row = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0), bytes(1 + -(-width // 8))
    deflate = zlib.compressobj()
    content = b"".join(deflate.compress(row) for _ in range(height)) + deflate.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 5000), (5000, 1), (3, 2)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_pictures_of_extreme_shapes(tmp_path, kind, width, height):
    (tmp_path / "a").write_bytes(encoded(kind, Image.new("RGB", (width, height), (200, 200, 200))))
    picture = media.open_image(tmp_path / "a")
    assert picture.size == (width, height)
    for fitted in (media.fit_image(picture, 48, 64), media.fit_clip([picture], 48, 64)[0]):
        np.testing.assert_allclose(fitted, np.full((48, 64, 3), 200 / 127.5 - 1), atol=1.01 * LEVEL)  # lossy


def test_more_pixels_than_can_be_are_refused_unseen(tmp_path, ten_seconds):
    (tmp_path / "x.png").write_bytes(bilevel_png(20_000, 20_000))
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=r"^image .*x.png: 20000x20000 pixels; 1 to 100,000,000 in all are expected$"):
            media.open_image(tmp_path / "x.png")
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()
    assert Image.MAX_IMAGE_PIXELS is not None  # Pillow's own, for others


def test_as_many_pixels_as_can_be_are_read(tmp_path):
    """Pillow would warn of them: its limit is lower."""
    (tmp_path / "x.png").write_bytes(bilevel_png(9_500, 10_000))
    assert media.open_image(tmp_path / "x.png").size == (9_500, 10_000)


@pytest.mark.parametrize(("size", "name"), [((11, 10), "11x10"), ((0, 10), "0x10"), ((10, 0), "10x0")])
def test_pictures_of_too_many_pixels_or_none_are_refused(monkeypatch, size, name):
    monkeypatch.setattr(media, "MAX_PIXELS", 100)
    assert media.fit_image(Image.new("RGB", (10, 10)), 16, 16).shape == (16, 16, 3)
    with pytest.raises(InputError, match=f"^image: {name} pixels; 1 to 100 in all are expected$"):
        media.fit_image(Image.new("RGB", size), 16, 16)
    with pytest.raises(InputError, match=f"^video: {name} pixels; 1 to 100 in all are expected$"):
        media.fit_clip([Image.new("RGB", size)], 16, 16)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_of_several_pictures_is_taken(tmp_path, kind):
    first, second = Image.new("RGB", (16, 12), (250, 10, 10)), Image.new("RGB", (16, 12), (10, 250, 10))
    options = {"lossless": True} if kind == "WEBP" else {}
    (tmp_path / "a.png").write_bytes(encoded(kind, first, save_all=True, append_images=[second, first], **options))
    with Image.open(tmp_path / "a.png") as file:
        assert len(list(ImageSequence.Iterator(file))) > 1
    np.testing.assert_array_equal(np.asarray(media.open_image(tmp_path / "a.png")), np.asarray(first))


MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"]


@pytest.mark.parametrize("mode", MODES)
def test_pictures_of_any_mode_have_the_colours_that_pillow_gives_them(mode):
    picture = Image.new(mode, (16, 16))
    picture.frombytes(
        np.random.RandomState(0).randint(0, 256, 4 * 16 * 16).astype(np.uint8).tobytes()[: len(picture.tobytes())]
    )
    if mode in ("P", "PA"):
        picture.putpalette(noise(256).tobytes())
    colours = picture.convert("RGB")
    np.testing.assert_array_equal(media.fit_image(picture, 32, 32), media.fit_image(colours, 32, 32))
    np.testing.assert_array_equal(media.fit_clip([picture], 32, 32), media.fit_clip([colours], 32, 32))


def test_transparency_of_a_palette_is_no_warning():
    picture = Image.fromarray(noise(16, 16)).quantize(8)
    colours = picture.convert("RGB")
    picture.info["transparency"] = b"\0\x80"
    np.testing.assert_array_equal(media.fit_image(picture, 16, 16), media.fit_image(colours, 16, 16))
    np.testing.assert_array_equal(media.fit_clip([picture], 32, 32), media.fit_clip([colours], 32, 32))


def test_a_cmyk_jpeg_is_read(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded("JPEG", Image.fromarray(smooth(1)[0]).convert("CMYK")))
    with Image.open(tmp_path / "a.jpg") as file:
        assert file.mode == "CMYK"
        np.testing.assert_array_equal(np.asarray(media.open_image(tmp_path / "a.jpg")), np.asarray(file.convert("RGB")))


GRAY = np.arange(256).reshape(16, 16)
COLOURS = GRAY[..., None].repeat(3, -1).astype(np.uint8)


@pytest.mark.parametrize(("mode", "kind"), [("I;16", "PNG"), ("I;16", "TIFF"), ("I;16B", None), ("I", "TIFF")])
def test_gray_of_sixteen_bits_is_scaled(tmp_path, mode, kind):
    """Pillow would make all above 255 white."""
    picture = Image.fromarray((257 * GRAY).astype({"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]))
    assert picture.mode == mode
    np.testing.assert_array_equal(media.fit_image(picture, 16, 16), COLOURS / np.float32(127.5) - 1)
    np.testing.assert_allclose(media.fit_clip([picture], 16, 16)[0], COLOURS / 127.5 - 1, atol=1e-6)
    if kind:
        (tmp_path / "a").write_bytes(encoded(kind, picture))
        np.testing.assert_array_equal(np.asarray(media.open_image(tmp_path / "a")), COLOURS)


def test_dark_gray_of_sixteen_bits_stays_dark():
    assert media.fit_image(Image.fromarray(GRAY.astype(np.uint16)), 16, 16).max() == np.float32(1 / 127.5 - 1)


def test_small_integers_are_eight_bits():
    np.testing.assert_array_equal(np.asarray(media._rgb(Image.fromarray(GRAY.astype(np.int32)), "x"))[..., 1], GRAY)


@pytest.mark.parametrize("scale", [lambda x: x, lambda x: x / 255, lambda x: x / 127.5 - 1], ids=["255", "1", "-1 1"])
def test_pictures_of_floats_mean_what_arrays_mean(tmp_path, scale):
    picture = Image.fromarray(scale(GRAY).astype(np.float32))
    assert picture.mode == "F"
    (tmp_path / "a.tif").write_bytes(encoded("TIFF", picture))
    np.testing.assert_array_equal(np.asarray(media.open_image(tmp_path / "a.tif")), COLOURS)
    np.testing.assert_array_equal(media.fit_image(picture, 16, 16), COLOURS / np.float32(127.5) - 1)


@pytest.mark.parametrize("value", [np.float32(np.nan), np.float32(np.inf), np.float32(300), np.int32(-1), np.int32(70_000)])
def test_pictures_of_other_numbers_are_refused(tmp_path, value):
    picture = Image.fromarray(np.where(GRAY == 7, value, GRAY.astype(value.dtype)))
    (tmp_path / "a.tif").write_bytes(encoded("TIFF", picture))
    with pytest.raises(InputError, match=r"^image .*a.tif: integers in \[0, 255\], or floats in"):
        media.open_image(tmp_path / "a.tif")
    with pytest.raises(InputError, match=r"^video: integers in \[0, 255\], or floats in"):
        media.fit_clip([picture], 16, 16)


def test_the_name_of_an_image_says_nothing(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded("GIF", Image.new("RGB", (16, 12), (250, 10, 10))))
    np.testing.assert_array_equal(np.asarray(media.open_image(tmp_path / "a.png"))[0, 0], (250, 10, 10))


def test_pillow_starts_no_program(tmp_path):
    """As it does for PostScript."""
    (tmp_path / "a.png").write_bytes(encoded("EPS"))
    with pytest.raises(InputError, match="not a readable image"):
        media.open_image(tmp_path / "a.png")


EXIF = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"  # turned a quarter


@pytest.mark.parametrize(
    ("exif", "turned"),
    [
        (EXIF, True),
        (EXIF[:14], False),
        (EXIF[:17], False),
        (EXIF[:-7], False),
        (b"Exif\0\0" + 9 * b"x", False),
        (EXIF.replace(b"\x12\0\x03", b"\x12\0\x02"), False),
        (EXIF.replace(b"\0\x06", b"\0\x63"), False),
    ],
    ids=["whole", "cut", "cut later", "without the value", "text", "another type", "another value"],
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_damaged_exif_turns_nothing(tmp_path, kind, exif, turned):
    picture = Image.new("RGB", (16, 12), (200, 200, 200))
    (tmp_path / "a").write_bytes(encoded(kind, picture, exif=exif))
    assert media.open_image(tmp_path / "a").size == ((12, 16) if turned else (16, 12))


@pytest.mark.parametrize("last", [False, True], ids=["before the picture", "after it"])
def test_text_that_explodes_is_refused(tmp_path, last):
    info = PngInfo()
    info.add_text("a", 50_000_000 * "a", zip=True)
    data = encoded("PNG", pnginfo=info)
    if last:
        start = data.index(b"zTXt") - 4
        end = start + 12 + struct.unpack(">I", data[start : start + 4])[0]
        data = data[:start] + data[end:-12] + data[start:end] + data[-12:]
    assert len(data) < 100_000
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(InputError, match=r"^image .*a.png: not a readable image; .*large"):
        media.open_image(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_the_first_of_several_pictures_is_damaged(tmp_path, kind):
    data = encoded(kind, Image.fromarray(noise(16, 16)), save_all=True, append_images=[Image.fromarray(smooth(1, 16, 16)[0])])
    start = {"GIF": b"\x2c\0\0\0\0\x10\0\x10\0", "PNG": b"IDAT", "WEBP": b"VP8 "}[kind]
    start = data.index(start) + (12 if kind != "PNG" else 4)
    (tmp_path / "a.png").write_bytes(data[:start] + 60 * b"\xff" + data[start + 60 :])
    with pytest.raises(InputError, match=r"^image .*a.png: not a readable image; "):
        media.open_image(tmp_path / "a.png")


KINDS = {
    "png": lambda: encoded("PNG", exif=EXIF),
    "palette": lambda: encoded("PNG", Image.fromarray(noise(16, 16)).quantize(8), transparency=1),
    "sixteen bits": lambda: encoded("PNG", Image.fromarray(noise(16, 16)[..., 0].astype(np.uint16))),
    "jpeg": lambda: encoded("JPEG", exif=EXIF),
    "cmyk": lambda: encoded("JPEG", Image.fromarray(noise(16, 16)).convert("CMYK")),
    "webp": lambda: encoded("WEBP", exif=EXIF),
    "gif": lambda: encoded("GIF", save_all=True, append_images=[Image.new("RGB", (16, 16))]),
    "apng": lambda: encoded("PNG", save_all=True, append_images=[Image.new("RGB", (16, 16))]),
    "tiff": lambda: encoded("TIFF", exif=EXIF),
    "floats": lambda: encoded("TIFF", Image.fromarray(GRAY.astype(np.float32))),
    "bmp": lambda: encoded("BMP"),
}


def mutations(data: bytes, count: int):
    """`data` cut at places all over, and with some bytes changed, those at its beginning more often."""
    random_ = random.Random(0)
    for i in range(count):
        yield data[: i * len(data) // count]
        changed = bytearray(data)
        end = random_.choice([len(data), min(len(data), 200)])
        for _ in range(random_.choice([1, 3, 10])):
            changed[random_.randrange(end)] = random_.choice([0, 1, 127, 128, 255, random_.randrange(256)])
        yield bytes(changed)


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_image_is_read_or_refused(tmp_path, ten_seconds, kind):
    path, refused = tmp_path / "a", []
    for data in mutations(KINDS[kind](), 100):
        path.write_bytes(data)
        try:
            picture = media.open_image(path)
        except InputError as error:
            refused.append(str(error))
        else:
            assert picture.mode == "RGB"
            assert media.fit_image(picture, 16, 16).shape == (16, 16, 3)
    assert 50 < len(refused) < 200
    assert {error.partition(": ")[0] for error in refused} == {f"image {path}"}


@pytest.mark.parametrize("close", [False, True], ids=["truncated", "closed"])
def test_a_damaged_image_that_was_opened_already_is_refused(tmp_path, close):
    """Pillow reads the header when it opens a file, the rest when it must."""
    (tmp_path / "a.png").write_bytes(encoded("PNG", Image.fromarray(noise(16, 16)))[: None if close else 300])
    for attempt in (lambda image: media.fit_image(image, 16, 16), lambda image: media.fit_clip([image], 16, 16)):
        with Image.open(tmp_path / "a.png") as image:
            if close:
                image.close()
            with pytest.raises(InputError, match=r"^(image|video): not a readable image; "):
                attempt(image)


@pytest.mark.parametrize(
    ("what", "read"),
    [
        ("image", media.open_image),
        ("video", lambda path: media.open_clip(path, 5)),
        ("sound", lambda path: media.open_sound(path, 48_000, 2, 5)),
        ("file", media.read_metadata),
    ],
)
def test_what_is_no_file_is_not_waited_for(tmp_path, ten_seconds, what, read):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero", "/dev/stdin"):
        with pytest.raises(InputError, match=rf"^{what} {path}: not a readable {what}; a regular file is expected$"):
            read(path)
    for path in (tmp_path / "a\0", tmp_path / ("a" * 300)):
        with pytest.raises(InputError, match=rf"^{what} {path}: cannot be read"):
            read(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"no picture, no clip", encoded("PNG")[:-30], re.sub(rb".IDAT", b"\0IDAT", encoded("PNG"), flags=re.DOTALL)],
    ids=["empty", "text", "truncated", "wrong length of a chunk"],
)
def test_a_file_that_is_no_image(tmp_path, content):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"^image {path}: not a readable image; PNG, JPEG or WebP is expected"):
        media.open_image(path)


PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\na.mp4\n"  # not ended: ffmpeg would wait for more


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.mp4", ""), ("a.mp4", "no picture, no clip"), ("a.m3u8", PLAYLIST), ("b.mp4", "ffconcat version 1.0\nfile a.mp4\n")],
    ids=["empty", "text", "playlist", "list"],
)
def test_a_file_that_is_no_clip(tmp_path, ten_seconds, capfd, name, content):
    result_files.write(tmp_path / "a.mp4", smooth(2), 24)
    (tmp_path / name).write_text(content)
    with pytest.raises(
        InputError, match=rf"^video .*/{name}: not a readable video; MP4 with H.264 is expected \(ffmpeg ended w"
    ):
        media.open_clip(tmp_path / name, 5)
    assert capfd.readouterr() == ("", "")


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(InputError, match=r"^image .*a.png: there is no such file$"):
        media.open_image(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"^video .*a.mp4: there is no such file$"):
        media.open_clip(tmp_path / "a.mp4", 5)


@pytest.mark.parametrize("size", ["1x1", "63x47", "2x200", "1000x2"])
@pytest.mark.parametrize("keep", ["first", "last"])
def test_clips_of_odd_sizes(tmp_path, size, keep):
    path = made(tmp_path / "a.mp4", "-c:v", "libx264", "-pix_fmt", "yuv444p", source=f"testsrc=s={size}:r=24:d=0.5")
    clip = media.open_clip(path, 5, keep)
    assert [frame.size for frame in clip] == 5 * [tuple(map(int, size.split("x")))]
    assert media.fit_clip(clip, 16, 16).shape == (5, 16, 16, 3)


@pytest.mark.parametrize("kept_as", ["rgb48le", "gray16le", "yuv420p10le", "rgba", "gray"])
def test_clips_of_other_colours(tmp_path, kept_as):
    clip = media.open_clip(made(tmp_path / "a.mkv", "-c:v", "ffv1", "-pix_fmt", kept_as), 5)
    assert [(frame.mode, frame.size) for frame in clip] == 5 * [("RGB", (64, 48))]


@pytest.mark.parametrize("keep", ["first", "last"])
def test_a_clip_of_one_frame(tmp_path, keep):
    result_files.write(tmp_path / "a.mp4", smooth(1), 24)
    assert len(media.open_clip(tmp_path / "a.mp4", 5, keep)) == 1


@pytest.mark.parametrize("name", ["a.gif", "a.webm", "a.mkv", "a.mov", "a.avi", "a.flv"])
def test_clips_of_other_kinds(tmp_path, name):
    colours = media.open_clip(made(tmp_path / "rgb.mp4", "-c:v", "libx264rgb", "-qp", "0"), 12)
    clip = media.open_clip(made(tmp_path / name), 100)
    assert len(clip) == 12
    assert abs(np.stack(clip).astype(float) - np.stack(colours)).mean() < 20  # of 255: some of them are coarse


def test_a_clip_that_is_only_heard(tmp_path, ten_seconds, capfd):
    path = made(tmp_path / "a.mp4", source="sine=d=0.5")
    with pytest.raises(InputError, match=r"^video .*a.mp4: not a readable video; .*does not contain any stream\)$"):
        media.open_clip(path, 5)
    assert capfd.readouterr() == ("", "")


def test_a_clip_is_turned_upright(tmp_path, capfd):
    """By the matrix of its track, which phones write; the one before is that of the film."""
    result_files.write(tmp_path / "a.mp4", smooth(3, 32, 48), 24)
    lying = np.stack(media.open_clip(tmp_path / "a.mp4", 3))
    data = (tmp_path / "a.mp4").read_bytes()
    one = 1 << 16
    before, after = (struct.pack(">9i", *matrix, 0, 0, 1 << 30) for matrix in ((one, 0, 0, 0, one, 0), (0, one, 0, -one, 0, 0)))
    film, track, rest = data.split(before)
    (tmp_path / "a.mp4").write_bytes(film + before + track + after + rest)
    np.testing.assert_array_equal(np.stack(media.open_clip(tmp_path / "a.mp4", 3)), np.rot90(lying, -1, axes=(1, 2)))
    assert capfd.readouterr() == ("", "")


def test_a_clip_of_too_large_pictures_is_refused(tmp_path, monkeypatch, ten_seconds, capfd):
    data = bytearray(made(tmp_path / "a.gif").read_bytes())
    data[6:10] = struct.pack("<HH", 12_000, 12_000)
    (tmp_path / "a.gif").write_bytes(data)
    with pytest.raises(InputError, match=r"^video .*a.gif: not a readable video; .*size 12000x12000 exceeds .* 100000000\b"):
        media.open_clip(tmp_path / "a.gif", 5)
    result_files.write(tmp_path / "a.mp4", smooth(5), 24)
    monkeypatch.setattr(media, "MAX_PIXELS", 32 * 48 - 1)
    with pytest.raises(InputError, match=r"^video .*a.mp4: not a readable video; .*size 48x32 exceeds .* 1535\b"):
        media.open_clip(tmp_path / "a.mp4", 5)
    assert capfd.readouterr() == ("", "")


def test_huge_files_are_no_clips_or_read(tmp_path, ten_seconds):
    """Of 100 GB, which take no room: they are holes."""
    result_files.write(tmp_path / "a.mp4", smooth(5), 24)
    for name, begins in (("zeros.mp4", b""), ("unfinished.mp4", struct.pack(">II", 1, 0x6D646174) + struct.pack(">Q", 2**36))):
        (tmp_path / name).write_bytes(begins)
        os.truncate(tmp_path / name, 100 << 30)
        with pytest.raises(InputError, match="not a readable video"):
            media.open_clip(tmp_path / name, 5, "last")
    os.truncate(tmp_path / "a.mp4", 100 << 30)
    assert len(media.open_clip(tmp_path / "a.mp4", 9, "last")) == 5


def clip_bytes(folder, name: str) -> bytes:
    """One of the clips that are damaged in the tests."""
    options = {"a.mp4": ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-movflags", "+faststart"], "b.mp4": ["-c:v", "mpeg4"]}
    return made(folder / f"whole{name}", *options.get(name, [])).read_bytes()


@pytest.mark.parametrize("name", ["a.mp4", "b.mp4", "c.gif", "d.webm"])
def test_a_damaged_clip_is_read_or_refused(tmp_path, capfd, ten_seconds, name):
    path, refused = tmp_path / name, []
    for i, data in enumerate(mutations(clip_bytes(tmp_path, name), 12)):
        path.write_bytes(data)
        try:
            clip = media.open_clip(path, 5, ["first", "last"][i % 2])
        except InputError as error:
            refused.append(str(error))
        else:
            assert 0 < len(clip) <= 5
            assert {frame.mode for frame in clip} == {"RGB"}
    assert {error.partition(": ")[0] for error in refused} == {f"video {path}"}
    assert capfd.readouterr() == ("", "")


FRAME = r"printf 'P6\n1 1\n255\nabc'"


@pytest.mark.parametrize("rest", ["", "P", r"P6\n1", r"P6\n1 1\n255\nab"])
@pytest.mark.parametrize("keep", ["first", "last"])
def test_an_ffmpeg_that_is_killed_has_no_last_frame(tmp_path, monkeypatch, keep, rest):
    (tmp_path / "a.mp4").touch()
    instead(monkeypatch, tmp_path, f"{FRAME}; printf '{rest}'; kill -9 $$")
    with pytest.raises(InputError, match=r"not a readable video; .*ffmpeg ended with -9"):
        media.open_clip(tmp_path / "a.mp4", 5, keep)
    assert len(media.open_clip(tmp_path / "a.mp4", 1)) == 1


def test_an_ffmpeg_that_goes_on_is_ended(tmp_path, monkeypatch, ten_seconds):
    (tmp_path / "a.mp4").touch()
    instead(monkeypatch, tmp_path, f"{FRAME}; exec sleep 60")
    assert [frame.getpixel((0, 0)) for frame in media.open_clip(tmp_path / "a.mp4", 1)] == [tuple(b"abc")]


@pytest.mark.parametrize("frames", ["", f"{FRAME}; "])
def test_an_ffmpeg_that_writes_no_frames_is_ended(tmp_path, monkeypatch, ten_seconds, frames):
    (tmp_path / "a.mp4").touch()
    instead(monkeypatch, tmp_path, f"{frames}exec yes")
    with pytest.raises(InputError, match="not a readable video"):
        media.open_clip(tmp_path / "a.mp4", 5)


def test_an_ffmpeg_that_says_much_is_not_waited_for(tmp_path, monkeypatch, ten_seconds):
    """More than a pipe holds."""
    (tmp_path / "a.mp4").touch()
    instead(monkeypatch, tmp_path, f"yes oh | head -c 1000000 >&2; {FRAME}")
    assert len(media.open_clip(tmp_path / "a.mp4", 5)) == 1


def test_without_ffmpeg(tmp_path, monkeypatch):
    def none():
        raise RuntimeError("No ffmpeg exe could be found.")

    (tmp_path / "a.mp4").touch()
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", none)
    with pytest.raises(InputError, match="No ffmpeg exe"):
        media.open_clip(tmp_path / "a.mp4", 5)
    with pytest.raises(RunError, match="No ffmpeg exe"):
        result_files.write(tmp_path / "b.mp4", smooth(5), 24)


@pytest.mark.parametrize("keep", ["first", "last"])
def test_a_long_clip_is_never_held_whole(tmp_path, monkeypatch, keep):
    result_files.write(tmp_path / "a.mp4", smooth(1).repeat(100, axis=0), 24)
    held, most = weakref.WeakValueDictionary(), []

    def frombytes(*arguments, make=Image.frombytes):
        image = make(*arguments)
        held[len(most)] = image
        most.append(len(held))
        return image

    monkeypatch.setattr(media.Image, "frombytes", frombytes)
    assert len(media.open_clip(tmp_path / "a.mp4", 5, keep)) == 5
    assert 5 <= max(most) <= 7  # one that comes and one that goes
    assert len(most) == {"first": 5, "last": 100}[keep]


@pytest.mark.parametrize(("count", "keep", "taken"), [(3, "first", [0, 1, 2]), (3, "last", [4, 5, 6]), (9, "last", range(7))])
def test_open_clip_takes_an_end(tmp_path, count, keep, taken):
    clip = smooth(7)
    result_files.write(tmp_path / "a.mp4", clip, 24)
    frames = np.stack(media.open_clip(tmp_path / "a.mp4", count, keep))
    assert len(frames) == len(taken)
    # frames are 20 levels apart; H.264 and its colours are a few off
    np.testing.assert_allclose(frames.astype(float).mean((1, 2)), clip[list(taken)].astype(float).mean((1, 2)), atol=5)


# Files to sounds


RATE = 48_000
LEVEL_16 = 1 / 2**14  # two levels of 16 bits: files are scaled by 32,767 and read by 32,768


def tones(samples: int = RATE // 2, rate: int = RATE) -> np.ndarray:
    """Two channels of soft tones, that begin and end in silence."""
    t = np.arange(samples) / rate
    fade = np.minimum(1, 50 * np.minimum(t, samples / rate - t))
    return (fade * np.stack([0.5 * np.sin(2 * np.pi * 440 * t), 0.25 * np.sin(2 * np.pi * 1000 * t)])).astype(np.float32)


def written(path, wave_cn: np.ndarray, rate: int = RATE, seconds: int = 1):
    """A file of a result with this sound."""
    result_files.write(path, smooth(8 * seconds), 8, result_files.Sound(wave_cn, rate))
    return path


def test_a_wav_is_read_as_it_was_written(tmp_path):
    sound = media.open_sound(written(tmp_path / "a.wav", tones()), RATE, 2, RATE // 2)
    assert (sound.dtype, sound.shape) == (np.float32, (2, RATE // 2))
    np.testing.assert_allclose(sound, tones(), atol=LEVEL_16)


@pytest.mark.parametrize("rate", [RATE, 44_100])
def test_the_sound_of_a_video_fits_its_beginning(tmp_path, rate):
    """AAC changes it by 0.0016; a shift of one sample would be 0.02."""
    sound = media.open_sound(written(tmp_path / "a.mp4", tones(rate, rate), rate), RATE, 2, RATE)
    assert np.sqrt(np.mean((sound - tones(RATE)) ** 2)) < 0.005


@pytest.mark.parametrize(
    ("name", "coder"),
    [
        ("a.mp3", "libmp3lame"),
        ("a.flac", "flac"),
        ("a.wav", "pcm_f32le"),
        ("a.m4a", "aac"),
        ("a.mkv", "aac"),
        ("a.ogg", "libopus"),
    ],
)
def test_sounds_of_other_kinds(tmp_path, name, coder):
    path = made(tmp_path / name, "-i", written(tmp_path / "whole.wav", tones()), "-map", "1:a", "-c:a", coder)
    sound = media.open_sound(path, RATE, 2, RATE // 2)
    alike = {shift: np.corrcoef(np.roll(sound[0], shift), tones()[0])[0, 1] for shift in range(-50, 51)}  # of 109, a period
    assert max(alike.values()) > 0.995
    assert abs(max(alike, key=alike.get)) <= 24  # half a millisecond, in which Matroska counts


@pytest.mark.parametrize("rate", [8_000, 24_000, 44_100, 96_000])
def test_a_sound_has_the_rate_that_is_asked_for(tmp_path, rate):
    sound = media.open_sound(written(tmp_path / "a.wav", tones()), rate, 2, rate // 2)
    # at both ends the filter sees half of what it weighs, of nearly nothing
    np.testing.assert_allclose(sound, tones(rate // 2, rate), atol=0.002)


@pytest.mark.parametrize("name", ["a.wav", "a.mp4"])
def test_a_sound_is_cut_or_followed_by_silence(tmp_path, name):
    written(tmp_path / name, tones(RATE))
    whole = media.open_sound(tmp_path / name, RATE, 2, RATE)
    for samples in (1, 1000, RATE - 1):
        np.testing.assert_array_equal(media.open_sound(tmp_path / name, RATE, 2, samples), whole[:, :samples])
    longer = media.open_sound(tmp_path / name, RATE, 2, 2 * RATE)
    np.testing.assert_array_equal(longer[:, :RATE], whole)
    assert np.abs(longer[:, RATE:]).max() < (0.01 if name == "a.mp4" else 1e-9)  # some ffmpegs decode AAC's last frame whole


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("there", [1, 2])
def test_channels_are_repeated_or_their_mean(tmp_path, there, channels):
    sound = media.open_sound(written(tmp_path / "a.wav", tones()[:there]), RATE, channels, RATE // 2)
    expected = tones() if there == channels == 2 else tones()[:there].mean(axis=0, keepdims=True)
    np.testing.assert_allclose(sound, np.broadcast_to(expected, (channels, RATE // 2)), atol=LEVEL_16)


def test_six_channels_are_mixed_to_two(tmp_path):
    path = made(tmp_path / "a.wav", "-af", "pan=5.1|FL=c0|FR=0*c0", source=f"sine=r={RATE}:d=0.1")
    left, right = media.open_sound(path, RATE, 2, RATE // 10)
    assert left.std() > 0.05
    assert not right.any()


def test_a_sound_that_sets_in_later_has_silence_before(tmp_path):
    sound = ("-f", "lavfi", "-itsoffset", "0.25", "-i", f"sine=r={RATE}:d=0.25", "-c:a", "aac")
    heard = media.open_sound(made(tmp_path / "a.mp4", *sound), RATE, 1, RATE // 2)[0]
    assert abs(np.argmax(np.abs(heard) > 0.02) - RATE // 4) < 100
    assert heard[RATE // 4 :].std() > 0.05


def test_a_video_without_a_sound(tmp_path, capfd):
    result_files.write(tmp_path / "a.mp4", smooth(8), 8)
    with pytest.raises(
        InputError,
        match=r"^sound .*a.mp4: not a readable sound; WAV, MP3, or MP4 with a soundtrack is expected \(ffmpeg ended w",
    ):
        media.open_sound(tmp_path / "a.mp4", RATE, 2, 5)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("b.wav", b""),
        ("b.wav", b"no sound"),
        ("b.m3u8", PLAYLIST.replace("a.mp4", "a.wav").encode()),
        ("b.wav", b"ffconcat version 1.0\nfile a.wav\n"),
        ("b.wav", encoded("PNG")),
    ],
    ids=["empty", "text", "playlist", "list", "picture"],
)
def test_a_file_that_is_no_sound(tmp_path, ten_seconds, capfd, name, content):
    written(tmp_path / "a.wav", tones())
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"^sound .*/{name}: not a readable sound; WAV, MP3, or MP4 with a soundtrack is"):
        media.open_sound(tmp_path / name, RATE, 2, 5)
    assert capfd.readouterr() == ("", "")


def test_a_sound_of_no_samples(tmp_path):
    path = written(tmp_path / "a.wav", tones())
    path.write_bytes(path.read_bytes()[:44])
    with pytest.raises(InputError, match=r"^sound .*a.wav: not a readable sound; .* \(it has no samples\)$"):
        media.open_sound(path, RATE, 2, 5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_sound_of_no_numbers(tmp_path, value):
    path = made(tmp_path / "a.wav", "-c:a", "pcm_f32le", source=f"sine=r={RATE}:d=0.1")
    path.write_bytes(path.read_bytes()[:-4] + struct.pack("<f", value))
    assert media.open_sound(path, RATE, 1, 4000).any()  # before it
    with pytest.raises(InputError, match=r"^sound .*a.wav: has values that are no numbers$"):
        media.open_sound(path, RATE, 1, 5000)


def test_files_of_sounds_that_are_not_there(tmp_path):
    with pytest.raises(InputError, match=r"^sound .*a.wav: there is no such file$"):
        media.open_sound(tmp_path / "a.wav", RATE, 2, 5)


def test_a_huge_sound_is_read_in_part(tmp_path, ten_seconds):
    """Of 100 GB, which take no room: they are holes."""
    path = written(tmp_path / "a.wav", tones())
    data = path.read_bytes()
    path.write_bytes(data[:4] + 4 * b"\xff" + data[8:40] + 4 * b"\xff" + data[44:])
    os.truncate(path, 100 << 30)
    np.testing.assert_allclose(media.open_sound(path, RATE, 2, RATE // 2), tones(), atol=LEVEL_16)


@pytest.mark.parametrize("name", ["a.wav", "b.mp3", "c.mp4", "d.flac"])
def test_a_damaged_sound_is_read_or_refused(tmp_path, capfd, ten_seconds, name):
    whole, refused = written(tmp_path / "whole.wav", tones(RATE // 10)), []
    data = made(tmp_path / f"whole{name}", "-i", whole, "-map", "1:a", "-movflags", "+faststart").read_bytes()
    for content in mutations(data, 10):
        (tmp_path / name).write_bytes(content)
        try:
            sound = media.open_sound(tmp_path / name, RATE, 2, 5000)
        except InputError as error:
            refused.append(str(error))
        else:
            assert sound.shape == (2, 5000)
    assert {error.partition(": ")[0] for error in refused} == {f"sound {tmp_path / name}"}
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("script", ["kill -9 $$", "printf '.snd'; exit 0", "exit 3"])
def test_an_ffmpeg_that_fails_has_no_sound(tmp_path, monkeypatch, script):
    (tmp_path / "a.wav").touch()
    instead(monkeypatch, tmp_path, script)
    with pytest.raises(InputError, match=r"not a readable sound; .* \((ffmpeg ended with (-9|3)|it has no samples)"):
        media.open_sound(tmp_path / "a.wav", RATE, 2, 5)
