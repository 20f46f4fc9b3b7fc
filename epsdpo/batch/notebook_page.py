"""The page of an executed notebook: without code, and readable without a network."""

from __future__ import annotations

import functools
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter

from epsdpo.runs.layout import link_to_index

# nbconvert's page without the scripts that it would fetch from the network, and narrow enough to read.
_PAGE_TEMPLATE = """
{%- extends 'lab/index.html.j2' -%}
{%- block html_head_js -%}{%- endblock -%}
{%- block html_head_js_mathjax -%}{%- endblock -%}
{%- block html_head_js_mermaidjs -%}{%- endblock -%}
{%- block jupyter_widgets -%}{%- endblock -%}
{%- block html_head_css -%}
<style>
main { max-width: 68rem; margin: 2rem auto; padding: 0 1rem; } img { max-width: 100%; height: auto; }
nav { padding: 0 .6rem; } nav a { color: #0000EE; text-decoration: underline; } .jp-RenderedHTML { overflow-x: auto; }
</style>
{%- endblock -%}
{%- block body_header -%}
{{ super() }}
{%- if resources.to_index %}
<nav><a href="{{ resources.to_index | e }}">← all runs of this folder</a> · {{ resources.metadata.name | e }}</nav>
{% endif -%}
{%- endblock -%}
"""


@functools.cache
def exporter() -> HTMLExporter:
    """What makes pages. With its first it compiles its templates, and it keeps nothing of a notebook."""
    return HTMLExporter(
        raw_template=_PAGE_TEMPLATE,
        exclude_input=True,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        embed_images=True,
    )


def write_page(executed: Path, page: Path, title: str) -> None:
    # Not `from_filename`, which would call every page by the name of its file.
    resources = {"metadata": {"name": title, "path": str(executed.parent)}, "to_index": link_to_index(page.parent)}
    text, _ = exporter().from_notebook_node(nbformat.read(executed, as_version=4), resources=resources)
    page.write_text(text, encoding="utf-8")
