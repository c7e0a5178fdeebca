"""Losses of targets behind one prompt: the prompt is read once, and each target is as if it were alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from eval.audit import target_loss
from eval.audit.target_loss import Branches, token_losses
from gdrt_ds.inference.path_reader import make_reader
from tests.eval.scoring_models import VOCABULARY, catalogue_tokens, head_and_prompts, trie_of
from tests.models.family_models import FAMILIES, family_config, spread_weights

START, PROMPTS = head_and_prompts()
TITLES = catalogue_tokens(24)
TRIE = trie_of(TITLES)
OTHER_START = [PROMPTS[0][-1], *PROMPTS[0]]
ROWS = [
    *((prompt, title) for prompt in PROMPTS[:2] for title in TITLES[:4]),
    *((OTHER_START, title) for title in TITLES[3:6]),  # not behind the constant head
    (PROMPTS[2], TITLES[0]),
    (PROMPTS[0], [TITLES[1][0]] * len(TITLES[1])),  # an ablated target; its label is another
]
LABELS = [*(title for _, title in ROWS[:-1]), TITLES[1]]


def reader_of(name: str):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(family_config(name, VOCABULARY))
    spread_weights(model)
    return make_reader(model.eval(), START)


def alone(reader) -> list[np.ndarray]:
    """float64 [target tokens] of every row by itself: a plain forward pass of prompt and target."""
    found = []
    for (prompt, fed), label in zip(ROWS, LABELS, strict=True):
        with torch.no_grad():
            logits = reader.model(input_ids=torch.tensor([[*prompt, *fed]])).logits[0].double()
        places = torch.arange(len(fed)) + len(prompt) - 1
        found.append(-logits[places].log_softmax(-1)[torch.arange(len(fed)), torch.tensor(label)].numpy())
    return found


def largest_difference(reader) -> float:
    together = token_losses(reader, TRIE, ROWS, LABELS)
    return max(
        float(np.abs(found["full"] - expected).max())
        for found, expected in zip(together, alone(reader), strict=True)
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_targets_behind_one_prompt_have_the_losses_of_plain_forward_passes(name):
    # Recurrent models sum many nats in float32, as in the test of their scores.
    assert largest_difference(reader_of(name)) < 5e-4


def test_a_target_that_sees_another_one_would_be_found(monkeypatch):
    assert len({tuple(title) for _, title in ROWS}) > 4

    def one_branch(prompt, targets):
        found = Branches.of(prompt, targets)
        return Branches(found.tokens, found.positions, [min(b, 1) for b in found.branch], found.before)

    monkeypatch.setattr(target_loss, "Branches", type("Leaky", (), {"of": staticmethod(one_branch)}))
    assert largest_difference(reader_of("llama")) > 1e-2


def test_a_prompt_is_forwarded_once_for_all_its_targets(monkeypatch):
    reader, forwarded = reader_of("llama"), []
    run = reader.run

    def counted(tokens, *others, **options):
        forwarded.append(tokens.numel())
        return run(tokens, *others, **options)

    monkeypatch.setattr(reader, "run", counted)
    targets = TITLES[:6]
    token_losses(reader, TRIE, [(PROMPTS[3], target) for target in targets])
    own = len(PROMPTS[3]) - reader.num_shared + sum(len(target) - 1 for target in targets)
    assert forwarded == [reader.num_shared, own]
