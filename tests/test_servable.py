"""Padding changes nothing, cutting leaves the nearest matrix, whatever the scale and the shapes."""

from __future__ import annotations

import pytest
import torch

from steer_heal.artifacts import RoundAdapter
from steer_heal.servable import SERVED_RANKS, at_served_rank, truncated, updates

SHAPES = {"model.layers.0.q_proj": (12, 20), "model.layers.1.down_proj": (30, 6)}  # [out, in]


def adapter(rank: int, alpha: float) -> RoundAdapter:
    draw = torch.Generator().manual_seed(rank)
    weights = {}
    for name, (rows, columns) in SHAPES.items():
        key = f"base_model.model.{name}"
        weights[f"{key}.lora_A.weight"] = torch.randn(rank, columns, generator=draw)
        weights[f"{key}.lora_B.weight"] = torch.randn(rows, rank, generator=draw)
    config = {"r": rank, "lora_alpha": alpha, "target_modules": list(SHAPES)}
    return RoundAdapter(name="r00", config=config, weights=weights, steps=())


@pytest.mark.parametrize(("rank", "served"), [(1, 1), (2, 8), (8, 8), (9, 16), (257, 320)])
def test_a_rank_is_padded_to_the_next_served_one(rank: int, served: int) -> None:
    given = adapter(rank, 2 * rank)
    found, is_cut = at_served_rank(given, None)
    assert (found.rank, is_cut, found.scale) == (served, False, 2.0)
    assert type(found.config["lora_alpha"]) is int
    for name, update in updates(given).items():
        torch.testing.assert_close(updates(found)[name], update, rtol=1e-5, atol=1e-4)
    for key, value in found.weights.items():
        added = value[rank:] if "lora_A" in key else value[:, rank:]
        assert not added.any()


def test_past_the_largest_served_rank_it_is_cut() -> None:
    """A matrix of 12 x 20 has rank 12 at most: cut from 600 to 512 it is the same."""
    given = adapter(600, 600)
    found, is_cut = at_served_rank(given, None)
    assert (found.rank, is_cut) == (SERVED_RANKS[-1], True)
    for name, update in updates(given).items():
        torch.testing.assert_close(updates(found)[name], update, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("rank", [1, 8])
def test_what_is_cut_is_nearest(rank: int) -> None:
    given = adapter(10, 25)  # a scale of 2.5
    found = truncated(given, rank)
    assert found.rank == rank
    for name, update in updates(given).items():
        u, s, v = torch.linalg.svd(update.double(), full_matrices=False)
        nearest = u[:, :rank] * s[:rank] @ v[:rank]
        torch.testing.assert_close(updates(found)[name].double(), nearest, rtol=1e-4, atol=1e-4)
        lost = float((updates(found)[name].double() - update).norm())
        assert lost == pytest.approx(float(s[rank:].norm()), abs=1e-3)


def test_an_asked_rank_that_holds_it_all_cuts_nothing() -> None:
    found, is_cut = at_served_rank(adapter(3, 3), 64)
    assert (found.rank, found.scale, is_cut) == (64, 1.0, False)
