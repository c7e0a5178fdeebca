"""Writes a run for others: merged into its base, or the adapter alone with its card.

    python -m gdrt_ds.export --run RUN --output DIR [--dtype bfloat16] [--base plain|trained]
    python -m gdrt_ds.export --run RUN --output DIR --adapter-only [--push owner/name --base-name owner/name]

The merged model loads in transformers alone. --base plain (default) merges into the original weights. --base
trained merges into the weights the adapter was trained on, i.e. the 4-bit base dequantised: scores are then
those of the evaluated model. Weights are read, merged and written one tensor at a time. The model is checked
before it is published: its logits, computed layer by layer, must be those of base + adapter. So memory holds
about one layer in float32, however large the model is.

--adapter-only writes the adapter with a model card; --push uploads that folder to the Hugging Face hub, as a
private repository unless --public is given. Both write the run's catalogue, its token trie and its prompt.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from gdrt_ds.completion import offer_completion
from gdrt_ds.errors import UserError
from gdrt_ds.inference.exporting import export
from gdrt_ds.inference.publishing import base_of, check_upload, push_to_hub, write_adapter
from gdrt_ds.invocation import command_name
from gdrt_ds.runtime import report_user_errors


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=command_name("python -m gdrt_ds.export"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", required=True, help="run folder of a finished training")
    parser.add_argument("--output", required=True, type=Path, help="new or empty folder")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="auto = as the base is stored",
    )
    parser.add_argument(
        "--base", default="plain", choices=["plain", "trained"], help="trained = the dequantised 4-bit base"
    )
    parser.add_argument("--shard-size", default="4GB", help="largest size of one weight file")
    parser.add_argument(
        "--check",
        default="layers",
        choices=["layers", "loaded"],
        help="loaded = load the written model with transformers besides; takes the memory of all of it",
    )
    parser.add_argument(
        "--in-memory",
        action="store_true",
        help="load and merge the whole model at once; the files are the same",
    )
    parser.add_argument("--adapter-only", action="store_true", help="write the adapter, not a merged model")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload the adapter to this repository")
    parser.add_argument("--public", action="store_true", help="a new repository is public")
    parser.add_argument("--base-name", metavar="OWNER/NAME", help="the base as the hub names it")
    offer_completion(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    with report_user_errors():
        refuse_unused(options)
        if options.adapter_only:
            publish_adapter(options)
        else:
            export_merged(options)
    return 0


MERGING = {
    "--dtype": "auto",
    "--base": "plain",
    "--shard-size": "4GB",
    "--check": "layers",
    "--in-memory": False,
}
"""What is about a merged model alone, and its default."""


def refuse_unused(options: argparse.Namespace) -> None:
    """Raises UserError for options that would change nothing."""
    if options.push and not options.adapter_only:
        raise UserError("--push uploads adapters", "add --adapter-only, or upload DIR with `hf upload`")
    values = vars(options)
    given = [flag for flag in MERGING if values[flag.strip("-").replace("-", "_")] != MERGING[flag]]
    if options.adapter_only and given:
        raise UserError(
            f"--adapter-only writes the adapter as it is, and {', '.join(given)} would change nothing",
            "these options are about a merged model: leave them out, or leave --adapter-only out",
        )
    if options.base_name and not options.adapter_only:
        raise UserError(
            f"--base-name {options.base_name} is about an adapter's folder, and a merged model is written",
            "leave --base-name out, or add --adapter-only",
        )
    if options.public and not options.push:
        raise UserError(
            "--public is about a repository that --push makes, and nothing is uploaded here",
            "add --push OWNER/NAME, or leave --public out",
        )


def publish_adapter(options: argparse.Namespace) -> None:
    """Writes the adapter's folder, and uploads it if that is asked for."""
    base = base_of(options.run)
    if options.push:
        check_upload(options.push, options.base_name or base)
    done = write_adapter(options.run, options.output, options.base_name, options.push)
    print(f"{done['folder']}: adapter for {done['base']}; {done['catalogue']}")
    if options.push:
        print(f"uploaded to {push_to_hub(options.output, options.push, options.public)}")


def export_merged(options: argparse.Namespace) -> None:
    """Writes the merged model and says how it was made."""
    done = export(
        options.run,
        options.output,
        options.dtype,
        options.base,
        options.shard_size,
        options.check,
        options.in_memory,
    )
    print(
        f"{done['folder']}: merged model in {done['dtype']} ({done['merged']}); logits differ from "
        f"base + adapter by at most {done['max_difference']:.2g} (largest logit "
        f"{done['largest_logit']:.3g}, {done['check']}); {done['catalogue']}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
