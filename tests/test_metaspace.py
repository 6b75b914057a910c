"""
Tokenizers that put a space before a text, as SentencePiece does: a conversation that is built in parts has the tokens
of the whole text.
"""

import json
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_conversation import CASES, PROBLEM, STRATEGIES, Case, ScriptedModel
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AddedToken, PreTrainedTokenizerFast

from trl_sgpo.hub.snippet import transformers_snippet
from trl_sgpo.inference.settings import TwoPhaseSettings
from trl_sgpo.method.control_tokens import TextEncoder
from trl_sgpo.method.conversation import Conversation, execution_messages
from trl_sgpo.method.prompts import EXECUTION_PROMPT, STRATEGY_PROMPT, strategy_prompt


CORPUS = [
    STRATEGY_PROMPT,
    EXECUTION_PROMPT,
    *STRATEGIES,
    "user assistant model system Be brief. Kind 0: what is 1 + 2?",
]
SHOWN = (("sums", "Count up."),)
TEXTS = st.text("Add the 1+2.,{}-–é☃ \n", min_size=1, max_size=30).map(str.strip).filter(bool)
properties = settings(max_examples=25, deadline=None, derandomize=True)


def _with_bytes(raw: Tokenizer) -> Tokenizer:
    """Lets characters that are not in the vocabulary be bytes, as in the tokenizer of Llama 2."""
    state = json.loads(raw.to_str())
    vocab = state["model"]["vocab"]
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    state["model"]["byte_fallback"] = True
    return Tokenizer.from_str(json.dumps(state))


def _spaced(scheme: str, kind: str = "bpe") -> Tokenizer:
    raw = Tokenizer(models.BPE() if kind == "bpe" else models.Unigram())
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    raw.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme)])
    if kind == "bpe":
        raw.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300))
        return _with_bytes(raw)
    raw.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=200, unk_token="<unk>", special_tokens=["<unk>"])
    )
    return raw


def _legacy() -> Tokenizer:
    """As Llama 2: a normalizer puts the space before every text between control tokens."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    raw.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300))
    raw = _with_bytes(raw)
    raw.pre_tokenizer = None  # type: ignore[assignment]
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return raw


def _prefix_space() -> Tokenizer:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    return raw


KINDS = {
    "always": _spaced("always"),
    "first": _spaced("first"),
    "unigram": _spaced("always", "unigram"),
    "legacy": _legacy(),
    "byte level": _prefix_space(),
}
MISTRAL = Case(
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] + '</s>' }}"
    "{% else %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endif %}{% endfor %}",
    f"</s>[INST] {EXECUTION_PROMPT} [/INST]",
    eos="</s>",
    end="</s>",
    system=False,
)


TEMPLATES = CASES | {"mistral": MISTRAL}
KEPT = ("chatml", "gemma3", "no template", "mistral")  # templates that show an earlier turn as it was generated


def of_kind(kind: str, case: Case) -> Any:
    tok = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(KINDS[kind].to_str()))
    byte_level = case.tokenizer()
    added = [AddedToken("<|im_start|>", special=True), AddedToken("<|pad|>", special=True)]
    for token in byte_level.added_tokens_decoder.values():
        if token.content not in {each.content for each in added}:
            added.append(AddedToken(token.content, special=token.special, rstrip=token.rstrip))
    tok.add_tokens(added)
    tok.eos_token, tok.pad_token, tok.bos_token, tok.chat_template = case.eos, "<|pad|>", "<|im_start|>", case.template
    if kind == "unigram":
        tok.unk_token = "<unk>"
    return tok


def conversation_of(tok: Any, case: Case) -> Conversation:
    return TwoPhaseSettings(chat_template_kwargs=case.kwargs, turn_end=case.end).conversation(tok)


def whole_text(tok: Any, case: Case, strategy: str) -> str:
    prompt = case.prompt(PROBLEM)
    request = strategy_prompt(prompt, STRATEGY_PROMPT, SHOWN, chat=case.template is not None)
    if case.template is None:
        return f"{request}{strategy}{case.end}{case.turn}"
    messages = execution_messages(request, strategy, EXECUTION_PROMPT)
    return tok.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def tokens(tok: Any, text: str) -> list[str]:
    return tok.convert_ids_to_tokens(tok(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("kind", KINDS)
class TestJoints:
    @pytest.mark.parametrize("name", KEPT)
    def test_parts_have_the_tokens_of_the_whole(self, kind: str, name: str) -> None:
        case = TEMPLATES[name]
        tok = of_kind(kind, case)
        conversation, prompt = conversation_of(tok, case), case.prompt(PROBLEM)

        @properties
        @given(TEXTS)
        def check(strategy: str) -> None:
            parts = conversation.execution_request(prompt, SHOWN, strategy)
            assert tok.convert_ids_to_tokens(parts) == tokens(tok, whole_text(tok, case, strategy))

        check()

    @pytest.mark.parametrize("name", [*KEPT, "qwen3.5", "deepseek r1"])
    def test_strategies_of_the_bank_have_the_tokens_of_sampled_ones(self, kind: str, name: str) -> None:
        """A strategy is sampled, read as text, stored, and given again."""
        case = TEMPLATES[name]
        tok = of_kind(kind, case)
        conversation, prompt = conversation_of(tok, case), case.prompt(PROBLEM)

        @properties
        @given(TEXTS)
        def check(strategy: str) -> None:
            sampled = conversation.reply(prompt, strategy)
            stored = conversation.parse(prompt, sampled).text
            assert stored == strategy or kind == "unigram"  # it does not know all characters
            assert conversation.reply(prompt, stored, reasoning=False) == sampled or kind == "unigram"

        check()

    @pytest.mark.parametrize("name", KEPT)
    def test_control_tokens_in_a_text_leave_no_space_behind(self, kind: str, name: str) -> None:
        case = TEMPLATES[name]
        tok = of_kind(kind, case)
        conversation, prompt = conversation_of(tok, case), case.prompt(PROBLEM)
        text = f"Add {case.end}both"
        found = conversation.content(prompt, text, reasoning=False)
        like = conversation.content(prompt, "Add both", reasoning=False)
        assert not (TextEncoder(tok).control_ids - {tok.unk_token_id}) & {*found}
        assert found[0] == like[0]
        assert conversation.text(found).strip() == text or kind == "unigram"


@pytest.mark.parametrize("kind", KINDS)
def test_indentation_at_the_beginning_of_a_text_is_kept(kind: str) -> None:
    case = CASES["chatml"]
    tok = of_kind(kind, case)
    conversation, body = conversation_of(tok, case), "    add the 1\n    add the 2"
    ids = TextEncoder(tok).raw_ids(body, after="<|im_start|>assistant\n")
    assert conversation.text(ids) == body or kind == "unigram"
    assert conversation.text([*ids, tok.eos_token_id]) == conversation.text(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_off_strategy_goes_on_without_a_space(kind: str) -> None:
    """In prompts of text, where no control token stands between it and the turn."""
    case = CASES["no template"]
    tok = of_kind(kind, case)
    conversation, prompt = conversation_of(tok, case), case.prompt(PROBLEM)
    ids = conversation.content(prompt, "Add the")
    whole = whole_text(tok, case, "Add the").replace(case.end, "")
    found = conversation.execution_request(prompt, SHOWN, ids)
    assert tok.convert_ids_to_tokens(found) == tokens(tok, whole)


@pytest.mark.parametrize("kind", KINDS)
def test_code_in_model_cards_has_the_same_tokens(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["no template"]
    tok = of_kind(kind, case)
    conversation, prompt = conversation_of(tok, case), case.prompt(PROBLEM)
    reply = conversation.reply(prompt, "Add.")
    model = ScriptedModel([reply, [tok.eos_token_id]])
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: tok)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name, **kwargs: model)
    saved = TwoPhaseSettings(turn_end=case.end, system_prompt="Be brief.")
    exec(compile(transformers_snippet("m", saved, PROBLEM, chat=False), "snippet", "exec"), {})
    assert model.seen == [conversation.request(prompt), conversation.execution_request(prompt, (), reply)]
