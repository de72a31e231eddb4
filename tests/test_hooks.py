"""Hooks on real models of three families, and on layers that return something else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import FalconConfig, FalconForCausalLM

from eval.batching import left_pad
from eval.chat import chat_ids
from steer_heal.hooks import add_vector, record_last
from steer_heal.model import decoder_layers
from tests.conftest import TinyModel


class Pair(nn.Module):
    """A layer that returns its hidden states first in a tuple."""

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, str]:
        return hidden * 2, "cache"


class Streams(nn.Module):
    """A layer with four dimensions, as Gemma 3n's."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden[None]


def directions(layers: int, hidden: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(layers, hidden, generator=torch.Generator().manual_seed(seed))


def num_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def captured(layer: nn.Module, run: Any) -> torch.Tensor:
    """What a layer passes on, seen from the next module: by patching its call, not by a hook."""
    seen: list[torch.Tensor] = []
    original = layer.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        seen.append((out[0] if isinstance(out, tuple) else out).detach().clone())
        return out

    layer.forward = watched  # type: ignore[method-assign]
    try:
        run()
    finally:
        del layer.forward
    return seen[-1]


def prompts(tiny: TinyModel) -> list[list[int]]:
    turns = ["Hi.", "What is 12 plus 30? And what colour is grass?", "The nurse told the guard."]
    return [chat_ids(tiny.tokenizer, turn) for turn in turns]


@torch.no_grad()
def test_record_last_equals_single_rows_without_padding(tiny: TinyModel) -> None:
    layers = decoder_layers(tiny.model)
    rows = prompts(tiny)
    with record_last(layers) as states:
        tiny.model(**left_pad(rows, tiny.tokenizer.pad_token_id, "cpu"))
    for row, ids in enumerate(rows):
        inputs = torch.tensor([ids])
        for index, layer in enumerate(layers):
            alone = captured(layer, lambda x=inputs: tiny.model(input_ids=x))[0, -1]
            torch.testing.assert_close(states[index][row], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_record_last_sees_the_state_before_the_final_norm(tiny_llama: TinyModel) -> None:
    """Logits recomputed by hand from what was recorded are the model's own."""
    ids = torch.tensor([prompts(tiny_llama)[1]])
    with record_last(decoder_layers(tiny_llama.model)) as states:
        logits = tiny_llama.model(input_ids=ids).logits[:, -1]
    norm = tiny_llama.model.model.norm
    hidden = states[-1].double()
    scaled = hidden / (hidden.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    by_hand = (scaled * norm.weight.double()) @ tiny_llama.model.lm_head.weight.double().T
    torch.testing.assert_close(logits.double(), by_hand, rtol=1e-4, atol=1e-4)


def test_record_last_gives_fp32_on_the_cpu_and_leaves_no_hook(tiny: TinyModel) -> None:
    before = num_hooks(tiny.model)
    layers = decoder_layers(tiny.model)
    with torch.no_grad(), record_last(layers) as states:
        tiny.model(**left_pad(prompts(tiny), tiny.tokenizer.pad_token_id, "cpu"))
    assert [tuple(state.shape) for state in states] == [(3, 32)] * len(layers)
    assert all(state.dtype == torch.float32 and state.device.type == "cpu" for state in states)
    assert num_hooks(tiny.model) == before


@torch.no_grad()
def test_add_vector_moves_one_layer_by_dose_times_direction_row_by_row(tiny: TinyModel) -> None:
    """Up to the steered layer nothing changes; at it every position moves by the same amount."""
    layers = decoder_layers(tiny.model)
    inputs = left_pad(prompts(tiny), tiny.tokenizer.pad_token_id, "cpu")
    direction, doses = directions(1, 32), torch.tensor([0.0, 0.7, -2.0])

    def run() -> None:
        tiny.model(**inputs)

    plain = [captured(layer, run) for layer in layers]
    steered = []
    for layer in layers:
        with add_vector([layers[1]], direction, doses):
            if layer is layers[1]:  # what the hook gives is seen by the module that follows
                after = layers[2] if len(layers) > 2 else tiny.model.get_decoder().norm
                steered.append(_input_of(after, run))
            else:
                steered.append(captured(layer, run))
    assert torch.equal(steered[0], plain[0])
    expected = plain[1] + doses[:, None, None] * direction[0]
    torch.testing.assert_close(steered[1], expected, rtol=0, atol=1e-6)
    assert torch.equal(steered[1][0], plain[1][0])  # dose 0
    for after_band in range(2, len(layers)):
        torch.testing.assert_close(steered[after_band][0], plain[after_band][0])
        assert float((steered[after_band][1] - plain[after_band][1]).abs().min(0).values.max()) > 0


def _input_of(module: nn.Module, run: Any) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    original = module.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append((args[0] if args else kwargs["hidden_states"]).detach().clone())
        return original(*args, **kwargs)

    module.forward = watched  # type: ignore[method-assign]
    try:
        run()
    finally:
        del module.forward
    return seen[-1]


def test_each_layer_gets_its_own_direction_and_one_dose_does_for_all_rows() -> None:
    layers = [nn.Identity(), nn.Identity(), nn.Identity()]
    hidden = torch.randn(4, 5, 8)
    chosen = directions(2, 8)
    with add_vector([layers[0], layers[2]], chosen, torch.tensor([0.5])):
        outs = [layer(hidden) for layer in layers]
    assert torch.equal(outs[0], hidden + 0.5 * chosen[0])
    assert torch.equal(outs[1], hidden)
    assert torch.equal(outs[2], hidden + 0.5 * chosen[1])


def test_tuple_outputs_keep_their_tail() -> None:
    layer, hidden, direction = Pair(), torch.randn(2, 3, 8), directions(1, 8)
    doses = torch.tensor([1.0, 3.0])
    with add_vector([layer], direction, doses), record_last([layer]) as states:
        steered, tail = layer(hidden)
    assert tail == "cache"
    assert torch.equal(steered, hidden * 2 + doses[:, None, None] * direction[0])
    assert torch.equal(states[0], steered[:, -1])


@torch.no_grad()
def test_a_family_whose_layers_return_tuples() -> None:
    """Falcon: (hidden, attention weights)."""
    config = FalconConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, alibi=False
    )
    model = FalconForCausalLM(config).eval()
    layers, ids = decoder_layers(model), torch.tensor([[3, 4, 5]])
    kinds: list[type] = []
    handle = layers[1].register_forward_hook(lambda module, args, out: kinds.append(type(out)))
    before = _input_of(model.transformer.ln_f, lambda: model(input_ids=ids))
    handle.remove()
    assert kinds == [tuple]
    with add_vector(layers[1:], directions(1, 16), torch.tensor([2.0])):
        after = _input_of(model.transformer.ln_f, lambda: model(input_ids=ids))
    expected = before + 2 * directions(1, 16)[0]
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-6)


def test_outputs_of_four_dimensions_are_refused_and_nothing_stays() -> None:
    layer = Streams()
    with (
        pytest.raises(ValueError, match=r"\(1, 2, 3, 8\).*\[batch, tokens, hidden\]"),
        add_vector([layer], directions(1, 8), torch.tensor([1.0])),
    ):
        layer(torch.randn(2, 3, 8))
    with pytest.raises(ValueError, match=r"\[batch, tokens, hidden\]"), record_last([layer]):
        layer(torch.randn(2, 3, 8))
    assert num_hooks(layer) == 0


def test_doses_that_do_not_fit_the_batch_are_refused() -> None:
    layer = nn.Identity()
    with (
        pytest.raises(ValueError, match="3 doses for 2 rows"),
        add_vector([layer], directions(1, 8), torch.ones(3)),
    ):
        layer(torch.randn(2, 3, 8))
    assert num_hooks(layer) == 0


def test_hooks_go_when_the_body_raises() -> None:
    layers = [nn.Identity(), nn.Identity()]
    with (
        pytest.raises(RuntimeError, match="mine"),
        add_vector(layers, directions(2, 8), torch.ones(1)),
        record_last(layers),
    ):
        raise RuntimeError("mine")
    assert [num_hooks(layer) for layer in layers] == [0, 0]


def test_hooks_go_when_there_is_a_direction_too_few() -> None:
    layers = [nn.Identity(), nn.Identity()]
    with (
        pytest.raises(ValueError),
        add_vector(layers, directions(1, 8), torch.ones(1)),
    ):
        pass
    assert [num_hooks(layer) for layer in layers] == [0, 0]


@torch.inference_mode()
def test_doses_a_row_with_left_padding_generate_what_each_row_generates_alone(
    tiny: TinyModel,
) -> None:
    layers = decoder_layers(tiny.model)[1:2]
    direction = directions(1, 32, seed=3)
    turns, doses = prompts(tiny), [0.0, 0.5, 2.0]
    rows = [row for row in turns for _ in doses]
    applied = doses * len(turns)
    greedy: Any = {"do_sample": False, "max_new_tokens": 12, "top_k": None, "use_cache": True}

    def generate(ids: list[list[int]], given: list[float]) -> list[list[int]]:
        inputs = left_pad(ids, tiny.tokenizer.pad_token_id, "cpu")
        del inputs["position_ids"]
        with add_vector(layers, direction, torch.tensor(given)):
            out = tiny.model.generate(**inputs, pad_token_id=1, eos_token_id=-1, **greedy)
        return out[:, inputs["input_ids"].shape[1] :].tolist()

    together = generate(rows, applied)
    assert len(together[0]) == 12
    assert together == [generate([row], [dose])[0] for row, dose in zip(rows, applied, strict=True)]
    assert len({tuple(reply) for reply in together}) > len(turns)  # the dose tells
