"""Where the shipped policies and detectors lie, in a wheel, a checkout and an editable install."""

from __future__ import annotations

from pathlib import Path
from typing import Literal


def bundled(kind: Literal["policies", "detectors"]) -> Path:
    """Return the folder of the shipped policies or detectors.

    In a wheel it lies inside the package. In a checkout, and so in an editable install, it lies at
    the top of the repository; that place counts only where `pyproject.toml` stands beside it, since
    a folder `policies` next to an installed package belongs to somebody else.

    Args:
        kind: which of the two folders.

    Raises:
        FileNotFoundError: the installation is incomplete.
    """
    package = Path(__file__).resolve().parent
    inside = package / "_bundled" / kind
    if inside.is_dir():
        return inside
    beside = package.parent / kind
    if beside.is_dir() and (package.parent / "pyproject.toml").is_file():
        return beside
    msg = f"the shipped {kind} are missing from this installation; install gradient-sentinel again"
    raise FileNotFoundError(msg)
