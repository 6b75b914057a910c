"""KV cache that starts from shared prefixes, is filled some rows at a time and grows in blocks of tokens."""

import copy
from collections.abc import Iterator

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer


BLOCK = 32
"""Tokens that a layer allocates at a time."""


class _BlockLayer(DynamicLayer):
    """A layer that allocates several tokens at a time. `DynamicLayer` copies all keys and values for each token."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor, length: int, limit: int):
        super().__init__()
        self.lazy_initialization(keys, values)
        self._limit = limit
        self._memory = [_allocated(states, length, rows) for states in (keys, values)]
        self._show(keys.size(2))

    def _show(self, length: int) -> None:
        self.keys, self.values = (memory[:, :, :length] for memory in self._memory)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        start = self.get_seq_length()
        stop = start + key_states.size(2)
        if stop > self._memory[0].size(2):
            length = min(stop + BLOCK, self._limit)
            self._memory = [_allocated(states, length) for states in (self.keys, self.values)]
        for memory, states in zip(self._memory, (key_states, value_states), strict=True):
            memory[:, :, start:stop] = states
        self._show(stop)
        return self.keys, self.values

    def part(self, rows: slice) -> "_BlockLayer":
        """Some of the rows, in the same memory."""
        layer = copy.copy(self)
        layer._memory = [memory[rows] for memory in self._memory]
        layer._show(self.get_seq_length())
        return layer

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        start, length = self.get_seq_length(), self._memory[0].size(2)
        self._memory = [_allocated(states, length, indices) for states in (self.keys, self.values)]
        self._show(start)


def _allocated(states: torch.Tensor, length: int, rows: torch.Tensor | None = None) -> torch.Tensor:
    """A copy of some rows of `states`, with memory for `length` tokens."""
    kept = states if rows is None else states[rows]
    memory = states.new_empty(*kept.shape[:2], length, states.size(3))
    memory[:, :, : states.size(2)] = kept
    return memory


class RowCache(Cache):
    """
    A KV cache of rows that each begin with one of N prefixes.

    Args:
        prefixes ([`~transformers.Cache`]):
            KV cache of the prefixes, from which no layer has dropped a token. It is not changed.
        rows (`torch.Tensor` of shape `(B,)`):
            Index of each row's prefix.
        length (`int`):
            Tokens of a row before any is generated.
        limit (`int`):
            Maximum number of tokens of a row.
    """

    def __init__(self, prefixes: Cache, rows: torch.Tensor, length: int, limit: int):
        super().__init__(
            layers=[_BlockLayer(layer.keys, layer.values, rows, length, limit) for layer in prefixes.layers]
        )

    def parts(self, rows: int, new_tokens: int) -> Iterator[tuple[slice, Cache]]:
        """
        Fills the cache of all rows, some at a time.

        Args:
            rows (`int`):
                Rows at a time.
            new_tokens (`int`):
                Tokens that are added to each row, at most `length` altogether.

        Yields:
            `tuple[slice, Cache]`: Which rows, and their cache, that the caller adds the tokens to.
        """
        length = self.get_seq_length() + new_tokens
        for start in range(0, len(self.layers[0].keys), rows):
            part = slice(start, start + rows)
            yield part, Cache(layers=[layer.part(part) for layer in self.layers])
        for layer in self.layers:
            layer._show(length)
