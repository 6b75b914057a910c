"""
Packed rows: a forward pass computes a prompt once for all of its completions, without padding.

Rows with the same prompt become one sequence: the prompts, then the completions. A completion attends to its prompt
and to itself; attention is computed in the shape of rows, so that almost none of it is masked. All other layers
process tokens one by one and take the sequence as it is.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .patches import CountedPatch


@dataclass(frozen=True)
class SharedPrompts:
    """
    A batch of B rows with N different prompts, laid out as one sequence of T tokens: the prompts, then the rows' own
    tokens, without padding.

    Args:
        input_ids (`torch.Tensor` of shape `(1, T)`):
            Tokens.
        position_ids (`torch.Tensor` of shape `(1, T)`):
            Position of each token in its row.
        attention_mask (`torch.Tensor` of shape `(B, 1, R, P + R)`):
            Which tokens of its prompt and of itself each token of a row sees.
        prompts (`torch.Tensor` of shape `(N, P)`):
            Place of each prompt's tokens in the sequence, padded on the right with any place.
        rows (`torch.Tensor` of shape `(B, R)`):
            Place of each row's own tokens, padded likewise.
        counts (`list[int]`):
            Rows of each prompt.
        unpadded (`torch.Tensor` of shape `(T,)`):
            Index of each token in the flattened `prompts` and `rows`, one after the other.
        source (`torch.Tensor` of shape `(T,)`):
            Index of each token in the flattened rows that were given.
        shape (`tuple[int, int]`):
            Shape of the rows that were given.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor
    prompts: torch.Tensor
    rows: torch.Tensor
    counts: list[int]
    unpadded: torch.Tensor
    source: torch.Tensor
    shape: tuple[int, int]
    _biases: dict[tuple[int, torch.dtype], torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    def next_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """
        Label of each token.

        Args:
            labels (`torch.Tensor` of shape `(B, width)`):
                Labels of the rows, -100 where there is none, as in all prompts.

        Returns:
            `torch.Tensor` of shape `(1, T)`: The label of the token that follows in the row.
        """
        following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        return following.flatten()[self.source].unsqueeze(0)

    def to_rows(self, values: torch.Tensor) -> torch.Tensor:
        """
        Arranges one value a token in rows.

        Args:
            values (`torch.Tensor` of shape `(1, T)`):
                Values.

        Returns:
            `torch.Tensor` of shape `(B, width)`: 0 for tokens that are not in the sequence: padding, and the prompts
            of all but the first row of a problem.
        """
        rows = values.new_zeros(self.shape[0] * self.shape[1])
        return rows.scatter(0, self.source, values[0]).view(self.shape)

    def attend(
        self, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """
        Attention of all tokens to the tokens before them in their rows.

        Args:
            module (`torch.nn.Module`):
                Attention layer.
            query (`torch.Tensor` of shape `(1, heads, T, head_size)`), key, value:
                Its states, with fewer heads for the latter two where they are grouped.
            **kwargs:
                Passed on to transformers' attention.

        Returns:
            `torch.Tensor` of shape `(1, T, heads, head_size)`
        """
        query_rows, key_rows, value_rows = (_gathered(states, self.rows) for states in (query, key, value))
        outputs = []
        if self.prompts.size(1) > 0:
            query_prompts, key_prompts, value_prompts = (
                _gathered(states, self.prompts) for states in (query, key, value)
            )
            causal = {**kwargs, "is_causal": True}
            outputs.append(_plain_sdpa(module, query_prompts, key_prompts, value_prompts, None, **causal)[0])
            key_rows = torch.cat([self._for_rows(key_prompts), key_rows], dim=2)
            value_rows = torch.cat([self._for_rows(value_prompts), value_rows], dim=2)
        bias = self._bias(query.size(1) // key.size(1), query.dtype)
        outputs.append(_grouped_sdpa(query_rows, key_rows, value_rows, bias, **kwargs))
        return torch.cat([output.flatten(0, 1) for output in outputs])[self.unpadded].unsqueeze(0)

    def _bias(self, groups: int, dtype: torch.dtype) -> torch.Tensor:
        """The mask as an additive bias, made once for all layers, which keep it for their backward passes."""
        if (groups, dtype) not in self._biases:
            bias = torch.zeros_like(self.attention_mask, dtype=dtype).masked_fill(~self.attention_mask, -torch.inf)
            self._biases[groups, dtype] = bias.repeat(1, 1, groups, 1)
        return self._biases[groups, dtype]

    def _for_rows(self, states: torch.Tensor) -> torch.Tensor:
        # Expanded, not indexed: the gradients of a prompt's rows are then added up in 32 bits, in a fixed order
        return torch.cat([states[n].expand(count, *states[n].shape) for n, count in enumerate(self.counts)])


def _gathered(states: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """States of shape `(1, heads, T, head_size)` at places of shape `(n, length)`: `(n, heads, length, head_size)`."""
    return states[0].index_select(1, places.flatten()).unflatten(1, places.shape).transpose(0, 1)


def _grouped_sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """
    Grouped-query attention in which the query heads of a group become further tokens of one head. transformers copies
    keys and values for each head instead, and the backward pass keeps the copies.
    """
    groups = bias.size(2) // query.size(2)
    output = torch.nn.functional.scaled_dot_product_attention(
        query.unflatten(1, (-1, groups)).flatten(2, 3),
        key,
        value,
        attn_mask=bias,
        dropout_p=dropout,
        scale=scaling,
    )
    return output.unflatten(2, (groups, -1)).flatten(1, 2).transpose(1, 2)


_plain_sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]


def _packed_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    shared_prompts: SharedPrompts | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' `sdpa` attention, unless the model is called with `shared_prompts`."""
    if shared_prompts is None:
        return _plain_sdpa(module, query, key, value, attention_mask, **kwargs)
    return shared_prompts.attend(module, query, key, value, **kwargs), None


# In place of `sdpa`, and not under another name, because transformers and TRL treat that name specially
_packed = CountedPatch(
    lambda: ALL_ATTENTION_FUNCTIONS["sdpa"],
    lambda function: AttentionInterface.register("sdpa", function),
    _packed_sdpa,
)


def packed_attention() -> CountedPatch:
    """
    A context manager within which models with `sdpa` attention accept `shared_prompts`. With gradient checkpointing
    the backward pass has to be within it too.
    """
    return _packed


def share_prompts(input_ids: torch.Tensor, attention_mask: torch.Tensor, prompt_width: int) -> SharedPrompts | None:
    """
    Lays out rows so that consecutive ones with the same prompt share it.

    The last prompt token counts to each row's own tokens, because it predicts the first token of its completion.

    Args:
        input_ids (`torch.Tensor` of shape `(B, width)`):
            Prompts, padded on the left, and completions, padded on the right.
        attention_mask (`torch.Tensor` of shape `(B, width)`):
            1 for tokens, 0 for padding. Every row has a prompt token.
        prompt_width (`int`):
            Number of columns that hold prompts.

    Returns:
        [`SharedPrompts`] or `None`: `None` if no two consecutive rows have the same prompt.
    """
    B, width = input_ids.shape
    device, last = input_ids.device, prompt_width - 1
    prompts = torch.cat([input_ids[:, :prompt_width], attention_mask[:, :prompt_width]], dim=1)
    new = torch.ones(B, dtype=torch.bool, device=device)
    new[1:] = (prompts[1:] != prompts[:-1]).any(dim=1)
    if new.all():
        return None
    shown = attention_mask.bool()
    in_prompts, in_rows = shown[:, :last] & new.unsqueeze(1), shown[:, last:]
    index = torch.arange(B * width, device=device).view(B, width)
    source = torch.cat([index[:, :last][in_prompts], index[:, last:][in_rows]])
    positions = attention_mask.cumsum(dim=1) - 1

    prompt_lengths, row_lengths = in_prompts.sum(dim=1)[new], in_rows.sum(dim=1)
    prompt_places, prompt_valid = _places(prompt_lengths, 0, len(source))
    row_places, row_valid = _places(row_lengths, prompt_lengths.sum(), len(source))
    problem = new.cumsum(dim=0) - 1
    R = row_places.size(1)
    itself = torch.ones(R, R, dtype=torch.bool, device=device).tril()
    return SharedPrompts(
        input_ids=input_ids.flatten()[source].unsqueeze(0),
        position_ids=positions.flatten()[source].unsqueeze(0),
        attention_mask=torch.cat(
            [prompt_valid[problem].unsqueeze(1).expand(-1, R, -1), itself.expand(B, -1, -1)], dim=2
        ).unsqueeze(1),
        prompts=prompt_places,
        rows=row_places,
        counts=problem.bincount().tolist(),
        unpadded=torch.cat([prompt_valid.flatten(), row_valid.flatten()]).nonzero().squeeze(1),
        source=source,
        shape=(B, width),
    )


def _places(lengths: torch.Tensor, start: torch.Tensor | int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Places of consecutive parts in a sequence, one part a row, and which of them are not padding."""
    offset = torch.arange(int(lengths.max()), device=lengths.device)
    places = start + (lengths.cumsum(dim=0) - lengths).unsqueeze(1) + offset
    return places.clamp(max=end - 1), offset < lengths.unsqueeze(1)


def within_window(config: PreTrainedConfig, length: int) -> bool:
    """Whether the sliding window of the attention, if there is one, contains a row of this length."""
    window = vars(config.get_text_config()).get("sliding_window")
    return window is None or length <= window
