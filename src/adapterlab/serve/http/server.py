"""Run the application until it is asked to end."""

from __future__ import annotations

from adapterlab.errors import ConfigError, ServingError, require
from adapterlab.serve.http.service import Service


def check_packages() -> None:
    """Require what the extra `serve` brings, before anything is loaded.

    Raises:
        MissingDependencyError: a package is missing.
    """
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        require(package, "serve", "to serve over HTTP")


def check_address(host: str, *, keys: bool) -> None:
    """Refuse to let others in without keys.

    Args:
        host: to listen on.
        keys: whether there are any.

    Raises:
        ConfigError: the address is not this machine's own, and there are none.
    """
    from adapterlab.serve.http.access import is_local

    if not keys and not is_local(host):
        raise ConfigError(
            f"--host {host} lets others in, and there are no keys. Make one with adapterlab keys add NAME, and start "
            "with --keys keys.json."
        )


def run(service: Service, host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT; what runs then is finished, as long as the limits allow.

    Raises:
        ServingError: the engine failed again and again.
    """
    import uvicorn

    from adapterlab.serve.http.app import build

    failures: list[BaseException] = []

    def failed(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    config = uvicorn.Config(
        build(service, failed), host, port, log_config=None, access_log=False, server_header=False,
        timeout_graceful_shutdown=int(service.limits.drain_seconds) + 1,
    )  # fmt: skip
    server = uvicorn.Server(config)
    server.run()
    if failures:
        raise ServingError(str(failures[0]))
