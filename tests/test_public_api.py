"""The public names of `gdrt_ds` exist, and importing the package costs nothing that is not used."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gdrt_ds


@pytest.mark.parametrize("name", [name for name in gdrt_ds.__all__ if name != "__version__"])
def test_a_public_name_is_the_object_of_its_module(name):
    home = importlib.import_module(gdrt_ds._HOMES[name])
    assert getattr(gdrt_ds, name) is getattr(home, name)
    assert name in dir(gdrt_ds)


def test_importing_the_package_and_reading_a_config_imports_no_torch():
    code = (
        "import sys, gdrt_ds; gdrt_ds.load_config(None, ['dro.tau=0.5']); "
        "print([name for name in ('torch', 'transformers', 'deepspeed') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = gdrt_ds.no_such_name


def test_the_version_is_the_one_of_pyproject():
    project = Path(gdrt_ds.__file__).parents[1] / "pyproject.toml"
    written = re.search(r'^version = "(.+)"$', project.read_text(encoding="utf-8"), re.MULTILINE)
    assert gdrt_ds.__version__ == written.group(1)


def test_the_citation_names_the_same_version():
    citation = Path(gdrt_ds.__file__).parents[1] / "CITATION.cff"
    assert re.search(r"^version: (.+)$", citation.read_text(), re.MULTILINE).group(1) == gdrt_ds.__version__
