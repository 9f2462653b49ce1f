"""A run to launch."""

from __future__ import annotations

from dataclasses import dataclass

from omnivision.config.schema import Settings
from omnivision.reporting.run_directory import RunDir


@dataclass(frozen=True)
class Job:
    """The validated settings of a run, and its configuration as composed, interpolations unresolved."""

    settings: Settings
    config_text: str

    @property
    def run_dir(self) -> RunDir:
        return RunDir(self.settings.launcher.experiment_log_dir, self.settings.trainer.checkpoint.save_dir)

    @property
    def is_finished(self) -> bool:
        """Whether the run has completed the requested epochs; an evaluation never counts as finished."""
        summary, trainer = self.run_dir.read_summary(), self.settings.trainer
        done = summary.get("status") == "finished" and (summary.get("epochs") or 0) >= trainer.max_epochs
        return done and trainer.mode != "val"
