"""Adapter folders: written atomically, readable by HF PEFT where PEFT has the method."""

from adapterlab.io.folder import AdapterInfo, load, read_info, save

__all__ = ["AdapterInfo", "load", "read_info", "save"]
