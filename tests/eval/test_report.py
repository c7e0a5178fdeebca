"""Reports: complete, self-contained, escaped, readable at 390 px, and opened in a real browser where there is
one.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from examples import entry, prediction, world

from eval.metrics import evaluate, evaluate_targets
from eval.report import read_training, terminal_table, write_report
from eval.report.content import _sentence
from eval.report.figures import by_group, checked
from eval.report.plots import draw
from eval.report.words import number, signed
from gdrt_ds.errors import UserError

EVIL = '<script>alert("x")</script> & $co$t_ | [a](javascript:x)'
FIGURES = [
    {
        "kind": "bar",
        "title": "Bars " + EVIL,
        "caption": "Two bars.",
        "categories": ["a " + EVIL, "b"],
        "series": [{"name": EVIL, "values": [1, None]}],
    },
    {
        "kind": "bar",
        "stacked": True,
        "title": "Stacked",
        "caption": "Parts.",
        "categories": ["a"],
        "series": [{"name": "x", "values": [1]}, {"name": "y", "values": [2]}],
    },
    {
        "kind": "line",
        "title": "Line",
        "caption": "A line.",
        "reference": {"value": 1, "label": "none"},
        "series": [{"name": "x", "x": [1, 2], "y": [1, None], "low": [0, None], "high": [2, None]}],
    },
    {
        "kind": "stacked_area",
        "title": "Area",
        "caption": "Shares.",
        "ordered": True,
        "x": [1, 2],
        "series": [{"name": "0", "y": [1, 0]}, {"name": "1", "y": [0, 1]}],
    },
    {
        "kind": "scatter",
        "title": "Scatter",
        "caption": "Points.",
        "points": [{"x": 1, "y": 2, "label": EVIL, "x_low": 0, "x_high": 2}, {"x": 2, "y": 1}],
    },
    {
        "kind": "heatmap",
        "title": "Map",
        "caption": "Cells.",
        "rows": ["a", "b"],
        "columns": ["c"],
        "values": [[1.0], [None]],
    },
    {
        "kind": "tokens",
        "title": "Tokens",
        "caption": "A prompt.",
        "num_groups": 4,
        "prompts": [
            {
                "title": EVIL,
                "tokens": [
                    {"text": "### Input:\n", "segment": "template", "weight": -0.5},
                    {"text": EVIL, "segment": "history", "weight": 1.0},
                    {"text": "Blade", "segment": "target", "group": 3},
                ],
            }
        ],
    },
]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder, run = tmp_path_factory.mktemp("evaluation"), tmp_path_factory.mktemp("run")
    predictions, entries, _ = world(120, 60)
    for e in entries[:3]:
        e.text = EVIL
    entries[0].groups["genres"] = [EVIL]
    predictions[0]["user_id"], predictions[0]["user"]["gender"] = EVIL, EVIL
    rows = [
        {
            "step": s + 1,
            "loss": 3 - s / 100,
            "group_loss": [3.0, None if s == 5 else 2.0, 1.0],
            "group_weight": [0.5, None if s == 5 else 0.3, 0.2],
            "group_count": [4, 0, 4],
            "lr": 1e-4,
            "grad_norm": 1.0,
            "tokens_per_s": 100.0,
        }
        for s in range(60)
    ]
    (run / "metrics.jsonl").write_text(
        "\n".join(map(json.dumps, rows)) + '\n{"step": 61, "lo'
    )  # a torn last line
    found = evaluate(predictions, entries, num_bootstrap=60)
    floor = evaluate(world(120, 60, skill=0.0)[0], entries, num_bootstrap=30, breakdowns=False)["metrics"]
    audit = {
        "title": "Planted " + EVIL,
        "question": "Is it?",
        "finding": "It is.",
        "table": {"columns": ["a", "b"], "rows": [[EVIL, 0.5], ["c", None]]},
        "figures": FIGURES,
        "control": "Permuted: 0.",
        "cost": "1 s",
    }
    results = {
        **found,
        "floors": {"popularity": floor, "targets": evaluate_targets(predictions, entries, num_bootstrap=30)},
        "name": "a " + EVIL,
        "objective": "gdrt",
        "scoring": "renormalised",
        "mode": "renormalised",
        "dtype": "float32",
        "limit": 120,
        "versions": {"torch": "2"},
        "git_hash": "0123456789abc",
        "config": {"run": {"dir": "x"}, "objective": "gdrt"},
        "audits": {"planted": audit},
    }
    write_report(
        folder, results, predictions, entries, run_folder=run, history_item_counts={"i0": 5, "i1": 2}
    )
    return folder, results


class Tags(HTMLParser):
    VOID = {"meta", "link", "br", "path", "use", "rect", "line", "circle"}

    def __init__(self):
        super().__init__()
        self.seen, self.open, self.text, self.ids, self.wrong = [], [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        self.ids += [v for k, v in attributes if k == "id"]
        if tag not in {"meta", "link", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        self.ids += [v for k, v in attributes if k == "id"]

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        self.text.append(data)


def parsed(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    return tags


def test_the_page_is_one_file_without_script_or_network(report):
    page = (report[0] / "report.html").read_text()
    tags = parsed(page)
    assert tags.wrong == [] and tags.open == [], "tags are not balanced"
    assert {"script", "iframe", "object", "img"}.isdisjoint(t for t, _ in tags.seen)
    links = [v for _, a in tags.seen for k, v in a.items() if k in ("href", "src", "xlink:href", "action")]
    assert links and all(v.startswith("#") or v == "data:," for v in links)
    assert not re.search(r"@import|url\((?!#)", page) and not any(
        k.startswith("on") for _, a in tags.seen for k in a
    )
    assert len(tags.ids) == len(set(tags.ids)), "an id is used twice"
    inside = {v[1:] for v in links if v.startswith("#")}
    assert inside <= set(tags.ids)


def test_a_title_that_is_markup_stays_text_in_page_and_markdown(report):
    page, markdown = ((report[0] / name).read_text() for name in ("report.html", "report.md"))
    assert "<script" not in page and "".join(parsed(page).text).count('<script>alert("x")</script>') >= 5
    assert "<script" not in markdown and "[a](javascript" not in markdown


def test_the_first_sentence_judges_floors_by_the_paired_difference():
    """A floor's value inside the model's own interval says nothing, and neither does one outside of it."""
    hit = {"value": 0.15, "ci_low": 0.13, "ci_high": 0.17}

    def sentence(**paired):
        floors = {name: {"hr@10": {"value": value}} for name, (value, _, _) in paired.items()}
        differences = {
            name: {"hr@10": {"value": 0.0, "ci_low": low, "ci_high": high}}
            for name, (_, low, high) in paired.items()
        }
        results = {"metrics": {"hr@10": hit}, "floors": floors, "minus_floors": differences}
        return _sentence(results, 2000, 2000, 1000)

    text = sentence(popularity=(0.144, 0.003, 0.009), markov=(0.12, -0.005, 0.04), sasrec=(0.2, -0.09, -0.01))
    assert "above chance (1.0 %) and popularity (14.4 %); below sasrec (20.0 %)" in text
    assert "no difference from markov (12.0 %) is shown. Floors are compared over the same users." in text
    assert sentence().endswith("; above chance (1.0 %).")
    hit = {"value": 0.01, "ci_low": 0.005, "ci_high": 0.02}
    assert "no difference from chance (1.0 %) is shown" in sentence()


def test_every_section_table_and_figure_is_there_with_its_sentence(report):
    page = (report[0] / "report.html").read_text()
    for title in (
        "In short",
        "Training",
        "Accuracy",
        "Item side",
        "Provider side",
        "User side",
        "For whom it works",
        "Audit: Planted",
        "Example users",
    ):
        assert f"<h2>{title}" in page, title
    assert page.count("<figure") == page.count("<figcaption") >= 15 + len(FIGURES) - 2
    assert all(
        re.search(r"[a-z]", caption) for caption in re.findall(r"<figcaption>(.*?)</figcaption>", page)
    )
    assert "Not a result: limited to 120 samples" in page
    for title in (
        "Group losses",
        "Group weights q",
        "Exposure by item popularity",
        "Exposure by provider size",
        "NDCG@10 by user gender",
    ):
        assert f"<h3>{title}</h3>" in page, title


def test_markdown_holds_every_metric_with_the_value_of_results_json(report):
    folder, results = report
    markdown = (folder / "report.md").read_text()
    rows = [line for line in markdown.splitlines() if line.startswith("| ")]
    for label, name in (
        ("NDCG@10", "ndcg@10"),
        ("MGU@5", "mgu@5"),
        ("Target NLL", "nll"),
        ("Provider Gini@10", "provider\u005fgini@10"),
    ):
        shown = f"{results['metrics'][name]['value']:.4f}"
        assert any(row.startswith(f"| {label} ") and shown in row for row in rows), (label, shown)
    assert len({row.count("|") for row in rows if "NDCG@" in row and "↑" in row}) == 1


def test_the_catalogue_beside_the_report_lets_anyone_recompute_the_metrics(report):
    rows = [json.loads(line) for line in (report[0] / "catalogue.jsonl").read_text().splitlines()]
    assert len(rows) == 60 and rows[0]["history_count"] == 5 and rows[5]["history_count"] == 0
    assert set(rows[0]) == {
        "item_id",
        "merged_ids",
        "text",
        "train_count",
        "provider",
        "groups",
        "history_count",
    }


def test_the_terminal_table_names_values_intervals_and_floors(report):
    from rich.console import Console

    console = Console(width=100, record=True, file=open("/dev/null", "w"))
    console.print(terminal_table(report[1]))
    text = console.export_text()
    assert (
        "NOT A RESULT (limit 120)" in text
        and "[a]" in text
        and "popularity" in text
        and f"{report[1]['metrics']['ndcg@10']['value']:.4f}" in text
    )


def test_figures_for_reading():
    shown = {
        1234.56: "1,235",
        123.456: "123.5",
        12.3456: "12.35",
        0.5: "0.5000",
        -0.25: "-0.2500",
        0.00094: "0.00094",
        -5.4e-5: "-5.4e-05",
        None: "–",
        float("inf"): "–",
        0.0: "0.0000",
        -1.4e-17: "0.0000",
        2.2e-16: "0.0000",
        1e-14: "1e-14",
        2411: "2,411",
    }
    assert {value: number(value) for value in shown} == shown
    assert [signed(value) for value in (0.25, -0.25, 0.0, 2.2e-16, -2.2e-16, None)] == [
        "+0.2500",
        "-0.2500",
        "0.0000",
        "0.0000",
        "0.0000",
        "–",
    ]


def test_a_test_set_of_one_user_has_a_report_that_says_it_has_no_interval(tmp_path):
    entries = [entry(f"i{n}", 5) for n in range(30)]
    predictions = [prediction(n, "i0", rank, ["i0"], user_id="u") for n, rank in enumerate((1, 20, 25))]
    found = evaluate(predictions, entries, num_bootstrap=20)
    write_report(tmp_path, found, predictions, entries)
    sentence = "in the top 10 for 33.3 % of the samples; one user gives no interval."
    assert sentence in (tmp_path / "report.md").read_text()


def test_a_caption_tells_no_slices_apart_of_which_one_has_no_interval():
    def caption(high, low):
        groups = {
            "a": {"nll": {"value": 5.0, "ci_low": high, "ci_high": 5.5, "n": 40}},
            "b": {"nll": {"value": 4.0, "ci_low": 3.5, "ci_high": low, "n": 40}},
        }
        return by_group("kind", groups, "nll")["caption"]

    assert "do not overlap" in caption(4.9, 4.5) and "intervals overlap" in caption(4.3, 4.5)
    for ends in ((4.9, None), (None, 4.5), (None, None)):
        assert "overlap" not in caption(*ends) and "has no interval" in caption(*ends)


def test_a_torn_last_line_of_the_training_log_is_left_out_and_a_torn_middle_is_an_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    assert read_training(tmp_path) == [{"step": 1}] and read_training(tmp_path / "none") == []
    (tmp_path / "metrics.jsonl").write_text('{"st\n{"step": 2}')
    with pytest.raises(json.JSONDecodeError):
        read_training(tmp_path)


@pytest.mark.parametrize("figure", FIGURES[:-1], ids=lambda f: f["title"][:8])
def test_every_kind_of_figure_is_drawn_in_the_page_colours(figure):
    svg = draw(checked(figure), 7)
    tags = parsed(svg)
    assert svg.startswith("<svg") and tags.wrong == [] and "var(--ink)" in svg or "var(--muted)" in svg
    assert "#0102" not in svg, "a marker colour was not replaced"
    assert "<script" not in svg and all(i.startswith("f7-") for i in tags.ids)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"kind": "pie"}, "kind is 'pie'"),
        ({"caption": None}, "caption"),
        ({"series": [{"name": "x", "values": [1, 2, 3]}]}, "3 values for 2 places"),
    ],
)
def test_a_figure_that_does_not_fit_the_schema_is_refused_in_words(change, words):
    with pytest.raises(UserError, match=words):
        checked({**FIGURES[0], **change})


def browser() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not found:
        pytest.skip(
            "no Chromium on this machine (Debian: apt-get install chromium), so the page was not opened in "
            "a browser"
        )
    return found


@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_opens_the_page_without_console_error_network_or_sideways_scrolling(
    report, tmp_path, width
):
    page = (report[0] / "report.html").read_text()
    probe = (
        "<script>onload=()=>parent.postMessage("
        "document.documentElement.scrollWidth+' of '+innerWidth,'*')</script>"
    )
    (tmp_path / "report.html").write_text(page.replace("</body>", probe + "</body>"))
    copy = tmp_path / "frame.html"  # a window cannot be narrower than 500 px, a frame can
    copy.write_text(
        f"<body><script>onmessage=e=>document.title='width '+e.data</script>"
        f"<iframe src=report.html style='width:{width}px;height:900px;border:0'>"
    )
    log = tmp_path / "net.json"
    done = subprocess.run(
        [
            browser(),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--disable-background-networking",
            "--enable-logging=stderr",
            f"--log-net-log={log}",
            "--window-size=1400,1000",
            "--virtual-time-budget=4000",
            "--dump-dom",
            copy.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    scroll, inner = map(int, re.search(r"<title>width (\d+) of (\d+)", done.stdout).groups())
    assert inner == width and scroll <= inner, "the page scrolls sideways"
    assert "CONSOLE" not in done.stderr, done.stderr
    requested = set(re.findall(r'"url":"(https?:[^"]+)"', log.read_text()))
    assert requested & set(re.findall(r"https?:[^\s\"'<>]+", page)) == set() and "Uncaught" not in done.stderr
