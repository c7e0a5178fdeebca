"""The example of docs/other-domains.md: data, command and table of fields are what the code does."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest

from gdrt_ds import train
from gdrt_ds.config import load_config
from gdrt_ds.data.text_rows import ROLES
from gdrt_ds.files import REPOSITORY
from gdrt_ds.objectives import objectives
from gdrt_ds.training.preflight import check_data
from gdrt_ds.training.preparation import prepare

PAGE = (REPOSITORY / "docs" / "other-domains.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tickets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tickets")
    script = REPOSITORY / "docs" / "examples" / "rows" / "tickets.py"
    subprocess.run([sys.executable, str(script), str(folder)], check=True)
    return folder


def test_the_command_of_the_page_is_planned_on_the_data_of_the_page(tickets, tmp_path):
    block = PAGE.split("```")[1].replace("\\\n", " ")
    command = next(line for line in block.splitlines() if "gdrt_ds/train.py" in line)
    given = train.parse(shlex.split(command)[2:]).overrides
    config = load_config(None, [*given, f"data.path={tickets}", f"run.dir={tmp_path / 'run'}"])
    prepared = prepare(config)
    check_data(config, prepared)
    assert {split: len(store) for split, store in prepared.stores.items()} == {"train": 400, "valid": 40}
    assert len(prepared.data.auxiliary().store) == 4  # two channels, two teams
    kinds = [row.labels["kind"] for row in prepared.data.rows["test"]]
    assert 0.1 < kinds.count("conflict") / len(kinds) < 0.3


def test_the_page_names_every_field_and_every_objective_that_trains():
    fields = PAGE.split("## What a row may hold")[1].split("\n- ")[0]
    assert all(f"`{role}`" in fields for role in ROLES)
    words = " ".join(PAGE.split())
    trained = re.search(r"every objective that needs no catalogue trains on them: (.*?)\.", words).group(1)
    usable = {name for name, objective in objectives().items() if not objective.requires_catalogue}
    assert set(re.findall(r"`([\w+]+)`", trained)) == usable
