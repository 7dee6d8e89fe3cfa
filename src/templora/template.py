"""How a passage is asked for: the text around source and translation, as token ids.

Templates are YAML files. One with `end` is plain text; one without uses the model's own chat template, a turn
a pair, and a translation ends with the model's end-of-text token.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jinja2 import TemplateError

from templora.base import Base
from templora.errors import InvalidTemplate

Pair = tuple[str, str]
FIELDS = frozenset(("prompt", "end", "terms", "system"))


@dataclass(frozen=True, slots=True)
class Template:
    """One template, filled in for two languages.

    prompt, terms, system: with `{source}`, `{terms}`, `{source_language}` and `{target_language}`. end: what
    follows a translation; None for a chat template.
    """

    prompt: str
    end: str | None
    terms: str
    system: str
    languages: Mapping[str, str]

    def ids(self, base: Base, pairs: Sequence[Pair], source: str, terms: Mapping[str, str]) -> list[int]:
        """Everything before the translation of `source`: terms, earlier pairs, the source itself."""
        wanted = "; ".join(f"{a} = {b}" for a, b in terms.items() if a in source)
        asked = self._filled(self.terms, terms=wanted) if wanted else ""
        if self.end is None:
            return self._chat(base, pairs, source, asked)
        before = "".join(self._filled(self.prompt, source=a) + b + self.end for a, b in pairs)
        return [*base.prefix_ids, *base.encode(asked + before + self._filled(self.prompt, source=source))]

    @property
    def digest(self) -> str:
        """Tells one wording from another."""
        return hashlib.sha256(repr((self.prompt, self.end, self.terms, self.system)).encode()).hexdigest()[:8]

    def end_ids(self, base: Base) -> list[int]:
        """What the model writes after a translation."""
        if self.end is not None:
            return base.encode(self.end)
        # Of several tokens that end a text, the one with which its chat template ends an answer.
        answer = "\u2603"
        turns = [{"role": "user", "content": answer}, {"role": "assistant", "content": answer}]
        after = base.encode(_text_of(base, turns, ask=False).rpartition(answer)[2])
        return [*(token for token in after if token in base.eos_ids), *base.eos_ids][:1]

    def _chat(self, base: Base, pairs: Sequence[Pair], source: str, asked: str) -> list[int]:
        turns: list[dict[str, str]] = []
        for a, b in pairs:
            turns.append({"role": "user", "content": self._filled(self.prompt, source=a)})
            turns.append({"role": "assistant", "content": b})
        turns.append({"role": "user", "content": self._filled(self.prompt, source=source)})
        if not (system := self._filled(self.system) + asked):
            return _ids_of(base, turns)
        try:
            return _ids_of(base, [{"role": "system", "content": system}, *turns])
        except TemplateError:  # a model that knows no such role, as the first Gemmas: the first turn says it
            first = {"role": "user", "content": f"{system}\n\n{turns[0]['content']}"}
            return _ids_of(base, [first, *turns[1:]])

    def _filled(self, text: str, **more: str) -> str:
        return text.format(**self.languages, **more)


def _ids_of(base: Base, messages: list[dict[str, str]]) -> list[int]:
    return base.encode(_text_of(base, messages, ask=True))


def _text_of(base: Base, messages: list[dict[str, str]], *, ask: bool) -> str:
    # Models that would think aloud first, such as Qwen3, are told not to: all they write is the translation.
    text: Any = base.tokenizer.apply_chat_template(
        messages, add_generation_prompt=ask, tokenize=False, enable_thinking=False
    )
    return str(text)


def load(name: str | Path, base: Base, source_language: str, target_language: str) -> Template:
    """A template by name ("plain", "chat", or "auto" for what suits the base), or from a YAML file.

    Raises:
        InvalidTemplate: there is none, or it cannot be used.
    """
    has_chat = bool(getattr(base.tokenizer, "chat_template", None))
    if name == "auto":
        name = "chat" if has_chat else "plain"
    named = resources.files("templora") / "templates" / f"{name}.yaml"
    file: Any = named if named.is_file() else Path(name)
    try:
        values: Any = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidTemplate(
            f"no template {str(name)!r} ({error}); say plain, chat, or a YAML file"
        ) from error
    if not isinstance(values, dict) or "prompt" not in values or not values.keys() <= FIELDS:
        raise InvalidTemplate(f"template {name} needs the key prompt, and may have end, terms and system")
    if wrong := next((key for key, value in values.items() if not isinstance(value, str)), None):
        raise InvalidTemplate(f"template {name}: {wrong} is no text; put it in quotes")
    if "end" not in values and not has_chat:
        raise InvalidTemplate(f"template {name} is for chat models, and this base is none; say plain")
    made = Template(
        values["prompt"],
        values.get("end"),
        values.get("terms", ""),
        values.get("system", ""),
        {"source_language": language(source_language), "target_language": language(target_language)},
    )
    try:
        made.ids(base, [("a", "b")], "a", {"a": "b"})
    except (KeyError, IndexError, ValueError) as error:
        raise InvalidTemplate(f"template {name} has a field that is not known: {error}") from error
    except TemplateError as error:
        raise InvalidTemplate(
            f"the chat template of this base refuses a translation ({error}); say plain, or another base"
        ) from error
    return made


def language(code: str) -> str:
    """The English name of a language code: zh → Chinese; anything else is taken as a name."""
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    return LANGUAGES.get(re.split("[-_]", code.lower())[0], code).title()
