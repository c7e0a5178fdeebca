"""Planted errors in what a GPU needs, for tests/mutations.py: (what, test, changes) of each.

Every one of them would show on a GPU only, as a crash, a wait, a leak between samples or a slow run. The
tests that must fail run on CPUs.
"""

from __future__ import annotations

PLANTED = [
    (
        "LOCAL_RANK is the task's number where each task sees one GPU",
        "runtime/test_devices.py::test_deepspeed_is_told_the_number_of_the_device_and_not_of_the_task",
        (
            (
                "runtime/starting.py",
                "complete_rendezvous",
                "number = runtime.device.index",
                "number = runtime.local_rank",
            ),
        ),
    ),
    (
        "a V100 is taken to compute in bfloat16",
        "runtime/test_devices.py::test_auto_computes_in_bfloat16_only_where_the_gpu_does",
        (("models/source.py", "_gpu_without_bfloat16", ">= FIRST_BFLOAT16", ">= 7"),),
    ),
    (
        "every value of a log line is read by itself",
        "training/test_host_reads.py::test_logging_reads_all_steps_since_its_last_line_at_once",
        (
            (
                "training/telemetry.py",
                "read_at_once",
                "return next(numbers)",
                "return next(numbers) + 0 * value.item()",
            ),
        ),
    ),
    (
        "a block counts as full where one of its keys is seen",
        "batches/test_flex_rows.py::"
        "test_the_blocks_of_a_layout_are_those_that_torch_finds_by_trying_every_score",
        (("batches/flex_rows.py", "visible_blocks", "end_RB.amin(1)", "end_RB.amax(1)"),),
    ),
    (
        "rows of every length are compiled",
        "batches/test_flex_rows.py::test_rows_of_many_lengths_need_one_graph_per_size_and_window",
        (
            (
                "batches/flex_rows.py",
                "padded_length",
                "return size",
                "return -(-length // BLOCK) * BLOCK",
            ),
        ),
    ),
    (
        "FlexAttention goes on unfused where too many graphs are needed",
        "batches/test_flex_rows.py::test_a_graph_too_many_is_an_error_that_names_the_way_round",
        (("batches/flex_rows.py", "compiled_flex", "fullgraph=True", "fullgraph=False"),),
    ),
    (
        "flash-attn's window is one position wider",
        "batches/test_varlen_rows.py::test_the_call_gives_the_attention_and_gradients_of_the_whole_matrix",
        (("batches/varlen_rows.py", "varlen_rows", "(window - 1, 0)", "(window, 0)"),),
    ),
    (
        "a copy to the device comes from memory that is not page-locked",
        "cuda_dry/test_fake_cuda.py::test_every_objective_stays_on_the_device",
        (("runtime/devices.py", "to_device", "values.pin_memory().to(", "values.to("),),
    ),
    (
        "scoring asks the device whether prompts are padded",
        "cuda_dry/test_fake_cuda.py::test_a_catalogue_is_scored_on_the_device_without_a_read_or_a_wait",
        (
            (
                "inference/catalogue_scoring.py",
                "CatalogueScorer._forward",
                "not state.padded",
                "bool(state.visible.all())",
            ),
        ),
    ),
]
