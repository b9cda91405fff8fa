"""The table of planted faults follows the code. Whether the tests notice them is for `python tests/mutants.py`, by hand."""

import pytest
from conftest import ROOT
from mutants import MUTANTS, DoesNotApply, Mutant, check, find_tests, plant

ROW = Mutant(
    "every seed is the same", "step_seed", "[seed,samples_seen,  rank]", "[0]", "test_a_row_that_has_lost_its_place_is_named"
)  # fmt: skip


def test_every_fault_applies_to_one_place_and_its_tests_exist():
    assert check(MUTANTS) == []
    assert len({mutant.fault for mutant in MUTANTS}) == len(MUTANTS) >= 40


def test_a_row_that_has_lost_its_place_is_named():
    path, text = plant(ROW)
    assert text == (ROOT / path).read_text(encoding="utf-8").replace("[seed, samples_seen, rank]", "([0])")
    assert find_tests(ROW) == ["tests/test_mutants.py::test_a_row_that_has_lost_its_place_is_named"]
    for changed, said in (
        (ROW._replace(function="step_sed"), "0 functions"),
        (ROW._replace(function="main"), "[2-9] functions"),
        (ROW._replace(old="[seed, rank]"), "has 0 times"),
        (ROW._replace(function="update_best", old="trained"), "has [2-9] times"),
    ):
        with pytest.raises(DoesNotApply, match=said):
            plant(changed)
    with pytest.raises(DoesNotApply, match="0 tests"):
        find_tests(ROW._replace(tests="test_nothing"))
