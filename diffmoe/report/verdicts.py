"""Verdicts: are the paper's orderings reproduced? The claims are in claims.yaml, listed before any run.

The effect of a claim "a < b" is the relative difference of the distances, worked out on their logarithms: seeds scatter
a distance by a share of itself, and test, interval and effect then agree. Where the rows share checkpoints, paired t
over seeds; Welch otherwise; Holm over the whole list, a claim without a test counting as p = 1.

    reproduced      a < b with adjusted p < 0.05
    not reproduced  a > b with p < 0.05, or the 95 % interval excludes the paper's effect
    undecided       else; with the smallest gap that the seeds could have shown, and the seeds that would decide
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from diffmoe.records import Record
from diffmoe.report.comparison import ALPHA, POWER, Comparison, Tested, compare, correct
from diffmoe.report.power import power_markdown
from diffmoe.report.questions import questions_markdown
from diffmoe.report.readings import as_measured
from diffmoe.report.table import distance_names, group_rows, percent, second_distances
from diffmoe.report.table1 import format_table

CLAIMS = Path(__file__).with_name("claims.yaml")
NOT_EVIDENCE = "pipeline check, not evidence"
"""Heads the verdicts of the scale `digits`."""
COLUMNS = ("claim", "effect", "95 % interval", "paper's", "test", "seeds", "p", "p, Holm", "verdict", "why",
           "smallest gap shown", "seeds to decide")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """An ordering that the paper states."""

    better: str
    """Row with the smaller distance."""
    worse: str
    """Row with the larger one."""
    published: tuple[float, float]
    """The paper's FIDs of the two."""
    shares_checkpoint: bool = False
    """The rows are two inference rules of one training."""
    equal_capacity: bool = False
    """Read `better` off its threshold sweep at the capacity that `worse` measured."""

    @property
    def text(self) -> str:
        """The claim in a few words."""
        return f"{self.better} < {self.worse}" + (" at equal C" if self.equal_capacity else "")

    @property
    def effect(self) -> float:
        """The paper's effect as a log ratio, below 0."""
        return math.log(self.published[0] / self.published[1])


@dataclass(frozen=True, kw_only=True)
class Verdict(Tested):
    """A claim, judged; its seeds would decide the paper's effect."""

    claim: Claim
    verdict: str
    reason: str


def load_claims(path: Path = CLAIMS) -> list[Claim]:
    """Read the list of claims."""
    return [Claim(**{**entry, "published": tuple(entry["published"])}) for entry in yaml.safe_load(path.read_text())]


def of_claims(records: Sequence[Record]) -> list[Record]:
    """Return the records of rows that a claim names."""
    named = {row for claim in load_claims() for row in (claim.better, claim.worse)}
    return [record for record in records if record.row in named]


def judge(records: Sequence[Record], claims: Sequence[Claim] | None = None,
          distance: str = "distance") -> list[Verdict]:
    """Judge each claim by the rule in this file's docstring.

    Args:
        distance: name of a metric that every record has.

    Raises:
        ConfigError: for records that cannot be compared, or that share checkpoints where their claim says otherwise.
    """
    claims = load_claims() if claims is None else claims
    rows = group_rows(records)
    found = [compare(*as_measured(rows, claim.better, claim.worse, shares_checkpoint=claim.shares_checkpoint,
                                  equal_capacity=claim.equal_capacity, distance=distance),
                     paired=claim.shares_checkpoint) for claim in claims]
    verdicts = []
    for claim, result in zip(claims, correct(found, [claim.effect for claim in claims]), strict=True):
        verdict, reason = _decide(claim, result.comparison, result.p_adjusted)
        verdicts.append(Verdict(**vars(result), claim=claim, verdict=verdict, reason=reason))
    return verdicts


def _decide(claim: Claim, comparison: Comparison, adjusted: float) -> tuple[str, str]:
    if comparison.interval is None:
        reasons = {0: "no sweep reaches that C" if claim.equal_capacity else "nothing to compare", 1: "one seed"}
        return "undecided", reasons.get(comparison.num_seeds, "no spread over seeds")
    low, high = comparison.interval
    side = "smaller" if low > claim.effect else "larger" if high < claim.effect else ""
    size = side and f"{side} than the paper's"
    if comparison.effect < 0 and adjusted < ALPHA:
        return "reproduced", size and f"but {size}"
    if comparison.effect > 0 and comparison.p < ALPHA:
        return "not reproduced", "the other way round"
    return ("not reproduced", size) if size else ("undecided", "too few seeds")


def verdicts_markdown(records: Sequence[Record], everything: Sequence[Record] = ()) -> str:
    """Return the verdicts as Markdown.

    At the scale `digits` their column says that they are no evidence, and it answers no open question.

    Args:
        everything: records of all budgets; none: `records` are all.
    """
    is_evidence = records[0].scale != "digits"
    heading = "verdict" if is_evidence else NOT_EVIDENCE
    more = [_by_distance(records, name, heading) for name in second_distances(records)]
    if is_evidence:
        more += [questions_markdown(records, everything or records), power_markdown(records)]
    header = [heading if column == "verdict" else column for column in COLUMNS]
    cells = [header, *(_cells(verdict) for verdict in judge(records))]
    about = " ".join(line for line in __doc__.split("\n\n")[1].splitlines())
    claims = f"""{format_table(cells)}

{about}
Reproduced: the claimed order with Holm's p < {ALPHA}. Not reproduced: the other order with p < {ALPHA}, or an interval
that excludes the paper's effect. Else undecided. Smallest gap: what these seeds show with power {POWER} at the level
that Holm leaves to the claim; seeds to decide: a row's seeds that would so show the paper's effect, at today's spread.
"""
    return "\n".join([claims, *more])


def summary_markdown(records: Sequence[Record]) -> str:
    """Return the verdicts in short, a line a claim: the paper's effect, and effect and verdict by each distance."""
    labels = {row: same[0].label for row, same in group_rows(records).items()}
    columns = []
    for name, shown in distance_names(records).items():
        verdicts = judge(records, distance=name)
        cells = [verdict.cells(paired=verdict.claim.shares_checkpoint)[:2] for verdict in verdicts]
        columns += [[shown, *(f"{effect} ({interval})" if interval != "-" else effect for effect, interval in cells)],
                    ["verdict", *(verdict.verdict for verdict in verdicts)]]
    claims = load_claims()
    said = [f"{labels.get(claim.better, claim.better)} before {labels.get(claim.worse, claim.worse)}"
            + (", at equal C" if claim.equal_capacity else "") for claim in claims]
    paper = ["paper", *(percent(claim.effect) for claim in claims)]
    lines = [list(line) for line in zip(["the paper's claim", *said], paper, *columns, strict=True)]
    return f"""{format_table(lines)}

The relative difference of the distances, below 0 where the first is better; in brackets its 95 % interval over seeds.
Verdicts are corrected for the number of claims; what is undecided takes more seeds.
"""


def _by_distance(records: Sequence[Record], name: str, heading: str) -> str:
    """Return the section of a second distance."""
    lines = [["claim", "effect", "95 % interval", "p", "p, Holm", heading]]
    for verdict in judge(records, distance=name):
        cells = dict(zip(COLUMNS, _cells(verdict), strict=True))
        lines.append([*(cells[column] for column in lines[0][:-1]), verdict.verdict])
    return f"""## By {name}

The same claims and rule on another network's features of the same samples; Holm over this list alone. A claim at equal
C has no test here where its sweep has the first distance only.

{format_table(lines)}
"""


def _cells(verdict: Verdict) -> list[str]:
    claim, gap = verdict.claim, verdict.smallest_gap
    effect, interval, *test = verdict.cells(paired=claim.shares_checkpoint)
    undecided = verdict.verdict == "undecided"
    return [claim.text, effect, interval, percent(claim.effect), *test, verdict.verdict, verdict.reason or "-",
            percent(-gap) if undecided and gap is not None else "-", verdict.seeds_cell() if undecided else "-"]
