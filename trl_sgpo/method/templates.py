"""Chat templates are programs of a model's author: they are rendered in a process with limits of time and memory."""

from typing import Any

from ..checks.process import CHECKS
from ..errors import ConfigError


class TemplateRefusal(ConfigError):
    """
    A chat template that refuses a conversation.

    Args:
        reason (`str`):
            What the template, or Jinja, says.
    """

    def __init__(self, reason: str):
        self.reason = " ".join(reason.split())
        super().__init__(f"The model's chat template refuses a conversation: {self.reason}")


def render(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    chat_template_kwargs: dict[str, Any] | None = None,
    add_generation_prompt: bool = False,
) -> str:
    """
    Returns a conversation as the text that the chat template makes of it.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer with the template.
        messages (`list[dict]`):
            The conversation.
        chat_template_kwargs (`dict`, *optional*):
            Variables of the template.
        add_generation_prompt (`bool`, *optional*, defaults to `False`):
            Whether the text ends with the start of the assistant's next turn.

    Raises:
        [`TemplateRefusal`]: The template refuses the conversation, or has an error.
        [`ConfigError`]: It fails otherwise, or needs too much time or memory.
    """
    kwargs = chat_template_kwargs or {}
    template = tokenizer.get_chat_template(kwargs.get("chat_template"), kwargs.get("tools"))
    variables = {**tokenizer.special_tokens_map, **kwargs, "add_generation_prompt": add_generation_prompt}
    reply = CHECKS.ask("render", messages, variables | {"chat_template": template})
    if reply is None:
        raise ConfigError(
            "The model's chat template needs more than 2 seconds, 3 GiB or 4 Mi characters for a conversation: "
            "use another model, or give its tokenizer another template."
        )
    kind, text = reply
    if kind == "text":
        return text
    if kind == "refused":
        raise TemplateRefusal(text)
    raise ConfigError(f"The model's chat template fails ({text}): use another model, or correct the template.")
