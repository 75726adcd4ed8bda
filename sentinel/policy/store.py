"""Find, check and read policy files; nothing is used that another user could have changed."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from sentinel.errors import PolicyError
from sentinel.paths import bundled
from sentinel.policy.parsing import MAX_BYTES, parse_toml
from sentinel.policy.schema import Policy

_SHIPPED_NAME = re.compile(r"[a-z0-9][a-z0-9-]*")
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
TEST_SUFFIX = ".test.toml"


class OtherOwnerError(PolicyError):
    """A file of somebody else's: refused here, and yet in order where its owner uses it."""


@dataclass(frozen=True, slots=True)
class LoadedPolicy:
    """A policy, and the file it came from.

    Attributes:
        policy: what the file says.
        digest: SHA-256 of the file's bytes, in hexadecimal.
        source: the file's path, for errors and for the screen; never for the log.
    """

    policy: Policy
    digest: str
    source: str


def load_policy(source: str | Path) -> LoadedPolicy:
    """Load a policy for use.

    Args:
        source: name of a shipped policy ("tabular-ehr"), or the path of a TOML file.

    Returns:
        The policy, frozen, with the digest of the bytes that were parsed.

    Raises:
        PolicyError: no such policy; a file that is too large, is not a plain file, is a link that
            leaves its folder, or that another user could change; or a file that says something
            the schema does not allow. The message names file, line or key, and what to do.
    """
    path = find_policy(source)
    return parse_policy(read_safely(path), str(path))


def parse_policy(raw: bytes, source: str) -> LoadedPolicy:
    """Parse the bytes of a policy file, without a look at who may write to it.

    Raises:
        PolicyError: not a valid policy.
    """
    return LoadedPolicy(parse_toml(raw, source, Policy), hashlib.sha256(raw).hexdigest(), source)


def shipped() -> dict[str, Path]:
    """Return the shipped policies: name -> path."""
    files = sorted(bundled("policies").glob("*.toml"))
    return {path.stem: path for path in files if not path.name.endswith(TEST_SUFFIX)}


def find_policy(source: str | Path) -> Path:
    """Return the path of a shipped policy or of a file.

    Raises:
        PolicyError: it is neither.
    """
    if isinstance(source, str) and _SHIPPED_NAME.fullmatch(source):
        known = shipped()
        if source in known:
            return known[source]
        if not Path(source).is_file():
            raise PolicyError(
                f'no policy is called "{source}"; the shipped ones are {", ".join(known)}; '
                "for a file of your own give its path, as in ./my-policy.toml"
            )
    path = Path(source)
    if not path.exists():
        raise PolicyError(f"{path}: no such file; give a shipped policy's name or a file's path")
    return path


def read_safely(path: Path) -> bytes:
    """Read a policy file that no other user could have changed.

    A shipped policy is as trustworthy as the code beside it, so that its owner and mode are not
    asked for. A link inside the folder is followed (Kubernetes mounts files that way).

    Raises:
        PolicyError: unsafe, unreadable or too large.
    """
    real = _inside_its_folder(path)
    try:
        descriptor = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise PolicyError(f"{path}: cannot be opened ({error.strerror}); check it") from None
    try:
        _require_safe(os.fstat(descriptor), path, shipped_file=_is_shipped(real))
    except PolicyError:
        os.close(descriptor)
        raise
    with os.fdopen(descriptor, "rb") as file:
        return _bounded(file.read(MAX_BYTES + 1), path)


def unsafe_to_use(path: Path) -> PolicyError | None:
    """Return why `load_policy` would refuse the file whatever it says; None where it would not.

    It is an OtherOwnerError where another user could use the file.
    """
    try:
        read_safely(path)
    except PolicyError as error:
        return error
    return None


def read_for_checking(path: Path) -> bytes:
    """Read a file to check it, wherever it lies and whoever owns it.

    Raises:
        PolicyError: not a plain file, unreadable, or too large.
    """
    if not path.is_file():
        raise PolicyError(f"{path}: expected a file")
    try:
        with path.open("rb") as file:
            return _bounded(file.read(MAX_BYTES + 1), path)
    except OSError as error:
        raise PolicyError(f"{path}: cannot be read ({error.strerror})") from None


def _inside_its_folder(path: Path) -> Path:
    try:
        real, folder = path.resolve(strict=True), path.parent.resolve(strict=True)
    except (OSError, RuntimeError):
        raise PolicyError(f"{path}: no such file, or a broken link") from None
    if not real.is_relative_to(folder):
        raise PolicyError(
            f"{path}: is a link that leaves its folder; copy the file there, or give the path it "
            "points to"
        )
    return real


def _is_shipped(real: Path) -> bool:
    return real.parent == bundled("policies").resolve()


def _require_safe(status: os.stat_result, path: Path, *, shipped_file: bool) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise PolicyError(f"{path}: expected a plain file")
    if shipped_file:
        return
    if status.st_mode & _WRITABLE_BY_OTHERS:
        raise PolicyError(f"{path}: others than its owner may write to it; run: chmod go-w on it")
    if status.st_uid not in {0, os.geteuid()}:
        raise OtherOwnerError(
            f"{path}: belongs to another user; root or the user that runs this has to own it"
        )


def _bounded(raw: bytes, path: Path) -> bytes:
    if len(raw) > MAX_BYTES:
        raise PolicyError(f"{path}: larger than {MAX_BYTES} bytes; a policy file is far smaller")
    return raw
