"""The tree of settings: each key with its default, its range and its description.

Two parts have files of their own: the base model with its adapter (model_section.py), and what the objective
is (objective_sections.py).
docs/config-reference.md is written from these descriptions. Every other module receives its own section and
never the whole tree.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from gdrt_ds.config.base import DecayRate, PartName, Section, Share
from gdrt_ds.config.combinations import contradictions
from gdrt_ds.config.model_section import ModelSection
from gdrt_ds.config.objective_sections import DroSection, GroupsSection, ObjectiveOptions


class RunSection(Section):
    """Where the run writes."""

    dir: str = Field(
        "runs/run",
        description="The run folder. Everything that the run leaves behind is in it.",
    )
    overwrite: bool = Field(
        False,
        description="Empties a run folder that holds a run, finished or not, before the new one trains. A "
        "folder with files that are not a run is refused all the same.",
    )
    max_minutes: Annotated[float, Field(gt=0, le=525_600)] | None = Field(
        None,
        description="The run saves a checkpoint and ends with status 75 when its process is this old, after "
        "at least one step. `resume=auto` goes on from there, to the bit. For machines that are lent by the "
        "hour. Empty: no limit. A study takes it for each of its commands: `python -m gdrt_ds.study FILE "
        "run.max_minutes=40`, and the same command goes on.",
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
        "`groups.reference=auxiliary_sft`); `shuffle` takes the history of a window drawn at random, seldom "
        "the user's own (a control). With rows, `mask` takes the auxiliary_prompt and `shuffle` another "
        "row's prompt.",
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
        description="Samples per rank and forward pass. `auto` is global_batch / ranks, at most 8; "
        "growing windows in a prefix tree: as many as four blocks have.",
    )
    packing: Literal["auto", "none", "packed", "shared_prefix", "prefix_tree"] = Field(
        "auto",
        description="`none` pads rows. `packed` puts samples one behind the other without padding. "
        "`shared_prefix` also computes the constant prompt prefix once per micro-batch. `prefix_tree` "
        "computes every common prefix of its samples once, histories included. `auto` takes the tree "
        "with growing windows and where it saves a quarter of the tokens, else the shared prefix; it packs "
        "or pads where the model's layers or its attention cannot follow.",
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
        description="The validation figure that picks the best checkpoint. `objective` is gdrt's F of the "
        "plain losses, with `dro.tau` and `dro.prior`, whatever is trained. `catalogue_nll` is the loss of "
        "the target among the catalogue's titles, which is what a ranking sees; it costs a second pass over "
        "the validation split.",
    )
    save_every: int | None = Field(
        None,
        ge=1,
        examples=[100],
        description="Steps between checkpoints. The best validation and the last step always have one.",
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
