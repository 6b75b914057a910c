"""Chat templates of a model repository that do not end or fill memory."""

import pytest
from models import save_tiny_model, tokenizer

from trl_sgpo.cli import main as cli
from trl_sgpo.errors import ConfigError
from trl_sgpo.method.conversation import Conversation, check_system_role, prompt_ids, rendered


MESSAGES = [{"role": "user", "content": "What is 1 + 2?"}]
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
TEMPLATES = {
    "loop": LOOP,
    "loop for this problem": "{% if '1 + 2' in messages[0].content %}" + LOOP + "{% endif %}",
    "product": "{{ 'a' * 10**11 }}",
    "padding": "{{ 'a'.ljust(10**11) }}",
    "format": "{{ '%99999999999d' % 1 }}",
    "power": "{{ 10 ** (10 ** 9) }}",
    "long": "{{ 'a' * 10**8 }}",
    "many": "{% for i in range(99999) %}{{ 'a' * 10000 }}{% endfor %}",
    "range": "{% for i in range(10**11) %}a{% endfor %}",
    "macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "list": "{{ ([1] * 10**11) | length }}",
}


def with_template(template):
    tok = tokenizer()
    tok.chat_template = template
    return tok


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "loop for this problem"])
def test_a_template_ends(name):
    with pytest.raises(ConfigError, match="chat template") as error:
        prompt_ids(with_template(TEMPLATES[name]), MESSAGES)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("template", [TEMPLATES["product"], "{{ messages[0].content + 1 }}"])
def test_wherever_it_is_applied(template):
    tok = with_template(template)
    system = [{"role": "system", "content": "Add."}, *MESSAGES]
    conversation = Conversation(tok, "{problem}", "Go on.")
    for apply in (
        lambda: rendered(tok, MESSAGES),
        lambda: check_system_role(tok, system),
        lambda: conversation.request(MESSAGES),
        lambda: conversation.turn(MESSAGES),
        lambda: conversation.end_token,
    ):
        with pytest.raises(ConfigError, match="chat template"):
            apply()


@pytest.mark.parametrize("name", ["product", "loop for this problem"])
def test_one_line_and_status_2(name, tmp_path, capsys):
    model = save_tiny_model(tmp_path / "model")
    with_template(TEMPLATES[name]).save_pretrained(model)
    assert cli.main(["solve", "What is 1 + 2?", "--model", model, "--no_bank"]) == 2
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("trl-sgpo solve: error: The model's chat template needs more than 2 seconds")


def test_a_template_that_refuses():
    tok = with_template("{{ raise_exception('No\n' ~ messages[0].role) }}")
    with pytest.raises(ConfigError, match="refuses a conversation: No user"):
        rendered(tok, MESSAGES)


def test_a_template_after_one_that_failed():
    with pytest.raises(ConfigError, match="chat template"):
        prompt_ids(with_template(TEMPLATES["product"]), MESSAGES)
    tok = tokenizer()
    assert rendered(tok, MESSAGES, add_generation_prompt=True) == tok.apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True
    )
    assert prompt_ids(tok, MESSAGES) == tok.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_dict=False
    )
