"""What the documents say is there, and what they show runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sentinel.detection.rules import SENTENCES, VERDICTS, Kind
from sentinel.terms import Reason, Verdict

TOP = Path(__file__).parent.parent


def test_the_runbook_has_a_line_for_every_reason_code() -> None:
    text = (TOP / "docs" / "runbook.md").read_text()
    lines = re.findall(r"^\| `([a-z-]+)`", text, re.MULTILINE)
    assert set(lines) == {reason.value for reason in Reason}


def test_a_loop_of_ten_lines_runs_guarded_after_adding_three(monkeypatch, tmp_path) -> None:
    """The README's own code, as it stands there, before and after."""
    before, after = re.findall(r"```python\n(.*?)```", (TOP / "README.md").read_text(), re.DOTALL)[
        :2
    ]
    monkeypatch.chdir(tmp_path)
    added = [
        line
        for line in after.splitlines()
        if line.strip() not in map(str.strip, before.splitlines())
    ]
    assert len([line for line in added if line.strip()]) == 4  # import, guard, with; and send(...)
    import torch  # noqa: PLC0415 - only this test needs it

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(13, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    rows = torch.randn(64, 13)
    labels = (rows[:, :1] > 0).float()
    loader = [(rows[at : at + 16], labels[at : at + 16]) for at in range(0, 64, 16)]
    for code, guarded in ((before, False), (after, True)):
        sent: list[dict[str, torch.Tensor]] = []
        names = {
            "torch": torch,
            "model": model,
            "loader": loader,
            "global_state": {name: value.clone() for name, value in start.items()},
            "number": 1,
            "send": sent.append,
        }
        exec(compile(code, "README.md", "exec"), names)  # noqa: S102 - the README's own code
        distance = sum(float((sent[0][name] - start[name]).pow(2).sum()) for name in start) ** 0.5
        assert distance > 0.01
        assert (tmp_path / "state" / "ledger.sqlite").exists() is guarded


@pytest.mark.parametrize("path", [*TOP.glob("*.md"), *TOP.glob("docs/**/*.md")], ids=str)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def test_every_verdict_of_the_inspection_is_explained() -> None:
    text = (TOP / "docs" / "detectors.md").read_text()
    missing = {verdict for verdict in Verdict if f"`{verdict.value}`" not in text}
    assert missing <= {Verdict.HONEST}


def test_every_finding_has_a_verdict_and_a_sentence() -> None:
    assert set(VERDICTS) == set(SENTENCES) == set(Kind)
    assert set(VERDICTS.values()) == set(Verdict) - {Verdict.HONEST}
