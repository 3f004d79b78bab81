"""Image files of every kind that people have, written here, against the pixels that were meant."""

from __future__ import annotations

import io
import logging
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign import images
from diffalign.images import FIRST_FRAME, NO_EXIF, ON_WHITE, SUFFIXES, decode, is_image_name, read_image

RAMP = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def encoded(image, form="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png16(levels: np.ndarray, kind: int) -> bytes:
    """A PNG of 16 bits a channel, which Pillow cannot write for colour. kind: 0 grey, 2 RGB, 6 RGBA."""

    def chunk(tag: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))

    height, width = levels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    head = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def close(data: bytes, expected, levels: float = 0.0) -> None:
    np.testing.assert_allclose(decode(data).pixels, np.asarray(expected), atol=levels / 255 + 1e-6)


@pytest.fixture(autouse=True)
def nothing_told_yet():
    images._told.clear()


def test_a_file_becomes_a_float_tensor(tmp_path):
    path = tmp_path / "ramp.png"
    Image.fromarray(RAMP).save(path)
    tensor = read_image(path)
    assert (tensor.dtype, tensor.shape, tensor.is_contiguous()) == (torch.float32, (3, 5, 7), True)
    assert torch.equal(tensor, torch.from_numpy(RAMP).permute(2, 0, 1).float() / 255)


@pytest.mark.parametrize(
    ("form", "options", "levels"),
    [("PNG", {}, 0), ("BMP", {}, 0), ("TIFF", {}, 0), ("WEBP", {"lossless": True}, 0), ("JPEG", {"quality": 95}, 25), ("GIF", {}, 60)],
)
def test_formats(form, options, levels):
    across, down = np.meshgrid(np.linspace(0, 255, 32), np.linspace(0, 255, 24))
    smooth = np.stack([across, down, np.full_like(down, 128)], axis=2).astype(np.uint8)
    close(encoded(Image.fromarray(smooth), form, **options), smooth / 255, levels)


def test_grey_bilevel_and_palette_are_rgb():
    grey = RAMP[..., 0]
    close(encoded(Image.fromarray(grey)), np.repeat(grey[..., None], 3, 2) / 255)
    bilevel = Image.fromarray(grey > 127)
    close(encoded(bilevel), np.repeat((grey > 127)[..., None], 3, 2))
    palette = Image.fromarray(RAMP).quantize(16)
    close(encoded(palette), np.asarray(palette.convert("RGB")) / 255)


def test_cmyk():
    """Cyan without black is (0, 1, 1); Pillow undoes the inversion that Adobe's JPEGs have."""
    close(encoded(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "TIFF"), np.broadcast_to([0, 1, 1], (8, 8, 3)))
    close(encoded(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG", quality=95), np.broadcast_to([0, 1, 1], (8, 8, 3)), 3)


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bit_grey_keeps_its_depth(form):
    """Pillow's own conversion to RGB cuts everything above 255 of 65535 to white."""
    levels = np.array([[0, 255, 256, 32768, 65534, 65535]], np.uint16)
    picture = decode(encoded(Image.fromarray(levels), form))
    np.testing.assert_allclose(picture.pixels, np.repeat(levels[..., None] / 65535, 3, 2), atol=1e-7)


@pytest.mark.parametrize(("kind", "channels"), [(2, 3), (6, 4)])
def test_sixteen_bit_colour_is_within_a_level(kind, channels):
    levels = np.random.default_rng(1).integers(0, 65536, (4, 6, channels), dtype=np.uint16)
    levels[..., 3:] = 65535
    close(png16(levels, kind), levels[..., :3] / 65535, 1)


def test_transparency_is_laid_on_white():
    rgba = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 255, 51]]], np.uint8)
    picture = decode(encoded(Image.fromarray(rgba, "RGBA")))
    np.testing.assert_allclose(picture.pixels, [[[1, 0, 0], [1, 1, 1], [0.8, 0.8, 1.0]]], atol=1e-6)
    assert picture.notes == (ON_WHITE,)
    opaque = decode(encoded(Image.fromarray(np.dstack([RAMP, np.full((5, 7), 255, np.uint8)]), "RGBA")))
    assert opaque.notes == ()
    np.testing.assert_array_equal(opaque.pixels, RAMP.astype(np.float32) / 255)


def test_transparent_palette_entries_and_grey_with_alpha():
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((1, 0), 1)
    np.testing.assert_allclose(decode(encoded(palette, transparency=1)).pixels, [[[1, 0, 0], [1, 1, 1]]])
    grey = Image.new("LA", (1, 1), (0, 0))
    np.testing.assert_allclose(decode(encoded(grey)).pixels, [[[1, 1, 1]]])


@pytest.mark.parametrize(
    ("orientation", "turned"), [(3, RAMP[::-1, ::-1]), (6, np.rot90(RAMP, -1)), (8, np.rot90(RAMP)), (2, RAMP[:, ::-1])]
)
def test_exif_says_which_way_is_up(orientation, turned):
    exif = Image.Exif()
    exif[0x0112] = orientation
    close(encoded(Image.fromarray(RAMP), exif=exif), turned / 255)
    sixteen = RAMP[..., 0].astype(np.uint16) * 257
    close(encoded(Image.fromarray(sixteen), exif=exif), np.repeat(turned[..., :1], 3, 2) / 255)


def test_damaged_exif_does_not_hide_a_whole_image():
    picture = decode(encoded(Image.fromarray(RAMP), exif=b"Exif\0\0no exif at all"))
    np.testing.assert_array_equal(picture.pixels, RAMP.astype(np.float32) / 255)
    assert picture.notes == (NO_EXIF,)


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_counts(form):
    frames = [Image.new("RGB", (6, 4), color) for color in ("red", "blue", "lime")]
    options = {"lossless": True} if form == "WEBP" else {}
    picture = decode(encoded(frames[0], form, save_all=True, append_images=frames[1:], **options))
    np.testing.assert_allclose(picture.pixels, np.broadcast_to([1, 0, 0], (4, 6, 3)), atol=1e-6)
    assert picture.notes == (FIRST_FRAME,)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (300, 2)])
def test_any_shape(size):
    assert decode(encoded(Image.new("RGB", size, "lime"))).pixels.shape == (size[1], size[0], 3)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
@pytest.mark.parametrize("share", [0.001, 0.2, 0.5, 0.9])
def test_a_truncated_file_is_refused_by_name(form, share, tmp_path):
    noise = np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), form)
    path = tmp_path / "cut.img"
    path.write_bytes(data[: max(int(len(data) * share), 8)])
    with pytest.raises(ValueError, match=r"cut\.img: not a whole image \(") as error:
        read_image(path)
    assert "BytesIO" not in str(error.value)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"hello, I am a text", "of no known format"),
        (b"\x89PNG\r\n\x1a\n", "of no known format"),
        (b"\xf3\x07" * 250, "of no known format"),
    ],
)
def test_what_is_no_image_is_refused(data, reason):
    with pytest.raises(ValueError, match=rf"^not a whole image \({reason}\)$"):
        decode(data)


def test_flipped_bytes_never_raise_anything_else():
    """A damaged file is either an image still or a ValueError."""
    rng = np.random.default_rng(3)
    refused = 0
    for form in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"):
        data = encoded(Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)), form)
        for _ in range(40):
            damaged = bytearray(data)
            for at in rng.integers(0, len(data), 3):
                damaged[at] = rng.integers(0, 256)
            try:
                pixels = decode(bytes(damaged)).pixels
            except ValueError:
                refused += 1
            else:
                assert pixels.min() >= 0
                assert pixels.max() <= 1
    assert refused > 20


@pytest.mark.parametrize("side", [9500, 14000])  # Pillow warns of the first, and refuses the second itself
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_not_unpacked(side):
    data = encoded(Image.new("1", (side, side)))
    assert len(data) < 100_000
    with pytest.raises(ValueError, match=r"^too large an image"):
        decode(data)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_without_a_known_range_are_refused(mode):
    with pytest.raises(ValueError, match=rf"32-bit pixels \(mode {mode}\).*save it with 8 or 16 bits"):
        decode(encoded(Image.new(mode, (3, 3)), "TIFF"))


def test_decisions_are_said_once_with_the_first_file(tmp_path, caplog):
    for name in ("a.png", "b.png"):
        Image.new("RGBA", (2, 2), (0, 0, 0, 10)).save(tmp_path / name)
    with caplog.at_level(logging.WARNING, logger="diffalign.images"):
        read_image(tmp_path / "a.png")
        read_image(tmp_path / "b.png")
    (record,) = caplog.records
    assert "a.png" in record.getMessage()
    assert ON_WHITE in record.getMessage()


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        read_image(tmp_path / "nowhere.png")


def test_names():
    assert all(is_image_name("x" + suffix.upper()) for suffix in SUFFIXES)
    assert not any(map(is_image_name, ("x.txt", "png", "x.png.part", "x.npy")))
