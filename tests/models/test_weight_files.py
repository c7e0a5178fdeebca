"""Ranges of tensors read straight from safetensors files equal what the library reads.

Damaged files are refused.
"""

import json

import pytest
import torch
from safetensors.torch import save_file

from gdrt_ds.errors import UserError
from gdrt_ds.models.fingerprint import base_fingerprint
from gdrt_ds.models.quantised_slices import block_range, owned_blocks, partition_range
from gdrt_ds.models.weight_files import WeightFiles

TENSORS = {
    "a": torch.randn(7, 11).to(torch.bfloat16),
    "b.weight": torch.randn(33),
    "c": torch.arange(10, dtype=torch.int64),
    "empty": torch.empty(0, 3),
}


@pytest.fixture
def folder(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path


def test_any_range_equals_the_flattened_tensor(folder):
    files = WeightFiles(folder)
    assert set(files.tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        flat = tensor.reshape(-1)
        for start, stop in ((0, None), (3, 9), (0, 0), (flat.numel(), flat.numel())):
            if start <= flat.numel():
                assert torch.equal(files.read(name, start, stop), flat[start:stop])
    with pytest.raises(ValueError):
        files.read("b.weight", 5, 40)


def test_a_truncated_file_is_refused_before_anything_is_read(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="truncated"):
        WeightFiles(folder)


def test_a_header_that_lies_about_its_length_is_refused(folder):
    file = folder / "model.safetensors"
    file.write_bytes((1 << 60).to_bytes(8, "little") + file.read_bytes()[8:])
    with pytest.raises(UserError, match="not a readable safetensors"):
        WeightFiles(folder)


def test_the_files_are_those_that_transformers_loads(folder):
    """model.safetensors before an index that was left over, and nothing that lies beside them."""
    halves = {name: tensor / 2 for name, tensor in TENSORS.items() if tensor.is_floating_point()}
    save_file(halves, folder / "model_backup.safetensors")
    write_index(folder, {"a": "model-00001-of-00002.safetensors"})
    files = WeightFiles(folder)
    assert torch.equal(files.read("a"), TENSORS["a"].reshape(-1))
    before = base_fingerprint(folder)
    (folder / "model_backup.safetensors").unlink()
    assert base_fingerprint(folder) == before
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors .* but weights\.safetensors"):
        WeightFiles(folder)


def write_index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_an_index_with_a_missing_shard_or_a_path_outside_is_refused(folder):
    first = "model-00001-of-00002.safetensors"
    (folder / "model.safetensors").rename(folder / first)
    for name in ("model-00002-of-00002.safetensors", "../model.safetensors"):
        write_index(folder, {"a": first, "b": name})
        with pytest.raises(UserError, match="lacks 1 weight files"):
            WeightFiles(folder)


@pytest.mark.parametrize("numel", [64, 1600, 2240, 4097, 63])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("item", [1, 2])
def test_every_quantisation_block_has_exactly_one_owner_and_lies_in_what_the_owner_reads(numel, world, item):
    packed = -(-((numel + 1) // 2) // item) * item
    size, *_ = partition_range(packed // item, 0, world)
    owners = []
    for rank in range(world):
        _, first, end = partition_range(packed // item, rank, world)
        low, high = block_range(first * item * 2, min(end * item * 2, numel), numel)
        start, stop = owned_blocks(numel, packed, item, size, rank)
        owners += range(start, stop)
        assert start >= stop or (low // 64 <= start and stop <= -(-high // 64))
    assert owners == list(range(-(-numel // 64)))


@pytest.mark.parametrize("low, high", [(0, 64 * 50), (64 * 3, 64 * 50 - 37), (128, 128)])
def test_a_range_quantised_in_pieces_is_the_range_quantised_whole(monkeypatch, low, high):
    import bitsandbytes  # noqa: F401

    from gdrt_ds.models import quantised_slices

    values = torch.randn(64 * 50, generator=torch.Generator().manual_seed(0))

    def read(start, stop):
        return values[start:stop]

    whole = quantised_slices.quantize_range(read, low, high, torch.bfloat16, torch.device("cpu"))
    monkeypatch.setattr(quantised_slices, "PIECE", 64 * 4)
    pieces = quantised_slices.quantize_range(read, low, high, torch.bfloat16, torch.device("cpu"))
    assert pieces[1].numel() == -(-(high - low) // 64)
    assert all(torch.equal(a, b) for a, b in zip(whole, pieces, strict=True))
