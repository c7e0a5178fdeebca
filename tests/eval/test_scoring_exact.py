"""Exact catalogue scores against one plain forward pass per item."""

import numpy as np
import pytest
import torch

from eval.scoring import per_item_scores
from gdrt_ds.errors import UserError
from gdrt_ds.inference import catalogue_scoring
from gdrt_ds.inference import prompt_reader as prompt_cache
from gdrt_ds.inference.catalogue_scoring import CatalogueScorer
from gdrt_ds.inference.prompt_reader import PromptReader
from tests.eval.scoring_models import catalogue_tokens, family, head_and_prompts, trie_of

HEAD, PROMPTS = head_and_prompts()
ITEMS = catalogue_tokens()
TRIE = trie_of(ITEMS)
SAMPLE = [0, 7, 19, 33, 58]
FAMILIES = ("llama", "qwen3", "mistral", "gemma3", "gemma2", "gpt2", "granite")


def score(model, scoring="renormalised", prompts=PROMPTS, trie=TRIE, head=HEAD, side="right", **options):
    return CatalogueScorer(PromptReader(model, head, side), trie, scoring, **options).score(prompts)


def reference(model, prompt, scoring="renormalised", trie=TRIE, entries=SAMPLE):
    return per_item_scores(model, trie, prompt, entries, scoring)


@pytest.mark.parametrize("name", FAMILIES)
def test_tree_scores_equal_one_forward_pass_per_item(name):
    model = family(name)
    for scoring in ("renormalised", "full"):
        found = score(model, scoring, tokens_per_slice=128)
        for row, prompt in zip(found, PROMPTS, strict=True):
            assert torch.allclose(row[SAMPLE], reference(model, prompt, scoring), atol=1e-4, rtol=0)
    spread = found.std(dim=1).min()
    assert spread > 0.5, "the catalogue must have scores that differ, or equality says nothing"


def test_every_item_agrees_and_probabilities_sum_to_one():
    model = family("llama")
    for scoring in ("renormalised", "full"):
        found = score(model, scoring)[2]
        assert torch.allclose(found, reference(model, PROMPTS[2], scoring, entries=None), atol=1e-4, rtol=0)
    total = score(model).exp().sum(1)
    assert torch.allclose(total, torch.ones(len(PROMPTS), dtype=torch.float64), atol=1e-12, rtol=0)
    assert (score(model, "full").exp().sum(1) < 1).all()


def test_scores_of_a_few_items_forward_a_few_slices_and_are_bitwise_those_of_all(monkeypatch):
    """The check before an evaluation compares three items of catalogues whose whole tree takes minutes."""
    reader = PromptReader(family("llama"), HEAD, "right")
    for scoring in ("renormalised", "full"):
        scorer = CatalogueScorer(reader, TRIE, scoring, tokens_per_slice=32)
        state = reader.read(PROMPTS[:1])
        whole = scorer.score_state(state)
        forwarded = []
        original = scorer._forward
        monkeypatch.setattr(scorer, "_forward", lambda *a: forwarded.append(a) or original(*a))
        for entries in ([SAMPLE[0]], SAMPLE):
            assert torch.equal(scorer.score_state(state, entries), whole[:, entries])
        forwarded.clear()
        scorer.score_state(state, [SAMPLE[0]])
        (slices,) = scorer._slices.values()
        assert 0 < len(forwarded) <= len(slices) // 2, (len(forwarded), len(slices))


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_batch_size_padding_side_and_slice_length_change_nothing(name):
    model = family(name)
    whole = score(model)
    assert torch.allclose(torch.cat([score(model, prompts=[p]) for p in PROMPTS]), whole, atol=1e-5, rtol=0)
    assert torch.allclose(score(model, side="left"), whole, atol=1e-5, rtol=0)
    for tokens in (4, 40, 10000):
        assert torch.allclose(score(model, tokens_per_slice=tokens), whole, atol=1e-5, rtol=0)
    assert torch.allclose(score(model, head=[]), whole, atol=1e-5, rtol=0)  # nothing shared between users
    assert torch.allclose(score(model, prompts=PROMPTS[::-1]).flip(0), whole, atol=1e-5, rtol=0)


def test_the_order_of_the_catalogue_changes_nothing():
    model, order = family("qwen3"), np.random.default_rng(3).permutation(len(ITEMS))
    shuffled = score(model, trie=trie_of([ITEMS[i] for i in order]))
    assert torch.allclose(shuffled, score(model)[:, order], atol=1e-5, rtol=0)


def test_only_branching_nodes_and_their_ancestors_are_forwarded():
    renormalised, full = (catalogue_scoring.TreePlan(TRIE, scoring) for scoring in catalogue_scoring.SCORINGS)
    expected = {
        a for n in np.flatnonzero(TRIE.branching) for a in range(1, int(n) + 1) if a <= n < TRIE.end[a]
    }
    assert set(renormalised.nodes.tolist()) == expected
    assert len(full.nodes) == int((TRIE.entry[1:] < 0).sum())
    assert len(renormalised.nodes) < len(full.nodes) / 3


def test_slices_hold_the_ancestors_of_their_nodes_and_score_every_edge_once():
    for scoring in catalogue_scoring.SCORINGS:
        plan = catalogue_scoring.TreePlan(TRIE, scoring)
        for length in (1, 5, 64):
            seen = np.zeros(len(plan.edge_token), int)
            seen[: plan.edge_offsets[1] if plan.scored[0] == 0 else 0] += (
                1  # the root's edges are read off the prompt
            )
            for part in plan.slices(length):
                seen[part.edges] += 1
                depths = part.depths.tolist()
                for place, depth in enumerate(depths):  # a node of depth d has d - 1 ancestors in its slice
                    above = [a for a in range(place) if place < int(part.ends[a])]
                    assert len(above) == depth - 1 and [depths[a] for a in above] == list(range(1, depth))
            assert (seen == 1).all()


def test_memory_bound_shortens_slices_and_refuses_what_cannot_fit():
    model = family("llama")
    free, tight = (
        CatalogueScorer(PromptReader(model, HEAD), TRIE, "full", max_bytes=size, tokens_per_slice=4096)
        for size in (1 << 30, 200_000)
    )
    assert tight.slice_length(2, 32) < free.slice_length(2, 32)
    assert torch.allclose(tight.score(PROMPTS[:2]), free.score(PROMPTS[:2]), atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="max_score_bytes = 100"):
        CatalogueScorer(PromptReader(model, HEAD), TRIE, max_bytes=100).score(PROMPTS)


def test_prompts_and_titles_beyond_the_models_positions_are_refused():
    head, prompts = head_and_prompts(lengths=(110,))
    with pytest.raises(UserError, match="128"):
        score(family("gpt2"), prompts=prompts, head=head)


def test_a_model_with_recurrent_layers_is_refused_by_name():
    model = family("qwen3")
    model.config.layer_types = ["linear_attention", "full_attention", "full_attention"]
    with pytest.raises(UserError, match="linear_attention"):
        PromptReader(model, HEAD)


def test_the_prompt_cache_is_neither_changed_nor_copied_by_scoring():
    reader = PromptReader(family("llama"), HEAD)
    state = reader.read(PROMPTS)
    before = [(k.clone(), k.data_ptr()) for k, _ in state.past]
    scorer = CatalogueScorer(reader, TRIE)
    first, second = scorer.score_state(state), scorer.score_state(state)
    assert torch.equal(first, second)
    assert all(
        torch.equal(k, old) and k.data_ptr() == place
        for (k, _), (old, place) in zip(state.past, before, strict=True)
    )


def test_lora_on_the_output_head_is_scored_as_the_model_computes_it():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        family("llama"), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "lm_head"])
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.2)
    model.eval()
    for scoring in catalogue_scoring.SCORINGS:
        found = score(model, scoring, prompts=PROMPTS[:2])
        assert torch.allclose(found[1, SAMPLE], reference(model, PROMPTS[1], scoring), atol=1e-4, rtol=0)
    with model.disable_adapter():
        assert (found[1, SAMPLE] - reference(model, PROMPTS[1], "full")).abs().max() > 0.05


@pytest.mark.parametrize("scoring", ["renormalised", "full"])
def test_a_catalogue_of_one_title_and_titles_without_branching(scoring):
    model = family("llama")
    for items in ([ITEMS[0]], [[5, 10, 2], [6, 11, 2]]):
        found = score(model, scoring, prompts=PROMPTS[:1], trie=trie_of(items))[0]
        assert torch.allclose(
            found, per_item_scores(model, trie_of(items), PROMPTS[0], None, scoring), atol=1e-4, rtol=0
        )


# Planted errors: each must be caught by the equality above, or the check is worth nothing.
def test_a_wrong_tree_mask_is_caught(monkeypatch):
    monkeypatch.setattr(
        catalogue_scoring, "tree_mask", lambda end: torch.ones(len(end), len(end), dtype=torch.bool).tril()
    )
    assert (score(family("llama"))[2, SAMPLE] - reference(family("llama"), PROMPTS[2])).abs().max() > 1e-2


def test_wrong_positions_are_caught(monkeypatch):
    original = PromptReader.run

    def shifted(self, tokens, positions, visible, past, past_positions, **options):
        return original(
            self,
            tokens,
            positions + (1 if not options.get("record") else 0),
            visible,
            past,
            past_positions,
            **options,
        )

    monkeypatch.setattr(PromptReader, "run", shifted)
    for name in ("llama", "gpt2"):
        assert (score(family(name))[2, SAMPLE] - reference(family(name), PROMPTS[2])).abs().max() > 1e-3


def test_a_forgotten_sliding_window_is_caught(monkeypatch):
    monkeypatch.setattr(prompt_cache, "attention_windows", lambda config: (None, None))
    for name in ("mistral", "gemma3"):
        model = family(name)
        if name == "gemma3":
            monkeypatch.setattr(
                prompt_cache,
                "attention_windows",
                lambda config: (dict.fromkeys(["full_attention", "sliding_attention"]), None),
            )
        assert (score(model)[2, SAMPLE] - reference(model, PROMPTS[2])).abs().max() > 1e-3


def test_padding_that_is_seen_is_caught(monkeypatch):
    original = PromptReader.read

    def careless(self, prompts):
        state = original(self, prompts)
        state.visible = torch.ones_like(state.visible)
        return state

    monkeypatch.setattr(PromptReader, "read", careless)
    assert (score(family("llama"))[0, SAMPLE] - reference(family("llama"), PROMPTS[0])).abs().max() > 1e-2
