"""Adapter folders: ours, and HF PEFT's two files; writes are atomic."""

from adapterlab.io.folder import read_info, save
from adapterlab.io.info import AdapterInfo

__all__ = ["AdapterInfo", "read_info", "save"]
