"""Table: runs every contestant against every case and writes docs/conformance.md.

.venv-bench/bin/python tests/conformance/table.py            # write the document
.venv-bench/bin/python tests/conformance/table.py --print    # print it
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import private_steps
import torch
from contests import OURS, PEERS, contest, contest_apart
from odd_inputs import CASES

DOCUMENT = Path(__file__).parents[2] / "docs" / "conformance.md"
HEAD = Path(__file__).with_name("head.md")


def table() -> str:
    """The document."""
    names = {**PEERS, **OURS}
    head = HEAD.read_text().format(
        flwr=version("flwr"),
        nvflare=version("nvflare"),
        columns="".join(f" {title} |" for title in names.values()),
        rules="---|" * len(names),
    )
    rows = []
    for case in CASES:
        cells = [contest_apart(name, case) for name in names]
        shown = " | ".join(str(cell) for cell in cells)
        rows.append(f"| {case.title} | {case.wants.value} | {shown} |")
        print(case.id, file=sys.stderr)  # noqa: T201 - progress; a run takes a minute
    return head + "\n".join([*rows, "", *private_rows()]) + "\n"


def private_rows() -> list[str]:
    """The table of private training."""
    made = private_steps.CONTESTANTS
    cells = " | ".join(str(step()) for step in made.values())
    return [
        f"Private training, beside Opacus {version('opacus')} (clip norm 1, noise multiplier 1):",
        "",
        "| input | has to be | " + " | ".join(made) + " |",
        "|---|---|" + "---|" * len(made),
        f"| {private_steps.TITLE} | {private_steps.HAS_TO_BE} | {cells} |",
    ]


def main() -> None:
    """Write or print the document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--print", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    for name in (*PEERS, *OURS):  # load everything once, before the forks
        contest(name, CASES[0])
    text = table()
    if arguments.print:
        print(text)  # noqa: T201 - that is what it is for
    else:
        DOCUMENT.write_text(text)


if __name__ == "__main__":
    main()
