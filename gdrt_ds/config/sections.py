"""The tree of settings: each key with its default, its range and its description.

The base model and its adapter have a file of their own, model_section.py.
docs/config-reference.md is written from these descriptions. Every other module receives its own section and
never the whole tree.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from gdrt_ds.config.base import DecayRate, PartName, Section, Share, Weight
from gdrt_ds.config.combinations import contradictions
from gdrt_ds.config.model_section import ModelSection


class RunSection(Section):
    """Where the run writes."""

    dir: str = Field(
        "runs/run",
        description="The run folder. Everything that the run leaves behind is in it.",
    )
    overwrite: bool = Field(
        False,
        description="Allows a run folder that holds a finished or a foreign run. That folder is emptied "
        "first.",
    )


class DataSection(Section):
    """What is read, how windows are made of it, and how they are split into train, valid and test."""

    path: str = Field(
        "planted",
        description="Folder or file of interactions, or the name of an embedded data set: `planted` "
        "(generated) or `ml-100k` (MovieLens-100k from the package recbole), or a data set of the Hugging "
        "Face hub: `owner/name` or `owner/name:config`.",
    )
    mixture: dict[str, Annotated[float, Field(gt=0, le=1000)]] = Field(
        default_factory=dict,
        description="With `data.format=sft`: several data sets in one run, each with its weight. A weight of "
        "2 takes every train row twice, 0.5 a seeded half of them. The label `dataset` names where a row "
        "comes from, and `data.path` is not read. Example: "
        "`data.mixture={data/clothing: 1, data/newsgroups: 0.5}`.",
    )
    revision: str | None = Field(
        None,
        description="Branch, tag or commit of a data set of the hub. Empty: the newest.",
    )
    format: Annotated[str, PartName("gdrt_ds.data.readers", "auto")] = Field(
        "auto",
        description="How the files are read. `auto` recognises the format. `windows` is the CSV family of "
        "MSL, LBR and BIGRec; `table` is one row per (user, item, timestamp[, rating]) with an item table; "
        "`sft` is rows of prompt and completion, or messages (docs/other-domains.md). A new reader is one "
        "file in gdrt_ds/data/readers/.",
    )
    items: str | None = Field(
        None,
        description="Item table with id, title and optionally provider and genres: a file, or a data set of "
        "the hub. Empty: it is looked for beside the interactions.",
    )
    users: str | None = Field(
        None,
        description="User table with the user id and attributes: a file, or a data set of the hub. Empty: it "
        "is looked for beside the interactions.",
    )
    item_text: str | None = Field(
        None,
        examples=["semantic_id"],
        description="Column of the item table whose text stands for an item in prompts and targets: a "
        "description, or a semantic id (`model.new_tokens`). The title is then what people are shown. Empty: "
        "the title.",
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Your names of the columns user, item, timestamp, rating, title, provider and genres, "
        "where they differ; of rows, those of prompt, completion, messages, group, auxiliary_prompt, "
        "choices, answer, user and split. Example: `data.columns={user: customer_id, item: asin}`.",
    )
    history_length: int = Field(
        10, ge=1, description="Items of history per window. The newest ones are kept."
    )
    min_history: int = Field(1, ge=1, description="Windows with a shorter history are not made.")
    kcore: int = Field(
        0,
        ge=0,
        description="Drops users and items with fewer interactions than this, repeatedly. 0 turns it off.",
    )
    min_rating: float | None = Field(
        None,
        examples=[4],
        description="Interactions with a lower rating are not positives and are left out. Empty: all are "
        "kept.",
    )
    windows: Literal["sliding", "growing"] = Field(
        "sliding",
        description="Train only. `sliding`: every target has the newest items before it. `growing`: the "
        "targets of a user stand in blocks whose histories begin at the same item, which "
        "`train.packing=prefix_tree` computes once; block starts move with the epoch.",
    )
    split: Literal["time", "leave_one_out"] = Field(
        "time",
        description="`time` splits all windows at two points in time. `leave_one_out` tests on the last "
        "item of each user. Rows (`data.format=sft`) have splits of their own or seeded shares.",
    )
    split_ratio: tuple[Share, Share, Share] = Field(
        (0.8, 0.1, 0.1),
        description="Shares of train, valid and test among the windows in time order (split `time`). They "
        "sum to 1, and train's is above 0.",
    )
    train_file: str | None = Field(
        None,
        description="Format `windows`: the file used for training. Empty: `train.csv`. Example: "
        "`train_10000.csv`.",
    )
    limit_train: int | None = Field(
        None,
        ge=1,
        examples=[1000],
        description="Trains on a seeded sample of this many windows. Empty: on all of them.",
    )
    limit_valid: int | None = Field(
        None,
        ge=1,
        examples=[1000],
        description="Validates on a seeded sample of this many windows. Empty: on all of them.",
    )
    limit_test: int | None = Field(
        None,
        ge=1,
        examples=[1000],
        description="Evaluates on a seeded sample of this many test windows. Empty: on all of them.",
    )
    sample_seed: int = Field(
        0, ge=0, description="Seed of the three limits above and of the generator of `planted`."
    )
    on_bad_row: Literal["error", "skip"] = Field(
        "error",
        description="`error` stops with the file, line and field. `skip` leaves bad rows out and counts "
        "them.",
    )
    planted: dict[str, Any] = Field(
        default_factory=dict,
        description="Options of the planted corpus; `gdrt_ds/data/readers/planted.py` lists them. Example: "
        "`data.planted={num_items: 24, shortcut_share: 0.8}`.",
    )

    @field_validator("split_ratio")
    @classmethod
    def _shares_of_one_whole(cls, shares: tuple[float, float, float]) -> tuple[float, float, float]:
        if abs(sum(shares) - 1) > 1e-6:
            raise ValueError(
                f"the shares of train, valid and test must sum to 1, these sum to {sum(shares):g}"
            )
        if shares[0] == 0:
            raise ValueError("the share of train is 0, so there is nothing to train on")
        return shares


class PromptSection(Section):
    """How a window becomes text."""

    template: str = Field(
        "alpaca",
        description="`alpaca`, `plain`, `list` (a title per line, the target is the next line; with growing "
        "windows the fewest tokens per target), `chat` (the tokenizer's own chat template), or a JSON file "
        "of a template. Rows of prompt and completion are taken as they are, or as a conversation with "
        "`chat`.",
    )
    domain: str | None = Field(
        None,
        description="What an item is called in the prompt, e.g. `movie`. Empty: the data set's own word, "
        "else `item`.",
    )
    max_length: int = Field(
        1024,
        ge=16,
        description="Most tokens of a whole example. Too long examples lose the oldest history items, or "
        "the beginning of their prompt where they are rows, never the target.",
    )
    history: Literal["keep", "mask", "shuffle"] = Field(
        "keep",
        description="Training only. `mask` leaves the history out (it trains a reference for "
        "`groups.reference=auxiliary_sft`); `shuffle` takes another user's history (a control). With rows, "
        "`mask` takes the auxiliary_prompt and `shuffle` another row's prompt.",
    )


class TrainSection(Section):
    """Steps, batches, optimizer, validation and checkpoints."""

    max_steps: int | None = Field(
        None, ge=1, examples=[1000], description="Optimizer steps. Empty: as many as `train.epochs` takes."
    )
    epochs: float = Field(
        1.0,
        gt=0,
        le=1_000_000,
        description="Passes over the training windows where `train.max_steps` is empty.",
    )
    seed: int = Field(
        0, ge=0, description="Seed of the adapter's initial values, of the data order and of dropout."
    )
    global_batch: int = Field(32, ge=1, description="Samples per optimizer step, over all ranks together.")
    micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="Samples per rank and forward pass. `auto` is global_batch / ranks, at most 8.",
    )
    packing: Literal["auto", "none", "packed", "shared_prefix", "prefix_tree"] = Field(
        "auto",
        description="`none` pads rows. `packed` puts samples one behind the other without padding. "
        "`shared_prefix` also computes the constant prompt prefix once per micro-batch. `prefix_tree` "
        "computes every common prefix of its samples once, histories included.",
    )
    block_samples: int | None = Field(
        None,
        ge=1,
        description="With `data.windows=growing`: targets of a user in one block. Empty: as many as "
        "`data.history_length` has room for.",
    )
    lr: float = Field(
        1e-4, gt=0, le=1_000_000, description="Largest learning rate, reached after the warm-up."
    )
    weight_decay: float = Field(
        0.0,
        ge=0,
        description="Weight decay of the optimizer, on adapter weights. A step takes train.lr times this "
        "share of every weight, so the product has to be below 1.",
    )
    betas: tuple[DecayRate, DecayRate] = Field(
        (0.9, 0.999), description="Decay rates of AdamW's first and second moments."
    )
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="The optimizer.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="Course of the learning rate after the warm-up."
    )
    warmup_steps: int = Field(
        20, ge=0, description="Steps over which the learning rate rises linearly to `train.lr`."
    )
    grad_clip: float = Field(
        1.0,
        ge=0,
        description="Largest global gradient norm; larger gradients are scaled down. 0 turns it off.",
    )
    log_every: int = Field(
        10,
        ge=1,
        description="Steps between progress lines and writes of metrics.jsonl, where every step has its "
        "line.",
    )
    eval_every: int | None = Field(
        None, ge=1, examples=[100], description="Steps between validations. Empty: at the end of each epoch."
    )
    patience: int | None = Field(
        None,
        ge=1,
        examples=[3],
        description="Stops after this many validations without improvement. Empty: never stops early.",
    )
    select_by: Literal["nll", "worst_group", "objective", "catalogue_nll"] = Field(
        "nll",
        description="The validation figure that picks the best checkpoint. `catalogue_nll` is the loss of "
        "the target among the catalogue's titles, which is what a ranking sees; it costs a second pass over "
        "the validation split.",
    )
    save_every: int | None = Field(
        None, ge=1, examples=[100], description="Steps between checkpoints. Empty: only the last."
    )
    keep_checkpoints: int = Field(
        2, ge=1, description="Number of newest checkpoints that are kept. The best one stays beside them."
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="What all ranks do in a step where any rank meets NaN or infinity."
    )
    timeout_s: int = Field(
        600,
        ge=10,
        le=10_000_000,
        description="Time-out of the process group in seconds: a dead or hung rank ends the job within it.",
    )
    debug_sync: bool = Field(
        False,
        description="Proves in every step that the group weights are bitwise equal on all ranks. It costs "
        "extra collectives.",
    )


class GroupsSection(Section):
    """Which group a target token belongs to."""

    num: int = Field(
        8,
        ge=1,
        le=32767,
        description="Number of groups G. With labels (user_attribute, provider, column, label) these are "
        "the G - 1 most frequent labels and the rest.",
    )
    by: Literal[
        "relevance",
        "item_popularity",
        "user_attribute",
        "provider",
        "position",
        "length",
        "column",
        "label",
        "random",
    ] = Field(
        "relevance",
        description="What decides the group. `relevance` is the method's: how well the prompt without the "
        "history predicts the token. `length` is the number of the target's tokens. `label` is the field "
        "`group` of rows (`data.format=sft`). `random` has the same sizes and no meaning (a control).",
    )
    binning: Literal["quantile", "uniform"] = Field(
        "quantile",
        description="How relevance, popularity or length is cut into groups: equal shares, or equal widths.",
    )
    reference: Literal["base", "auxiliary_sft", "live", "corpus"] = Field(
        "base",
        description="What scores the prompt without the history. `base`: the untuned model. "
        "`auxiliary_sft`: an adapter trained without histories. `live`: the model in training. `corpus`: "
        "counts of the next title token in train, no model.",
    )
    reference_adapter: str | None = Field(
        None, description="PEFT folder for `groups.reference=auxiliary_sft`, which needs it."
    )
    refresh_every: int = Field(
        200, ge=1, description="Steps between two scorings with `groups.reference=live`."
    )
    column: str | None = Field(
        None,
        description="Label for `groups.by=column` (any column of rows) or `groups.by=user_attribute`, e.g. "
        "`gender`; both need it.",
    )


COUNTED = ("relevance", "markov")
"""Values of `dro.excess` that name no adapter and hang on no history that changes from epoch to epoch."""


class DroSection(Section):
    """How group losses become group weights q."""

    tau: float = Field(
        1.0,
        gt=0,
        allow_inf_nan=True,  # NaN is not above 0
        examples=[0.3],
        description="Temperature in nats. Large values approach plain SFT, small ones the worst group "
        "alone; infinity (`dro.tau=.inf`) is the plain mean over the prior. Example: `dro.tau=0.3`.",
    )
    estimate: Literal["batch", "ema"] = Field(
        "batch",
        description="Where the weights' group losses come from: `batch` is this global batch (exact "
        "gradient), `ema` are moving averages of the steps before.",
    )
    prior: Literal["token_share", "uniform"] = Field(
        "token_share",
        description="Prior p over the groups that the batch holds: their shares of the tokens, or equal "
        "parts.",
    )
    ema_rate: float = Field(
        0.1, gt=0, le=1, description="Rate b of the moving averages, L <- (1 - b) L + b L_batch."
    )
    excess: bool | str = Field(
        False,
        description="Weighs groups by their loss above a reference's loss. `relevance`: the loss of the "
        "prompt alone under `groups.reference`, so that the group that gains least from its histories "
        "weighs most. `markov`: the loss of counting which item follows which, so that the group that is "
        "furthest behind what can be learned weighs most. With the history, as DoReMi does: `true` takes "
        "the base; a PEFT or run folder takes that adapter.",
    )
    eta: float = Field(
        0.1, gt=0, le=1_000_000, description="Objective group_dro: step size of the exponentiated gradient."
    )
    alpha: float = Field(0.5, gt=0, le=1, description="Objective cvar: the worst share that is averaged.")
    cvar_over: Literal["tokens", "groups"] = Field(
        "tokens", description="Objective cvar: whether the worst share is one of tokens or of groups."
    )
    worst_weight: float = Field(
        0.5,
        ge=0,
        le=1000,
        description="Objective sft_go: lambda, the weight of the worst group's loss beside the mean loss. "
        "0 is plain SFT. The default is ours.",
    )
    frozen_weights: list[Weight] | str | None = Field(
        None,
        examples=[[0.25, 0.75]],
        description="Control: constant group weights, as a list of G numbers or as the run folder whose "
        "last weights are taken. They are scaled to sum to 1; a group of weight 0 is not trained on. "
        "Empty: weights adapt.",
    )

    @property
    def excess_adapter(self) -> str | None:
        """The folder of the adapter whose losses `excess` subtracts, if it names one."""
        return self.excess if isinstance(self.excess, str) and self.excess not in COUNTED else None

    @field_validator("frozen_weights")
    @classmethod
    def _some_weight_is_left(cls, weights: list[float] | str | None) -> list[float] | str | None:
        if isinstance(weights, list) and not sum(weights) > 0:
            raise ValueError("no weight is above 0, so no group would be trained on")
        return weights


class ObjectiveOptions(Section):
    """Numbers that single objectives need."""

    focal_gamma: float = Field(2.0, ge=0, le=1000, description="Objective focal: gamma of (1 - p)^gamma l.")
    msl_temperature: float = Field(
        1.0,
        ge=1e-3,
        le=1000,
        description="Objectives msl, gdrt+msl and bear: temperature of the masked softmax.",
    )
    cft_alpha: float = Field(
        0.1, ge=0, le=1000, description="Objective cft: weight of the counterfactual term."
    )
    cft_beta: float = Field(
        0.5,
        ge=0,
        le=1000,
        description="Objective cft: weight at the last target token; weights change linearly to it from 1.",
    )
    igd_beta: float = Field(
        0.1,
        ge=0,
        le=1000,
        description="Objective igd: weight of tokens that the titles' prefix tree already determines.",
    )
    reweight_power: float = Field(
        1.0,
        ge=0,
        le=10,
        description="Objective reweight: a sample weighs its target's number of train interactions to the "
        "power of minus this.",
    )
    bear_lambda: float = Field(
        0.25,
        ge=0,
        le=1000,
        description="Objective bear: lambda of the token weights 1 + lambda sigmoid(m / xi), where m is the "
        "target's log-probability minus the K-th largest. 0 is the masked softmax without weights. The "
        "default is the authors' for Amazon Toys.",
    )
    bear_xi: float = Field(
        2.75,
        ge=1e-3,
        le=1000,
        description="Objective bear: temperature xi of the weights, in nats. The default is the authors' for "
        "Amazon Toys.",
    )
    bear_k: int = Field(
        10, ge=1, le=1000, description="Objective bear: K, the number of beams of the search that is meant."
    )
    bear_favours: Literal["kept", "at_risk"] = Field(
        "kept",
        description="Objective bear: which tokens weigh more. `kept`: those above the K-th, as in the "
        "authors' code; `at_risk`: those below it, which a beam search would drop.",
    )


class LogSection(Section):
    """Where figures go beside the run folder."""

    tensorboard: bool = Field(
        False, description="Writes TensorBoard events into the run folder (install `gdrt-ds[tensorboard]`)."
    )
    wandb: bool = Field(False, description="Sends figures to Weights & Biases (install `gdrt-ds[wandb]`).")
    wandb_project: str = Field("gdrt_ds", description="Project name at Weights & Biases.")


class RunConfig(Section):
    """The whole tree of settings of one run."""

    run: RunSection = Field(default_factory=RunSection, description="Where the run writes.")
    data: DataSection = Field(default_factory=DataSection, description="Interactions, windows, splits.")
    prompt: PromptSection = Field(default_factory=PromptSection, description="How a window becomes text.")
    model: ModelSection = Field(default_factory=ModelSection, description="Base model and adapter.")
    train: TrainSection = Field(default_factory=TrainSection, description="Steps, batches, optimizer.")
    objective: str = Field(
        "gdrt",
        description="What is minimised: sft, gdrt, group_dro, cvar, focal, msl, gdrt+msl, cft, igd, "
        "reweight, sft_go, bear, or `package.module:ATTRIBUTE` for one of your own.",
    )
    options: ObjectiveOptions = Field(
        default_factory=ObjectiveOptions, description="Numbers that single objectives need."
    )
    groups: GroupsSection = Field(default_factory=GroupsSection, description="Groups of target tokens.")
    dro: DroSection = Field(default_factory=DroSection, description="Weights of the groups.")
    log: LogSection = Field(default_factory=LogSection, description="TensorBoard and Weights & Biases.")
    deepspeed: str = Field(
        "ds_configs/zero3_qlora.json",
        description="DeepSpeed JSON, e.g. `ds_configs/zero2.json`. The command line's `--deepspeed_config` "
        "overrides it.",
    )
    resume: str | None = Field(
        None,
        description="Empty: starts anew. `auto`: goes on from the newest valid checkpoint of `run.dir`, if "
        "any. A checkpoint folder: goes on from that one.",
    )

    @model_validator(mode="after")
    def _combinations(self) -> RunConfig:
        for problem in contradictions(self):
            raise ValueError(problem)
        return self
