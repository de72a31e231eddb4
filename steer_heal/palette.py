"""The colours of the pages' charts, by name: each in a light theme and in a dark one.

Charts are made in the light colours. The page knows each by its name, and puts the reader's own
theme in its place.
"""

from __future__ import annotations

# Name -> light, dark. After Okabe and Ito, told apart by the colour-blind; brighter on dark. Texts
# stand out from the paper by 4.5 to 1, what is drawn by 3 to 1 (WCAG 2.2, AA).
PALETTE = {
    "ink": ("#1d2329", "#e4e7ea"),
    "soft": ("#5a636d", "#a3abb4"),
    "line": ("#dde1e6", "#333a42"),
    "panel": ("#f5f7f9", "#1f252b"),
    "healed": ("#0067a5", "#62b6ef"),
    "healed-band": ("rgba(0,103,165,0.16)", "rgba(98,182,239,0.2)"),
    "steered": ("#c44e00", "#ff9248"),
    "prompted": ("#007a5a", "#3ecf9f"),
    "random": ("#8b6f9c", "#b9a0c9"),
    "base-band": ("rgba(90,99,109,0.13)", "rgba(163,171,180,0.17)"),
    "kept": ("#00805f", "#35c497"),
    "surplus": ("#58a089", "#357863"),
    "round-1": ("#cc8200", "#ffc04d"),
    "round-2": ("#c85a17", "#ff9457"),
    "round-3": ("#b0304f", "#ff7f96"),
    "round-4": ("#8f2f80", "#e88fdc"),
    "round-5": ("#6440a8", "#b9a0ff"),
    "round-6": ("#3a58b4", "#8caeff"),
    "round-7": ("#1c7599", "#5cc4ea"),
    "round-8": ("#16806f", "#56d3bd"),
}
_LIGHT = {name: light for name, (light, _) in PALETTE.items()}
INK, SOFT, LINE, PANEL = (_LIGHT[name] for name in ("ink", "soft", "line", "panel"))
HEALED, HEALED_BAND, STEERED = (_LIGHT[name] for name in ("healed", "healed-band", "steered"))
PROMPTED, RANDOM, BASE_BAND = (_LIGHT[name] for name in ("prompted", "random", "base-band"))
KEPT, SURPLUS = _LIGHT["kept"], _LIGHT["surplus"]
ROUNDS = [light for name, light in _LIGHT.items() if name.startswith("round-")]
CLEAR = "rgba(0,0,0,0)"


def round_name(number: int, num_rounds: int) -> str:
    """The name of a round's colour, from the first to the last."""
    if num_rounds > len(ROUNDS):
        number = 1 + (number - 1) * (len(ROUNDS) - 1) // (num_rounds - 1)
    return f"round-{number}"


def round_color(number: int, num_rounds: int) -> str:
    """A round's colour."""
    return _LIGHT[round_name(number, num_rounds)]
