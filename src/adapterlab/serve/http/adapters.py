"""Adapters come and go: our `/v1/adapters`, and vLLM's two endpoints."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends
from fastapi.responses import PlainTextResponse

from adapterlab.errors import ConfigError, UnknownAdapterError
from adapterlab.serve.http.access import needs, service_of
from adapterlab.serve.http.bodies import body
from adapterlab.serve.http.keys import Caller
from adapterlab.serve.http.schemas import LoadLora, PutAdapter, UnloadLora
from adapterlab.serve.http.service import Service
from adapterlab.serve.requests import AdapterState

router = APIRouter(prefix="/v1")
See = Annotated[Caller, Depends(needs("infer"))]
Change = Annotated[Caller, Depends(needs("admin"))]
Here = Annotated[Service, Depends(service_of)]
Put = Annotated[PutAdapter, Depends(body(PutAdapter, "admin"))]
Load = Annotated[LoadLora, Depends(body(LoadLora, "admin"))]
Unload = Annotated[UnloadLora, Depends(body(UnloadLora, "admin"))]


@router.get("/adapters")
async def adapters(caller: See, service: Here) -> dict[str, Any]:
    """List the adapters that the caller sees."""
    states = await service.call(service.engine.adapters, caller.tenant)
    return {"object": "list", "data": [_written(service, state) for state in states]}


@router.get("/adapters/{name:path}")
async def adapter(name: str, caller: See, service: Here) -> dict[str, Any]:
    """Describe an adapter."""
    return _written(service, await service.call(service.engine.adapter, name, caller.tenant))


@router.put("/adapters/{name:path}")
async def put(name: str, wish: Put, caller: Change, service: Here) -> dict[str, Any]:
    """Register an adapter, or a new version of it; load, pin or unpin it."""
    service.check_open()
    return _written(service, await service.change(_put, service, name, wish, caller.tenant))


@router.delete("/adapters/{name:path}")
async def delete(name: str, caller: Change, service: Here) -> dict[str, Any]:
    """Forget an adapter; requests that run with it are answered."""
    service.check_open()
    await service.change(service.unregister, name, caller.tenant)
    return {"id": name, "object": "adapter", "deleted": True}


@router.post("/load_lora_adapter")
async def load(wish: Load, caller: Change, service: Here) -> PlainTextResponse:
    """Register an adapter as vLLM does: a name that is taken is refused, unless `load_inplace`."""
    service.check_open()
    name = wish.lora_name
    if not wish.load_inplace and await service.change(_own, service, name, caller.tenant) is not None:
        raise ConfigError(f"The adapter {name!r} is loaded already. Set load_inplace to replace it by a new version.")
    await service.change(service.register, name, wish.lora_path, caller.tenant)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


@router.post("/unload_lora_adapter")
async def unload(wish: Unload, caller: Change, service: Here) -> PlainTextResponse:
    """Forget an adapter as vLLM does."""
    service.check_open()
    await service.change(service.unregister, wish.lora_name, caller.tenant)
    return PlainTextResponse(f"Success: LoRA adapter '{wish.lora_name}' removed successfully.")


def _put(service: Service, name: str, wish: PutAdapter, tenant: str | None) -> AdapterState:
    state = _own(service, name, tenant)
    if wish.path is not None or state is None:
        state = service.register(name, wish.path or name, tenant, pinned=bool(wish.pinned))
    elif wish.pinned is not None:
        state = service.pin(name, tenant, wish.pinned)
    return service.engine.warm(name, tenant) if wish.warm else state


def _own(service: Service, name: str, tenant: str | None) -> AdapterState | None:
    """The adapter of exactly this tenant: one of everybody's is hidden by a tenant's of the same name, not changed."""
    try:
        state = service.engine.adapter(name, tenant)
    except UnknownAdapterError:
        return None
    return state if state.tenant == tenant else None


def _written(service: Service, state: AdapterState) -> dict[str, Any]:
    return {
        "id": state.name, "object": "adapter", "tenant": state.tenant, "version": state.version,
        "path": service.told(state.folder), "method": state.method, "form": state.form, "state": state.state,
        "reason": service.told(state.reason), "pinned": state.pinned, "running": state.running,
        "waiting": state.waiting, "bytes": state.bytes,
    }  # fmt: skip
