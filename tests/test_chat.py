"""The chat: against transformers and peft alone, and through its real server in a real browser.

The model's tokenizer has hostile tokens, so that half of all that it says is script.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import PeftModel
from playwright.sync_api import Page, Route, expect
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval.errors import UserError
from steer_heal.chat import Answer, Chat, Question, Turn
from steer_heal.saved import read_saved_run
from tests.browser import PHONE_WIDTH, Tabs
from tests.processes import Command, command, portable_settings, refusal, rounds_of
from tests.tiny import tiny_model, tiny_tokenizer

FOUR = ["base", "prompted", "steered", "healed"]
ASKED = "What do you do at the ward?"
THEN = "And then?"
PLAIN: dict[str, Any] = {
    "round": 2,
    "dose": 0.5,
    "seed": 0,
    "temperature": 0.0,
    "max_new_tokens": 10,
    "earlier": (),
    "user": ASKED,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, and its run of two rounds in rounds/small."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = tiny_tokenizer("qwen3")
    tokenizer.add_tokens([f"<script>window.hacked={n}</script>" for n in range(200)])
    tokenizer.add_tokens([f"<img src=x{n} onerror=window.hacked=1>" for n in range(200)])
    for part in (tiny_model("qwen3", tokenizer), tokenizer):
        part.save_pretrained(folder / "model")
    learning = ["heal.learning_rate=0.01"]  # else two rounds say nearly the same
    settings = portable_settings(folder / "model", folder)
    settings = [each for each in settings if not each.startswith("heal.learning_rate")] + learning
    rounds_of(folder, 2, *settings)
    return folder


@pytest.fixture(scope="module")
def chat(made: Path) -> Chat:
    return Chat(read_saved_run(made / "rounds" / "small"), "cpu")


@pytest.fixture(scope="module")
def server(made: Path) -> Iterator[str]:
    """The address of a chat that is being served."""
    running = Command(made, "chat", "small", "port=0", "device=cpu")
    yield _address(running)
    running.send(signal.SIGINT)
    running.end()


def _address(running: Command) -> str:
    running.wait_for("(Ctrl-C ends it)")
    found = re.search(r"chat: (http://127\.0\.0\.1:\d+) ", running.err)
    assert found is not None, running.err
    return found[1]


def _last(chat: Chat, **fields: Any) -> Answer:
    *_, last = chat.answer(Question(**(PLAIN | fields)))
    return last


def _post(address: str, **fields: Any) -> list[dict[str, Any]]:
    """Every event's data, in order, of an answer of the server."""
    request = urllib.request.Request(
        f"{address}/answer",
        data=json.dumps(PLAIN | fields).encode(),
        headers={"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        text = response.read().decode()
    return [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: ")]


# ----------------------------------------------------------------------------------- what is said


class Alone:
    """The same four answers with transformers and peft, by nothing of ours."""

    def __init__(self, folder: Path) -> None:
        self.run = folder / "rounds" / "small"
        self.model = folder / "model"
        self.tokenizer = AutoTokenizer.from_pretrained(self.model)
        self.trait = json.loads((self.run / "run.json").read_text())["trait"]

    def text(self, condition: str, number: int, dose: float) -> str:
        """The likeliest reply to ASKED."""
        rounds = {"steered": number - 1, "healed": number}.get(condition, 0)
        model = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
        layers = list(model.model.layers)
        for index in range(rounds):  # one merged into the other
            adapter = str(self.run / f"round-{index:02d}" / "adapter")
            model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        if condition == "steered":
            self._steer(layers, number, dose)
        turns = [{"role": "user", "content": ASKED}]
        if condition == "prompted":
            turns.insert(0, {"role": "system", "content": self.trait["positive"]})
        ids = self.tokenizer.apply_chat_template(
            turns,
            add_generation_prompt=True,
            enable_thinking=False,
            return_tensors="pt",
            return_dict=True,
        )
        out = model.eval().generate(**ids, do_sample=False, max_new_tokens=10, top_k=None)
        new = out[0, ids["input_ids"].shape[1] :]
        return str(self.tokenizer.decode(new, skip_special_tokens=True))

    def _steer(self, layers: list[Any], number: int, dose: float) -> None:
        folder = self.run / f"round-{number - 1:02d}"
        directions = load_file(folder / "vector.safetensors")["directions"]
        for index in json.loads((folder / "vector.json").read_text())["band"]:
            added = dose * directions[index]
            layers[index].register_forward_hook(lambda module, args, out, added=added: out + added)


def test_each_of_the_four_says_what_transformers_and_peft_alone_say(made: Path, chat: Chat) -> None:
    alone, said = Alone(made), {}
    for condition, number, dose in (
        ("base", 2, 0.5),
        ("prompted", 2, 0.5),
        ("steered", 1, 2.0),
        ("steered", 2, 2.0),
        ("healed", 1, 0.5),
        ("healed", 2, 0.5),
    ):
        answer = _last(chat, condition=condition, round=number, dose=dose)
        assert answer.text == alone.text(condition, number, dose)
        said[condition, number] = answer.text
    assert len(set(said.values())) == len(said), "they say the same: the test would see nothing"


def test_a_reply_grows_and_its_draws_are_its_seeds(chat: Chat) -> None:
    question = Question(**(PLAIN | {"condition": "base", "temperature": 1.0, "seed": 3}))
    grown = [answer.reply_ids for answer in chat.answer(question)]
    assert len(grown) >= 3
    for before, after in itertools.pairwise(grown):
        assert after[: len(before)] == before and len(after) > len(before)
    assert [answer.reply_ids for answer in chat.answer(question)] == grown
    other = question.model_copy(update={"seed": 4})
    assert [answer.reply_ids for answer in chat.answer(other)] != grown


def test_dose_0_of_round_1_is_the_base_and_a_large_one_is_not(chat: Chat) -> None:
    base = _last(chat, condition="base")
    assert _last(chat, condition="steered", round=1, dose=0.0) == base
    assert _last(chat, condition="steered", round=1, dose=4.0) != base


def test_a_dialogue_is_what_the_template_makes_of_its_turns(made: Path, chat: Chat) -> None:
    """The second turn of the healed model, read as the template renders the whole dialogue."""
    first = _last(chat, condition="prompted")
    earlier = (Turn(user=ASKED, reply_ids=first.reply_ids),)
    question = Question(**(PLAIN | {"condition": "prompted", "earlier": earlier, "user": THEN}))
    tokenizer = AutoTokenizer.from_pretrained(made / "model")
    trait = json.loads((made / "rounds/small/run.json").read_text())["trait"]
    turns = [
        {"role": "system", "content": trait["positive"]},
        {"role": "user", "content": ASKED},
        {"role": "assistant", "content": "REPLY"},
        {"role": "user", "content": THEN},
    ]
    before, after = tokenizer.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=True, enable_thinking=False
    ).split("REPLY")
    # this template shows a shut think where the reply began, and not again when it is shown
    opened = "<think>\n\n</think>\n\n"
    parts = [
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before + opened, after)
    ]
    stop = tokenizer.eos_token_id
    wanted = [*parts[0], *(token for token in first.reply_ids if token != stop), *parts[1]]
    model = AutoModelForCausalLM.from_pretrained(made / "model", dtype=torch.float32).eval()
    out = model.generate(torch.tensor([wanted]), do_sample=False, max_new_tokens=10, top_k=None)
    *_, answer = chat.answer(question)
    assert list(answer.reply_ids) == out[0, len(wanted) :].tolist()


def test_what_the_model_cannot_read_is_said(chat: Chat) -> None:
    with pytest.raises(UserError, match=r"than the 2048 that the model reads: ask for fewer$"):
        _last(chat, condition="base", max_new_tokens=2048)
    with pytest.raises(UserError, match=r"ask for fewer, or begin a new one$"):
        earlier = (Turn(user="x", reply_ids=(1,)),)
        _last(chat, condition="base", max_new_tokens=2048, earlier=earlier)
    with pytest.raises(UserError, match="round 3 of 2"):
        _last(chat, condition="healed", round=3)
    with pytest.raises(UserError, match="tokens that this model has not"):
        _last(chat, condition="base", earlier=(Turn(user="x", reply_ids=(10**6,)),))


# --------------------------------------------------------------------------------------- the server


def test_answers_at_the_same_time_are_those_that_are_given_alone(server: str) -> None:
    asked = [
        {"condition": condition, "max_new_tokens": 40, "temperature": 1.0, "dose": 2.0}
        for condition in FOUR
    ]
    alone = [_post(server, **each)[-1] for each in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(lambda each: _post(server, **each)[-1], asked))
    assert together == alone
    assert len({each["text"] for each in alone}) == 4


def test_what_is_wrong_with_a_question_is_said(server: str) -> None:
    half = "a\ud800b"  # of a character
    wrong = ({"dose": -1}, {"round": 0}, {"user": ""}, {"condition": "other"}, {"x": 1})
    for fields in (*wrong, {"user": half}, {"earlier": [{"user": half, "reply_ids": []}]}):
        with pytest.raises(urllib.error.HTTPError, match="422"):
            _post(server, **({"condition": "base"} | fields))
    (trouble,) = _post(server, condition="healed", round=3)
    assert trouble == "round 3 of 2: there is none"


def test_other_names_than_its_own_are_refused(server: str) -> None:
    request = urllib.request.Request(f"{server}/about", headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request, timeout=60)


# --------------------------------------------------------------------------------------- the page


def _ask(page: Page, text: str) -> None:
    page.get_by_label("Your turn").fill(text)
    page.get_by_role("button", name="Send").click()
    _done(page)


def _done(page: Page) -> None:
    expect(page.get_by_role("button", name="Again")).to_be_enabled(timeout=60_000)


def _texts(page: Page, turn: int = -1) -> dict[str, str]:
    """Condition -> its answer in a turn."""
    boxes = page.locator(".turn").nth(turn).locator(".answer")
    return {
        str(box.get_attribute("data-who")): box.locator(".text").inner_text() for box in boxes.all()
    }


def test_four_answer_and_what_they_say_is_text(server: str, tabs: Tabs) -> None:
    page = tabs.open(server)
    _ask(page, ASKED)
    said = _texts(page)
    assert list(said) == FOUR and all(said.values())
    assert len(set(said.values())) == 4
    assert any("<script>window.hacked" in text for text in said.values())
    assert any("<img src=x" in text for text in said.values())
    assert page.evaluate("window.hacked") is None
    assert page.locator("main script, main img").count() == 0
    _ask(page, "<script>window.hacked=1</script>")
    assert page.locator(".turn").nth(1).locator(".user").inner_text().startswith("<script>")
    assert page.evaluate("window.hacked") is None
    assert {request.startswith((server, "data:")) for request in tabs.requests} == {True}


def test_slider_and_round_selector_act(server: str, tabs: Tabs, chat: Chat) -> None:
    page = tabs.open(server)
    dose, number = page.get_by_label("dose"), page.get_by_label("round")
    best = chat.about().best_round or 2
    expect(number).to_have_value(str(best))
    about = chat.about()
    assert float(dose.input_value()) == pytest.approx(about.doses[best - 1], rel=1e-3)
    _ask(page, ASKED)
    before = _texts(page)

    dose.evaluate("e => { e.value = e.max; e.dispatchEvent(new Event('input')); }")
    dose.dispatch_event("change")
    _done(page)
    louder = _texts(page)
    assert {name for name in FOUR if louder[name] != before[name]} == {"steered"}
    label = page.locator("[data-who=steered] small").inner_text()
    assert label == f"dose {about.most_dose:g}, round {best}"

    number.select_option(str(3 - best))
    _done(page)
    other = _texts(page)
    assert {name for name in FOUR if other[name] != before[name]} == {"steered", "healed"}
    assert float(dose.input_value()) == pytest.approx(about.doses[2 - best], rel=1e-3)

    number.select_option(str(best))
    _done(page)
    assert _texts(page) == before  # the seed is the same

    page.get_by_label("seed").fill("7")
    dose.dispatch_event("change")
    _done(page)  # all four, as they are to have the same draws
    assert all(text != before[name] for name, text in _texts(page).items())


def test_no_setting_can_be_typed_before_the_runs_own_are_there(server: str, tabs: Tabs) -> None:
    page = tabs.open("about:blank")
    held: list[Route] = []
    page.route("**/about", lambda route: held.append(route))
    page.goto(server)
    names = ("round", "dose", "temperature", "tokens", "seed")
    for name in names:
        expect(page.get_by_label(name)).to_be_disabled()
    page.get_by_label("Your turn").fill(ASKED)
    page.get_by_label("Your turn").press("Enter")
    assert page.locator(".turn").count() == 0
    expect(page.get_by_label("Your turn")).to_have_value(ASKED)
    held[0].continue_()
    for name in names:
        expect(page.get_by_label(name)).to_be_enabled()
    page.get_by_label("tokens").fill("7")
    _ask(page, ASKED)
    expect(page.get_by_label("tokens")).to_have_value("7")


def test_turns_follow_one_another_and_begin_anew(server: str, tabs: Tabs) -> None:
    page = tabs.open(server)
    _ask(page, ASKED)
    first = _texts(page)
    page.get_by_label("Your turn").fill(THEN)
    page.get_by_label("Your turn").press("Enter")
    _done(page)
    assert page.locator(".turn").count() == 2
    assert _texts(page, 0) == first and all(_texts(page).values())

    page.get_by_label("seed").fill("7")
    page.get_by_role("button", name="Again").click()
    _done(page)
    assert _texts(page, 0) == first and _texts(page, 1) != first

    page.get_by_role("button", name="New").click()
    assert page.locator(".turn").count() == 0
    page.get_by_label("seed").fill("0")
    _ask(page, ASKED)
    assert _texts(page) == first


# from inside the page: on a busy machine the answer is over before a click from outside is there
STOP_ONCE_BASE_SAYS_SOMETHING = """
    () => new MutationObserver((changes, watching) => {
        if (!document.querySelector("[data-who=base] .text")?.textContent) return;
        watching.disconnect();
        document.getElementById("stop").click();
    }).observe(document.body, { childList: true, subtree: true, characterData: true })
"""


def test_an_answer_is_stopped_and_a_trouble_is_told(server: str, tabs: Tabs) -> None:
    page = tabs.open(server, width=PHONE_WIDTH)
    page.get_by_label("tokens").fill("1800")
    page.get_by_label("temperature").fill("0")  # the likeliest tokens go round for ever
    page.evaluate(STOP_ONCE_BASE_SAYS_SOMETHING)
    _ask(page, ASKED)
    stopped = _texts(page)["base"]
    assert 0 < len(stopped) < 1800  # a token is a character at the least
    page.wait_for_timeout(300)
    assert _texts(page)["base"] == stopped

    page.get_by_label("tokens").fill("4000")
    page.get_by_role("button", name="Again").click()
    _done(page)
    causes = page.locator(".cause").all_inner_texts()
    assert len(causes) == 4 and all("reads: ask for fewer" in cause for cause in causes)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE_WIDTH


# --------------------------------------------------------------------------- beginning and ending


def test_ctrl_c_ends_it_in_the_middle_of_an_answer(made: Path) -> None:
    running = Command(made, "chat", "small", "port=0", "device=cpu")
    address = _address(running)
    question = PLAIN | {"condition": "base", "max_new_tokens": 2000}
    request = urllib.request.Request(
        f"{address}/answer",
        data=json.dumps(question).encode(),
        headers={"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        assert response.readline().startswith(b"data: ")
        processes = [psutil.Process(running.pid), *psutil.Process(running.pid).children(True)]
        running.send(signal.SIGINT)
        finished = running.end()
    assert finished.code == 130, finished.err
    assert "Traceback" not in finished.err
    assert finished.err.splitlines()[-1] == "stopped; nothing was changed"
    assert not any(process.is_running() for process in processes)
    with socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))):
        pass  # the port is free again


def test_an_answer_that_the_servers_end_cuts_off_is_not_shown_as_whole(
    made: Path, tabs: Tabs
) -> None:
    running = Command(made, "chat", "small", "port=0", "device=cpu")
    page = tabs.open(_address(running))
    page.get_by_label("tokens").fill("1800")
    page.get_by_label("temperature").fill("0")  # all but the prompted go round for ever
    page.get_by_label("Your turn").fill(ASKED)
    page.get_by_role("button", name="Send").click()
    expect(page.locator("[data-who=base] .text")).not_to_be_empty(timeout=60_000)
    running.send(signal.SIGINT)
    assert running.end().code == 130
    _done(page)
    for name in ("base", "steered", "healed"):
        expect(page.locator(f"[data-who={name}] .cause")).not_to_be_empty()
    tabs.errors.clear()  # the browser's own, of connections that were cut


def test_what_cannot_be_served_is_said_in_one_message(made: Path, tmp_path: Path) -> None:
    rounds = Path(shutil.copytree(made / "rounds", tmp_path / "rounds"))
    assert "no run nowhere" in refusal(command(tmp_path, "chat", "nowhere"))
    assert "expected a whole number" in refusal(command(tmp_path, "chat", "small", "port=x"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = refusal(command(tmp_path, "chat", "small", f"port={port}"))
    assert f"port={port} cannot be listened on" in message and "Address already in use" in message
    assert "cannot be listened on" in refusal(
        command(tmp_path, "chat", "small", "host=no.such.host.invalid")
    )

    description = rounds / "small" / "run.json"
    saved = json.loads(description.read_text())
    description.write_text(json.dumps(saved | {"model": "0" * 64}))
    message = refusal(command(tmp_path, "chat", "small", "port=0"))
    assert "its weights have changed" in message
    saved["config"]["model"] = str(tmp_path / "gone")
    description.write_text(json.dumps(saved))
    assert str(tmp_path / "gone") in refusal(command(tmp_path, "chat", "small", "port=0"))

    for number in (0, 1):
        (rounds / "small" / f"round-0{number}" / "DONE").unlink()
    message = refusal(command(tmp_path, "chat", "small", "port=0"))
    assert "no round is finished yet" in message


def test_libraries_that_are_not_there_are_named(made: Path) -> None:
    program = "import sys; sys.modules['uvicorn'] = None\n"
    program += "from steer_heal.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "chat", "small"],
        cwd=made,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert "uvicorn is not there" in done.stderr and "steer-heal[chat]" in done.stderr
    assert "Traceback" not in done.stderr
