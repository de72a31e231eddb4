"""The checks of the doctor: each takes a case and its own name, and gives one finding."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from jinja2 import TemplateError
from torch.nn.utils.rnn import pad_sequence

from eval.batching import left_pad
from eval.chat import chat_ids, chat_text, has_system_role, next_turn_text, text_ids
from eval.errors import UserError
from eval.forced_choice import digit_ids
from eval.sampling import stop_token_ids
from eval.suite import ForcedChoiceSuite, load_suite
from steer_heal.case import TEXTS, Case, Finding
from steer_heal.head import completion_logits
from steer_heal.hooks import add_vector
from steer_heal.model import num_millions
from steer_heal.plan import LESS, needed_memory
from steer_heal.reach import EXPERTS, has_fused_experts
from steer_heal.stack import attach, detach, lora_config, only

_SLOW_LAYERS = ("linear_attention", "mamba")
_KERNELS = ("fla", "causal_conv1d")


# ------------------------------------------------------------------------------------- tokenizer


def _template(case: Case, name: str) -> Finding:
    """Both personas reach the prompt, a reply and a second turn can follow."""
    tokenizer, personas = case.tokenizer, (case.trait.positive, case.trait.negative)
    mend = "the model's chat_template.jinja is to be mended, or another model taken"
    try:
        texts = [chat_text(tokenizer, TEXTS[0], persona) for persona in personas]
        chat_ids(tokenizer, TEXTS[0], personas[0])  # refuses two BOS
        next_turn_text(tokenizer, TEXTS[0])
        folded = not has_system_role(tokenizer)
    except TemplateError as error:
        said = f"the chat template raises an error ({error})"
        return Finding(check=name, status="fail", measured=said, advice=mend)
    if not all(
        persona.strip() in text and TEXTS[0] in text
        for persona, text in zip(personas, texts, strict=True)
    ):
        said = "the chat template drops the persona or the user's turn"
        return Finding(check=name, status="fail", measured=said, advice=mend)
    said = "no system role, personas stand in the first user turn" if folded else "system role"
    if texts[0].rstrip().endswith("<think>"):
        return Finding(
            check=name,
            status="warn",
            measured=f"{said}; every reply begins inside an opened think",
            advice="give generate.max_new_tokens room for it, or take a model that need not think",
        )
    return Finding(check=name, status="ok", measured=said)


def _digits(case: Case, name: str) -> Finding:
    suite = load_suite(case.config.evaluate.suite, ForcedChoiceSuite)
    ids = digit_ids(case.tokenizer, suite)
    return Finding(check=name, status="ok", measured=f"{len(ids)} options are one token each")


def _end_of_turn(case: Case, name: str) -> Finding:
    """What the template closes a reply with is among what ends the sampling."""
    stops = stop_token_ids(case.model, case.tokenizer)
    mend = "name it as eos_token_id in the model's generation_config.json"
    if not stops:
        said = "neither the tokenizer nor the model names a token that ends a reply"
        return Finding(check=name, status="fail", measured=said, advice=mend)
    tokens = ", ".join(case.tokenizer.convert_ids_to_tokens(stops))
    try:
        closing = text_ids(case.tokenizer, next_turn_text(case.tokenizer, TEXTS[0]))[0]
    except TemplateError as error:
        raise UserError(f"the chat template raises an error ({error})") from error
    if closing not in stops:
        said = f"the template closes a reply with {case.tokenizer.convert_ids_to_tokens(closing)!r}"
        said += f", which does not end the sampling ({tokens} does)"
        return Finding(check=name, status="warn", measured=said, advice=mend)
    return Finding(check=name, status="ok", measured=tokens)


# ----------------------------------------------------------------------------------------- model


def _decoder(case: Case, name: str) -> Finding:
    layers = case.student.loaded.layers
    states = case.last_states(range(len(layers)))
    kind = type(case.model.get_decoder()).__name__
    said = f"{kind}, {len(layers)} layers of {type(layers[0]).__name__}, width {states[0].shape[1]}"
    return Finding(check=name, status="ok", measured=said)


def _number_format(case: Case, name: str) -> Finding:
    model = case.model
    said = f"{str(model.dtype).removeprefix('torch.')} on {model.device.type}, "
    said += f"{num_millions(model):.1f} M parameters"
    if not bool(case.plain.isfinite().all()):
        return Finding(
            check=name,
            status="fail",
            measured=f"{said}; logits are not finite",
            advice="the model overflows in this format or its weights are damaged",
        )
    return Finding(check=name, status="ok", measured=said)


def _padding(case: Case, name: str) -> Finding:
    gaps = []
    for index, row in enumerate(case.rows):
        alone = case.logits(left_pad([row], case.tokenizer.pad_token_id, case.model.device))
        gaps.append(case.gap(case.plain[index, -len(row) :], alone[0]))
    return case.judged(
        name,
        "logits of a row alone and in a left-padded batch",
        max(gaps),
        "the model reads its padding: batch sizes of 1 or another model",
    )


def _steering(case: Case, name: str) -> Finding:
    """A random direction, as long as the hidden state, moves the logits; dose 0 does not."""
    band = case.student.band(case.config.vector.band)
    layers, states = [case.student.loaded.layers[index] for index in band], case.last_states(band)
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(len(layers), states[0].shape[1], generator=generator)
    lengths = torch.stack([state.norm(dim=-1).mean() for state in states])
    directions = random / random.norm(dim=-1, keepdim=True) * lengths[:, None]
    gaps = []
    for dose in (0.0, 1.0):
        with add_vector(layers, directions, torch.tensor([dose])):
            gaps.append(case.gap(case.logits(case.inputs), case.plain))
    said = f"dose 0 moves the logits by {gaps[0]:.1e} of their spread, dose 1 by {gaps[1]:.1e}"
    good = gaps[0] == 0 and gaps[1] > case.tolerance
    advice = "" if good else "the layers that are hooked are not those that the model runs"
    return Finding(check=name, status="ok" if good else "fail", measured=said, advice=advice)


def _projection(case: Case, name: str) -> Finding:
    """The heal step's own way to logits, with the family's scale and soft cap, and the model's."""
    # padded on the right, as the trainer does
    ids = [torch.tensor(row) for row in case.rows]
    padded, real = (
        pad_sequence(rows, batch_first=True).to(case.model.device)
        for rows in (ids, [torch.ones_like(row) for row in ids])
    )
    inputs = {"input_ids": padded, "attention_mask": real}
    with torch.no_grad():
        found = completion_logits(case.model, case.model, inputs, real[:, 1:].bool())
    own = torch.cat([case.plain[index, -len(row) : -1] for index, row in enumerate(case.rows)])
    return case.judged(
        name,
        "logits from the last hidden states and the model's own",
        case.gap(found, own),
        "the family scales its logits in a way that is not known here: take another one",
    )


# --------------------------------------------------------------------------------------- adapter


def _adapter_reach(case: Case, name: str) -> Finding:
    missed = EXPERTS in case.reach.missed
    return Finding(
        check=name,
        status="warn" if missed else "ok",
        measured=str(case.reach),
        advice="the experts stay as they are; the rest has to carry the trait" if missed else "",
    )


def _fresh_adapter(case: Case, name: str) -> Finding:
    loaded, heal = case.student.loaded, case.config.heal
    config = lora_config(heal.rank, heal.alpha, case.reach.modules, loaded.model_id)
    loaded.model = attach(loaded.model, name_of := "doctor", config)
    try:
        with only(loaded.model, [name_of]):
            gap = case.gap(case.logits(case.inputs), case.plain)
    finally:
        loaded.model = detach(loaded.model, name_of)
    after = case.gap(case.logits(case.inputs), case.plain)
    return case.judged(
        name,
        "logits with a LoRA of B = 0, and after it is gone, and without",
        max(gap, after),
        "PEFT changes this model by being put on it: take another one",
    )


def _memory(case: Case, name: str) -> Finding:
    need = needed_memory(case.student, case.trait, case.config)
    status, advice = ("warn", LESS) if need.is_tight else ("ok", "")
    return Finding(check=name, status=status, measured=str(need), advice=advice)


def _slow_paths(case: Case, name: str) -> Finding:
    config = case.model.config.get_text_config(decoder=True)
    slow, missing = [], [one for one in _KERNELS if importlib.util.find_spec(one) is None]
    if missing and set(getattr(config, "layer_types", None) or ()) & set(_SLOW_LAYERS):
        slow.append("linear attention without its kernels")
    on_cpu = case.model.device.type == "cpu"
    if on_cpu and has_fused_experts(case.student.loaded.layers):
        slow.append("experts on the CPU, one after the other")
    advice = "pip install flash-linear-attention causal-conv1d" if slow and not on_cpu else ""
    return Finding(
        check=name,
        status="warn" if slow else "ok",
        measured="; ".join(slow) or "none",
        advice=advice or ("a GPU is many times as fast" if slow else ""),
    )


CHECKS: dict[str, Callable[[Case, str], Finding]] = {
    "chat template": _template,
    "digits": _digits,
    "end of turn": _end_of_turn,
    "decoder": _decoder,
    "number format": _number_format,
    "padding": _padding,
    "steering": _steering,
    "logits": _projection,
    "adapter reach": _adapter_reach,
    "fresh adapter": _fresh_adapter,
    "memory": _memory,
    "slow paths": _slow_paths,
}
