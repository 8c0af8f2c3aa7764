"""A process that ends with whoever started it."""

from __future__ import annotations

import os
import signal
import threading
import time

STOPPED = 130  # exit status


def stop_with_parent() -> None:
    """End when the process that holds the other end of the standard input ends, however that happens."""

    def watch() -> None:
        while os.read(0, 1):  # not through sys.stdin, whose lock would be in the way when Python ends
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)  # a training saves its checkpoint and leaves by itself
        os._exit(STOPPED)

    if os.environ.get("ADAPTERLAB_LIFELINE"):
        threading.Thread(target=watch, daemon=True).start()
