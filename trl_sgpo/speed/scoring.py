"""Log-probabilities of completions from packed rows, for TRL's scoring and loss."""

from dataclasses import replace
from typing import Any

import torch
from trl.trainer.utils import split_tensor_dict

from .shared_prompts import packed_attention, share_prompts, within_window


class RowScorer:
    """
    Replaces the model where TRL scores completions, with the same results.

    It computes the prompt of consecutive rows once, and projects only trained tokens onto the vocabulary.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model, as TRL wrapped it.
        prompt_width (`int`):
            Columns of a row that hold the prompt.
        trained_mask (`torch.Tensor` of shape `(B, T)`, *optional*):
            1 where a completion's token is trained. If `None`, all tokens are scored.
        share (`bool`, *optional*, defaults to `True`):
            Whether rows may be packed.
        align (`bool`, *optional*, defaults to `True`):
            Whether to move the padding of prompts behind the rows. Models with absolute positions or a recurrent state
            would count it, and score a row otherwise than they generate it.

    Attributes:
        log_probs (`torch.Tensor` of shape `(B, width - 1)`): The log-probabilities last computed, without gradient.
    """

    log_probs: torch.Tensor

    def __init__(
        self,
        model: Any,
        prompt_width: int,
        trained_mask: torch.Tensor | None = None,
        share: bool = True,
        align: bool = True,
    ):
        self.model, self.prompt_width, self.trained_mask, self.share = model, prompt_width, trained_mask, share
        self.align = align

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor, **kwargs: Any):
        if self.trained_mask is not None:
            labels = torch.cat(
                [
                    labels[:, : self.prompt_width],
                    labels[:, self.prompt_width :].masked_fill(self.trained_mask == 0, -100),
                ],
                dim=1,
            )
        shared = share_prompts(input_ids, attention_mask, self.prompt_width) if self.share else None
        if shared is None:
            outputs = self._apart(input_ids, attention_mask, labels, kwargs)
            self.log_probs = outputs.log_probs.detach()
            return outputs
        with packed_attention():
            outputs = self.model(
                input_ids=shared.input_ids,
                attention_mask=shared.attention_mask,
                position_ids=shared.position_ids,
                shift_labels=shared.next_labels(labels),
                shared_prompts=shared,
                **kwargs,
            )
        log_probs, entropy = shared.to_rows(outputs.log_probs)[:, :-1], outputs.entropy
        self.log_probs = log_probs.detach()
        return replace(
            outputs, log_probs=log_probs, entropy=None if entropy is None else shared.to_rows(entropy)[:, :-1]
        )

    def _apart(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor, kwargs: dict[str, Any]
    ) -> Any:
        if not self.align:
            return self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)
        width = input_ids.size(1)
        columns, padding = torch.arange(width, device=input_ids.device), attention_mask.argmax(dim=1, keepdim=True)
        source, target = (columns + padding) % width, (columns - padding) % width
        outputs = self.model(
            input_ids=input_ids.gather(1, source),
            attention_mask=attention_mask.gather(1, source),
            labels=labels.gather(1, source),
            **kwargs,
        )

        def in_place(values: torch.Tensor | None) -> torch.Tensor | None:
            if values is None:
                return None
            of_rows = values[:, values.size(1) - width + 1 :]  # without columns of a learned prompt
            return torch.nn.functional.pad(of_rows, (1, 0)).gather(1, target)[:, 1:]

        return replace(outputs, log_probs=in_place(outputs.log_probs), entropy=in_place(outputs.entropy))


def fits_window(config: Any, attention_mask: torch.Tensor) -> bool:
    """Whether the sliding window of all layers, if there is one, contains the longest of the rows."""
    return within_window(config, int(attention_mask.sum(dim=1).max()))


def problems_together(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    Moves rows with the same prompt next to each other, problems in the order of their first rows.

    TRL shuffles the rows of a generation batch, so those of a problem would be trained in different micro-batches.

    Args:
        batches (`list[dict]`):
            Micro-batches of equal size. Values are tensors with a row each, 0-dimensional tensors or `None`.

    Returns:
        `list[dict]`: Micro-batches of the same size.
    """
    prompts = torch.cat([batch["prompt_ids"] for batch in batches])
    problem = torch.unique(prompts, dim=0, return_inverse=True)[1]
    position = torch.arange(len(problem), device=problem.device)
    first = torch.full_like(position, len(problem)).scatter_reduce(0, problem, position, "amin")
    order = torch.argsort(first[problem], stable=True)
    rows = {
        key: value if value is None or value.dim() == 0 else torch.cat([batch[key] for batch in batches])[order]
        for key, value in batches[0].items()
    }
    return split_tensor_dict(rows, len(batches))


def without_padding(inputs: dict[str, Any]) -> dict[str, Any]:
    """Removes the columns of a micro-batch that are padding in all of its rows."""
    prompt, completion = inputs["prompt_mask"].any(dim=0).nonzero(), inputs["completion_mask"].any(dim=0).nonzero()
    if len(prompt) == 0 or len(completion) == 0:
        return inputs
    start, stop = int(prompt[0]), int(completion[-1]) + 1
    length = inputs["completion_mask"].size(1)
    cut = {key: inputs[key][:, start:] for key in ("prompt_ids", "prompt_mask")}
    for key, value in inputs.items():
        if key not in cut and isinstance(value, torch.Tensor) and value.dim() == 2 and value.size(1) == length:
            cut[key] = value[:, :stop]
    return {**inputs, **cut}
