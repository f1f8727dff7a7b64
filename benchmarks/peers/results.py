"""What was measured, kept as it comes: a run that is interrupted goes on where it was."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BANDWIDTH = "bandwidth"


@dataclass(frozen=True, slots=True)
class Cell:
    """One measurement of one variant: figures by name, or why there are none.

    round: counted from 1. wall_s: what it took altogether, loading included. facts: what the engine said of itself.
    """

    shape: str
    workload: str
    variant: str
    round: int
    figures: dict[str, float]
    error: str | None
    wall_s: float
    facts: dict[str, str]


class Results:
    """A folder with the machine's description and one line a measurement."""

    def __init__(self, folder: Path, machine: dict[str, str], *, quick: bool) -> None:
        """Raises ValueError when the folder holds figures of another machine or of another kind of run."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._rounds = folder / "rounds.jsonl"
        self.machine: dict[str, Any] = machine | {"quick": quick}
        about = folder / "machine.json"
        if about.is_file():
            known = json.loads(about.read_text())
            differing = [key for key in self.machine if known.get(key) != self.machine[key]]
            if differing:
                raise ValueError(
                    f"{folder} holds figures of another machine or kind of run: {', '.join(differing)} differ; "
                    "give another --results"
                )
        else:
            about.write_text(json.dumps(self.machine, indent=2) + "\n")
        self.cells = list(self._read())

    def _read(self) -> Iterator[Cell]:
        if self._rounds.is_file():
            for line in self._rounds.read_text().splitlines():
                yield Cell(**json.loads(line))

    def add(self, cell: Cell) -> None:
        with self._rounds.open("a") as file:
            file.write(json.dumps(asdict(cell)) + "\n")
        self.cells.append(cell)

    def is_done(self, shape: str, workload: str, variant: str, turn: int, *, retry_failed: bool) -> bool:
        """Whether a round has its figures, or the variant was found unable to do the workload in any round."""
        for cell in self.cells:
            if (cell.shape, cell.workload, cell.variant) == (shape, workload, variant):
                if cell.error is None and cell.round == turn:
                    return True
                if cell.error is not None and not retry_failed:
                    return True
        return False

    def usual_s(self, shape: str, workload: str, variant: str) -> float | None:
        """What the measurement took when it was last made."""
        times = [
            cell.wall_s
            for cell in self.cells
            if (cell.shape, cell.workload, cell.variant) == (shape, workload, variant)
        ]
        return times[-1] if times else None

    def figures(self) -> dict[tuple[str, str, str], dict[str, list[float]]]:
        """For each (shape, workload, variant) every figure's values, one a round; a repeated round's last counts."""
        newest = {(cell.shape, cell.workload, cell.variant, cell.round): cell for cell in self.cells if not cell.error}
        gathered: dict[tuple[str, str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for (shape, workload, variant, _), cell in sorted(newest.items()):
            for name, value in cell.figures.items():
                gathered[shape, workload, variant][name].append(value)
        return gathered

    def errors(self) -> dict[tuple[str, str, str], str]:
        """Why a variant has no figures at all for a workload."""
        measured = self.figures()
        return {
            (cell.shape, cell.workload, cell.variant): cell.error
            for cell in self.cells
            if cell.error is not None and (cell.shape, cell.workload, cell.variant) not in measured
        }

    def facts(self) -> dict[str, dict[str, str]]:
        """What every variant said of itself, the last time."""
        return {cell.variant: cell.facts for cell in self.cells if cell.facts}
