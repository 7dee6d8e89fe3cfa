"""How a model is asked for a translation where its own chat template has wishes, or the file is wrong."""

from pathlib import Path

import pytest

import templora
from templora.errors import InvalidTemplate
from templora.template import language, load
from templora.testing import ByteTokenizer, tiny_llama

NO_SYSTEM = (
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chat_base(template: str) -> templora.Base:
    base = templora.load(model=tiny_llama(), tokenizer=ByteTokenizer())
    base.tokenizer.chat_template = template
    return base


def test_a_model_without_a_system_role_is_told_in_the_first_turn() -> None:
    base = chat_base(NO_SYSTEM)
    template = load("auto", base, "zh", "English")
    text = base.decode(template.ids(base, [("a", "b")], "c", {"c": "C"}))
    assert text.startswith("<user>You translate a book from Chinese to English")
    assert "c = C" in text.partition("<assistant>")[0]
    assert text.endswith("a<assistant>b<user>c<assistant>")


def test_a_chat_template_that_refuses_all_of_it_is_an_error_in_one_line() -> None:
    with pytest.raises(InvalidTemplate, match=r"refuses a translation \(no talk\)"):
        load("auto", chat_base("{{ raise_exception('no talk') }}"), "zh", "en")


@pytest.mark.parametrize("text", ["prompt: 5\nend: x", "prompt: x\nend: [a]", "prompt: x\nend: x\nsystem: 1"])
def test_what_is_no_text_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(InvalidTemplate, match="is no text; put it in quotes"):
        load(tmp_path / "t.yaml", chat_base(NO_SYSTEM), "zh", "en")


@pytest.mark.parametrize(("code", "name"), [("zh_CN", "Chinese"), ("pt-BR", "Portuguese"), ("ZH", "Chinese")])
def test_a_language_is_named_whatever_follows_its_code(code: str, name: str) -> None:
    assert language(code) == name
