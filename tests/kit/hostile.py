"""Text that attacks the page it is shown on, and the check that a page only shows it."""

from pathlib import Path

from kit.chromium import Chromium

# Each ends the element it may stand in, runs code of its own, or would be filled in by a template.
ATTACKS = [
    "</title></style></pre></td><script>window.hacked = 'script'</script>",
    "<img src=x onerror=\"window.hacked = 'image'\">",
    "\"'><svg onload=\"window.hacked = 'svg'\">",
    "{{ 7*7 }} {% raw %} &lt;b&gt;",
]
HOSTILE = "Hello ".join(["", *ATTACKS])
HOSTILE_TITLE = "</title><img src=x onerror=\"window.hacked = 'title'\"> {{ 7*7 }}"  # short enough for a figure


def assert_harmless(chromium: Chromium, page: Path, shown: str) -> None:
    """Open the HTML file `page` and make sure that `shown` is read there to the letter, and that none of it ran.

    A failure leaves a picture of the page beside it.
    """
    with chromium.tab(page.resolve().as_uri(), page.parent) as tab:
        # Images that fail to load have said so by the time that the page is complete.
        assert tab.evaluate("window.hacked ?? null") is None, f"{page}: text of a model or a config ran as code"
        assert shown in tab.evaluate("document.body.innerText"), f"{page} does not show {shown!r} to the letter"
