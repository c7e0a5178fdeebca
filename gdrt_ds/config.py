"""Run configuration: one YAML file plus `key.sub=value` overrides, typed and validated before anything is loaded.

`load_config` reads a file and overrides; `RunConfig` is the whole tree; unknown keys are errors that name the nearest
key. Every other module receives its own section and never the whole tree.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gdrt_ds.errors import UserError


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True, strict=False)


class RunSection(Section):
    dir: str = Field("runs/run", description="run folder; everything the run leaves behind is in it")
    overwrite: bool = Field(
        False, description="allow a run folder that holds a finished or foreign run (it is emptied)"
    )


class DataSection(Section):
    path: str = Field(
        "planted", description="folder or file of interactions, or an embedded set: planted, ml-100k"
    )
    format: Literal["auto", "windows", "table", "movielens", "amazon_reviews", "planted"] = Field(
        "auto",
        description="windows = the MSL/LBR/BIGRec CSV family; table = (user, item, timestamp[, rating]) + item table",
    )
    items: str | None = Field(
        None, description="item table (id, title[, provider, genres]); default: found beside the interactions"
    )
    users: str | None = Field(
        None, description="user table (user id + attributes); default: found beside the interactions"
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="column names that differ from the defaults: user, item, timestamp, rating, title, provider, genres",
    )
    history_length: int = Field(10, ge=1, description="history items kept per window, newest kept")
    min_history: int = Field(1, ge=1, description="windows with a shorter history are not made")
    kcore: int = Field(
        0, ge=0, description="drop users and items with fewer interactions, repeatedly; 0 = off"
    )
    min_rating: float | None = Field(
        None, description="interactions rated lower are not positives; null = keep all"
    )
    split: Literal["time", "leave_one_out"] = Field(
        "time", description="global time split, or last item per user"
    )
    split_ratio: tuple[float, float, float] = Field(
        (0.8, 0.1, 0.1), description="train, valid, test shares of the windows in time order"
    )
    train_file: str | None = Field(
        None, description="windows format: file used as train (default train.csv; e.g. train_10000.csv)"
    )
    limit_train: int | None = Field(None, ge=1, description="use a seeded sample of this many train windows")
    limit_valid: int | None = Field(None, ge=1, description="likewise for validation during training")
    limit_test: int | None = Field(None, ge=1, description="likewise for the test split")
    sample_seed: int = Field(0, description="seed of the limits above and of the planted generator")
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="skip counts and reports the rows it leaves out"
    )
    planted: dict[str, Any] = Field(
        default_factory=dict, description="options of the planted-shortcut generator"
    )


class PromptSection(Section):
    template: str = Field(
        "alpaca",
        description="alpaca, plain, chat (the tokenizer's chat template) or a JSON file of a template",
    )
    domain: str | None = Field(
        None,
        description="what an item is called in the prompt, e.g. movie; null = from the data set, else item",
    )
    max_length: int = Field(
        1024, ge=16, description="tokens of a whole example; the oldest history goes first, never the target"
    )
    history: Literal["keep", "mask", "shuffle"] = Field(
        "keep",
        description="training only: mask = no history (trains an auxiliary_sft reference), shuffle = another user's (control)",
    )


class LoraSection(Section):
    r: int = Field(8, ge=1, description="rank")
    alpha: float = Field(16, gt=0, description="scale is alpha / r")
    dropout: float = Field(0.05, ge=0, lt=1)
    targets: list[str] | Literal["all-linear"] = Field(
        default_factory=lambda: ["q_proj", "v_proj"], description="module names, or all-linear"
    )


class ModelSection(Section):
    path: str = Field(
        "smollm2-135m",
        description="folder, hub name, `smollm2-135m` (embedded package) or `tiny-random` (made here)",
    )
    tokenizer: str | None = Field(None, description="folder or hub name; null = the model's own")
    revision: str | None = Field(None, description="hub revision")
    trust_remote_code: bool = Field(
        False, description="run code that comes with a hub model; leave off unless you read it"
    )
    quantization: Literal["nf4", "none"] = Field(
        "nf4", description="nf4 = 4-bit base (QLoRA); none = base in `dtype`"
    )
    double_quant: bool = Field(
        True, description="quantise the block scales too (0.127 instead of 0.5 bit/parameter)"
    )
    quant_storage: Literal["auto", "uint8", "bfloat16", "float16", "float32"] = Field(
        "auto",
        description="storage dtype of packed NF4 weights; auto = uint8, which no engine dtype can destroy",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto = bfloat16 on GPU, float32 on CPU"
    )
    attention: Literal[
        "auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"
    ] = Field("auto", description="auto = flash-attn if importable on GPU, else SDPA; announced at start")
    loading: Literal["auto", "sharded", "stock"] = Field(
        "auto",
        description="sharded = each rank reads and quantises only its own slice (ZeRO-3); stock = transformers, whole model per rank",
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in backward (non-reentrant)"
    )
    compile: bool = Field(False, description="torch.compile the decoder layers; pays on GPU with long runs")
    lora: LoraSection = Field(default_factory=LoraSection)
    train_head: bool = Field(False, description="LoRA on lm_head too (recompute path of the fused loss)")


class TrainSection(Section):
    max_steps: int | None = Field(None, ge=1, description="optimizer steps; null = from epochs")
    epochs: float = Field(1.0, gt=0, description="passes over train when max_steps is null")
    seed: int = Field(0, description="seeds LoRA initialisation, data order and dropout")
    global_batch: int = Field(32, ge=1, description="samples per optimizer step over all ranks")
    micro_batch: int | Literal["auto"] = Field(
        "auto", description="samples per rank and forward; auto = global_batch / world size, at most 8"
    )
    packing: Literal["auto", "none", "packed", "shared_prefix"] = Field(
        "auto",
        description="none = padded rows; packed = no padding; shared_prefix = packed, and the prompt's constant head is computed once",
    )
    lr: float = Field(1e-4, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    schedule: Literal["constant", "linear", "cosine"] = Field("cosine", description="after warm-up")
    warmup_steps: int = Field(20, ge=0)
    grad_clip: float = Field(1.0, ge=0, description="global gradient norm; 0 = off")
    log_every: int = Field(
        10,
        ge=1,
        description="steps between writes of metrics.jsonl and progress lines (every step has its line)",
    )
    eval_every: int | None = Field(
        None, ge=1, description="steps between validations; null = at the end of each epoch"
    )
    patience: int | None = Field(
        None, ge=1, description="validations without improvement before stopping; null = never stop early"
    )
    select_by: Literal["nll", "worst_group", "objective"] = Field(
        "nll", description="validation figure that picks the best checkpoint"
    )
    save_every: int | None = Field(None, ge=1, description="steps between checkpoints; null = only the last")
    keep_checkpoints: int = Field(2, ge=1, description="newest checkpoints kept, the best one beside them")
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="NaN or inf on any rank: every rank stops, or skips, that same step"
    )
    timeout_s: int = Field(
        600, ge=10, description="process-group timeout: a dead or hung rank ends the job within this time"
    )
    debug_sync: bool = Field(
        False, description="prove every step that q is bitwise equal on all ranks (extra collectives)"
    )


class GroupsSection(Section):
    num: int = Field(
        8,
        ge=1,
        description="G; with labels (user_attribute, provider, column): the most frequent G-1, and the rest",
    )
    by: Literal[
        "relevance", "item_popularity", "user_attribute", "provider", "position", "column", "random"
    ] = "relevance"
    binning: Literal["quantile", "uniform"] = Field(
        "quantile", description="bins of r (relevance) or of the popularity"
    )
    reference: Literal["base", "auxiliary_sft", "live", "corpus"] = Field(
        "base",
        description="what scores the prompt without history: a model, or corpus = train frequencies of the next title token (no model)",
    )
    reference_adapter: str | None = Field(None, description="PEFT folder for reference=auxiliary_sft")
    refresh_every: int = Field(200, ge=1, description="steps between re-scorings for reference=live")
    column: str | None = Field(None, description="label for by=column or by=user_attribute, e.g. gender")


class DroSection(Section):
    tau: float = Field(1.0, gt=0, description="temperature: large = plain mean (SFT), small = worst group")
    estimate: Literal["batch", "ema"] = Field(
        "batch", description="group losses of this global batch (exact), or moving averages"
    )
    prior: Literal["token_share", "uniform"] = Field(
        "token_share", description="p over the groups present in the batch"
    )
    ema_rate: float = Field(0.1, gt=0, le=1, description="b of L <- (1-b) L + b * batch")
    excess: bool | str = Field(
        False,
        description="use L_g minus a reference's L_g (with history), as DoReMi does: true = the base, or an adapter or run folder",
    )
    eta: float = Field(0.1, gt=0, description="group_dro: step size of the exponentiated gradient")
    alpha: float = Field(0.5, gt=0, le=1, description="cvar: worst share")
    cvar_over: Literal["tokens", "groups"] = "tokens"
    frozen_weights: list[float] | str | None = Field(
        None, description="control: fixed q, as a list or the run folder whose final q is taken"
    )


class ObjectiveOptions(Section):
    focal_gamma: float = Field(2.0, ge=0)
    msl_temperature: float = Field(1.0, gt=0)
    cft_alpha: float = Field(0.1, ge=0, description="weight of the counterfactual term")
    cft_beta: float = Field(0.5, ge=0, description="position weights go 1 -> beta over the target tokens")
    igd_beta: float = Field(
        0.1, ge=0, description="weight of tokens with zero information gain in the catalogue trie"
    )
    reweight_power: float = Field(1.0, ge=0, description="example weight = train_count ** -power, normalised")


class LogSection(Section):
    tensorboard: bool = False
    wandb: bool = False
    wandb_project: str = "gdrt_ds"


class RunConfig(Section):
    """The whole tree. `resume`: null = start, `auto` = newest valid checkpoint of run.dir, or a checkpoint folder."""

    run: RunSection = Field(default_factory=RunSection)
    data: DataSection = Field(default_factory=DataSection)
    prompt: PromptSection = Field(default_factory=PromptSection)
    model: ModelSection = Field(default_factory=ModelSection)
    train: TrainSection = Field(default_factory=TrainSection)
    objective: str = Field(
        "gdrt",
        description="sft, gdrt, group_dro, cvar, focal, msl, gdrt+msl, cft, igd, reweight, or package.module:ATTRIBUTE",
    )
    options: ObjectiveOptions = Field(default_factory=ObjectiveOptions)
    groups: GroupsSection = Field(default_factory=GroupsSection)
    dro: DroSection = Field(default_factory=DroSection)
    log: LogSection = Field(default_factory=LogSection)
    deepspeed: str = Field(
        "ds_configs/zero3_qlora.json", description="DeepSpeed JSON; --deepspeed_config overrides it"
    )
    resume: str | None = None

    @model_validator(mode="after")
    def _combinations(self):
        if self.groups.by == "column" and not self.groups.column:
            raise ValueError("groups.by=column needs groups.column (a label of the samples)")
        if self.groups.by == "user_attribute" and not self.groups.column:
            raise ValueError("groups.by=user_attribute needs groups.column, e.g. groups.column=gender")
        if (
            self.groups.reference == "auxiliary_sft"
            and self.groups.by == "relevance"
            and not self.groups.reference_adapter
        ):
            raise ValueError("groups.reference=auxiliary_sft needs groups.reference_adapter (a PEFT folder)")
        return self


def known_keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    """All dotted keys of the tree, e.g. `dro.tau`."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += known_keys(field.annotation, f"{prefix}{name}.")
    return keys


def _describe(error: dict[str, Any], origin: str) -> str:
    key = ".".join(str(part) for part in error["loc"]) or "(combination)"
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, known_keys(), n=1, cutoff=0.5)
        leaf = difflib.get_close_matches(
            key.split(".")[-1], [k.split(".")[-1] for k in known_keys()], n=1, cutoff=0.6
        )
        same_leaf = [k for k in known_keys() if leaf and k.split(".")[-1] == leaf[0]]
        hint = near[0] if near else (same_leaf[0] if same_leaf else None)
        return f"{origin}: unknown key `{key}`" + (f"; did you mean `{hint}`?" if hint else "")
    message = error["msg"].removeprefix("Value error, ")
    return f"{origin}: {key} = {error['input']!r}: {message}" if error["loc"] else f"{origin}: {message}"


def _set_dotted(tree: dict[str, Any], override: str) -> None:
    key, sep, text = override.partition("=")
    if not sep or not key:
        raise UserError(
            f"override `{override}` is not of the form key.sub=value", "write for example dro.tau=0.5"
        )
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError as error:
        raise UserError(
            f"override `{override}`: the value is not valid YAML ({error})", "quote the value"
        ) from None
    if isinstance(value, str):
        try:
            value = (
                float(value) if "e" in value.lower() and not value.lower().startswith(("e", "inf")) else value
            )
        except ValueError:
            pass
    node = tree
    *parents, leaf = key.split(".")
    for depth, part in enumerate(parents):
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise UserError(
                f"override `{override}`: `{'.'.join(parents[: depth + 1])}` is a value, not a section",
                f"known keys start with {', '.join(RunConfig.model_fields)}",
            )
        node = child
    node[leaf] = value


def load_config(path: str | Path | None, overrides: list[str] = ()) -> RunConfig:
    """Reads a YAML run config and applies overrides.

    Raises:
        UserError: missing file, not YAML, unknown key (with the nearest name), wrong type or value.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        if not Path(path).is_file():
            raise UserError(
                f"--config {path}: no such file",
                "the shipped configs are in configs/, e.g. configs/smoke.yaml",
            )
        try:
            tree = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except yaml.YAMLError as error:
            raise UserError(
                f"--config {path}: not valid YAML: {error}", "check the indentation at that line"
            ) from None
        if not isinstance(tree, dict):
            raise UserError(
                f"--config {path}: expected a mapping of sections, found {type(tree).__name__}",
                "see configs/smoke.yaml",
            )
    for override in overrides:
        _set_dotted(tree, override)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        lines = [_describe(e, str(path or "config")) for e in error.errors()]
        raise UserError(
            "; ".join(dict.fromkeys(lines)), "docs/quickstart.md and configs/ list every key with its meaning"
        ) from None


def dump_config(config: RunConfig) -> str:
    """The resolved, complete, reloadable YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
