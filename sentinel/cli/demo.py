"""`sentinel demo`: the main job on four real hospitals."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from sentinel.cli.console import AsJson, console, print_json, progress

if TYPE_CHECKING:
    from sentinel.demo.run import DemoResult


def demo_command(
    out: Annotated[Path, typer.Option(help="Folder for report.html and xrays.png.")] = Path(
        "demo-output"
    ),
    repeats: Annotated[int, typer.Option(min=1, help="Federations, for the spread.")] = 10,
    rounds: Annotated[int, typer.Option(min=2, help="Rounds of a federation.")] = 20,
    seed: Annotated[int, typer.Option(help="Of splits and starts; never of the noise.")] = 0,
    hearts_policy: Annotated[str, typer.Option(help="Policy of the hospitals.")] = "tabular-ehr",
    xrays_policy: Annotated[str, typer.Option(help="Policy for the X-rays.")] = "chest-xray",
    as_json: AsJson = False,
) -> None:
    """Four real hospitals learn together, the server turns on them, and X-rays are rebuilt."""
    from sentinel.demo.heart_result import Settings
    from sentinel.demo.report import montage, report_html
    from sentinel.demo.run import figures, run_demo
    from sentinel.demo.xray_result import XraySettings
    from sentinel.durable import replace_file
    from sentinel.page.png import grey_png

    with progress("four hospitals") as on_hearts, progress("chest X-rays") as on_xrays:
        result = run_demo(
            Settings(
                policy=hearts_policy,
                repeats=repeats,
                rounds=rounds,
                turns_at=max(1, rounds // 2),
                seed=seed,
            ),
            XraySettings(policy=xrays_policy, seed=seed),
            on_hearts=on_hearts,
            on_xrays=on_xrays,
        )
    out.mkdir(parents=True, exist_ok=True)
    report = out / "report.html"
    replace_file(report, report_html(result).encode())
    replace_file(out / "xrays.png", grey_png(montage(result.xrays)))
    if as_json:
        print_json(figures(result))
        return
    _print(result, report)


def _print(result: DemoResult, report: Path) -> None:
    hearts, xrays = result.hearts, result.xrays
    table = Table("", "without", "with the guard")
    for site, plain in hearts.auc_unguarded_by_site.items():
        table.add_row(f"AUC, {site}", f"{plain:.3f}", f"{hearts.auc_guarded_by_site[site]:.3f}")
    table.add_row("AUC, mean", f"{hearts.auc_unguarded:.3f}", f"{hearts.auc_guarded:.3f}")
    for row in _leaks(hearts, xrays):
        table.add_row(*row)
    screen = console()
    screen.print(table)
    screen.print(
        f"Crafted rounds refused: {hearts.rounds_refused}; honest rounds refused: "
        f"{hearts.false_refusals}. No formal guarantee: these policies promise none."
    )
    screen.print(f"Pictures and rounds: {report}", soft_wrap=True)


def _leaks(hearts: Any, xrays: Any) -> list[tuple[str, str, str]]:  # noqa: ANN401 - imported late
    missed = hearts.worst_uninspected
    batch = f"X-rays behind an update of {xrays.batch_size}"
    return [
        (
            f"patients read exactly, of {hearts.unguarded.records}",
            str(hearts.unguarded.exact),
            f"{hearts.guarded.exact} ({missed.exact} had the inspection missed it)",
        ),
        (
            "patients near, beyond held-out ones",
            f"{hearts.unguarded.advantage:z.3f}",
            f"{hearts.guarded.advantage:z.3f} ({missed.advantage:z.3f})",
        ),
        (
            "one X-ray from its gradient, SSIM",
            f"{xrays.ssim_raw:.2f}",
            "withheld" if xrays.lone_image_withheld else "released",
        ),
        (
            f"{batch}, SSIM (knowing nothing: {xrays.ssim_class_mean:.2f})",
            f"{xrays.ssim_raw_batch:.2f}",
            f"{xrays.ssim_sanitized:.2f}",
        ),
        (
            "true X-ray first among 100 (chance .01)",
            f"{xrays.reid_top1_raw:.2f}",
            f"{xrays.reid_top1:.2f}",
        ),
    ]
