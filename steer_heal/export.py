"""A run's result for others to load: an adapter, a full checkpoint, or a steering vector.

Adapters and checkpoints are proved before they are there: a fresh process loads them, and what it
says is compared with the run's student and with the base (proof.py). They are written beside OUT
and renamed to it at the end: whatever goes wrong leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, PositiveInt, model_validator

from eval.errors import UserError
from eval.files import (
    disk_errors,
    move_folder_into_place,
    move_into_place,
    read_json,
    scratch_folder,
    write_json,
    write_text,
)
from eval.model_files import quantised_bits
from eval.settings import Settings, resolve_settings
from steer_heal.artifacts import RoundAdapter
from steer_heal.card import Exported, card_text, served_base
from steer_heal.merge import write_merged
from steer_heal.model import load_student, require_weights
from steer_heal.model_folder import resolve_model
from steer_heal.proof import Reference, prove, reference
from steer_heal.rounds import Run
from steer_heal.saved import SavedRun, read_saved_run
from steer_heal.servable import SERVED_RANKS, at_served_rank, require_sound
from steer_heal.stack import fold
from steer_heal.summary import Summary, summarise
from steer_heal.vector_files import read_gguf, read_vector, write_gguf

EXPORT_FILE, CARD_FILE = "export.json", "README.md"


def _require_served(rank: int) -> int:
    if rank not in SERVED_RANKS:
        raise ValueError(f"vLLM serves the ranks {', '.join(map(str, SERVED_RANKS))}")
    return rank


class ExportConfig(Settings):
    """What is exported of a run."""

    round: Literal["best"] | PositiveInt = "best"
    """The sum of the rounds up to this one, or the vector of this one; best: as the page marks."""
    form: Literal["adapter", "merged", "vector", "gguf-vector"] = "adapter"
    """A LoRA, a full checkpoint, the steering vector, or that as a llama.cpp control vector."""
    rank: Annotated[int, AfterValidator(_require_served)] | None = None
    """Rank of the adapter; by default the least served one that holds all of it exactly."""

    @model_validator(mode="after")
    def _rank_of_an_adapter(self) -> ExportConfig:
        if self.rank is not None and self.form != "adapter":
            raise ValueError(f"rank is of an adapter: as={self.form} takes none")
        return self


def export(run_path: Path, out: Path, settings: Sequence[str] = ()) -> str:
    """Writes what the settings ask for to `out`; returns what was written, as text.

    Raises:
        UserError: a bad setting, no run, no finished or no coherent round, fewer rounds than asked
            for, a damaged adapter or one that does not fit its base, another base than the run's,
            an export that is not proved, or `out` is there already.
    """
    config = resolve_settings(ExportConfig, settings, {"as": "form"})
    if out.exists():
        raise UserError(f"{out} is there already; take it away or name another one")
    if not out.parent.is_dir():
        raise UserError(f"{out.parent} is no folder to write {out.name} into")
    saved = read_saved_run(run_path)
    summary = summarise(saved)
    number = _number(summary, config.round)
    if config.form in ("vector", "gguf-vector"):
        return _export_vector(saved, number, config.form, out)
    exported = _export_weights(summary, number, config, out)
    return f"{config.form}: {out} ({exported.text}); {exported.proof.text}"


def _number(summary: Summary, asked: Literal["best"] | int) -> int:
    """The number of the round asked for, from 1."""
    path, count = summary.run.path, len(summary.rounds)
    if asked == "best":
        if summary.best is None:
            raise UserError(
                f"{path}: no round stayed coherent, so none is best; round=N takes the first N"
            )
        return summary.best.number
    if asked > count:
        raise UserError(f"{path} has {count} finished rounds; round={asked} asks for more")
    return asked


def _export_vector(saved: SavedRun, number: int, form: str, out: Path) -> str:
    each = saved.rounds[number - 1]
    vector, dose = each.vector, each.screened.mean_kept_dose
    on = f"the student after round {number - 1}" if number > 1 else "the base"
    about = f"of round {number}, taken from {on}; its kept completions have dose {dose:.3g}"
    with disk_errors(out), scratch_folder(out.parent) as scratch:
        target = scratch / out.name
        if form == "vector":
            target.mkdir()
            vector.save(target)
            origin = {"model": saved.description.config["model"], "round": number, "form": form}
            write_json(target / EXPORT_FILE, origin)
            read_vector(target, saved.description.model)
            move_folder_into_place(target, out)
            return f"vector: {out} ({about})"
        base = resolve_model(saved.description.config["model"])
        directions = {layer: vector.directions[layer] for layer in vector.band}
        write_gguf(directions, target, read_json(base / "config.json")["model_type"])
        num_layers, hidden = vector.directions.shape
        read_gguf(target, num_layers=num_layers, hidden=hidden)
        move_into_place(target, out)
    use = f"llama-server -m MODEL.gguf --control-vector-scaled {out}:{dose:.3g}"
    return f"control vector: {out} ({about}); use: {use}"


def _export_weights(summary: Summary, number: int, config: ExportConfig, out: Path) -> Exported:
    saved = summary.run
    model_id = saved.description.config["model"]
    base = resolve_model(model_id)
    bits = quantised_bits(base)
    if bits is not None and config.form == "merged":
        raise UserError(
            f"model {model_id}: its weights are in {bits} bits, to which a sum would be rounded "
            "again; take as=adapter, which also loads on the model that it was quantised from"
        )
    adapters = Run(saved.path, saved.description.config["seed"]).last_stack()[:number]
    wanted = _reference(saved, adapters, "cpu" if bits is None else "auto")
    folded = fold(adapters)
    with disk_errors(out), scratch_folder(out.parent) as scratch:
        target = scratch / config.form
        if config.form == "merged":
            dtype = write_merged(base, folded, target)
            proof = prove(wanted, target, None, dtype == torch.float32, scratch)
            rank = None
        else:
            served, is_cut = at_served_rank(folded, config.rank)
            _of_base(served, model_id).save(scratch)  # into adapter/
            proof = prove(wanted, base, target, not is_cut and bits is None, scratch)
            rank, dtype = served.rank, torch.float32
        exported = Exported(
            form=config.form,
            num_rounds=number,
            stack_rank=folded.rank,
            rank=rank,
            dtype=str(dtype).removeprefix("torch."),
            proof=proof,
        )
        write_json(target / EXPORT_FILE, asdict(exported))
        write_text(target / CARD_FILE, card_text(summary, exported, out))
        move_folder_into_place(target, out)
    return exported


def _of_base(adapter: RoundAdapter, model_id: str) -> RoundAdapter:
    """The adapter with its base as others find it, not by the names of this project."""
    place, revision = served_base(model_id)
    named = {"base_model_name_or_path": place, "revision": revision}
    return replace(adapter, config=dict(adapter.config) | named)


def _reference(saved: SavedRun, adapters: Sequence[RoundAdapter], device: str) -> Reference:
    """What the run's student says; the model is gone afterwards, to leave room for the next."""
    model_id = saved.description.config["model"]
    student = load_student(model_id, [], device)  # on the CPU in fp32: nothing is rounded
    require_weights(student, saved.description.model, saved.path)
    for adapter, each in zip(adapters, saved.rounds, strict=False):
        require_sound(adapter, student.loaded.model, saved.path / each.folder / "adapter")
    return reference(replace(student, adapters=tuple(adapters)), saved.trait)
