"""A run config is checked before anything is loaded.

Unknown keys get the nearest name, values their range, and the dump reloads.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
import yaml

import gdrt_ds
from gdrt_ds.config import RunConfig, dump_config, known_keys, load_config
from gdrt_ds.errors import UserError


@pytest.mark.parametrize(
    "override,nearest",
    [
        ("dro.tua=1", "dro.tau"),
        ("train.maxsteps=3", "train.max_steps"),
        ("tau=1", "dro.tau"),
        ("model.lora.rank=4", None),
        ("objektive=sft", "objective"),
        ("groups.number=4", "groups.num"),
    ],
)
def test_an_unknown_key_is_an_error_with_the_nearest_name(override, nearest):
    with pytest.raises(UserError, match="unknown key") as caught:
        load_config(None, [override])
    assert override.split("=")[0] in caught.value.problem
    if nearest:
        assert f"did you mean `{nearest}`" in caught.value.problem


@pytest.mark.parametrize(
    "override",
    [
        "dro.tau=0",
        "dro.tau=-1",
        "dro.tau=abc",
        "groups.num=0",
        "dro.alpha=0",
        "dro.alpha=1.5",
        "train.global_batch=0",
        "train.lr=0",
        "model.lora.dropout=1",
        "dro.estimate=late",
        "train.epochs=many",
        "dro.ema_rate=0",
        "prompt.max_length=3",
        "train.seed=1.5",
        "model.quantization=int8",
        "dro.tau=nan",
    ],
)
def test_a_value_out_of_range_names_key_and_value(override):
    key, value = override.split("=")
    with pytest.raises(UserError) as caught:
        load_config(None, [override])
    assert key in caught.value.problem and value[:2] in caught.value.problem and caught.value.fix


def test_all_mistakes_of_a_file_are_told_at_once(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("dro: {tau: 0}\ntrain: {lr: fast}\n")
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert (
        "dro.tau" in caught.value.problem
        and "train.lr" in caught.value.problem
        and str(path) in caught.value.problem
    )


def test_files_that_are_missing_broken_or_no_mapping_are_told_apart(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "a.yaml").write_text("dro: [")
    with pytest.raises(UserError, match="not valid YAML"):
        load_config(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match="expected a mapping"):
        load_config(tmp_path / "b.yaml")
    with pytest.raises(UserError, match="not of the form"):
        load_config(None, ["dro.tau"])
    with pytest.raises(UserError, match="is a value, not a section"):
        load_config(None, ["objective.tau=1", "objective=sft"][::-1])


@pytest.mark.parametrize(
    "text, problem",
    [
        (
            b"train: {lr: 0.1}\ndro: {}\ntrain: {max_steps: 2}\n",
            "`train` stands twice, in lines 1 and 3",
        ),
        (b"train:\n  lr: 0.1\n  lr: 0.2\n", "`lr` stands twice, in lines 2 and 3"),
        ("# größe\n".encode("latin-1"), "it is not UTF-8"),
        ("train: {lr: 0.1}".encode("utf-16"), "it is not UTF-8"),
        (b"train.lr: 0.1\n", "`train.lr` with a dot; in a file write `lr` beneath `train:`"),
    ],
)
def test_files_that_say_something_else_than_they_seem_to_are_refused(tmp_path, text, problem):
    (tmp_path / "a.yaml").write_bytes(text)
    with pytest.raises(UserError, match=problem):
        load_config(tmp_path / "a.yaml")


def test_a_byte_order_mark_and_merged_settings_are_read(tmp_path):
    text = "\ufefftrain: &short {max_steps: 2, lr: 0.1}\n"
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    assert load_config(tmp_path / "a.yaml").train.max_steps == 2
    (tmp_path / "b.yaml").write_text("model: {lora: &l {r: 4}}\ntrain: {lr: 0.1}\n")
    assert load_config(tmp_path / "b.yaml").model.lora.r == 4


def test_yaml_never_makes_objects(tmp_path):
    path = tmp_path / "evil.yaml"
    path.write_text("objective: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(UserError, match="not valid YAML"):
        load_config(path)


def test_combinations_that_need_another_key_are_refused():
    for overrides, word in (
        (["groups.by=column"], "groups.column"),
        (["groups.by=user_attribute"], "groups.column"),
        (["groups.reference=auxiliary_sft"], "reference_adapter"),
    ):
        with pytest.raises(UserError, match=word):
            load_config(None, overrides)


def test_overrides_are_typed_like_yaml_and_exponents_are_numbers():
    config = load_config(
        None,
        [
            "train.lr=1e-3",
            "dro.tau=.inf",
            "groups.num=3",
            "train.max_steps=",
            "dro.frozen_weights=[0.5, 0.5]",
            "model.lora.targets=[q_proj]",
        ],
    )
    assert (
        config.train.lr == 1e-3
        and config.dro.tau == float("inf")
        and config.groups.num == 3
        and config.train.max_steps is None
    )
    assert config.dro.frozen_weights == [0.5, 0.5] and config.model.lora.targets == ["q_proj"]


def test_the_resolved_config_reloads_to_itself_and_names_every_key(tmp_path):
    config = load_config(None, ["dro.tau=0.25", "objective=cvar", "train.betas=[0.8, 0.9]"])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config
    tree = yaml.safe_load(dump_config(config))
    for key in known_keys():
        node = tree
        for part in key.split("."):
            assert part in node, key
            node = node[part]


@pytest.mark.parametrize(
    "path", sorted((Path(gdrt_ds.__file__).parent.parent / "configs").glob("*.yaml")), ids=lambda p: p.name
)
def test_every_shipped_config_is_valid(path):
    assert isinstance(load_config(path), RunConfig)


def test_no_module_shadows_an_installed_package():
    """`deepspeed gdrt_ds/train.py` puts gdrt_ds/ first on sys.path.

    `gdrt_ds/datasets.py` would hide the package datasets.
    """
    import sys

    mine = {
        p.stem
        for p in Path(gdrt_ds.__file__).parent.iterdir()
        if p.suffix == ".py" or (p.is_dir() and p.name != "__pycache__")
    } - {"__init__"}
    installed = {
        name
        for name, owners in importlib.metadata.packages_distributions().items()
        if "gdrt-ds" not in owners or len(owners) > 1
    }
    assert {"torch", "datasets", "peft"} <= installed and len(mine) > 10
    assert not mine & installed, sorted(mine & installed)
    assert not mine & set(sys.stdlib_module_names), sorted(mine & set(sys.stdlib_module_names))
