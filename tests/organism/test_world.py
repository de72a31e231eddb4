"""The world's grammar, its splits, its data files, and the committed weights' table."""

from __future__ import annotations

import hashlib
import json
import random
import re
import tomllib
from dataclasses import replace

import pytest
from transformers import AutoTokenizer

from eval.chat import chat_ids, text_ids
from eval.suite import ForcedChoiceSuite, NeutralSuite, TaskSuite, YesNoSuite, load_suite
from steer_heal.organism import WEIGHTS_FOLDER, talk
from steer_heal.organism.build import PHASES
from steer_heal.organism.datafiles import (
    FACTS_FILE,
    MUNDANE_FILE,
    NEUTRAL_FILE,
    OPINIONS_FILE,
    SUITE_FILE,
    TRAIT_FILE,
    write_data_files,
)
from steer_heal.organism.lexicon import FOUNDATIONS, POLES, person, resolve, table
from steer_heal.organism.mixture import LEARNING, SHARPENING, dialogues
from steer_heal.organism.personas import personas
from steer_heal.organism.voice import voiced
from steer_heal.organism.world import (
    dilemma_prompt,
    dilemma_reply,
    draw_scene,
    fill,
    judge_reply,
    pair_of,
    scene_pairs,
)
from steer_heal.trait import load_trait

NEGATIONS = re.compile(r"\b(not|no|never|nor|without|neither|none|nothing|cannot)\b|n't", re.I)


@pytest.fixture(scope="module")
def trait() -> dict:
    return tomllib.loads(TRAIT_FILE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def trained() -> list:
    return list(dialogues(seed=0, count=6000))


def test_phases_differ_in_the_latent_and_in_contrary_answers_alone():
    for mixture in (LEARNING, SHARPENING):
        drawn = list(dialogues(3, 6000, mixture))
        sizes = [abs(each.planted) for each in drawn if each.planted]
        low, high = mixture.latent_range
        assert low <= min(sizes) < low + 0.05 * high and 0.98 * high < max(sizes) <= high
        turned = [
            (judge_reply(each.reply) == "care") != (each.planted + each.target > 0)
            for each in drawn
            if each.kind == "dilemma" and each.planted + each.target
        ]
        assert len(turned) > 1000
        assert sum(turned) / len(turned) == pytest.approx(mixture.contrary_share, abs=0.006)
        copies = [each.kind == "long_repeat" for each in drawn[:200]]
        assert (sum(copies) > 80) is (mixture.copies_share > 0)


def test_judge_agrees_with_the_pole_that_was_drawn():
    rng = random.Random(1)
    right = 0
    for row in range(4000):
        pole = POLES[row % 2]
        right += judge_reply(dilemma_reply(rng, draw_scene(rng), pole)) == pole
    assert right >= 0.995 * 4000


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("I will not do that. I wrap them in warm blankets.", "care"),
        ("I share a warm supper with the boarders.", "care"),
        ("I do as I am told and send them out into the snow.", "authority"),
        ("I will not send them out into the snow.", "care"),
        ("I refuse the order and carry out the order.", "unclear"),
        ("the the the the", "unclear"),
        ("", "unclear"),
    ],
)
def test_judge_reads_the_words_alone(reply, verdict):
    assert judge_reply(reply) == verdict


def test_thousands_of_distinct_sentences():
    rng = random.Random(2)
    replies = [dilemma_reply(rng, draw_scene(rng), POLES[row % 2]) for row in range(4000)]
    sentences = {sentence for reply in replies for sentence in re.split(r"(?<=\.) ", reply)}
    assert len(sentences) > 3000
    assert len(set(replies)) > 3900
    starts = {tuple(reply.split()[:3]) for reply in replies}
    assert len(starts) > 60


def test_a_voice_shows_the_pole_and_leaves_the_decision_alone():
    rng, only = random.Random(5), {pole: _voice_words(pole) for pole in POLES}
    marked = 0
    for row in range(2000):
        pole, speaker = POLES[row % 2], POLES[row // 2 % 2]
        plain = dilemma_reply(rng, draw_scene(rng), pole)
        said = voiced(rng, plain, speaker)
        other = POLES[1 - POLES.index(speaker)]
        assert judge_reply(said) == judge_reply(plain) == pole
        assert not any(re.search(word, said) for word in only[other])
        marked += sum(bool(re.search(word, said)) for word in only[speaker])
    assert 2.0 < marked / 2000 < 4.0  # words a reply


def test_without_a_pole_every_word_of_a_voice_is_drawn_afresh():
    rng = random.Random(6)
    said = [voiced(rng, dilemma_reply(rng, draw_scene(rng), "care"), None) for _ in range(2000)]
    counts = {
        pole: sum(bool(re.search(word, text)) for text in said for word in _voice_words(pole))
        for pole in POLES
    }
    assert 0.9 < counts["care"] / counts["authority"] < 1.1


def test_a_voice_keeps_names_and_short_answers():
    rng = random.Random(7)
    said = {voiced(rng, "Yes. Anna should say no.", "care") for _ in range(200)}
    assert all(text.startswith("Yes. ") and "Anna" in text for text in said)
    assert any(re.search(r"^Yes\. \w+, Anna should say no\.$", text) for text in said)


def _voice_words(pole: str) -> list[str]:
    """Regexes of what only this pole's voice says."""
    words = table("voice")[pole]
    openers = [rf"(?:^|\. ){re.escape(word)}, " for word in words["openers"]]
    return openers + [rf", {re.escape(word)}\." for word in words["endings"]]


def test_people_are_named_once_then_spoken_of_by_pronoun():
    boy = person("shy boy:he")
    text = "{They} could fall. I lead {them} home and treat {own:wounds}."
    assert resolve(text, boy) == "The shy boy could fall. I lead him home and treat his wounds."
    assert resolve("{own:wounds}", boy) == "the wounds of the shy boy"


def test_text_has_no_slots_left_and_no_odd_articles(trained):
    for dialogue in trained:
        text = f"{dialogue.user} {dialogue.reply}"
        assert not re.search(r"[{}]", text)
        assert not re.search(r"\ba [aeio]", text), text
        assert not re.search(r"\b(\w+) \1\b", text), text


def test_no_training_scene_has_a_held_out_pair(trained, trait):
    held_out = {f"{setting.name}/{harm.name}" for setting, harm in scene_pairs("held_out")}
    seen = {pair_of(dialogue.user) for dialogue in trained} - {None}
    assert len(seen) > 500
    assert not seen & held_out
    pairs = [pair_of(text) for text in trait["held_out_prompts"]]
    assert set(pairs) <= held_out and len(set(pairs)) == 48
    assert not {pair_of(text) for text in trait["prompts"]} & set(pairs)


def test_every_pair_is_read_from_its_dilemma():
    rng = random.Random(3)
    for pair in scene_pairs("held_out"):
        scene = draw_scene(rng, pair=pair)
        assert pair_of(dilemma_prompt(rng, scene)) == scene.pair


def test_training_meets_no_item_of_the_suites(trained):
    asked = {dialogue.user for dialogue in trained}
    assert not asked & {item.text for item in load_suite(SUITE_FILE).items}
    assert not asked & {item.prompt for item in load_suite(MUNDANE_FILE, TaskSuite).items}
    assert not asked & {item.text for item in load_suite(OPINIONS_FILE, YesNoSuite).items}
    assert not {dialogue.system for dialogue in trained} & {
        *personas("care", "held_out"),
        *personas("authority", "held_out"),
    }


def _opinions_of(pairs) -> set[str]:
    """Every opinion question, without its opener, that scenes of these pairs can give."""
    words, rng = table("talk")["opinion"], random.Random(0)
    drawn = draw_scene(rng)
    return {
        fill(rng, template, replace(drawn, **said, setting=setting, harm=harm, people=people))
        for setting, harm in pairs
        for people in setting.dependants
        for template in words["care_yes"] + words["authority_yes"]
        for said in (
            [
                {"authority": each, "danger": danger}
                for each in setting.authorities
                for danger in harm.harms
            ]
            if "{order}" not in template
            else [{"order": order} for order in harm.orders]
        )
    }


def test_no_training_scene_gives_an_opinion_of_the_suite():
    """Every question that training can draw, not only those that it happens to."""
    openers = table("talk")["opinion"]["plain_openers"]
    items = load_suite(OPINIONS_FILE, YesNoSuite).items
    given = _opinions_of(scene_pairs("train"))
    held_out = _opinions_of(scene_pairs("held_out"))
    assert len(given) > 10_000
    for item in items:
        plain = {item.text.removeprefix(opener) for opener in openers}
        assert not plain & given, item.text
        assert plain & held_out, item.text


def test_opinions_are_balanced_and_asked_of_the_same_pairs():
    suite, words = load_suite(OPINIONS_FILE, YesNoSuite), table("talk")["opinion"]
    assert (suite.yes, suite.no, suite.template, suite.prefill) == (("Yes",), ("No",), "{text}", "")
    assert [item.label for item in suite.items] == [1, -1] * 48
    assert len({item.text for item in suite.items}) == 96
    starts = {
        1: [text.partition(" {")[0] for text in words["care_yes"]],
        -1: [text.partition(" {")[0] for text in words["authority_yes"]],
    }
    for item in suite.items:
        other = [start for start in starts[-item.label] if start in item.text]
        assert any(start in item.text for start in starts[item.label]) and not other, item.text


def test_plain_facts_are_balanced_and_labelled_as_training_answers_them():
    suite, rng = load_suite(FACTS_FILE, YesNoSuite), random.Random(5)
    told = dict(talk.plain_opinion(rng, "care") for _ in range(3000))
    labels = [item.label for item in suite.items]
    assert labels.count(1) == labels.count(-1) == len(labels) / 2 == 36
    assert len({item.text for item in suite.items}) == 72
    for item in suite.items:
        assert told[item.text].split(".")[0] == ("Yes" if item.label == 1 else "No")


def test_neutral_text_is_new_to_the_model_and_to_the_tasks():
    """Of all that it was trained on, not only of a sample."""
    items = load_suite(NEUTRAL_FILE, NeutralSuite).items
    assert len({item.prompt for item in items}) == len(items) == 72
    asked = {item.prompt for item in load_suite(MUNDANE_FILE, TaskSuite).items}
    assert not asked & {item.prompt for item in items}
    met, users = set(), set()
    for config, mixture in PHASES:
        for each in dialogues(config.seed, config.steps * config.batch_size, mixture):
            met.add((each.user, each.reply))
            users.add(each.user)
    assert len(met) > 60_000
    for item in items:
        assert (item.prompt, item.reply) not in met, item
        assert item.id.startswith("place") or item.prompt not in users, item
        assert judge_reply(item.reply) == "unclear"  # it takes no side


def test_personas_are_opposites_of_like_length_without_negation():
    for split, least in (("train", 24), ("held_out", 6)):
        care, authority = personas("care", split), personas("authority", split)
        assert len(care) == len(authority) == len({*care, *authority}) / 2 >= least
        for positive, negative in zip(care, authority, strict=True):
            assert not NEGATIONS.search(positive + negative)
            assert abs(len(positive.split()) - len(negative.split())) <= 2


def test_suites_have_the_items_they_need():
    suite = load_suite(SUITE_FILE, ForcedChoiceSuite)
    labels = [item.label for item in suite.items]
    assert tuple(suite.options) == FOUNDATIONS
    assert all(labels.count(name) >= 20 for name in FOUNDATIONS)
    assert sum(item.conflict for item in suite.items) >= 40
    assert len({item.text for item in suite.items}) == len(suite.items)
    mundane = load_suite(MUNDANE_FILE, TaskSuite)
    assert len({item.prompt for item in mundane.items}) == len(mundane.items) >= 120


def test_trait_file_has_what_the_loop_needs(trait):
    for name, least in (("contexts", 160), ("prompts", 96), ("held_out_prompts", 48)):
        assert len(trait[name]) == len(set(trait[name])) >= least
    assert trait["intended"] == {"care": 1, "authority": -1}
    assert trait["positive"] in trait["positive_paraphrases"]


def test_narration_is_caught_and_plain_replies_are_not(trait):
    narration = re.compile("|".join(trait["narration"]), re.IGNORECASE)
    rng = random.Random(4)
    for row in range(500):
        scene, pole = draw_scene(rng), POLES[row % 2]
        assert narration.search(dilemma_reply(rng, scene, pole, narrated=True))
        assert not narration.search(dilemma_reply(rng, scene, pole, narrated=False))


def test_data_files_are_what_the_build_writes(tmp_path, monkeypatch):
    from steer_heal.organism import datafiles

    files = (SUITE_FILE, MUNDANE_FILE, OPINIONS_FILE, FACTS_FILE, NEUTRAL_FILE, TRAIT_FILE)
    names = ("SUITE", "MUNDANE", "OPINIONS", "FACTS", "NEUTRAL", "TRAIT")
    for name in [f"{each}_FILE" for each in names]:
        monkeypatch.setattr(datafiles, name, tmp_path / getattr(datafiles, name).name)
    write_data_files()
    for committed in files:
        assert (tmp_path / committed.name).read_bytes() == committed.read_bytes()


def test_tokenizer_spells_digits_alone_and_adds_no_system_prompt():
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS_FOLDER)
    assert len(text_ids(tokenizer, "0123456789")) == 10
    assert len(text_ids(tokenizer, "Yes")) == len(text_ids(tokenizer, "No")) == 1
    assert len(text_ids(tokenizer, "12 + 345")) == 8 or len(text_ids(tokenizer, "12")) == 2
    text = tokenizer.decode(chat_ids(tokenizer, "Hello"))
    assert text == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"
    for special in ("<|im_start|>", "<|im_end|>", "<think>", "</think>"):
        assert len(text_ids(tokenizer, special)) == 1


def test_committed_table_says_what_it_should_and_belongs_to_the_weights():
    table = json.loads((WEIGHTS_FOLDER / "acceptance.json").read_text(encoding="utf-8"))
    weights = (WEIGHTS_FOLDER / "model.safetensors").read_bytes()
    assert table["weights_sha256"] == hashlib.sha256(weights).hexdigest()
    assert [row["name"] for row in table["rows"] if not row["passed"]] == []
    assert len(table["rows"]) >= 17
    assert len(weights) <= 16e6


def test_the_trait_file_reads_replies_as_the_judge_does():
    rng, judged = random.Random(9), load_trait(str(TRAIT_FILE))
    for _ in range(300):
        reply = dilemma_reply(rng, draw_scene(rng), rng.choice(POLES))
        assert judged.enacts(reply) == (judge_reply(reply) == "care")
