"""The wheel holds what the checkout holds, and the installed package finds it."""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path

import pytest

import sentinel
from sentinel.paths import bundled

TOP = Path(__file__).parent.parent
WHEEL = os.environ.get("SENTINEL_TEST_WHEEL")


def shipped() -> dict[str, bytes]:
    found = {}
    for kind in ("detectors", "policies"):
        for path in (TOP / kind).rglob("*"):
            if path.is_file():
                found[f"sentinel/_bundled/{path.relative_to(TOP).as_posix()}"] = path.read_bytes()
    data = (TOP / "sentinel" / "demo" / "data").iterdir()
    for path in [*data, *(TOP / "sentinel").rglob("*.py")]:
        found[path.relative_to(TOP).as_posix()] = path.read_bytes()
    return found


@pytest.mark.skipif(WHEEL is None, reason="run by `make test-wheel`")
def test_the_wheel_holds_code_detectors_policies_and_data_byte_for_byte() -> None:
    with zipfile.ZipFile(WHEEL) as wheel:
        inside = {name: wheel.read(name) for name in wheel.namelist()}
    expected = shipped()
    assert len(expected) > 100
    different = [name for name, content in expected.items() if inside.get(name) != content]
    assert different == []
    assert "sentinel/py.typed" in inside
    assert any(name.endswith("licenses/LICENSE") for name in inside)
    assert not [name for name in inside if name.startswith("tests/")]


@pytest.mark.skipif(WHEEL is None, reason="run by `make test-wheel`")
def test_these_tests_run_against_the_wheel() -> None:
    assert (
        TOP not in Path(sentinel.__file__).resolve().parent.parents or ".venv" in sentinel.__file__
    )
    assert bundled("policies").parent.name == "_bundled"


@pytest.mark.parametrize("kind", ["detectors", "policies"])
def test_the_installed_package_finds_what_is_shipped(kind: str) -> None:
    found = bundled(kind)
    for path in (TOP / kind).rglob("*"):
        if path.is_file():
            other = found / path.relative_to(TOP / kind)
            assert hashlib.sha256(other.read_bytes()).digest() == (
                hashlib.sha256(path.read_bytes()).digest()
            )


def test_every_public_name_is_there() -> None:
    for name in sentinel.__all__:
        assert getattr(sentinel, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute"):
        _ = sentinel.nothing
