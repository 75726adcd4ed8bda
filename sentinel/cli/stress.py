"""`sentinel stress`: attack the site's own updates, raw and as the policy lets them out."""

from __future__ import annotations

import contextlib
import math
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sentinel.cli.console import (
    REFUSED,
    AsJson,
    SentinelGroup,
    console,
    print_json,
    progress,
    say_error,
)
from sentinel.errors import MisuseError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sentinel.stress.lab.calibration import Calibrated
    from sentinel.stress.lab.deadline import Stop
    from sentinel.stress.lab.result import Result

app = typer.Typer(
    cls=SentinelGroup,
    pretty_exceptions_enable=False,  # they print local variables, and those hold tensors
    help="Attack your own updates before someone else does.",
)

_DEMO_MINUTES, _MINUTES = 4.0, 10.0
_MOST_MINUTES = 7 * 24 * 60
_CUT = " (the time was up before the search was through: a weaker one may do)"
_LATE = (
    "The time was up before any knobs were shown to reach the target; above is what was measured "
    "last, and nothing was written. Give it more minutes with --budget."
)
_FILES = ("stress.json", "stress.html")
# name, model, data, policy, share of the time that is left
_DEMO = (
    ("Heart-disease records", "heart_net", "hearts", "tabular-ehr", 0.35),
    ("Chest X-rays", "xray_model", "xrays", "chest-xray", 1.0),
)

Model = Annotated[
    str | None, typer.Option(help="package.module:factory, which gives a torch.nn.Module.")
]
Data = Annotated[str | None, typer.Option(help="package.module:loader, which gives the records.")]
Policy = Annotated[
    str | None, typer.Option("--policy", help="Name of a shipped policy, or a policy file.")
]


@app.callback(invoke_without_command=True)
def stress_command(
    ctx: typer.Context,
    model: Model = None,
    data: Data = None,
    policy: Policy = None,
    demo: Annotated[bool, typer.Option("--demo", help="On the public data of the demo.")] = False,
    budget: Annotated[
        float | None,
        typer.Option(
            help=f"Minutes that it may take; {_MINUTES:g} where left out, {_DEMO_MINUTES:g} for "
            "the demo."
        ),
    ] = None,
    attacks: Annotated[
        str, typer.Option(help="Names of attacks, with commas between; all where left out.")
    ] = "",
    curves: Annotated[bool, typer.Option(help="Turn the policy's knobs as well.")] = True,
    out: Annotated[Path, typer.Option(help="Folder for stress.html and stress.json.")] = Path(
        "stress-output"
    ),
    redact: Annotated[
        bool, typer.Option("--redact", help="Error maps in the place of records and guesses.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the attacker; never of the guard's noise.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Attack your own updates, raw and as the policy lets them out.

    Exit code 1 where an attacker got something out of what was released, where everything was
    withheld, where the test is inconclusive (too little was measured to exclude a gain above 0.5)
    or was stopped.
    """
    if ctx.invoked_subcommand is not None:
        return
    _require_options(model, data, policy, demo=demo)
    _require_folder(out)
    minutes = budget if budget is not None else _DEMO_MINUTES if demo else _MINUTES
    _require_minutes(minutes)
    names = tuple(name.strip() for name in attacks.split(",") if name.strip())
    # Standard output is the report's: whatever the site's code prints goes beside it.
    results: list[Result] = []
    with (
        _stoppable() as stop,
        contextlib.redirect_stdout(sys.stderr),
        contextlib.suppress(KeyboardInterrupt),  # before a test began: there is nothing of it
    ):
        if demo:
            results = _run_demo(names, minutes * 60, seed, stop, curves=curves)
        else:
            one = (str(model), str(data), str(policy))
            results = [_run(*one, names, minutes * 60, seed, stop, curves=curves)]
    if not any(result.rows for result in results):
        _tell_unmeasured(results, as_json=as_json)
        raise typer.Exit(REFUSED)
    _write(results, out, redact=redact, as_json=as_json)
    if not all(_passes(result) for result in results):
        raise typer.Exit(REFUSED)


@contextlib.contextmanager
def _stoppable() -> Iterator[Stop]:
    """A request to end is taken as Ctrl-C is: a report of what is done, and nothing left behind.

    It is noted beside, for code that swallows the interrupt. Where Ctrl-C is switched off, as for a
    job in the background, it stays so.
    """
    from sentinel.stress.lab.deadline import Stop

    stop = Stop()

    def end(_number: int, _frame: object) -> None:
        stop.asked = True
        raise KeyboardInterrupt

    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        numbers.append(signal.SIGINT)
    former = [(number, signal.signal(number, end)) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in former:
            signal.signal(number, handler)


def _require_minutes(minutes: float) -> None:
    if not 0.0 < minutes <= _MOST_MINUTES:
        raise MisuseError(
            f"--budget must be a number of minutes above 0, and at most {_MOST_MINUTES:g} (a week)."
        )


def _tell_unmeasured(results: list[Result], *, as_json: bool) -> None:
    from sentinel.stress.lab import words
    from sentinel.stress.lab.record import not_tried

    said = words.unmeasured(results)
    say_error("\n".join(said))
    if as_json:
        reasons = [one for result in results for one in not_tried(result)]
        print_json({"error": said[0], "not_tried": reasons})


def _passes(result: Result) -> bool:
    unclear = result.withheld_entirely or result.inconclusive or result.interrupted
    return not (result.leaks or unclear)


def _require_options(
    model: str | None, data: str | None, policy: str | None, *, demo: bool
) -> None:
    given = [value is not None for value in (model, data, policy)]
    if demo and any(given):
        raise MisuseError("--demo brings its own model, data and policies; leave the others out.")
    if not demo and not all(given):
        raise MisuseError("Give --model, --data and --policy, or --demo.")


def _require_folder(out: Path) -> None:
    """Refuse a folder that cannot be written before anything is run."""
    import tempfile

    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise MisuseError("--out must be a folder, and no link: records of patients are written.")
    if any((out / name).is_dir() for name in _FILES):
        raise MisuseError(f"{out} holds a folder in the place of {' or '.join(_FILES)}.")
    try:
        there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise MisuseError(_unwritable(out, error)) from None


def _unwritable(out: Path, error: OSError) -> str:
    return f"{out} cannot be written ({error.strerror}); name another folder with --out."


def _run(
    model: str,
    data: str,
    policy: str,
    attacks: tuple[str, ...],
    seconds: float,
    seed: int,
    stop: Stop,
    *,
    curves: bool,
) -> Result:
    import torch

    from sentinel.policy import load_policy
    from sentinel.stress.lab.loading import load_subject
    from sentinel.stress.lab.runner import Options, run_lab

    loaded = load_policy(policy)
    subject = load_subject(model, data, torch.Generator().manual_seed(seed))
    with progress(policy) as on_step:
        return run_lab(subject, loaded, Options(attacks, seconds, curves, seed), on_step, stop)


def _run_demo(
    attacks: tuple[str, ...], seconds: float, seed: int, stop: Stop, *, curves: bool
) -> list[Result]:
    import dataclasses

    from sentinel.stress.lab.deadline import Deadline

    home = "sentinel.demo.subjects"
    results: list[Result] = []
    deadline = Deadline.after(seconds)
    for name, model, data, policy, share in _DEMO:
        one = (f"{home}:{model}", f"{home}:{data}", policy)
        try:
            found = _run(*one, attacks, deadline.left * share, seed, stop, curves=curves)
        except KeyboardInterrupt:  # while this one was loaded
            results[-1:] = [dataclasses.replace(last, interrupted=True) for last in results[-1:]]
            break
        results.append(dataclasses.replace(found, name=name))
        if found.interrupted:
            break
    return results


def _write(results: list[Result], out: Path, *, redact: bool, as_json: bool) -> None:
    import json

    from sentinel.durable import replace_file
    from sentinel.stress.lab.page import page
    from sentinel.stress.lab.record import record

    figures = record(results)
    html = page(results, str(out.resolve()), redacted=redact)
    try:
        out.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace_file(out / "stress.json", json.dumps(figures, indent=2, sort_keys=True).encode())
        replace_file(out / "stress.html", html.encode())
    except OSError as error:
        raise MisuseError(_unwritable(out, error)) from None
    if as_json:
        print_json(figures)
        return
    for result in results:
        _print(result)
    console().print(f"Pictures and figures: {out.resolve() / 'stress.html'}", soft_wrap=True)


def _print(result: Result) -> None:
    from sentinel.stress.lab import words

    screen = console()

    def say(line: str, style: str | None = None) -> None:
        screen.print(line, style=style, markup=False, emoji=False, soft_wrap=True)

    say(f"{result.name}, policy {result.policy}", "bold")
    say(f"  {'attack':<12}{'without guard':<24}with the policy")
    told = None
    for row in result.rows:
        if row.item.setting != told:
            told = row.item.setting
            say(told.words, "dim")
        raw = f"error: {row.error}" if row.error is not None else words.figure(row.raw)
        marks = ["partial" * row.partial, words.mark(result, row)]
        said = ", ".join([words.figure(row.policy), *filter(None, marks)])
        say(f"  {row.item.attack:<12}{raw:<24}{said}")
    say("In brackets: what knowing nothing gives; for membership, others called members.", "dim")
    for mark in dict.fromkeys(words.mark(result, row) for row in result.rows):
        if mark:
            say(f"{mark[0].upper()}{mark[1:]}: {words.MARKS[mark]}.", "dim")
    say(words.verdict(result))
    if result.blind:
        say("The attacker of members could not see even a planted record: it says nothing here.")
    if (assurance := words.assurance(result)) is not None:
        say(assurance)
    if (short := words.partial(result)) is not None:
        say(f"{short} The report lists what was not tried.")


@app.command("calibrate")
def calibrate_command(
    model: Annotated[str, typer.Option(help="package.module:factory, as for the test.")],
    data: Annotated[str, typer.Option(help="package.module:loader, as for the test.")],
    policy: Annotated[str, typer.Option(help="The policy whose other parts are kept.")],
    out: Annotated[Path, typer.Option(help="Policy file that is written; it must not exist.")],
    target: Annotated[
        str,
        typer.Option(
            help="attack=gain that is allowed, with commas between, such as 'rows=0.02': the upper "
            "95 % bound of what it gets more than somebody who knows nothing."
        ),
    ] = "",
    budget: Annotated[float, typer.Option(help="Minutes that it may take.")] = _MINUTES,
    seed: Annotated[int, typer.Option(help="Of the attacker.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Find the weakest knobs that keep the attacks within a target, and write a policy file.

    Under a promise it is fitted to the loader's public records alone. Exit code 1 where no knobs
    were shown to reach the target, or not within the time; nothing is written then.
    """
    import torch

    from sentinel.policy import load_policy
    from sentinel.stress.lab.calibration import calibrate
    from sentinel.stress.lab.loading import load_subject

    targets = _targets(target) or None
    _require_new(out)
    _require_minutes(budget)
    loaded = load_policy(policy)
    subject = load_subject(model, data, torch.Generator().manual_seed(seed))
    with (
        _stoppable(),
        contextlib.redirect_stdout(sys.stderr),
        progress("calibration") as on_step,
    ):
        found = calibrate(subject, loaded, targets, seconds=budget * 60, seed=seed, on_step=on_step)
    if found.text is not None:
        _save(out, found.text)
    _tell_calibrated(found, out, as_json=as_json)
    if found.text is None:
        raise typer.Exit(REFUSED)


def _tell_calibrated(found: Calibrated, out: Path, *, as_json: bool) -> None:
    lines, reached = [one.words for one in found.evidence], found.text is not None
    if as_json:
        knobs = {"keep": found.keep}
        knobs |= {"max_norm": found.max_norm} if math.isfinite(found.max_norm) else {}
        knobs |= {"noise_ratio": found.noise_ratio} if reached else {}
        told = {"reached": reached, "cut": found.cut, "tried": found.tried, "evidence": lines}
        print_json(told | {"notes": found.notes} | knobs)
        return
    for line in [*lines, *found.notes]:
        console().print(line, markup=False, soft_wrap=True)
    said = "No knobs that were tried reach the target; nothing was written."
    if reached:
        said = f"noise_ratio {found.noise_ratio:g}, keep {found.keep:g}{_CUT * found.cut}: {out}"
    elif found.cut:
        said = _LATE
    console().print(said, markup=False, soft_wrap=True)


def _require_new(out: Path) -> None:
    """Refuse a file that cannot be written before anything is run."""
    if out.exists() or out.is_symlink():
        raise MisuseError(f"{out} exists; name a file that does not.")
    if not out.parent.is_dir():
        raise MisuseError(f"There is no folder {out.parent}; make it first.")
    _require_folder(out.parent.resolve())


def _save(out: Path, text: str) -> None:
    from sentinel.durable import replace_file

    try:
        replace_file(out, text.encode())
    except OSError as error:
        raise MisuseError(_unwritable(out, error)) from None


def _targets(text: str) -> dict[str, float]:
    found = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, gain = part.partition("=")
        try:
            found[name.strip()] = float(gain)
        except ValueError:
            raise MisuseError("--target must be attack=number, as in rows=0.02.") from None
        if not math.isfinite(found[name.strip()]):
            raise MisuseError("--target must be a finite number, as in rows=0.02.")
    return found
