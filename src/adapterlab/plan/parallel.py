"""What is asked of several devices: how a step is divided among them, and what connects them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from adapterlab.errors import ConfigError, nearest

PLACED = "device_map"  # one process, whose model's layers lie on several devices
KINDS = ("ddp", "fsdp", "zero2", "zero3", PLACED)
SPLIT = ("fsdp", "zero2", "zero3")  # kinds in which every device holds a part of each weight
MOST = 1 << 16  # devices
# name: 10^9 bytes a second that one device sends while it receives as many, as the standards and datasheets have it
LINKS: dict[str, float] = {
    "nvlink3": 300, "nvlink": 450, "nvlink4": 450, "nvlink5": 900,  # A100; H100 and H200; B200
    "pcie3": 15.75, "pcie4": 31.5, "pcie5": 63,  # 16 lanes
    "10gbe": 1.25, "25gbe": 3.125, "100gbe": 12.5, "200gbe": 25, "400gbe": 50,
    "hdr": 25, "ndr": 50, "xdr": 100,  # InfiniBand with 200, 400 and 800 Gbit/s a port
}  # fmt: skip


@dataclass(frozen=True)
class Link:
    """A connection between devices.

    Attributes:
        name: as given.
        rate: bytes a second and direction; what is reached is less.
    """

    name: str
    rate: float

    @classmethod
    def parse(cls, text: str) -> Link:
        """Read a link: a name of `LINKS`, or 10^9 bytes a second (`12.5`, `12.5GB/s`).

        Raises:
            ConfigError: it is neither, or no speed.
        """
        name = text.strip().lower().replace(" ", "")
        if name in LINKS:
            return cls(text, LINKS[name] * 1e9)
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(?:gb(?:/s)?)?", name)
        if not match or not float(match[1]):
            raise ConfigError(
                f"link={text!r} is unknown. {nearest(name, LINKS)} Write one of these names, or 10^9 bytes a second "
                "and direction, such as 12.5."
            )
        return cls(f"{float(match[1]):g} GB/s", float(match[1]) * 1e9)


@dataclass(frozen=True)
class Parallel:
    """How a step is divided.

    Attributes:
        kind: ddp, fsdp, zero2, zero3 or device_map.
        devices: how many.
        link: between them; None when the time on it does not matter.
    """

    kind: str
    devices: int
    link: Link | None = None

    @classmethod
    def parse(cls, devices: int | None, kind: str | None, link: str | Link | None = None) -> Parallel | None:
        """Read what was asked for; None is one device.

        Raises:
            ConfigError: the three do not make sense together.
        """
        if devices is not None and not 1 <= devices <= MOST:
            raise ConfigError(f"devices={devices} is no number of devices: it lies between 1 and {MOST:,}.")
        if kind is not None and kind not in KINDS:
            raise ConfigError(f"parallel={kind!r} is unknown. {nearest(kind, KINDS)}")
        if devices in (None, 1):
            given = {"parallel": kind, "link": link}
            said = ", ".join(f"{key}={value!r}" for key, value in given.items() if value is not None)
            if said:
                raise ConfigError(
                    f"{said} needs several devices, and devices={devices or 1}: nothing is divided or sent. Give "
                    "devices=2 or more, or leave it out."
                )
            return None
        if kind is None:
            raise ConfigError(f"devices={devices} says not how: add parallel, one of {', '.join(KINDS)}.")
        if kind == PLACED and link is not None:
            raise ConfigError(
                f"link={link!r} is for devices that send gradients or weights, and parallel={PLACED} places one model "
                "over all: nothing but hidden states goes from one to the next. Leave link out."
            )
        return cls(kind, int(devices), Link.parse(link) if isinstance(link, str) else link)


@dataclass(frozen=True)
class Traffic:
    """What a device sends to others in a step; it receives as many.

    Attributes:
        gathered: bytes of weights; reduced: bytes of gradients, and of what they have changed.
        link: name; seconds: time on it at its best rate, if nothing is computed meanwhile. None without a link.
        waited: bytes of these that the step waits for: they go when the backward pass is over. The others may go while
            something is computed.
    """

    gathered: int
    reduced: int
    link: str | None = None
    seconds: float | None = None
    waited: int = 0

    @property
    def sent(self) -> int:
        """Bytes altogether."""
        return self.gathered + self.reduced
