"""The list of planted faults: each still applies, and its recorded result is that of the change as it is."""

import json

import pytest

from tests.mutants.run import RESULTS, ROOT, Mutant, mutants

EVERY = mutants()


def test_names_are_unique() -> None:
    assert len({mutant.name for mutant in EVERY}) == len(EVERY)


@pytest.mark.parametrize("mutant", EVERY, ids=lambda mutant: mutant.name)
def test_a_fault_can_still_be_planted(mutant: Mutant) -> None:
    mutant.changed((ROOT / mutant.file).read_text())  # raises unless its text occurs once


def test_every_fault_was_caught() -> None:
    results = json.loads(RESULTS.read_text())
    missed = [m.name for m in EVERY if not results.get(m.name, {}).get("caught_by") or results[m.name]["key"] != m.key]
    assert not missed, f"python tests/mutants/run.py --new plants what has no result: {missed}"
