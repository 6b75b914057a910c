"""Python code that uses a trained model with `transformers` alone, for model cards and documentation."""

from ..inference.settings import TwoPhaseSettings
from ..method.prompts import REASONING_END, RETRIEVED_HEADER, plain_bridge


_PROBLEM = "Find the Least Common Multiple (LCM) of these numbers: 4, 6"

_LOAD = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

name = {name!r}
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", device_map="auto")
"""

_STOPS = """\
stops = model.generation_config.eos_token_id
stops = [stops] if isinstance(stops, int) else list(stops or [])
stops += tokenizer.convert_tokens_to_ids([tokenizer.eos_token, {turn_end}])
"""

_PLAIN_CHAT = """
messages = [{system}{{"role": "user", "content": {problem!r}}}]
options = {{"add_generation_prompt": True{template_kwargs}}}
inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True, **options)
"""

_PLAIN_TEXT = """
inputs = tokenizer({system}{problem!r}, return_tensors="pt")
"""

_ANSWER = """
inputs = inputs.to(model.device)
settings = {{"do_sample": False, "repetition_penalty": {penalty}, "eos_token_id": stops}}
output = model.generate(**inputs, max_new_tokens={limit}, **settings)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""

_HEAD = '''
ASK = {ask!r}
EXECUTE = {execute!r}
SHOWN = {header!r}
TURN_END = {turn_end}


def control_tokens():
    """Special tokens, and others that were added to the vocabulary and are markup."""
    added = {{*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}}
    named = [token for token in added if any(map(str.isalnum, token))]
    return [token for token in named if not (token[0].isalnum() or token[-1].isalnum())]


def plain(text):
    """Puts a space into control tokens, so that a text cannot start or end a turn."""
    for token in control_tokens():
        text = text.replace(token, token[0] + " " + token[1:])
    return text


def say(ids, limit):
    ids = ids.to(model.device)
    mask = ids.new_ones(ids.shape)
    settings = {{"do_sample": False, "repetition_penalty": {penalty}, "eos_token_id": stops}}
    output = model.generate(ids, attention_mask=mask, max_new_tokens=limit, **settings)
    return output[:, ids.shape[1] :].cpu()


def text(ids):
    return tokenizer.decode(ids[0], skip_special_tokens=True)


def request(problem, shown):
    """Asks for a strategy. `shown` may hold strategies of the bank, as pairs of class and text."""
    problem = plain(problem)
    shown = [(plain(kind), plain(text)) for kind, text in shown]
    lines = [f"> [{{' '.join(kind.split())}}] {{' '.join(text.split())}}\\n" for kind, text in shown]
    quoted = {quoted} if shown else ""
    head, tail = ASK.split("{{problem}}")
    return head.replace("{{strategies}}", quoted) + problem + tail.replace("{{strategies}}", quoted)


def execute(asked, strategy, turn, closes):
    """`closes` says whether a strategy that was cut off is closed by the end of a turn."""
    end = TURN_END if closes else tokenizer.eos_token
    ids = tokenizer(end + turn, add_special_tokens=False, return_tensors="pt").input_ids[:, int(not closes) :]
    if not closes and len(tokenizer(end + "\\n\\n", add_special_tokens=False).input_ids) == 1:  # it takes white space
        ids = tokenizer("." + turn, add_special_tokens=False, return_tensors="pt").input_ids[:, 1:]
    ended = strategy[0, -1] == ids[0, 0]
    return text(say(torch.cat([asked, strategy, ids[:, int(ended) :]], dim=1), {execution_limit}))

'''

_CHAT = """
def solve(problem, shown=()):
    messages = [{system}{{"role": "user", "content": request(problem, shown)}}]
    options = {{"add_generation_prompt": True{template_kwargs}}}
    asked = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=False, **options)
    strategy = say(asked, {strategy_limit})
    messages += [{{"role": "assistant", "content": "@strategy@"}}, {{"role": "user", "content": EXECUTE}}]
    turn = tokenizer.apply_chat_template(messages, tokenize=False, **options).split("@strategy@")[-1]
    turn = turn.split(TURN_END, 1)[-1]
    return {shown_strategy}, execute(asked, strategy, turn, closes=True)

"""

_TEXT = """
def solve(problem, shown=()):
    asked = tokenizer({system}request(problem, shown) + "\\n\\nStrategy:", return_tensors="pt").input_ids
    strategy = say(asked, {strategy_limit})
    return {shown_strategy}, execute(asked, strategy, EXECUTE, closes=False)

"""

_TAIL = """
strategy, execution = solve({problem!r})
print(strategy, execution.strip(), sep="\\n\\n")
"""


def plain_snippet(name: str, settings: TwoPhaseSettings, problem: str = _PROBLEM, chat: bool = True) -> str:
    """
    Code that answers the bare problem greedily, as `trl-sgpo solve --plain` does, with `transformers` and, for an
    adapter, `peft`.

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
        `str`: Python code, which prints the answer.
    """
    chat = chat and not settings.plain_text
    return (_LOAD + _STOPS + (_PLAIN_CHAT if chat else _PLAIN_TEXT) + _ANSWER.lstrip()).format(
        name=name,
        turn_end=_turn_end(settings),
        system=_system(settings, chat),
        problem=problem,
        template_kwargs=_template_kwargs(settings),
        limit=settings.max_plain_length,
        penalty=settings.repetition_penalty,
    )


def _turn_end(settings: TwoPhaseSettings) -> str:
    return "tokenizer.eos_token" if settings.turn_end is None else repr(settings.turn_end)


def _system(settings: TwoPhaseSettings, chat: bool) -> str:
    """Code that puts the system message before a problem."""
    if settings.system_prompt is None:
        return ""
    if chat:
        return f'{{"role": "system", "content": {settings.system_prompt!r}}}, '
    return f'{settings.system_prompt!r} + "\\n\\n" + '


def _template_kwargs(settings: TwoPhaseSettings) -> str:
    return "".join(f", {name!r}: {value!r}" for name, value in (settings.chat_template_kwargs or {}).items())


def transformers_snippet(name: str, settings: TwoPhaseSettings, problem: str = _PROBLEM, chat: bool = True) -> str:
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
    chat = chat and not settings.plain_text
    ask, quoted = settings.strategy_prompt, 'SHOWN + "".join(lines) + "\\n"'
    if "{strategies}" not in ask:  # they come after the problem then
        ask, quoted = ask.replace("{problem}", "{problem}{strategies}"), '"\\n\\n" + SHOWN + "".join(lines).rstrip()'
    return ("import torch\n" + _LOAD + _STOPS + _HEAD + (_CHAT if chat else _TEXT) + _TAIL).format(
        name=name,
        ask=ask,
        execute=settings.execution_prompt if chat else plain_bridge(settings.execution_prompt),
        header=RETRIEVED_HEADER,
        quoted=quoted,
        system=_system(settings, chat),
        strategy_limit=settings.max_strategy_length,
        execution_limit=settings.max_completion_length,
        penalty=settings.repetition_penalty,
        problem=problem,
        turn_end=_turn_end(settings),
        template_kwargs=_template_kwargs(settings),
        shown_strategy=f"text(strategy).split({REASONING_END!r})[-1].strip()",
    )
