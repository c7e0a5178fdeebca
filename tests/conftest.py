"""What holds for all tests: they ask no network, and those that take longest begin first.

What the hub is asked for must be on this machine, or is refused at once. Otherwise its libraries try again
for twenty seconds before they give up. It stands in the environment before any of them is imported, and the
processes that tests start inherit it.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

LONGEST = (
    "tests/studies/test_study.py",
    "tests/eval/test_scoring_run.py",
    "tests/distributed/test_planted_effect.py",
    "tests/distributed/test_train_cli.py",
    "tests/distributed/test_growing_ranks.py",
    "tests/distributed/test_held_bytes.py",
    "tests/distributed/test_exactness.py",
    "tests/distributed/test_checkpoint_ranks.py",
    "tests/distributed/test_reference_model.py",
    "tests/golden/test_golden.py",
    "tests/studies/test_quickstart.py",
    "tests/gpu/test_gpu_check.py",
    "tests/packaging/test_wheel.py",
    "tests/training/test_resumed_groups.py",
    "tests/loss/test_kernels.py",
)
"""Files in the order of their time. A worker that began one of them last would leave the others idle."""


def pytest_collection_modifyitems(items):
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0], len(place)))
