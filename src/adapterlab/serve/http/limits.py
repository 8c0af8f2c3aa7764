"""What one request, and one adapter, may take."""

from __future__ import annotations

from pydantic import Field

from adapterlab.serve.requests import EngineSettings
from adapterlab.settings import Settings


class Limits(Settings):
    """Bounds on what strangers may ask for; whatever passes one is refused with the bound's name."""

    body_bytes: int = Field(1 << 20, ge=1, description="of the body of a request")
    answer_tokens: int = Field(4096, ge=1, description="of one answer")
    answers: int = Field(16, ge=1, description="that one request may ask for: its prompts times n")
    seconds: float = Field(600, gt=0, description="that one request may take, from its first byte to its last")
    drain_seconds: float = Field(30, ge=0, description="that running requests get when the server is asked to end")
    adapters: int = Field(100_000, ge=1, description="that may be registered at the same time")
    adapter_bytes: int = Field(4 << 30, ge=1, description="of an adapter's tensors on disk")
    adapter_tensors: int = Field(50_000, ge=1, description="in an adapter's file")
    adapter_rank: int = Field(512, ge=1, description="of an adapter, where its method has one")


class ServerSettings(Settings):
    """What `adapterlab serve` can be told besides its options."""

    engine: EngineSettings = Field(EngineSettings(), description="what the engine may take, and how it chooses")
    limits: Limits = Field(Limits(), description="what one request, and one adapter, may take")
