"""Chat templates: from turns to token ids, with the markers and the BOS that the template writes.

Every prompt of the project is made here. Turns are rendered to text by the template, then tokenised
with no special token added: the template has written them, and a tokenizer that adds its own (Llama
3, Gemma) would put a second BOS in front.
"""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError

from eval.errors import UserError

# Llama 3.2's template writes today's date into the system turn unless it is told another: an
# evaluation made after midnight would have other inputs than the one that it is paired with. This
# is the day that Llama 3.1's template defaults to.
_DAY = "26 Jul 2024"
_MARK = "\u2603SNOWMAN\u2603"  # a text that no template treats specially


class ChatTemplateError(UserError):
    """The tokenizer cannot render the turns asked for."""


def chat_ids(tokenizer: Any, user: str, system: str | None = None) -> list[int]:
    """Token ids of a prompt up to and including the assistant tag: [tokens].

    A template without a system role (Gemma) gets the system text at the head of the user turn. A
    template that can open a think block is asked not to.
    """
    return _tokenise(tokenizer, chat_text(tokenizer, user, system))


def chat_text(tokenizer: Any, user: str, system: str | None = None, thinking: bool = False) -> str:
    """The prompt of `chat_ids` as text, special tokens included.

    Args:
        thinking: ask a template that can open a think block for one.
    """
    _require_template(tokenizer)
    turns = [{"role": "user", "content": user}]
    if system is not None:
        if has_system_role(tokenizer):
            turns.insert(0, {"role": "system", "content": system})
        else:
            turns[0]["content"] = f"{system}\n\n{user}"
    return _render(tokenizer, turns, thinking)


def next_turn_text(tokenizer: Any, user: str) -> str:
    """What the template puts between the assistant's last word and its next turn.

    The assistant's closing marker, the user turn `user`, and the assistant tag: everything that
    follows a first reply, as text.
    """
    _require_template(tokenizer)
    turns = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": _MARK},
        {"role": "user", "content": user},
    ]
    _, mark, following = _render(tokenizer, turns).rpartition(_MARK)
    if not mark:
        raise ChatTemplateError("the chat template does not show the assistant's earlier turns")
    return following


def has_system_role(tokenizer: Any) -> bool:
    """Whether a system turn is shown; else its text stands at the head of the user turn."""
    turns = [{"role": "system", "content": _MARK}, {"role": "user", "content": "x"}]
    try:
        return _MARK in _render(tokenizer, turns)
    except TemplateError:  # whatever the wording: Mistral's speaks of roles that must alternate
        return False  # a template broken otherwise raises again on the turns themselves


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a piece of text, with nothing added before or after: [tokens]."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _tokenise(tokenizer: Any, templated: str) -> list[int]:
    ids = text_ids(tokenizer, templated)
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        raise ChatTemplateError("the chat template writes two BOS tokens")
    return ids


def _render(tokenizer: Any, turns: list[dict[str, str]], thinking: bool = False) -> str:
    """Turns as text, up to and including the assistant tag."""
    return tokenizer.apply_chat_template(
        turns,
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=thinking,
        date_string=_DAY,
    )


def _require_template(tokenizer: Any) -> None:
    if not getattr(tokenizer, "chat_template", None):
        raise ChatTemplateError(
            "the tokenizer has no chat template: take an instruction-tuned model, or add a "
            "chat_template.jinja to the model's folder"
        )
