"""`steer-heal chat`: what answers on its page. One model in memory, four ways to answer with it.

    base       the untouched model
    prompted   the same, with the positive persona as its system prompt
    steered    the student before the chosen round, with dose * that round's vector added
    healed     the student after the chosen round, with no prompt and no hook

All draw with the same random numbers, so they differ by what they would say and not by their luck.
A dialogue is token ids, as sampled: a reply is never tokenised again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from threading import Lock
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from eval.chat import chat_ids, next_turn_text, text_ids
from eval.errors import UserError
from eval.sampling import stop_token_ids, stream_reply
from steer_heal.config import RunConfig
from steer_heal.hooks import add_vector
from steer_heal.model import load_student, require_weights
from steer_heal.rounds import Run
from steer_heal.saved import SavedRun
from steer_heal.summary import summarise
from steer_heal.wording import visible

_MOST_DOSE = 4  # the slider's end, in multiples of the largest dose that a round trained on
_MOST_CHARACTERS = 20_000  # of a user turn


class _Message(BaseModel):
    """What page and server say to one another."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _require_text(text: str) -> str:
    """JSON can have halves of characters, which no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("this is no text: half of a character is in it") from error
    return text


Said = Annotated[str, Field(max_length=_MOST_CHARACTERS), AfterValidator(_require_text)]


class Turn(_Message):
    """A user turn, and how it was answered in one of the four ways."""

    user: Said
    reply_ids: tuple[Annotated[int, Field(ge=0)], ...]


class Question(_Message):
    """A user turn that one of the four is to answer."""

    condition: Literal["base", "prompted", "steered", "healed"]
    round: int = Field(ge=1)  # from 1
    dose: float = Field(ge=0, le=1000)  # multiples of the raw vector
    seed: int = Field(ge=0)
    temperature: float = Field(ge=0, le=10)  # 0: the likeliest token
    max_new_tokens: int = Field(ge=1, le=4096)
    earlier: tuple[Turn, ...]  # of this dialogue, first to last
    user: Said = Field(min_length=1)


class Answer(_Message):
    """A reply so far."""

    text: str
    reply_ids: tuple[int, ...]  # with the end-of-turn token where there is one


class About(_Message):
    """What the page says of the run."""

    run: str
    model: str
    trait: str
    persona: str  # the system prompt of what is prompted
    doses: tuple[float, ...]  # a round each: that its kept completions were sampled at, on average
    best_round: int | None  # its number, from 1; None: none is coherent
    most_dose: float  # where the slider ends
    max_new_tokens: int  # as the run's own replies


class Chat:
    """A run's model with its stack of adapters, which answers in four ways."""

    def __init__(self, saved: SavedRun, device: str) -> None:
        """Loads the model.

        Raises:
            UserError: it cannot be loaded, or it is not the one that the run was made on.
        """
        config = RunConfig.model_validate(saved.description.config)
        stack = Run(saved.path, config.seed).last_stack()[: len(saved.rounds)]
        self._saved = saved
        self._config = config
        self._student = load_student(config.model, stack, device)
        self._lock = Lock()  # adapters and hooks are the one model's: it does one thing at a time
        require_weights(self._student, saved.description.model, saved.path)

    def about(self) -> About:
        """What there is to choose from."""
        best = summarise(self._saved).best
        doses = [each.screened.mean_kept_dose for each in self._saved.rounds]
        return About(
            run=self._saved.path.resolve().name,
            model=self._config.model,
            trait=self._saved.trait.name,
            persona=self._saved.trait.positive,
            doses=tuple(doses),
            best_round=best.number if best is not None else None,
            most_dose=float(f"{_MOST_DOSE * max(doses):.2g}"),  # browsers round a slider's values
            max_new_tokens=self._config.evaluate.max_new_tokens,
        )

    def answer(self, question: Question) -> Iterator[Answer]:
        """Yields the reply as it grows.

        Raises:
            UserError: a round that the run has not, or more than the model can read.
        """
        if question.round > len(self._saved.rounds):
            raise UserError(f"round {question.round} of {len(self._saved.rounds)}: there is none")
        tokenizer = self._student.tokenizer
        growing = stream_reply(
            self._student.loaded.model,
            tokenizer,
            self._prompt_ids(question),
            seed=_turn_seed(question.seed, len(question.earlier)),
            max_new_tokens=question.max_new_tokens,
            temperature=question.temperature,
            around_segment=lambda: self._acting(question),
        )
        for reply in growing:
            text = tokenizer.decode(reply.token_ids, skip_special_tokens=True)
            yield Answer(text=visible(text), reply_ids=reply.token_ids)

    def _prompt_ids(self, question: Question) -> list[int]:
        """Token ids of the dialogue up to the assistant tag: [tokens]."""
        model, tokenizer = self._student.loaded.model, self._student.tokenizer
        stops = stop_token_ids(model, tokenizer)
        system = self._saved.trait.positive if question.condition == "prompted" else None
        first, *following = (*(turn.user for turn in question.earlier), question.user)
        ids = chat_ids(tokenizer, first, system)
        for turn, user in zip(question.earlier, following, strict=True):
            ids += [token for token in turn.reply_ids if token not in stops]
            ids += text_ids(tokenizer, next_turn_text(tokenizer, user))
        text_config = model.config.get_text_config(decoder=True)
        if max(ids) >= text_config.vocab_size:
            raise UserError("an earlier reply has tokens that this model has not")
        room = getattr(text_config, "max_position_embeddings", None)
        if room is not None and len(ids) + question.max_new_tokens > room:
            remedy = "ask for fewer, or begin a new one" if question.earlier else "ask for fewer"
            raise UserError(
                f"the dialogue has {len(ids)} tokens; with {question.max_new_tokens} more there "
                f"would be more than the {room} that the model reads: {remedy}"
            )
        return ids

    @contextmanager
    def _acting(self, question: Question) -> Iterator[None]:
        """The model as the one asked, and nobody else at it."""
        number = question.round
        adapters = {"steered": number - 1, "healed": number}.get(question.condition, 0)
        student = replace(self._student, adapters=self._student.adapters[:adapters])
        with self._lock, student.running(), ExitStack() as stack:
            if question.condition == "steered":
                vector = self._saved.rounds[number - 1].vector
                layers = [student.loaded.layers[index] for index in vector.band]
                dose = torch.tensor([question.dose])
                stack.enter_context(add_vector(layers, vector.band_directions, dose))
            yield


def _turn_seed(seed: int, turn: int) -> int:
    """A seed of its own for each turn of a dialogue."""
    return int(np.random.SeedSequence((seed, turn)).generate_state(1)[0])
