"""The decision table: what it chooses fits every device of the class; the pages hold it safely."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from pocketglm.devices.profile import all_profiles
from pocketglm.devices.recipes import recipe_book
from pocketglm.report import choosing, choosing_html, svg
from pocketglm.stages.advise import advise
from pocketglm.stages.choosing import Advice, choose, classes, every_advice, nobody_knows

GOOD = ("yes", "probably")


@pytest.fixture(scope="module")
def advice() -> Advice:
    return every_advice()


def test_classes_hold_every_device_once() -> None:
    names = [name for group in classes() for name in group.devices]
    assert sorted(names) == sorted(all_profiles())
    assert len({group.title for group in classes()}) == len(classes())


def test_a_choice_fits_every_device_of_its_class(advice: Advice) -> None:
    chosen = 0
    for group in classes():
        for task in recipe_book().tasks:
            choice = choose(advice, task, group)
            known = [name for name in group.devices if name not in choice.unknown]
            if choice.row is None:
                assert choice.reason
                continue
            chosen += 1
            times = {}
            for name in known:
                [row] = [
                    row
                    for row in advice[name, task].rows
                    if (row.model, row.recipe, row.runtime, row.unit)
                    == (choice.row.model, choice.row.recipe, choice.row.runtime, choice.row.unit)
                ]
                assert row.fits in GOOD
                assert row.available
                times[name] = row.latency_ms.value if row.latency_ms else 0
            assert times[choice.weakest] == max(times.values())
            assert all(nobody_knows(advice[name, task]) for name in choice.unknown)
    assert chosen > len(classes())


def test_the_page_in_markdown(advice: Advice) -> None:
    page = choosing.markdown(advice, "NOTE\n")
    assert page.startswith("# Which model suits which device\n\nNOTE\n")
    for name in all_profiles():
        assert f"| `{name}` |" in page
    for task in recipe_book().tasks:
        assert f"\n## `{task}`: " in page
    widths: list[int] = []
    for line in page.splitlines():
        if line.startswith("|"):
            widths.append(len(re.findall(r"(?<!\\)\|", line)))
            assert widths[-1] == widths[-2 if len(widths) > 1 else -1]
        else:
            widths = []
    assert "Tiny, Mini and Base on Xiaomi 14" in page
    assert re.search(r"Base 1\.1 B fp32 \| \w+ cpu .*\| no: ", page)
    notes = set(re.findall(r"\\\[(\d+)\\\]", page.split("## Where the losses")[0]))
    assert notes == set(re.findall(r"^\* \\\[(\d+)\\\]", page, re.M))


class Reader(HTMLParser):
    """Counts open tags, and keeps what is asked for from elsewhere."""

    void = {"meta", "br", "i"} - {"i"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.requests: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.requests += [str(named[key]) for key in ("src", "href") if key in named]
        self.ids += [str(named["id"])] if "id" in named else []
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_in_html(advice: Advice) -> None:
    page = choosing_html.html(advice)
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    assert reader.requests == []
    assert len(reader.ids) == len(set(reader.ids))
    assert "<script" not in page
    assert "prefers-color-scheme: dark" in page
    for words in ("Memory on ", "Speed on ", "First token on ", "keeps the limit"):
        assert words in page
    assert page.count("<svg") > 3 * len(classes())
    plot = page.split("Memory on ", 1)[1].split("</svg>")[0]
    sizes = re.findall(r'class="t" text-anchor="start">([^<]+)<', plot)
    assert len(sizes) == len(set(sizes)) > 3  # one row a size, whatever runs it


def test_the_same_twice(advice: Advice) -> None:
    assert choosing.markdown(advice, "") == choosing.markdown(advice, "")
    assert choosing_html.html(advice) == choosing_html.html(advice)
    device, task = "pixel-6", "lm"
    assert advise(device, task=task, predicted=False) == advice[device, task]


def test_ranges_lie_on_one_axis_with_the_limit() -> None:
    rows = [svg.Range("a", 10, 5, 20, "pass"), svg.Range("b<", 100, 80, 200, "fail")]
    drawn = svg.ranges("k", "Title", "ms", rows, 50)
    dots = [float(x) for x in re.findall(r'<circle cx="([\d.]+)%"', drawn)]
    limit = {float(x) for x in re.findall(r'<line x1="([\d.]+)%"', drawn)}
    assert len(limit) == 1
    assert dots[0] < limit.pop() < dots[1]
    assert "limit 50.0 ms" in drawn
    assert "b&lt;" in drawn
    assert all(0 <= x <= 100 for x in dots)
    assert "limit" not in svg.ranges("k", "Title", "ms", rows, None)
