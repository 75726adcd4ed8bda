"""Records go with their labels."""

import torch

from sentinel.stress.records import Records

FOUR = Records(torch.arange(8.0).view(4, 2), torch.tensor([0, 1, 2, 3]))


def test_some_of_them_are_taken_by_indices_or_by_a_mask() -> None:
    by_index = FOUR.take(torch.tensor([3, 0]))
    assert by_index.labels.tolist() == [3, 0]
    assert by_index.inputs.tolist() == [[6.0, 7.0], [0.0, 1.0]]
    assert FOUR.take(FOUR.labels > 1).labels.tolist() == [2, 3]


def test_others_come_after_them() -> None:
    both = FOUR.plus(FOUR.take(torch.tensor([1])))
    assert len(both) == 5
    assert both.labels.tolist() == [0, 1, 2, 3, 1]
    assert both.inputs[4].tolist() == [2.0, 3.0]


def test_flags_go_along_where_both_have_them() -> None:
    flagged = Records(FOUR.inputs, FOUR.labels, torch.tensor([True, False, True, False]))
    assert flagged.take(torch.tensor([3, 0])).flags.tolist() == [False, True]
    assert flagged.plus(flagged).flags.tolist() == [True, False, True, False] * 2
    assert flagged.plus(FOUR).flags is None
