"""Answers that keep to a JSON schema, by xgrammar where it is installed."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from adapterlab.errors import ConfigError, require

_LARGEST = 1 << 16  # characters of a schema
_KEPT = 64  # compiled schemas: programs ask with the same few again and again

Processors = Callable[[], list[Any]]  # makes the logits processors of one answer


class Grammars:
    """Compiles schemas for one vocabulary. One thread at a time may use it.

    Args:
        tokenizer: of the base.
        vocabulary: logits that the model gives for a token.
        ends: tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, ends: Sequence[int]):
        self.tokenizer, self.vocabulary, self.ends = tokenizer, vocabulary, list(ends)
        self._compiler: Any = None
        self._compiled: OrderedDict[str, Any] = OrderedDict()

    def processors(self, schema: dict[str, Any]) -> Processors:
        """Return what makes the logits processors of one answer.

        Args:
            schema: to keep to; {}: any JSON.

        Raises:
            MissingDependencyError: xgrammar is not installed.
            ConfigError: the schema is not valid, too large, or says something that is not understood.
        """
        require("xgrammar", "structured", "to keep answers to a JSON schema")
        from xgrammar.contrib.hf import LogitsProcessor

        compiled = self._compile(json.dumps(schema))
        return lambda: [LogitsProcessor(compiled)]

    def _compile(self, schema: str) -> Any:
        if len(schema) > _LARGEST:
            raise ConfigError(f"The JSON schema has {len(schema):,} characters; up to {_LARGEST:,} are compiled.")
        if schema not in self._compiled:
            try:
                compiler = self._compiler_of()
                self._compiled[schema] = (
                    compiler.compile_builtin_json_grammar() if schema == "{}" else compiler.compile_json_schema(schema)
                )
            except (RuntimeError, ValueError) as error:
                what = str(error).strip().splitlines()[-1:]
                raise ConfigError(f"The JSON schema cannot be used: {' '.join(what)}") from None
        self._compiled.move_to_end(schema)
        while len(self._compiled) > _KEPT:
            self._compiled.popitem(last=False)
        return self._compiled[schema]

    def _compiler_of(self) -> Any:
        if self._compiler is None:
            import xgrammar

            info = xgrammar.TokenizerInfo.from_huggingface(
                self.tokenizer, vocab_size=self.vocabulary, stop_token_ids=self.ends
            )
            self._compiler = xgrammar.GrammarCompiler(info)
        return self._compiler
