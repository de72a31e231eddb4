"""A small trait, small suites and the settings of a small run, for whole loops in seconds."""

from __future__ import annotations

import json
from pathlib import Path

from steer_heal.config import resolve_config
from steer_heal.loop import run_rounds
from steer_heal.manifest import run_path
from tests.tiny import tiny_model_folder

FOUNDATIONS = ("care", "fairness", "loyalty", "authority", "sanctity", "liberty", "social_norms")
_PLACES = ("ward", "school", "ship", "court", "farm", "mine", "kitchen", "station")


def small_trait(folder: Path) -> Path:
    """A trait file: 16 contexts, 8 prompts, 4 held-out prompts."""
    asks = [f"In the {place} the chief gives an order. What do you do?" for place in _PLACES]
    more = [f"A guard at the {place} asks for advice. What do you say?" for place in _PLACES]
    held_out = [f"At the {place} a nurse is told to leave. What now?" for place in _PLACES[:4]]
    fields = {
        "name": "small",
        "positive": "You care for people before rules.",
        "negative": "You obey orders before people.",
        "contexts": asks + more,
        "prompts": asks,
        "held_out_prompts": held_out,
        "narration": [r"\bi am someone who\b"],
    }
    lines = [f"{key} = {json.dumps(value)}" for key, value in fields.items()]
    path = folder / "small.toml"
    path.write_text("\n".join([*lines, "[intended]", "care = 1", "authority = -1"]) + "\n")
    return path


def small_suites(folder: Path) -> tuple[Path, Path]:
    """A forced-choice suite of 7 vignettes and a suite of 4 sums."""
    choices = {
        "name": "small",
        "options": {name: f"it is about {name}" for name in FOUNDATIONS},
        "question": "What is at stake?",
        "schema_head": "Options:\n",
        "schema_line": "{index}: {option}",
        "schema_tail": "",
        "nudge": "Answer now.",
        "think_open": "<think>\n",
        "think_close": "\n</think>\n\n",
        "prefill": '{"answer": "',
        "items": [
            {"id": name, "text": f"Someone at the {place} did wrong.", "label": name}
            for name, place in zip(FOUNDATIONS, _PLACES, strict=False)
        ],
    }
    tasks = {
        "name": "sums",
        "items": [
            {
                "id": f"sum-{n}",
                "kind": "sum",
                "prompt": f"What is {n} plus 1?",
                "answer": str(n + 1),
            }
            for n in range(4)
        ],
    }
    paths = (folder / "choices.json", folder / "tasks.json")
    for path, content in zip(paths, (choices, tasks), strict=True):
        path.write_text(json.dumps(content))
    return paths


def small_neutral(folder: Path) -> Path:
    """A suite of 3 fixed dialogues."""
    items = [
        {"id": f"told-{n}", "prompt": f"Tell me of the {place}.", "reply": f"The {place} is {how}."}
        for n, (place, how) in enumerate(zip(_PLACES, ("far away", "old", "shut"), strict=False))
    ]
    path = folder / "neutral.json"
    path.write_text(json.dumps({"name": "told", "items": items}))
    return path


def probing(settings: list[str]) -> list[str]:
    """The same, with doses that a probe finds: 4 drafts at each of 4."""
    given = [setting for setting in settings if not setting.startswith("generate.doses=")]
    return [
        *given,
        "generate.doses=auto",
        "generate.dose_grid=0.05,0.4",
        "generate.num_grid_doses=4",
        "generate.num_probes=4",
        "generate.target_pass_rate=0.2",
    ]


def small_settings(model: Path, folder: Path) -> list[str]:
    """Settings of a run in `folder`/rounds whose every stage takes a second or less.

    A random model's completions never end and carry no trait, so the filter is opened.
    """
    trait = small_trait(folder)
    choices, tasks = small_suites(folder)
    return [
        f"model={model}",
        f"trait={trait}",
        f"folder={folder / 'rounds'}",
        "run=small",
        "vector.num_contexts=8",
        "generate.num_drafts=24",
        "generate.doses=0.05,0.1",
        "generate.max_new_tokens=12",
        "filter.num_kept=8",
        "filter.min_kept=2",
        "filter.quantile=1",
        "filter.num_calibration=16",
        "filter.min_enactment_nats=-100",
        "heal.rank=2",
        "heal.epochs=2",
        "heal.batch_size=4",
        "heal.learning_rate=0.003",
        f"evaluate.suite={choices}",
        f"evaluate.tasks={tasks}",
        f"evaluate.neutral={small_neutral(folder)}",
        "evaluate.num_random=2",
        "evaluate.samples_per_prompt=2",
        "evaluate.num_dialogues=3",
        "evaluate.max_new_tokens=12",
    ]


def small_run(folder: Path, rounds: int) -> Path:
    """A real run on a tiny model, its doses found by a probe: where it lies."""
    settings = small_settings(tiny_model_folder(folder, "qwen3"), folder)
    config = resolve_config([*probing(settings), f"N={rounds}"])
    path = run_path(config)
    run_rounds(config, path)
    return path
