"""
Rows of one problem side by side in one sequence, so that a forward pass reads their prompt once: pure functions.

Rows that differ in their completions only become `prompt, completion 1, completion 2, …`, where each completion sees
the prompt and itself. All of it is in the attention mask and the positions, so the model stays as it is.
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig


@dataclass(frozen=True)
class SharedPrompts:
    """
    A batch of B rows laid out as N sequences.

    Args:
        input_ids (`torch.Tensor` of shape `(N, L)`):
            Tokens.
        position_ids (`torch.Tensor` of shape `(N, L)`):
            Position of each token in its row.
        attention_mask (`torch.Tensor` of shape `(N, 1, L, L)`):
            Whether a token (third dimension) sees another (fourth).
        source (`torch.Tensor` of shape `(N, L)`):
            Index of each token in the flattened rows, -1 for padding.
        shape (`tuple[int, int]`):
            Shape of the rows.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor
    source: torch.Tensor
    shape: tuple[int, int]

    def next_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """
        What each token is to predict.

        Args:
            labels (`torch.Tensor` of shape `(B, width)`):
                Labels of the rows, -100 where there is none, as in all prompts.

        Returns:
            `torch.Tensor` of shape `(N, L)`: The label of the token that follows in the row.
        """
        following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100).flatten()
        return following[self.source.clamp(min=0)].masked_fill(self.source < 0, -100)

    def to_rows(self, values: torch.Tensor) -> torch.Tensor:
        """
        Puts one value a token back where the token comes from.

        Args:
            values (`torch.Tensor` of shape `(N, L)`):
                Values.

        Returns:
            `torch.Tensor` of shape `(B, width)`: 0 where no token was read, as in padding and in the prompts of all
            but the first row of a problem.
        """
        read = self.source >= 0
        rows = values.new_zeros(self.shape[0] * self.shape[1])
        return rows.scatter(0, self.source[read], values[read]).view(self.shape)


def share_prompts(input_ids: torch.Tensor, attention_mask: torch.Tensor, prompt_width: int) -> SharedPrompts:
    """
    Lays out rows so that consecutive ones with the same prompt share it.

    The last prompt token is repeated before each completion, because it predicts that completion's first token.

    Args:
        input_ids (`torch.Tensor` of shape `(B, width)`):
            Prompts, padded on the left, and completions, padded on the right.
        attention_mask (`torch.Tensor` of shape `(B, width)`):
            1 for tokens, 0 for padding. Every row has a prompt token.
        prompt_width (`int`):
            Number of columns that hold prompts.

    Returns:
        [`SharedPrompts`]
    """
    B, width = input_ids.shape
    prompts = torch.cat([input_ids[:, :prompt_width], attention_mask[:, :prompt_width]], dim=1)
    repeats = [False, *(prompts[1:] == prompts[:-1]).all(dim=1).tolist()]
    prompt_lengths = attention_mask[:, :prompt_width].sum(dim=1).tolist()
    completion_lengths = attention_mask[:, prompt_width:].sum(dim=1).tolist()

    sources: list[list[int]] = []  # of each sequence, for each token: its index in the flattened rows
    positions: list[list[int]] = []
    segments: list[list[int]] = []  # 0 for the prompt, then 1, 2, … for the completions
    for row in range(B):
        first, last = prompt_width - prompt_lengths[row], prompt_width - 1
        if not repeats[row]:
            sources.append([row * width + column for column in range(first, last)])
            positions.append(list(range(prompt_lengths[row] - 1)))
            segments.append([0] * (prompt_lengths[row] - 1))
        length = 1 + completion_lengths[row]
        sources[-1] += range(row * width + last, row * width + last + length)
        positions[-1] += range(prompt_lengths[row] - 1, prompt_lengths[row] - 1 + length)
        segments[-1] += [segments[-1][-1] + 1 if segments[-1] else 1] * length

    def padded(values: list[list[int]], padding: int) -> torch.Tensor:
        longest = max(map(len, values))
        return torch.tensor([row + [padding] * (longest - len(row)) for row in values], device=input_ids.device)

    source, segment = padded(sources, -1), padded(segments, -1)
    index = torch.arange(source.size(1), device=input_ids.device)
    before = index.unsqueeze(1) >= index
    visible = (segment.unsqueeze(1) == 0) | (segment.unsqueeze(1) == segment.unsqueeze(2))
    return SharedPrompts(
        input_ids=input_ids.flatten()[source.clamp(min=0)],
        position_ids=padded(positions, 0),
        attention_mask=(before & visible).unsqueeze(1),
        source=source,
        shape=(B, width),
    )


def work(sequences: int, length: int, hidden_size: int) -> int:
    """
    What a decoder takes to read a batch, in a unit of its own.

    A decoder layer takes about `24 * hidden_size**2` operations a token in its matrices and `4 * hidden_size` for each
    token it is compared with.

    Args:
        sequences (`int`), length (`int`):
            Shape of the batch.
        hidden_size (`int`):
            Width of the model.
    """
    return sequences * length * (6 * hidden_size + length)


def is_cheaper(shared: SharedPrompts, hidden_size: int) -> bool:
    """
    Whether the layout takes less work than the rows as they are. Long rows without much of a prompt are cheaper apart.

    Args:
        shared ([`SharedPrompts`]):
            The layout.
        hidden_size (`int`):
            Width of the model.
    """
    sequences, length = shared.input_ids.shape
    return work(sequences, length, hidden_size) < work(*shared.shape, hidden_size)


def within_window(config: PreTrainedConfig, length: int) -> bool:
    """Whether a row of this length is seen whole by every layer, so that no attention slides within it."""
    window = vars(config.get_text_config()).get("sliding_window")
    return window is None or length <= window
