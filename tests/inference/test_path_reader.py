"""Models that follow no mask are scored item by item: equal to plain forward passes, in every mode."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from eval.audit.target_loss import token_losses
from eval.scoring import BestFirst, beam_search, path_scores, per_item_scores, top_entries
from gdrt_ds.errors import UserError
from gdrt_ds.inference.catalogue_scoring import CatalogueScorer
from gdrt_ds.inference.path_reader import PathReader, longest_paths, make_reader
from gdrt_ds.inference.prompt_reader import PromptReader
from gdrt_ds.models.scoring_choice import check_evaluable, scoring_line, tree_obstacle
from gdrt_ds.models.skeleton import skeleton
from tests.eval.scoring_models import VOCABULARY, catalogue_tokens, head_and_prompts, trie_of
from tests.models.family_models import FAMILIES, family_config, spread_weights

START, PROMPTS = head_and_prompts()
TRIE = trie_of(catalogue_tokens(24))
SAMPLE = [0, 7, 19, 23]
BY_ITEM = [name for name, family in FAMILIES.items() if not family.tree_scoring]


def model_of(name: str):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(family_config(name, VOCABULARY))
    spread_weights(model)
    return model.eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_scored_as_its_layers_allow_and_equals_plain_forward_passes(name):
    model = model_of(name)
    reader = make_reader(model, START)
    assert isinstance(reader, PathReader) == (name in BY_ITEM) == bool(tree_obstacle(model))
    way = "item by item" if name in BY_ITEM else "as a tree"
    assert way in scoring_line(skeleton(family_config(name, VOCABULARY)))
    for scoring in ("renormalised", "full"):
        found = CatalogueScorer(reader, TRIE, scoring).score(PROMPTS)
        for row, prompt in zip(found, PROMPTS, strict=True):
            expected = per_item_scores(model, TRIE, prompt, SAMPLE, scoring)
            # float32: a recurrent model's sum of 44 nats was seen to differ by 5e-4.
            assert torch.allclose(row[SAMPLE], expected, atol=2e-4, rtol=2e-5), scoring
    assert found.std(dim=1).min() > 0.5, "equal scores would say nothing"


@pytest.mark.parametrize("name", ["lfm2", "qwen3_5"])
def test_searches_and_losses_of_targets_use_the_same_reader(name):
    reader = make_reader(model_of(name), START)
    scores = CatalogueScorer(reader, TRIE).score(PROMPTS).numpy()
    state = reader.read(PROMPTS)
    order = np.arange(len(scores[0]))
    found = BestFirst(reader, TRIE).search(state, 5)
    for row, result in zip(scores, found, strict=True):
        assert list(result.entries) == list(top_entries(row, 5, order))
    entries = [3, 1, 4, 15]
    wanted = scores[range(4), entries]
    assert np.allclose(path_scores(reader, TRIE, state, entries, "renormalised"), wanted, atol=1e-4)
    beams, values = beam_search(reader, TRIE, state, 24, "renormalised", 0.0)[2]
    assert np.allclose(values, scores[2][beams], atol=1e-4)
    targets = [catalogue_tokens(24)[entry] for entry in entries]
    losses = token_losses(reader, TRIE, list(zip(PROMPTS, targets, strict=True)))
    assert np.allclose([-loss["renormalised"].sum() for loss in losses], wanted, atol=1e-4)


def test_the_states_that_are_kept_do_not_keep_those_of_whole_batches():
    reader = PathReader(model_of("lfm2"), START)
    states = reader._states([(5, 6, 7, 8), (5, 6), (9, 4, 3)])
    assert len(states) == 3
    for state in states.values():
        assert state.untyped_storage().nbytes() == state.numel() * state.element_size()


def test_on_a_model_that_follows_masks_both_readers_agree():
    model = model_of("mistral_window")
    tree = CatalogueScorer(PromptReader(model, START), TRIE).score(PROMPTS)
    paths = CatalogueScorer(PathReader(model, START), TRIE).score(PROMPTS)
    assert torch.allclose(tree, paths, atol=1e-4, rtol=0)


def test_a_tree_behind_a_prompt_would_be_wrong_for_a_convolution(monkeypatch):
    """What the choice protects from: without it the scores are off, or nothing can be read."""
    from gdrt_ds.inference import prompt_reader

    monkeypatch.setattr(prompt_reader, "attention_windows", lambda config: (None, None))
    model = model_of("lfm2")
    expected = per_item_scores(model, TRIE, PROMPTS[2], SAMPLE)
    try:
        found = CatalogueScorer(PromptReader(model, START), TRIE).score([PROMPTS[2]])[0, SAMPLE]
    except (AttributeError, TypeError, ValueError, IndexError):
        return
    assert (found - expected).abs().max() > 1e-2


def test_sequences_that_begin_others_are_not_read_twice():
    assert longest_paths([(1,), (1, 2), (1, 2, 3), (1, 3), (2,), (1, 3)]) == [(2,), (1, 3), (1, 2, 3)]


def test_what_could_be_trained_but_not_evaluated_is_refused():
    model = model_of("llama")
    check_evaluable(model)
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(4, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UserError, match="neither the fused loss nor the evaluation") as error:
        check_evaluable(model)
    assert "llm_int8_skip_modules" in error.value.fix
