"""A folder of adapters, and servers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from transformers import AutoTokenizer

from tiny_folder import write_model

if TYPE_CHECKING:
    from http_servers import Server


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with adapters of everybody and of two tenants, and things outside of it."""
    from http_servers import TOOLS, write_adapter

    home = tmp_path_factory.mktemp("home")
    root = home / "adapters"
    write_adapter(root / "sums")
    write_adapter(root / "team" / "words", template=TOOLS)
    write_adapter(root / "large", r=64)
    write_adapter(root / "@acme" / "own")
    write_adapter(root / "@other" / "own")
    write_adapter(home / "outside")
    (root / "link").symlink_to(home / "outside")
    return root


@pytest.fixture(scope="session")
def make_server(tokenizer: Any, shelf: Path) -> Callable[..., Server]:
    import uvicorn
    from fake_engine import FakeEngine
    from http_servers import Server

    from adapterlab.serve.http.app import build
    from adapterlab.serve.http.grammar import Grammars
    from adapterlab.serve.http.keys import Keys
    from adapterlab.serve.http.limits import Limits
    from adapterlab.serve.http.service import Service
    from adapterlab.serve.http.shelf import Shelf

    def make(
        keys: Path | None = None, engine: Callable[[], Any] | None = None, root: Path = shelf,
        tokenizer: Any = tokenizer, **limits: Any,
    ) -> Server:  # fmt: skip
        bounds = Limits(**{"adapter_rank": 32, "drain_seconds": 5, **limits})
        service = Service(
            engine or (lambda: FakeEngine(tokenizer)), tokenizer, base="base", shelf=Shelf(root, bounds), window=64,
            grammars=Grammars(tokenizer, len(tokenizer), [2]), keys=Keys(keys) if keys else None, limits=bounds,
        )  # fmt: skip
        service.register_found()
        config = uvicorn.Config(build(service), port=0, log_config=None, access_log=False, timeout_graceful_shutdown=6)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        until = time.monotonic() + 20
        while not server.started:
            assert thread.is_alive()
            assert time.monotonic() < until
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        return Server(f"http://127.0.0.1:{port}", service, server, thread)

    return make


@pytest.fixture(scope="session")
def server(make_server: Callable[..., Server]) -> Iterator[Server]:
    """A server without keys, for tests that leave it as it was."""
    made = make_server()
    yield made
    made.stop()
