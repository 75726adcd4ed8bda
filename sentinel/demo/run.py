"""The whole demo: both parts, one after the other, and every figure it prints."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sentinel.demo.hearts import run_hearts
from sentinel.demo.xrays import run_xrays

if TYPE_CHECKING:
    from collections.abc import Callable

    from sentinel.demo.heart_result import HeartsResult
    from sentinel.demo.heart_result import Settings as HeartSettings
    from sentinel.demo.xray_result import XrayResult, XraySettings
    from sentinel.stress.passive.tabular import Reads


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What both parts measured, and how long they took."""

    hearts: HeartsResult
    xrays: XrayResult
    seconds_hearts: float
    seconds_xrays: float


def run_demo(
    hearts: HeartSettings,
    xrays: XraySettings,
    *,
    on_hearts: Callable[[int, int], None] | None = None,
    on_xrays: Callable[[int, int], None] | None = None,
) -> DemoResult:
    """Run the four hospitals, then the X-rays.

    Args:
        hearts: settings of the first part.
        xrays: settings of the second.
        on_hearts: called with the steps done and the steps in all.
        on_xrays: the same for the second part.
    """
    start = time.perf_counter()
    first = run_hearts(hearts, on_step=on_hearts)
    middle = time.perf_counter()
    second = run_xrays(xrays, on_step=on_xrays)
    return DemoResult(first, second, middle - start, time.perf_counter() - middle)


def figures(result: DemoResult) -> dict[str, Any]:
    """Every figure of the demo, by name, for a machine."""
    hearts, xrays = result.hearts, result.xrays
    lost = hearts.auc_lost
    return {
        "auc_unguarded": hearts.auc_unguarded,
        "auc_guarded": hearts.auc_guarded,
        "auc_unguarded_by_site": dict(hearts.auc_unguarded_by_site),
        "auc_guarded_by_site": dict(hearts.auc_guarded_by_site),
        "auc_losses": list(hearts.auc_losses),
        "auc_lost_interval": None if lost is None else [lost.low, lost.high],
        "repeats": hearts.settings.repeats,
        "rounds": hearts.settings.rounds,
        "hidden_units": hearts.settings.hidden,
        "rows_behind_updates": hearts.unguarded.records,
        "rows_read_unguarded": hearts.unguarded.exact,
        "rows_read_guarded": hearts.guarded.exact,
        "rows_read_guarded_uninspected": hearts.worst_uninspected.exact,
        "rows_near_unguarded": near(hearts.unguarded),
        "rows_near_guarded": near(hearts.guarded),
        "rows_near_guarded_uninspected": near(hearts.worst_uninspected),
        "guesses_unguarded": hearts.unguarded.guesses,
        "guesses_guarded": hearts.guarded.guesses,
        "guesses_guarded_uninspected": hearts.worst_uninspected.guesses,
        "rounds_refused": hearts.rounds_refused,
        "false_refusals": hearts.false_refusals,
        "honest_updates_withheld": hearts.withheld,
        "ssim_raw": xrays.ssim_raw,
        "ssim_raw_batch_size": 1,
        "ssim_raw_batch": xrays.ssim_raw_batch,
        "lone_image_withheld": xrays.lone_image_withheld,
        "lone_image_reason": xrays.lone_reason,
        "ssim_sanitized": xrays.ssim_sanitized,
        "ssim_sanitized_by_attacker": {n: a.ssim for n, a in xrays.sanitized.items()},
        "ssim_class_mean": xrays.ssim_class_mean,
        "ssim_unrelated": xrays.ssim_unrelated,
        "reid_top1": xrays.reid_top1,
        "reid_top1_interval": [xrays.reid_interval.low, xrays.reid_interval.high],
        "reid_top1_raw": xrays.reid_top1_raw,
        "reid_by_chance": xrays.reid_by_chance,
        "reid_chance": 0.01,
        "reid_chance_limit": xrays.reid_chance_limit,
        "batch_size": xrays.batch_size,
        "net": xrays.net,
        "net_parameters": xrays.parameters,
        "training_stage": xrays.stage,
        "policy_hearts": hearts.settings.policy,
        "policy_xrays": xrays.settings.policy,
        "promise": None,
        "seconds_hearts": result.seconds_hearts,
        "seconds_xrays": result.seconds_xrays,
    }


def near(reads: Reads) -> dict[str, float]:
    """How much nearer the guesses come to the update's own records than to held-out ones."""
    return {
        "share": reads.near_share,
        "held_out_share": reads.held_out_share,
        "difference": reads.advantage,
        "upper_95": reads.interval.high,
    }
