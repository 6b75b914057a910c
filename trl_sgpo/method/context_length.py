"""Rows that are longer than the table of positions of a model, such as GPT-2, OPT or MPT, refused before long work."""

from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig

from ..errors import ConfigError
from ..speed.learned_prompts import is_prompt_learning
from ..vram.worst_case import longest_requests


if TYPE_CHECKING:
    from trl import GRPOTrainer

    from .conversation import Conversation


def position_limit(config: PreTrainedConfig) -> int | None:
    """
    The length of a model's table of positions.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Configuration of the model.

    Returns:
        `int` or `None`: `None` if positions are computed, as rotary ones are.
    """
    text = config.get_text_config()
    known: dict[str, Any] = vars(text)
    if known.get("rope_parameters"):
        return None
    name = text.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    return known.get(name, known.get("max_seq_len"))


def check_context_length(trainer: "GRPOTrainer", conversation: "Conversation") -> None:
    """
    Checks that the longest row that training or evaluation can come to has positions in the model.

    Args:
        trainer ([`SGPOTrainer`]):
            The trainer.
        conversation ([`~trl_sgpo.method.conversation.Conversation`]):
            Builds the tokens of its prompts.

    Raises:
        [`ConfigError`]: It has not. The message names the settings to lower.
    """
    limit, args = position_limit(trainer.model.config), trainer.args
    if limit is None:
        return
    evaluated = trainer.eval_dataset
    datasets = [trainer.train_dataset, *(evaluated.values() if isinstance(evaluated, dict) else [evaluated])]
    prompts = [prompt for dataset in datasets if dataset is not None for prompt in dataset["prompt"]]
    (request,) = longest_requests(prompts, 1, conversation, args)
    between = len(conversation.turn(prompts[0]).bridge)
    if is_prompt_learning(trainer.model):
        between += trainer.model.active_peft_config.num_virtual_tokens
    longest = len(request) + args.max_strategy_length + between + args.max_completion_length
    if longest > limit:
        shown = ", `num_retrieved`" if args.use_bank and args.num_retrieved else ""
        raise ConfigError(
            f"A row can have {longest} tokens, and the model has {limit} positions: {len(request)} of the longest "
            f"request, {args.max_strategy_length} of `max_strategy_length`, {between} between the phases and "
            f"{args.max_completion_length} of `max_completion_length`. Lower these two{shown}, or leave out the "
            "longest problems."
        )
