"""Where things stand in a comparison's folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from clearhead.compare.arms import Arm


@dataclass(frozen=True)
class Layout:
    """Names of every file and folder below `folder`."""

    folder: Path

    def run(self, arm: Arm, seed: int) -> Path:
        """Return the folder of a run that counts for the verdict."""
        return self.folder / "runs" / arm.slug / f"seed{seed}"

    def tuning_run(self, arm: Arm, rate: float, seed: int) -> Path:
        """Return the folder of a run that only helps to choose the learning rate."""
        return self.folder / "tuning" / arm.slug / f"lr{rate:g}-seed{seed}"

    def equal_rate_run(self, arm: Arm, rate: float, seed: int) -> Path:
        """Return the folder of a run at a rate that another arm chose; it only holds a verdict in check."""
        return self.folder / "equal_rate" / arm.slug / f"lr{rate:g}-seed{seed}"

    @property
    def plan(self) -> Path:
        """The plan, written first."""
        return self.folder / "plan.json"

    @property
    def resolved(self) -> Path:
        """What the plan came to: steps, parameters and operations per arm, the data's summary."""
        return self.folder / "resolved.json"

    @property
    def probe(self) -> Path:
        """The speed probe's measurements."""
        return self.folder / "probe.json"

    @property
    def sessions(self) -> Path:
        """One line for each time the command ran here: machine, versions, load, how long."""
        return self.folder / "sessions.jsonl"

    @property
    def lock(self) -> Path:
        """Held while the command runs here."""
        return self.folder / ".lock"

    @property
    def report(self) -> Path:
        """The page for readers."""
        return self.folder / "report.html"

    @property
    def results(self) -> Path:
        """Everything, for programs."""
        return self.folder / "results.json"

    @property
    def table(self) -> Path:
        """One line for each run, for spreadsheets."""
        return self.folder / "results.csv"
