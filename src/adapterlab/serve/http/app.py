"""The application: routes, and errors in the form that OpenAI's clients understand."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from adapterlab.errors import AdapterlabError
from adapterlab.serve.http import adapters, completions, generate, health
from adapterlab.serve.http.announcing import Announcer
from adapterlab.serve.http.faults import Refusal
from adapterlab.serve.http.gate import Gate
from adapterlab.serve.http.service import Service
from adapterlab.version import __version__

log = logging.getLogger("adapterlab.serve")


def build(
    service: Service,
    failed: Callable[[BaseException], None] | None = None,
    announcer: Announcer | None = None,
) -> FastAPI:
    """Make the application.

    Args:
        service: to serve; it is closed when the application ends.
        failed: called when the engine cannot be started again.
        announcer: of this server.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(service.watch())
        watching.add_done_callback(lambda task: _tell(task, failed))
        announcing = asyncio.create_task(announcer.run()) if announcer is not None else None
        yield
        for task in filter(None, (watching, announcing)):
            task.cancel()
        await asyncio.to_thread(service.close)

    app = FastAPI(title="adapterlab", version=__version__, openapi_url=None, lifespan=lifespan)
    app.state.service = service
    for part in (completions, generate, adapters, health):
        app.include_router(part.router)
    app.add_middleware(Gate, limits=service.limits)
    app.add_exception_handler(AdapterlabError, _error)
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(HTTPException, _http)
    return app


def _tell(task: asyncio.Task[None], failed: Callable[[BaseException], None] | None) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.critical("the engine cannot be started again: %s", error)
        if failed is not None:
            failed(error)


def _response(request: Request, refusal: Refusal) -> JSONResponse:
    request.app.state.service.metrics.refused.labels(refusal.status).inc()
    body = refusal.plain if request.url.path in generate.PATHS else refusal.body
    return JSONResponse(body, refusal.status, refusal.headers)


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Refusal)
    return _response(request, error)


async def _error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, AdapterlabError)
    return _response(request, request.app.state.service.refusal(error))


async def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    known = {404: f"There is nothing at {request.url.path}.", 405: f"{request.method} is not for {request.url.path}."}
    text = known.get(error.status_code, error.detail)
    return _response(request, Refusal(error.status_code, text, headers=error.headers))
