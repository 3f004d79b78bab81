"""Report pages: they hold what the report holds, are well-formed, and show failures with reasons and nothing else."""

from html.parser import HTMLParser

import pytest

from diffalign.reports.pages import failures_page, report_page
from diffalign.reports.summary import markdown, summarise
from tests.benchmarks.test_report import judged

VOID = {"meta", "br", "img"}


class Parsed(HTMLParser):
    """Text, image paths, and a check that tags are closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open, self.images, self.text = [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(dict(attrs)["src"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data.strip())


def verdict(number, correct, reason="", prompt="a photo of a dog"):
    return {"filename": f"{number:05d}/samples/00000.png", "tag": "colors", "prompt": prompt, "correct": correct, "reason": reason}


def test_a_report_as_a_page_says_what_its_markdown_says():
    summary = {**summarise(judged()), "facts": {"command": "`diffalign bench` <now> & here"}}
    page = Parsed(report_page(markdown(summary), "shapes"))
    assert "Judge accuracy, with 95 % intervals" in page.text
    assert "0.750 [0.19, 0.99]" in page.text
    assert "command: `diffalign bench` <now> & here" in page.text
    assert page.text.count("reno") == 4


def test_only_failures_are_shown_with_their_reasons():
    rows = [verdict(0, True), verdict(1, False, "expected red dog>=1, found 0 red; and 1 blue\nexpected cat>=1, found 0")]
    page = Parsed(failures_page(rows, "failures"))
    assert page.images == ["00001/samples/00000.png"]
    assert "colors: 1 of 2 images fail" in page.text
    assert any("expected red dog>=1, found 0 red; and 1 blue" in text for text in page.text)


def test_no_more_than_asked_and_it_is_said():
    page = Parsed(failures_page([verdict(i, False, "expected") for i in range(5)], "failures", most=3))
    assert len(page.images) == 3
    assert "colors: 5 of 5 images fail, the first 3 shown" in page.text


def test_scores_are_shown_from_the_lowest_with_what_they_rest_on():
    rows = [
        {"filename": f"color/samples/a cup? & #{i}_{i:06d}.png", "tag": "color", "prompt": "a <cup>", "value": value, "detail": detail}
        for i, (value, detail) in enumerate(
            [
                (0.9, {"answers": [["a cup?", 0.9]]}),
                (0.1, {"objects": [["dog", 0.5, 0, 0, 1, 1]]}),
                (0.5, {"kind": "action", "blip-vqa": 0.4}),
            ]
        )
    ]
    page = Parsed(failures_page(rows, "lowest"))
    assert page.images[0] == "color/samples/a%20cup%3F%20%26%20%231_000001.png"  # a name that a browser can follow
    reasons = [text for text in page.text if text[:2] in ("0.", "0,")]
    assert reasons == ["0.1000 found dog 0.50", "0.5000 kind action; blip-vqa 0.4", "0.9000 a cup? 0.90"]
    assert "a <cup>" in page.text


@pytest.mark.parametrize("rows", [[], [verdict(0, True)]])
def test_nothing_wrong_is_an_empty_page(rows):
    assert Parsed(failures_page(rows, "none")).images == []
