"""Hospitals of one federation compare what the server sent them, by real guards and commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import sentinel
from sentinel.audit.peers import LARGEST
from sentinel.cli.main import app
from sentinel.errors import RoundRefused
from sentinel.releases import RoundKey
from sentinel.update import model_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from click.testing import Result

    State = dict[str, torch.Tensor]

POLICY = """
schema = 1
name = "peers"
[[rule]]
id = "baseline"
max_norm = 0.5
[[rule]]
id = "broken"
when = { unhealthy = true }
action = "refuse-round"
"""
ROUNDS = 4
ODD = 2  # the round in which one client is attacked


def honest(number: int) -> State:
    generator = torch.Generator().manual_seed(number)
    return {"a.weight": torch.randn(12, 10, generator=generator), "a.bias": torch.zeros(12)}


class Server:
    """Sends every client the model of the round; in the odd round, the victim another one."""

    def __init__(
        self, victim: str | None = None, other: Callable[[State], State] | None = None
    ) -> None:
        """Honest where nobody is named."""
        self._victim, self._other = victim, other

    def model(self, number: int, client: str) -> State:
        """What a client is sent."""
        sent = honest(number)
        if self._other is not None and (number, client) == (ODD, self._victim):
            return self._other(sent)
        return sent


def suppressed(state: State) -> State:
    """Gradient suppression: biases far below zero."""
    return {**state, "a.bias": torch.full((12,), -50.0)}


def one_bit(state: State) -> State:
    """The least that can differ."""
    changed = {name: value.clone() for name, value in state.items()}
    changed["a.bias"][0] = torch.nextafter(torch.tensor(0.0), torch.tensor(1.0))
    return changed


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


class Hospital:
    """A site with a state folder of its own."""

    def __init__(self, folder: Path, name: str) -> None:
        """Name its state, and the file that it shows."""
        self.name, self.state = name, folder / name
        self.file = folder / f"{name}.json"
        self._policy = folder / "policy.toml"

    def take_part(self, server: Server, rounds: Iterable[int], **options: Any) -> None:
        """Train in these rounds, through a guard."""
        options.setdefault("unsafe_skip_inspection", True)
        guard = sentinel.Guard(self._policy, self.state, **options)
        for number in rounds:
            state = server.model(number, self.name)
            with guard.round(number, state) as rnd:
                pass
            rnd.release({name: value + 0.01 for name, value in state.items()})

    def show(self, *more: str) -> Path:
        """Its digests, as a file for the others."""
        done = run("audit", "digests", "-o", self.file, "--state-dir", self.state, *more)
        assert done.exit_code == 0, done.output
        return self.file

    def compare(self, *more: str | Path) -> Result:
        """Its log beside the files of others."""
        return run("audit", "compare", *more, "--state-dir", self.state)


@pytest.fixture
def hospital(tmp_path: Path) -> Callable[[str], Hospital]:
    policy = tmp_path / "policy.toml"
    policy.write_text(POLICY)
    policy.chmod(0o600)
    return lambda name: Hospital(tmp_path, name)


@pytest.fixture
def two(hospital) -> Callable[..., tuple[Hospital, Hospital]]:
    def make(server: Server, rounds: int = ROUNDS, **options: Any) -> tuple[Hospital, Hospital]:
        here, there = hospital("hospital-a"), hospital("hospital-b")
        for site in (here, there):
            site.take_part(server, range(rounds), **options)
        return here, there

    return make


# ---- what leaves


def test_the_file_holds_digests_and_numbers_alone_and_is_its_owners(two) -> None:
    here, _ = two(Server(), 3)
    file = here.show()
    assert file.stat().st_mode & 0o777 == 0o600
    document = json.loads(file.read_text())
    assert document.keys() == {"format", "version", "log", "rounds"}
    assert document["rounds"] == [
        {
            "number": number,
            "round": RoundKey("default", "default", number).digest,
            "global_model": model_digest(honest(number)),
        }
        for number in range(3)
    ]
    log = json.loads(
        run("audit", "show", "--last", "99", "--state-dir", here.state, "--json").output
    )
    assert document["log"] == [row for row in log if row["type"] == "round.opened"][-1]["hash"]


def test_standard_output_has_the_same_bytes_each_time(two) -> None:
    here, _ = two(Server(), 2)
    written = run("audit", "digests", "--state-dir", here.state).stdout_bytes
    assert written == here.show().read_bytes()
    assert written == here.show().read_bytes()


def test_a_run_or_the_later_rounds_can_be_shown_alone(hospital) -> None:
    """Other federations of this site are none of these peers' business."""
    here = hospital("hospital-a")
    here.take_part(Server(), range(3), federation="hearts", run="trial")
    here.take_part(Server(), range(3))

    def numbers(*more: str) -> list[tuple[int, str]]:
        document = json.loads(here.show(*more).read_text())
        return [(row["number"], row["round"]) for row in document["rounds"]]

    def named(federation: str, run: str, *rounds: int) -> list[tuple[int, str]]:
        return [(number, RoundKey(federation, run, number).digest) for number in rounds]

    assert len(numbers()) == 6
    assert numbers("--federation", "hearts", "--run", "trial") == named("hearts", "trial", 0, 1, 2)
    assert numbers("--run", "default", "--from-round", "2") == named("default", "default", 2)
    alone = run("audit", "digests", "--federation", "hearts", "--state-dir", here.state)
    assert alone.exit_code == 2
    assert "--run" in alone.output


def test_a_damaged_log_shows_nothing_and_is_compared_with_nobody(two) -> None:
    here, there = two(Server(), 2)
    theirs = there.show()
    log = here.state / "audit" / "audit.jsonl"
    log.write_bytes(log.read_bytes().replace(b'"number":0', b'"number":1'))
    done = run("audit", "digests", "-o", here.file, "--state-dir", here.state)
    assert done.exit_code == 1
    assert "log-damaged" in done.output
    assert not here.file.exists()
    assert run("audit", "digests", "--state-dir", here.state).stdout == ""
    assert here.compare(theirs).exit_code == 1
    save_file(honest(0), here.file.with_name("global"))
    asked = ("--peers", theirs, "--round", "0", "--state-dir", here.state)
    done = run("inspect", here.file.with_name("global"), *asked)
    assert done.exit_code == 1
    assert "log-damaged" in done.output


def test_a_file_cannot_be_written_over_what_the_guard_keeps(two, tmp_path: Path) -> None:
    here, _ = two(Server(), 1)
    log = here.state / "audit" / "audit.jsonl"
    before = log.read_bytes()
    (tmp_path / "link").symlink_to(here.state / "audit")
    for out in (log, tmp_path / "link" / "audit.jsonl", here.state / "new", tmp_path / "no" / "x"):
        assert run("audit", "digests", "-o", out, "--state-dir", here.state).exit_code == 2
    assert run("audit", "digests", "-o", tmp_path, "--state-dir", here.state).exit_code == 2
    assert log.read_bytes() == before


def test_what_is_no_plain_file_is_not_replaced(two, tmp_path: Path) -> None:
    here, _ = two(Server(), 1)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "aim").write_bytes(b"kept")
    (tmp_path / "link").symlink_to(tmp_path / "aim")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("pipe", "link", "dangling"):
        done = run("audit", "digests", "-o", tmp_path / name, "--state-dir", here.state)
        assert done.exit_code == 2
        assert "is no plain file" in done.output
    assert (tmp_path / "pipe").is_fifo()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "aim").read_bytes() == b"kept"


def test_a_run_that_has_no_round_is_misuse_and_writes_nothing(two) -> None:
    """A mistyped name would give a file that is compared with nothing."""
    here, _ = two(Server(), 1)
    for named in (("--run", "typo"), ("--run", "default", "--federation", "typo")):
        done = run("audit", "digests", "-o", here.file, "--state-dir", here.state, *named)
        assert done.exit_code == 2
        assert "no such round" in done.output
    assert not here.file.exists()


def test_full_standard_output_is_a_sentence(two) -> None:
    here, _ = two(Server(), 1)
    command = [sys.executable, "-c", "from sentinel.cli.main import app; app()", "audit", "digests"]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(  # noqa: S603 - our own code
            [*command, "--state-dir", str(here.state)],
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.startswith(b"Standard output could not be written")
    assert done.stderr.count(b"\n") == 1


def test_a_full_disk_leaves_the_file_as_it_was(two, monkeypatch: pytest.MonkeyPatch) -> None:
    here, _ = two(Server(), 1)
    here.file.write_bytes(b"earlier")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sentinel.cli.audit.replace_file", full)
    done = run("audit", "digests", "-o", here.file, "--state-dir", here.state)
    assert done.exit_code == 1
    assert here.file.read_bytes() == b"earlier"


# ---- logs beside one another


def test_an_honest_server_shows_no_difference(two) -> None:
    here, there = two(Server())
    done = here.compare(there.show())
    assert done.exit_code == 0, done.output
    assert f"{there.file}: 4 of 4 rounds compared (100 %)." in done.output
    assert "No difference in any round that was compared." in done.output
    assert json.loads(here.compare(there.file, "--json").output)["verdict"] == "no-difference"


@pytest.mark.parametrize("other", [suppressed, one_bit])
@pytest.mark.parametrize("victim", ["hospital-a", "hospital-b"])
def test_a_server_that_sends_one_client_another_model_once_is_caught(
    two, other: Callable[[State], State], victim: str
) -> None:
    """By the victim and by the other, however small the difference."""
    here, there = two(Server(victim, other))
    for site, peer in ((here, there), (there, here)):
        done = site.compare(peer.show())
        assert done.exit_code == 1, done.output
        found = [line for line in done.output.splitlines() if line.startswith("Round ")]
        assert len(found) == 1
        sentence = f"Round {ODD}: {peer.file} was sent another global model than this site"
        assert found[0].startswith(sentence)
        assert "The server is inconsistent: stop taking part" in done.output.splitlines()[-1]
        document = json.loads(site.compare(peer.file, "--json").output)
        assert document["verdict"] == document["peers"][0]["verdict"] == "inconsistency"
        digest = RoundKey("default", "default", ODD).digest
        assert document["peers"][0]["another"] == [{"number": ODD, "round": digest}]
        assert document["peers"][0]["share"] == 1.0


def test_a_refused_round_is_compared_as_well(hospital) -> None:
    """The victim's guard refused the model; the others were sent an honest one."""
    here, there = hospital("hospital-a"), hospital("hospital-b")
    broken = Server("hospital-a", lambda state: {**state, "a.bias": torch.full((12,), torch.nan)})
    there.take_part(broken, [ODD])
    with pytest.raises(RoundRefused):
        here.take_part(broken, [ODD], unsafe_skip_inspection=False)
    done = here.compare(there.show())
    assert done.exit_code == 1
    assert f"Round {ODD}: " in done.output


def test_rounds_of_one_site_alone_are_told_and_are_never_the_same(hospital) -> None:
    here, there = hospital("hospital-a"), hospital("hospital-b")
    here.take_part(Server(), range(6))
    there.take_part(Server(), [2, 3, 7])
    done = here.compare(there.show())
    assert done.exit_code == 0
    assert "2 of 6 rounds compared (33 %)" in done.output
    assert "it has no such round: 0 to 1, 4 to 5." in done.output
    assert "this site has no such round: 1." in done.output
    peer = json.loads(here.compare(there.file, "--json").output)["peers"][0]
    assert [name["number"] for name in peer["not_compared"]] == [0, 1, 4, 5]
    assert "compared with nobody" in done.output.splitlines()[-1]
    assert (peer["compared"], peer["not_here"], peer["share"]) == (2, 1, 0.3333)


def test_a_file_without_a_round_in_common_is_misuse(hospital) -> None:
    """Another run, another federation, or nothing at all: no answer is no all-clear."""
    here, other = hospital("hospital-a"), hospital("hospital-b")
    agreeing = hospital("hospital-c")
    here.take_part(Server(), range(2))
    agreeing.take_part(Server(), range(2))
    other.take_part(Server(), range(2), run="trial-2")
    done = here.compare(other.show(), agreeing.show())
    assert done.exit_code == 2
    assert "named alike" in done.output
    assert f"{other.file}: 0 of 2 rounds compared (0 %)." in done.output
    document = here.compare(other.file, "--json").stdout
    assert json.loads(document)["verdict"] == "not-compared"
    nothing = here.compare(agreeing.file, "--run", "unknown")
    assert nothing.exit_code == 2


def test_one_bad_round_outweighs_a_file_that_shares_none(hospital) -> None:
    server = Server("hospital-b", one_bit)
    sites = [hospital(f"hospital-{letter}") for letter in "abc"]
    for site, job in zip(sites, ("default", "default", "elsewhere"), strict=True):
        site.take_part(server, range(ODD, ODD + 1), run=job)
    done = sites[0].compare(sites[1].show(), sites[2].show())
    assert done.exit_code == 1


def test_a_difference_that_was_explained_can_be_left_behind(two) -> None:
    here, there = two(Server("hospital-a", one_bit))
    there.show()
    assert here.compare(there.file, "--from-round", str(ODD)).exit_code == 1
    assert here.compare(there.file, "--from-round", str(ODD + 1)).exit_code == 0


def test_a_site_that_was_sent_two_models_for_a_round_is_told(hospital) -> None:
    """A round that was aborted may be opened again, with whatever the server sends then."""
    here, there = hospital("hospital-a"), hospital("hospital-b")
    for site in (here, there):
        site.take_part(Server(), range(2))
    there.take_part(Server(), [3])
    guard = sentinel.Guard(here._policy, here.state, unsafe_skip_inspection=True)
    for state in (honest(3), honest(4)):
        with guard.round(3, state):
            pass
    done = here.compare(there.show())
    assert done.exit_code == 1
    assert "Round 3: this site was sent more than one global model" in done.output
    done = there.compare(here.show())
    assert done.exit_code == 1
    assert f"Round 3: {here.file} was sent more than one global model" in done.output


def test_many_differences_are_told_briefly_and_named_for_machines(
    two, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, _ = two(Server(), 6)
    other = here.file.with_name("c.json")
    document = json.loads(here.show().read_text())
    document["log"] = "f" * 64
    for row in document["rounds"]:
        row["global_model"] = "e" * 64
    other.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")
    monkeypatch.setattr("sentinel.cli.peers._SHOWN", 2)
    done = here.compare(other)
    assert done.output.count("was sent another global model") == 3
    assert "And in 4 more rounds" in done.output
    assert len(json.loads(here.compare(other, "--json").output)["peers"][0]["another"]) == 6


# ---- hostile files


def test_ones_own_file_is_refused_also_an_older_one(two) -> None:
    here, there = two(Server(), 2)
    own = here.show()
    here.take_part(Server(), [4])
    for command in (here.compare(own), here.compare(there.show(), own)):
        assert command.exit_code == 2
        assert "own log" in command.output


def forged(file: Path, of: Path, **changes: object) -> Path:
    """What a hostile site writes: an honest file, changed."""
    whole = json.loads(of.read_text()) | changes
    file.write_text(json.dumps(whole, indent=2, sort_keys=True) + "\n")
    return file


def test_files_that_claim_one_log_are_compared_and_none_is_to_be_dropped(two, tmp_path) -> None:
    """A hostile peer that copies the honest file cannot have it dropped."""
    here, there = two(Server("hospital-a", one_bit))
    honest_file, own = there.show(), json.loads(here.show().read_text())
    copy = forged(tmp_path / "copy.json", honest_file, rounds=own["rounds"])
    for files in ((honest_file, copy), (copy, honest_file)):
        done = here.compare(*files)
        assert done.exit_code == 1
        assert f"Round {ODD}: {honest_file} was sent another global model" in done.output
        assert "claim to be from one log: one of them may be forged. Do not drop" in done.output
        asked = run("audit", "compare", *files, "--json", "--state-dir", here.state)
        document = json.loads(asked.stdout)
        assert document["claim_one_log"] == [[str(file) for file in files]]
    alike = here.compare(copy, forged(tmp_path / "again.json", copy))
    assert alike.exit_code == 2
    assert "one of them may be forged" in alike.output
    assert "No difference" not in alike.output


def test_a_file_that_claims_this_sites_log_counts_where_it_differs_alone(two, tmp_path) -> None:
    here, there = two(Server("hospital-a", one_bit))
    mine = json.loads(here.show().read_text())["log"]
    theirs = forged(tmp_path / "theirs.json", there.show(), log=mine)
    done = here.compare(theirs)
    assert done.exit_code == 1
    assert f"Round {ODD}: {theirs} was sent another global model" in done.output
    assert "claims to be from this site's own log" in done.output
    document = json.loads(
        run("audit", "compare", here.file, "--json", "--state-dir", here.state).stdout
    )
    assert document["verdict"] == "not-compared"
    assert document["claim_own_log"] == [str(here.file)]
    assert document["peers"][0]["compared"] == 0
    assert len(document["compared_with_nobody"]) == ROUNDS


def test_rounds_that_no_other_site_has_are_counted_and_named(hospital) -> None:
    """A crafted model under a number that the server made up for one site alone."""
    here, there, third = (hospital(f"hospital-{letter}") for letter in "abc")
    here.take_part(Server(), [0, 1, 2, 3])
    there.take_part(Server(), [0, 1])
    third.take_part(Server(), [1, 2])
    here.take_part(Server("hospital-a", suppressed), [100])
    files = (there.show(), third.show())
    done = here.compare(*files)
    assert done.exit_code == 0
    verdict, more = done.output.splitlines()[-2:]
    assert verdict == "No difference in any round that was compared."
    assert more.startswith("2 of 5 rounds were compared with nobody")
    assert more.endswith(": 3, 100.")
    assert " consistent" not in done.output
    document = json.loads(here.compare(*files, "--json").output)
    assert [name["number"] for name in document["compared_with_nobody"]] == [3, 100]


def test_two_models_of_a_round_that_this_site_never_had_are_no_alarm(hospital) -> None:
    """Another federation's job, started again under one run."""
    here, there = hospital("hospital-a"), hospital("hospital-b")
    for site in (here, there):
        site.take_part(Server(), range(2))
    guard = sentinel.Guard(
        there._policy, there.state, federation="other", unsafe_skip_inspection=True
    )
    for state in (honest(3), honest(4)):
        with guard.round(0, state):
            pass
    done = here.compare(there.show())
    assert done.exit_code == 0, done.output
    assert "no alarm: 0." in done.output
    peer = json.loads(here.compare(there.file, "--json").output)["peers"][0]
    assert [name["number"] for name in peer["repeated_elsewhere"]] == [0]


def test_a_last_line_that_a_crash_cut_short_is_passed_over(two, tmp_path: Path) -> None:
    """It was never acknowledged; `audit verify` alone complains of it."""
    here, there = two(Server(), 2)
    theirs, before = there.show(), here.show().read_bytes()
    with (here.state / "audit" / "audit.jsonl").open("ab") as log:
        log.write(b'{"at":17')
    assert here.show().read_bytes() == before
    assert here.compare(theirs).exit_code == 0
    save_file(honest(0), tmp_path / "global")
    asked = ("--peers", theirs, "--round", "0", "--state-dir", here.state)
    assert run("inspect", tmp_path / "global", *asked).exit_code == 0
    assert run("audit", "verify", "--state-dir", here.state).exit_code == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[:-20],
        lambda whole: whole.replace(b'"number": 1', b'"number": -1'),
        lambda whole: whole.replace(b'"version": 1', b'"version": 2'),
        lambda whole: whole.replace(b'"version": 1', b'"version": 1,\n  "who": "\x1b[31mhacked"'),
        lambda _: b'{"hospitals": ["St. Elsewhere"]}',
        lambda _: b"",
    ],
)
def test_what_is_no_digests_file_is_named_and_nothing_of_it_is_told(
    two, damage: Callable[[bytes], bytes]
) -> None:
    here, there = two(Server(), 2)
    theirs = there.show()
    theirs.write_bytes(damage(theirs.read_bytes()))
    done = here.compare(theirs)
    assert done.exit_code == 2
    assert f"{theirs} is not what `sentinel audit digests` writes" in done.output
    assert "version 1" in done.output
    for text in ("hacked", "Elsewhere", "Traceback", "\x1b"):
        assert text not in done.output


def test_a_file_that_is_too_large_missing_or_unreadable_is_misuse(two, tmp_path: Path) -> None:
    here, _ = two(Server(), 1)
    large = tmp_path / "large.json"
    with large.open("wb") as file:
        file.truncate(LARGEST + 1)
    done = here.compare(large)
    assert done.exit_code == 2
    assert "32 MiB" in done.output
    for missing in (tmp_path / "none.json", tmp_path, tmp_path / "dev\x1b[31m.json"):
        done = here.compare(missing)
        assert done.exit_code == 2
        assert "\x1b" not in done.output
    unreadable = tmp_path / "pipe"
    unreadable.symlink_to("/dev/zero")
    assert here.compare(unreadable).exit_code == 2


def test_reading_state_that_is_not_there_is_misuse_and_makes_nothing(tmp_path: Path) -> None:
    for command in (("digests",), ("compare", tmp_path / "b.json")):
        assert run("audit", *command, "--state-dir", tmp_path / "none").exit_code == 2
    assert not (tmp_path / "none").exists()


# ---- one model


@pytest.fixture
def inspect(two, tmp_path: Path) -> Callable[..., Result]:
    """Looks at what hospital-a was sent, beside the file of hospital-b."""

    def ask(server: Server, number: int, *more: str | Path) -> Result:
        here, there = two(server)
        save_file(server.model(number, here.name), tmp_path / "global.safetensors")
        asked = ("--peers", there.show(), "--round", str(number), "--state-dir", here.state)
        return run("inspect", tmp_path / "global.safetensors", *asked, *more)

    return ask


def test_inspect_says_who_was_sent_the_same_model(inspect, tmp_path: Path) -> None:
    done = inspect(Server(), ODD)
    assert done.exit_code == 0, done.output
    theirs = tmp_path / "hospital-b.json"
    assert f"Round {ODD}: {theirs} was sent the same global model." in done.output
    assert model_digest(honest(ODD)) in done.output


def test_inspect_says_who_was_sent_another_model(inspect, tmp_path: Path) -> None:
    server = Server("hospital-b", one_bit)
    done = inspect(server, ODD)
    assert done.exit_code == 1
    theirs = tmp_path / "hospital-b.json"
    assert f"Round {ODD}: {theirs} was sent another global model than this site" in done.output
    assert "The server is inconsistent" in done.output.splitlines()[-1]
    assert inspect(server, ODD - 1).exit_code == 0


def test_inspect_says_first_that_the_round_is_probably_mistyped(two, tmp_path: Path) -> None:
    """This site's own log has the round with another model: no word on the server."""
    here, there = two(Server())
    save_file(honest(1), tmp_path / "global")
    asked = ("--peers", there.show(), "--round", "2", "--state-dir", here.state)
    done = run("inspect", tmp_path / "global", *asked)
    assert done.exit_code == 2
    assert "most likely --round is mistyped" in done.output
    assert "inconsistent" not in done.output


def test_inspect_counts_only_what_differs_in_a_file_that_claims_this_log(two, tmp_path) -> None:
    here, there = two(Server("hospital-b", one_bit))
    mine = json.loads(here.show().read_text())["log"]
    theirs = forged(tmp_path / "theirs.json", there.show(), log=mine)
    save_file(honest(ODD), tmp_path / "global")
    asked = ("--round", str(ODD), "--state-dir", here.state)
    done = run("inspect", tmp_path / "global", "--peers", theirs, *asked)
    assert done.exit_code == 1
    assert "own log" in done.output
    again = ("--peers", here.file, "--peers", forged(tmp_path / "again.json", here.file))
    done = run("inspect", tmp_path / "global", *again, *asked)
    assert done.exit_code == 2
    assert "was sent the same" not in done.output


def test_inspect_for_machines_holds_the_comparison(inspect) -> None:
    done = inspect(Server("hospital-b", one_bit), ODD, "--json")
    document = json.loads(done.output)
    assert done.exit_code == 1
    assert document["verdict"] == "honest"  # what the model looks like
    assert document["global_model"] == model_digest(honest(ODD))
    assert document["comparison"]["verdict"] == "inconsistency"
    assert [name["number"] for name in document["comparison"]["peers"][0]["another"]] == [ODD]


def test_a_site_that_took_no_part_in_the_round_is_not_compared(
    hospital, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that did is enough; none is no answer."""
    monkeypatch.delenv("SENTINEL_STATE_DIR")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    there, absent = hospital("hospital-b"), hospital("hospital-c")
    there.take_part(Server(), [0, 1], federation="hearts", run="trial")
    absent.take_part(Server(), [0], federation="hearts", run="trial")
    save_file(honest(1), tmp_path / "global")
    named = ("--round", "1", "--federation", "hearts", "--run", "trial")
    model, files = tmp_path / "global", [there.show(), absent.show()]
    compared = run("inspect", model, "--peers", files[0], "--peers", files[1], *named)
    assert compared.exit_code == 0, compared.output
    assert f"Round 1: {files[1]} has no such round; not compared." in compared.output
    assert "No log of this site is here" in compared.output
    alone = run("inspect", model, "--peers", files[1], *named)
    assert alone.exit_code == 2
    assert "named alike" in alone.output
    assert "No difference" not in alone.output
    assert run("inspect", model, "--peers", files[0], "--round", "1").exit_code == 2  # no such run


def test_inspect_refuses_ones_own_file_and_half_a_question(two, tmp_path: Path) -> None:
    here, there = two(Server(), 1)
    save_file(honest(0), tmp_path / "global")
    state = ("--state-dir", here.state)
    own = run("inspect", tmp_path / "global", "--peers", here.show(), "--round", "0", *state)
    assert own.exit_code == 2
    assert "own log" in own.output
    theirs = there.show()
    for half in (("--peers", theirs), ("--round", "0")):
        assert run("inspect", tmp_path / "global", *half, *state).exit_code == 2
    gone = ("--peers", theirs, "--round", "0", "--state-dir", tmp_path / "none")
    assert run("inspect", tmp_path / "global", *gone).exit_code == 2
