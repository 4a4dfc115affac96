"""HtmlCell tables: structure, colours on any background, and data that stays data."""

from __future__ import annotations

from probekit.html_tables import HtmlCell, html_table


def test_a_table_has_headings_and_shades():
    rows = [
        ("b", [HtmlCell("1", 0.5), HtmlCell("2", 2.0, "orange", True)]),
        ("a", [HtmlCell("3"), HtmlCell("-", 1, "grey")]),
    ]
    page = html_table("figures", "E \\ K", ["x", "y"], rows)
    assert page.startswith("<table><caption>figures</caption>")
    assert page.count('<th scope="col">') == 3
    assert page.count('<th scope="row">') == 2
    assert '<td style="background:rgba(40,120,160,0.30)">1</td>' in page
    assert "rgba(205,110,20,0.60);outline:2px solid currentColor" in page  # a share never exceeds 1
    assert "<td>3</td>" in page
    assert "rgba(128,128,128,0.60)" in page


def test_markup_shows_as_text():
    page = html_table("<b>", "&", ['"x"'], [("<i>", [HtmlCell("</td><script>")])])
    for tag in ("<b>", "<i>", "<script>"):
        assert tag not in page
    assert "&lt;script&gt;" in page
