"""Checkpoints of real engines.

Bitwise resume, other world sizes and stages, full disk, late processes, adapters.
"""

import pytest

from tests.forked import run_scenario

pytestmark = pytest.mark.distributed
CASES = ("stage3_world2_float32", "stage1_world2_bfloat16", "stage3_world1_float32")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return run_scenario("scenario_checkpoint", tmp_path_factory.mktemp("checkpoint"))


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_bitwise_the_straight_run(report, case):
    found = report[case]
    assert found["moved"] > 1e-4, "the steps after the checkpoint changed the weights"
    assert {
        key: found[key] for key in ("losses_equal", "state_equal", "lr_equal", "steps_equal", "client_ok")
    } == dict.fromkeys(("losses_equal", "state_equal", "lr_equal", "steps_equal", "client_ok"), True)


def test_weights_and_moments_are_bitwise_the_same_on_another_world_size(report):
    assert report["other_world"] == {"state_equal": True, "same": False}


def test_weights_and_moments_are_bitwise_the_same_under_another_zero_stage(report):
    assert report["other_stage_and_world"] == {"state_equal": True}


def test_deepspeed_itself_restores_the_same_state_from_its_own_files(report):
    assert report["deepspeed_reads_its_files"] is True


def test_what_rank_0_reads_counts_on_all_ranks(report):
    """Two nodes can see other names in one folder of a network file system, and have caches of their own."""
    (first, said), (second, _) = report["other_views"]
    assert first["step"] == second["step"] == "step_200"
    assert "no such checkpoint" in first["refused"] and first["refused"] == second["refused"]
    assert first["broken"] == "OSError: 5" and second["broken"] == "RuntimeError: rank 0: OSError: 5"
    for name, table in (("equal", [1, 2]), ("differ", [1, 2]), ("one", None)):
        assert first[name] == second[name] == table, name
    assert len(said) == 1 and "all ranks take those of rank 0" in said[0]


def test_a_full_disk_on_one_rank_is_an_error_on_every_rank_and_nothing_is_published(report):
    for messages in report["faults"]["messages"]:
        assert (
            messages[0].startswith("checkpoint step_2 was not published: rank 1: ")
            and "too large" in messages[0].lower()
        )
        assert messages[1].startswith("checkpoint step_2 was not published: rank 1: ")
    assert report["faults"]["latest"] == "step_1"
    assert report["faults"]["listing"] == ["latest", "step_1"]


def test_a_process_of_an_older_life_cannot_publish(report):
    for messages in report["faults"]["messages"]:
        assert "taken over by start number 2; this process is start number 1" in messages[2]


def test_another_frozen_base_is_refused_at_resume(report):
    assert "another frozen base" in report["faults"]["wrong_base"]


def test_the_adapter_saved_from_shards_loads_in_peft_with_every_lora_b_nonzero(report):
    assert report["adapter"]["lora_b"] == 6 and report["adapter"]["zero"] == 0
    assert report["adapter"]["unexpected"] == []
    assert report["adapter"]["equal_to_master_weights"] is True
