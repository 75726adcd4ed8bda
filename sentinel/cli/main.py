"""The command `sentinel`: one file per group, mounted here."""

from __future__ import annotations

import typer

import sentinel
from sentinel.cli import audit, budget, detectors, policy, stress
from sentinel.cli.console import SentinelGroup
from sentinel.cli.demo import demo_command
from sentinel.cli.inspect import inspect_command
from sentinel.cli.sanitize import sanitize_command

app = typer.Typer(
    name="sentinel",
    cls=SentinelGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # they print local variables, and those hold tensors
    help="Stands at a hospital's door in federated learning.",
)
app.command("demo")(demo_command)
app.command("sanitize")(sanitize_command)
app.command("inspect")(inspect_command)
app.add_typer(policy.app, name="policy")
app.add_typer(budget.app, name="budget")
app.add_typer(audit.app, name="audit")
app.add_typer(detectors.app, name="detectors")
app.add_typer(stress.app, name="stress")


@app.callback(invoke_without_command=True)
def root(
    version: bool = typer.Option(False, "--version", help="Print the version and leave."),
) -> None:
    """Stands at a hospital's door in federated learning."""
    if version:
        typer.echo(sentinel.__version__)
        raise typer.Exit


def main() -> None:
    """Run the command."""
    app()
