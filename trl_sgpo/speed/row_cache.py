"""Keys and values of rows that begin alike: copied from those of the beginnings, and not again for every token."""

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer


ROOM = 32
"""Tokens that there is room for when a layer grows."""


class _RoomyLayer(DynamicLayer):
    """A layer that takes memory for several tokens at once. `DynamicLayer` copies all it has for every new token."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor, length: int, limit: int):
        super().__init__()
        self.lazy_initialization(keys, values)
        self._limit = limit
        self._memory = [_with_room(states, length, rows) for states in (keys, values)]
        self._show(keys.size(2))

    def _show(self, length: int) -> None:
        self.keys, self.values = (memory[:, :, :length] for memory in self._memory)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        start = self.get_seq_length()
        stop = start + key_states.size(2)
        if stop > self._memory[0].size(2):
            length = min(stop + ROOM, self._limit)
            self._memory = [_with_room(states, length) for states in (self.keys, self.values)]
        for memory, states in zip(self._memory, (key_states, value_states), strict=True):
            memory[:, :, start:stop] = states
        self._show(stop)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        start, length = self.get_seq_length(), self._memory[0].size(2)
        self._memory = [_with_room(states, length, indices) for states in (self.keys, self.values)]
        self._show(start)


def _with_room(states: torch.Tensor, length: int, rows: torch.Tensor | None = None) -> torch.Tensor:
    kept = states if rows is None else states[rows]
    memory = states.new_empty(*kept.shape[:2], length, states.size(3))
    memory[:, :, : states.size(2)] = kept
    return memory


def row_cache(heads: Cache, rows: torch.Tensor, length: int, limit: int) -> Cache:
    """
    A cache to generate with, of rows that begin with what another has read.

    Args:
        heads ([`~transformers.Cache`]):
            Keys and values of N beginnings, in all of which no layer has let go of a token. It stays as it is.
        rows (`torch.Tensor` of shape `(B,)`):
            The beginning of each row.
        length (`int`):
            Tokens of a row before any is generated.
        limit (`int`):
            Tokens of a row at most.

    Returns:
        [`~transformers.Cache`]
    """
    return Cache(layers=[_RoomyLayer(layer.keys, layer.values, rows, length, limit) for layer in heads.layers])
