"""A run's adapter merged into its base model: a folder that transformers loads alone.

`export` reads from top to bottom as it happens: open the run, merge, check, write, publish. The merge goes
tensor by tensor (merging.py), and so does its check, so that memory holds one layer at a time. Where a model
cannot be merged so, it is loaded whole (export_in_memory.py), and the reason is said. The folder's README.md
comes from model_card.py, its catalogue from catalogue_files.py.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gdrt_ds.config import ModelSection, RunConfig, load_config
from gdrt_ds.errors import UserError
from gdrt_ds.files import read_summary
from gdrt_ds.inference.catalogue_files import write_catalogue
from gdrt_ds.inference.export_checks import Written
from gdrt_ds.inference.export_in_memory import write_in_memory
from gdrt_ds.inference.layer_by_layer import CannotStream
from gdrt_ds.inference.merging import write_by_tensor
from gdrt_ds.inference.model_card import Export, model_card, trained_dtype
from gdrt_ds.inference.output_folder import check_output, writing_to
from gdrt_ds.inference.recommender import base_path
from gdrt_ds.models.sharded_loading import CannotShard
from gdrt_ds.models.source import read_model_config
from gdrt_ds.models.stored_four_bit import stored_four_bit
from gdrt_ds.models.weight_writer import shard_bytes


@dataclass(frozen=True)
class OpenRun:
    """A run folder that can be exported.

    Attributes:
        folder: the run folder.
        config: its resolved config.
        base: local folder of the base model.
    """

    folder: Path
    config: RunConfig
    base: Path

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"


def export(
    run: str | Path,
    output: str | Path,
    dtype: str = "auto",
    base: str = "plain",
    shard_size: str = "4GB",
    check: str = "layers",
    in_memory: bool = False,
) -> dict[str, Any]:
    """Writes the merged model of a run.

    Args:
        run: run folder of a finished training.
        output: new or empty folder for the merged model.
        dtype: dtype of the stored weights; `auto` is the one in which the base is stored.
        base: `plain` merges into the original weights. `trained` merges into the weights that the adapter was
            trained on: rounded to the dtype of the training, quantised from it, and dequantised.
        shard_size: largest size of one weight file, e.g. `4GB`.
        check: `layers` computes the logits of the written folder layer by layer. `loaded` loads the folder
            with transformers besides, which takes the memory of the whole model in float32.
        in_memory: load the whole model in float32 and merge it at once. The files are the same.

    Returns:
        {"folder", "dtype", "max_difference", "largest_logit", "merged", "check", "catalogue"}: how the model
        was merged and checked, and what was written of the catalogue, in words. Difference and largest logit
        are of the check of the written folder.

    Raises:
        UserError: no adapter, or one that does not fit the base; an output that cannot be used; a shard size
            that is none; a full disk; a merged model whose logits differ from those of base + adapter.
    """
    target = check_output(Path(output))
    shard_bytes(shard_size)
    opened = open_finished_run(Path(run))
    stored_as = stored_dtype(opened.base) if dtype == "auto" else getattr(torch, dtype)
    if base == "plain" and stored_four_bit(read_model_config(opened.base)) is not None:
        raise UserError(
            f"--base plain: {opened.base} stores its weights in 4 bits, there are no plain ones",
            "give --base trained, which merges into the dequantised weights",
        )
    section = _loading_settings(opened.config.model, base)
    held_in = torch.float32
    if base == "trained":
        held_in = trained_dtype(opened.config.model, read_summary(opened.folder))
    with writing_to(target) as scratch:
        merged, written = _write_model(
            opened, section, held_in, scratch, stored_as, shard_size, check, in_memory
        )
        about = Export(opened.folder, opened.config, base, stored_as, written.difference, written.largest)
        (scratch / "README.md").write_text(model_card(about), encoding="utf-8")
        catalogue = write_catalogue(opened.folder, scratch, opened.config)
    return {
        "folder": str(output),
        "dtype": about.dtype_name,
        "max_difference": written.difference,
        "largest_logit": written.largest,
        "merged": merged,
        "check": written.check,
        "catalogue": catalogue,
    }


# -- open ------------------------------------------------------------------------------------------
def open_finished_run(run: Path) -> OpenRun:
    """Reads a run folder that has an adapter.

    Raises:
        UserError: this is no run folder, it has no adapter, or its base is not there any more.
    """
    if not (run / "config.yaml").is_file():
        raise UserError(
            f"--run {run} is not a run folder (no config.yaml)", "give the run.dir of a finished run"
        )
    if not (run / "adapter" / "adapter_config.json").is_file():
        raise UserError(
            f"--run {run} has no adapter/ yet", "let the run finish, or resume it with resume=auto"
        )
    config = load_config(run / "config.yaml")
    return OpenRun(run, config, base_path(config.model, run / "adapter", run / "base"))


def stored_dtype(folder: Path) -> torch.dtype:
    """Returns the dtype that a model folder's config.json names; float32 where it names none of ours."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # transformers wrote `torch_dtype` before version 5.
    name = config.get("dtype") or config.get("torch_dtype")
    if name in ("float32", "bfloat16", "float16"):
        return getattr(torch, name)
    return torch.float32


# -- load ------------------------------------------------------------------------------------------
def _loading_settings(section: ModelSection, base: str) -> ModelSection:
    """The run's model settings for a merge: float32 arithmetic on one process, quantised or not."""
    changes = {"dtype": "float32", "loading": "stock", "attention": "auto"}
    if base == "plain":
        changes["quantization"] = "none"
    return section.model_copy(update=changes)


# -- merge -----------------------------------------------------------------------------------------
def _write_model(
    opened: OpenRun,
    section: ModelSection,
    held_in: torch.dtype,
    folder: Path,
    dtype: torch.dtype,
    shard_size: str,
    check: str,
    in_memory: bool,
) -> tuple[str, Written]:
    """Writes the merged model and its tokenizer; returns how it was merged, and what the check found."""
    if not in_memory:
        try:
            written = write_by_tensor(
                section,
                opened.base,
                opened.adapter,
                folder,
                dtype,
                shard_size,
                loaded=check == "loaded",
                held_in=held_in,
            )
            return "tensor by tensor", written
        except (CannotShard, CannotStream) as reason:
            why = f"in memory, because {reason}"
            shutil.rmtree(folder, ignore_errors=True)
    else:
        why = "in memory, as asked"
    written = write_in_memory(section, opened.base, opened.adapter, folder, dtype, shard_size, held_in)
    return why, written
