"""The axes of the ablations as data (axes.yaml), and the rows that they make of a scale's configuration.

A setting is a choice of one value on some axes, the default on all others. Settings that come to the same
configuration are one row: the default itself, first of all, which every axis shares.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from diffmoe.cells import Row
from diffmoe.config import ConfigError, RunConfig, apply_overrides, digest, from_dict, to_dict

AXES = Path(__file__).with_name("axes.yaml")
DEFAULT = "default"
"""Key of the row that every axis is compared with: the scale's DiffMoE configuration."""

JOIN = "+"
"""Between the values in the key of a row that changes two axes."""

Setting = Mapping[str, "Value"]
"""Values by the name of their axis."""


@dataclass(frozen=True, kw_only=True)
class Value:
    """One value of an axis."""

    name: str
    label: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    """What it changes in the default configuration, by dotted key."""
    paper: bool = False
    """The paper's choice."""
    system: str = "diffmoe"
    scales: tuple[str, ...] = ()
    """Where it makes sense; empty for everywhere."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One thing that is varied."""

    name: str
    title: str
    question: str
    paper: str
    """What the paper says of it, with its place."""
    values: tuple[Value, ...]

    def at(self, scale: str) -> list[Value]:
        """Return the values that make sense at a scale."""
        return [value for value in self.values if not value.scales or scale in value.scales]


def load_axes(path: Path = AXES) -> dict[str, Axis]:
    """Read the axes, by name.

    Raises:
        ConfigError: for a file that cannot be read or an entry that lacks something.
    """
    try:
        axes = [_axis(entry) for entry in yaml.safe_load(path.read_text())]
    except (OSError, yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path}: not a list of axes ({type(error).__name__}: {error})") from None
    return {axis.name: axis for axis in axes}


def _axis(entry: Mapping[str, Any]) -> Axis:
    values = tuple(Value(name=str(value["value"]), label=value["label"], changes=value.get("set", {}),
                         paper=value.get("paper", False), system=value.get("system", "diffmoe"),
                         scales=tuple(value.get("scales", ()))) for value in entry["values"])
    return Axis(name=entry["axis"], title=entry["title"], question=entry["question"], paper=entry["paper"],
                values=values)


def choose_axes(axes: Mapping[str, Axis], names: Iterable[str]) -> list[Axis]:
    """Return the named axes.

    Raises:
        ConfigError: for an unknown name, with the nearest one.
    """
    chosen = []
    for name in names:
        if name not in axes:
            close = difflib.get_close_matches(name, axes, n=1)
            raise ConfigError(f"axis {name}: " + (f"did you mean {close[0]}?" if close
                                                  else f"use one of {', '.join(axes)}"))
        chosen.append(axes[name])
    return chosen


class Design:
    """The rows of settings around one default configuration.

    Args:
        base: the default configuration.
        scale: its name; it decides which values make sense.
        axes: all axes, whichever are swept: a row has the same key in every sweep.
    """

    def __init__(self, base: RunConfig, scale: str, axes: Mapping[str, Axis]) -> None:
        self.scale = scale
        self.axes = axes
        self.base = base
        self._data = to_dict(base)
        self.default = Row(key=DEFAULT, label=DEFAULT, system="diffmoe", config=base)
        self._rows = {digest(base): self.default}
        self._by_key: dict[str, Row | None] = {}
        self.left_out: dict[str, str] = {}
        """Settings that cannot be configured, and why."""
        for axis in axes.values():
            for value in axis.at(scale):
                self.row({axis.name: value})

    def row(self, setting: Setting) -> Row | None:
        """Return the row of a setting; None for one that cannot be configured, which goes to `left_out`."""
        key = JOIN.join(f"{axis}-{value.name}" for axis, value in setting.items())
        if key not in self._by_key:
            self._by_key[key] = self._make_row(key, setting)
        return self._by_key[key]

    def _make_row(self, key: str, setting: Setting) -> Row | None:
        overrides = [f"{name}={json.dumps(content)}" for value in setting.values()
                     for name, content in value.changes.items()]
        try:
            config = from_dict(RunConfig, apply_overrides(self._data, overrides))
        except ConfigError as error:
            self.left_out[key] = str(error)
            return None
        name = digest(config)
        if name not in self._rows:
            label = ", ".join(f"{self.axes[axis].title}: {value.label}" for axis, value in setting.items())
            systems = {value.system for value in setting.values()} - {self.default.system}
            self._rows[name] = Row(key=key, label=label, system=min(systems, default=self.default.system),
                                   config=config)
        return self._rows[name]

    def axis_rows(self, axis: Axis) -> list[tuple[Value, Row]]:
        """Return the values of an axis with their rows."""
        pairs = [(value, self.row({axis.name: value})) for value in axis.at(self.scale)]
        return [(value, row) for value, row in pairs if row is not None]

    def grid_rows(self, first: Axis, second: Axis) -> dict[tuple[str, str], Row]:
        """Return the rows of two axes' values, by the names of both; pairs that cannot be configured are missing."""
        pairs = {(one.name, two.name): self.row({first.name: one, second.name: two})
                 for one in first.at(self.scale) for two in second.at(self.scale)}
        return {names: row for names, row in pairs.items() if row is not None}

    def axes_of(self, key: str) -> tuple[Axis, ...]:
        """Return the axes that a row's key names, in the file's order."""
        parts = key.split(JOIN)
        return tuple(axis for name, axis in self.axes.items() if any(part.startswith(f"{name}-") for part in parts))

    def plan(self, axes: Sequence[Axis], grids: Sequence[tuple[Axis, Axis]]) -> list[Row]:
        """Return the rows of a sweep, each once, the default first.

        Raises:
            ConfigError: for an axis or a grid that varies nothing here.
        """
        groups = {axis.name: [row for _, row in self.axis_rows(axis)] for axis in axes}
        groups |= {f"{one.name},{two.name}": list(self.grid_rows(one, two).values()) for one, two in grids}
        for name, rows in groups.items():
            if not any(row is not self.default for row in rows):
                why = next((f" ({key}: {reason})" for key, reason in self.left_out.items()), "")
                raise ConfigError(f"{name}: nothing to vary at scale {self.scale}{why}; see --list")
        found = {row.key: row for rows in groups.values() for row in rows}
        return [self.default, *(row for key, row in found.items() if key != DEFAULT)]
