"""Artifacts: what is saved comes back, and any change of content changes the digest."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors import safe_open

from eval.coherence import Surprisal, TextFigures
from steer_heal.artifacts import (
    Completion,
    Completions,
    DosePoint,
    Doses,
    Limits,
    RoundAdapter,
    Screened,
    ScreenedCompletion,
    SteeringVector,
    TextLimit,
    TextLimits,
    TrainStep,
    digest_of,
)

ODD = 'é "quoted" \\ \u2028\x85\x0c line\r\nbreak \U0001f600'  # what a line of JSON must survive
DRAFT = {
    "prompt_index": 3,
    "prompt": ODD,
    "prompt_ids": (1, 2, 3),
    "token_ids": (4, 5),
    "text": ODD,
    "dose": 0.1,
    "seed": 2**31 - 1,
    "finished": True,
    "kl_p95_nats": 1 / 3,
}
STEP = TrainStep(
    step=0,
    loss=1 / 3,
    nll_nats=2.5,
    soft_nats=0.7,
    kl_nats=0.1,
    barrier_nats=0.0,
    threshold_nats=0.3,
    share_over=0.25,
    barrier_gradient_ratio=None,
    spectral_norm=0.0,
    grad_norm=1e-9,
    learning_rate=3e-4,
)


def _vector() -> SteeringVector:
    return SteeringVector(
        directions=torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
        band=(1,),
        norms=(1.0, 1 / 3, 3.0),
        residual_norms=(1.0, 2.0, 3.0),
        auc=(0.5, 0.75, 1.0),
        pairwise_cosine=(0.1, 0.2, 0.3),
        num_pairs=8,
        weights_hash="abc",
    )


def _adapter() -> RoundAdapter:
    generator = torch.Generator().manual_seed(1)
    names = [f"base_model.model.layers.{n}.q.lora_{part}.weight" for n in (1, 0) for part in "BA"]
    return RoundAdapter(
        name="r04",
        config={"r": 2, "lora_alpha": 8, "target_modules": ["q"], "peft_type": "LORA"},
        weights={name: torch.randn(2, 4, generator=generator) for name in names},
        steps=(STEP, STEP.model_copy(update={"step": 1})),
    )


def _screened() -> Screened:
    scores = {
        "surprisal": _filled(Surprisal),
        "figures": _filled(TextFigures),
        "brokenness": 1 / 3,
        "persona_share": 1 / 3,
        "enactment_nats": 0.5,
    }
    kept = ScreenedCompletion(**DRAFT, **scores, dropped=None)
    dropped = kept.model_copy(update={"dropped": "tail", "dose": 0.9})
    other = kept.model_copy(update={"dose": 0.3})
    point = DosePoint(
        dose=0.1,
        num_drafts=2,
        pass_rate=0.5,
        kl_p95_nats=1 / 3,
        enactment_nats=-0.5,
        commonest_drop="tail",
    )
    return Screened(rows=(kept, dropped, other), curve=(point,))


def _limits() -> Limits:
    limits = [
        TextLimit(low=None, typical=n / 3, high=n) for n in range(len(TextLimits.model_fields))
    ]
    text = TextLimits(**dict(zip(TextLimits.model_fields, limits, strict=True)))
    return _filled(Limits, text=text, base_tail_nll_nats=(0.1, 1 / 3))


def _filled(kind: type, **given: Any) -> Any:
    """A record with a different number in each of its fields."""
    fields = kind.model_fields  # type: ignore[attr-defined]
    values = {name: given.get(name, number) for number, name in enumerate(fields, start=1)}
    for name, field in fields.items():
        values[name] = bool(values[name]) if field.annotation is bool else values[name]
    return kind(**values)


def _drafts() -> Completions:
    return Completions(rows=(Completion(**DRAFT), Completion(**DRAFT | {"finished": False})))


def _doses() -> Doses:
    curve = _screened().curve
    return Doses(doses=(0.1,), asked=(0.3, 1 / 3), carried=0.2, probe=curve, passing=(0.3,))


MAKERS: list[Callable[[], Any]] = [_vector, _adapter, _screened, _limits, _drafts, _doses]


@pytest.mark.parametrize("make", MAKERS)
def test_saved_artifact_comes_back_whole(make: Callable[[], Any], tmp_path: Path) -> None:
    artifact, folder = make(), tmp_path / "round-04"
    folder.mkdir()
    artifact.save(folder)
    written = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert written == set(artifact.files)

    loaded = type(artifact).load(folder)

    assert loaded.digest() == artifact.digest()
    left, right = (
        dict(vars(value)) if dataclasses.is_dataclass(value) else value.model_dump()
        for value in (artifact, loaded)
    )
    for name in left:
        if isinstance(left[name], torch.Tensor):
            assert torch.equal(left[name], right[name])
        elif name == "weights":
            assert left[name].keys() == right[name].keys()
            assert all(torch.equal(left[name][key], right[name][key]) for key in left[name])
        else:
            assert left[name] == right[name], name


@pytest.mark.parametrize("make", MAKERS)
def test_same_content_is_the_same_bytes(make: Callable[[], Any], tmp_path: Path) -> None:
    contents = []
    for attempt in range(8):  # what is written in random order differs in one of a few
        folder = tmp_path / f"{attempt}-04"
        folder.mkdir()
        artifact = make()
        artifact.save(folder)
        contents.append([(folder / name).read_bytes() for name in artifact.files])
    assert all(content == contents[0] for content in contents)


@pytest.mark.parametrize("make", MAKERS)
def test_artifact_is_frozen(make: Callable[[], Any]) -> None:
    artifact = make()
    name = next(iter(vars(artifact)))
    with pytest.raises((dataclasses.FrozenInstanceError, ValidationError)):
        setattr(artifact, name, None)


def test_digest_follows_the_content() -> None:
    vector, adapter, drafts = _vector(), _adapter(), _drafts()
    moved = vector.directions.clone()
    moved[2, 3] += 1e-6
    assert dataclasses.replace(vector, directions=moved).digest() != vector.digest()
    assert dataclasses.replace(vector, band=(2,)).digest() != vector.digest()
    name = next(iter(adapter.weights))
    weights = dict(adapter.weights) | {name: adapter.weights[name] + 1e-6}
    assert dataclasses.replace(adapter, weights=weights).digest() != adapter.digest()
    config = dict(adapter.config) | {"lora_alpha": 9}
    assert dataclasses.replace(adapter, config=config).digest() != adapter.digest()
    fewer = drafts.model_copy(update={"rows": drafts.rows[:1]})
    assert fewer.digest() != drafts.digest()
    assert digest_of(["ab", "c"]) != digest_of(["a", "bc"])  # parts do not run into each other


def test_derived_figures() -> None:
    screened, adapter, vector = _screened(), _adapter(), _vector()
    assert [row.dose for row in screened.kept] == [0.1, 0.3]
    assert screened.mean_kept_dose == pytest.approx(0.2)
    assert (adapter.rank, adapter.scale) == (2, 4.0)
    assert torch.equal(vector.band_directions, vector.directions[1:2])


def test_files_are_what_other_tools_read(tmp_path: Path) -> None:
    folder = tmp_path / "round-04"
    folder.mkdir()
    _adapter().save(folder)
    with safe_open(folder / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(_adapter().weights)
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    lines = (folder / "train.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1]


def test_not_a_number_is_not_written(tmp_path: Path) -> None:
    limits = _limits().model_copy(update={"tail_nll_nats": float("nan")})
    with pytest.raises(ValueError, match="JSON compliant"):
        limits.save(tmp_path)
    assert not list(tmp_path.iterdir())
