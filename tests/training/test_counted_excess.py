"""`dro.excess=relevance` and `markov`: group weights follow the losses above those of the prompt alone and of
a last-item Markov chain, with growing windows; what they cannot be combined with is refused.
tests/distributed/test_growing_ranks.py resumes the second and compares ranks.
"""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from gdrt_ds.config import RunConfig, load_config
from gdrt_ds.errors import UserError
from gdrt_ds.training.preparation import Prepared, plan_batches, prepare
from tests.distributed.scenario_mistakes import SETTINGS as SHORT
from tests.distributed.test_train_cli import lines
from tests.dro import test_markov
from tests.forked import train_forked

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = [
    *SHORT,
    "data.windows=growing",
    "prompt.template=list",
    "groups.reference=corpus",
    "groups.num=3",
    "groups.binning=uniform",
    "dro.tau=0.5",
    "model.quantization=none",
    "train.global_batch=16",
    "train.warmup_steps=0",
    "train.eval_every=null",
    "train.save_every=null",
    "train.max_steps=3",
]


@pytest.fixture(scope="module", params=["relevance", "markov"])
def run(request, tmp_path_factory):
    """Three steps."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    done = train_forked(folder, *SETTINGS, f"dro.excess={request.param}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-4000:]
    assert ("last-item Markov chain" in done.stdout) == (request.param == "markov")
    return folder


def reference_losses(run: Path, config: RunConfig, prepared: Prepared) -> np.ndarray:
    """float64[train target tokens]: what is subtracted, from the windows themselves."""
    if config.dro.excess == "relevance":
        return -load_file(run / "groups.safetensors")["r"].astype(np.float64)
    data = prepared.data
    windows, titles = data.corpus.splits["train"], data.catalogue
    sequences = [data.encoder.target_ids(entry.text) for entry in titles.entries]
    last = np.array([titles.index_of[window.history[-1]] for window in windows])
    targets = np.array([titles.index_of[window.target] for window in windows])
    return test_markov.token_losses(
        sequences, last, targets, test_markov.computed(sequences, last, targets).strength
    )


def test_growing_rows_have_no_offsets_because_every_epoch_makes_others(run):
    found = load_file(run / "groups.safetensors")
    assert {"token_offsets", "group"} <= set(found) and "sample_offsets" not in found
    assert found["token_offsets"][-1] == len(found["group"])


@pytest.mark.parametrize("step", [0, 2])
def test_weights_follow_the_losses_above_the_reference(run, step):
    config, line = load_config(run / "config.yaml"), lines(run)[step]
    prepared = prepare(config)
    store, reference = prepared.stores["train"], reference_losses(run, config, prepared)
    group = load_file(run / "groups.safetensors")["group"]
    total, count = np.zeros(config.groups.num), np.zeros(config.groups.num)
    for sample in plan_batches(config, store, 1, "prefix_tree").samples(step):
        span = slice(store.target_offsets[sample], store.target_offsets[sample + 1])
        np.add.at(total, group[span], reference[span])
        np.add.at(count, group[span], 1)
    np.testing.assert_array_equal(count, line["group_count"])
    losses = np.array([np.nan if loss is None else loss for loss in line["group_loss"]])
    weight = np.array([value or 0.0 for value in line["group_weight"]])
    expected = weights(losses - total / np.maximum(count, 1), count, config.dro.tau)
    np.testing.assert_allclose(weight, expected, rtol=0, atol=1e-5)
    assert np.abs(weight - weights(losses, count, config.dro.tau)).max() > 0.05  # the reference matters


def test_a_masked_objective_is_compared_with_a_masked_reference(tmp_path):
    """A fresh adapter is the base model: nobody is above it, so q is the share of the tokens."""
    own = ["objective=gdrt+msl", "options.msl_temperature=2", "dro.excess=true"]
    settings = [*SETTINGS, *own, "data.windows=sliding", "train.max_steps=1"]
    done = train_forked(tmp_path / "run", *settings)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-4000:]
    step = lines(tmp_path / "run")[0]
    count = np.array(step["group_count"])
    weight = np.array([value or 0.0 for value in step["group_weight"]])
    np.testing.assert_allclose(weight, count / count.sum(), rtol=0, atol=1e-6)


def weights(losses: np.ndarray, count: np.ndarray, tau: float) -> np.ndarray:
    """float64[G]: p_g exp(L_g / tau) / Z; groups without tokens weigh nothing."""
    q = np.where(count > 0, count * np.exp(np.where(count > 0, losses, 0) / tau), 0)
    return q / q.sum()


@pytest.mark.parametrize(
    "overrides, problem",
    [
        (
            ["dro.excess=relevance", "groups.by=item_popularity"],
            "groups.by is item_popularity: set groups.by=",
        ),
        (["dro.excess=relevance", "groups.reference=live"], "needs a reference that stays"),
        (["dro.excess=markov", "data.format=sft"], "counts which item follows which"),
    ],
)
def test_what_it_needs_is_said(overrides, problem):
    with pytest.raises(UserError, match=problem):
        load_config(ROOT / "configs" / "smoke.yaml", overrides)
