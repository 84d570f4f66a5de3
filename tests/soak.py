"""Do every fault again and again, each round with other random numbers, for the time given; count what was lost.

    python tests/soak.py --minutes 10

A fault is a test that is marked so; a round is one call of pytest with all of them, the slow ones in the first round
alone. Prints a table, writes a record, and exits 1 when anything was lost.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from reliability import Fault, Soak, faults_table, write_report

from diffmoe.cli import run_command
from diffmoe.config import ConfigError
from diffmoe.records import environment, write_record

HERE = Path(__file__).parent
A_ROUND = {"KILLS": "40", "FUZZ_EXAMPLES": "4000"}
"""How often a round does what takes milliseconds, unless the environment says otherwise."""


class Tally:
    """A plugin of pytest: keeps to the tests that are faults and counts their outcomes, until the time is over.

    A test that passes has survived one fault, or as many as it says by `record_property("survived", count)`, or a
    number by each name; one that fails has lost one.

    Args:
        deadline: value of `time.monotonic()` after which no test starts.
        folder: of this round's files; no loss names it.
    """

    def __init__(self, deadline: float, folder: str) -> None:
        self.deadline, self.folder = deadline, folder
        self.slow, self.passed = True, False
        self.faults: dict[str, Fault] = {}
        self.names: dict[str, str] = {}  # by the test's id

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Leave the faults, quick ones first."""
        for item in items:
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            if names := [marker.args[0].format_map(parameters) for marker in item.iter_markers("fault")]:
                self.names[item.nodeid] = names[0]
                for name in names:
                    self.named(name)
        chosen = [item for item in items if item.nodeid in self.names
                  and (self.slow or not item.get_closest_marker("slow"))]
        items[:] = sorted(chosen, key=lambda item: item.get_closest_marker("slow") is not None)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self) -> bool | None:
        """Leave out what there is no time for."""
        return True if time.monotonic() > self.deadline else None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count; what a fixture says at its end is known with the teardown."""
        if report.failed:
            fault = self.fault(report.nodeid)
            fault.lost += 1
            said = [line[1:].strip() for line in report.longreprtext.splitlines() if line.startswith("E ")]
            fault.losses.append((said or [report.longreprtext.splitlines()[-1]])[0].replace(self.folder, ""))
        if report.when != "teardown":
            self.passed = report.passed
        else:
            fault, properties = self.fault(report.nodeid), dict(report.user_properties)
            survived = properties.get("survived", int(self.passed))
            for name, count in survived.items() if isinstance(survived, dict) else [(fault.name, survived)]:
                self.named(name).survived += count
            fault.measured = properties.get("measured", fault.measured)

    def fault(self, test: str) -> Fault:
        """Return the fault that a test does."""
        return self.named(self.names[test])

    def named(self, name: str) -> Fault:
        """Return the fault of a name."""
        return self.faults.setdefault(name, Fault(name))


def soak(minutes: float, seed: int) -> Soak:
    """Do faults for as long."""
    os.environ |= A_ROUND | os.environ
    files = [str(path) for path in sorted(HERE.glob("test_*.py")) if "mark.fault" in path.read_text()]
    started, begin, rounds, code = datetime.now(UTC), time.monotonic(), 0, pytest.ExitCode.OK
    with TemporaryDirectory() as folder:
        tally = Tally(begin + 60 * minutes, folder)
        while time.monotonic() < tally.deadline and code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            print(f"round {rounds}, {(time.monotonic() - begin) / 60:.1f} minutes", flush=True)
            os.environ["FAULT_SEED"] = str(seed + rounds)
            code = pytest.main(["-q", "-p", "no:cacheprovider", f"--basetemp={folder}/round", "--rootdir",
                                str(HERE.parent), "--timeout=1800", f"--hypothesis-seed={seed + rounds}", *files],
                               plugins=[tally])
            tally.slow, rounds = False, rounds + 1
    if code > pytest.ExitCode.TESTS_FAILED:
        raise ConfigError(f"pytest stopped with exit code {code}; see above")
    return Soak(id=f"soak-{started:%Y%m%d-%H%M%S}", started=f"{started:%Y-%m-%d %H:%M} UTC", seed=seed, rounds=rounds,
                minutes=(time.monotonic() - begin) / 60, environment=environment(torch.device("cpu")),
                faults=list(tally.faults.values()))


def main(arguments: list[str]) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python tests/soak.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the first round")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "reliability" / "local", metavar="DIR")
    options = parser.parse_args(arguments)
    done = soak(options.minutes, options.seed)
    print(faults_table(done.faults))
    print(write_record(options.out / "records", done))
    write_report(options.out)
    return int(any(fault.lost for fault in done.faults))


if __name__ == "__main__":
    sys.exit(run_command(main))
