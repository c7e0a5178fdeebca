"""What can be known before weights are loaded is refused before, by a run and by --plan alike."""

from __future__ import annotations

import json

import pytest

from gdrt_ds.config import load_config
from gdrt_ds.errors import UserError
from gdrt_ds.models.built_in import make_tiny_model
from gdrt_ds.planning.plan import print_plan
from gdrt_ds.runtime import single_process_runtime
from gdrt_ds.training import run
from gdrt_ds.training.preflight import BOARDS, check_settings

PLANTED = "data.planted={num_items: 8, num_popular: 2, num_train: 60, num_valid: 10, num_test: 10}"
TINY = ["model.path=tiny-random", "train.max_steps=2", "train.global_batch=4", "groups.num=4"]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A table of six users: no providers, one attribute that all share, one that a user lacks."""
    folder = tmp_path_factory.mktemp("table")
    events = [f"u{user},i{(user + turn) % 5},{turn * 10 + user}" for user in range(6) for turn in range(6)]
    (folder / "interactions.csv").write_text("user_id,item_id,timestamp\n" + "\n".join(events) + "\n")
    items = [f"i{item},Title {'abcde'[item]}" for item in range(5)]
    (folder / "items.csv").write_text("item_id,title\n" + "\n".join(items) + "\n")
    users = [
        {"user_id": f"u{user}", "country": "NL", **({"gender": "FM"[user % 2]} if user else {})}
        for user in range(6)
    ]
    (folder / "users.jsonl").write_text("".join(json.dumps(user) + "\n" for user in users))
    return folder


def refusal_before_loading(overrides: list[str], folder, monkeypatch) -> UserError:
    """The refusal of --plan. A run refuses in the same words, and neither loads the model."""
    config = load_config(None, [*TINY, f"run.dir={folder / 'run'}", *overrides])
    with pytest.raises(UserError) as planned:
        print_plan(config, 1, full=True, quiet=True)

    def loaded(*given):
        pytest.fail("the model was loaded")

    monkeypatch.setattr(run, "load", loaded)
    with pytest.raises(UserError) as started:
        run.run_training(config, single_process_runtime())
    assert started.value.problem == planned.value.problem
    return planned.value


@pytest.mark.parametrize(
    "setting",
    [
        ["dro.frozen_weights=/nope"],
        ["dro.excess=/nope"],
        ["resume=/nope"],
        ["groups.reference=auxiliary_sft", "groups.reference_adapter=/nope"],
    ],
)
def test_a_folder_that_is_not_there_is_refused_by_the_setting_that_names_it(setting, tmp_path, monkeypatch):
    told = refusal_before_loading([PLANTED, *setting], tmp_path, monkeypatch)
    assert told.problem.startswith(f"{setting[-1].partition('=')[0]} = /nope: no ")


@pytest.mark.parametrize("objective", ["gdrt", "msl"])
def test_two_titles_that_the_tokenizer_writes_alike_are_refused_with_both_names(
    objective, tmp_path, monkeypatch
):
    """One name with a composed letter and with a combining accent, under a tokenizer that composes."""
    titles = ["Am\u00e9lie", "Heat", "Ame\u0301lie", "Casino", "Re\u0301al", "R\u00e9al"]
    events = [f"u{user},i{(user + turn) % 6},{turn}" for user in range(6) for turn in range(6)]
    (tmp_path / "interactions.csv").write_text("user_id,item_id,timestamp\n" + "\n".join(events) + "\n")
    items = [f"i{item},{title}" for item, title in enumerate(titles)]
    (tmp_path / "items.csv").write_text("item_id,title\n" + "\n".join(items) + "\n", encoding="utf-8")
    tokenizer = make_tiny_model(tmp_path / "model", titles) / "tokenizer.json"
    content = json.loads(tokenizer.read_text(encoding="utf-8"))
    tokenizer.write_text(json.dumps({**content, "normalizer": {"type": "NFC"}}), encoding="utf-8")
    settings = [f"data.path={tmp_path}", f"model.path={tmp_path / 'model'}", f"objective={objective}"]
    told = refusal_before_loading(settings, tmp_path, monkeypatch).problem
    assert f"{titles[0]!r} (item i0) and {titles[2]!r} (item i2)" in told
    assert "the same tokens" in told and "pairs like this: 2" in told


@pytest.mark.parametrize(
    "settings, words",
    [
        (["groups.by=provider"], ["groups.by = provider", "no target of train has a provider"]),
        (["groups.by=user_attribute", "groups.column=country"], ["same label 'NL'", "one group"]),
        (["groups.by=user_attribute", "groups.column=gender"], ["user u0 has no such attribute"]),
        (["groups.by=user_attribute", "groups.column=age"], ["groups.column = 'age'", "no such attribute"]),
        (["groups.by=column", "groups.column=kind"], ["groups.column = 'kind'", "no such label"]),
        (["groups.num=40"], ["groups.num = 40 is more than the", "different target tokens"]),
        (["groups.num=9", "groups.reference=corpus"], ["groups.num = 9", "distinct values of r"]),
        (
            ["groups.num=30", "groups.by=item_popularity"],
            ["groups.num = 30", "distinct values of popularity"],
        ),
        (["train.global_batch=40"], ["train.global_batch = 40 is more than the", "train samples"]),
        (["dro.frozen_weights=[1, 2]"], ["has 2 weights, there are 4 groups"]),
        (["dro.frozen_weights=[1, 1, 1, 1]", "objective=sft"], ["objective = sft, which does not take them"]),
    ],
)
def test_groups_that_the_data_cannot_have_are_refused(settings, words, table, tmp_path, monkeypatch):
    given = [f"data.path={table}", "data.split_ratio=[0.6, 0.2, 0.2]", *settings]
    told = refusal_before_loading(given, tmp_path, monkeypatch)
    assert [word for word in words if word not in told.problem] == [], told.problem
    assert told.fix


def test_a_catalogue_of_one_title_is_refused(tmp_path, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    rows = "".join(f"u{user},1,{turn}\n" for user in range(4) for turn in range(8))
    (data / "interactions.csv").write_text("user_id,item_id,timestamp\n" + rows)
    (data / "items.csv").write_text("item_id,title\n1,The only one\n")
    told = refusal_before_loading([f"data.path={data}"], tmp_path, monkeypatch)
    assert "the catalogue has 1 title" in told.problem and "The only one" in told.problem


@pytest.mark.parametrize("board", ["tensorboard", "wandb"])
def test_a_board_that_is_not_installed_is_noticed_at_the_start(board, tmp_path, monkeypatch):
    config = load_config(None, [f"run.dir={tmp_path}", f"log.{board}=true"])
    monkeypatch.setitem(BOARDS, board, "no_such_package")
    with pytest.raises(UserError, match=f"log.{board} = true, but no_such_package is not installed"):
        check_settings(config)
    monkeypatch.setitem(BOARDS, board, "json")
    check_settings(config)
    (tmp_path / "left_by_a_run").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(BOARDS, board, "left_by_a_run")
    with pytest.raises(UserError, match="left_by_a_run is not installed"):
        check_settings(config)


@pytest.mark.parametrize(
    "settings, problem",
    [
        (["objective=cvar", "dro.excess=markov"], "dro.excess = markov is about .* weighs single tokens"),
        (["objective=cvar", "dro.estimate=ema"], "dro.estimate = ema is about .* weighs single tokens"),
        (["objective=gdrt+msl", "dro.excess=relevance"], "groups.reference = base: the objective's losses"),
    ],
)
def test_ways_to_measure_losses_that_the_objective_would_not_follow_are_refused(settings, problem, tmp_path):
    config = load_config(None, [PLANTED, f"run.dir={tmp_path}", *settings])
    with pytest.raises(UserError, match=problem):
        check_settings(config)


@pytest.mark.parametrize(
    "settings",
    [
        ["objective=cvar", "dro.cvar_over=groups", "dro.excess=markov", "dro.estimate=ema"],
        ["objective=gdrt+msl", "dro.excess=relevance", "groups.reference=corpus"],
    ],
)
def test_the_ways_out_of_these_refusals_are_accepted(settings, tmp_path):
    check_settings(load_config(None, [PLANTED, f"run.dir={tmp_path}", *settings]))


def test_weights_of_a_run_that_are_no_distribution_are_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"group_weight": [None, None]}) + "\n")
    config = load_config(None, [f"dro.frozen_weights={tmp_path}"])
    with pytest.raises(UserError, match="no distribution over groups"):
        check_settings(config)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1')
    with pytest.raises(UserError, match="no metrics.jsonl there with the group weights"):
        check_settings(config)


def test_fewer_labels_a_single_group_and_settings_without_effect_are_told(tmp_path, capsys):
    given = [*TINY, PLANTED, f"run.dir={tmp_path}", "groups.by=user_attribute", "groups.column=cohort"]
    print_plan(load_config(None, given), 1, full=True)
    assert "groups.num = 4, but groups.by=user_attribute has 2 labels: 2 groups" in capsys.readouterr().out
    unused = ["groups.by=position", "groups.reference_adapter=/nope"]
    print_plan(load_config(None, [*given, *unused]), 1, full=True)
    told = capsys.readouterr().out
    assert "groups.column = cohort is not used" in told
    assert "groups.reference_adapter = /nope is not used" in told
    print_plan(load_config(None, [*given, "groups.num=1"]), 1, full=True)
    assert "groups.num = 1: objective = gdrt with one group is the plain mean" in capsys.readouterr().out


def test_a_wrong_path_is_told_before_the_resolved_settings_fill_the_screen(tmp_path, capsys):
    config = load_config(None, [*TINY, f"run.dir={tmp_path / 'run'}", "data.path=/nope"])
    with pytest.raises(UserError, match="data.path=/nope: no such file or folder"):
        print_plan(config, 1, full=False)
    assert "settings" not in capsys.readouterr().out


def test_a_training_prints_the_settings_that_were_changed_and_a_plan_prints_all(tmp_path, capsys):
    config = load_config(None, [*TINY, f"run.dir={tmp_path / 'run'}", "data.path=planted", PLANTED])
    print_plan(config, 1, full=False)
    told = capsys.readouterr().out
    assert "  groups.num=4\n" in told and "dro.tau" not in told
    changed = [line.strip() for line in told.splitlines()[1:]]
    assert load_config(None, changed) == config
    print_plan(config, 1, full=True)
    assert "tau: 1.0" in capsys.readouterr().out


def test_a_second_pass_without_history_beside_a_first_one_without_is_refused(tmp_path):
    config = load_config(None, [PLANTED, f"run.dir={tmp_path}", "objective=cft", "prompt.history=mask"])
    with pytest.raises(UserError, match="so both are the same"):
        check_settings(config)
