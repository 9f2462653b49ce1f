"""Datasets of the catalog outside of a run: those of a run's configuration, or of catalog files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from omnivision.config.compose import find_config_dir, yaml12_numbers
from omnivision.config.messages import suggest
from omnivision.config.schema import DatasetSettings
from omnivision.utils.errors import UserError


class Catalog:
    """Entries by name, of the project's catalog and of `files` (a run's config.yaml, catalogs of `omnivision prepare`), later
    files first. `data_root` replaces the folder that their paths start with. Raises UserError for an unreadable file.
    """

    def __init__(self, files: Sequence[Path], data_root: str | None = None) -> None:
        self._entries = OmegaConf.create({})
        for file in (find_config_dir() / "experiments" / "dataset_catalog.yaml", *files):
            try:
                with yaml12_numbers():
                    content = OmegaConf.create(yaml.safe_load(file.read_text(encoding="utf-8")) or {})
                if not isinstance(content, DictConfig):
                    raise ValueError("it must be a mapping")
                known = {key: content._get_node(key) for key in ("data_root", "datasets") if key in content}
                self._entries.merge_with(OmegaConf.create(known))
            except (OSError, ValueError, OmegaConfBaseException, yaml.YAMLError) as error:
                raise UserError(f"{file} cannot be read as a catalog: {' '.join(str(error).split())}.") from None
        if data_root is not None:
            self._entries.data_root = data_root

    @property
    def names(self) -> list[str]:
        return sorted(map(str, self._entries.get("datasets") or {}))

    def __getitem__(self, name: str) -> DatasetSettings:
        """Return an entry. Raises UserError for an unknown name, and for an invalid entry."""
        if name not in self.names:
            raise UserError(
                f"{name} is neither a dataset of the catalog nor an existing file{suggest(name, self.names)} --catalog FILE "
                "adds datasets."
            )
        try:
            entry = OmegaConf.to_container(self._entries.datasets[name], resolve=True)
            return DatasetSettings.model_validate(entry)
        except (OmegaConfBaseException, ValidationError) as error:
            raise UserError(f"datasets.{name} is invalid: {' '.join(str(error).split())[:300]}.") from None
