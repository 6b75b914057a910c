"""Python code that uses a trained model with `transformers` alone, for model cards and documentation."""

from ..inference.settings import TwoPhaseSettings
from ..method.prompts import RETRIEVED_HEADER, plain_bridge


_HEAD = '''\
from transformers import AutoModelForCausalLM, AutoTokenizer

name = {name!r}
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", device_map="auto")

ASK = {ask!r}
EXECUTE = {execute!r}
SHOWN = {header!r}


def say(ids, limit):
    ids = ids.to(model.device)
    mask = ids.new_ones(ids.shape)
    output = model.generate(ids, attention_mask=mask, max_new_tokens=limit, do_sample=False)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()


def request(problem, shown):
    """Asks for a strategy. `shown` may hold strategies of the bank, as pairs of class and text."""
    lines = [f"> [{{' '.join(kind.split())}}] {{' '.join(text.split())}}\\n" for kind, text in shown]
    quoted = {quoted} if shown else ""
    head, tail = ASK.split("{{problem}}")
    return head.replace("{{strategies}}", quoted) + problem + tail.replace("{{strategies}}", quoted)

'''

_CHAT = """
def solve(problem, shown=()):
    messages = [{system}{{"role": "user", "content": request(problem, shown)}}]
    options = {{"add_generation_prompt": True, "return_tensors": "pt", "return_dict": False}}
    strategy = say(tokenizer.apply_chat_template(messages, **options), {strategy_limit})
    messages += [
        {{"role": "assistant", "content": strategy}},
        {{"role": "user", "content": EXECUTE}},
    ]
    return strategy, say(tokenizer.apply_chat_template(messages, **options), {execution_limit})

"""

_TEXT = """
def solve(problem, shown=()):
    asked = tokenizer({system}request(problem, shown) + "\\n\\nStrategy:", return_tensors="pt").input_ids
    strategy = say(asked, {strategy_limit})
    rest = [strategy + tokenizer.eos_token, EXECUTE]
    parts = [tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids for text in rest]
    return strategy, say(torch.cat([asked, *parts], dim=1), {execution_limit})

"""

_TAIL = """
strategy, execution = solve({problem!r})
print(strategy, execution, sep="\\n\\n")
"""


def transformers_snippet(
    name: str,
    settings: TwoPhaseSettings,
    problem: str = "Find the Least Common Multiple (LCM) of these numbers: 4, 6",
    chat: bool = True,
) -> str:
    """
    Code that solves a problem as [`SGPOPipeline`] does greedily, with `transformers` and, for an adapter, `peft`.

    Args:
        name (`str`):
            Hub id or directory of the model or adapter.
        settings ([`~trl_sgpo.inference.settings.TwoPhaseSettings`]):
            Prompts and limits of the run.
        problem (`str`, *optional*):
            Problem in the example.
        chat (`bool`, *optional*, defaults to `True`):
            Whether the tokenizer has a chat template.

    Returns:
        `str`: Python code. It defines `solve(problem, shown)`, where `shown` may hold strategies of the bank as pairs
        of class and text, and ends with a call that prints strategy and execution.
    """
    system = settings.system_prompt
    if chat:
        before = "" if system is None else f'{{"role": "system", "content": {system!r}}}, '
    else:
        before = "" if system is None else f'{system!r} + "\\n\\n" + '
    ask, quoted = settings.strategy_prompt, 'SHOWN + "".join(lines) + "\\n"'
    if "{strategies}" not in ask:  # they come after the problem then
        ask, quoted = ask.replace("{problem}", "{problem}{strategies}"), '"\\n\\n" + SHOWN + "".join(lines).rstrip()'
    code = (_HEAD + (_CHAT if chat else _TEXT) + _TAIL).format(
        name=name,
        ask=ask,
        execute=settings.execution_prompt if chat else plain_bridge(settings.execution_prompt),
        header=RETRIEVED_HEADER,
        quoted=quoted,
        system=before,
        strategy_limit=settings.max_strategy_length,
        execution_limit=settings.max_completion_length,
        problem=problem,
    )
    return code if chat else f"import torch\n{code}"
