"""`sentinel detectors calibrate` and `drift`: a rate of false alarms, and whether it holds."""

from __future__ import annotations

import re
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sentinel.cli.console import REFUSED, AsJson, StateDir, print_json, read_tensors
from sentinel.errors import MisuseError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sentinel.audit import Entry
    from sentinel.calibration import Calibration, Gathered, Kept, Which
    from sentinel.policy import LoadedPolicy
    from sentinel.state import StateFolder

Policy = Annotated[
    str,
    typer.Option(help="The policy in force: its dataset is meant, and its thresholds may tighten."),
]


def register(app: typer.Typer) -> None:
    """Add both commands to `sentinel detectors`."""
    app.command("calibrate")(calibrate_command)
    app.command("drift")(drift_command)


def calibrate_command(
    policy: Policy,
    alpha: Annotated[
        float, typer.Option(help="Most of the ordinary rounds that may alarm, as a share.")
    ] = 0.01,
    globals_: Annotated[
        Path | None,
        typer.Option(
            "--globals",
            metavar="FOLDER",
            help="Past global models (safetensors, in the order of their names), not the log's.",
        ),
    ] = None,
    updates: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Updates, local - global (safetensors), not the log's; never under a promise.",
        ),
    ] = None,
    room: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            help="How far above the smallest threshold the printed rule is to be: a slow trend "
            "soon crosses that one.",
        ),
    ] = 0.05,
    newest: Annotated[
        int | None, typer.Option(min=1, help="Only so many of the newest rounds.")
    ] = None,
    state_dir: StateDir = None,
    as_json: AsJson = False,
) -> None:
    """Calibrate both detectors on this site's own rounds, by split-conformal prediction.

    A new round then alarms with probability at most alpha for each detector, as long as it is
    exchangeable with those rounds. What was found is kept in the state folder for `detectors
    drift`; the policy is not changed. Exit code 1 where a detector has too few rounds.
    """
    from sentinel.calibration import write_calibration
    from sentinel.cli.calibration_screen import calibration_report, print_calibration
    from sentinel.detection import conformal

    conformal.level(alpha)
    loaded = _loaded(policy)
    state = _checked(state_dir)
    last = state.log.last()
    until = 0 if last is None else last.seq  # a guard may be writing: what it adds counts as new
    gathered = _gathered(state, loaded, until, globals_, updates)
    if newest is not None:
        gathered = {which: (found.newest(newest), own) for which, (found, own) in gathered.items()}
    calibration = _calibration(state, loaded, alpha, gathered, last)
    if calibration is not None:
        write_calibration(state, calibration)
    found = {which: one for which, (one, _) in gathered.items()}
    report = calibration_report(calibration, found, alpha, loaded.policy, room)
    report["policy_in_force"] = _is_in_force(state, loaded)
    if as_json:
        print_json(report)
    else:
        print_calibration(report)
    if calibration is None or len(calibration.kept) < len(gathered):
        raise typer.Exit(REFUSED)


def drift_command(
    policy: Policy,
    page: Annotated[
        Path | None, typer.Option(help="Also draw it, as one HTML page without scripts.")
    ] = None,
    state_dir: StateDir = None,
    as_json: AsJson = False,
) -> None:
    """Say whether the rounds since the calibration still look like those it was made of.

    Exit code 1 where they do not (at the level of 1 in 100), or where the detector was replaced
    since, or the calibration cannot be used.
    """
    from sentinel.calibration import drift_of, read_calibration
    from sentinel.cli.calibration_page import drift_page
    from sentinel.cli.calibration_screen import drift_report, print_drift, spoiled

    loaded = _loaded(policy)
    state = _checked(state_dir)
    calibration = read_calibration(state)
    _require_same_question(state, loaded, calibration)
    found = []
    for kept in calibration.kept:
        since = _since(state, loaded, calibration, kept)
        drift = drift_of(kept, calibration.seed, since, loaded.policy)
        found.append((kept, since, drift))
    current = {kept.which: _bundle(kept.which) for kept in calibration.kept}
    report = drift_report(found, current)
    report["policy_in_force"] = _is_in_force(state, loaded)
    if page is not None:
        drawn = [drift for _, _, drift in found]
        page.write_text(drift_page(drawn, report), encoding="utf-8")
    if as_json:
        print_json(report)
    else:
        print_drift(report)
    if spoiled(report):
        raise typer.Exit(REFUSED)


def _loaded(policy: str) -> LoadedPolicy:
    from sentinel.policy import load_policy

    return load_policy(policy)


def _checked(state_dir: Path | None) -> StateFolder:
    """The state, once log, chain and ledger were checked."""
    from sentinel.cli.peers import verified
    from sentinel.state import StateFolder

    state = StateFolder.existing(state_dir)
    verified(state, torn_end=True)
    return state


def _is_in_force(state: StateFolder, loaded: LoadedPolicy) -> bool:
    """Whether the guard that started last runs this very policy file."""
    from sentinel.audit import GuardStarted
    from sentinel.cli.peers import own_entries

    started = [one.record for one in own_entries(state) if isinstance(one.record, GuardStarted)]
    return bool(started) and started[-1].policy == loaded.digest


def _bundle(which: Which) -> str:
    from sentinel.detection import load_detector

    return load_detector(which.bundle).digest


def _gathered(
    state: StateFolder,
    loaded: LoadedPolicy,
    until: int,
    globals_: Path | None,
    updates: Path | None,
) -> dict[Which, tuple[Gathered, bool]]:
    """The rounds of each score, and whether they come from a folder."""
    from sentinel.calibration import Which, from_globals, from_log, from_updates, require_no_promise
    from sentinel.cli.peers import own_entries

    if updates is not None:
        require_no_promise(loaded.policy, state.ledger)

    def logged(which: Which) -> Gathered:
        entries = takewhile(lambda entry: entry.seq <= until, own_entries(state))
        return from_log(entries, state.ledger, loaded.policy, which, _bundle(which))

    models = None if globals_ is None else from_globals(_tensors(globals_), loaded.policy)
    changes = None if updates is None else from_updates(_tensors(updates))
    return {
        Which.SUSPICION: (models or logged(Which.SUSPICION), models is not None),
        Which.SENSITIVITY: (changes or logged(Which.SENSITIVITY), changes is not None),
    }


def _tensors(folder: Path) -> Iterator[dict[str, Any]]:
    """The states in a folder, in the order of their names; round-10 comes after round-9."""
    paths = sorted(folder.glob("*.safetensors"), key=_in_order)
    if not paths:
        raise MisuseError(f"There is no file *.safetensors in {folder}: name the folder of them.")
    for path in paths:
        yield read_tensors(path, "a state")


def _in_order(path: Path) -> list[tuple[int, str]]:
    parts = re.split(r"([0-9]+)", path.name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def _calibration(
    state: StateFolder,
    loaded: LoadedPolicy,
    alpha: float,
    gathered: dict[Which, tuple[Gathered, bool]],
    last: Entry | None,
) -> Calibration | None:
    """What is to be kept of the log up to `last`; None where no score has rounds enough."""
    import secrets
    import time

    from sentinel.calibration import Calibration, is_promised, keep
    from sentinel.detection.conformal import rounds_needed
    from sentinel.terms import GENESIS

    seed = secrets.token_hex(32)
    promised = is_promised(loaded.policy, state.ledger)
    kept = tuple(
        keep(
            found,
            which,
            _bundle(which),
            alpha,
            seed,
            source="folder" if own else "log",
            promised=promised,
        )
        for which, (found, own) in gathered.items()
        if len(found.rounds) >= rounds_needed(alpha)
    )
    if not kept:
        return None
    return Calibration(
        at=int(time.time()),
        policy=loaded.digest,
        dataset=loaded.policy.dataset,
        log_seq=0 if last is None else last.seq,
        log_head=GENESIS if last is None else last.hash,
        seed=seed,
        kept=kept,
    )


def _require_same_question(
    state: StateFolder, loaded: LoadedPolicy, calibration: Calibration
) -> None:
    """Refuse to compare with another dataset, or what a promise made since forbids to read."""
    from sentinel.calibration import Which, is_promised

    dataset = loaded.policy.dataset
    if calibration.dataset != dataset:
        raise MisuseError(
            f"The calibration is of the dataset {calibration.dataset!r}, and the policy is of "
            f"{dataset!r}: name the policy that is in force with --policy, or calibrate for it."
        )
    raw = [
        kept for kept in calibration.kept if kept.which is Which.SENSITIVITY and not kept.promised
    ]
    if raw and is_promised(loaded.policy, state.ledger):
        raise MisuseError(
            f"The dataset {dataset!r} is under a promise, and this calibration read the scores of "
            "raw updates, from before it: no threshold of it may be used. Calibrate again; only "
            "global models and what left behind the promise will be read."
        )


def _since(
    state: StateFolder, loaded: LoadedPolicy, calibration: Calibration, kept: Kept
) -> Gathered:
    from sentinel.calibration import from_log
    from sentinel.cli.peers import own_entries

    return from_log(
        own_entries(state),
        state.ledger,
        loaded.policy,
        kept.which,
        kept.bundle,
        after=calibration.log_seq,
    )
