"""Serves a run over HTTP: a history in, the K most probable titles of the catalogue out, with exact scores.

    python -m gdrt_ds.serve --run RUN_DIR [--port 8000] [--batch-size 8]
    curl localhost:8000/v1/recommend -H 'content-type: application/json' \\
        -d '{"history": ["Heat (1995)"], "k": 5}'

The lists are those of gdrt_ds.recommend. With --batch-size 1 every history is scored alone, so its scores do
not depend on the load, to the bit. SIGTERM ends the service when everything that it accepted is answered.
"""

from __future__ import annotations

import argparse
import sys

from gdrt_ds.completion import offer_completion
from gdrt_ds.invocation import command_name


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=command_name("python -m gdrt_ds.serve"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", required=True, help="run folder of a training")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 = all")
    parser.add_argument("--port", type=int, default=8000, help="0 = a free one, which is printed")
    parser.add_argument("--batch-size", type=int, default=8, help="histories scored at once")
    parser.add_argument("--max-queue", type=int, default=64, help="requests that may wait; beyond it: 503")
    parser.add_argument("--max-wait", type=float, default=30.0, help="seconds that one may wait; then: 503")
    parser.add_argument("--max-k", type=int, default=100, help="longest list; beyond it: 422")
    parser.add_argument("--max-titles", type=int, default=200, help="longest history; beyond it: 422")
    parser.add_argument("--max-body", type=int, default=256 << 10, help="bytes of a request; beyond it: 413")
    parser.add_argument("--strict", action="store_true", help="refuse titles that the catalogue lacks: 422")
    parser.add_argument("--base", action="store_true", help="the run's base model, without its adapter")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="settings of the run's config to override"
    )
    offer_completion(parser)
    return parser.parse_intermixed_args(argv)


def tell(text: str) -> None:
    """A line about the service on stderr."""
    print(text, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    from gdrt_ds.runtime import prepare_libraries, report_user_errors, single_process_runtime

    prepare_libraries()
    with report_user_errors():
        from gdrt_ds.errors import UserError
        from gdrt_ds.inference.recommender import open_run

        for name in ("batch_size", "max_queue", "max_wait", "max_k", "max_titles", "max_body"):
            if getattr(options, name) <= 0:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} {getattr(options, name)} is too small", "give more than 0")
        try:
            from gdrt_ds.serving.running import listen, run_service
            from gdrt_ds.serving.service import Limits, make_service
        except ImportError as error:
            raise UserError(
                f"the service needs a package that is not installed ({error.name})",
                "pip install 'gdrt-ds[serve]'",
            ) from None

        limits = Limits(
            batch_size=options.batch_size,
            max_queue=options.max_queue,
            max_wait_s=options.max_wait,
            max_k=options.max_k,
            max_titles=options.max_titles,
            max_body_bytes=options.max_body,
            strict=options.strict,
        )
        place = listen(options.host, options.port)  # a taken port is told before the model is loaded
        tell(f"loading the model of {options.run}")
        recommender = open_run(options.run, single_process_runtime(), options.overrides, base=options.base)
        tell(recommender.precision)
        run_service(make_service(recommender, limits), place, tell)


if __name__ == "__main__":
    main()
