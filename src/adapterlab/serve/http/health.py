"""What machines ask: is it alive, may requests come, what was counted."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Response

from adapterlab.serve.http.access import needs, service_of
from adapterlab.serve.http.service import Service

router = APIRouter()
Here = Annotated[Service, Depends(service_of)]


@router.get("/health")
async def health(service: Here) -> dict[str, str]:
    """200 while the engine computes; and how updates of several adapters are."""
    if not service.alive:
        service.check_open()
    return {"status": "ok", "products": service.engine.products}


@router.get("/ready")
async def ready(service: Here) -> dict[str, str]:
    """200 while requests are taken."""
    service.check_open()
    return {"status": "ready"}


@router.get("/metrics", dependencies=[Depends(needs("admin"))])
async def metrics(service: Here) -> Response:
    """Counts for Prometheus; they name adapters of all tenants."""
    text = await service.call(service.metrics.text)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")
