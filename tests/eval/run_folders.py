"""Run folders as training leaves them, made in seconds: real corpus, tiny random model and adapter. And the
message of a command that they make fail.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from eval.run import main
from gdrt_ds.config import dump_config, load_config
from gdrt_ds.models.load import load_model
from gdrt_ds.runtime import Runtime
from gdrt_ds.training.preparation import prepare

TINY = [
    "data.path=planted",
    "data.planted={num_items: 24, num_train: 200, num_valid: 20, num_test: 40}",
    "model.path=tiny-random",
    "model.quantization=none",
    "model.dtype=float32",
]


def make_run(folder: Path, overrides: list[str] = (), *, zero: bool = False, seed: int = 0) -> Path:
    """Writes config.yaml, prompt.json, catalogue.jsonl, base/ and adapter/.

    With `zero`, lora_B stays as PEFT makes it; else it is random.
    """
    config = load_config(None, [*TINY, f"run.dir={folder}", *overrides])
    folder.mkdir(parents=True, exist_ok=True)
    prepared = prepare(config)
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    prepared.data.save(folder)
    loaded = load_model(config.model, Runtime(), train=True, path=prepared.model_folder, seed=seed)
    if not zero:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in loaded.model.named_parameters():
            if "lora_B" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    loaded.model.save_pretrained(folder / "adapter")
    prepared.tokenizer.save_pretrained(folder / "adapter")
    return folder


def fails(capsys, arguments, entry=main):
    """The message of a refused command; it must exit with status 2 and no traceback."""
    with pytest.raises(SystemExit) as ended:
        entry([str(a) for a in arguments])
    text = capsys.readouterr().err
    assert (
        ended.value.code == 2 and text.startswith("error: ") and "fix: " in text and "Traceback" not in text
    )
    return text
