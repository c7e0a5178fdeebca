"""Sharded loading gives bitwise what transformers + bitsandbytes + DeepSpeed give, for every family, also at
odd world sizes.
"""

import pytest

from tests.forked import run_scenario

pytestmark = pytest.mark.distributed
FAMILIES = ("llama", "llama_tied", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "phi", "phi3", "gpt2")
MULTIMODAL = ("gemma3_images", "gemma4")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return run_scenario("scenario_sharded", tmp_path_factory.mktemp("sharded"))


@pytest.mark.parametrize("family", [*FAMILIES, *MULTIMODAL])
def test_each_rank_holds_bitwise_the_stock_slice_and_quant_state_at_world_3(report, family):
    found = report["families"][family]
    assert {key: found[key] for key in ("world3_rank0", "world3_rank1", "world3_rank2")} == {
        f"world3_rank{r}": [] for r in range(3)
    }


@pytest.mark.parametrize(
    "case", ["llama", "gpt2", "llama_bf16_storage", "llama_single_quant", "llama_not_quantised"]
)
def test_storage_types_and_single_quantisation_are_bitwise_equal_at_world_2(report, case):
    assert report["families"][case]["world2_rank0"] == report["families"][case]["world2_rank1"] == []


@pytest.mark.parametrize("case", ["llama_stored_4bit", "gpt2_stored_4bit", "llama_stored_4bit_single"])
def test_a_checkpoint_that_is_4bit_already_is_read_by_slice_and_is_bitwise_the_stock_one(report, case):
    found = report["families"][case]
    assert [found[f"world3_rank{rank}"] for rank in range(3)] == [[], [], []]


def test_one_rank_loads_the_same_way(report):
    assert report["families"]["llama"]["world1_rank0"] == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_losses_are_bitwise_equal_with_both_loaders(report, dtype):
    both = report[f"train_{dtype}"]
    assert both["sharded"] == both["stock"]
    assert both["sharded"][0] != both["sharded"][1], "ranks train on their own samples"


def test_loss_at_world_3_equals_the_loss_without_deepspeed(report):
    assert report["loss"]["sharded"] == pytest.approx([report["loss"]["plain"]] * 3, rel=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_evaluation_between_training_steps_does_not_repack_the_weights(report, dtype):
    assert report[f"eval_repeatable_{dtype}"] is True


def test_the_way_of_loading_is_announced(report):
    assert "loading: sharded (each rank reads and keeps only its slice)" in report["lines"]
