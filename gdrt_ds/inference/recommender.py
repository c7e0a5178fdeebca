"""Opens what training left behind (config.yaml, prompt.json, catalogue.jsonl, adapter/) for scoring and
recommending.

`open_run(folder, runtime)` gives a `Recommender`: model, prompt encoder, catalogue and trie that belong
together. The same checks serve models trained elsewhere (`eval.loading`): an adapter whose lora_B are all
zero, weights that the base does not take, another base model, another tokenizer. Each is refused with
words: such runs give plausible numbers of the wrong model.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from gdrt_ds.config import ModelSection, RunConfig, load_config
from gdrt_ds.data.catalogue import Catalogue
from gdrt_ds.data.prompts import EncodedPrompt, PromptEncoder
from gdrt_ds.data.row_prompts import STYLE
from gdrt_ds.data.templates import PromptTemplate
from gdrt_ds.data.trie import TokenTrie
from gdrt_ds.errors import UserError
from gdrt_ds.files import read_summary
from gdrt_ds.inference.catalogue_scoring import TreePlan
from gdrt_ds.inference.path_reader import PathReader, make_reader
from gdrt_ds.inference.prompt_reader import PromptReader
from gdrt_ds.models.families import unwrap
from gdrt_ds.models.fingerprint import base_fingerprint
from gdrt_ds.models.float32 import to_float32
from gdrt_ds.models.head_check import confirm_head, probe_inputs
from gdrt_ds.models.load import LoadedModel, load_model
from gdrt_ds.models.scoring_choice import tree_obstacle
from gdrt_ds.models.source import compute_dtype, dtype_name, load_tokenizer, resolve_model
from gdrt_ds.runtime import Runtime

RUN_FILES = ("config.yaml", "prompt.json", "catalogue.jsonl")


@dataclass
class Recommender:
    """A model and everything its scores depend on.

    Attributes:
        config: the run's resolved config (or that of a model trained elsewhere); `model.dtype` is the dtype
            that the base was loaded in.
        encoder, catalogue, trie: trie leaves are catalogue entries.
        reader: ready to read prompts.
        lines: what was loaded and how.
        adapter: its folder, None for a plain base model.
        precision: the line that says in which dtype the scores are computed.
        as_loaded: whether the scores are computed in the dtype of the load, because the user named it.
    """

    config: RunConfig
    loaded: LoadedModel
    encoder: PromptEncoder
    catalogue: Catalogue
    trie: TokenTrie
    reader: PromptReader
    adapter: Path | None = None
    lines: list[str] = field(default_factory=list)
    precision: str = ""
    as_loaded: bool = False

    def prompt_of(self, item_ids: tuple[str, ...] | list[str]) -> list[int]:
        """Tokens of the prompt for a history of catalogue items, oldest first."""
        return self.prompt_of_titles([self.catalogue.text_of(item) for item in item_ids])

    def prompt_of_titles(self, titles: list[str]) -> list[int]:
        """Tokens of the prompt for a history of titles, oldest first."""
        return self.encode_titles(titles).input_ids.tolist()

    def encode_titles(self, titles: list[str]) -> EncodedPrompt:
        """The prompt for a history of titles, oldest first, with the newest of them as in training.

        `num_dropped` counts what `data.history_length` and `prompt.max_length` leave out.
        """
        return self.encoder.encode_newest(titles, self.config.data.history_length)


USED_UP = ("objective", "options", "train", "dro", "model.lora", "prompt.template", "prompt.domain")
"""Settings of a run that only its training reads; `prompt.json` and the adapter hold what came of them."""


def read_run_config(folder: Path, overrides: list[str] = ()) -> RunConfig:
    """config.yaml of a run folder, with overrides of what is no matter of the training.

    Raises:
        UserError: no run folder, one whose training has not begun, or another value of a setting that the
            training has used up: nothing would change but the records.
    """
    _refuse_rows(folder)
    missing = [name for name in RUN_FILES if not (folder / name).is_file()]
    if missing:
        what = "does not exist" if not folder.is_dir() else f"lacks {', '.join(missing)}"
        raise UserError(
            f"run folder {folder} {what}",
            "give the run.dir of a training run; for other models use --model, --prompt and --data",
        )
    config = load_config(folder / "config.yaml", overrides)
    trained = load_config(folder / "config.yaml", [])
    for name in USED_UP:
        now, before = (_value_of(settings, name) for settings in (config, trained))
        if now != before:
            raise UserError(
                f"{name} is another than in the training of {folder}: the run's adapter, prompt and groups "
                "are used as they are, so this setting would change the records alone",
                f"leave {name} out, or train a run with it",
            )
    return config


def _value_of(settings: object, name: str) -> object:
    for part in name.split("."):
        settings = getattr(settings, part)
    return settings


def _refuse_rows(folder: Path) -> None:
    """A run on rows of prompt and completion has no catalogue, and says so in prompt.json."""
    try:
        style = json.loads((folder / "prompt.json").read_text(encoding="utf-8")).get("style")
    except (OSError, ValueError, AttributeError):
        return
    if style == STYLE:
        raise UserError(
            f"run folder {folder} was trained on rows of prompt and completion, and this needs a catalogue",
            "evaluate it with python -m eval.run --run; generate with its adapter (RUN/adapter, PEFT)",
        )


def _recorded_base(adapter: Path) -> str:
    try:
        return str(
            json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")).get(
                "base_model_name_or_path"
            )
            or ""
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"{adapter}/adapter_config.json cannot be read ({error})",
            "give a folder written by PEFT's save_pretrained",
        ) from None


def base_path(section: ModelSection, adapter: Path | None, tiny_folder: Path | None = None) -> Path:
    """Local folder of the base; `tiny-random` and a base with new tokens are found where the run made them.

    Raises:
        UserError: the adapter was trained on a base with other weights.
    """
    recorded = _recorded_base(adapter) if adapter is not None else ""
    if section.path == "tiny-random" or section.new_tokens:
        for place in filter(None, (tiny_folder, recorded)):
            if (Path(place) / "config.json").is_file():
                return Path(place)
        raise UserError(
            "the run made its base itself (tiny-random, or model.new_tokens), and that folder is gone",
            "keep the run folder whole, or train again",
        )
    path = resolve_model(section.path, revision=section.revision, trust_remote_code=section.trust_remote_code)
    if (
        recorded
        and (Path(recorded) / "config.json").is_file()
        and Path(recorded).resolve() != path.resolve()
        and base_fingerprint(Path(recorded)) != base_fingerprint(path)
    ):
        raise UserError(
            f"adapter {adapter} was trained on {recorded}, whose weights differ from {path}",
            "evaluate it on its own base model (model.path, --model)",
        )
    return path


def check_adapter(model: torch.nn.Module, adapter: Path) -> str:
    """Refuses adapters that change nothing, or that the base took only in part; returns a line.

    A mismatch of names loads silently in PEFT and leaves lora_B at zero: the base model's scores under the
    run's name.
    """
    from peft.utils import get_peft_model_state_dict
    from safetensors import safe_open

    file = adapter / "adapter_model.safetensors"
    if not file.is_file():
        raise UserError(
            f"adapter {adapter} has no adapter_model.safetensors",
            "save it with safe_serialization=True; pickles are not read",
        )
    with safe_open(file, "pt") as stored:
        names = set(stored.keys())
    unused = sorted(names - set(get_peft_model_state_dict(model)))
    if unused:
        raise UserError(
            f"adapter {adapter} has {len(unused)} weights that this base model does not have, e.g. "
            f"{unused[0]}",
            "give the base model that the adapter was trained on",
        )
    blocks = [p for name, p in model.named_parameters() if "lora_B" in name]
    zero = sum(not bool(p.detach().any()) for p in blocks)
    if blocks and zero == len(blocks):
        raise UserError(
            f"adapter {adapter}: all {len(blocks)} lora_B matrices are zero, so it changes nothing",
            "it was saved before training, or its weights did not load; save it again, or evaluate the base "
            "model (--base)",
        )
    if any(not bool(torch.isfinite(p).all()) for p in blocks):
        raise UserError(
            f"adapter {adapter} holds NaN or infinite weights", "use an earlier checkpoint of the run"
        )
    return f"adapter: {len(names)} weights from {adapter}" + (
        f"; {zero} of {len(blocks)} lora_B are zero" if zero else ""
    )


def check_tokenizer(tokenizer, folder: Path, trust_remote_code: bool = False) -> None:
    """Refuses a tokenizer saved with an adapter that differs from the base model's.

    Titles would be other tokens.
    """
    if not (folder / "tokenizer_config.json").is_file():
        return
    saved = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    if saved.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"the tokenizer saved in {folder} has {len(saved)} tokens and differs from the base model's "
            f"({len(tokenizer)})",
            "use the base model and tokenizer of training (model.path, model.tokenizer)",
        )


def check_catalogue(catalogue: Catalogue, item_ids: set[str], where: str) -> None:
    """Refuses a catalogue of one item, or one that lacks items of the evaluated samples."""
    if len(catalogue) < 2:
        raise UserError(
            f"the catalogue has {len(catalogue)} item(s): there is nothing to rank",
            "give an item table with at least two titles",
        )
    missing = sorted(item_ids - set(catalogue.index_of))
    if missing:
        raise UserError(
            f"{len(missing)} items of {where} are not in the catalogue, e.g. {missing[0]}",
            "evaluate with the data that the run was trained on, or train with an item table that has them",
        )


def load_checked(
    config: RunConfig, runtime, path: Path, adapter: Path | None
) -> tuple[LoadedModel, list[str]]:
    """Loads base and adapter in `model.dtype`, and says what was loaded.

    Raises:
        UserError: an adapter or a tokenizer that does not belong to the base.
    """
    loaded = load_model(config.model, runtime, train=False, path=path, adapter=adapter)
    lines = list(loaded.lines)
    if adapter is not None:
        lines.append(check_adapter(loaded.model, adapter))
        check_tokenizer(loaded.tokenizer, adapter, config.model.trust_remote_code)
    generation = getattr(unwrap(loaded.model), "generation_config", None)
    if generation is not None and (generation.do_sample or (generation.temperature or 1.0) != 1.0):
        lines.append(
            "the model's generation_config (sampling, temperature) is ignored: scores are plain "
            "log-probabilities"
        )
    loaded.model.eval()
    line = confirm_head(loaded.model, *probe_inputs(loaded.model, runtime.device), loaded.dtype)
    lines += [line] if line else []
    return loaded, lines


def ready_to_score(
    loaded: LoadedModel, config: RunConfig, runtime, adapter: Path | None, merge: bool, as_loaded: bool
) -> tuple[LoadedModel, str, list[str]]:
    """Makes a model compute in float32, unless the user named another dtype (`as_loaded`).

    Unquantised bases in float32 take the adapter into their weights (same scores, less work); 16-bit weights
    would round it.

    Returns:
        the model, the precision in words, and lines to announce.
    """
    lines = []
    whole = loaded.dtype == torch.float32
    precision = f"scoring: in {dtype_name(loaded.dtype)}"
    if loaded.dtype != torch.float32 and not as_loaded:
        loaded, whole, precision = to_float32(loaded, config.model, runtime)
        lines.append(precision)
    if adapter is not None and merge and whole and config.model.quantization == "none":
        loaded.model = loaded.model.merge_and_unload()
        lines.append("adapter merged into the base weights for scoring")
    loaded.model.eval()
    return loaded, precision, lines


@dataclass
class TrainedModel:
    """A model in the dtype of its training, with what belongs to it; `ready` makes a Recommender of it.

    The attributes are those of `Recommender`.
    """

    config: RunConfig
    loaded: LoadedModel
    encoder: PromptEncoder
    catalogue: Catalogue
    trie: TokenTrie
    adapter: Path | None
    lines: list[str]
    as_loaded: bool

    @property
    def changes_dtype(self) -> bool:
        """Whether the scores are to be computed in another dtype than the training's."""
        return self.loaded.dtype != torch.float32 and not self.as_loaded

    def reader(self) -> PromptReader:
        """A reader of the model as it is now."""
        return make_reader(self.loaded.model, self.encoder.prefix_ids)

    def ready(self, runtime, merge: bool = True) -> Recommender:
        """Makes the model compute in float32, in place, unless the user named another dtype.

        Unquantised bases take the adapter into their weights (same scores, less work).
        """
        self.loaded, precision, said = ready_to_score(
            self.loaded, self.config, runtime, self.adapter, merge, self.as_loaded
        )
        lines = [*self.lines, *said]
        reader = self.reader()
        if isinstance(reader, PathReader):
            obstacle = tree_obstacle(self.loaded.model)
            lines.append(path_cost_line(obstacle, self.trie, self.encoder.max_length))
        return Recommender(
            self.config,
            self.loaded,
            self.encoder,
            self.catalogue,
            self.trie,
            reader,
            self.adapter,
            lines,
            precision,
            self.as_loaded,
        )


def assemble_trained(
    config: RunConfig,
    runtime,
    path: Path,
    adapter: Path | None,
    template: PromptTemplate | None,
    domain: str,
    catalogue: Catalogue,
    as_loaded: bool = False,
) -> TrainedModel:
    """Loads the model in `model.dtype` and joins the parts.

    Args:
        as_loaded: the scores are computed in that dtype too; otherwise in float32, where it fits.
    """
    loaded, lines = load_checked(config, runtime, path, adapter)
    template = template or PromptTemplate.from_config(config.prompt, domain, loaded.tokenizer)
    encoder = PromptEncoder(template, loaded.tokenizer, config.prompt.max_length)
    encoder.reserve_for(catalogue)
    titles = [entry.text for entry in catalogue.entries]
    trie = TokenTrie.build([encoder.target_ids(title) for title in titles], titles)
    return TrainedModel(config, loaded, encoder, catalogue, trie, adapter, lines, as_loaded)


def assemble(
    config: RunConfig,
    runtime,
    path: Path,
    adapter: Path | None,
    template: PromptTemplate | None,
    domain: str,
    catalogue: Catalogue,
    merge: bool = True,
    as_loaded: bool = False,
) -> Recommender:
    """The same, ready to score.

    Args:
        merge: whether an unquantised base takes the adapter into its weights.
    """
    trained = assemble_trained(config, runtime, path, adapter, template, domain, catalogue, as_loaded)
    return trained.ready(runtime, merge)


def path_cost_line(reason: str, trie: TokenTrie, prompt_tokens: int) -> str:
    """Says once that items are scored one by one, why, and what it costs beside a tree."""
    plan = TreePlan(trie, "renormalised")
    after = np.append(plan.nodes[1:], trie.num_nodes)
    last = plan.nodes[after >= trie.end[plan.nodes]]  # forwarded nodes below which nothing is forwarded
    one_by_one = len(last) * prompt_tokens + int(trie.depth[last].sum())
    times = one_by_one / max(1, len(plan.nodes) + prompt_tokens)
    return (
        f"scoring: item by item, because {reason}: {len(last):,} sequences per user, {times:.0f} times the "
        f"tokens of a tree (for prompts of {prompt_tokens} tokens)"
    )


def names_dtype(overrides: list[str]) -> bool:
    """Whether the command line names the dtype itself."""
    given = [override.partition("=") for override in overrides]
    return any(key.strip() == "model.dtype" and value.strip() != "auto" for key, _, value in given)


def dtype_of_training(folder: Path, config: RunConfig, device: torch.device) -> str:
    """The dtype that a run computed in, which `auto` does not say on another machine.

    A device that does not compute in it takes float32.
    """
    name = read_summary(folder).get("dtype") or config.model.dtype
    try:
        return dtype_name(compute_dtype(name, device))
    except UserError:
        return "float32"


def in_dtype_of_training(
    folder: Path, runtime, overrides: list[str], read: Callable[[Path, list[str]], RunConfig]
) -> tuple[RunConfig, bool]:
    """A run's settings with the dtype that its base is loaded in, and whether the scores keep that dtype.

    Args:
        read: (run folder, overrides) -> settings.
    """
    config = read(folder, overrides)
    as_loaded = names_dtype(overrides) and config.model.dtype != "float32"
    if not as_loaded:
        # The base is loaded, and quantised, as it was in training, and only then made float32.
        kept = [override for override in overrides if not override.startswith("model.dtype")]
        trained = dtype_of_training(folder, read(folder, kept), torch.device(runtime.device))
        config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": trained})})
    return config, as_loaded


def open_trained(
    folder: str | Path, runtime, overrides: list[str] = (), *, base: bool = False
) -> TrainedModel:
    """A run folder in the dtype of its training, ready to be made a Recommender.

    Args:
        runtime: anything with `.device`, `.rank`, `.world`.
        overrides: `key.sub=value`. `model.dtype=bfloat16` or float16 names the dtype of the scores too.
        base: leave the adapter out: the run's base model with the same prompt and catalogue.

    Raises:
        UserError: an incomplete folder or any of the refusals of this module.
    """
    folder = Path(folder)
    config, as_loaded = in_dtype_of_training(folder, runtime, overrides, read_run_config)
    adapter = folder / "adapter"
    has_adapter = (adapter / "adapter_config.json").is_file()
    if not base and not has_adapter:
        raise UserError(
            f"run folder {folder} has no adapter yet",
            "wait for the training to end, or evaluate the base model (--base)",
        )
    path = base_path(config.model, adapter if has_adapter else None, folder / "base")
    catalogue = Catalogue.load(folder / "catalogue.jsonl")
    template = PromptTemplate.load(folder / "prompt.json")
    return assemble_trained(
        config, runtime, path, None if base else adapter, template, template.domain, catalogue, as_loaded
    )


def open_run(
    folder: str | Path, runtime: Runtime, overrides: list[str] = (), *, base: bool = False, merge: bool = True
) -> Recommender:
    """A run folder, ready to score: in float32 where it fits, whatever the run was trained in.

    Args:
        folder: the run folder of a finished training.
        runtime: `gdrt_ds.runtime.Runtime()` for one process; anything with `.device`, `.rank`, `.world`.
        overrides: `key.sub=value`. `model.dtype=bfloat16` or float16 names the dtype of the scores too.
        base: leave the adapter out: the run's base model with the same prompt and catalogue.
        merge: add the adapter to the base's weights if the base is not quantised; scoring is then faster.

    Raises:
        UserError: an incomplete folder or any of the refusals of this module.
    """
    return open_trained(folder, runtime, overrides, base=base).ready(runtime, merge)
