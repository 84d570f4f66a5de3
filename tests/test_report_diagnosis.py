"""Figures and page of what networks do inside: the numbers of the records, worked out here; nothing where none are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fake_records import NUM_CLASSES, NUM_EXPERTS, NUM_LAYERS, NUM_LEVELS, ROWS, fake_records

from diffmoe.records import Record
from diffmoe.report.diagnosis import (
    branches_data,
    experts,
    experts_data,
    loss_by_noise_level_data,
    thresholds_data,
)
from diffmoe.report.diagnosis_page import diagnosis_markdown
from diffmoe.report.figures import FIGURES, figures_csv, losses_data
from diffmoe.report.table import mean_sd, with_dense

PICTURES = {"branches", "experts_by_noise_level", "experts_by_class", "thresholds", "loss_by_noise_level"}


def changed(records: list[Record], **values: Any) -> list[Record]:
    return [replace(record, diagnosis=record.diagnosis | values) for record in records]


def column(text: str, name: str) -> dict[str, str]:
    """Return the cells below a heading by row, of whichever of the page's tables has it."""
    for table in text.split("\n\n"):
        lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line[:2] == "| "]
        if lines and name in lines[0]:
            return {line[0]: line[lines[0].index(name)] for line in lines[1:]}
    raise AssertionError(f"no column {name}")


def test_gates_and_shares_are_the_records_by_block_and_dense_rows_stand_beside_the_experts() -> None:
    records = fake_records(["dense", "diffmoe"], [0, 1])
    data = branches_data(records)
    found = {(line.row, line.seed, line.panel, line.block): line.value for line in data.itertuples()}
    for record in records:
        inside = record.diagnosis
        for block, share in enumerate(inside["blocks"]["share"], 1):
            panel = "dense" if block % 2 else "moe"  # the second block of each pair has DiffMoE's experts
            assert found.pop((record.row, record.seed, panel, block)) == pytest.approx(np.mean(share))
        for panel, weights in inside.get("gates", {}).items():
            for block, weight in zip((2, 4), weights, strict=True):
                assert found.pop((record.row, record.seed, panel, block)) == pytest.approx(np.mean(weight))
    assert not found
    assert set(branches_data(fake_records(["dense"], [0])).panel) == {"dense"}


@pytest.mark.parametrize(("of", "key", "places"), [("noise_level", "load_by_level", NUM_LEVELS),
                                                   ("class", "load_by_class", NUM_CLASSES)])
def test_the_load_of_a_training_is_drawn_once_of_its_first_seed(of: str, key: str, places: int) -> None:
    records = fake_records(seeds=[1, 2])
    data = experts_data(records, of)
    assert list(dict.fromkeys(data.label)) == ["TC", "EC", "DiffMoE", "Expert Race"] and set(data.seed) == {1}
    assert len(data) == 4 * NUM_LAYERS * NUM_EXPERTS * places
    wanted = next(record for record in records if record.row == "diffmoe").diagnosis[key]
    assert np.array_equal(data[data.label == "DiffMoE"].load, np.ravel(wanted))


def test_rows_of_two_trainings_that_share_a_name_but_a_value_are_drawn_apart() -> None:
    records = [replace(record, row=f"{record.row}-{value}", label=f"{record.label}, {value}",
                       training_digest=record.training_digest + value)
               for value in ("0.001", "0.0005") for record in fake_records(["diffmoe-static", "diffmoe"], [0])]
    assert set(experts_data(records, "class").label) == {"DiffMoE, 0.001", "DiffMoE, 0.0005"}
    assert experts(records, "class")


def test_thresholds_that_differ_are_told_apart_by_their_rows() -> None:
    records = fake_records(["diffmoe", "diffmoe-predictor", "dense"], [0, 1])
    data = thresholds_data(records)
    assert set(data.label) == {"DiffMoE"} and len(data) == 2 * NUM_LEVELS
    quality = records[1].diagnosis["passes"]
    for name in ("precision", "recall"):
        assert np.allclose(data[data.seed == 1][name], np.mean(quality[name], 0))
    other = {name: (np.asarray(values) / 2).tolist() for name, values in quality.items()}
    assert set(thresholds_data(records[:2] + changed(records[2:4], passes=other)).label) == {
        "DiffMoE (dynamic)", "DiffMoE (per-token threshold)"}


def test_a_cell_of_the_page_is_a_mean_over_layers_and_levels_with_its_sd_over_seeds() -> None:
    first, second = fake_records(["diffmoe"], [0, 1])
    gates = {"pair": [[0.1, 0.3], [0.2, 0.6]], "token": [[0.1, None], [0.2, 0.6]]}
    load = [[[0.5, 1.5], [0.0, 0.0]], [[1.0, 1.0], [2.0, None]]]  # spreads 0.5, idle, 0 and 0
    records = [*changed([first], gates=gates, load_by_level=load, capacity=[[1.5, 1.0], [0.5, 2.0]]),
               *changed([second], gates={name: [[0.5]] for name in gates}, load_by_level=load, capacity=[[1.0, 1.5]])]
    text = diagnosis_markdown([*records, *fake_records(["dense"], [0, 1])])
    row = ROWS["diffmoe"][0]
    assert column(text, "pair weight") == {row: "0.40 \u00b1 0.14", "Dense": "-"}  # 0.3 and 0.5
    assert column(text, "token weight")[row] == "0.40 \u00b1 0.14"
    assert column(text, "C, noise") == {row: "1"}  # Dense has none of these columns
    assert column(text, "C, data")[row] == "1.5"
    assert column(text, "by level")[row] == f"{0.5 / 3:.4g}"
    assert column(text, "experts") == {row: "0.03 / 0.6", "Dense": "-"}


def test_the_sides_of_dense_and_sparse_blocks_are_kept_apart() -> None:
    blocks = {"is_moe": [False, True], "rms": [[1.0, 3.0], [10.0, 30.0]], "share": [[0.1], [0.4]]}
    text = diagnosis_markdown(changed(fake_records(["tc"], [0]), blocks=blocks))
    found = [column(text, name)["TC"] for name in ("MoE RMS", "dense RMS", "MoE share", "dense share", "precision")]
    assert found == ["20", "2", "0.4", "0.1", "-"]


def test_rows_without_a_diagnosis_are_left_out_of_all_of_it() -> None:
    with_it, without = fake_records(["tc"], [0, 1]), fake_records(["diffmoe"], [0, 1])
    records = with_it + [replace(record, diagnosis={}) for record in without]
    assert "DiffMoE" not in diagnosis_markdown(records)
    texts = figures_csv(records, {name: FIGURES[name] for name in PICTURES})
    assert texts.keys() == PICTURES - {"thresholds", "loss_by_noise_level"}
    assert not any("diffmoe" in text for text in texts.values())
    for name in texts:
        FIGURES[name][1](records)
    assert figures_csv([replace(record, diagnosis={}) for record in records],
                       {name: FIGURES[name] for name in PICTURES}) == {}


def test_shares_stand_block_by_block_and_those_of_experts_are_marked() -> None:
    records = fake_records(["dense", "diffmoe"], [0, 1])
    text = diagnosis_markdown(records)
    for block in range(1, 5):
        shares = {record.label: [] for record in records}
        for record in records:
            shares[record.label].append(np.mean(record.diagnosis["blocks"]["share"][block - 1]))
        expected = {label: f"{np.mean(found):.2g}" for label, found in shares.items()}
        expected["DiffMoE (dynamic)"] += "*" if block % 2 == 0 else ""
        assert column(text, str(block)) == expected


def test_training_losses_are_compared_with_denses_of_the_same_seed() -> None:
    def with_losses(record: Record, *last: float) -> Record:
        lines = [[step, {"mse": loss}] for step, loss in zip((75, 76, 100), (9.0, *last), strict=True)]
        return replace(record, training=record.training | {"steps": 100, "losses": lines})

    records = {(record.row, record.seed): record for record in fake_records(["dense", "diffmoe"], [0, 1])}
    text = diagnosis_markdown([with_losses(records["dense", 0], 0.5, 0.7), with_losses(records["diffmoe", 0], 0.6, 0.8),
                               with_losses(records["diffmoe", 1], 0.8, 1.0)])
    assert column(text, "training loss") == {"Dense": "0.6", "DiffMoE (dynamic)": "0.80 ± 0.14"}
    assert column(text, "to Dense, x1000") == {"Dense": "-", "DiffMoE (dynamic)": "100"}  # of the seed that both have
    rates = []
    for rate, dense, sparse in ((1e-3, 0.5, 0.6), (2e-3, 0.7, 0.6)):
        for row, loss in (("dense", dense), ("diffmoe", sparse)):
            record = with_losses(records[row, 0], loss, loss)
            config = record.config | {"training": record.config["training"] | {"learning_rate": rate}}
            rates.append(replace(record, row=f"{row}-{rate}", label=f"{row}, {rate}", config=config,
                                 config_digest=f"{row}{rate}"))
    assert column(diagnosis_markdown(rates), "to Dense, x1000") == {
        "dense, 0.001": "-", "dense, 0.002": "-", "diffmoe, 0.001": "100", "diffmoe, 0.002": "-100"}


def test_a_rate_of_the_experts_own_leaves_dense_to_compare_with() -> None:
    dense, sparse = fake_records(["dense", "diffmoe"], [0])
    old = replace(dense, config=dense.config | {"training": {
        name: value for name, value in dense.config["training"].items() if name != "expert_rate"}})
    changed = replace(sparse, config=sparse.config | {"training": sparse.config["training"] | {"expert_rate": 0.25}})
    assert with_dense([old, changed]) == [(changed, old)]


def test_averaged_losses_are_compared_with_denses_on_the_same_batch() -> None:
    records = [record for record in fake_records(["dense", "diffmoe-static", "diffmoe", "tc"], [0, 1])
               if (record.row, record.seed) != ("tc", 0)]
    records = [replace(record, diagnosis=record.diagnosis | {"batch": 1032}) if record.row == "tc" else record
               for record in records]
    losses = {(record.row, record.seed): np.asarray(record.diagnosis["loss"]) for record in records}
    data = loss_by_noise_level_data(records)
    assert set(data.row) == {"diffmoe-static", "diffmoe"}
    for (row, seed), part in data.groupby(["row", "seed"]):
        assert np.allclose(part.loss, losses[row, seed])
        assert np.allclose(part.to_dense, 100 * (losses[row, seed] / losses["dense", seed] - 1))
    text = diagnosis_markdown(records)
    averaged = column(text, "averaged loss")
    difference = [1e3 * (losses["diffmoe", seed] - losses["dense", seed]).mean() for seed in (0, 1)]
    assert float(averaged["TC"]) == pytest.approx(losses["tc", 1].mean(), rel=1e-3)
    table = next(table for table in text.split("\n\n") if "averaged loss" in table)
    assert column(table, "to Dense, x1000")["DiffMoE (dynamic)"] == mean_sd(difference)
    assert column(table, "to Dense, x1000")["TC"] == "-"  # of another batch
    old = [replace(record, diagnosis={key: value for key, value in record.diagnosis.items() if key != "loss"})
           for record in records]
    assert "averaged loss" not in diagnosis_markdown(old) and loss_by_noise_level_data(old).empty


def test_what_pools_of_one_noise_level_cost_is_told_of_records_that_have_both_losses() -> None:
    first, second = fake_records(["diffmoe"], [0, 1])
    losses = {"loss": [0.2, 0.3], "mixed_loss": [0.2, 0.2]}
    records = [*changed([first], **losses), *changed([second], **losses | {"loss": [0.1, 0.4]})]
    text = diagnosis_markdown([*records, *fake_records(["dense"], [0, 1])])
    row = ROWS["diffmoe"][0]
    assert column(text, "levels apart") == {row: "25"} and column(text, "at the least noise") == {row: "75 ± 35"}
    older = [replace(record, diagnosis={
        name: found for name, found in record.diagnosis.items() if name != "mixed_loss"}) for record in records]
    assert "levels apart" not in diagnosis_markdown(older)


def test_the_losses_against_denses_name_the_seeds_that_have_one() -> None:
    records = [*fake_records(["diffmoe"], [0, 1]), *fake_records(["dense"], [0])]
    figure = FIGURES["loss_by_noise_level"][1](records)
    assert "seed 0" in figure.get_suptitle() and "seeds" not in figure.get_suptitle()


def test_a_row_of_some_of_the_seeds_of_a_shared_training_is_not_drawn_again() -> None:
    records = [*fake_records(["diffmoe", "dense"], [0, 1]), *fake_records(["diffmoe-predictor"], [1])]
    assert set(thresholds_data(records).label) == {"DiffMoE"}
    assert set(losses_data(records).label) == {"DiffMoE", "Dense"}
    assert set(losses_data(records[:2]).label) == {"DiffMoE (dynamic)"}
