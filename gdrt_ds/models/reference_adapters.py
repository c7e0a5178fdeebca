"""The models that training compares itself with: what scores relevance (`groups.reference`) and what
losses are counted above (`dro.excess`).

Each is the loaded base under another adapter, or under none: no weight of the base is loaded twice.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from gdrt_ds.config import RunConfig
from gdrt_ds.errors import UserError
from gdrt_ds.files import read_summary, sha256_of

TRAINED = "default"  # PEFT's name of the adapter that is trained
AUXILIARY = "auxiliary"  # of groups.reference=auxiliary_sft
EXCESS = "excess"  # of dro.excess=FOLDER
WEIGHTS = "adapter_model.safetensors"


def adapter_folder(given: str, setting: str) -> Path:
    """The PEFT folder that a setting names directly, or as the folder of a run.

    Raises:
        UserError: there is no adapter, or its weights are a pickle.
    """
    for folder in (Path(given) / "adapter", Path(given)):
        if (folder / "adapter_config.json").is_file():
            break
    else:
        raise UserError(
            f"{setting} = {given}: no adapter_config.json there",
            "give a PEFT folder, or the folder of a finished run",
        )
    if not (folder / WEIGHTS).is_file():
        raise UserError(
            f"{setting} = {given}: no {WEIGHTS} beside its adapter_config.json",
            "PEFT's save_pretrained writes that file; other formats are not read",
        )
    return folder


def adapter_digest(folder: Path) -> str:
    """SHA-256 over the weights of an adapter and over its settings, which scale them."""
    parts = [sha256_of(folder / name) for name in ("adapter_config.json", WEIGHTS)]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def reference_adapters(config: RunConfig) -> dict[str, Path]:
    """PEFT name -> folder of the adapters that this run compares with."""
    wanted = {}
    if config.groups.reference == "auxiliary_sft" and config.groups.by in ("relevance", "random"):
        wanted[AUXILIARY] = adapter_folder(config.groups.reference_adapter, "groups.reference_adapter")
    if config.dro.excess_adapter:
        wanted[EXCESS] = adapter_folder(config.dro.excess_adapter, "dro.excess")
    return wanted


def load_reference_adapters(model: nn.Module, config: RunConfig, fingerprint: str) -> list[str]:
    """Loads them beside the trained adapter, frozen, before DeepSpeed shards the parameters. Returns the
    lines to announce.

    Raises:
        UserError: an adapter of another base model.
    """
    lines = []
    for name, folder in reference_adapters(config).items():
        known = read_summary(folder.parent).get("base_fingerprint")
        if known not in (None, fingerprint):
            raise UserError(
                f"{folder}: trained on another base model, or on one stored in another way",
                "use the same model.* in both runs",
            )
        unknown = model.load_adapter(str(folder), name, is_trainable=False).unexpected_keys
        if unknown:  # PEFT would go on with the base under the adapter's name
            raise UserError(
                f"{folder}: {len(unknown)} weights that this base model does not have, e.g. {unknown[0]}",
                "give an adapter of this base model",
            )
        lines.append(
            f"reference: adapter {folder} for {'relevance' if name == AUXILIARY else 'excess losses'}"
        )
    model.set_adapter(TRAINED)
    return lines


@contextlib.contextmanager
def reference(model: nn.Module, name: str | None) -> Iterator[None]:
    """Within it `model` is the base under the adapter `name` (None: under none).

    Afterwards the trained adapter as it was.
    """
    if name is None:
        with model.disable_adapter():
            yield
        return
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.set_adapter(name)
    try:
        yield
    finally:
        model.set_adapter(TRAINED)
        for parameter, wants_grad in trained:
            parameter.requires_grad_(wants_grad)
