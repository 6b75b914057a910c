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


def share_prompts(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, prompt_width: int, most: int
) -> SharedPrompts:
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
        most (`int`):
            Rows a sequence at most, see [`rows_a_sequence`].

    Returns:
        [`SharedPrompts`]
    """
    width = input_ids.size(1)
    prompt_lengths, completion_lengths = _lengths(attention_mask, prompt_width)
    sources: list[list[int]] = []  # of each sequence, for each token: its index in the flattened rows
    positions: list[list[int]] = []
    segments: list[list[int]] = []  # 0 for the prompt, then 1, 2, … for the completions
    for rows in _sequences(input_ids, attention_mask, prompt_width, most):
        prompt, last = prompt_lengths[rows[0]], prompt_width - 1
        source = [rows[0] * width + column for column in range(prompt_width - prompt, last)]
        position, segment = list(range(prompt - 1)), [0] * (prompt - 1)
        for number, row in enumerate(rows, start=1):
            length = 1 + completion_lengths[row]
            source += range(row * width + last, row * width + last + length)
            position += range(prompt - 1, prompt - 1 + length)
            segment += [number] * length
        sources.append(source)
        positions.append(position)
        segments.append(segment)

    def padded(values: list[list[int]], padding: int) -> torch.Tensor:
        longest = max(map(len, values))
        return torch.tensor([row + [padding] * (longest - len(row)) for row in values], device=input_ids.device)

    source_of, segment_of = padded(sources, -1), padded(segments, -1)
    index = torch.arange(source_of.size(1), device=input_ids.device)
    before = index.unsqueeze(1) >= index
    visible = (segment_of.unsqueeze(1) == 0) | (segment_of.unsqueeze(1) == segment_of.unsqueeze(2))
    return SharedPrompts(
        input_ids=input_ids.flatten()[source_of.clamp(min=0)],
        position_ids=padded(positions, 0),
        attention_mask=(before & visible).unsqueeze(1),
        source=source_of,
        shape=(len(input_ids), width),
    )


def rows_a_sequence(input_ids: torch.Tensor, attention_mask: torch.Tensor, prompt_width: int, hidden_size: int) -> int:
    """
    How many rows of a prompt share a sequence with the least work. Long completions compare tokens with those of
    others for nothing, so few of them, or none, are together.

    Args:
        input_ids (`torch.Tensor` of shape `(B, width)`), attention_mask (`torch.Tensor` of shape `(B, width)`):
            The rows, as in [`share_prompts`].
        prompt_width (`int`):
            Number of columns that hold prompts.
        hidden_size (`int`):
            Width of the model.

    Returns:
        `int`: 1 if rows are best left as they are.
    """
    prompt_lengths, completion_lengths = _lengths(attention_mask, prompt_width)

    def cost(most: int) -> int:
        if most == 1:
            return work(len(input_ids), input_ids.size(1), hidden_size)
        sequences = _sequences(input_ids, attention_mask, prompt_width, most)
        longest = max(
            prompt_lengths[rows[0]] - 1 + sum(1 + completion_lengths[row] for row in rows) for rows in sequences
        )
        return work(len(sequences), longest, hidden_size)

    largest = max(map(len, _sequences(input_ids, attention_mask, prompt_width, len(input_ids))))
    return min(range(1, largest + 1), key=cost)


def _lengths(attention_mask: torch.Tensor, prompt_width: int) -> tuple[list[int], list[int]]:
    """Tokens of each row's prompt and completion."""
    prompts, completions = attention_mask[:, :prompt_width], attention_mask[:, prompt_width:]
    return prompts.sum(dim=1).tolist(), completions.sum(dim=1).tolist()


def _sequences(input_ids: torch.Tensor, attention_mask: torch.Tensor, prompt_width: int, most: int) -> list[list[int]]:
    """Rows of each sequence: consecutive ones with the same prompt, at most so many."""
    prompts = torch.cat([input_ids[:, :prompt_width], attention_mask[:, :prompt_width]], dim=1)
    same = [False, *(prompts[1:] == prompts[:-1]).all(dim=1).tolist()]
    sequences: list[list[int]] = []
    for row, repeated in enumerate(same):
        if repeated and len(sequences[-1]) < most:
            sequences[-1].append(row)
        else:
            sequences.append([row])
    return sequences


def work(sequences: int, length: int, hidden_size: int) -> int:
    """
    What a decoder takes to train on a batch, in a unit of its own.

    A decoder layer takes about `24 * hidden_size**2` operations a token in its matrices and `4 * hidden_size` for each
    token it is compared with. The latter count 2.5 times: a backward pass of attention is worth more than two forward
    ones, that of frozen matrices one, and attention with a mask is slower than a matrix product. Measured with LoRA on
    a CPU (`docs/design.md`).

    Args:
        sequences (`int`), length (`int`):
            Shape of the batch.
        hidden_size (`int`):
            Width of the model.
    """
    return sequences * length * (12 * hidden_size + 5 * length)


def within_window(config: PreTrainedConfig, length: int) -> bool:
    """Whether a row of this length is seen whole by every layer, so that no attention slides within it."""
    window = vars(config.get_text_config()).get("sliding_window")
    return window is None or length <= window
