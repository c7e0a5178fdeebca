"""Merges a run's adapter into its base model: a folder that transformers loads alone.

    python -m gdrt_ds.export --run RUN --output DIR [--dtype bfloat16] [--base plain|trained] [--shard-size
    4GB]

--base plain (default) merges into the original weights. --base trained merges into the weights the adapter
was trained on, i.e. the 4-bit base dequantised: scores are then those of the evaluated model. The model is
checked before it is published: it is loaded again by transformers and must give the logits of base + adapter.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from gdrt_ds.config import RunConfig, load_config
from gdrt_ds.errors import UserError
from gdrt_ds.models.adapters import load_adapter
from gdrt_ds.models.built_in import TINY_NAME
from gdrt_ds.models.load import load_model
from gdrt_ds.models.source import resolve_model
from gdrt_ds.runtime import report_user_errors

TOLERANCE = {
    torch.float32: 1e-4,
    torch.bfloat16: 0.1,
    torch.float16: 0.02,
}  # of the largest logit, after rounding weights to the dtype


def export(
    run: str | Path, output: str | Path, dtype: str = "auto", base: str = "plain", shard_size: str = "4GB"
) -> dict:
    """Writes the merged model and returns {"folder", "max_difference", "largest_logit"} of the check.

    Raises:
        UserError: no adapter, an output folder in use, a full disk, or a merged model whose logits differ.
    """
    run, output = Path(run), Path(output)
    if not (run / "config.yaml").is_file():
        raise UserError(
            f"--run {run} is not a run folder (no config.yaml)", "give the run.dir of a finished run"
        )
    if not (run / "adapter" / "adapter_config.json").is_file():
        raise UserError(
            f"--run {run} has no adapter/ yet", "let the run finish, or resume it with resume=auto"
        )
    if output.exists() and any(output.iterdir()):
        raise UserError(f"--output {output} is not empty", "choose another folder")
    config = load_config(run / "config.yaml")
    path = (
        run / "base"
        if config.model.path == TINY_NAME
        else resolve_model(
            config.model.path,
            revision=config.model.revision,
            trust_remote_code=config.model.trust_remote_code,
        )
    )
    chosen = _stored_dtype(path) if dtype == "auto" else getattr(torch, dtype)
    section = config.model.model_copy(
        update={
            "quantization": config.model.quantization if base == "trained" else "none",
            "dtype": "float32",
            "loading": "stock",
            "attention": "auto",
        }
    )
    runtime = SimpleNamespace(device=torch.device("cpu"), rank=0, world=1)
    loaded = load_model(section, runtime, train=False, path=path, adapter=run / "adapter")
    probe = torch.arange(5, 5 + 12)[None] % len(loaded.tokenizer)
    with torch.no_grad():
        expected = loaded.model(input_ids=probe).logits
    adapted = loaded.model
    if section.quantization == "nf4":
        loaded.model = None
        plain = dequantised(load_model(section, runtime, train=False, path=path).model)
        adapted, _ = load_adapter(plain, run / "adapter", path, torch.float32, train=False)
    model = merge(adapted)
    with torch.no_grad():
        difference = float((model(input_ids=probe).logits - expected).abs().max())
    largest = float(expected.abs().max())
    if difference > TOLERANCE[torch.float32] * max(1.0, largest):
        raise UserError(
            f"the merged model's logits differ from base + adapter by {difference:.3g}",
            "do not use it; please report the model family",
        )
    model = model.to(chosen)
    model.config.dtype = chosen
    scratch = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.parent.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(scratch, max_shard_size=shard_size)
        loaded.tokenizer.save_pretrained(scratch)
        check = _reload_difference(scratch, probe, expected, config.model.trust_remote_code)
        if check > TOLERANCE[chosen] * max(1.0, largest):
            raise UserError(
                f"the exported model's logits differ from base + adapter by {check:.3g} (largest logit "
                f"{largest:.3g})",
                "export with --dtype float32, or another --base",
            )
        (scratch / "README.md").write_text(
            model_card(run, config, base, chosen, check, largest), encoding="utf-8"
        )
        if output.exists():
            output.rmdir()
        os.replace(scratch, output)
    except OSError as error:
        raise UserError(
            f"--output {output} cannot be written ({error.strerror or error})",
            "free disk space or choose another folder",
        ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return {
        "folder": str(output),
        "dtype": str(chosen).removeprefix("torch."),
        "max_difference": check,
        "largest_logit": largest,
    }


def merge(peft_model: nn.Module) -> nn.Module:
    """The plain causal LM with the adapter in its weights; an adapted tied head gets its own weight."""
    model = peft_model.get_base_model()
    input_embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    if hasattr(output, "lora_A") and output.base_layer.weight is input_embedding.weight:
        output.base_layer.weight = nn.Parameter(
            output.base_layer.weight.detach().clone(), requires_grad=False
        )
        model.config.tie_word_embeddings = False
        if getattr(model, "all_tied_weights_keys", None):
            model.all_tied_weights_keys = {}
    merged = peft_model.merge_and_unload()
    merged.config.use_cache = True
    return merged


def dequantised(model: nn.Module) -> nn.Module:
    """The same causal LM with ordinary layers that hold the values its 4-bit layers compute with."""
    from bitsandbytes.functional import dequantize_4bit
    from transformers.pytorch_utils import Conv1D

    for name, module in list(model.named_modules()):
        if type(module).__name__ != "Linear4bit":
            continue
        weight = dequantize_4bit(module.weight.data, module.weight.quant_state).to(torch.float32)
        if issubclass(module.source_cls, Conv1D):
            plain = Conv1D(module.out_features, module.in_features)
            weight = weight.t().contiguous()
        else:
            plain = nn.Linear(
                module.in_features, module.out_features, bias=module.bias is not None, device="meta"
            )
        plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), module.bias
        model.set_submodule(name, plain)
    model.is_loaded_in_4bit = model.is_quantized = False
    for owner, attribute in (
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model.config, "quantization_config"),
    ):
        if hasattr(owner, attribute):
            delattr(owner, attribute)
    return model


def _stored_dtype(path: Path) -> torch.dtype:
    text = json.loads((path / "config.json").read_text()).get("dtype") or json.loads(
        (path / "config.json").read_text()
    ).get("torch_dtype")
    return getattr(torch, text) if text in ("float32", "bfloat16", "float16") else torch.float32


def _reload_difference(
    folder: Path, probe: torch.Tensor, expected: torch.Tensor, trust_remote_code: bool
) -> float:
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=trust_remote_code
    )
    with torch.no_grad():
        return float((again.eval()(input_ids=probe).logits - expected).abs().max())


def model_card(
    run: Path, config: RunConfig, base: str, dtype: torch.dtype, difference: float, largest: float
) -> str:
    """README.md of the exported folder: what it is, from what, with which figures."""
    summary = _read_json(run / "summary.json")
    results = _read_json(next(iter(sorted(run.glob("**/results.json"))), run / "results.json"))
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [recommendation, gdrt]",
        "---",
        "",
        f"# {run.name}: {config.objective} recommender",
        "",
        f"A LoRA adapter trained by gdrt_ds with the objective `{config.objective}`, merged into "
        f"`{config.model.path}`"
        + (" (weights dequantised from NF4, as trained)" if base == "trained" else "")
        + f", stored as {str(dtype).removeprefix('torch.')}.",
        f"Checked when exported: logits differ from base + adapter by at most {difference:.2g} (largest "
        f"logit {largest:.3g}).",
        "",
        "Prompt: the template of the run (`prompt.json`); other prompts were not trained. The licence of "
        "the base model applies.",
        "",
        "## Data",
        "",
        f"`{config.data.path}`, split by {config.data.split}; fingerprint "
        f"`{summary.get('data_fingerprint') or summary.get('fingerprint') or 'not recorded'}`.",
        "",
    ]
    if results.get("metrics"):
        lines += ["## Metrics", "", "| metric | value | 95 % interval | n |", "|---|---|---|---|"]
        lines += [
            f"| {name} | {entry['value']:.4f} | {entry['ci_low']:.4f} .. {entry['ci_high']:.4f} | "
            f"{entry['n']} |"
            for name, entry in results["metrics"].items()
            if entry.get("ci_low") is not None and entry.get("value") is not None
        ]
        lines.append("")
    if summary.get("versions"):
        lines += ["## Versions", "", ", ".join(f"{k} {v}" for k, v in summary["versions"].items()), ""]
    lines += [
        "## Training configuration",
        "",
        "```yaml",
        (run / "config.yaml").read_text(encoding="utf-8").rstrip(),
        "```",
        "",
    ]
    return "\n".join(lines)


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def main() -> int:
    parser = argparse.ArgumentParser(description="merge a run's adapter into its base model")
    parser.add_argument("--run", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="auto = as the base is stored",
    )
    parser.add_argument(
        "--base", default="plain", choices=["plain", "trained"], help="trained = the dequantised 4-bit base"
    )
    parser.add_argument("--shard-size", default="4GB")
    options = parser.parse_args()
    with report_user_errors():
        done = export(options.run, options.output, options.dtype, options.base, options.shard_size)
        print(
            f"{done['folder']}: merged model in {done['dtype']}; logits differ from base + adapter by at "
            f"most {done['max_difference']:.2g} "
            f"(largest logit {done['largest_logit']:.3g})"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
