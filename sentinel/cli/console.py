"""Console: how every command speaks, and with which exit code it ends.

0 done, 1 refused, withheld or failed a check, 2 misuse.
"""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from typer.core import TyperGroup

from sentinel.errors import SentinelError, Withheld

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

REFUSED, MISUSE = 1, 2

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for a machine to read.")]
StateDir = Annotated[
    Path | None,
    typer.Option(
        "--state-dir",
        envvar="SENTINEL_STATE_DIR",
        help="Folder of ledger, audit log and releases.",
    ),
]


class SentinelGroup(TyperGroup):
    """Turns the package's own errors into a sentence on standard error and an exit code."""

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401 - the type of typer's context is private
        """Run the command."""
        try:
            return super().invoke(ctx)
        except SentinelError as error:
            say_error(str(error))
            raise typer.Exit(REFUSED if isinstance(error, Withheld) else MISUSE) from None


def say_error(sentence: str) -> None:
    """Print a sentence to standard error, as it is."""
    Console(stderr=True, emoji=False).print(sentence, markup=False, highlight=False, soft_wrap=True)


def console() -> Console:
    """Where people read."""
    return Console(highlight=False, emoji=False)


def print_json(value: object) -> None:
    """Print one JSON document, keys in order."""
    sys.stdout.write(json.dumps(value, indent=2, sort_keys=True) + "\n")


@contextmanager
def progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar, fed with (done, total); silent where standard error is no terminal."""
    columns = (TextColumn(title), BarColumn(), TimeElapsedColumn())
    screen = Console(stderr=True)
    with Progress(*columns, console=screen, disable=not screen.is_terminal, transient=True) as bar:
        task = bar.add_task(title, total=None)

        def step(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield step


@contextmanager
def working(title: str) -> Iterator[None]:
    """A spinner for work without a known end; silent where standard error is no terminal."""
    screen = Console(stderr=True)
    with screen.status(title) if screen.is_terminal else nullcontext():
        yield


def read_tensors(path: Path, what: str) -> dict[str, Any]:
    """The tensors of a safetensors file.

    Raises:
        typer.Exit: code 2, after a sentence, where it cannot be read.
    """
    import safetensors
    import safetensors.torch

    try:
        return safetensors.torch.load_file(path)
    except FileNotFoundError:
        say_error(f"There is no file {path}: {what} was expected there.")
    except (OSError, safetensors.SafetensorError):
        say_error(f"{path} cannot be read as safetensors: {what} was expected.")
    raise typer.Exit(MISUSE)
