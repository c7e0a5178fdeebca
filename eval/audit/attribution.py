"""Feature-ablation attribution of a target's log-probability to parts of its context.

The conventions are those of captum's FeatureAblation. A part is ablated by putting one baseline token in
the place of each of its tokens, so that positions stay. Attribution of part s to target token t:

    a[s, t] = log p(y_t | whole context) - log p(y_t | context with s ablated)

The generated prefix y_<t is a part too, an auxiliary one. captum's own text attribution keeps the target's
earlier tokens in place and gives them nothing, which hides half of the shortcut. One pass in which all fed
target tokens are ablated gives it for every t, because position t sees only tokens before t. The first
target token has no prefix: its attribution there is 0.

Legend: S parts, N target tokens of one sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gdrt_ds.data.prompts import SEGMENTS, EncodedPrompt

PARTS = ("instruction", "template", "history", "generated prefix")
AUXILIARY = (0, 1, 3)  # indices into PARTS: what is no user's
INTERACTION = 2
PREFIX = 3


@dataclass(frozen=True)
class Attribution:
    """Attribution of one sample.

    Attributes:
        effects: [S, N], nats.
        loss: [N] with the whole context, nats.
        tokens: [S] number of tokens of each part (for the prefix: its mean over t).
    """

    effects: np.ndarray
    loss: np.ndarray
    tokens: np.ndarray


def ablated(tokens: list[int], mask: np.ndarray, baseline: int) -> list[int]:
    """The tokens with the baseline token where the mask is set."""
    return [baseline if hit else token for token, hit in zip(tokens, mask)]


def part_masks(encoded: EncodedPrompt, keep: set[int]) -> list[np.ndarray]:
    """Bool[prompt tokens] of instruction, template and history.

    Args:
        keep: special tokens (BOS, turn marks), which are never ablated: without an attention sink every part
            would seem to matter.
    """
    prompt = slice(0, len(encoded.input_ids) - encoded.num_target)
    special = np.isin(encoded.input_ids[prompt], sorted(keep))
    return [(encoded.segments[prompt] == SEGMENTS.index(name)) & ~special for name in PARTS[:PREFIX]]


def attribution_rows(
    prompt: list[int], target: list[int], masks: list[np.ndarray], baseline: int, prefix: bool = True
) -> tuple[list, list]:
    """(rows for token_losses, true labels).

    The whole context comes first, then the context with each mask ablated, then (with `prefix`) the context
    with the generated prefix ablated.
    """
    rows = [(prompt, target)]
    rows += [(ablated(prompt, mask, baseline), target) for mask in masks]
    if prefix:
        rows.append((prompt, [baseline] * len(target)))
    return rows, [target] * len(rows)


def effects_of(losses: list[np.ndarray]) -> np.ndarray:
    """Losses [N] of whole and ablated contexts -> effects [S, N]: the loss that ablation adds."""
    return np.stack([loss - losses[0] for loss in losses[1:]])


def baseline_token(tokenizer) -> int:
    """What stands in for an ablated token: the padding token, else the unknown one, else EOS."""
    for token in (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def prompt_and_target(context, sample) -> tuple[EncodedPrompt, list[int], list[int]]:
    """A sample encoded with its target, and both sides: (encoded, prompt tokens, target tokens)."""
    catalogue = context.catalogue
    titles = [catalogue.text_of(item) for item in sample.history]
    encoded = context.recommender.encoder.encode(titles, catalogue.text_of(sample.target))
    cut = len(encoded.input_ids) - encoded.num_target
    return encoded, encoded.input_ids[:cut].tolist(), encoded.input_ids[cut:].tolist()


@dataclass(frozen=True)
class Ablations:
    """What has to be read for the attribution of some samples.

    Attributes:
        rows, labels: for `AuditContext.losses`; of every sample the whole context, then each ablation.
        sizes: per sample, the tokens of each part.
    """

    rows: list[tuple[list[int], list[int]]]
    labels: list[list[int]]
    sizes: list[list[float]]

    ROWS = len(PARTS) + 1  # per sample

    @classmethod
    def of(cls, context, samples, baseline: int | None = None) -> Ablations:
        """Arguments: see `attribute`."""
        tokenizer = context.recommender.encoder.tokenizer
        if baseline is None:
            baseline = baseline_token(tokenizer)
        found = cls([], [], [])
        for sample in samples:
            encoded, prompt, target = prompt_and_target(context, sample)
            masks = part_masks(encoded, set(tokenizer.all_special_ids))
            rows, labels = attribution_rows(prompt, target, masks, baseline)
            found.rows.extend(rows)
            found.labels.extend(labels)
            found.sizes.append([*(int(mask.sum()) for mask in masks), (len(target) - 1) / 2])
        return found

    def read(self, losses: list[dict[str, np.ndarray]], scoring: str) -> list[Attribution]:
        """Attributions from the losses of `rows`."""
        found = []
        for index, size in enumerate(self.sizes):
            own = [one[scoring] for one in losses[index * self.ROWS : (index + 1) * self.ROWS]]
            effects = effects_of(own)
            effects[PREFIX, 0] = 0.0  # the first token has no prefix; what stands here is rounding
            found.append(Attribution(effects, own[0], np.array(size, dtype=float)))
        return found


def attribute(
    context, samples, scoring: str, baseline: int | None = None, what: str = "attribution"
) -> list[Attribution]:
    """Attribution of every sample's target to instruction, template, history and generated prefix.

    Costs five passes per sample, two of them behind the same prompt.

    Args:
        context: eval.audit.context.AuditContext.
        scoring: `full` or `renormalised`. Under the latter, tokens on which the trie allows no choice have
            none.
        baseline: token that stands in for an ablated one; None = `baseline_token`.
        what: name of the passes in lines of progress.
    """
    ablations = Ablations.of(context, samples, baseline)
    return ablations.read(context.losses(ablations.rows, what, ablations.labels), scoring)
