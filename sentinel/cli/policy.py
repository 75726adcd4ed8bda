"""`sentinel policy`: write, check, test and explain policy files.

Exit codes: 0 done, 1 a check or a test failed, 2 misuse.
"""

from __future__ import annotations

import datetime as dt
import json
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sentinel.cli import policy_screen as screen
from sentinel.cli.console import REFUSED, AsJson, SentinelGroup, print_json
from sentinel.errors import MisuseError, PolicyError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from sentinel.policy import Policy
    from sentinel.policy.explain import Explanation, Group
    from sentinel.policy.manifest import Manifest
    from sentinel.policy.store import LoadedPolicy

    Report = dict[str, Any]

app = typer.Typer(
    cls=SentinelGroup,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Write, check, test and explain policy files.",
)

Targets = Annotated[
    list[str], typer.Argument(help="Policy files, folders of them, or names of shipped policies.")
]
Source = Annotated[str, typer.Argument(help="A policy file, or the name of a shipped policy.")]
Model = Annotated[
    Path | None, typer.Option("--model", help="A safetensors file that holds the model's state.")
]
Score = Annotated[float, typer.Option(min=0.0, max=1.0, help="From 0 to 1.")]


@app.command()
def check(targets: Targets, model: Model = None, as_json: AsJson = False) -> None:
    """Look for mistakes, holes and rules without effect; with --model, also against a model."""
    from sentinel.policy.manifest import read_manifest

    manifest = read_manifest(model) if model else None
    reports: list[Report] = []
    for path in _policy_files(targets):
        report: Report = {"source": str(path), "ok": False}
        reports.append(report)
        try:
            loaded = _parsed(path)
        except PolicyError as error:
            report["findings"] = [_finding("error", line) for line in _told(error, path)]
            continue
        findings = _findings(loaded, path, manifest)
        report |= {"name": loaded.policy.name, "digest": loaded.digest, "findings": findings}
        report["ok"] = not any(finding["severity"] == "error" for finding in findings)
    _finish(reports, as_json=as_json)


@app.command("test")
def run_tests(targets: Targets, as_json: AsJson = False) -> None:
    """Run the cases of policy test files (NAME.test.toml beside NAME.toml)."""
    reports: list[Report] = []
    for path in _policy_files(targets):
        try:
            reports.append(_tested(path))
        except PolicyError as error:
            findings = [_finding("error", line) for line in _told(error, path)]
            reports.append({"source": str(path), "ok": False, "findings": findings})
    _finish(reports, as_json=as_json)


@app.command()
def explain(
    source: Source,
    *,
    model: Model = None,
    sensitivity: Score = 0.0,
    suspicion: Score = 0.0,
    budget_spent: Score = 0.0,
    unhealthy: Annotated[
        bool, typer.Option("--unhealthy", help="The global model is broken.")
    ] = False,
    auto_norm: Annotated[
        list[str] | None,
        typer.Option(
            help='What max_norm = "auto" of a rule has come to: RULE=NORM. May be repeated.'
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say in plain sentences what a policy does, and which rule decided it."""
    from sentinel.policy.explain import explain as explained
    from sentinel.policy.explain import stand_ins
    from sentinel.policy.manifest import read_manifest
    from sentinel.terms import Evidence

    path = _one_policy(source)
    loaded = _parsed(path)
    manifest = read_manifest(model) if model else None
    labels = None if manifest else stand_ins(loaded.policy)
    coordinates = _candidates(loaded, manifest) or dict.fromkeys(labels or {}, 1)
    norms = _auto_norms(loaded.policy, auto_norm or [])
    evidence = Evidence(coordinates, sensitivity, suspicion, budget_spent, unhealthy, norms)
    explanation = explained(loaded.policy, evidence, labels=labels)
    findings = _findings(loaded, path, manifest)
    if as_json:
        print_json(_explanation_json(loaded, explanation, findings))
        return
    screen.show_policy(loaded)
    screen.show_explanation(evidence, explanation)
    told = (
        *screen.auto_lines(loaded, norms),
        *screen.noise_lines(explanation),
        *screen.left_aside(loaded, manifest),
    )
    for line in told:
        screen.say(line)
    for finding in findings:
        if finding["severity"] != "note" or loaded.policy.privacy:  # other notes are said above
            screen.show_finding(finding)


@app.command()
def schema(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write to a file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print the JSON Schema of policy files, for editors and for other languages."""
    from sentinel.policy.json_schema import json_schema

    text = json.dumps(json_schema(), indent=2) + "\n"
    if output is None:
        typer.echo(text, nl=False)
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise MisuseError(f"{output}: cannot be written ({error.strerror})") from None
    if as_json:
        print_json({"written": [str(output)]})
    else:
        screen.say(f"Wrote {output}.")


@app.command("list")
def list_shipped(as_json: AsJson = False) -> None:
    """List the shipped policies."""
    from sentinel.policy.store import shipped

    rows = []
    for name, path in shipped().items():
        loaded = _parsed(path)
        about = _first_comment(path)
        rows.append({"name": name, "about": about, "path": str(path), "digest": loaded.digest})
    if as_json:
        print_json({"policies": rows})
    else:
        screen.table(("policy", "made for"), [(row["name"], row["about"]) for row in rows])


@app.command()
def new(
    path: Annotated[Path, typer.Argument(help="The file to write, as in ./our-site.toml.")],
    as_json: AsJson = False,
) -> None:
    """Write a commented starter policy and a test file beside it; nothing is overwritten."""
    from sentinel.policy.starter import starter
    from sentinel.policy.store import TEST_SUFFIX

    name = path.name.removesuffix(".toml")
    if path.suffix != ".toml" or not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,63}", name):
        raise MisuseError(
            f"{path}: expected a file name of small letters, digits and hyphens that ends in .toml"
        )
    files = (path, path.with_name(name + TEST_SUFFIX))
    for file in files:
        if file.exists() or file.is_symlink():
            raise MisuseError(f"{file} exists already; nothing was written. Choose another name")
    for file, text in zip(files, starter(name), strict=True):
        _write_new(file, text)
    if as_json:
        print_json({"written": [str(file) for file in files]})
        return
    screen.say(f"Wrote {files[0]} and {files[1]}.")
    screen.say(
        f"Next: edit it, then run `sentinel policy check {path}`, `... test` and `... explain`."
    )


# Finding and reading files.


def _policy_files(targets: Iterable[str]) -> list[Path]:
    """Return the policy files that the targets mean; a test file stands for its policy."""
    found: dict[Path, None] = {}
    for target in targets:
        path = Path(target)
        if path.is_dir():
            found |= dict.fromkeys(_in_folder(path))
        else:
            found[_one_policy(target)] = None
    return list(found)


def _in_folder(folder: Path) -> list[Path]:
    from sentinel.policy.store import TEST_SUFFIX

    files = [p for p in sorted(folder.glob("*.toml")) if not p.name.endswith(TEST_SUFFIX)]
    if not files:
        raise MisuseError(f"{folder}: holds no policy file; expected files that end in .toml")
    return files


def _one_policy(target: str) -> Path:
    from sentinel.policy.store import TEST_SUFFIX, find_policy

    if target.endswith(TEST_SUFFIX):
        target = target.removesuffix(TEST_SUFFIX) + ".toml"
    path = find_policy(target)
    if path.is_dir():
        raise MisuseError(f"{path}: expected a file, not a folder")
    return path


def _parsed(path: Path) -> LoadedPolicy:
    from sentinel.policy.store import parse_policy, read_for_checking

    return parse_policy(read_for_checking(path), str(path))


def _write_new(path: Path, text: str) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            os.fchmod(descriptor, 0o644)  # whatever the umask: a group-writable one is refused
            file.write(text)
    except OSError as error:
        raise MisuseError(f"{path}: cannot be written ({error.strerror})") from None


def _first_comment(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    comments = (line.removeprefix("# ") for line in lines if line.startswith("# "))
    return next(comments, "")


# Reports.


def _finding(severity: str, message: str, rule: str | None = None) -> Report:
    return {"severity": severity, "rule": rule, "message": message}


def _told(error: PolicyError, path: Path) -> list[str]:
    return [line.removeprefix(f"{path}: ") for line in str(error).split("\n")]


def _candidates(loaded: LoadedPolicy, manifest: Manifest | None) -> Mapping[str, int] | None:
    return manifest.candidates(loaded.policy.limits.statistics) if manifest else None


def _auto_norms(policy: Policy, given: list[str]) -> dict[str, float]:
    """Read RULE=NORM; a rule that has no "auto", or a norm outside its limits, is a mistake."""
    norms: dict[str, float] = {}
    for one in given:
        rule, _, text = one.partition("=")
        limits = policy.autos.get(rule)
        if limits is None:
            known = ", ".join(policy.autos) or "none"
            raise MisuseError(
                f'--auto-norm {one}: expected RULE=NORM of a rule with max_norm = "auto"; such '
                f"rules here: {known}"
            )
        try:
            norms[rule] = float(text)
        except ValueError:
            norms[rule] = math.nan
        if not limits.floor <= norms[rule] <= limits.ceiling:
            raise MisuseError(
                f"--auto-norm {one}: expected a number from {limits.floor:g} to {limits.ceiling:g}"
            )
    return norms


def _findings(loaded: LoadedPolicy, path: Path, manifest: Manifest | None) -> list[Report]:
    from sentinel.cli.policy_budget import affordable
    from sentinel.policy.checks import check as checked

    today = dt.datetime.now(dt.UTC).date()
    candidates, pays_for = _candidates(loaded, manifest), affordable(loaded.policy)
    found = checked(loaded.policy, today, candidates, pays_for=pays_for)
    rows = [_finding(one.severity.value, one.message, one.rule) for one in found]
    return [*_unsafe(path), *rows]


def _unsafe(path: Path) -> list[Report]:
    """Say whether the guard would refuse the file for where it lies or who may write to it."""
    from sentinel.policy.store import OtherOwnerError, unsafe_to_use

    problem = unsafe_to_use(path)
    if problem is None:
        return []
    severity = "warning" if isinstance(problem, OtherOwnerError) else "error"
    told = " ".join(_told(problem, path))
    return [_finding(severity, f"would be refused where it is used: {told}")]


def _tested(path: Path) -> Report:
    from sentinel.policy.cases import parse_cases, run_cases
    from sentinel.policy.store import TEST_SUFFIX, read_for_checking

    loaded = _parsed(path)
    tests = path.with_name(path.name.removesuffix(".toml") + TEST_SUFFIX)
    if not tests.is_file():
        raise PolicyError(f"{path}: has no test file; write {tests.name} beside it")
    report = run_cases(loaded.policy, parse_cases(read_for_checking(tests), str(tests)))
    cases = [
        {"name": result.name, "ok": not result.problems, "problems": list(result.problems)}
        for result in report.results
    ]
    uncovered = [_finding("error", line) for line in report.uncovered]
    return {"source": str(path), "ok": report.passed, "cases": cases, "findings": uncovered}


def _finish(reports: list[Report], *, as_json: bool) -> None:
    """Show what became of every file, and exit by it."""
    ok = all(report["ok"] for report in reports)
    if as_json:
        print_json({"ok": ok, "files": reports})
    else:
        for report in reports:
            screen.show_report(report)
    raise typer.Exit(0 if ok else REFUSED)


def _explanation_json(
    loaded: LoadedPolicy, explanation: Explanation, findings: list[Report]
) -> Report:
    noise = explanation.noise
    return {
        "policy": loaded.policy.name,
        "digest": loaded.digest,
        "formal_guarantee": loaded.policy.privacy is not None,
        "action": explanation.action.word,
        "decided_by": explanation.decided_by,
        "groups": [_group_json(group) for group in explanation.groups],
        "noise": noise
        and {
            "norm": noise.norm,
            "clip": _finite(noise.clip),
            "ratio": noise.ratio,
            "multiplier": noise.multiplier,
            "coordinates": noise.coordinates,
            "drowns": noise.drowns,
            "trained": noise.trained,
        },
        "findings": findings,
    }


def _group_json(group: Group) -> Report:
    from sentinel.terms import Action

    knobs: dict[str, Report] = {
        knob: {"value": found.value, "rules": found.rules}
        for knob, found in group.knobs.items()
        if knob != "action"
    }
    deciders = group.knobs["action"].rules if "action" in group.knobs else ()
    knobs["action"] = {"value": Action(group.action).word, "rules": deciders}
    return {
        "parameters": group.parameters,
        "coordinates": group.coordinates,
        "rules": group.rules,
        "knobs": knobs,
        "noise_std": group.noise_std,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
