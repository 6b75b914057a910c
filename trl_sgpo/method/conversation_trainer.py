"""
`ConversationGRPOTrainer`: TRL's `GRPOTrainer` with the tokens of `conversation.py`.

TRL renders chat templates in its own process, without limits, and a control token in a problem stays one. Here a
template is rendered with limits, and texts are encoded without control tokens; other tokens are those of TRL. Models
that TRL loads by their names are checked before, and read from safetensors. The pickled arguments of a run, with its
tokens, can be read by their owner only.

What this file relies on in TRL 1.16 (`tests/test_trl_contract.py`): `_tokenize_prompts`, `_save`, and that reward
models are called as `reward_funcs`.
"""

from contextlib import nullcontext
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from transformers.trainer import TRAINING_ARGS_NAME
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import get_config_model_id

from ..checks.adapters import check_whole
from ..files import private_file
from ..inference.checked import checked, checked_folder
from ..inference.pretrained import NO_QUESTION, load_tokenizer, readable_weights
from ..speed.attention_kernels import avoid_cudnn_attention
from .conversation import answer_ids, prompts_ids
from .prompts import Prompt


def _checked_arguments(args: GRPOConfig | None, model: Any, rewards: list[Any]) -> tuple[GRPOConfig | None, list[Any]]:
    """
    Checks the models that TRL loads by their names. Returns arguments with which it reads them from safetensors only,
    downloads nothing more, and takes the policy at the commit that was checked, and the reward functions, of which
    models are folders that were checked: by a Hub id, TRL would take the newest commit.
    """
    if not (any(isinstance(each, str) for each in rewards) or isinstance(model, str)):
        return args, rewards
    if args is None:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        args = GRPOConfig(f"{name.split('/')[-1]}-GRPO")
    loading = {**(args.model_init_kwargs or {}), "use_safetensors": True}
    rewards = [str(_checked_reward(each, loading)) if isinstance(each, str) else each for each in rewards]
    if isinstance(model, str):
        checked(model, {})  # TRL reads the architecture there, whatever the revision is
        loading = checked(model, loading, weights=True)
    args.model_init_kwargs = loading | {"local_files_only": True}
    return args, rewards


def _checked_reward(name: str, loading: dict[str, Any]) -> Path:
    folder, _ = checked_folder(name, loading, weights=True)
    check_whole(folder, name)
    check_whole(folder / (loading.get("subfolder") or ""), name)
    return folder


def _tokenizers(arguments: dict[str, Any]) -> dict[str, Any]:
    """
    Arguments with the tokenizers of models that TRL loads by their names. TRL would load a processor, which can be any
    class, and the tokenizer of a reward model at a commit that was not checked.
    """
    model, rewards = arguments.get("model"), arguments.get("reward_funcs")
    found = {key: value for key, value in arguments.items() if key != "self"}
    loading = (found["args"].model_init_kwargs if found.get("args") is not None else None) or {}
    place = {key: loading[key] for key in ("revision", "token", "cache_dir") if key in loading}  # of rewards, too
    if isinstance(model, str) and found.get("processing_class") is None:
        part = {"subfolder": loading["subfolder"]} if "subfolder" in loading else {}
        found["processing_class"] = load_tokenizer(model, **place, **part, truncation_side="left", padding_side="left")
    given = rewards if isinstance(rewards, list) else [rewards]
    if any(isinstance(each, str) for each in given) and found.get("reward_processing_classes") is None:
        found["reward_processing_classes"] = [
            load_tokenizer(each, **place) if isinstance(each, str) else None for each in given
        ]
    return found


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

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: GRPOConfig | None = None, *others: Any, **kwargs: Any
    ):
        named = reward_funcs if isinstance(reward_funcs, list) else [] if reward_funcs is None else [reward_funcs]
        args, rewards = _checked_arguments(args, model, named)
        given = signature(GRPOTrainer.__init__).bind_partial(self, model, rewards, args, *others, **kwargs)
        with NO_QUESTION, readable_weights(model) if isinstance(model, str) else nullcontext():
            super().__init__(**{**_tokenizers(given.arguments), "args": args})
        avoid_cudnn_attention(self.accelerator.device)
        for index, name in enumerate(named):
            if isinstance(name, str):  # not that of the folder
                self.reward_func_names[index] = name.rstrip("/").split("/")[-1]
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
