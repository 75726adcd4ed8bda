"""A grey PNG can be read back by hand, chunk by chunk."""

import base64
import struct
import zlib

import numpy as np
import pytest

from sentinel.errors import MisuseError
from sentinel.page.png import data_uri, grey_png


def decoded(content: bytes) -> tuple[dict[bytes, bytes], np.ndarray]:
    """Chunks by kind, and the picture; every checksum is checked."""
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        kind, body = content[at + 4 : at + 8], content[at + 8 : at + 8 + length]
        (checksum,) = struct.unpack(">I", content[at + 8 + length : at + 12 + length])
        assert checksum == zlib.crc32(kind + body)
        chunks[kind] = body
        at += 12 + length
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert not lines[:, 0].any()  # filter 0 on every line
    return chunks, lines[:, 1:]


@pytest.mark.parametrize("shape", [(1, 1), (28, 28), (3, 7), (7, 3)])
def test_every_pixel_comes_back(shape: tuple[int, int]) -> None:
    picture = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    chunks, back = decoded(grey_png(picture))
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    assert chunks[b"IHDR"][8:] == bytes([8, 0, 0, 0, 0])  # 8 bits, grey, defaults
    assert np.array_equal(back, picture)


def test_a_view_into_a_larger_picture_comes_back() -> None:
    picture = np.arange(200, dtype=np.uint8).reshape(10, 20)[::2, ::3]
    assert np.array_equal(decoded(grey_png(picture))[1], picture)


def test_the_address_holds_the_file() -> None:
    picture = np.eye(5, dtype=np.uint8) * 255
    kind, content = data_uri(picture).split(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(content, validate=True) == grey_png(picture)


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((4, 4), np.float32),
        np.zeros((4, 4, 3), np.uint8),
        np.zeros((0, 4), np.uint8),
    ],
)
def test_anything_but_a_grey_uint8_picture_is_refused(picture: np.ndarray) -> None:
    with pytest.raises(MisuseError, match="uint8"):
        grey_png(picture)
