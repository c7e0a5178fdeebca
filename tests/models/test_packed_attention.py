"""Which attention serves rows of several samples, for machines with and without a GPU and flash-attn."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch
import transformers

from gdrt_ds.batches.tree_attention import ATTENTION_NAME, TreeLayout
from gdrt_ds.batches.varlen_rows import FLASH_2, FLASH_3
from gdrt_ds.config import RunConfig
from gdrt_ds.errors import UserError
from gdrt_ds.models.attention import Place, choose_attention, packed_attention
from gdrt_ds.models.load import _attention
from gdrt_ds.models.packing import choose_packing

LLAMA = transformers.LlamaForCausalLM
TINY = transformers.LlamaConfig(
    vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
)
CPU = Place(torch.device("cpu"), torch.float32, LLAMA)
GPU = Place(torch.device("cuda", 0), torch.bfloat16, LLAMA)


@pytest.fixture
def installed(monkeypatch):
    """A function that says which packages of flash-attn there are, and the GPU's capability."""
    usual = importlib.util.find_spec

    def put(*packages: str, capability: tuple[int, int] = (8, 0)) -> None:
        def find_spec(name, *args):
            if name.startswith("flash_attn"):
                return SimpleNamespace() if name in packages else None
            return usual(name, *args)

        monkeypatch.setattr(importlib.util, "find_spec", find_spec)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    return put


def test_rows_that_share_nothing_go_through_flash_attn_where_it_is_installed(installed):
    installed("flash_attn")
    assert packed_attention("auto", "packed", GPU) == FLASH_2
    assert packed_attention("auto", "packed", CPU) == ATTENTION_NAME
    assert packed_attention("sdpa", "packed", GPU) == ATTENTION_NAME
    installed("flash_attn", "flash_attn_interface", capability=(9, 0))
    assert packed_attention("auto", "packed", GPU) == FLASH_3
    installed()
    assert packed_attention("auto", "packed", GPU) == ATTENTION_NAME


def test_flash_attn_is_not_taken_on_a_gpu_that_it_has_no_kernels_for(installed, monkeypatch):
    installed("flash_attn", capability=(7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    place = Place(torch.device("cuda", 0), torch.float16, LLAMA)
    assert packed_attention("auto", "packed", place) == ATTENTION_NAME
    with pytest.raises(UserError, match="needs an Ampere GPU or a later one, here Tesla T4"):
        choose_attention("flash_attention_2", place.device, place.dtype, LLAMA)


def test_one_line_says_that_flash_attn_serves_packed_rows(installed):
    installed("flash_attn")
    section = config_of("auto", "packed").model
    chosen, line = _attention(section, GPU.device, GPU.dtype, TINY, packed_attention("auto", "packed", GPU))
    assert chosen == FLASH_2
    assert line == "attention: gdrt_varlen_2 in place of flash_attention_2"


def test_rows_with_a_shared_prefix_go_through_the_tree_attention_whatever_is_installed(installed):
    installed("flash_attn")
    assert packed_attention("auto", "shared_prefix", GPU) == ATTENTION_NAME
    assert packed_attention("tree_sdpa", "shared_prefix", GPU) == "tree_sdpa"
    assert packed_attention("auto", "none", GPU) is None


def config_of(attention: str, packing: str) -> RunConfig:
    return RunConfig.model_validate({"model": {"attention": attention}, "train": {"packing": packing}})


def test_flash_attn_packs_rows_that_share_nothing_and_says_what_it_cannot():
    packing, line = choose_packing(config_of("flash_attention_2", "auto"), TINY)
    assert packing == "packed"
    assert "model.attention = flash_attention_2 cannot share the prompt prefix" in line
    assert choose_packing(config_of("flash_attention_2", "packed"), TINY)[0] == "packed"
    with pytest.raises(UserError) as refused:
        choose_packing(config_of("flash_attention_2", "shared_prefix"), TINY)
    assert refused.value.fix == "set train.packing=none or packed, or model.attention=auto"
    assert choose_packing(config_of("tree_sdpa", "auto"), TINY)[0] == "shared_prefix"


def test_tree_sdpa_calls_sdpa_per_sample_where_others_take_flex_attention(monkeypatch):
    from gdrt_ds.batches import tree_attention as module
    from gdrt_ds.models.attention import tree_sdpa  # noqa: F401 - registers itself

    called = []
    monkeypatch.setattr(module, "flex_rows", lambda *args: called.append("flex") or args[0])
    monkeypatch.setattr(module, "_segments", lambda *args: called.append("per sample") or args[0])
    layout = TreeLayout.build([3, 4])

    class OnCuda(torch.Tensor):
        is_cuda = True

    query = torch.zeros(1, 2, 7, 4).as_subclass(OnCuda)
    for name in (ATTENTION_NAME, "tree_sdpa"):
        function = transformers.AttentionInterface()[name]
        function(None, query, query, query, None, tree_layout=layout)
    assert called == ["flex", "per sample"]


def test_a_plan_for_a_gpu_that_is_elsewhere_does_not_ask_for_it(installed, monkeypatch):
    def no_driver(device=None):
        raise RuntimeError("Found no NVIDIA driver on your system")

    installed("flash_attn_interface")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", no_driver)
    found, line = choose_attention("auto", torch.device("cuda"), torch.bfloat16)
    assert found == "sdpa", line
