"""Weight files have the mode that the umask says, like every other file of a run."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from gdrt_ds.data.trie import TokenTrie
from gdrt_ds.data.trie_file import save_trie
from gdrt_ds.dro.relevance import save_cached
from gdrt_ds.files import set_usual_mode
from gdrt_ds.training.durable import save_tensors

WRITERS = {
    "trie": lambda folder: save_trie(TokenTrie.build([[1, 2], [1, 3]]), folder / "trie.safetensors"),
    "checkpoint": lambda folder: save_tensors({"a": torch.zeros(3)}, folder / "rank.safetensors"),
    "relevance": lambda folder: save_cached(folder, "key", np.zeros(3, np.float32)),
}


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o007, 0o660), (0o077, 0o600)])
@pytest.mark.parametrize("writer", WRITERS)
def test_files_of_tensors_can_be_read_by_those_whom_the_umask_lets(tmp_path, writer, umask, mode):
    before = os.umask(umask)
    try:
        WRITERS[writer](tmp_path)
        assert os.umask(umask) == umask  # looking at it has not changed it
    finally:
        os.umask(before)
    (file,) = tmp_path.glob("*.safetensors")
    assert file.stat().st_mode & 0o777 == mode


def test_the_usual_mode_is_that_of_open(tmp_path):
    (tmp_path / "ours").touch(mode=0o600)
    (tmp_path / "theirs").write_text("")
    set_usual_mode(tmp_path / "ours")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "theirs").stat().st_mode
