"""The configuration part of the paper's Table 1: counted here, beside what the paper prints.

    python -m diffmoe.report.table1
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import yaml

from diffmoe.cli import run_command
from diffmoe.config import ModelConfig, from_dict
from diffmoe.models.counting import count_parameters, flops_per_call

PAPER = Path(__file__).parent / "paper_table1.yaml"
NOTES = """\
Parameters in millions, ours / paper's. C: training capacity. Activated at C = 1:
  paper   DiffMoE Eq. 40: routers and predictors count by the share of the feed-forward layers that works
  strict  whatever runs on every token counts whole
The paper's total leaves the capacity predictors out at S and B and has them in at L (marked *).
GFLOPs of one call on one image, a multiply-add counted as two; DiT's papers print half of it (GMACs)."""


def imagenet_latents(size: str, num_experts: int | None) -> ModelConfig:
    """Return the paper's model of a size on ImageNet latents; DiffMoE's router, or dense without experts."""
    moe = num_experts and {"num_experts": num_experts, "router": {"kind": "expert_choice"}}
    return from_dict(ModelConfig, {"size": size, "input_size": 32, "patch_size": 2, "in_channels": 4,
                                   "num_classes": 1000, "moe": moe})


def table1_rows() -> list[list[str]]:
    """Return the table as text cells, header first."""
    rows = [["model", "blocks", "width", "heads", "experts", "C", "total", "without predictors", "activated: paper",
             "strict", "GFLOPs", "GMACs"]]
    for paper in yaml.safe_load(PAPER.read_text()):
        config = imagenet_latents(paper["size"], paper["num_experts"])
        count, flops = count_parameters(config), flops_per_call(config)
        capacity = config.moe.capacity
        includes = abs(count.total / 1e6 - paper["total"]) < abs(count.total_without_predictors / 1e6 - paper["total"])
        totals = [f"{count.total / 1e6:.1f}", f"{count.total_without_predictors / 1e6:.1f}"]
        totals[not includes] += f" / {paper['total']}{'*' if includes else ''}"
        rows.append([
            paper["name"], _both(config.depth, paper["blocks"]), _both(config.hidden_size, paper["width"]),
            _both(config.num_heads, paper["heads"]), _both(config.moe.num_experts, paper["num_experts"]),
            _both(f"{capacity:g}", paper["capacity"]), *totals,
            _both(f"{count.activated_paper(capacity) / 1e6:.1f}", paper["activated"]),
            f"{count.activated_strict(capacity) / 1e6:.1f}", f"{flops / 1e9:.1f}", f"{flops / 2e9:.1f}"])
    return rows


def _both(ours: object, paper: object) -> str:
    return f"{ours} / {paper}"


def format_table(rows: list[list[str]]) -> str:
    """Lay out text cells as an aligned Markdown table; the first row is the header."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
             + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def main(arguments: list[str]) -> int:
    """Run the command line."""
    argparse.ArgumentParser(prog="python -m diffmoe.report.table1",
                            description=__doc__.split("\n\n")[0]).parse_args(arguments)
    print("Table 1 of the paper, configurations (ImageNet latents 4x32x32, patch 2)\n")
    print(format_table(table1_rows()))
    print(f"\n{NOTES}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
