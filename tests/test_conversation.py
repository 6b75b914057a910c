"""One conversation: whoever builds requests, strategies, turns and executions builds the same tokens."""

import ast
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import transformers
import trl
from models import CHAT_TEMPLATE, evenness, hash_embedder, problems, tokenizer
from transformers import AddedToken, AutoConfig, AutoModelForCausalLM, GenerationConfig

from trl_sgpo import SGPOConfig, SGPOPipeline, SGPOTrainer, StrategyBank
from trl_sgpo.bank import Strategy
from trl_sgpo.data.warmstart import two_phase_examples, warmstart
from trl_sgpo.data.worked import Trace
from trl_sgpo.errors import ConfigError
from trl_sgpo.evaluation.runner import Protocol, _attempt
from trl_sgpo.evaluation.transfer_score import _execute, _write, _written
from trl_sgpo.export.parity import _PROBES, probes
from trl_sgpo.hub.snippet import plain_snippet, transformers_snippet
from trl_sgpo.inference.chat_completions import Completion
from trl_sgpo.inference.model import Decoding, TwoPhaseModel
from trl_sgpo.inference.server import ServerModel
from trl_sgpo.inference.settings import SETTINGS_FILE, TwoPhaseSettings
from trl_sgpo.method.context_length import longest_requests
from trl_sgpo.method.conversation import Conversation
from trl_sgpo.method.problem import Problem
from trl_sgpo.method.prompts import EXECUTION_PROMPT, STRATEGY_PROMPT, strategy_prompt
from trl_sgpo.method.rollout import RolloutBatch, two_phase_rollout
from trl_sgpo.method.transfer import BlockGeometry


OF_TRL = Path(trl.__file__).parent / "chat_templates"
PACKAGE = Path(__file__).parents[1] / "trl_sgpo"

# As SmolLM3: without thinking, every assistant turn starts with an empty reasoning part
EMPTY_REASONING = (
    "{% set start = '<think>\n\n</think>\n\n' if enable_thinking is defined and not enable_thinking else '' %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{{ start }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' + start }}{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + CHAT_TEMPLATE
)
NO_THINKING = {"enable_thinking": False}


@dataclass(frozen=True)
class Case:
    """
    A chat template and what it writes: `opening` between `<assistant>` and what is generated, `turn` between strategy
    and execution. `keeps_opening` says whether it shows the opening in earlier turns too.
    """

    template: str | None
    turn: str
    eos: str = "<|im_end|>"
    end: str = "<|im_end|>"
    kwargs: dict[str, Any] | None = None
    opening: str = ""
    keeps_opening: bool = True
    system: bool = True

    def tokenizer(self) -> Any:
        tok = tokenizer()
        ends = [AddedToken(name, special=True, rstrip=name.startswith("<|end")) for name in (self.eos, self.end)]
        roles = (
            "<|user|>",
            "<|assistant|>",
            "<｜User｜>",
            "<｜Assistant｜>",
            "<start_of_turn>",
            "<|start_header_id|>",
        )
        tok.add_tokens([*ends, *(AddedToken(name, special=True) for name in roles)], special_tokens=True)
        tok.add_tokens(["<think>", "</think>", "<|end_header_id|>"])
        tok.eos_token, tok.bos_token = self.eos, "<|im_start|>"
        tok.chat_template = self.template
        return tok

    def prompt(self, text: str) -> Any:
        system = [{"role": "system", "content": "Be brief."}] if self.system else []
        return [*system, {"role": "user", "content": text}]


def of_trl(name: str) -> str:
    return (OF_TRL / f"{name}.jinja").read_text()


CHATML_TURN = f"<|im_end|>\n<|im_start|>user\n{EXECUTION_PROMPT}<|im_end|>\n<|im_start|>assistant\n"
BLOCK = "<think>\n\n</think>\n\n"
CASES = {
    "chatml": Case(CHAT_TEMPLATE, CHATML_TURN),
    "turn end is not EOS": Case(CHAT_TEMPLATE, CHATML_TURN, eos="<eos>"),
    "no system role": Case(NO_SYSTEM, CHATML_TURN, eos="<eos>", system=False),
    "gemma3": Case(
        of_trl("gemma3"),
        f"<end_of_turn>\n<start_of_turn>user\n{EXECUTION_PROMPT}<end_of_turn>\n<start_of_turn>model\n",
        eos="<eos>",
        end="<end_of_turn>",
    ),
    "phi3.5": Case(
        of_trl("phi3_5"),
        f"<|end|>\n<|user|>\n{EXECUTION_PROMPT}<|end|>\n<|assistant|>\n",
        eos="<|endoftext|>",
        end="<|end|>",
    ),
    "llama3": Case(
        of_trl("llama3"),
        "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        f"{EXECUTION_PROMPT}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        eos="<|end_of_text|>",
        end="<|eot_id|>",
    ),
    "qwen3": Case(of_trl("qwen3"), CHATML_TURN),
    "qwen3, no thinking": Case(
        of_trl("qwen3"), CHATML_TURN + BLOCK, kwargs=NO_THINKING, opening=BLOCK, keeps_opening=False
    ),
    "smollm3": Case(EMPTY_REASONING, CHATML_TURN),
    "smollm3, no thinking": Case(EMPTY_REASONING, CHATML_TURN + BLOCK, kwargs=NO_THINKING, opening=BLOCK),
    "qwen3.5": Case(of_trl("qwen3_5_think"), f"{CHATML_TURN}<think>\n", opening="<think>\n", keeps_opening=False),
    "deepseek r1": Case(
        of_trl("deepseek_r1_distill"),
        f"<｜end▁of▁sentence｜><｜User｜>{EXECUTION_PROMPT}<｜Assistant｜><think>\n",
        eos="<｜end▁of▁sentence｜>",
        end="<｜end▁of▁sentence｜>",
        opening="<think>\n",
        keeps_opening=False,
    ),
    "no template": Case(None, f"\n\n{EXECUTION_PROMPT}\n\nExecution:", eos="<eos>", end="<eos>"),
}
PROBLEM = "Kind 0: what is 1 + 2?"
STRATEGIES = ["Add both.", "1. Take {a}.\n2. Add {b} - \\frac{1}{2} – done"]
EXECUTED = ("right<|im_end|>", "wrong<|im_end|>")
EXECUTION = "1 + 2 = 3.\n#### 3"


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def settings_of(case: Case) -> TwoPhaseSettings:
    return TwoPhaseSettings(
        chat_template_kwargs=case.kwargs, turn_end=case.end, system_prompt="Be brief." if case.system else None
    )


def plain_ids(tok: Any, text: str) -> list[int]:
    return tok(text, add_special_tokens=False)["input_ids"]


def expected(case: Case, tok: Any, strategy: str, shown: Any = ()) -> tuple[list[int], list[int], list[int]]:
    """Request, strategy and turn, put together by hand."""
    request = strategy_prompt(case.prompt(PROBLEM), STRATEGY_PROMPT, shown, chat=case.template is not None)
    if case.template is not None:
        request = tok.apply_chat_template(request, add_generation_prompt=True, tokenize=False, **(case.kwargs or {}))
        assert request.endswith(case.opening)
    closing = "\n</think>\n\n" if case.opening == "<think>\n" else ""
    end = tok.convert_tokens_to_ids(case.end)
    turn = case.turn if case.template is None else case.end + case.turn.removeprefix(case.end)
    return (
        plain_ids(tok, request),
        [*plain_ids(tok, closing + strategy), end],
        plain_ids(tok, turn)[case.template is not None :],
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
class TestSameTokens:
    SHOWN = (("sums", "Count up."),)

    def test_conversation(self, case: Case, strategy: str) -> None:
        tok = case.tokenizer()
        conversation = settings_of(case).conversation(tok)
        request, reply, turn = expected(case, tok, strategy, self.SHOWN)
        prompt = case.prompt(PROBLEM)
        assert conversation.request(prompt, self.SHOWN) == request
        assert conversation.reply(prompt, strategy) == reply
        assert conversation.turn(prompt).after(reply) == turn
        assert conversation.execution_request(prompt, self.SHOWN, strategy) == request + reply + turn
        assert conversation.execution_request(prompt, self.SHOWN, reply) == request + reply + turn

    def test_inference(self, case: Case, strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
        tok, seen = case.tokenizer(), []
        model = TwoPhaseModel(tiny_model(tok), tok, settings_of(case))

        def record(contexts: Any, *rest: Any) -> Any:
            seen.extend(contexts)
            return [([], tok.eos_token_id)] * len(contexts)

        monkeypatch.setattr(model, "_generate", record)
        shown = Strategy(self.SHOWN[0][1], self.SHOWN[0][0], ("elsewhere",))
        problem = Problem(case.prompt(PROBLEM), retrieved=(shown,))
        model.write_strategies([problem])
        model.execute([problem], [strategy])
        request, reply, turn = expected(case, tok, strategy, self.SHOWN)
        assert seen == [request, request + reply + turn]

    def test_warm_start(self, case: Case, strategy: str, tmp_path: Path) -> None:
        tok = case.tokenizer()
        config = SGPOConfig(
            str(tmp_path), chat_template_kwargs=case.kwargs, use_bank=False, gradient_accumulation_steps=16, bf16=False
        )
        trace = Trace(case.prompt(PROBLEM), strategy, EXECUTION, "sums")
        (example,) = two_phase_examples([trace], tok, config, seed=0)
        request, reply, turn = expected(case, tok, strategy)
        execution = expected(case, tok, EXECUTION)[1]
        assert example["input_ids"] == request + reply + turn + execution
        ignored = [-100] * len(request), [-100] * len(turn)
        assert example["labels"] == [*ignored[0], *reply, *ignored[1], *execution]

    @pytest.mark.parametrize(
        "case", [name for name, case in CASES.items() if case.template is not None], indirect=True
    )
    def test_server(self, case: Case, strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """The messages, rendered as a server does. Some templates leave the opening out of earlier turns."""
        tok, bodies = case.tokenizer(), []
        model = ServerModel("http://nowhere/v1", "m", settings_of(case))
        monkeypatch.setattr(model, "_post", lambda body, **_: bodies.append(body) or Completion("", False, 0))
        problem = Problem(case.prompt(PROBLEM))
        model.write_strategies([problem])
        model.execute([problem], [strategy])
        assert [body.get("chat_template_kwargs") for body in bodies] == [case.kwargs] * 2
        served = [
            tok.apply_chat_template(
                body["messages"],
                add_generation_prompt=True,
                return_dict=False,
                **body.get("chat_template_kwargs", {}),
            )
            for body in bodies
        ]
        request, reply, turn = expected(case, tok, strategy)
        assert served[0] == request
        if not case.keeps_opening:
            opening = plain_ids(tok, case.opening)
            assert request[-len(opening) :] == opening
            request, reply = request[: -len(opening)], [*plain_ids(tok, strategy), reply[-1]]
        assert served[1] == request + reply + turn

    def test_snippet(self, case: Case, strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
        tok = case.tokenizer()
        request, reply, turn = expected(case, tok, strategy)
        if case.opening == "<think>\n":
            reply = [*plain_ids(tok, f"A sum.\n</think>\n\n{strategy}"), reply[-1]]
        model = ScriptedModel([reply, plain_ids(tok, EXECUTION)])
        monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: tok)
        monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name, **kwargs: model)
        code = transformers_snippet("m", settings_of(case), PROBLEM, chat=case.template is not None)
        names: dict[str, Any] = {}
        exec(compile(code, "snippet", "exec"), names)
        assert model.seen == [request, request + reply + turn]
        assert (names["strategy"], names["execution"]) == (strategy, EXECUTION)
        assert reply[-1] in model.stops and tok.eos_token_id in model.stops
        asked = settings_of(case).conversation(tok).plain_request(case.prompt(PROBLEM))
        model.answers, model.seen, model.stops = iter([plain_ids(tok, EXECUTION)]), [], []
        exec(compile(plain_snippet("m", settings_of(case), PROBLEM, case.template is not None), "snippet", "exec"), {})
        assert model.seen == [asked] and {reply[-1], tok.eos_token_id} <= set(model.stops)


class ScriptedModel:
    """Stands in for a model: records what it is given and answers with given tokens."""

    device = torch.device("cpu")
    generation_config = GenerationConfig(eos_token_id=None)

    def __init__(self, answers: list[list[int]]):
        self.answers, self.seen, self.stops = iter(answers), [], []

    def generate(self, input_ids: torch.Tensor, eos_token_id: Any = None, **kwargs: Any) -> torch.Tensor:
        ids = input_ids
        self.seen.append(ids[0].tolist())
        self.stops = eos_token_id
        return torch.cat([ids, torch.tensor([next(self.answers)])], dim=1)


def tiny_model(tok: Any, eos: Any = None) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("llama", vocab_size=len(tok), max_position_embeddings=1024, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config = GenerationConfig(eos_token_id=eos or tok.eos_token_id)
    return model


def make_trainer(case: Case, directory: Path, bank: StrategyBank | None = None, **kwargs: Any) -> SGPOTrainer:
    tok = case.tokenizer()
    settings = {
        "per_device_train_batch_size": 6,
        "num_generations": 3,
        "num_bank_rollouts": 1,
        "max_strategy_length": 64,
        "max_completion_length": 16,
        "max_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "bf16": False,
        "chat_template_kwargs": case.kwargs,
    }
    rows = [{**row, "prompt": case.prompt(row["prompt"][0]["content"])} for row in problems(4, 1)]
    return SGPOTrainer(
        tiny_model(tok),
        evenness,
        SGPOConfig(str(directory / "run"), **(settings | kwargs)),
        train_dataset=type(problems(1)).from_list(rows),
        processing_class=tok,
        strategy_bank=StrategyBank(directory / "bank", embedding_model=hash_embedder) if bank is None else bank,
    )


def answering(monkeypatch: pytest.MonkeyPatch, reply: Callable[[httpx.Request], httpx.Response]) -> None:
    """Answers the requests to servers by a function."""

    def unread(request: httpx.Request) -> httpx.Response:
        answer = reply(request)
        return httpx.Response(answer.status_code, headers=answer.headers, stream=httpx.ByteStream(answer.content))

    client = partial(httpx.AsyncClient, transport=httpx.MockTransport(unread))
    monkeypatch.setattr(httpx, "AsyncClient", client)


def script(monkeypatch: pytest.MonkeyPatch, *answers: Any) -> list[list[list[int]]]:
    """Answers each call of the trainer's generation with the next answers, and records the contexts."""
    seen: list[list[list[int]]] = []
    phases = iter(answers)

    def generate(trainer: Any, ids: Any, images: Any, fields: Any, num_generations: int) -> Any:
        seen.append([list(row) for row in ids])
        answer = next(phases)
        return [list(answer[index % len(answer)]) for index in range(len(ids))], None

    monkeypatch.setattr(trl.GRPOTrainer, "_generate_single_turn", generate)
    return seen


class TestTraining:
    def test_own_borrowed_and_bank_rows(self, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        trainer = make_trainer(case, tmp_path)
        tok, strategy = trainer.processing_class, STRATEGIES[0]
        request, reply, turn = expected(case, tok, strategy)
        execution = plain_ids(tok, EXECUTION) + reply[-1:]
        seen = script(monkeypatch, [reply], [execution])
        batch = RolloutBatch(
            [Problem(case.prompt(PROBLEM))] * 2, BlockGeometry(2, 1, 1), [[Strategy(strategy, "sums", ("x",))]]
        )
        rows = two_phase_rollout(batch, trainer, trainer.conversation)
        assert [rollout.source for rollout in rows["rollout"]] == [
            "own",
            "borrowed",
            "bank",
            "borrowed",
            "own",
            "bank",
        ]
        assert {rollout.strategy.text for rollout in rows["rollout"]} == {strategy}
        assert seen == [[request] * 2, [request + reply + turn] * 6]
        assert rows["prompt_ids"] == [request] * 6
        assert rows["completion_ids"] == [reply + turn + execution] * 6
        own = [1] * len(reply) + [0] * len(turn) + [1] * len(execution)
        other = [0] * (len(reply) + len(turn)) + [1] * len(execution)
        assert rows["env_mask"] == [own, other, other, other, own, other]

    def test_requests_are_those_of_trl(self, case: Case, tmp_path: Path) -> None:
        trainer = make_trainer(case, tmp_path)
        prompts = list(trainer.train_dataset["prompt"])
        asked = [
            strategy_prompt(prompt, STRATEGY_PROMPT, [("sums", "Count up.")], case.template is not None)
            for prompt in prompts
        ]
        conversation = trainer.conversation
        by_trl = trl.GRPOTrainer._tokenize_prompts
        assert [conversation.request(p, [("sums", "Count up.")]) for p in prompts] == by_trl(trainer, asked)[0]
        if case.template is not None:
            plain = by_trl(trainer, prompts)[0]
            assert [conversation.plain_request(prompt) for prompt in prompts] == plain

    def test_requests_of_the_worst_case(self, case: Case, tmp_path: Path) -> None:
        trainer = make_trainer(case, tmp_path)
        prompts = list(trainer.train_dataset["prompt"])
        longest = longest_requests(prompts, 1, trainer.conversation, max_strategy_length=8, shown=0)
        assert longest == [max((trainer.conversation.request(prompt) for prompt in prompts), key=len)]

    def test_generation_stops_at_the_end_of_a_turn(self, case: Case, tmp_path: Path) -> None:
        trainer = make_trainer(case, tmp_path)
        ends = {trainer.processing_class.eos_token_id, trainer.processing_class.convert_tokens_to_ids(case.end)}
        assert set(trainer.eos_token_ids) == ends
        for config in (trainer.generation_config, trainer.model.generation_config):
            found = config.eos_token_id
            assert ends == (set(found) if isinstance(found, list) else {found})
        assert set(TwoPhaseModel(tiny_model(case.tokenizer()), case.tokenizer()).conversation.stop_ids) == ends

    def test_run_saves_template_arguments_and_end_of_turn(self, case: Case, tmp_path: Path) -> None:
        trainer = make_trainer(case, tmp_path)
        trainer.save_model()
        saved = TwoPhaseSettings.load(trainer.args.output_dir)
        assert (saved.chat_template_kwargs, saved.turn_end) == (case.kwargs, case.end)
        assert TwoPhaseModel.from_pretrained(trainer.args.output_dir).settings == saved

    def test_other_stop_token_is_kept_before_the_turn(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A strategy that was sampled with another stop token, or none, is executed with the whole turn after it."""
        case = CASES["turn end is not EOS"]
        trainer = make_trainer(case, tmp_path)
        tok = trainer.processing_class
        stopped, cut = [*plain_ids(tok, "Add."), tok.eos_token_id], plain_ids(tok, "Add then")
        seen = script(monkeypatch, [stopped, cut], [[tok.eos_token_id]])
        batch = RolloutBatch([Problem(case.prompt(PROBLEM))] * 2, BlockGeometry(1, 1), [[], []])
        rows = two_phase_rollout(batch, trainer, trainer.conversation)
        request, turn = expected(case, tok, "")[0], plain_ids(tok, case.turn)
        assert seen[1] == [request + stopped + turn, request + cut + turn]
        assert [rollout.strategy.flaw for rollout in rows["rollout"]] == [None, "truncated"]


def test_export_probes(case: Case) -> None:
    tok = case.tokenizer()
    sequences = probes(tok, settings_of(case))
    alone = replace(case, system=False)
    conversation = settings_of(case).conversation(tok)
    for sequence, (problem, strategy, execution) in zip(sequences, _PROBES, strict=True):
        prompt = problem if case.template is None else alone.prompt(problem)
        reply = conversation.reply(prompt, strategy)
        assert sequence == [
            *conversation.request(prompt),
            *reply,
            *conversation.turn(prompt).after(reply),
            *conversation.content(prompt, execution),
        ]


class TestEndOfTurn:
    def test_is_read_off_the_template(self, case: Case) -> None:
        tok = case.tokenizer()
        conversation = replace(settings_of(case), turn_end=None).conversation(tok)
        assert conversation.end_token == case.end
        assert conversation.reply(case.prompt(PROBLEM), "Add.") == expected(case, tok, "Add.")[1]

    def test_is_the_saved_one(self) -> None:
        tok = CASES["chatml"].tokenizer()
        assert Conversation(tok, "{problem}", "Go.", turn_end="<|pad|>").end_token == "<|pad|>"
        assert Conversation(tok, "{problem}", "Go.", turn_end="<unknown>").end_token == "<|im_end|>"

    def test_without_one_in_the_template_is_eos(self) -> None:
        tok = tokenizer()
        tok.chat_template = (
            "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
            "{{ '<|im_end|>' if m['role'] == 'user' }}{{ '\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
        )
        conversation = Conversation(tok, "{problem}", "Go.")
        prompt = [{"role": "user", "content": PROBLEM}]
        reply = conversation.reply(prompt, "Add.")
        assert tok.decode(reply) == "Add.<|im_end|>"
        assert tok.decode(conversation.turn(prompt).after(reply)) == "\nuser: Go.<|im_end|>\nassistant:"

    def test_what_the_template_writes_before_it_is_left_out(self) -> None:
        """As generations do, which end right after their text."""
        tok = tokenizer()
        tok.chat_template = CHAT_TEMPLATE.replace("'<|im_end|>", "' <|im_end|>")
        conversation = Conversation(tok, "{problem}", "Go.")
        prompt = [{"role": "user", "content": PROBLEM}]
        reply = conversation.reply(prompt, "Add.")
        assert tok.decode(reply) == "Add.<|im_end|>"
        assert tok.decode(conversation.turn(prompt).after(reply)).startswith("\n<|im_start|>user\nGo. <|im_end|>")

    def test_of_text_prompts_is_eos(self) -> None:
        case = CASES["turn end is not EOS"]
        conversation = settings_of(case).conversation(case.tokenizer())
        assert (
            case.tokenizer()
            .decode(conversation.execution_request("1 + 1?", [], "Add."))
            .endswith(f"Strategy:Add.<eos>\n\n{EXECUTION_PROMPT}\n\nExecution:")
        )

    @pytest.mark.parametrize(
        "change",
        [
            lambda template: "{% set messages = messages[-1:] %}" + template,
            lambda template: template.replace("message['content']", "message['content'][:4]"),
            lambda template: template + "{{ messages[1]['content'] if messages|length > 1 else '' }}",
        ],
        ids=["dropped", "changed", "shown twice"],
    )
    def test_template_that_does_not_keep_assistant_turns(self, change: Any) -> None:
        tok = tokenizer()
        tok.chat_template = change(tok.chat_template)
        conversation = Conversation(tok, "{problem}", "Go.")
        with pytest.raises(ConfigError, match="does not show earlier assistant turns"):
            conversation.turn([{"role": "user", "content": PROBLEM}])
        assert conversation.turn(PROBLEM)


class TestTextPrompts:
    """Of a model with a chat template, too: what is trained on texts is used with texts."""

    def settings(self, case: Case, tok: Any, directory: Path) -> TwoPhaseSettings:
        config = SGPOConfig(str(directory), chat_template_kwargs=case.kwargs, bf16=False, num_generations=4)
        TwoPhaseSettings.from_config(config, PROBLEM).of_model(tok).save(directory)
        return TwoPhaseSettings.load(directory)

    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_same_tokens(self, case: Case, strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        tok, seen, bodies = case.tokenizer(), [], []
        settings = self.settings(case, tok, tmp_path)
        asked = strategy_prompt(PROBLEM, STRATEGY_PROMPT, [], chat=True)
        turn = f"\n\n{EXECUTION_PROMPT}\n\nExecution:"
        request, reply = plain_ids(tok, asked), [*plain_ids(tok, strategy), tok.eos_token_id]
        execution = [*plain_ids(tok, EXECUTION), tok.eos_token_id]
        context = [*request, *reply, *plain_ids(tok, turn)]

        config = SGPOConfig(str(tmp_path), use_bank=False, bf16=False, num_generations=4)
        (example,) = two_phase_examples([Trace(PROBLEM, strategy, EXECUTION, "sums")], tok, config, seed=0)
        assert example["input_ids"] == [*context, *execution]

        model = TwoPhaseModel(tiny_model(tok), tok, settings)

        def generate(contexts: Any, *rest: Any) -> Any:
            seen.extend(contexts)
            return [(reply[:-1], reply[-1])] * len(contexts)

        monkeypatch.setattr(model, "_generate", generate)
        SGPOPipeline(model)(PROBLEM)
        SGPOPipeline(model)(PROBLEM, strategy=strategy)
        rows = [{"prompt": [{"role": "user", "content": PROBLEM}], "solution": "3"}]
        _attempt(model, "problem_class", rows, evenness, Protocol(samples=0), None, "")
        assert seen == [request, context, context, request, context]

        scripted = ScriptedModel([reply, execution])
        monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: tok)
        monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name, **kwargs: scripted)
        code = transformers_snippet("m", settings, PROBLEM, chat=case.template is not None)
        exec(compile(code, "snippet", "exec"), {})
        assert scripted.seen == [request, context]

        conversation = settings.conversation(tok)
        for sequence, (problem, probe, executed) in zip(probes(tok, settings), _PROBES, strict=True):
            asked_for = conversation.execution_request(problem, [], probe)
            assert sequence == [*asked_for, *conversation.content(problem, executed)]

        server = ServerModel("http://nowhere/v1", "m", settings)
        monkeypatch.setattr(server, "_post", lambda body, **_: bodies.append(body) or Completion(strategy, False, 0))
        SGPOPipeline(server)(PROBLEM)
        server.answer([PROBLEM])
        assert [body["prompt"] for body in bodies] == [asked, f"{asked}{strategy}{case.eos}{turn}", PROBLEM]

    def test_end_of_turn_is_eos_and_generation_stops_as_in_training(self, case: Case, tmp_path: Path) -> None:
        tok = case.tokenizer()
        settings = self.settings(case, tok, tmp_path)
        assert (settings.plain_text, settings.turn_end) == (True, case.eos)
        assert settings.conversation(tok).end_token == case.eos
        assert set(settings.conversation(tok).stop_ids) == set(settings_of(case).conversation(tok).stop_ids)

    def test_run_saves_the_kind_of_its_prompts(self, tmp_path: Path) -> None:
        case = CASES["turn end is not EOS"]
        trainer = make_trainer(case, tmp_path)
        trainer.train_dataset = trainer.train_dataset.map(lambda row: {"prompt": row["prompt"][-1]["content"]})
        trainer.save_model()
        saved = TwoPhaseSettings.load(trainer.args.output_dir)
        assert (saved.plain_text, saved.turn_end) == (True, case.eos)

    def test_completions_of_a_server(self, monkeypatch: pytest.MonkeyPatch) -> None:
        settings = TwoPhaseSettings(plain_text=True, turn_end="<eos>")
        model, asked = ServerModel("http://nowhere/v1", "m", settings), []
        answer = {"choices": [{"text": " Add.", "finish_reason": "stop"}]}

        def reply(request: httpx.Request) -> httpx.Response:
            asked.append((request.url.path, json.loads(request.content)))
            if not asked[-1][1].get("stream"):
                return httpx.Response(200, json=answer)
            events = f"data: {json.dumps(answer)}\n\ndata: [DONE]\n\n"
            return httpx.Response(200, text=events, headers={"Content-Type": "text/event-stream"})

        answering(monkeypatch, reply)
        pieces: list[str] = []
        for stream in (None, pieces.append):
            (parsed,) = model.write_strategies([Problem(PROBLEM)], stream=stream)
            assert parsed.text == "Add."
        assert {path for path, _ in asked} == {"/v1/completions"} and pieces == [" Add."]


class TestSettings:
    def test_of_an_earlier_version_load(self, tmp_path: Path) -> None:
        (tmp_path / SETTINGS_FILE).write_text('{"strategy_prompt": "{problem}", "max_strategy_length": 9}')
        loaded = TwoPhaseSettings.load(tmp_path)
        assert (loaded.max_strategy_length, loaded.chat_template_kwargs, loaded.turn_end) == (9, None, None)
        assert (loaded.plain_text, loaded.opens_reasoning) == (False, False)


class TestReasoning:
    """Reasoning before a strategy is kept from bank and parser, and trained and executed as it was sampled."""

    CASE = CASES["qwen3"]
    REASONING = "<think>\nWhat adds up?\n</think>\n\n"
    WRITTEN = (
        "Add the first number to the other.",
        "Guess until it fits somehow.",
        "Count up from the larger one.",
        "Write whatever comes to mind.",
        "Split each into tens and ones.",
        "Take the answer of another problem.",
        "Round up, then take away.",
        "Hope.",
    )
    BEST = (WRITTEN[0], WRITTEN[4])  # of each block

    def train(self, trainer: SGPOTrainer, monkeypatch: pytest.MonkeyPatch, written: list[str]) -> list[Any]:
        """Trains one step in which every other strategy leads to right executions. Returns what was generated from."""

        def solved(prompts: Any, completions: Any, **kwargs: Any) -> list[float]:
            return [float("right" in completion[0]["content"]) for completion in completions]

        trainer.reward_funcs = [solved]
        phases = [[plain_ids(trainer.processing_class, text) for text in texts] for texts in (written, EXECUTED)]
        seen = script(monkeypatch, *phases)
        trainer.train()
        return seen

    def trainer(self, tmp_path: Path, case: Case | None = None) -> SGPOTrainer:
        shape = {"num_generations": 4, "num_bank_rollouts": 0, "per_device_train_batch_size": 16}
        return make_trainer(case or self.CASE, tmp_path, **shape)

    @pytest.mark.parametrize("reasoning", ["", REASONING], ids=["plain", "thinking"])
    def test_bank_fills(self, reasoning: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        trainer = self.trainer(tmp_path)
        written = [f"{reasoning}{text}<|im_end|>" for text in self.WRITTEN]
        seen = self.train(trainer, monkeypatch, written)
        assert {strategy.text for strategy in trainer.strategy_bank.strategies()} == set(self.BEST)
        logged = trainer.state.log_history[0]
        assert logged["sgpo/malformed"] == 0
        lengths = [len(plain_ids(trainer.processing_class, text)) for text in written]
        assert logged["sgpo/strategy_length"] == sum(lengths) / 8
        for index, context in enumerate(seen[1]):
            assert f"{written[index // 8 * 4 + index % 4]}\n<|im_start|>user" in trainer.processing_class.decode(
                context
            )

    @pytest.mark.parametrize(
        ("written", "flaw", "truncated"),
        [("<think>\nWhat adds up", "truncated", 1), ("<think>\nWhat adds up<|im_end|>", "empty", 0)],
        ids=["cut off", "ended"],
    )
    def test_reasoning_that_does_not_end_is_malformed(
        self, written: str, flaw: str, truncated: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        trainer = self.trainer(tmp_path)
        parsed = trainer.conversation.parse(
            self.CASE.prompt(PROBLEM), plain_ids(trainer.processing_class, written), truncated > 0
        )
        assert (parsed.text, parsed.flaw, parsed.as_written) == ("", flaw, "<think>\nWhat adds up")
        self.train(trainer, monkeypatch, [written])
        logged = trainer.state.log_history[0]
        assert (logged["sgpo/malformed"], logged["sgpo/strategy_truncated"]) == (1, truncated)
        assert len(trainer.strategy_bank) == 0

    def test_reasoning_that_the_prompt_opens(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        trainer = self.trainer(tmp_path, CASES["qwen3.5"])
        self.train(trainer, monkeypatch, [f"It is a sum.\n</think>\n\n{text}<|im_end|>" for text in self.WRITTEN])
        assert {strategy.text for strategy in trainer.strategy_bank.strategies()} == set(self.BEST)
        parsed = trainer.conversation.parse(
            self.CASE.prompt(PROBLEM), plain_ids(trainer.processing_class, "It is a sum"), truncated=True
        )
        assert (parsed.text, parsed.flaw) == ("", "truncated")

    def test_text_prompts_open_no_reasoning(self) -> None:
        case = CASES["qwen3.5"]
        tok = case.tokenizer()
        conversation = settings_of(case).conversation(tok)
        parsed = conversation.parse(PROBLEM, plain_ids(tok, "Add both."))
        assert (parsed.text, parsed.flaw) == ("Add both.", None)
        assert conversation.content(PROBLEM, "Add both.") == plain_ids(tok, "Add both.")

    @pytest.mark.parametrize("name", ["qwen3", "qwen3.5", "turn end is not EOS", "no template"])
    @pytest.mark.parametrize("user", ["solve", "eval", "transfer", "snippet"])
    @pytest.mark.parametrize(
        "written",
        [f"{REASONING}Add both.", " \n Add both. \n\n", "It is a sum"],
        ids=["reasoning", "space", "unfinished"],
    )
    @pytest.mark.parametrize("stop", ["end", "eos", "length"])
    def test_strategies_are_executed_as_sampled_outside_training(
        self, stop: str, written: str, user: str, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        case = CASES[name]
        tok, seen = case.tokenizer(), []
        model = TwoPhaseModel(tiny_model(tok), tok, settings_of(case))
        sampled = plain_ids(tok, written.removeprefix(case.opening))
        end = {"end": tok.convert_tokens_to_ids(case.end), "eos": tok.eos_token_id, "length": None}[stop]
        ids = sampled if end is None else [*sampled, end]

        def generate(contexts: Any, *rest: Any) -> Any:
            seen.extend(contexts)
            return [(sampled, end)] * len(contexts)

        monkeypatch.setattr(model, "_generate", generate)
        problem = Problem(case.prompt(PROBLEM))
        rows = [{"prompt": problem.prompt, "solution": "3"}]
        if user == "solve":
            SGPOPipeline(model).solve([problem])
        elif user == "eval":
            _attempt(model, "problem_class", rows, evenness, Protocol(samples=0), None, "")
        elif user == "transfer":
            chunk = json.loads(json.dumps(_write(model, rows, "problem_class", Decoding(), None)))
            _execute(model, rows, "problem_class", [_written(chunk["strategies"][0])], evenness, Decoding(), None)
        else:
            scripted = ScriptedModel([ids, plain_ids(tok, EXECUTION)])
            monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: tok)
            monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name, **kw: scripted)
            chat = case.template is not None
            exec(compile(transformers_snippet("m", settings_of(case), PROBLEM, chat), "snippet", "exec"), {})
            seen = scripted.seen
        conversation = model.conversation
        request = expected(case, tok, "")[0]
        assert seen == [request, [*request, *ids, *conversation.turn(problem.prompt).after(ids)]]

    def test_served_strategies_are_executed_as_written(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, bodies = ServerModel("http://nowhere/v1", "m"), []
        text = " \n<think>\nA sum.\n</think>\n\nAdd both. \n"
        monkeypatch.setattr(model, "_post", lambda body, **_: bodies.append(body) or Completion(text, False, 0))
        (solution,) = SGPOPipeline(model).solve([Problem(self.CASE.prompt(PROBLEM))])
        assert solution.strategy == "Add both."
        assert bodies[1]["messages"][-2]["content"] == text

    @pytest.mark.parametrize("separated", [False, True])
    def test_served_reasoning_that_the_prompt_opens(self, separated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is parsed as the local model does, unless the server takes reasoning out of the content."""
        case = CASES["qwen3.5"]
        settings = settings_of(case).of_model(case.tokenizer())
        model = ServerModel("http://nowhere/v1", "m", settings)
        message = {"content": "It is a sum"} | ({"reasoning_content": "Hm."} if separated else {})
        answer = {"choices": [{"message": message, "finish_reason": "length"}]}
        answering(monkeypatch, lambda _: httpx.Response(200, json=answer))
        (parsed,) = model.write_strategies([Problem(case.prompt(PROBLEM))])
        assert (parsed.text, parsed.reasoning) == (("It is a sum", "") if separated else ("", "It is a sum"))
        assert parsed.flaw == "truncated"

    @pytest.mark.parametrize("opened", [False, True])
    def test_marks_may_be_special_tokens(self, opened: bool) -> None:
        """Decoding without special tokens would drop them, and keep the reasoning as a part of the strategy."""
        case = CASES["qwen3.5"] if opened else self.CASE
        tok = case.tokenizer()
        tok.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
        conversation = settings_of(case).conversation(tok)
        reasoning = self.REASONING.removeprefix(case.opening)
        sampled = plain_ids(tok, f"{reasoning}Add both.<|im_end|>")
        assert "think" not in tok.decode(sampled, skip_special_tokens=True)
        parsed = conversation.parse(case.prompt(PROBLEM), sampled)
        assert (parsed.text, parsed.reasoning) == ("Add both.", reasoning)
        parsed = conversation.parse(case.prompt(PROBLEM), plain_ids(tok, reasoning[:20]), truncated=True)
        assert (parsed.text, parsed.flaw) == ("", "truncated")

    def test_own_strategies_are_executed_as_written(self) -> None:
        """Outside training too: what is parsed is written again with its reasoning."""
        tok = self.CASE.tokenizer()
        conversation = settings_of(self.CASE).conversation(tok)
        prompt = self.CASE.prompt(PROBLEM)
        sampled = plain_ids(tok, f"{self.REASONING}Add both.<|im_end|>")
        parsed = conversation.parse(prompt, sampled)
        assert (parsed.text, parsed.reasoning) == ("Add both.", self.REASONING)
        assert conversation.execution_request(prompt, [], parsed.as_written) == conversation.execution_request(
            prompt, [], sampled
        )


class TestWarmStart:
    def test_is_made_anew_for_other_template_arguments(self, tmp_path: Path) -> None:
        """A warm start that was made before they were part of its digest is kept where there are none."""
        model = tiny_model(tokenizer())
        model.save_pretrained(tmp_path / "model")
        tokenizer().save_pretrained(tmp_path / "model")
        traces = [Trace([{"role": "user", "content": PROBLEM}], "Add.", "#### 3", "sums")]

        def made(**kwargs: Any) -> str:
            config = SGPOConfig(str(tmp_path / "run"), bf16=False, disable_tqdm=True, num_generations=4, **kwargs)
            warmstart(str(tmp_path / "model"), traces, config, tmp_path / "warm")
            return (tmp_path / "warm" / "warmstart.sha256").read_text().splitlines()[0]

        first = made()
        settings = [str(tmp_path / "model"), 1e-3, STRATEGY_PROMPT, EXECUTION_PROMPT, True, 42, 4, 0.0, False]
        before = json.dumps([settings, [asdict(trace) for trace in traces]])
        assert first == hashlib.sha256(before.encode()).hexdigest()
        assert made(chat_template_kwargs={}) == first
        assert made(chat_template_kwargs=NO_THINKING) != first
        saved = TwoPhaseSettings.load(tmp_path / "warm")
        assert (saved.chat_template_kwargs, saved.turn_end) == (NO_THINKING, "<|im_end|>")


def apply_chat_templates(package: Path) -> set[str]:
    """Files of a package that name `apply_chat_template`. Code written for model cards is text and does not count."""
    found = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            names += [node.attr] if isinstance(node, ast.Attribute) else []
            if "apply_chat_template" in names:
                found.add(path.relative_to(package).as_posix())
    return found


def test_chat_templates_are_applied_in_one_file(tmp_path: Path) -> None:
    assert apply_chat_templates(PACKAGE) == {"checks/worker.py"}
    (tmp_path / "planted.py").write_text("from trl.data_utils import apply_chat_template as render\n")
    (tmp_path / "other.py").write_text("ids = tokenizer.apply_chat_template(messages)\n")
    assert apply_chat_templates(tmp_path) == {"planted.py", "other.py"}
