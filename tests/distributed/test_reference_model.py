"""Reference adapters in real runs on two ZeRO-3 ranks: relevance of `groups.reference=auxiliary_sft` and
the losses that `dro.excess` subtracts are those of plain PEFT on the plain base, with LoRA on the head
too; the reference is neither trained nor saved.
"""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from gdrt_ds.config import load_config
from gdrt_ds.errors import UserError
from gdrt_ds.models.reference_adapters import adapter_digest, adapter_folder, load_reference_adapters
from gdrt_ds.training.preparation import plan_batches, prepare
from tests.distributed.launch import SMOKE, play
from tests.distributed.ranks import preload
from tests.distributed.scenario_mistakes import SETTINGS as SHORT
from tests.distributed.test_train_cli import lines

pytestmark = pytest.mark.distributed
COMMON = [
    "model.quantization=none",
    "model.train_head=true",
    "train.save_every=null",
    "train.eval_every=null",
    "train.warmup_steps=0",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(auxiliary run, run that refers to it, run with excess over the base)."""
    folder = tmp_path_factory.mktemp("references")
    patch = pytest.MonkeyPatch()
    patch.setenv(
        "GDRT_CACHE", str(folder / "cache")
    )  # a table of an earlier run would hide what this code computes
    auxiliary, both, base = (folder / name for name in ("auxiliary", "both", "base"))

    of_auxiliary = [
        "train.max_steps=2",
        "groups.reference=auxiliary_sft",
        f"groups.reference_adapter={auxiliary}",
        f"dro.excess={auxiliary}",
    ]
    preload()
    for world, run, extra in (
        (1, auxiliary, ["objective=sft", "prompt.history=mask", "train.lr=0.02"]),
        (2, both, of_auxiliary),
        (2, base, ["train.max_steps=1", "dro.excess=true"]),
    ):
        words = ["--config", SMOKE, f"run.dir={run}", *SHORT, *COMMON, *extra]
        done = play(world, words, folder / "logs" / run.name)
        assert done.statuses == [0] * world, done.text[-4000:]
    patch.undo()
    return auxiliary, both, base


@pytest.fixture(scope="module")
def plain(runs):
    """(losses of the next token for one row of ids under the auxiliary adapter, what the run prepared)."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    auxiliary, both, _ = runs
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(both / "base", dtype=torch.float32), auxiliary / "adapter"
    ).eval()
    assert any("lm_head.lora_B" in name and bool(p.any()) for name, p in model.named_parameters())

    @torch.no_grad()
    def losses(ids: np.ndarray, targets: int) -> np.ndarray:
        row = torch.from_numpy(np.asarray(ids, dtype=np.int64))
        logits = model(input_ids=row[None, :-1]).logits[0, -targets:]
        return torch.nn.functional.cross_entropy(logits.double(), row[-targets:], reduction="none").numpy()

    return losses, prepare(load_config(both / "config.yaml"))


def test_relevance_of_an_auxiliary_reference_is_that_of_plain_peft(runs, plain):
    losses, prepared = plain
    saved = load_file(runs[1] / "groups.safetensors")
    for entry in range(0, len(prepared.data.catalogue.entries), 5):
        encoded = prepared.data.encoder.encode(
            [], prepared.data.catalogue.entries[entry].text, mask_history=True
        )
        mine = saved["entry_r"][saved["entry_offsets"][entry] : saved["entry_offsets"][entry + 1]]
        np.testing.assert_allclose(mine, -losses(encoded.input_ids, encoded.num_target), rtol=0, atol=2e-5)


def test_relevance_under_the_base_is_that_of_the_plain_base(runs):
    from transformers import AutoModelForCausalLM

    run = runs[2]
    model, saved = (
        AutoModelForCausalLM.from_pretrained(run / "base", dtype=torch.float32).eval(),
        load_file(run / "groups.safetensors"),
    )
    prepared = prepare(load_config(run / "config.yaml"))
    for entry in range(1, len(prepared.data.catalogue.entries), 7):
        encoded = prepared.data.encoder.encode(
            [], prepared.data.catalogue.entries[entry].text, mask_history=True
        )
        row = torch.from_numpy(np.asarray(encoded.input_ids, dtype=np.int64))
        with torch.no_grad():
            scores = model(input_ids=row[None, :-1]).logits[0].log_softmax(-1)
        expected = scores[-encoded.num_target :].gather(1, row[-encoded.num_target :, None])[:, 0].numpy()
        np.testing.assert_allclose(
            saved["entry_r"][saved["entry_offsets"][entry] : saved["entry_offsets"][entry + 1]],
            expected,
            rtol=0,
            atol=2e-5,
        )


def test_weights_follow_losses_above_the_reference(runs, plain):
    losses, prepared = plain
    config, store, step = load_config(runs[1] / "config.yaml"), prepared.stores["train"], lines(runs[1])[0]
    groups = load_file(runs[1] / "groups.safetensors")["group"]
    total, count = np.zeros(config.groups.num), np.zeros(config.groups.num)
    for sample in plan_batches(config, store, 2, "none").samples(0):
        ids = store.input_ids[store.offsets[sample] : store.offsets[sample + 1]]
        group = groups[store.target_offsets[sample] : store.target_offsets[sample + 1]]
        np.add.at(total, group, losses(ids, int(store.num_target[sample])))
        np.add.at(count, group, 1)
    present = count > 0
    np.testing.assert_array_equal(count, np.array(step["group_count"]))
    above = (
        np.array([np.nan if v is None else v for v in step["group_loss"]])[present]
        - (total / np.maximum(count, 1))[present]
    )
    q = count[present] / count.sum() * np.exp((above - above.max()) / config.dro.tau)
    share = count[present] / count.sum()
    weight = np.array([np.nan if v is None else v for v in step["group_weight"]])[present]
    np.testing.assert_allclose(weight, q / q.sum(), rtol=0, atol=1e-5)
    assert (
        np.abs(weight - share).max() > 0.02
    )  # the reference matters: with none of it the weights would be others


def test_excess_over_the_base_is_nothing_at_the_first_step(runs):
    """A fresh adapter is the base model: nobody is above it, so q is the share of the tokens."""
    step = lines(runs[2])[0]
    count = np.array(step["group_count"])
    np.testing.assert_allclose(
        np.array(step["group_weight"], dtype=float)[count > 0],
        (count / count.sum())[count > 0],
        rtol=0,
        atol=1e-6,
    )


def test_the_reference_is_neither_trained_nor_saved(runs):
    auxiliary, both, _ = runs
    mine, theirs = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (both, auxiliary))
    assert set(mine) == set(theirs)
    assert all(not np.array_equal(mine[name], theirs[name]) for name in mine)
    started = {name: value for name, value in mine.items() if "lora_B" in name}
    assert started and all(
        0 < np.abs(value).max() < 0.02 for value in started.values()
    )  # two steps of its own from zero, lr .003
    assert not list((both / "adapter").rglob("*auxiliary*"))


def test_an_adapter_with_other_names_is_refused(runs, tmp_path):
    from peft import PeftModel
    from safetensors.numpy import save_file
    from transformers import AutoModelForCausalLM

    auxiliary, both, _ = runs
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(both / "base"), both / "adapter")
    shutil.copytree(auxiliary / "adapter", tmp_path / "renamed")
    file = tmp_path / "renamed" / "adapter_model.safetensors"
    save_file({name.replace("q_proj", "query"): value for name, value in load_file(file).items()}, file)
    config = load_config(
        both / "config.yaml", ["groups.reference=base", f"dro.excess={tmp_path / 'renamed'}"]
    )
    with pytest.raises(UserError, match="weights that this base model does not have, e.g. .*query"):
        load_reference_adapters(model, config, "")


def test_a_folder_without_an_adapter_is_named(tmp_path):
    with pytest.raises(UserError, match="dro.excess = .*no adapter_config.json"):
        adapter_folder(str(tmp_path), "dro.excess")


def test_an_adapter_that_is_a_pickle_is_refused_and_its_settings_belong_to_its_digest(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 16}')
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match="dro.excess = .*: no adapter_model.safetensors"):
        adapter_folder(str(tmp_path), "dro.excess")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    assert adapter_folder(str(tmp_path), "dro.excess") == tmp_path
    before = adapter_digest(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 32}')
    assert adapter_digest(tmp_path) != before
