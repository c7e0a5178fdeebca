"""A chat template that writes the date: a resumed run takes the words with which it began."""

from __future__ import annotations

import pytest

from gdrt_ds.data import kept_prompt
from gdrt_ds.training.preparation import prepare
from tests.data.sft_files import write_splits
from tests.data.test_growing import settings, table
from tests.models.family_models import make_family

CLOCK = "{% if strftime_now is defined %}{{ strftime_now('%f') }} {% endif %}"  # another text at every call
TURNS = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(params=["windows", "rows"])
def begun(request, tmp_path):
    """(settings of a run whose prompt.json is written, its train fingerprint)."""
    model = make_family("llama", tmp_path / "model")
    (model / "chat_template.jinja").write_text(CLOCK + TURNS)
    shared = [f"model.path={model}", "prompt.template=chat", f"run.dir={tmp_path / 'run'}"]
    if request.param == "windows":
        config = settings(table(tmp_path / "log", num_users=8), tmp_path, *shared)
    else:
        rows = write_splits(tmp_path / "rows", (8, 4, 4))
        config = settings(rows, tmp_path, *shared, "data.format=sft", "data.windows=sliding")
    (tmp_path / "run").mkdir()
    first = prepare(config)
    first.data.save(tmp_path / "run")
    return config, first.stores["train"].fingerprint


def test_a_resumed_run_has_the_prompt_with_which_it_began(begun, tmp_path):
    config, fingerprint = begun
    (tmp_path / "run" / "checkpoints" / "step_4").mkdir(parents=True)
    assert prepare(config).stores["train"].fingerprint != fingerprint, "the template writes no date"
    for resume in ("auto", str(tmp_path / "run" / "checkpoints" / "step_4")):
        again = prepare(config.model_copy(update={"resume": resume}))
        assert again.stores["train"].fingerprint == fingerprint
        assert kept_prompt.NOTE in again.notes


def test_other_words_of_the_settings_are_not_replaced_by_kept_ones(begun):
    config, _ = begun
    if config.data.format == "sft":
        changed = config.prompt.model_copy(update={"template": "plain"})
    else:
        changed = config.prompt.model_copy(update={"domain": "poem"})
    data = prepare(config.model_copy(update={"resume": "auto", "prompt": changed}))
    assert kept_prompt.NOTE not in data.notes


def test_a_template_that_changed_elsewhere_is_not_replaced(begun, tmp_path):
    config, _ = begun
    (template,) = (tmp_path / "model").rglob("chat_template.jinja")
    template.write_text(CLOCK + TURNS.replace("<assistant>", "<bot>"))
    data = prepare(config.model_copy(update={"resume": "auto"})).data
    data.save(tmp_path)
    assert kept_prompt.NOTE not in data.notes and "<bot>" in (tmp_path / "prompt.json").read_text()


def test_a_template_without_a_date_is_rendered_anew(tmp_path):
    model = make_family("llama", tmp_path / "model")
    (model / "chat_template.jinja").write_text(TURNS)
    words = [f"model.path={model}", "prompt.template=chat", "resume=auto"]
    config = settings(table(tmp_path / "log", num_users=8), tmp_path, *words)
    assert kept_prompt.NOTE not in prepare(config).notes
