"""Merges a run's adapter into its base model: a folder that transformers loads alone.

    python -m gdrt_ds.export --run RUN --output DIR [--dtype bfloat16] [--base plain|trained]

--base plain (default) merges into the original weights. --base trained merges into the weights the adapter
was trained on, i.e. the 4-bit base dequantised: scores are then those of the evaluated model.

Weights are read, merged and written one tensor at a time. The model is checked before it is published: its
logits, computed layer by layer, must be those of base + adapter. So memory holds about one layer in float32,
however large the model is. The run's catalogue, its token trie and its prompt are written beside it.
"""

from __future__ import annotations

import argparse

from gdrt_ds.inference.exporting import export
from gdrt_ds.invocation import command_name
from gdrt_ds.runtime import report_user_errors


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=command_name("python -m gdrt_ds.export"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", required=True, help="run folder of a finished training")
    parser.add_argument("--output", required=True, help="new or empty folder")
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
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    with report_user_errors():
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
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
