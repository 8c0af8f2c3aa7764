"""A root that calls all it holds cannot keep shared tensors."""

from __future__ import annotations

import pytest
from torch import nn

from adapterlab.errors import AttachError
from adapterlab.hosts import Host


def test_shared_tensors_are_refused_on_a_plain_sequence() -> None:
    host = Host(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(AttachError, match=r"Sequential calls every module it holds.*inside a module of your own"):
        host.share("a", "key", nn.Linear(2, 2))
