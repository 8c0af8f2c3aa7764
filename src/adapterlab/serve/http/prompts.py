"""From what was asked to tokens: conversations through chat templates, the adapter's own where it has one."""

from __future__ import annotations

import copy
from collections import OrderedDict
from pathlib import Path
from typing import Any

from adapterlab.data import prompt_and_unshown
from adapterlab.errors import ConfigError, DataError, FormatError
from adapterlab.io.files import read_json
from adapterlab.io.links import check_links
from adapterlab.serve.http.schemas import ChatWish

_FILES = ("chat_template.jinja", "tokenizer_config.json")
_LARGEST = 1 << 20  # bytes of a file that holds a chat template; templates in use have a few thousand
_KEPT = 256


class Prompts:
    """Makes tokens of what was asked. One thread at a time may use it: tokenizers change while they work.

    Attributes:
        tokenizer: of the base, a copy.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = copy.deepcopy(tokenizer)  # the engine's thread uses the other one
        self._own: OrderedDict[str, Any] = OrderedDict()
        self._special = frozenset(tokenizer.all_special_ids)

    def text(self, prompt: str | list[int]) -> tuple[int, ...]:
        """Tokens of a text as it stands, or the tokens that were given."""
        if isinstance(prompt, str):
            return tuple(self.tokenizer(prompt, verbose=False)["input_ids"])
        return tuple(prompt)

    def one(self, id: int) -> str:
        """The text of a token; any thread may ask for it."""
        return str(self.tokenizer.decode([id]))

    def is_special(self, id: int) -> bool:
        """Whether a token stands for no text, such as the end of an answer."""
        return id in self._special

    def chat(self, wish: ChatWish, template: str | None = None) -> tuple[int, ...]:
        """Tokens of a conversation up to the opening of the answer.

        Args:
            wish: with the messages and tools.
            template: of the adapter, or None for the base's.

        Raises:
            ConfigError: the template cannot render the conversation, or leaves a part of it out.
        """
        messages = [message.plain for message in wish.messages]
        try:
            ids, unshown = prompt_and_unshown(messages, wish.context, self._with(template))
        except DataError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ConfigError(
                f"The chat template cannot render this conversation (roles: {roles}): {error.__cause__ or error}"
            ) from None
        except (TypeError, UnicodeError) as error:
            raise ConfigError(f"This conversation is no text that the tokenizer reads: {error}.") from None
        if unshown:
            lost = "; ".join(one.removeprefix("column ") for one in unshown)
            raise ConfigError(
                f"The chat template does not show all of this conversation: {lost}. Leave it out, or "
                "write it into the content of a message."
            )
        return tuple(ids)

    def _with(self, template: str | None) -> Any:
        """The tokenizer with another template; a few are kept, since adapters of one training share theirs."""
        if template is None or template == self.tokenizer.chat_template:
            return self.tokenizer
        if template not in self._own:
            own = copy.copy(self.tokenizer)
            own.chat_template = template
            self._own[template] = own
        self._own.move_to_end(template)
        while len(self._own) > _KEPT:
            self._own.popitem(last=False)
        return self._own[template]


def template_in(folder: Path) -> str | None:
    """Return the chat template that an adapter's folder brings, or None.

    Raises:
        FormatError: its file is damaged, too large, or leads out of the folder.
    """
    check_links(folder, *_FILES)
    jinja, config = (folder / name for name in _FILES)
    for file in (jinja, config):
        if file.is_file() and file.stat().st_size > _LARGEST:
            raise FormatError(f"{file.name} in {folder.name} is larger than any chat template: over {_LARGEST} bytes.")
    if jinja.is_file():
        try:
            return jinja.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise FormatError(f"{jinja.name} in {folder.name} cannot be read: {error}.") from None
    found = read_json(config).get("chat_template") if config.is_file() else None
    if isinstance(found, list):  # several with names, as older folders have them
        found = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}.get("default")
    if not isinstance(found, str | None):
        raise FormatError(f"The chat_template in {config.name} of {folder.name} is no text. Save the adapter again.")
    return found
