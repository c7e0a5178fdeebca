"""Constrained generation: transformers' beams are the exact list; adapters give the same allowed tokens."""

from __future__ import annotations

import importlib
import re
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import gdrt_ds
from gdrt_ds.data.catalogue import Catalogue
from gdrt_ds.data.trie import TokenTrie
from gdrt_ds.errors import UserError
from gdrt_ds.files import REPOSITORY
from gdrt_ds.inference.constrained import (
    OUTSIDE,
    CatalogueConstraint,
    CatalogueLogitsProcessor,
    RequestConstraint,
    constrain_requests,
)
from gdrt_ds.inference.exporting import export
from gdrt_ds.inference.recommender import open_run
from gdrt_ds.inference.recommending import recommend
from gdrt_ds.runtime import Runtime
from tests.eval.run_folders import make_run

K = 10


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("constrained") / "run")


@pytest.fixture(scope="module")
def exported(run):
    export(run, run.parent / "model")
    return run.parent / "model"


@pytest.fixture(scope="module")
def asked(run):
    """The run, six histories and its own exact lists for them."""
    recommender = open_run(run, Runtime())
    titles = [entry.text for entry in recommender.catalogue.entries]
    histories = [titles[i : i + 1 + i % 3] for i in range(0, 18, 3)]
    return recommender, histories, recommend(recommender, histories, K)


def beams_of(exported, asked, num_beams, of_base=(), **changes):
    """Titles and scores of transformers' generate, by history; `of_base` is its generation_config."""
    recommender, histories, _ = asked
    model = AutoModelForCausalLM.from_pretrained(exported)
    model.generation_config.update(**dict(of_base))
    tokenizer = AutoTokenizer.from_pretrained(exported)
    prompts = [recommender.prompt_of_titles(titles) for titles in histories]
    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    processor = CatalogueLogitsProcessor(exported, prompt_length=width)
    out = model.generate(
        ids,
        attention_mask=mask,
        logits_processor=[processor],
        num_beams=num_beams,
        num_return_sequences=min(K, num_beams),
        output_scores=True,
        return_dict_in_generate=True,
        pad_token_id=pad,
        **(processor.settings | changes),
    )
    entries = Catalogue.load(exported / "catalogue.jsonl").entries
    found = [processor.constraint.entry_of(row[width:].tolist()) for row in out.sequences]
    titles = [None if entry is None else entries[entry].text for entry in found]
    each = min(K, num_beams)
    scores = getattr(out, "sequences_scores", None)
    lists = [titles[i : i + each] for i in range(0, len(titles), each)]
    return lists, None if scores is None else scores.view(-1, each)


def test_with_as_many_beams_as_titles_generate_gives_the_exact_list(exported, asked):
    _, histories, exact = asked
    lists, scores = beams_of(exported, asked, num_beams=24)
    for found, values, rows in zip(lists, scores, exact, strict=True):
        assert found == [row["title"] for row in rows]
        assert torch.allclose(values, torch.tensor([row["log_prob"] for row in rows]), atol=1e-4)
    assert len(lists) == len(histories)


@pytest.mark.parametrize("num_beams", [1, 3, 10])
def test_few_beams_give_titles_only_and_no_score_above_the_exact_one(exported, asked, num_beams):
    recommender, _, _ = asked
    lists, scores = beams_of(exported, asked, num_beams)
    known = {entry.text for entry in recommender.catalogue.entries}
    whole = recommend(recommender, asked[1], 24)
    for i, found in enumerate(lists):
        assert set(found) <= known and len(set(found)) == len(found)
        if scores is not None:
            exact = {row["title"]: row["log_prob"] for row in whole[i]}
            assert torch.allclose(scores[i], torch.tensor([exact[title] for title in found]), atol=1e-4)


def test_scores_are_log_probabilities_whatever_the_generation_config_of_the_base_asks_for(exported, asked):
    """Penalties, forbidden tokens and biases of a base would change what its adapter was trained for."""
    recommender, _, exact = asked
    of_base = {
        "repetition_penalty": 1.7,
        "no_repeat_ngram_size": 2,
        "min_new_tokens": 3,
        "min_length": 200,
        "suppress_tokens": recommender.trie.token[1:9].tolist(),
        "begin_suppress_tokens": recommender.trie.token[1:3].tolist(),
        "bad_words_ids": [[int(recommender.trie.token[1])]],
        "sequence_bias": [[[int(recommender.trie.token[1])], -5.0]],
        "exponential_decay_length_penalty": (2, 1.5),
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.5,
    }
    lists, scores = beams_of(exported, asked, num_beams=24, of_base=of_base)
    for found, values, rows in zip(lists, scores, exact, strict=True):
        assert found == [row["title"] for row in rows]
        assert torch.allclose(values, torch.tensor([row["log_prob"] for row in rows]), atol=1e-4)


def test_the_page_asks_with_the_prompts_of_the_evaluation(exported, asked, monkeypatch):
    recommender, histories, _ = asked
    titles = [entry.text for entry in recommender.catalogue.entries]
    histories = [*histories, titles[:14]]  # longer than data.history_length
    page = (REPOSITORY / "docs" / "serving.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(exported.parent)
    names = {"histories": histories}
    exec(code.replace('"MODEL"', repr(exported.name)), names)
    rows = zip(names["inputs"].input_ids, names["inputs"].attention_mask, strict=True)
    found = [ids[mask.bool()].tolist() for ids, mask in rows]
    assert found == [recommender.prompt_of_titles(titles) for titles in histories]
    assert names["entry"] is not None and names["found"].shape[0] == 10 * len(histories)


def test_samples_are_titles(exported, asked):
    torch.manual_seed(0)
    lists, _ = beams_of(exported, asked, 1, do_sample=True, early_stopping=False)
    assert all(title is not None for titles in lists for title in titles)


def sequences():
    """Five titles with common beginnings; 9 ends them."""
    return [[1, 2, 9], [1, 3, 4, 9], [1, 3, 5, 9], [2, 9], [6, 6, 6, 9]]


def plain_allowed(generated):
    """The same without a trie: what any title goes on with behind these tokens."""
    for sequence in sequences():
        if generated[: len(sequence)] == sequence:
            return {9}
    n = len(generated)
    return {s[n] for s in sequences() if s[:n] == generated and len(s) > n} or {9}


CASES = [[], [1], [1, 3], [1, 3, 4], [2], [2, 9], [2, 9, 9, 0], [7], [6, 6, 7], [1, 2, 9, 1], [-3]]


def test_every_adapter_allows_what_a_plain_search_of_the_titles_allows(exported, monkeypatch):
    constraint = CatalogueConstraint(TokenTrie.build(sequences()))
    assert (constraint.end_token, constraint.max_tokens) == (9, 4)
    logits = torch.randn(len(CASES), 12)
    expected = torch.full_like(logits, -torch.inf)
    for row, case in enumerate(CASES):
        for token in plain_allowed(case):
            expected[row, token] = logits[row, token]
    before = logits.clone()
    assert torch.equal(constraint.constrain(CASES, logits), expected)
    assert torch.equal(logits, before)
    for row, case in enumerate(CASES):
        assert torch.equal(RequestConstraint(constraint)(case, logits[row]), expected[row])
        ids = torch.tensor([[8, 8, *case]], dtype=torch.long)
        processor = CatalogueLogitsProcessor(constraint, prompt_length=2)
        assert torch.equal(processor(ids, logits[row][None])[0], expected[row])


def test_a_batch_of_requests_is_constrained_row_by_row_and_others_are_left_alone(exported):
    constraint = CatalogueConstraint.load(exported)
    logits = torch.randn(3, 400)
    first = [int(token) for token in constraint.allowed(0)][:1]
    requests = [
        {"catalogue": str(exported), "__req__": SimpleNamespace(output_ids=[])},
        None,
        {"catalogue": str(exported), "__req__": SimpleNamespace(output_ids=first)},
    ]
    expected = constraint.constrain([[], [], first], logits)
    expected[1] = logits[1]
    assert torch.equal(constrain_requests(logits.clone(), requests), expected)


@pytest.fixture
def vllm_processor(monkeypatch):
    """Our module for vLLM, which is not installed: only the class that it derives from stands in."""
    interface = ModuleType("vllm.v1.sample.logits_processor")
    interface.AdapterLogitsProcessor = object
    for name in ("vllm", "vllm.v1", "vllm.v1.sample"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    monkeypatch.delitem(sys.modules, "gdrt_ds.inference.vllm_processor", raising=False)
    yield importlib.import_module("gdrt_ds.inference.vllm_processor").CatalogueProcessor
    sys.modules.pop("gdrt_ds.inference.vllm_processor", None)


@pytest.mark.parametrize(
    "extra_args, wanted",
    [(None, False), ({}, False), ({"catalogue": True}, True), ({"catalogue": 1}, True)]
    + [({"catalogue": value}, False) for value in (False, 0)]
    + [({"catalogue": value}, None) for value in ("true", 2, -1, None, [1], float("nan"))],
)
def test_a_request_to_vllm_says_true_or_1_and_everything_else_is_refused(vllm_processor, extra_args, wanted):
    params = SimpleNamespace(extra_args=extra_args)
    if wanted is None:
        with pytest.raises(ValueError, match="extra argument catalogue = .*: give true or false"):
            vllm_processor.validate_params(params)
        return
    vllm_processor.validate_params(params)
    processor = vllm_processor.__new__(vllm_processor)  # the engine's own settings are not needed here
    processor.constraint = CatalogueConstraint(TokenTrie.build(sequences()))
    made = processor.new_req_logits_processor(params)
    assert isinstance(made, RequestConstraint) is wanted


def test_entries_are_found_and_what_is_no_title_is_none():
    constraint = CatalogueConstraint(TokenTrie.build(sequences()))
    assert [constraint.entry_of(s) for s in sequences()] == [0, 1, 2, 3, 4]
    assert constraint.entry_of([1, 3, 4, 9, 0, 0]) == 1
    assert constraint.entry_of([1, 3]) is None and constraint.entry_of([7]) is None
    assert constraint.nodes_after(np.array([[7, 9]])).tolist() == [OUTSIDE]


def test_wrong_tries_are_refused_with_words():
    with pytest.raises(UserError, match="end with 2 different tokens"):
        CatalogueConstraint(TokenTrie.build([[1, 2], [1, 3]]))
    constraint = CatalogueConstraint(TokenTrie.build(sequences()))
    with pytest.raises(UserError, match="has token 9, the logits have 5 tokens"):
        constraint.constrain([[]], torch.zeros(1, 5))


def test_it_is_a_public_name():
    assert gdrt_ds.CatalogueLogitsProcessor is CatalogueLogitsProcessor
