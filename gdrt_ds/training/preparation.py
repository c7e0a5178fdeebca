"""From settings to tokens: the data, the tokenizer, tokenised splits, batches; no weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gdrt_ds.batches import BatchPlan
from gdrt_ds.batches.cost import tokens_of
from gdrt_ds.config import RunConfig, micro_batch_size
from gdrt_ds.data.prompts import TokenStore
from gdrt_ds.data.sources import read_source
from gdrt_ds.data.training_data import TrainingData
from gdrt_ds.errors import UserError
from gdrt_ds.models.built_in import TINY_NAME
from gdrt_ds.models.new_tokens import find_tokens, with_new_tokens
from gdrt_ds.models.packing import choose_packing
from gdrt_ds.models.source import load_tokenizer, read_model_config, resolve_model, tokenizer_source

FIRST_STEPS = 8
"""Steps whose rows `--plan` makes to say how many tokens a step has."""
MOST_SAMPLES = 2048
"""Samples that `train.packing=auto` looks at: it takes about a tenth of a millisecond to make a row."""
TREE_PAYS = 0.75
"""`train.packing=auto` takes a prefix tree that has at most this share of the tokens of a shared prefix.

Tokens are counted, not times: attention over a tree with many branches takes its own time."""


@dataclass
class Prepared:
    """Everything before the weights.

    Attributes:
        data: the samples as tokens, and what is known of them (gdrt_ds/data/training_data.py).
    """

    data: TrainingData
    tokenizer: object
    model_folder: Path
    model_config: object

    @property
    def stores(self) -> dict[str, TokenStore]:
        """The tokens of train and, where the split is not empty, of valid."""
        return self.data.stores

    @property
    def notes(self) -> list[str]:
        """Lines about the data, to announce."""
        return self.data.notes


def prepare(config: RunConfig) -> Prepared:
    """Loads and tokenises. Every rank calls it and gets the same.

    Raises:
        UserError: anything about data, prompt or tokenizer.
    """
    source = read_source(config)
    model = config.model
    base = Path(config.run.dir) / "base"
    texts = []
    if model.path == TINY_NAME or model.new_tokens:
        texts = source.texts(config)
    folder = resolve_model(
        model.path,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        tiny_folder=base.with_name("base_plain") if model.new_tokens else base,
        texts=texts,
        seed=config.train.seed,
        tiny=model.tiny,
    )
    tokenizer = load_tokenizer(tokenizer_source(model, folder), trust_remote_code=model.trust_remote_code)
    line = ""
    if model.new_tokens:
        tokens = find_tokens(model.new_tokens, texts)
        folder = with_new_tokens(folder, tokenizer, tokens, base, config.train.seed)
        line = f"tokenizer: {len(tokens):,} tokens of model.new_tokens, e.g. {', '.join(tokens[:3])}"
    model_config = read_model_config(folder, trust_remote_code=model.trust_remote_code)
    limit = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and config.prompt.max_length > limit:
        raise UserError(
            f"prompt.max_length = {config.prompt.max_length} is more than the {limit} positions of "
            f"{folder.name}",
            f"set prompt.max_length to at most {limit}",
        )
    data = source.encode(config, tokenizer)
    if line:
        data.notes.append(line)
    return Prepared(data, tokenizer, folder, model_config)


def plan_batches(
    config: RunConfig, store: TokenStore, world: int, packing: str, micro: int | None = None
) -> BatchPlan:
    """Decides who computes what in every step.

    Args:
        packing: how the rows are laid out in the end: none, packed, shared_prefix or prefix_tree. It decides
            what a micro-batch costs, so how a step is split, and not which samples are in it. `auto` as a
            wish says neither: it pads or packs where the model cannot follow a tree.
        micro: samples of a rank's forward; None = `micro_batch_size`.

    Raises:
        UserError: the global batch is smaller than the ranks, or the micro-batch does not fit it.
    """
    micro = micro or micro_batch_size(config, world, packing)
    if (
        micro * world > config.train.global_batch
        and config.train.micro_batch != "auto"
        and micro > -(-config.train.global_batch // world)
    ):
        raise UserError(
            f"train.micro_batch = {micro} x {world} ranks = {micro * world} is more than train.global_batch "
            f"= {config.train.global_batch}",
            f"set train.micro_batch to at most {-(-config.train.global_batch // world)}, or auto",
        )
    trees = packing == "prefix_tree"
    by_row = trees or store.rows_change
    return BatchPlan(
        None if by_row else store.lengths,
        config.train.global_batch,
        micro,
        world,
        config.train.seed,
        packed=packing != "none",
        store=store if by_row else None,
        trees=trees,
    )


def total_steps(config: RunConfig, store: TokenStore) -> int:
    if config.train.max_steps is not None:
        return config.train.max_steps
    return max(1, int(np.ceil(config.train.epochs * len(store) / config.train.global_batch)))


def packing_of(config: RunConfig, prepared: Prepared, world: int) -> tuple[str, str]:
    """Returns the packing of a run and the line to announce: what `choose_packing` says, or a prefix tree.

    Samples that begin alike beyond the fixed words of the prompt, e.g. several completions of one prompt,
    cost less as a tree. `auto` takes it where that saves a quarter of the tokens.

    Args:
        world: number of ranks.
    Raises:
        UserError: see `choose_packing`.
    """
    packing, line = choose_packing(config, prepared.model_config)
    if config.train.packing != "auto" or packing != "shared_prefix":
        return packing, line
    store = prepared.stores["train"]
    plan = plan_batches(config, store, world, "prefix_tree")
    steps = max(1, min(FIRST_STEPS, MOST_SAMPLES // config.train.global_batch))
    tokens = padding_figures(store, plan, prepared.data.prefix_length, steps)
    if tokens["prefix_tree"] > TREE_PAYS * tokens["shared_prefix"]:
        return packing, line
    return "prefix_tree", (
        f"packing: prefix_tree (auto: {tokens['prefix_tree']:,.0f} tokens a step instead of "
        f"{tokens['shared_prefix']:,.0f} with a shared prefix, because samples begin alike)"
    )


def padding_figures(
    store: TokenStore, plan: BatchPlan, head: int, steps: int = FIRST_STEPS
) -> dict[str, float]:
    """Returns the tokens computed per optimizer step in each packing, averaged over the first steps.

    Args:
        head: tokens that all prompts begin with.
    """
    tokens = {"padded": 0, "packed": 0, "shared_prefix": 0, "prefix_tree": 0}
    for step in range(steps):
        for members in (members for slots in plan.step(step) for members in slots if len(members)):
            rows = [row[:-1] for row in store.rows(members)]
            for name in tokens:
                tokens[name] += tokens_of(rows, head, "none" if name == "padded" else name)
    return {name: count / steps for name, count in tokens.items()}
