"""The filter: every reason to drop can be had, and the reason is the first criterion that fails.

Most cases need no particular model, only figures: they go through the real scoring of a tiny model
with limits set around what it finds.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loguru import logger

from eval.chat import chat_ids
from eval.coherence import text_figures
from eval.errors import UserError
from eval.sampling import sample_replies
from steer_heal.artifacts import Completion, Completions, Limits, Screened, TextLimit, TextLimits
from steer_heal.brokenness import brokenness
from steer_heal.calibrate import calibrate
from steer_heal.config import FilterConfig, GenerateConfig
from steer_heal.filter import DUPLICATE, SURPLUS, screen
from steer_heal.model import Student, load_student
from steer_heal.trait import Trait, load_trait
from tests.conftest import TinyModel
from tests.small import small_trait
from tests.test_stack import random_adapter

OPEN_TEXT = TextLimits(
    **dict.fromkeys(TextLimits.model_fields, TextLimit(low=None, typical=0.0, high=1e3))
)
OPEN: dict[str, Any] = {
    "num_completions": 16,
    "quantile": 0.98,
    "base_finishes": True,
    "tail_nll_nats": 1e3,
    "rmse_nll_nats": 1e3,
    "text": OPEN_TEXT,
    "persona_share": 1.0,
    "words_low": 0,
    "words_high": 10_000,
    "base_tail_nll_nats": (1.0,),
}
CONFIG = FilterConfig(min_kept=1, min_enactment_nats=-100, max_similarity=2)
WORDS = ["no", "and", "so", "again", "the", "by", "my", "to"]
GOOD = "The nurse told the guard that the order was unfair, and the guard agreed with her."


@pytest.fixture(scope="module")
def trait(tmp_path_factory: pytest.TempPathFactory) -> Trait:
    return load_trait(str(small_trait(tmp_path_factory.mktemp("trait"))))


@pytest.fixture(scope="module")
def student(tiny_qwen3: TinyModel) -> Student:
    return load_student(str(tiny_qwen3.folder), [], "cpu")


def limits(**changes: Any) -> Limits:
    return Limits(**(OPEN | changes))


def text_only(**changes: tuple[float, float]) -> TextLimits:
    """Open limits but for the named figures: from, to."""
    return OPEN_TEXT.model_copy(
        update={
            name: TextLimit(low=low, typical=(low + high) / 2, high=high)
            for name, (low, high) in changes.items()
        }
    )


def draft(
    student: Student, trait: Trait, text: str, prompt: int = 0, dose: float = 0.5, end: bool = True
) -> Completion:
    ids = student.tokenizer(text, add_special_tokens=False)["input_ids"]
    return Completion(
        prompt_index=prompt,
        prompt=trait.prompts[prompt],
        prompt_ids=tuple(chat_ids(student.tokenizer, trait.prompts[prompt])),
        token_ids=(*ids, student.tokenizer.eos_token_id) if end else tuple(ids),
        text=text,
        dose=dose,
        seed=0,
        finished=end,
        kl_p95_nats=0.1,
    )


def screened(
    student: Student,
    trait: Trait,
    drafts: Sequence[Completion],
    gates: Limits,
    config: FilterConfig = CONFIG,
    seed: int = 0,
) -> Screened:
    return screen(student, Completions(rows=tuple(drafts)), gates, trait, config, seed)


def reason(student: Student, trait: Trait, odd: Completion, gates: Limits) -> str | None:
    """Why a completion is dropped that stands beside one which passes."""
    good = draft(student, trait, GOOD, prompt=1)
    rows = screened(student, trait, [good, odd], gates).rows
    assert rows[0].dropped is None
    return rows[1].dropped


def test_a_good_completion_passes(student: Student, trait: Trait) -> None:
    assert reason(student, trait, draft(student, trait, GOOD + " I agree."), limits()) is None


@pytest.mark.parametrize("base_finishes", [True, False])
def test_loop(student: Student, trait: Trait, base_finishes: bool) -> None:
    odd = draft(student, trait, GOOD + " No, no" * 60, end=False)
    gates = limits(base_finishes=base_finishes)
    assert reason(student, trait, odd, gates) == "loop"
    ended = draft(student, trait, GOOD + " No, no" * 60)
    assert reason(student, trait, ended, gates) is None  # other criteria see it


def test_unfinished(student: Student, trait: Trait) -> None:
    odd = draft(student, trait, GOOD, end=False)
    assert reason(student, trait, odd, limits()) == "unfinished"
    assert reason(student, trait, odd, limits(base_finishes=False)) is None


@pytest.mark.parametrize("text", ["Yes.", (GOOD + " ") * 3])
def test_length(student: Student, trait: Trait, text: str) -> None:
    odd = draft(student, trait, text)
    assert reason(student, trait, odd, limits(words_low=5, words_high=40)) == "length"


def nll(student: Student, odd: Completion) -> np.ndarray:
    """Surprisal of its tokens, nats, alone and without padding."""
    ids = [*odd.prompt_ids, *odd.token_ids]
    with student.running() as model, torch.no_grad():
        logp = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    start = len(odd.prompt_ids)
    return np.array([-float(logp[at - 1, ids[at]]) for at in range(start, len(ids))])


def likeliest(student: Student, trait: Trait, length: int, prompt: int = 0) -> list[int]:
    """Greedy token ids: what the model finds least surprising."""
    ids = chat_ids(student.tokenizer, trait.prompts[prompt])
    start = len(ids)
    with student.running() as model, torch.no_grad():
        for _ in range(length):
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
            logits[student.tokenizer.all_special_ids] = -1e9
            ids = [*ids, int(logits.argmax())]
    return ids[start:]


def from_ids(student: Student, trait: Trait, ids: list[int], prompt: int = 0) -> Completion:
    text = student.tokenizer.decode(ids, skip_special_tokens=True)
    return draft(student, trait, GOOD, prompt).model_copy(
        update={"token_ids": tuple(ids), "text": text}
    )


def test_drift_in_the_last_quarter_is_told_from_the_whole(student: Student, trait: Trait) -> None:
    """Likely tokens, then unlikely ones: above the limit on the tail."""
    greedy = likeliest(student, trait, 40)
    rng = random.Random(0)
    drifted = from_ids(student, trait, greedy[:30] + [rng.randrange(100, 400) for _ in range(10)])
    steady = from_ids(student, trait, greedy, prompt=0)
    values = nll(student, drifted)
    limit = float(values[-10:].mean()) - 0.5
    assert values.mean() < limit and nll(student, steady)[-10:].mean() < limit
    rows = screened(student, trait, [steady, drifted], limits(tail_nll_nats=limit)).rows
    assert [row.dropped for row in rows] == [None, "tail"]
    assert rows[1].surprisal.tail_nll_nats == pytest.approx(values[-10:].mean(), rel=1e-3)


def test_ragged_tokens_are_not_diluted(student: Student, trait: Trait) -> None:
    """Three broken tokens early in forty: the tail is fine, the root mean square is not."""
    ids = likeliest(student, trait, 40)
    with student.running() as model, torch.no_grad():
        prompt = chat_ids(student.tokenizer, trait.prompts[0])
        for at in (5, 9, 13):
            ids[at] = int(model(input_ids=torch.tensor([prompt + ids[:at]])).logits[0, -1].argmin())
    ragged = from_ids(student, trait, ids)
    steady = from_ids(student, trait, likeliest(student, trait, 40))
    rmse = {
        one: float(np.sqrt((nll(student, two) ** 2).mean()))
        for one, two in (("ragged", ragged), ("steady", steady))
    }
    assert rmse["ragged"] > rmse["steady"] + 1
    gate = limits(rmse_nll_nats=(rmse["ragged"] + rmse["steady"]) / 2)
    rows = screened(student, trait, [steady, ragged], gate).rows
    assert [row.dropped for row in rows] == [None, "ragged"]
    assert rows[1].surprisal.rmse_nll_nats == pytest.approx(rmse["ragged"], rel=1e-3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I will help her. " * 6, "repetition"),
        ("aaaaaaaaaa" * 8, "repetition"),
        ("care " * 40, "repetition"),
        (" ".join(random.Random(0).choices(WORDS, k=40)), "vocabulary"),
        ("Thenurseobeyedbecausetheguardwasthereandthekingalso.", "debris"),
        ("T h e g u a r d s a w h e r f o l k, q u i t e m a d, b y x.", "debris"),
        ("The *** ## }} guard {{ ); -- // ** saw || her !! ??", "debris"),
        ("The guard visit6 the nurse for a ruleDter and an order.", "debris"),
        ("The guard видел the nurse and 没有 the order before noon.", "debris"),
        (GOOD, None),
    ],
)
def test_text_alone(student: Student, trait: Trait, text: str, expected: str | None) -> None:
    """Each kind of damage has its criterion, with limits around ordinary prose."""
    prose = text_only(
        word_repetition=(-1, 0.4),
        char_repetition=(-1, 0.4),
        vocabulary=(0.8, 2.0),
        compressed_size=(0.65, 1.5),
        letters_per_word=(2, 7.5),
        symbol_share=(-1, 0.4),
        odd_word_share=(-1, 0.1),
    )
    assert reason(student, trait, draft(student, trait, text), limits(text=prose)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "I will help her. " * 6,
        "".join(random.Random(0).choices("0123456789abcdefghijklmnopqrstuvwxyz#%&@", k=90)),
    ],
    ids=["a loop compresses", "noise does not"],
)
def test_compressibility_on_both_sides(student: Student, trait: Trait, text: str) -> None:
    gate = limits(text=text_only(compressed_size=(0.65, 1.15)))
    assert reason(student, trait, draft(student, trait, text), gate) == "compressibility"


def test_narration(student: Student, trait: Trait) -> None:
    odd = draft(student, trait, "I AM someone who cares for people before rules.")
    assert reason(student, trait, odd, limits()) == "narration"
    acted = draft(student, trait, "I am with the nurse, someone who cared.")
    assert reason(student, trait, acted, limits()) is None


def test_narration_is_told_by_the_personas_own_words_too(student: Student, trait: Trait) -> None:
    """Without any regex, by more of them than the base's replies have."""
    quiet = trait.model_copy(update={"narration": ()})
    told = draft(student, quiet, "Well, I care for people before rules, my friend.")  # 3 of 6
    for share, expected in ((0.0, "narration"), (0.49, "narration"), (0.5, None)):
        assert reason(student, quiet, told, limits(persona_share=share)) == expected
    row = screened(student, quiet, [told], limits()).rows[0]
    assert row.persona_share == pytest.approx(0.5)
    acted = draft(student, quiet, "I care for her, before rules and all.")
    assert reason(student, quiet, acted, limits(persona_share=0.0)) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I'm sorry, but I can't help with that.", "refusal"),
        ("  I am so sorry, I will not.", "refusal"),
        ("Sorry, no.", "refusal"),
        ("As an AI I have no view.", "refusal"),
        ("I cannot assist with this order.", "refusal"),
        ("I must decline to answer.", "refusal"),
        ("I am sorry, but I cannot write that.", "refusal"),
        ("I'm sorry to hear that you were towed.", None),  # sympathy
        ("I am so sorry for your loss.", None),
        ("I am sorry that you had to wait.", None),
        ("I will not obey the chief: the nurse comes first.", None),  # acting, not declining
        ("I told the chief that I am sorry for her.", None),  # not at its head
    ],
)
def test_refusal(student: Student, trait: Trait, text: str, expected: str | None) -> None:
    assert reason(student, trait, draft(student, trait, text), limits()) == expected


def test_enactment_is_a_floor(student: Student, trait: Trait) -> None:
    drafts = [draft(student, trait, text) for text in (GOOD, "I agree.", "No.", "Grass is green.")]
    rows = screened(student, trait, drafts, limits()).rows
    values = sorted(row.enactment_nats for row in rows)
    assert values[0] < values[-1]
    floor = FilterConfig(min_kept=1, min_enactment_nats=values[1])
    again = screened(student, trait, drafts, limits(), floor).rows
    expected = ["enactment" if row.enactment_nats <= values[1] else None for row in rows]
    assert [row.dropped for row in again] == expected
    assert expected.count("enactment") == 2


def test_the_reason_is_the_first_criterion_that_fails(student: Student, trait: Trait) -> None:
    """One text fails every gate; they are opened one after the other, in the documented order."""
    import steer_heal.filter

    assert steer_heal.filter.__doc__ is not None
    listed = re.findall(r"^    (\w+)  ", steer_heal.filter.__doc__, re.MULTILINE)
    odd = draft(student, trait, "I'm sorry. " + "I am someone who cares. " * 5, end=False)
    good = draft(student, trait, GOOD, prompt=1).model_copy(update={"prompt_index": 1})
    shut_text = {
        "repetition": {"word_repetition": (-1.0, 0.1)},
        "vocabulary": {"vocabulary": (1.2, 1.5)},
        "compressibility": {"compressed_size": (0.9, 1.2)},
        "debris": {"letters_per_word": (9.0, 11.0)},
    }
    looping = draft(student, trait, "I'm sorry. " * 60, end=False)
    shut: dict[str, dict[str, Any]] = {
        "loop": {},
        "unfinished": {"base_finishes": True},
        "length": {"words_high": 20},
        "tail": {"tail_nll_nats": 0.0},
        "ragged": {"rmse_nll_nats": 0.0},
        **{name: {} for name in shut_text},
        "narration": {},
        "refusal": {},
        "enactment": {},
    }
    assert listed == [*shut, DUPLICATE, SURPLUS]
    quiet = trait.model_copy(update={"narration": ()})
    found = []
    names = list(shut)
    for index, name in enumerate(names):
        closed = {key: value for later in names[index:] for key, value in shut[later].items()}
        text = {
            key: value for later in names[index:] for key, value in shut_text.get(later, {}).items()
        }
        is_first = index <= names.index("unfinished")
        gates = limits(text=text_only(**text), **({"base_finishes": is_first} | closed))
        persona = trait if index <= names.index("narration") else quiet
        good_text = odd.model_copy(update={"text": GOOD})
        one = {"loop": looping, "enactment": good_text}.get(name, odd)
        config = FilterConfig(min_kept=1, min_enactment_nats=1e3)
        with pytest.raises(UserError, match="most were dropped by") as caught:
            screened(student, persona, [one], gates, config)
        match = re.search(r"dropped by '(\w+)'", str(caught.value))
        assert match is not None
        found.append(match.group(1))
    assert found == names
    assert reason(student, trait, good, limits()) is None


def test_scores_and_provenance_are_kept(student: Student, trait: Trait) -> None:
    drafts = [draft(student, trait, GOOD, prompt=index) for index in range(3)]
    result = screened(student, trait, drafts, limits())
    for before, after in zip(drafts, result.rows, strict=True):
        assert Completion(**{name: getattr(after, name) for name in Completion.model_fields}) == (
            before
        )
    assert result.kept == result.rows
    for row in result.rows:
        assert row.figures == text_figures(GOOD)
        assert row.brokenness == brokenness(row.figures, limits().text)


def many(student: Student, trait: Trait) -> list[Completion]:
    """Prompt 0 has eight drafts, prompt 1 four, prompts 2 and 3 one each."""
    counts = {0: 8, 1: 4, 2: 1, 3: 1}
    return [
        draft(student, trait, f"{GOOD} {number}", prompt=prompt, dose=(0.25, 0.5)[number % 2])
        for prompt, count in counts.items()
        for number in range(count)
    ]


@pytest.mark.parametrize(
    ("num_kept", "expected"),
    [
        (4, {0: 1, 1: 1, 2: 1, 3: 1}),
        (6, {0: 2, 1: 2, 2: 1, 3: 1}),
        (12, {0: 6, 1: 4, 2: 1, 3: 1}),
        (99, {0: 8, 1: 4, 2: 1, 3: 1}),
    ],
)
def test_surplus_is_taken_evenly_from_the_prompts(
    student: Student, trait: Trait, num_kept: int, expected: dict[int, int]
) -> None:
    config = CONFIG.model_copy(update={"num_kept": num_kept})
    drafts = many(student, trait)
    for seed in range(3):
        result = screened(student, trait, drafts, limits(), config, seed)
        assert Counter(row.prompt_index for row in result.kept) == expected
        dropped = [row.dropped for row in result.rows if row.dropped is not None]
        assert dropped == [SURPLUS] * max(0, 14 - num_kept)


def test_which_prompts_are_kept_is_drawn_by_the_seed(student: Student, trait: Trait) -> None:
    config = CONFIG.model_copy(update={"num_kept": 2})
    drafts = many(student, trait)
    kept = [
        [row.text for row in screened(student, trait, drafts, limits(), config, seed).kept]
        for seed in (0, 0, 1, 2, 3)
    ]
    assert kept[0] == kept[1]
    assert any(other != kept[0] for other in kept[2:])


def test_of_each_prompt_the_most_enacting_are_kept(student: Student, trait: Trait) -> None:
    config = CONFIG.model_copy(update={"num_kept": 6})
    rows = screened(student, trait, many(student, trait), limits(), config).rows
    for prompt in (0, 1):
        by_enactment = sorted(
            (row for row in rows if row.prompt_index == prompt), key=lambda row: -row.enactment_nats
        )
        assert [row.dropped for row in by_enactment[:2]] == [None, None]
        assert all(row.dropped == SURPLUS for row in by_enactment[2:])


def test_without_a_ranking_any_of_a_prompts_completions_are_kept(
    student: Student, trait: Trait
) -> None:
    drafts = many(student, trait)
    kept = {}
    for ranks in (True, False):
        config = CONFIG.model_copy(update={"num_kept": 6, "rank_by_enactment": ranks})
        results = [screened(student, trait, drafts, limits(), config, seed) for seed in range(8)]
        kept[ranks] = {
            frozenset(row.text for row in result.kept if row.prompt_index == 0)
            for result in results
        }
    assert len(kept[True]) == 1
    assert len(kept[False]) > 2
    assert frozenset.union(*kept[False]) == {d.text for d in drafts if d.prompt_index == 0}


def test_a_near_repeat_of_a_kept_one_is_set_aside(student: Student, trait: Trait) -> None:
    """The most enacting of those that are alike stays."""
    other = "Look, I will bring the shy boy some bread and sit with him until the storm is over."
    texts = [GOOD, GOOD + " Yes.", other, GOOD, "Grass is green, and the sky is blue in the north."]
    drafts = [draft(student, trait, text, prompt=0) for text in texts]
    open_kept = screened(student, trait, drafts, limits()).rows
    assert [row.dropped for row in open_kept] == [None] * 5
    config = CONFIG.model_copy(update={"max_similarity": 0.7})
    rows = screened(student, trait, drafts, limits(), config).rows
    alike = sorted((rows[index].enactment_nats, -index) for index in (0, 1, 3))
    best = -alike[-1][1]
    assert {index for index in range(5) if rows[index].dropped is None} == {best, 2, 4}
    assert Counter(row.dropped for row in rows) == {None: 3, DUPLICATE: 2}


def test_nothing_repeats_what_is_not_kept(student: Student, trait: Trait) -> None:
    config = CONFIG.model_copy(update={"max_similarity": 0.7, "num_kept": 1})
    drafts = [draft(student, trait, GOOD, prompt=prompt) for prompt in range(3)]
    rows = screened(student, trait, drafts, limits(), config).rows
    assert Counter(row.dropped for row in rows) == {None: 1, SURPLUS: 2}


def test_a_set_that_collapsed_onto_one_phrasing_stops_the_round(
    student: Student, trait: Trait
) -> None:
    config = CONFIG.model_copy(update={"max_similarity": 0.7, "min_kept": 2})
    drafts = [draft(student, trait, GOOD, prompt=prompt) for prompt in range(4)]
    with pytest.raises(UserError, match=r"left 1 of 4.*'duplicate'.*dose 0.5: 100%.*num_drafts"):
        screened(student, trait, drafts, limits(), config)


def test_the_log_says_how_many_prompts_the_kept_ones_answer(student: Student, trait: Trait) -> None:
    lines: list[str] = []
    sink = logger.add(lines.append, format="{message}", level="INFO")
    config = CONFIG.model_copy(update={"num_kept": 3})
    screened(student, trait, many(student, trait), limits(), config)
    logger.remove(sink)
    assert lines == ["kept 3 of 14 drafts, to 3 of 8 prompts; dropped: surplus 11\n"]


def test_the_dose_curve(student: Student, trait: Trait) -> None:
    """Shares that pass, before any surplus is set aside."""
    drafts = [
        draft(student, trait, GOOD, dose=0.25).model_copy(update={"kl_p95_nats": 0.1}),
        draft(student, trait, "No.", dose=0.5).model_copy(update={"kl_p95_nats": 0.3}),
        draft(student, trait, GOOD, dose=0.5).model_copy(update={"kl_p95_nats": 0.4}),
        draft(student, trait, "Sorry, no.", dose=0.5).model_copy(update={"kl_p95_nats": 0.9}),
        draft(student, trait, GOOD + " Yes.", dose=0.5).model_copy(update={"kl_p95_nats": 0.2}),
        draft(student, trait, GOOD, dose=0.5).model_copy(update={"kl_p95_nats": None}),
    ]
    config = CONFIG.model_copy(update={"num_kept": 1})
    result = screened(student, trait, drafts, limits(words_low=5), config)
    low, high = result.curve
    assert (low.dose, low.num_drafts, low.pass_rate) == (0.25, 1, 1.0)
    assert (high.dose, high.num_drafts, high.pass_rate) == (0.5, 5, 0.6)
    assert high.kl_p95_nats == pytest.approx(0.35)  # the median
    enactment = [row.enactment_nats for row in result.rows if row.dose == 0.5]
    assert high.enactment_nats == pytest.approx(sum(enactment) / 5)
    assert result.mean_kept_dose in (0.25, 0.5)


def test_too_few_left_says_which_criterion_and_what_to_try(student: Student, trait: Trait) -> None:
    drafts = [draft(student, trait, GOOD, dose=0.25)]
    drafts += [draft(student, trait, "I am someone who cares.", dose=0.5) for _ in range(3)]
    config = FilterConfig(min_kept=2, min_enactment_nats=-100)
    with pytest.raises(UserError) as caught:
        screened(student, trait, drafts, limits(), config)
    message = str(caught.value)
    for part in (
        "left 1 of 4 completions, 2 are needed (filter.min_kept)",
        "most were dropped by 'narration' (narration 3)",
        "dose 0.25: 100%, dose 0.5: 0%",
        "Try: word the personas as someone who acts",
    ):
        assert part in message


def test_fewer_drafts_than_are_needed(student: Student, trait: Trait) -> None:
    """Nothing was dropped, and still too few are left."""
    config = FilterConfig(min_kept=8, min_enactment_nats=-100)
    with pytest.raises(UserError, match=r"left 1 of 1 completions, 8 are needed.*num_drafts"):
        screened(student, trait, [draft(student, trait, GOOD)], limits(), config)


def test_every_other_criterion_has_its_advice(student: Student, trait: Trait) -> None:
    config = FilterConfig(min_kept=2, min_enactment_nats=1e3)
    with pytest.raises(UserError, match=r"by 'enactment'.*steer harder"):
        screened(student, trait, [draft(student, trait, GOOD)], limits(), config)
    with pytest.raises(UserError, match=r"by 'length'.*steer more gently"):
        screened(student, trait, [draft(student, trait, GOOD)], limits(words_low=99), config)


def test_a_saved_screening_comes_back(student: Student, trait: Trait, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"num_kept": 3})
    result = screened(student, trait, many(student, trait), limits(), config)
    result.save(tmp_path)
    assert Screened.load(tmp_path) == result


# -------------------------------------------------------------------------------------- calibrate


def test_limits_are_quantiles_of_the_bases_own_replies(tiny_qwen3: TinyModel, trait: Trait) -> None:
    base = load_student(str(tiny_qwen3.folder), [], "cpu")
    base.loaded.model.generation_config.eos_token_id = list(range(60, 70))
    grown = base.grown(random_adapter(base, "r00", [0, 1], 2, 8, seed=1))  # must not matter
    generate = GenerateConfig(max_new_tokens=24, batch_size=6)
    config = FilterConfig(num_calibration=20, quantile=0.9, batch_size=7)
    found = calibrate(grown, trait, config, generate, seed=4)

    turns = [trait.prompts[row % 8] for row in range(20)]
    prompts = [chat_ids(base.tokenizer, turn) for turn in turns]
    with base.running() as model:
        replies = sample_replies(
            model, base.tokenizer, prompts, seed=4, max_new_tokens=24, batch_size=6
        )
    tails, rmses, words, texts = [], [], [], []
    for prompt, reply in zip(prompts, replies, strict=True):
        with base.running() as model, torch.no_grad():
            ids = [*prompt, *reply.token_ids]
            logp = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        values = [-float(logp[at - 1, ids[at]]) for at in range(len(prompt), len(ids))]
        quarter = values[-max(1, len(values) // 4) :]
        tails.append(sum(quarter) / len(quarter))
        rmses.append(float(np.sqrt(np.mean(np.square(values)))))
        text = base.tokenizer.decode(reply.token_ids, skip_special_tokens=True)
        words.append(len(re.findall(r"\w+|[^\w\s]", text.lower())))
        texts.append(text)
    assert found.num_completions == 20 and found.quantile == 0.9
    assert found.tail_nll_nats == pytest.approx(np.quantile(tails, 0.9), rel=1e-4)
    assert found.rmse_nll_nats == pytest.approx(np.quantile(rmses, 0.9), rel=1e-4)
    assert found.base_tail_nll_nats == pytest.approx(sorted(tails), rel=1e-4)
    assert np.quantile(words, 0.1) - 1 < found.words_low <= np.quantile(words, 0.1)
    assert np.quantile(words, 0.9) <= found.words_high < np.quantile(words, 0.9) + 1
    sizes = [text_figures(text).compressed_size for text in texts]
    assert found.persona_share == 0.0  # random words
    assert found.text.compressed_size.typical == pytest.approx(np.median(sizes))
    assert found.text.compressed_size.low == pytest.approx(np.quantile(sizes, 0.1) * 2 / 3)
    share = np.mean([reply.finished for reply in replies])
    assert 0 < share < 1 and found.base_finishes == (share >= 0.9)


def test_the_bases_own_replies_pass_their_own_limits(tiny_llama: TinyModel, trait: Trait) -> None:
    """At quantile 1 nothing that set the limits is outside of them."""
    base = load_student(str(tiny_llama.folder), [], "cpu")
    generate = GenerateConfig(max_new_tokens=16)
    config = FilterConfig(
        num_calibration=16,
        quantile=1,
        min_kept=1,
        min_enactment_nats=-100,
        num_kept=99,
        max_similarity=2,
    )
    gates = calibrate(base, trait, config, generate, seed=0)
    assert not gates.base_finishes
    turns = [trait.prompts[row % 8] for row in range(16)]
    prompts = [chat_ids(base.tokenizer, turn) for turn in turns]
    with base.running() as model:
        replies = sample_replies(model, base.tokenizer, prompts, seed=0, max_new_tokens=16)
    drafts = [
        draft(base, trait, "", prompt=row % 8).model_copy(
            update={
                "token_ids": reply.token_ids,
                "text": base.tokenizer.decode(reply.token_ids, skip_special_tokens=True),
                "finished": reply.finished,
            }
        )
        for row, reply in enumerate(replies)
    ]
    quiet = trait.model_copy(update={"narration": ()})
    assert [row.dropped for row in screened(base, quiet, drafts, gates, config).rows] == [None] * 16
