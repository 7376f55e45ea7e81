"""Pictures over HTTP: requests of any size and policy share one pool, wait for their turn, and are
refused with numbers where they never fit.

    python examples/server.py --memory 64MiB
    curl localhost:8000/pictures -H 'content-type: application/json' -o pictures.png \\
        -d '{"labels": [3, 14], "policy": "centroid", "budget": "2%", "kv_dtype": "int4"}'
    curl localhost:8000/metrics

A request waits without a thread. One whose client goes away gives its place up, or stops drawing
where it next asks for pages.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import lru_cache
from queue import SimpleQueue
from typing import Annotated

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from PIL import Image
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from pydantic import BaseModel, Field

import kvruntime
from kvruntime.planning import Plan
from kvruntime.reference import load_classes, load_model
from kvruntime.reference.transformer import EmojiVAR
from kvruntime.telemetry import Collector

PAGE_BYTES, PLANE_BYTES = 2**10, 2**7  # small ones, for small budgets of a small model
CLIENT_GONE = 499  # as nginx says


class Wish(BaseModel):
    """What a client asks for."""

    labels: list[Annotated[int, Field(ge=0)]] = Field(min_length=1, max_length=256)
    seed: int = 0
    policy: str = "scalekv"
    budget: int | float | str = 0.10
    kv_dtype: str | None = None


class Painter:
    """The models, and the pool that they share. One model a thread: its modules keep the state of
    one forward.
    """

    def __init__(self, memory: str, models: int, most_waiting: int) -> None:
        self._planner = load_model()  # draws nothing: plans of every wish come from it
        self._free: SimpleQueue[EmojiVAR] = SimpleQueue()
        for _ in range(models):
            self._free.put(load_model())
        self._threads = ThreadPoolExecutor(models)  # as many: nobody with a place waits for one
        self.num_classes = len(load_classes())
        self.pool = kvruntime.Pool(memory, page_bytes=PAGE_BYTES, plane_bytes=PLANE_BYTES)
        self.admission = kvruntime.Admission(
            self.pool,
            most_underway=models,  # so that whoever has a place finds a model
            most_waiting=most_waiting,
        )
        self.plan = lru_cache(maxsize=1024)(self._plan)

    def _plan(
        self, pictures: int, policy: str, budget: int | float | str, kv_dtype: str | None
    ) -> Plan:
        with kvruntime.attach(
            self._planner, policy, budget, kv_dtype=kv_dtype, admission=self.admission
        ) as attached:
            return attached.plan(pictures)

    async def paint(self, wish: Wish, ticket: kvruntime.Ticket) -> bytes:
        """``draw`` in a thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self.draw, wish, ticket)

    def draw(self, wish: Wish, ticket: kvruntime.Ticket) -> bytes:
        """A PNG of the pictures beside each other."""
        model = self._free.get()  # one has left the pool, or is about to give its model back
        try:
            with kvruntime.attach(
                model, wish.policy, wish.budget, kv_dtype=wish.kv_dtype, admission=self.admission
            ) as attached:
                attached.use(ticket)
                pictures = model.generate(torch.tensor(wish.labels), seed=wish.seed)
        finally:
            self._free.put(model)
        strip = torch.cat(list(pictures.clamp(0, 1)), dim=2).permute(1, 2, 0)
        png = io.BytesIO()
        Image.fromarray((255 * strip).round().to(torch.uint8).numpy()).save(png, "png")
        return png.getvalue()


class Metrics:
    """What Prometheus reads: pages, places, and how requests ended."""

    def __init__(self, painter: Painter) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(Collector(painter.admission))
        self.ended = Counter(
            "kvruntime_requests", "Requests, by how they ended.", ["how"], registry=self.registry
        )
        self.seconds = Histogram(
            "kvruntime_request_seconds", "From a request to its pictures.", registry=self.registry
        )


def make_app(memory: str = "64MiB", models: int = 4, most_waiting: int = 256) -> FastAPI:
    """The server."""
    painter = Painter(memory, models, most_waiting)
    metrics = Metrics(painter)
    app = FastAPI(title="kvruntime")
    app.state.painter = painter

    @app.post("/pictures")
    async def pictures(wish: Wish, request: Request) -> Response:
        began = time.monotonic()
        try:
            png = await _paint(painter, wish, request)
        except HTTPException as error:
            metrics.ended.labels(str(error.status_code)).inc()
            raise
        metrics.ended.labels("200").inc()
        metrics.seconds.observe(time.monotonic() - began)
        return Response(png, media_type="image/png")

    @app.get("/metrics")
    def read_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


async def _paint(painter: Painter, wish: Wish, request: Request) -> bytes:
    if max(wish.labels) >= painter.num_classes:
        raise HTTPException(422, f"labels must be below {painter.num_classes}")
    try:
        plan = painter.plan(len(wish.labels), wish.policy, wish.budget, wish.kv_dtype)
        ticket = painter.admission.submit(plan)
    except kvruntime.WillNeverFit as error:
        raise HTTPException(413, str(error)) from None
    except kvruntime.QueueFull as error:
        raise HTTPException(429, str(error), {"retry-after": "1"}) from None
    except ValueError as error:
        raise HTTPException(422, str(error)) from None
    with ticket:
        async with _cancelled_if_gone(request, ticket):
            try:
                await ticket.started()
                return await painter.paint(wish, ticket)
            except kvruntime.Cancelled:
                raise HTTPException(CLIENT_GONE, "the client went away") from None


@asynccontextmanager
async def _cancelled_if_gone(request: Request, ticket: kvruntime.Ticket) -> AsyncIterator[None]:
    """Meanwhile cancel the ticket if the client hangs up."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        ticket.cancel()

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", default="64MiB", help="of the pool: 20GiB, 80%%")
    parser.add_argument("--models", type=int, default=4, help="that draw at a time")
    parser.add_argument("--most-waiting", type=int, default=256)
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    app = make_app(arguments.memory, arguments.models, arguments.most_waiting)
    uvicorn.run(app, port=arguments.port)


if __name__ == "__main__":
    main()
