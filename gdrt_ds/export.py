"""Merges a run's adapter into its base model: a folder that transformers loads alone.

    python -m gdrt_ds.export --run RUN --output DIR [--dtype bfloat16] [--base plain|trained]

--base plain (default) merges into the original weights. --base trained merges into the weights the adapter
was trained on, i.e. the 4-bit base dequantised: scores are then those of the evaluated model. The model is
checked before it is published: it is loaded again by transformers and must give the logits of base + adapter.
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
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    with report_user_errors():
        done = export(options.run, options.output, options.dtype, options.base, options.shard_size)
        print(
            f"{done['folder']}: merged model in {done['dtype']}; logits differ from base + adapter by at "
            f"most {done['max_difference']:.2g} (largest logit {done['largest_logit']:.3g})"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
