"""Pages of keys and values: which are free, who holds the others, and which hold a prefix that may come again.

Bookkeeping alone; the numbers lie elsewhere. Adapters are paid for in pages too, so that there is one budget and its
border moves by itself: what nobody holds may become either.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

ZERO = 0  # a page of zeros that nobody takes: what tables are filled up with


class Pages:
    """Pages 1 to `count`, each free or held by one or several.

    Attributes:
        count: all there are.
        paid: pages that are paid for adapters: none in particular, but so many stay free.
    """

    def __init__(self, count: int):
        self.count, self.paid = count, 0
        self._free = list(range(1, count + 1))  # a heap: low numbers first, so that little memory is touched
        self._held: Counter[int] = Counter()

    @property
    def available(self) -> int:
        """Pages that can be taken or paid."""
        return len(self._free) - self.paid

    @property
    def held(self) -> int:
        """Pages that somebody holds."""
        return len(self._held)

    def holders(self, page: int) -> int:
        """How many hold a page."""
        return self._held[page]

    def take(self, count: int) -> list[int]:
        """Take pages, each held once; whoever asks has seen that they are available."""
        if count > self.available:
            raise ValueError(f"{count} pages are asked for, and {self.available} are available.")
        taken = [heapq.heappop(self._free) for _ in range(count)]
        self._held.update(taken)
        return taken

    def hold(self, pages: Sequence[int]) -> None:
        """Hold pages once more."""
        self._held.update(pages)

    def drop(self, pages: Sequence[int]) -> None:
        """Let pages go; those that nobody holds any more are free."""
        for page in pages:
            if self._held[page] < 1:
                raise ValueError(f"Page {page} is let go, and nobody holds it.")
            self._held[page] -= 1
            if not self._held[page]:
                del self._held[page]
                heapq.heappush(self._free, page)

    def pay(self, count: int) -> None:
        """Keep so many more pages free for an adapter, or fewer for a negative count."""
        if count > self.available or self.paid + count < 0:
            raise ValueError(f"{count} pages are to be paid, where {self.available} are available, {self.paid} paid.")
        self.paid += count


Root = tuple[int, str | None]  # whose keys and values: number of the adapter's version (0: the base), and the tenant


@dataclass
class _Node:
    """A full page of a prefix."""

    page: int
    key: tuple[Hashable, tuple[int, ...]]  # what comes before it, and its tokens
    root: Root
    parent: _Node | None
    children: int = 0


class PrefixCache:
    """Full pages of prefixes that were computed, kept until somebody needs the room.

    A page is found by the tokens in it, the page before it, and a root: whose keys and values they are. Tokens are
    compared and not hashed alone, so nothing can be taken for something else.
    """

    def __init__(self, pages: Pages, size: int):
        """Keep pages of `size` tokens of a pool."""
        self.pages, self.size = pages, size
        self._nodes: OrderedDict[Hashable, _Node] = OrderedDict()  # by key, the one used longest ago first

    def __len__(self) -> int:
        return len(self._nodes)

    @property
    def idle(self) -> int:
        """Pages that nobody but the cache holds."""
        return sum(self.pages.holders(node.page) == 1 for node in self._nodes.values())

    def find(self, root: Root, tokens: Sequence[int]) -> list[int]:
        """Return the pages of the longest prefix that is there, held once more for who asks."""
        nodes = self._path(root, tokens)
        self._touch(nodes)
        pages = [node.page for node in nodes]
        self.pages.hold(pages)
        return pages

    def keep(self, root: Root, tokens: Sequence[int], pages: Sequence[int]) -> None:
        """Keep the full pages of some tokens; where there are such pages already, those."""
        nodes = self._path(root, tokens)
        for start in range(len(nodes) * self.size, len(tokens) - self.size + 1, self.size):
            parent = nodes[-1] if nodes else None
            key = (root if parent is None else id(parent), tuple(tokens[start : start + self.size]))
            node = _Node(pages[start // self.size], key, root, parent)
            self.pages.hold([node.page])
            self._nodes[key] = node
            if parent is not None:
                parent.children += 1
            nodes.append(node)
        self._touch(nodes)

    def give_up(self, count: int) -> int:
        """Free pages that nobody else holds, those used longest ago first; return how many, `count` at most."""
        given = 0
        while given < count:
            loose = (n for n in self._nodes.values() if not n.children and self.pages.holders(n.page) == 1)
            found = list(itertools.islice(loose, count - given))
            if not found:
                break
            for node in found:
                self._remove(node)
            given += len(found)
        return given

    def forget(self, adapter: int | None = None) -> None:
        """Keep nothing of a version of an adapter, or nothing at all."""
        for node in [n for n in self._nodes.values() if adapter in (None, n.root[0])]:
            self.pages.drop([node.page])
            del self._nodes[node.key]

    def _path(self, root: Root, tokens: Sequence[int]) -> list[_Node]:
        nodes: list[_Node] = []
        before: Hashable = root
        for start in range(0, len(tokens) - self.size + 1, self.size):
            node = self._nodes.get((before, tuple(tokens[start : start + self.size])))
            if node is None:
                break
            nodes.append(node)
            before = id(node)
        return nodes

    def _touch(self, nodes: Sequence[_Node]) -> None:
        """Note a use: a page in front is needed by all behind it, so it counts as used later than they."""
        for node in reversed(nodes):
            self._nodes.move_to_end(node.key)

    def _remove(self, node: _Node) -> None:
        self.pages.drop([node.page])
        del self._nodes[node.key]
        if node.parent is not None:
            node.parent.children -= 1
