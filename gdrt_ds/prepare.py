"""Fills what a training job would wait for: model conversion, tokenised data, relevance cache.

    python -m gdrt_ds.prepare --config configs/x.yaml [key.sub=value ...]

It runs under torchrun, srun and deepspeed too. The run folder is left ready for `train.py ... resume=auto`,
which finds the relevance table in its cache.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m gdrt_ds.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", help="run config (YAML)")
    parser.add_argument("--deepspeed_config", help="DeepSpeed JSON, overrides the key `deepspeed`")
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    arguments = parser.parse_intermixed_args(argv)
    from gdrt_ds.runtime import name_accelerator, report_user_errors

    name_accelerator()
    with report_user_errors():
        from gdrt_ds.config import load_config

        config = load_config(arguments.config, [*arguments.overrides, "resume=auto"])
        if arguments.deepspeed_config:
            config.deepspeed = arguments.deepspeed_config
        from gdrt_ds.planning.compatibility import check_combination
        from gdrt_ds.training.deepspeed_config import read_deepspeed_config

        check_combination(config, read_deepspeed_config(config.deepspeed))
        from gdrt_ds.runtime import prepare_libraries, start_runtime

        prepare_libraries()  # before the import below brings them
        from gdrt_ds.training.run import prepare_only

        prepare_only(config, start_runtime(config.train.timeout_s))
        import torch.distributed as dist

        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    from gdrt_ds.train import leave

    leave(main())
