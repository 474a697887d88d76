"""One page of HTML a run can be read from. Knows summaries and figures only."""

import io
import json
from collections.abc import Mapping

import jinja2
import matplotlib.pyplot as plt
from markupsafe import Markup
from matplotlib.figure import Figure

from cachedattn_jax.run_directory import RunDirectory

_PAGE = jinja2.Environment(autoescape=True).from_string(
    """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{{ title }}</title>
<style>
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto;
         padding: 0 1rem; color: #222; }
  table { border-collapse: collapse; } td, th { padding: .25rem .75rem; text-align:
  left;
         border-bottom: 1px solid #ddd; } td.number { text-align: right; }
  .missed { color: #b00; } .holds { color: #070; }
  svg { max-width: 100%; height: auto; } pre { overflow-x: auto; background: #f6f6f6;
         padding: 1rem; font-size: 13px; }
</style>
<h1>{{ title }}</h1>
<h2>Claims</h2>
<table>
  <tr><th>claim<th>value<th>target<th>unit<th>kind<th>
  {% for claim in claims %}
  <tr><td>{{ claim.name }}<td class="number">{{ claim.value }}
      <td class="number">{{ claim.comparison }} {{ claim.target }}<td>{{ claim.unit }}
      <td>{{ claim.kind }}
      <td class="{{ 'holds' if claim.holds else 'missed' }}">
        {{ "holds" if claim.holds else "missed" }}
  {% endfor %}
</table>
{% for name, svg in figures.items() %}
<h2>{{ name }}</h2>
{{ svg }}
{% endfor %}
<h2>Numbers</h2>
<pre>{{ numbers }}</pre>
</html>
"""
)


def write_report(
    run_directory: RunDirectory,
    title: str,
    summary: Mapping,
    figures: Mapping[str, Figure],
) -> None:
    """Writes report.html: claims, figures (which it closes) and numbers."""
    page = _PAGE.render(
        title=title,
        claims=[
            {**claim.row(), "value": _rounded(claim.value)}
            for claim in summary["claims"]
        ],
        figures={name: _svg(figure) for name, figure in figures.items()},
        numbers=json.dumps(
            {key: value for key, value in summary.items() if key != "claims"},
            indent=1,
            default=str,
        ),
    )
    run_directory.write_text("report.html", page)


def _rounded(value: int | float | bool | None) -> int | float | bool | None:
    return round(value, 4) if isinstance(value, float) else value


def _svg(figure: Figure) -> Markup:
    text = io.StringIO()
    figure.savefig(text, format="svg")
    plt.close(figure)
    # What precedes <svg is an XML prologue, which HTML does not take.
    return Markup(text.getvalue()[text.getvalue().index("<svg") :])
