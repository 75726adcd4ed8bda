"""Updates carry what they leak, and the score's figures are counts and ranks of known rows."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
import torch

from sentinel.detection.rounds import Spec, local_round
from sentinel.stress.bench.crafted import ground_of
from sentinel.stress.bench.evaluate import FULL, QUICK
from sentinel.stress.bench.nets import GENOTYPES, World, net, sites
from sentinel.stress.bench.update_card import scatter_svg, update_card
from sentinel.stress.bench.update_figures import area, document, quality, rank_correlation
from sentinel.stress.bench.updates import (
    STAGES,
    UpdateRow,
    exact_reads,
    modality,
    update_rows,
)
from sentinel.stress.layers import loaded

pytestmark = pytest.mark.usefixtures("one_thread")

ROW = UpdateRow(
    "tables", "net", 0, "honest", 1, 1, adam=False, noise=0.0, score=0.9, generic=0.5,
    sharpness="reference", leak=1.0, exact=1.0, flat=0.9, twins=0.5, seconds=0.002,
)  # fmt: skip


def rows() -> list[UpdateRow]:
    """Ten updates whose score follows their leakage, and whose generic score is its opposite."""
    return [
        replace(ROW, score=index / 10, generic=1 - index / 10, leak=max(0, index - 4) / 5,
                exact=float(index > 7), noise=float(index % 2))
        for index in range(10)
    ]  # fmt: skip


def test_one_record_is_read_exactly_and_many_or_noised_ones_are_not() -> None:
    where = ground_of(net("mlp-20-96-3"), 1, 3)
    twin = loaded(where.module, where.honest).eval()

    def read(count: int, noise: float = 0.0) -> float | None:
        records, labels = where.site.draw(count)
        deltas = local_round(twin, records, labels, Spec(count, count))
        generator = torch.Generator().manual_seed(1)
        noised = {
            name: delta + noise * torch.randn(delta.shape, generator=generator)
            for name, delta in deltas.items()
        }
        return exact_reads(twin, where.honest, noised, records)

    assert read(1) == 1.0
    assert read(256) == 0.0
    assert read(1, noise=0.1) == 0.0


def test_a_small_net_gives_rows_from_one_record_to_many() -> None:
    found = update_rows(net("mlp-8-32-2"), 1, stages=(0,))
    honest = [row for row in found if row.craft == "honest" and row.noise == 0.0]
    one = next(row for row in honest if row.records == 1 and row.steps == 1)
    many = next(row for row in honest if row.records == 256)
    assert one.leak > 0.9 > many.leak
    assert one.score > many.score
    assert {row.records for row in honest} >= {1, 2, 4, 8, 16, 32, 64, 128, 256}
    assert {row.noise for row in found} == {0.0, 0.2, 1.0, 5.0}
    assert "binning-mean" in {row.craft for row in found}
    assert all(0.0 <= row.score <= 1.0 and row.seconds > 0.0 for row in found)


def test_genotypes_are_counts_of_two() -> None:
    generator = torch.Generator().manual_seed(1)
    (site,) = sites(World(GENOTYPES, generator), 1, None, generator)
    records, _ = site.draw(50)
    assert set(records.unique().tolist()) == {0.0, 1.0, 2.0}
    assert modality(GENOTYPES) == "genotypes"


def test_ranks_and_areas_of_known_rows() -> None:
    own = quality("all", rows(), lambda row: row.score)
    assert own.readable == 5
    assert own.area == 1.0
    assert own.exact_area == 1.0
    assert own.spearman > 0.9
    assert quality("all", rows(), lambda row: row.generic).area == 0.0


def test_what_is_constant_has_no_rank_and_no_area() -> None:
    assert math.isnan(rank_correlation([1.0, 1.0], [0.0, 1.0]))
    assert math.isnan(area([0.1, 0.2], [True, True]))


def test_the_card_says_how_far_the_aim_is() -> None:
    text = update_card(rows(), QUICK, "0" * 64)
    assert (
        "AUROC, some record can be read: 0.98 on each net | mean 1.000, least 1.000 | yes" in text
    )
    backwards = [replace(row, score=row.generic) for row in rows()]
    assert "least 0.980 short" in update_card(backwards, QUICK, "0" * 64)
    figures = document(rows())
    assert figures["sentinel"]["by_noise"]["1"]["updates"] == 5
    assert len(figures["updates"]) == 10


def test_the_picture_has_a_dot_for_each_update() -> None:
    root = ET.fromstring(scatter_svg(rows()))  # noqa: S314 - made here
    assert len(root.findall("{http://www.w3.org/2000/svg}circle")) == 10


def test_the_full_form_covers_every_modality() -> None:
    assert {modality(one) for one in FULL.updates} == {
        "tables", "images", "signals", "text", "genotypes",
    }  # fmt: skip
    assert FULL.stages == STAGES
