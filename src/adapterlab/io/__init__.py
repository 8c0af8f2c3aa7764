"""Adapter folders: ours, and HF PEFT's two files; writes are atomic."""

from adapterlab.io.folder import AdapterInfo, read_info, save

__all__ = ["AdapterInfo", "read_info", "save"]
