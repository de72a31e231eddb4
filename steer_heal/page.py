"""What every page of a run is made of: one file with its charts and what draws them in it.

Nothing is fetched when it is read: style, scripts, figures and Plotly are inside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from steer_heal.browse import pack
from steer_heal.chart import Chart
from steer_heal.palette import PALETTE
from steer_heal.wording import script_json, templates

PLOTLY = Path(__file__).parent / "vendor" / "plotly-basic.min.js"


def fill_page(name: str, charts: Mapping[str, Sequence[Chart]], **values: Any) -> str:
    """A template that extends page.html, filled in.

    Args:
        charts: section of the page -> its charts.
        values: what else the template names.
    """
    figures = [chart for section in charts.values() for chart in section]
    drawn = {
        "figures": {chart.name: chart.figure.to_plotly_json() for chart in figures},
        "colors": {light: f"--{name}" for name, (light, _) in PALETTE.items()},
    }
    return (
        templates(is_html=True)
        .get_template(name)
        .render(
            charts=charts,
            drawn=script_json(drawn),
            palette=PALETTE,
            plotly=_packed_plotly(),
            **values,
        )
    )


@lru_cache(maxsize=1)
def _packed_plotly() -> str:
    return pack(PLOTLY.read_text(encoding="utf-8"))
