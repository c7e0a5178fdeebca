"""Every study file of configs/studies is one that this version takes, and so is every cell of it."""

from __future__ import annotations

import pytest

from gdrt_ds.files import REPOSITORY
from gdrt_ds.studies.grid import cells_of, choose_cells, load_study
from gdrt_ds.studies.runner import settings_of

FILES = sorted((REPOSITORY / "configs" / "studies").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_its_rows_pieces_and_settings_are_known(file, tmp_path):
    study = load_study(file)
    cells = cells_of(study, tmp_path)
    assert cells and len({cell.name for cell in cells}) == len(cells)
    rows = {(cell.setting, cell.row): cell for cell in cells}  # its seeds differ in nothing else
    for cell in rows.values():
        settings_of(study, tmp_path, cell)
    for piece in study.pieces:
        assert choose_cells(study, cells, piece)
