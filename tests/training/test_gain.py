"""`dro.excess=relevance`: group weights follow the losses above those of the prompt alone, with growing
windows; what it cannot be combined with is refused. tests/distributed/test_growing_ranks.py resumes it and
compares ranks.
"""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from gdrt_ds.config import load_config
from gdrt_ds.errors import UserError
from gdrt_ds.training.preparation import plan_batches, prepare
from tests.distributed.test_train_cli import lines, train

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = [
    "data.windows=growing",
    "prompt.template=list",
    "groups.reference=corpus",
    "groups.num=3",
    "groups.binning=uniform",
    "dro.excess=relevance",
    "dro.tau=0.5",
    "model.quantization=none",
    "train.global_batch=16",
    "train.warmup_steps=0",
    "train.eval_every=null",
    "train.save_every=null",
    "train.max_steps=3",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three steps."""
    folder = tmp_path_factory.mktemp("gain") / "run"
    done = train(["python"], folder, *SETTINGS)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-4000:]
    return folder


def weights_by_definition(run: Path, step: int, tau: float, *, above_the_prompt: bool) -> np.ndarray:
    """float64[G]: p_g exp(L_g / tau) / Z, with p, L and the losses of the prompt alone counted here."""
    config, line = load_config(run / "config.yaml"), lines(run)[step]
    store = prepare(config).stores["train"]
    kept = load_file(run / "groups.safetensors")
    prompt, count = np.zeros(config.groups.num), np.zeros(config.groups.num)
    for sample in plan_batches(config, store, 1).samples(step):
        span = slice(store.target_offsets[sample], store.target_offsets[sample + 1])
        np.add.at(prompt, kept["group"][span], -kept["r"][span].astype(np.float64))
        np.add.at(count, kept["group"][span], 1)
    np.testing.assert_array_equal(count, line["group_count"])
    losses = np.array([np.nan if loss is None else loss for loss in line["group_loss"]])
    losses = losses - above_the_prompt * prompt / np.maximum(count, 1)
    q = np.where(count > 0, count * np.exp(np.where(count > 0, losses, 0) / tau), 0)
    return q / q.sum()


@pytest.mark.parametrize("step", [0, 2])
def test_weights_follow_the_losses_above_those_of_the_prompt_alone(run, step):
    weight = np.array([value or 0.0 for value in lines(run)[step]["group_weight"]])
    np.testing.assert_allclose(
        weight, weights_by_definition(run, step, 0.5, above_the_prompt=True), rtol=0, atol=1e-5
    )
    plain = weights_by_definition(run, step, 0.5, above_the_prompt=False)
    assert np.abs(weight - plain).max() > 0.05  # the reference matters


@pytest.mark.parametrize(
    "overrides, problem",
    [
        (["groups.by=item_popularity"], "groups.by is item_popularity: set groups.by=relevance"),
        (["groups.reference=live"], "needs a reference that stays"),
    ],
)
def test_what_it_needs_is_said(overrides, problem):
    with pytest.raises(UserError, match=problem):
        load_config(ROOT / "configs" / "smoke.yaml", ["dro.excess=relevance", *overrides])
