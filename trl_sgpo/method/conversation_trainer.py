"""
`ConversationGRPOTrainer`: TRL's `GRPOTrainer` with the tokens of `conversation.py`.

TRL renders chat templates in its own process, without limits, and a control token in a problem stays one. Here a
template is rendered with limits, and texts are encoded without control tokens; other tokens are those of TRL. The
pickled arguments of a run, with its tokens, can be read by their owner only.

What this file relies on in TRL 1.16 (`tests/test_trl_contract.py`): `_tokenize_prompts`, `_save`, and that reward
models are called as `reward_funcs`.
"""

from pathlib import Path
from typing import Any

import torch
from transformers.trainer import TRAINING_ARGS_NAME
from trl import GRPOTrainer

from ..files import private_file
from .conversation import answer_ids, prompts_ids
from .prompts import Prompt


class RewardModel:
    """
    A reward model as a reward function.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Sequence classifier of one logit.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        name (`str`):
            Its name in logs.
        chat_template_kwargs (`dict`):
            Passed on to the chat template.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str, chat_template_kwargs: dict[str, Any]):
        self.model, self.tokenizer, self.__name__ = model, tokenizer, name
        self.chat_template_kwargs = chat_template_kwargs

    @torch.inference_mode()
    def __call__(self, prompts: list[Prompt], completions: list[Any], **kwargs: Any) -> list[float]:
        """Scores completions. `kwargs` are the dataset's columns, which are not used."""
        ids = answer_ids(self.tokenizer, prompts, completions, self.chat_template_kwargs)
        inputs = self.tokenizer.pad({"input_ids": ids}, padding_side="right", return_tensors="pt")
        device = next(self.model.parameters()).device
        return self.model(**inputs.to(device)).logits[:, 0].tolist()


class ConversationGRPOTrainer(GRPOTrainer):
    """[`~trl.GRPOTrainer`] for text models, with limits for chat templates and no control tokens in problems."""

    reward_funcs: list[Any]

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        parts = zip(self.reward_funcs, self.reward_processing_classes, self.reward_func_names, strict=True)
        self.reward_funcs = [
            RewardModel(function, tokenizer, name, self.chat_template_kwargs)
            if isinstance(function, torch.nn.Module)
            else function
            for function, tokenizer, name in parts
        ]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:  # by this process
            private_file(Path(output_dir or self.args.output_dir, TRAINING_ARGS_NAME)).close()  # it will hold tokens
        super()._save(output_dir, state_dict)

    def _tokenize_prompts(self, prompts: list[Prompt]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return prompts_ids(self.processing_class, prompts, self.chat_template_kwargs), None, {}
