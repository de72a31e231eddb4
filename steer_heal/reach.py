"""What of a model an adapter can reach: the linear modules of a band of the decoder's layers.

    share = parameters of those modules / all parameters of the model

Fused experts are one tensor a layer and no linear module: no LoRA is put on them, in silence unless
it is said.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from eval.errors import UserError
from steer_heal.model import Student

EXPERTS = "experts"
_FUSED_DIMENSIONS = 3  # [experts, out, in]


@dataclass(frozen=True, kw_only=True)
class Reach:
    """What an adapter can act on, and what it cannot."""

    modules: tuple[str, ...]  # full names
    share: float  # of the model's parameters, 0 to 1
    missed: dict[str, float]  # what is not reached -> its share of the model's parameters

    @property
    def kinds(self) -> list[str]:
        """The modules' own names, each once."""
        return sorted({name.rpartition(".")[2] for name in self.modules})

    def __str__(self) -> str:
        missed = ", ".join(f"{what} {share:.1%}" for what, share in self.missed.items())
        return (
            f"{len(self.modules)} modules ({', '.join(self.kinds)}), {self.share:.1%} of the "
            f"parameters; not reached: {missed or 'nothing'}"
        )


def adapter_reach(student: Student, layers: tuple[float, float]) -> Reach:
    """What an adapter on these layers can reach, by the bare base's parameters.

    Args:
        layers: shares of the depth.
    Raises:
        UserError: there is no linear module in these layers.
    """
    loaded, band = student.loaded, set(student.band(layers))
    modules = [name for layer in sorted(band) for name in loaded.linear_names[layer]]
    if not modules:
        raise UserError(
            f"{type(loaded.model).__name__}: no linear module in the layers {sorted(band)}, so "
            "there is nothing to put an adapter on; take other heal.layers or another model"
        )
    reached = {id(p) for name in modules for p in loaded.model.get_submodule(name).parameters()}
    place = _places(student, band)
    counts: dict[str, int] = {}
    for parameter in loaded.model.parameters():
        key = id(parameter)
        what = "" if key in reached else place.get(key, "what is outside of the text decoder")
        counts[what] = counts.get(what, 0) + parameter.numel()
    total, share = sum(counts.values()), counts.pop("")
    missed = dict(sorted(counts.items(), key=lambda pair: -pair[1]))
    return Reach(
        modules=tuple(modules),
        share=share / total,
        missed={what: count / total for what, count in missed.items()},
    )


def has_fused_experts(layers: list[nn.Module]) -> bool:
    """Whether a decoder keeps its experts in one tensor a layer."""
    return any(_is_fused(p) for layer in layers for p in layer.parameters())


def _places(student: Student, band: set[int]) -> dict[int, str]:
    """Where each parameter of the text decoder stands, by its id."""
    model = student.loaded.model
    place = {id(p): "norms and the like" for p in model.get_decoder().parameters()}
    for index, layer in enumerate(student.loaded.layers):
        for parameter in layer.parameters():
            if _is_fused(parameter):
                place[id(parameter)] = EXPERTS
            elif index not in band:
                place[id(parameter)] = "layers outside heal.layers"
    for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
        place |= {id(p): "embeddings" for p in embedding.parameters()}
    return place


def _is_fused(parameter: nn.Parameter) -> bool:
    # a convolution's kernel, [channels, 1, width], has three dimensions too
    return parameter.dim() == _FUSED_DIMENSIONS and min(parameter.shape) > 1
