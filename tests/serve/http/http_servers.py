"""Servers on a port of this machine, with an engine that has no model; imported where the packages are there."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import torch
from fake_engine import FakeEngine
from safetensors.torch import save_file

from adapterlab.serve.http.service import Service

ASK = [{"role": "user", "content": "1+1="}]


@dataclass
class Server:
    """A running server.

    Attributes:
        url: its address.
        service: behind it.
        uvicorn: the server itself.
        thread: it runs in.
    """

    url: str
    service: Service
    uvicorn: Any
    thread: threading.Thread

    @property
    def engine(self) -> FakeEngine:
        assert isinstance(self.service.engine, FakeEngine)
        return self.service.engine

    def openai(self, key: str = "none") -> Any:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def stop(self) -> None:
        if isinstance(self.service.engine, FakeEngine):
            self.engine.flowing.set()
        self.uvicorn.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()


def write_adapter(folder: Path, *, r: int = 4, template: str | None = None) -> Path:
    """A folder that looks like an adapter of PEFT's."""
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "tiny"}))
    save_file({"base_model.model.x.lora_A.weight": torch.ones(r, 2)}, folder / "adapter_model.safetensors")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def ask(
    server: Server, method: str, path: str, body: Any = None, key: str | None = None, **headers: str
) -> tuple[int, Any, Any]:
    """Send a request; return status, body read as JSON where it is, and headers."""
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    given = {"Content-Type": "application/json", **headers, **({"Authorization": f"Bearer {key}"} if key else {})}
    request = urllib.request.Request(server.url + path, data, given, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, _read(response.read()), response.headers
    except urllib.error.HTTPError as error:
        return error.code, _read(error.read()), error.headers


def post(server: Server, path: str, body: Any, key: str | None = None) -> tuple[int, Any, Any]:
    return ask(server, "POST", path, body, key)


def _read(text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text.decode()


TOOLS = (
    "{% if tools %}{% for t in tools %}{{ t['function']['name'] }}{% endfor %}<tool_call>{% endif %}"
    "{% for m in messages %}{{ m['content'] }}>{% endfor %}"
)
