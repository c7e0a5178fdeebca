"""Rows of prompt and completion: what is read, what is refused with words, and which tokens come out."""

from __future__ import annotations

import json

import numpy as np
import pytest

from gdrt_ds.config import load_config
from gdrt_ds.data.prompts import TARGET
from gdrt_ds.data.row_prompts import OUTSIDE, RowEncoder
from gdrt_ds.data.sources import read_source
from gdrt_ds.data.supervised import SupervisedSource
from gdrt_ds.dro.relevance import corpus_scores
from gdrt_ds.errors import UserError
from gdrt_ds.models.built_in import _word_tokenizer
from tests.data.sft_files import rows, write_lines, write_splits

CHAT = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def config_of(path, *overrides):
    return load_config(None, [f"data.path={path}", "data.format=sft", "groups.by=label", *overrides])


def read(path, *overrides):
    return read_source(config_of(path, *overrides)).rows


def encoded(path, *overrides, chat=False):
    config = config_of(path, *overrides)
    source = SupervisedSource.read(config)
    tokenizer = _word_tokenizer(source.texts(config), 2000)
    if chat:
        tokenizer.chat_template = CHAT
    return source.encode(config, tokenizer), config


def refusal(path, *overrides) -> str:
    with pytest.raises(UserError) as caught:
        read(path, *overrides)
    return str(caught.value)


# -- what is read
def test_files_named_after_the_splits_are_the_splits(tmp_path):
    found = read(write_splits(tmp_path, (5, 3, 2)))
    assert {name: len(rows) for name, rows in found.splits.items()} == {"train": 5, "valid": 3, "test": 2}
    first = found.splits["train"][0]
    assert first.prompt.startswith("Report 0 from") and first.labels["kind"] in ("shortcut", "conflict")
    assert first.choices[first.answer] == first.completion


def test_rows_are_recognised_without_being_named(tmp_path):
    config = load_config(None, [f"data.path={write_splits(tmp_path, (5, 3, 2))}"])
    assert isinstance(read_source(config), SupervisedSource)


def test_a_column_of_splits_decides_and_without_one_shares_are_seeded_and_noted(tmp_path):
    given = rows(40)
    for place, row in enumerate(given):
        row["split"] = ("train", "validation", "test")[place % 3]
    found = read(write_lines(tmp_path / "a.jsonl", given))
    assert [len(found.splits[name]) for name in ("train", "valid", "test")] == [14, 13, 13]
    path = write_lines(tmp_path / "b.jsonl", rows(40))
    first, again, other = read(path), read(path), read(path, "data.sample_seed=1")
    assert [len(first.splits[name]) for name in ("train", "valid", "test")] == [32, 4, 4]
    assert first == again and first.splits["test"] != other.splits["test"]
    assert any("seeded shares of 40 rows" in note for note in first.notes)


def test_rows_of_one_user_stay_in_one_split(tmp_path):
    given = [{**row, "user": f"u{place % 10}"} for place, row in enumerate(rows(60))]
    found = read(write_lines(tmp_path / "rows.jsonl", given)).splits
    users = [{row.user_id for row in found[name]} for name in ("train", "valid", "test")]
    assert [len(of_split) for of_split in users] == [8, 1, 1] and len(set.union(*users)) == 10


def pairs_of(found, name):
    return [(row.prompt, row.completion) for row in found.splits[name]]


def told_as_trained_on(found):
    return [note for note in found.notes if "are trained on" in note]


def test_equal_rows_stay_in_one_split_and_others_are_dealt_as_without_them(tmp_path):
    given = [{"prompt": f"p{n}", "completion": f"c{n}"} for n in range(40)]
    single = read(write_lines(tmp_path / "single.jsonl", given))
    twice = read(write_lines(tmp_path / "twice.jsonl", given * 2))
    for name in ("train", "valid", "test"):
        assert sorted(pairs_of(twice, name)) == sorted(pairs_of(single, name) * 2)
    assert not told_as_trained_on(twice)
    assert [row.prompt for row in single.splits["test"]] == ["p6", "p13", "p23", "p29"]


def test_held_out_rows_that_train_holds_too_are_told(tmp_path):
    given = [{"prompt": f"p{n}", "completion": f"c{n}"} for n in range(9)]
    for split, rows_of_split in (("train", given[:6]), ("valid", given[5:7]), ("test", given[4:9])):
        write_lines(tmp_path / f"{split}.jsonl", rows_of_split)
    told = told_as_trained_on(read(tmp_path))
    assert [note.split(" rows")[0] for note in told] == ["valid: 1 of 2", "test: 2 of 5"]
    by_user = [{**row, "user": f"u{n}"} for n in range(20) for row in given]
    assert len(told_as_trained_on(read(write_lines(tmp_path / "users.jsonl", by_user)))) == 2


@pytest.mark.parametrize("empty", ["", " ", None, float("nan")])
def test_a_row_whose_user_is_empty_is_a_user_of_its_own(tmp_path, empty):
    given = [{**row, "user": empty if place % 2 else "u"} for place, row in enumerate(rows(40))]
    found = read(write_lines(tmp_path / "rows.jsonl", given)).splits
    assert len({row.user_id for name in found for row in found[name]}) == 21


@pytest.mark.parametrize("suffix", ["parquet", "csv", "arrow"])
def test_tables_are_read_by_the_library_datasets_and_equal_the_lines(tmp_path, suffix, monkeypatch):
    import datasets

    monkeypatch.setenv("GDRT_CACHE", str(tmp_path / "cache"))
    given = [{"prompt": f"What is {n:03d}?", "completion": f"{n:03d}", "kind": "NA"} for n in range(20)]
    lines = read(write_lines(tmp_path / "rows.jsonl", given))
    table = datasets.Dataset.from_list(given)
    path = tmp_path / f"rows.{suffix}"
    if suffix == "arrow":
        table.save_to_disk(str(tmp_path / "saved"))
        path = next((tmp_path / "saved").glob("*.arrow"))
    else:
        getattr(table, f"to_{suffix}")(str(path))
    assert read(path).splits == lines.splits


def test_a_csv_row_with_too_many_fields_is_named_or_counted(tmp_path):
    lines = [f"p{n},c{n}" for n in range(30)]
    path = tmp_path / "rows.csv"
    path.write_text("\n".join(["prompt,completion", *lines[:9], "p,c,more", *lines[9:]]))
    assert "rows.csv, line 11, field `(row)`: 3 fields where the header has 2" in refusal(path)
    found = read(path, "data.on_bad_row=skip")
    assert sum(map(len, found.splits.values())) == 30
    assert any("wrong number of fields: 1 (first: rows.csv, line 11" in note for note in found.notes)
    path.write_text("\n".join(["prompt,completion", *(f"id{n},{line}" for n, line in enumerate(lines))]))
    assert "rows.csv, line 2, field `(row)`: 3 fields where the header has 2" in refusal(path)


def test_a_csv_header_with_a_name_twice_is_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion,prompt\na,b,c\n")
    assert "rows.csv: `prompt` stands twice in the header" in refusal(path)


def test_a_renamed_column_that_no_row_has_is_told(tmp_path):
    notes = read(write_splits(tmp_path, (5, 3, 2)), "data.columns={user: reader, prompt: prompt}").notes
    assert "data.columns.user=reader: no row has a value of it" in notes
    assert not any("data.columns.prompt" in note for note in notes)


# -- what is refused
GOOD = {"prompt": "a", "completion": "b"}
HALF = "A \ud83d"
TURNS = [{"role": "user", "content": HALF}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("bad", "field", "problem"),
    [
        ({"prompt": "a"}, "completion", "it is missing or empty"),
        ({"prompt": 3, "completion": "b"}, "prompt", "3; a text is expected"),
        ({**GOOD, "group": [{"start": 0, "end": 9, "label": "x"}]}, "group", "outside the completion of 1"),
        ({**GOOD, "group": [{"start": 0, "label": "x"}]}, "group", "is no span"),
        ({**GOOD, "group": {"x": 1}}, "group", "a label or a list of spans is expected"),
        ({**GOOD, "choices": ["c", "d"]}, "choices", "the completion is none of them"),
        ({**GOOD, "choices": ["b"]}, "choices", "at least two texts"),
        ({**GOOD, "choices": ["b", "c"], "answer": 2}, "answer", "an index of the 2 choices"),
        ({**GOOD, "choices": ["b", "c"], "answer": 1}, "answer", "another choice than the completion"),
        ({**GOOD, "split": "holdout"}, "split", "one of train, valid, test"),
        ({"messages": [{"role": "user", "content": "a"}]}, "messages", "its last turn must be the assistant"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages", "turn 1 has the role 'robot'"),
        ([1, 2], "(row)", "a JSON object is expected"),
        ({**GOOD, "prompt": HALF}, "prompt", "holds half of a character"),
        ({**GOOD, "completion": HALF}, "completion", "holds half of a character"),
        ({**GOOD, "auxiliary_prompt": HALF}, "auxiliary_prompt", "holds half of a character"),
        ({**GOOD, "choices": ["b", HALF]}, "choices", "holds half of a character"),
        ({**GOOD, "group": HALF}, "group", "holds half of a character"),
        ({"messages": TURNS}, "messages", "holds half of a character"),
        ({"messages": TURNS[::-1] + TURNS[1:]}, "messages", "holds half of a character"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_field_or_left_out_and_counted(tmp_path, bad, field, problem):
    path = write_lines(tmp_path / "train.jsonl", [*rows(8), bad, *rows(8, 1)])
    text = refusal(path)
    assert f"train.jsonl, line 9, field `{field}`: " in text and problem in text
    found = read(path, "data.on_bad_row=skip")
    assert sum(map(len, found.splits.values())) == 16
    assert any("rows left out" in note and ": 1 (first: train.jsonl, line 9" in note for note in found.notes)


def test_a_torn_last_line_is_named(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", rows(10))
    path.write_text(path.read_text()[:-30])
    assert "rows.jsonl, line 10, field `(row)`: not valid JSON" in refusal(path)


def test_a_mutilated_parquet_file_is_a_clear_error(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setenv("GDRT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_list([GOOD] * 50).to_parquet(str(path))
    path.write_bytes(path.read_bytes()[:-20])
    text = refusal(path)
    assert f"{path}: cannot be read: " in text and "check that the file is complete" in text


def test_a_hub_name_without_network_is_a_clear_error():
    text = refusal("nobody/nothing-like-this")
    assert "data.path=nobody/nothing-like-this: no such file or folder, and the hub does not give it" in text
    assert "no such file or folder" in refusal("not a name")


def test_every_name_of_the_valid_file_is_read(tmp_path):
    write_splits(tmp_path, (4, 4, 4))
    for name in ("val", "validation", "dev"):
        path = (tmp_path / "valid.jsonl").rename(tmp_path / f"{name}.jsonl")
        assert len(read(tmp_path).splits["valid"]) == 4
        path.rename(tmp_path / "valid.jsonl")


def test_two_files_of_one_split_and_a_folder_without_train_are_refused(tmp_path):
    write_splits(tmp_path, (4, 4, 4))
    write_lines(tmp_path / "dev.jsonl", rows(4))
    assert "dev.jsonl and valid.jsonl are both the valid split" in refusal(tmp_path)
    assert "no file named train" in refusal(write_lines(tmp_path / "x" / "test.jsonl", rows(4)).parent)


def test_commands_that_need_a_catalogue_say_so(tmp_path):
    from gdrt_ds.data.corpus import load_corpus

    with pytest.raises(UserError, match="holds prompts and completions, and this needs interactions"):
        load_corpus(config_of(write_splits(tmp_path, (4, 2, 2))).data)


# -- tokens
def test_a_row_is_its_prompt_then_its_completion_and_the_end_of_text(tmp_path):
    data, config = encoded(write_splits(tmp_path, (8, 4, 4)))
    tokenizer = data.encoder.tokenizer
    row, ids = data.rows["train"][3], data.stores["train"].row(3)
    assert tokenizer.decode(ids) == f"{row.prompt}{row.completion}</s>"
    segments = data.stores["train"].segments
    start, stop = data.stores["train"].offsets[3:5]
    target = ids[segments[start:stop] == TARGET]
    assert tokenizer.decode(target) == f"{row.completion}</s>"
    assert data.prefix_length == len(tokenizer("Report", add_special_tokens=False).input_ids)


def test_a_token_has_the_label_of_its_span_and_the_end_of_text_is_outside(tmp_path):
    data, config = encoded(write_splits(tmp_path, (8, 4, 4)))
    found = data.group_values(config.groups, "train")
    labels = found.facts(np.array(found.values, dtype=object), data.stores["train"])
    assert len(labels) == data.stores["train"].target_offsets[-1]
    own = labels[: data.stores["train"].num_target[0]].tolist()
    texts = [data.encoder.tokenizer.decode([i]) for i in data.stores["train"].row(0)[-len(own) :]]
    assert own == ["answer" if t.strip() in ("yes", "no") else "reason" for t in texts[:-1]] + [OUTSIDE]


def test_relevance_is_scored_once_for_each_pair_of_auxiliary_prompt_and_completion(tmp_path):
    data, _ = encoded(write_splits(tmp_path, (96, 16, 40)))
    auxiliary = data.auxiliary()
    assert len(auxiliary.store) == 4 and auxiliary.train_counts().sum() == 96
    values = np.arange(auxiliary.store.target_offsets[-1])
    per_token = auxiliary.per_token(values, "valid", data.stores["valid"])
    entry = auxiliary.entry_of["valid"][5]
    assert np.array_equal(
        auxiliary.store.input_ids[auxiliary.store.offsets[entry + 1] - 1], data.stores["valid"].row(5)[-1]
    )
    start, stop = data.stores["valid"].target_offsets[5:7]
    first = auxiliary.store.target_offsets[entry]
    assert per_token[start:stop].tolist() == list(range(first, first + stop - start))


def test_a_prompt_that_is_too_long_loses_its_beginning_and_the_cut_is_noted(tmp_path):
    whole, _ = encoded(write_splits(tmp_path, (8, 4, 4)))
    longest = int(whole.stores["train"].lengths.max())
    cut, _ = encoded(tmp_path, f"prompt.max_length={longest - 2}")
    assert cut.stores["train"].lengths.max() == longest - 2
    assert np.array_equal(cut.stores["train"].row(0)[-5:], whole.stores["train"].row(0)[-5:])
    assert any(f"exceed prompt.max_length={longest - 2}" in note for note in cut.notes)
    long = [{"prompt": "a", "completion": "b " * 40 + str(n)} for n in range(8)]
    path = write_lines(tmp_path / "long.jsonl", long)
    with pytest.raises(UserError, match="prompt.max_length=16: a completion has"):
        encoded(path, "prompt.max_length=16")


def test_messages_are_rendered_by_the_chat_template_and_the_last_turn_is_the_target(tmp_path):
    turns = [("system", "be brief"), ("user", "</s> two?"), ("assistant", "2"), ("user", "three?")]
    given = [
        {"messages": [{"role": r, "content": c} for r, c in [*turns, ("assistant", f"{n}")]]}
        for n in range(9)
    ]
    for row in given:
        row["auxiliary_prompt"] = "a number?"
    data, config = encoded(write_lines(tmp_path / "rows.jsonl", given), chat=True)
    tokenizer, row = data.encoder.tokenizer, data.rows["train"][0]
    text = "<s>" + "".join(f"<{r}>{c}</s>" for r, c in turns) + f"<assistant>{row.completion}</s>"
    assert tokenizer.decode(data.stores["train"].row(0)) == text
    # The user's own "</s>" is ordinary text, not the end of a text.
    assert (data.stores["train"].row(0) == tokenizer.eos_token_id).sum() == len(turns) + 1
    start, stop = data.auxiliary().store.offsets[:2]
    assert "<user>a number?</s><assistant>" in tokenizer.decode(data.auxiliary().store.input_ids[start:stop])
    data.save(tmp_path)
    saved = json.loads((tmp_path / "prompt.json").read_text())
    assert saved["style"] == "rows" and list(saved["pieces"]) == ["system,user,assistant,user"]


def test_messages_without_a_chat_template_and_template_files_are_refused(tmp_path):
    given = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": str(n)}]}
        for n in range(9)
    ]
    path = write_lines(tmp_path / "rows.jsonl", given)
    with pytest.raises(UserError, match="the tokenizer has no chat template"):
        encoded(path)
    with pytest.raises(UserError, match="a template file is about histories of items"):
        RowEncoder(config_of(path, "prompt.template=x.json").prompt, _word_tokenizer(["a"], 300))


def test_controls_take_the_auxiliary_prompt_or_another_row_s_prompt(tmp_path):
    plain, _ = encoded(write_splits(tmp_path, (24, 4, 4)))
    masked, _ = encoded(tmp_path, "prompt.history=mask")
    shuffled, _ = encoded(tmp_path, "prompt.history=shuffle")
    assert masked.stores["train"].fingerprint == plain.without_evidence().fingerprint
    assert masked.stores["valid"].fingerprint == plain.stores["valid"].fingerprint
    assert shuffled.stores["train"].fingerprint != plain.stores["train"].fingerprint
    assert (shuffled.stores["train"].num_target == plain.stores["train"].num_target).all()


def test_completions_of_valid_and_test_do_not_change_the_relevance_that_is_counted_on_train(tmp_path):
    def counted(folder, others) -> np.ndarray:
        given = {"train": rows(12), "valid": others[:3], "test": others[3:]}
        for split, lines in given.items():
            write_lines(folder / f"{split}.jsonl", lines)
        data, _ = encoded(folder)
        auxiliary = data.auxiliary()
        r = corpus_scores(auxiliary.store, auxiliary.train_counts(), auxiliary.known())
        return auxiliary.per_token(r, "train", data.stores["train"])

    usual = rows(6, seed=1)
    new = [
        {**row, "completion": f" yes, {place}", "group": None, "choices": None}
        for place, row in enumerate(usual)
    ]
    assert np.array_equal(counted(tmp_path / "a", usual), counted(tmp_path / "b", new))
