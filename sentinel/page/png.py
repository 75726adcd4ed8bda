"""PNG: a grey picture as bytes, with the standard library alone.

Reference: ISO/IEC 15948 (PNG), colour type 0, bit depth 8, no filter, no interlace.
"""

from __future__ import annotations

import base64
import struct
import zlib
from typing import TYPE_CHECKING

import numpy as np

from sentinel.errors import MisuseError

if TYPE_CHECKING:
    from numpy.typing import NDArray

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GREY = 0  # colour type
_AXES = 2


def grey_png(picture: NDArray[np.uint8]) -> bytes:
    """Encode one grey picture.

    Args:
        picture: [height, width] of uint8, 0 black to 255 white; neither side empty.

    Returns:
        A complete PNG file; the same bytes for the same picture and zlib.

    Raises:
        MisuseError: another type or shape.
    """
    if picture.dtype != np.uint8 or picture.ndim != _AXES or 0 in picture.shape:
        msg = "a grey PNG needs a [height, width] array of uint8 that is not empty"
        raise MisuseError(msg)
    height, width = picture.shape
    header = struct.pack(">IIBBBBB", width, height, 8, _GREY, 0, 0, 0)
    # Each line starts with its filter's number; 0 leaves the line as it is.
    lines = np.zeros((height, 1 + width), dtype=np.uint8)
    lines[:, 1:] = picture
    body = zlib.compress(lines.tobytes(), 9)
    return SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")


def data_uri(picture: NDArray[np.uint8]) -> str:
    """The picture as an address that HTML can embed; arguments as `grey_png`."""
    return "data:image/png;base64," + base64.b64encode(grey_png(picture)).decode("ascii")


def _chunk(kind: bytes, body: bytes) -> bytes:
    checksum = zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)
