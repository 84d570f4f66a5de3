"""The soak counts what tests survive and what they lose, and its page follows from its record."""

import os
import time

import pytest
from reliability import Fault, Soak, check_report, faults_table, read_soaks, write_report
from soak import Tally

from diffmoe.records import write_record

TESTS = """
import pytest

@pytest.mark.slow
@pytest.mark.fault("a slow one")
def test_slow(): pass

@pytest.mark.fault("many")
def test_many(record_property): record_property("survived", 7)

@pytest.mark.fault("bit {bit}")
@pytest.mark.parametrize("bit", [0, 1])
def test_bits(bit, tmp_path): assert not bit, f"{tmp_path} is gone\\nfor good"

@pytest.fixture
def broken(): raise OSError("no room")

@pytest.mark.fault("bit 1")
def test_broken(broken): pass

@pytest.mark.fault("written, too")
@pytest.mark.fault("killed")
def test_names(record_property):
    record_property("survived", {"killed": 2, "written, too": 1})
    record_property("measured", "3 files")

@pytest.mark.fault("cannot be tried here")
def test_skipped(): pytest.skip()

def test_no_fault(): assert False
"""


@pytest.fixture
def tally(tmp_path):
    """Return a function that tallies those tests."""
    def tallied(deadline=float("inf"), rounds=1):
        (tmp_path / "test_these.py").write_text(TESTS)
        tally = Tally(deadline, str(tmp_path))
        for _ in range(rounds):
            pytest.main(["-q", "--import-mode=importlib", "-c", os.devnull, "--rootdir", str(tmp_path),
                         f"--basetemp={tmp_path / 'round'}", str(tmp_path)], plugins=[tally])
            tally.slow = False
        return tally

    return tallied


def test_every_fault_is_counted_and_a_loss_told_without_the_folder(tally):
    found = tally().faults
    assert {name: (fault.survived, fault.lost) for name, fault in found.items()} == {
        "a slow one": (1, 0), "many": (7, 0), "bit 0": (1, 0), "bit 1": (0, 2), "killed": (2, 0),
        "written, too": (1, 0), "cannot be tried here": (0, 0)}
    assert found["bit 1"].losses == ["AssertionError: /round/test_bits_1_0 is gone", "OSError: no room"]
    assert found["killed"].measured == "3 files"


def test_slow_faults_are_done_in_the_first_round_alone_and_none_when_the_time_is_over(tally):
    assert {name: fault.tried for name, fault in tally(rounds=2).faults.items() if name in ("a slow one", "many")} == {
        "a slow one": 1, "many": 14}
    assert {fault.tried for fault in tally(deadline=time.monotonic()).faults.values()} == {0}


def test_the_page_follows_from_the_record(tmp_path):
    done = Soak(id="soak-1", started="2026-01-01 00:00 UTC", seed=0, rounds=2, minutes=9.7, faults=[
        Fault("killed", 1200, 0, [], "3 files"), Fault("full disk", 1, 1, ["no line"])],
        environment={"commit": "0" * 40, "dirty": True, "hardware": "2 CPU cores", "versions": {"torch": "2"}})
    write_record(tmp_path / "records", done)
    assert read_soaks(tmp_path / "records") == [done]
    assert check_report(tmp_path) != []
    (page,) = write_report(tmp_path)
    assert check_report(tmp_path) == []
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in faults_table(done.faults).splitlines()]
    assert rows[2:5] == [["killed", "1,200", "1,200", "0", "3 files"], ["full disk", "2", "1", "1", ""],
                         ["all", "1,202", "1,201", "1", ""]]
    assert "- full disk: no line" in page.read_text() and "with changes; 2 rounds in 10 minutes" in page.read_text()
    page.write_text(page.read_text().replace("1,200", "1,201"))
    assert check_report(tmp_path) != []
