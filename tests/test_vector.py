"""The steering vector against states taken one prompt at a time, by hooks of the test's own."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from eval.chat import chat_ids
from eval.errors import UserError
from steer_heal.artifacts import SteeringVector
from steer_heal.config import VectorConfig
from steer_heal.hooks import add_vector
from steer_heal.model import Student, load_student
from steer_heal.trait import Trait, load_trait
from steer_heal.vector import extract_vector
from tests.conftest import TinyModel
from tests.small import small_trait
from tests.test_stack import random_adapter

CONFIG = VectorConfig(num_contexts=16, batch_size=5)


@pytest.fixture(scope="module")
def trait(tmp_path_factory: pytest.TempPathFactory) -> Trait:
    return load_trait(str(small_trait(tmp_path_factory.mktemp("trait"))))


@torch.no_grad()
def slow_states(student: Student, prompts: list[list[int]]) -> torch.Tensor:
    """[prompts, layers, hidden] in fp64, a prompt at a time, from plain forward hooks."""
    rows = []
    for ids in prompts:
        seen: dict[int, torch.Tensor] = {}
        handles = [
            layer.register_forward_hook(
                lambda module, args, out, index=index, seen=seen: seen.update({index: out})
            )
            for index, layer in enumerate(student.loaded.layers)
        ]
        with student.running() as model:
            model(input_ids=torch.tensor([ids]))
        for handle in handles:
            handle.remove()
        rows.append(torch.stack([seen[index][0, -1] for index in range(len(seen))]))
    return torch.stack(rows).double()


def slow_pair(
    student: Student, trait: Trait, contexts: list[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """States under the two personas, written out: [contexts, layers, hidden] each."""
    tokenizer = student.tokenizer
    positive = [chat_ids(tokenizer, turn, trait.positive) for turn in contexts]
    negative = [chat_ids(tokenizer, turn, trait.negative) for turn in contexts]
    return slow_states(student, positive), slow_states(student, negative)


def test_vector_equals_a_slow_mean_difference(tiny: TinyModel, trait: Trait) -> None:
    student = load_student(str(tiny.folder), [], "cpu")
    vector = extract_vector(student, trait, CONFIG, seed=3)
    positive, negative = slow_pair(student, trait, list(trait.contexts))
    expected = positive.mean(0) - negative.mean(0)
    torch.testing.assert_close(vector.directions.double(), expected, rtol=1e-4, atol=1e-4)
    norms = expected.norm(dim=-1).tolist()
    assert vector.norms == pytest.approx(norms, rel=1e-4, abs=1e-5)
    residual = torch.cat([positive, negative]).norm(dim=-1).mean(0)
    assert vector.residual_norms == pytest.approx(residual.tolist(), rel=1e-4)
    assert vector.num_pairs == len(trait.contexts) == 16
    assert vector.weights_hash == student.loaded.weights_hash
    assert vector.directions.shape == (len(student.loaded.layers), 32)
    assert min(vector.norms[-1:] if tiny.family == "gemma3" else vector.norms) > 0.1


def test_prompts_end_at_the_assistant_tag(tiny: TinyModel, trait: Trait) -> None:
    """The last token is the same for every persona and context: what differs is in the state."""
    tags = {"qwen3": "assistant\n", "llama": "<|end_header_id|>\n\n", "gemma3": "model\n"}
    for persona in (trait.positive, trait.negative):
        ids = chat_ids(tiny.tokenizer, trait.contexts[0], persona)
        text = tiny.tokenizer.decode(ids)
        assert text.rstrip("\n").endswith(
            ("</think>",) if tiny.family == "qwen3" else tags[tiny.family].rstrip("\n")
        )
        assert persona in text


def test_swapped_personas_give_the_opposite_vector(tiny_llama: TinyModel, trait: Trait) -> None:
    student = load_student(str(tiny_llama.folder), [], "cpu")
    swapped = trait.model_copy(update={"positive": trait.negative, "negative": trait.positive})
    one = extract_vector(student, trait, CONFIG, seed=0)
    two = extract_vector(student, swapped, CONFIG, seed=0)
    torch.testing.assert_close(one.directions, -two.directions, rtol=0, atol=1e-5)


def test_adding_the_vector_makes_what_the_positive_persona_says_likelier(
    tiny: TinyModel, trait: Trait
) -> None:
    """Sign: the next-token distribution moves towards the positive persona's, -v moves it away."""
    student = load_student(str(tiny.folder), [], "cpu")
    vector = extract_vector(student, trait, CONFIG, seed=0)
    last = len(student.loaded.layers) - 1
    direction = vector.directions[last : last + 1]

    @torch.no_grad()
    def logp(ids: list[int], dose: float) -> torch.Tensor:
        with (
            student.running() as model,
            add_vector(student.loaded.layers[last:], direction, torch.tensor([dose])),
        ):
            return model(input_ids=torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)

    gains = []
    for turn in trait.contexts[:8]:
        positive = logp(chat_ids(student.tokenizer, turn, trait.positive), 0).exp()
        negative = logp(chat_ids(student.tokenizer, turn, trait.negative), 0).exp()
        plain = chat_ids(student.tokenizer, turn)
        up, down = logp(plain, 0.5), logp(plain, -0.5)
        gains.append(float(((positive - negative) * (up - down)).sum()))
    assert sum(gains) > 0
    assert sum(gain > 0 for gain in gains) >= 6


def test_auc_and_cosine_equal_brute_force(tiny: TinyModel, trait: Trait) -> None:
    student = load_student(str(tiny.folder), [], "cpu")
    config = VectorConfig(num_contexts=9, batch_size=4)  # odd: the halves differ in size
    contexts = random.Random(7).sample(trait.contexts, 9)
    vector = extract_vector(student, trait, config, seed=7)
    positive, negative = slow_pair(student, trait, contexts)
    layers = [layer for layer, norm in enumerate(vector.norms) if norm > 1e-3]
    assert layers  # a sliding window may hide the personas from the first ones
    for layer in layers:
        up, down = positive[:, layer], negative[:, layer]
        aucs = []
        for first in (0, 1):
            fit = [pair for pair in range(9) if pair % 2 == first]
            test = [pair for pair in range(9) if pair % 2 != first]
            direction = sum((up[pair] - down[pair] for pair in fit), torch.zeros(32).double())
            wins = [
                float(up[one] @ direction > down[two] @ direction) for one in test for two in test
            ]
            aucs.append(sum(wins) / len(wins))
        assert vector.auc[layer] == pytest.approx(sum(aucs) / 2, abs=1e-6)
        cosines = [
            float(torch.cosine_similarity(up[one] - down[one], up[two] - down[two], dim=0))
            for one in range(9)
            for two in range(9)
            if one != two
        ]
        assert vector.pairwise_cosine[layer] == pytest.approx(sum(cosines) / len(cosines), abs=1e-4)


def test_contexts_are_drawn_without_replacement_by_the_seed(
    tiny_qwen3: TinyModel, trait: Trait
) -> None:
    student = load_student(str(tiny_qwen3.folder), [], "cpu")
    config = VectorConfig(num_contexts=4)
    one, two, other = (extract_vector(student, trait, config, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.directions, two.directions)
    assert not torch.equal(one.directions, other.directions)
    assert one.num_pairs == 4
    more = extract_vector(student, trait, VectorConfig(num_contexts=1000), seed=0)
    assert more.num_pairs == len(trait.contexts)


def test_the_vector_is_the_students_not_the_bases(tiny_qwen3: TinyModel, trait: Trait) -> None:
    base = load_student(str(tiny_qwen3.folder), [], "cpu")
    grown = base.grown(random_adapter(base, "r00", [0, 1], 2, 4, seed=1))
    from_base = extract_vector(base, trait, CONFIG, seed=0)
    from_grown = extract_vector(grown, trait, CONFIG, seed=0)
    positive, negative = slow_pair(grown, trait, list(trait.contexts))
    expected = (positive - negative).mean(0)
    torch.testing.assert_close(from_grown.directions.double(), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(from_base.directions, from_grown.directions, atol=1e-2)


def test_a_random_direction_has_the_norms_of_the_mean_difference_and_no_more_of_it(
    tiny_qwen3: TinyModel, trait: Trait
) -> None:
    student = load_student(str(tiny_qwen3.folder), [], "cpu")
    config = CONFIG.model_copy(update={"direction": "random"})
    vector = extract_vector(student, trait, CONFIG, seed=0)
    drawn, again, other = (
        extract_vector(student, trait, config, seed=seed, direction_seed=direction_seed)
        for seed, direction_seed in ((0, 5), (1, 5), (0, 6))
    )
    norms = vector.directions.norm(dim=-1)
    torch.testing.assert_close(drawn.directions.norm(dim=-1), norms)
    cosine = torch.nn.functional.cosine_similarity
    for one in (vector, other):
        assert (
            cosine(drawn.directions, one.directions, dim=-1).abs().max() < 0.6
        )  # of 32 dimensions
    assert cosine(drawn.directions, again.directions, dim=-1).min() > 0.9999


def test_the_band_is_the_configs(tiny_gemma3: TinyModel, trait: Trait) -> None:
    student = load_student(str(tiny_gemma3.folder), [], "cpu")
    config = VectorConfig(num_contexts=4, band=(0.5, 1.0))
    vector = extract_vector(student, trait, config, seed=0)
    assert vector.band == (1, 2)
    assert torch.equal(vector.band_directions, vector.directions[1:])


@pytest.mark.parametrize("layer", [0, 1])
def test_weights_that_are_not_finite_name_the_layer(
    tiny_qwen3: TinyModel, trait: Trait, layer: int
) -> None:
    student = load_student(str(tiny_qwen3.folder), [], "cpu")
    with torch.no_grad():
        student.loaded.model.model.layers[layer].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match=f"hidden states of layer {layer} are not finite"):
        extract_vector(student, trait, CONFIG, seed=0)


def test_personas_that_are_the_same_are_refused(tiny_qwen3: TinyModel, trait: Trait) -> None:
    student = load_student(str(tiny_qwen3.folder), [], "cpu")
    same = trait.model_copy(update={"negative": trait.positive})
    with pytest.raises(UserError, match="both personas give the same hidden states"):
        extract_vector(student, same, VectorConfig(num_contexts=4), seed=0)


def test_a_band_that_the_personas_do_not_reach_is_refused(
    tiny_gemma3: TinyModel, trait: Trait
) -> None:
    """The first layer sees 16 tokens, and the persona stands further off than that."""
    far = trait.model_copy(
        update={"contexts": tuple(f"{c} Think it over." * 3 for c in trait.contexts)}
    )
    student = load_student(str(tiny_gemma3.folder), [], "cpu")
    with pytest.raises(UserError, match=r"layers \[0\].*does not reach back.*later vector.band"):
        extract_vector(student, far, VectorConfig(band=(0, 0.34), num_contexts=4), seed=0)
    extract_vector(student, far, VectorConfig(band=(0.4, 0.7), num_contexts=4), seed=0)


def test_a_saved_vector_comes_back_as_it_was(
    tiny_qwen3: TinyModel, trait: Trait, tmp_path: Path
) -> None:
    student = load_student(str(tiny_qwen3.folder), [], "cpu")
    vector = extract_vector(student, trait, CONFIG, seed=0)
    vector.save(tmp_path)
    back = SteeringVector.load(tmp_path)
    assert torch.equal(back.directions, vector.directions)
    rest = {key: value for key, value in vars(vector).items() if key != "directions"}
    assert {key: value for key, value in vars(back).items() if key != "directions"} == rest
    assert back.digest() == vector.digest()
