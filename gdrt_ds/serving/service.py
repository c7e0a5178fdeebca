"""Routes of the service: history in, exact list out; health and metrics.

    POST /v1/recommend  {"history": ["title", ...], "k": 10}
    GET  /health        200 while requests are answered, else 503
    GET  /metrics       counters for Prometheus
    GET  /v1/info       run, catalogue and limits

An error is {"error": "..."}: 4xx for what the client can change, 503 with Retry-After where the service is
full or stopping. What a client sent is never repeated in an answer beyond a few characters.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, field_validator
from starlette.exceptions import HTTPException

from gdrt_ds.errors import UserError
from gdrt_ds.files import finite
from gdrt_ds.inference.recommender import Recommender
from gdrt_ds.inference.recommending import NoScores
from gdrt_ds.serving.limits import BodyLimit
from gdrt_ds.serving.metrics import CountedAnswers, ServiceMetrics
from gdrt_ds.serving.worker import Busy, TooLate, Worker

RETRY_AFTER_S = 1
USUAL_K = 10
"""Length of the list where a request names none."""
SHOWN = 80
"""Characters of a client's text that an error repeats."""


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and how many may wait.

    Attributes:
        batch_size: histories scored at once.
        max_queue: requests that may wait.
        max_wait_s: seconds that a request may wait for the model.
        max_k: length of a list.
        max_titles: titles of a history.
        max_title_chars: characters of a title.
        max_body_bytes: bytes of a request.
        max_body_s: seconds in which a request must have come.
        strict: whether titles that the catalogue does not have are refused.
    """

    batch_size: int = 8
    max_queue: int = 64
    max_wait_s: float = 30.0
    max_k: int = 100
    max_titles: int = 200
    max_title_chars: int = 500
    max_body_bytes: int = 256 << 10
    max_body_s: float = 10.0
    strict: bool = False


def asked_for(limits: Limits) -> type[BaseModel]:
    """Returns the schema of a request."""

    class Asked(BaseModel):
        """A history and the length of the list."""

        model_config = ConfigDict(extra="forbid")
        history: Annotated[
            list[Annotated[StrictStr, Field(min_length=1, max_length=limits.max_title_chars)]],
            Field(min_length=1, max_length=limits.max_titles, description="Titles, oldest first."),
        ]
        k: Annotated[StrictInt, Field(ge=1, le=limits.max_k, description="Length of the list.")] = min(
            USUAL_K, limits.max_k
        )

        @field_validator("history")
        @classmethod
        def is_text(cls, history: list[str]) -> list[str]:
            """JSON can name halves of characters, which no tokenizer takes."""
            for title in history:
                try:
                    title.encode("utf-8")
                except UnicodeEncodeError:
                    raise ValueError("a title is not valid Unicode") from None
                if not title.strip():
                    raise ValueError("a title is blank")
            return history

    return Asked


def make_service(recommender: Recommender, limits: Limits | None = None) -> FastAPI:
    """Returns the application; its worker starts and stops with it.

    Args:
        recommender: what `gdrt_ds.open_run` returns.
        limits: None = the defaults.
    """
    limits = limits or Limits()
    metrics = ServiceMetrics()
    worker = Worker(
        recommender, limits.batch_size, limits.max_queue, limits.max_wait_s, on_batch=metrics.add_batch
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await asyncio.to_thread(worker.stop)

    app = FastAPI(title="gdrt-serve", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimit, max_bytes=limits.max_body_bytes, max_seconds=limits.max_body_s)
    app.add_middleware(CountedAnswers, requests=metrics.requests)  # the last one added is the outermost
    app.state.worker = worker
    _add_error_answers(app)
    _add_recommend(app, worker, metrics, limits)
    _add_reports(app, recommender, worker, metrics, limits)
    return app


def _add_recommend(app: FastAPI, worker: Worker, metrics: ServiceMetrics, limits: Limits) -> None:
    Asked = asked_for(limits)

    async def recommend(asked: Asked) -> Response:  # type: ignore[valid-type]
        start = time.monotonic()
        response = await answer(asked)
        if response.status_code == 200:
            metrics.request_seconds.observe(time.monotonic() - start)
        return response

    async def answer(asked: Any) -> Response:
        unknown = [title for title in dict.fromkeys(asked.history) if title not in worker.titles]
        if limits.strict and unknown:
            return problem(
                422, f"{len(unknown)} titles are not in the catalogue, e.g. {unknown[0][:SHOWN]!r}"
            )
        try:
            found = await asyncio.wrap_future(worker.submit(asked.history, asked.k))
        except (Busy, TooLate) as busy:
            return problem(503, str(busy), {"retry-after": str(RETRY_AFTER_S)})
        except NoScores as error:
            return problem(500, error.problem)
        except UserError as error:
            return problem(422, error.problem[: 4 * SHOWN])
        except Exception as error:
            return problem(500, f"the model failed on this request ({type(error).__name__})")
        rows = found.recommendations
        return JSONResponse(
            finite(
                {
                    "recommendations": rows,
                    # Every title was scored, so every place is proven.
                    "certified": len(rows),
                    "unknown": found.unknown,
                    "dropped": found.dropped,
                }
            )
        )

    # The schema is a local class, which an annotation kept as text does not find.
    recommend.__annotations__["asked"] = Asked
    app.post("/v1/recommend")(recommend)


def _add_reports(
    app: FastAPI, recommender: Recommender, worker: Worker, metrics: ServiceMetrics, limits: Limits
) -> None:
    @app.get("/health")
    async def health() -> Response:
        if not worker.alive:
            return problem(503, "the model's thread has ended")
        return JSONResponse({"status": "ok", "waiting": worker.waiting})

    @app.get("/metrics")
    async def numbers() -> Response:
        metrics.waiting.set(worker.waiting)
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/info")
    async def info() -> Response:
        config = recommender.config
        return JSONResponse(
            {
                "objective": config.objective,
                "base": config.model.path,
                "adapter": recommender.adapter is not None,
                "titles": len(recommender.catalogue),
                "precision": recommender.precision,
                "limits": asdict(limits),
            }
        )


def _add_error_answers(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def wrong_request(request: Request, error: RequestValidationError) -> Response:
        # The library's own answer repeats the input, which may be large, or NaN, which JSON cannot hold.
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:])
        text = str(first["msg"])
        return problem(422, f"{place[:SHOWN]}: {text[:SHOWN]}" if place else text[:SHOWN])

    @app.exception_handler(HTTPException)
    async def wrong_route(request: Request, error: HTTPException) -> Response:
        return problem(error.status_code, str(error.detail), dict(error.headers or {}))


def problem(status: int, text: str, headers: dict[str, str] | None = None) -> Response:
    """An answer that says what is wrong."""
    return JSONResponse({"error": text.encode("utf-8", "replace").decode()}, status, headers)
