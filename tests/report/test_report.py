"""The report: what it says, that it asks for nothing, and (in a browser) that it is drawn, sortable and accessible."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import vl_convert
from tests.finished_runs import event, synthetic, written
from typer.testing import CliRunner

from fedex_lora.cli import app
from fedex_lora.errors import UsageError
from fedex_lora.report import page, write_figure, write_report
from fedex_lora.report._groups import grouped, series
from fedex_lora.report._sections import comparison
from fedex_lora.report.analysis import find_runs
from fedex_lora.storage.events import ClientRejected, of_kind

SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
EVIL = "<img src=x onerror=alert(1)></script><script>alert(2)</script>"


def parsed(html):
    """(tags with their attributes, all text outside of scripts)."""

    class Reader(HTMLParser):
        tags, text, inside = [], [], ""

        def handle_starttag(self, tag, attrs):
            self.tags.append((tag, dict(attrs)))
            self.inside = tag

        def handle_endtag(self, tag):
            self.inside = ""

        def handle_data(self, data):
            if self.inside not in ("script", "style"):
                self.text.append(data)

    reader = Reader()
    reader.tags, reader.text = [], []
    reader.feed(html)
    return reader.tags, " ".join(" ".join(reader.text).split())


def charts(html):
    return [one["spec"] for one in json.loads(re.search(r'id="charts">(.*?)</script>', html, re.S)[1])]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return written(tmp_path_factory.mktemp("report") / "run", synthetic(rounds=50, clients=4, layers=12))


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """Two methods, two seeds each."""
    folder = tmp_path_factory.mktemp("several")
    for method in ("fedex", "fedit"):
        for seed in (0, 1):
            run = written(folder / f"{method}-{seed}", synthetic(rounds=6, clients=3, layers=2, method=method, seed=seed))
            (run / "config.toml").write_text(f'method = "{method}"\nseed = {seed}\n')
    return folder


def test_a_run_of_fifty_rounds_and_twelve_layers(one, tmp_path):
    made = write_report([one], tmp_path / "report.html")
    assert made["bytes"] == (tmp_path / "report.html").stat().st_size < 3e6
    html = (tmp_path / "report.html").read_text()
    tags, text = parsed(html)
    assert not [tag for tag, attributes in tags if {"src", "href", "srcset"} & attributes.keys()]
    assert "default-src 'none'" in html
    for said in ("0.8880", "1.0e-07", "30.0 %", "Exactness error", "Participation", "12 times the round's median"):
        assert said in text, said
    specs = charts(html)
    assert len(specs) == made["charts"] == len([tag for tag, attributes in tags if attributes.get("class") == "chart"])
    assert len([tag for tag, _ in tags if tag == "table"]) >= made["tables"]


def test_every_chart_compiles_and_holds_the_events_numbers(one):
    html, _ = page(find_runs([one]))
    for spec in charts(html):
        compiled = vl_convert.vegalite_to_vega(spec)
        assert compiled["marks"], spec["description"]
    accuracy = next(spec for spec in charts(html) if spec["description"] == "Accuracy")["data"]["values"]
    done = [json.loads(line) for line in (one / "events.jsonl").read_text().splitlines() if '"round_done"' in line]
    assert [row["value"] for row in accuracy][1:] == [pytest.approx(event["metrics"]["accuracy"], rel=1e-4) for event in done]


def test_seeds_are_bands_and_methods_are_lines(several):
    html, _ = page(find_runs([several]))
    _, text = parsed(html)
    assert "fedex, fedit on glue/mrpc" in text
    curve = next(spec for spec in charts(html) if spec["description"] == "Across rounds")
    assert {row["label"] for row in curve["data"]["values"]} == {"fedex", "fedit"}
    assert "means over the seeds" in text


def changed(events, change):
    """Events, each after a function has had its hands on it."""
    for one in events:
        change(one)
        yield one


def test_numbers_of_seeds_are_of_all_seeds(tmp_path):
    """Means, the worst and sums over the seeds, each called so; and the one refusal, which is not in the first."""
    for seed in (0, 1, 2):

        def other(one, seed=seed):
            if one["event"] == "rejected":
                one["event"] = "client_late"  # nothing that the report knows
            if one["event"] == "round_done":
                one |= {"exactness_error": 1e-7 * (seed + 1), "deviation": 0.1 * (seed + 1), "bytes_down": 1000 * (seed + 1), "bytes_up": 0}

        events = list(changed(synthetic(rounds=2, clients=3, layers=2, seed=seed), other))
        if seed == 2:
            events.insert(2, event("refused", round=1, client="site-000", reason="only in the last seed"))
        run = written(tmp_path / f"run-{seed}", events)
        (run / "config.toml").write_text(f'method = "fedex"\nseed = {seed}\n')
    html, _ = page(find_runs([tmp_path]))
    text = parsed(html)[1]
    for said in (
        "3.0e-07 worst round and module, from the factors, worst of 3 seeds",
        "30.0 % of the whole model's update it would lose: most in one round, worst of 3 seeds; 20.0 % in the last",
        "4.00 kB 4.00 kB down, 0 bytes up, all clients and rounds, mean of 3 seeds",
        "answers refused 1 of",
        "1 site-000 only in the last seed round 2",
    ):
        assert said in text, said
    assert "4.00 kB 0 bytes 4.00 kB" in text  # of the table of what travelled


def test_a_skipped_round_and_numbers_that_are_none(tmp_path):
    """The last numbers that are there are shown."""

    def other(one):
        if one["event"] == "round_done" and one["round"] == 2:
            one |= {"deviation": float("inf"), "exactness_error": None, "metrics": {"accuracy": None, "loss": float("nan")}}
        if one["event"] == "round_done" and one["round"] == 3:
            for key in ("deviation", "exactness_error", "modules", "drift"):
                del one[key]
            one["skipped"] = "too few answers"

    html, _ = page(find_runs([written(tmp_path / "run", changed(synthetic(rounds=3, clients=3), other))]))
    text = parsed(html)[1]
    assert not re.search(r"\b(nan|inf)\b", text)
    assert "30.0 % in the last that was measured" in text


def test_a_last_round_that_is_not_finite_is_no_earlier_one(tmp_path):
    """Of one run, and of one among several seeds: neither its number nor the mean is another round's, or the other seeds'."""
    for seed in (0, 1, 2):

        def other(one, seed=seed):
            if one["event"] == "round_done":
                one["metrics"]["accuracy"] = None if (one["round"], seed) == (2, 2) else 0.5

        run = written(tmp_path / f"run-{seed}", changed(synthetic(rounds=2, clients=2, layers=2, seed=seed), other))
        (run / "config.toml").write_text(f'method = "fedex"\nseed = {seed}\n')
    for folder, whole in ((tmp_path / "run-2", False), (tmp_path, False), (tmp_path / "run-1", True)):
        html, _ = page(find_runs([folder]))
        assert ("accuracy 0.5000 evaluation rows, round 2" in parsed(html)[1]) == whole
        assert ("accuracy not finite evaluation rows, round 2" in parsed(html)[1]) != whole
    group = grouped(find_runs([tmp_path]))[0]
    assert series([group], "accuracy").set_index("round").loc[[1, 2], "value"].isna().tolist() == [False, True]
    table = comparison([group])
    assert "0.5000" not in [text for row in table.rows for text, _ in row]


def test_every_headline_has_its_curve(tmp_path):
    """Of runs on tasks that are judged differently."""

    def other(one):
        if "metrics" in one:
            one["metrics"] = {"f1": 0.5, "loss": 0.5}
        if one["event"] == "started":
            one |= {"headline": "f1", "task": "glue/qqp"}

    for name, change in (("mrpc", lambda one: None), ("qqp", other)):
        run = written(tmp_path / name, changed(synthetic(rounds=2, clients=2), change))
        (run / "config.toml").write_text(f'method = "fedex"\n[task]\nname = "{name}"\n')
    html, _ = page(find_runs([tmp_path]))
    assert {"Accuracy", "F1"} <= {spec["description"] for spec in charts(html)}
    assert "accuracy or f1 after the last round" in parsed(html)[1]


def test_tables_have_every_choice_and_the_bands(one, several):
    text = parsed(page(find_runs([one]))[0])[1]
    for choice in ("relative to the ideal update", "root mean square over the weight's entries", "effective rank of what is lost"):
        assert f"query: {choice}, by layer and round" in text
    assert "fedex fedex lowest fedex highest" in parsed(page(find_runs([several]))[0])[1]


def test_what_clients_say_is_text(tmp_path):
    """Names and reasons come from elsewhere: they must not become part of the page."""
    events = [
        event("started", method="fedex", clients=[EVIL, "b"], metrics={"accuracy": 0.5}, headline="accuracy", task=EVIL, base_model="m"),
        event("round_started", round=1, clients=[EVIL, "b"]),
        event("client_done", round=1, client=EVIL, bytes_up=1, num_examples=3, seconds=1.0),
        event("refused", round=1, client="b", reason=EVIL),
        event("round_done", round=1, metrics={"accuracy": 0.6}, bytes_down=1, bytes_up=1, seconds=1.0),
    ]
    html, _ = page(find_runs([written(tmp_path / "run", events)]))
    tags, text = parsed(html)
    assert not [tag for tag, _ in tags if tag == "img"]
    assert len([tag for tag, _ in tags if tag == "script"]) == 3
    assert "alert(1)" in text
    assert EVIL in json.dumps(charts(html))


def test_a_thousand_rounds_of_a_hundred_clients(tmp_path):
    run = written(tmp_path / "run", synthetic(rounds=1000, clients=100))
    made = write_report([run], tmp_path / "report.html")
    assert made["bytes"] < 3e6
    marks = [len(spec["data"]["values"]) for spec in charts((tmp_path / "report.html").read_text())]
    assert max(marks) <= 6000


@pytest.mark.parametrize(
    "events",
    [
        [event("started", method="ffa", clients=["a"], metrics={"accuracy": 0.5}, headline="accuracy")],
        [event("started", method="fedsa", clients=["a"], metrics={}, headline="accuracy")],
        [
            event("started", method="fedsa", clients=["a"], metrics={}, headline="accuracy"),
            event("round_started", round=1, clients=["a"]),
            event("held_out", round=0, metrics={"accuracy": 0.5, "loss": None}, clients={"a": {"accuracy": 0.5}}),
            event("round_done", round=1, metrics={}, bytes_down=1, bytes_up=1),
            event("held_out", round=1, metrics={"accuracy": 0.7}, clients={"a": {"accuracy": 0.7}}),
        ],
    ],
)
def test_runs_that_have_just_begun_or_have_no_global_model(events, tmp_path):
    html, _ = page(find_runs([written(tmp_path / "run", events)]))
    assert "not finished: run" in parsed(html)[1]


def test_the_command(several, tmp_path):
    result = CliRunner().invoke(app, ["report", str(several), "-o", str(tmp_path / "a.html"), "--json"])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["runs"] == 4
    bad = CliRunner().invoke(app, ["report", str(tmp_path / "nothing")])
    assert bad.exit_code == 2
    assert len(bad.stderr.strip().splitlines()) == 1
    assert CliRunner().invoke(app, ["report", str(several), "-o", str(tmp_path)]).exit_code == 2
    for words in (["report"], ["figure", "2"]):
        nowhere = CliRunner().invoke(app, [*words, str(several), "-o", "/proc/a.svg"])
        assert nowhere.exit_code == 2
        assert nowhere.stderr.startswith("error: cannot write /proc/a.svg: ")


def test_doing_it_again_is_promised_where_it_can_be(one, several):
    """Not without a configuration, and not without a word about answers that did not count."""
    assert "has no config.toml" in parsed(page(find_runs([one]))[0])[1]
    runs = find_runs([several])
    refused = [run for run in runs if of_kind(run.events, ClientRejected)]
    for run in runs:
        text = parsed(page([run])[0])[1]
        assert "fedex-lora run run.toml --out again" in text
        assert ("if the same answers are missing" in text) == (run in refused)


@pytest.mark.parametrize(("rows", "eval"), [({"a": 0, "b": 0}, "measured.csv"), ({"a": 3, "b": 4}, "memory:eval")])
def test_rows_that_are_not_in_the_configuration_cannot_be_trained_on_again(rows, eval, tmp_path):
    """Over Flower the server's own file measures only; what was in memory is nowhere."""
    run = written(tmp_path / "run", [event("started", method="fedex", clients=list(rows), metrics={}, train_rows=rows)])
    (run / "config.toml").write_text(f'[task]\nname = "custom"\ntrain = "measured.csv"\neval = "{eval}"\n')
    text = parsed(page(find_runs([run]))[0])[1]
    assert "this file alone does not repeat the run" in text
    assert "to the last bit" not in text
    assert "fedex-lora run" not in text


def test_modules_in_no_stack_have_no_figure_by_layer(tmp_path):
    def flat(one):
        if "modules" in one:
            one["modules"]["module"] = ["encoder", "decoder"]

    run = written(tmp_path / "run", changed(synthetic(rounds=2, clients=3, layers=1), flat))
    with pytest.raises(UsageError, match="these modules are in no stack of layers: draw a figure across rounds, such as 3"):
        write_figure(2, [run], tmp_path / "two.svg")
    assert write_figure(3, [run], tmp_path / "three.svg")["data"]


@pytest.mark.parametrize(("number", "suffix", "starts"), [(2, ".pdf", b"%PDF"), (3, ".svg", b"<?xml")])
def test_figures_are_the_events_numbers(number, suffix, starts, several, tmp_path):
    out = tmp_path / f"figure{suffix}"
    made = write_figure(number, [several], out, "scaled")
    assert out.read_bytes().startswith(starts)
    values = []  # of the first layer's query, in the last round drawn of the first method
    for seed in (0, 1):
        events = [json.loads(line) for line in (several / f"fedex-{seed}" / "events.jsonl").read_text().splitlines()]
        done = [one["modules"] for one in events if one["event"] == "round_done"]
        columns = done[0] if number == 2 else done[-1]
        values.append(columns["scaled"][columns["module"].index("bert.encoder.layer.0.attention.self.query")])
    drawn = [row for row in made["data"] if row["run"] == "fedex"]
    if number == 2:
        row = next(row for row in drawn if row["projection"] == "query" and row["layer"] == 0)
    else:
        row = next(row for row in drawn if row["panel"] == "first" and row["round"] == 6)
    assert (row["mean"], row["low"], row["high"]) == pytest.approx((sum(values) / 2, min(values), max(values)), rel=1e-6)
    assert {"query above value", "falls with the rounds"} <= {one["observation"] for one in made["observations"]}


@pytest.mark.parametrize("number", [2, 3])
def test_figures_of_a_run_whose_first_round_was_skipped(number, tmp_path):
    """On 80 columns each observation is one line; figure 3 names the module that it draws."""

    def other(one):
        if one["event"] == "round_done" and one["round"] == 1:
            del one["modules"]

    run = written(tmp_path / "run", changed(synthetic(rounds=4, clients=2, names=("k_proj",)), other))
    result = CliRunner().invoke(app, ["figure", str(number), str(run), "-o", str(tmp_path / "a.svg")], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.stderr
    assert "\nfedex: falls with the rounds: " in result.stdout
    assert "round 4 / round 2" in result.stdout
    assert ("layer.0.attention.self.k_proj" in (tmp_path / "a.svg").read_text()) == (number == 3)


def test_what_no_figure_is(several, tmp_path):
    for arguments in (["1", several], ["2", several, "-o", "a.gif"], ["2", several, "--value", "x"]):
        result = CliRunner().invoke(app, ["figure", *map(str, arguments)])
        assert result.exit_code == 2
        assert len(result.stderr.strip().splitlines()) == 1


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make browser")
    pytest.importorskip("axe_playwright_python", reason="axe-playwright-python is not installed: make browser")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on this machine: make browser")
    with api.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(one, several, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    for name, runs in (("one", one), ("several", several)):
        write_report([runs], folder / f"{name}.html")
    return folder


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", ["one", "several"])
def test_in_a_browser(name, size, theme, browser, pages):
    """Charts drawn, no message in the console, no request, nothing wider than the screen, axe-core finds nothing."""
    import axe_playwright_python

    width, height = SIZES[size]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=theme)
    tab, said, asked = context.new_page(), [], []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    address = (pages / f"{name}.html").as_uri()
    tab.set_default_timeout(180_000)
    tab.goto(address)
    tab.wait_for_selector("html[data-ready]", timeout=180_000)
    assert said == []
    assert asked == [address]
    places = tab.evaluate("[...document.querySelectorAll('.chart')].map(place => place.querySelectorAll('svg path, svg rect').length)")
    assert len(places) >= 8
    assert min(places) > 2
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    for _ in range(3):  # parts, and what is in them
        tab.evaluate("document.querySelectorAll('details:not([open])').forEach(one => { one.open = true })")
    tab.wait_for_function("[...document.querySelectorAll('.chart')].every(place => place.querySelector('svg'))", timeout=180_000)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    tab.evaluate((Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text())
    found = tab.evaluate("axe.run(document)")
    assert found["passes"]
    assert [(one["id"], one["nodes"][0]["html"][:200]) for one in found["violations"]] == []
    context.close()


def test_tables_sort_colours_change_and_the_theme_turns(browser, pages):
    tab = browser.new_page(color_scheme="light")
    tab.set_default_timeout(180_000)
    tab.goto((pages / "several.html").as_uri())
    tab.wait_for_selector("html[data-ready]", timeout=180_000)
    table = tab.locator("table.sortable").first
    column = [cell.strip() for cell in table.locator("thead th").all_inner_texts()].index("sent down")

    def cells():
        return [float(row.get_attribute("data-v")) for row in table.locator(f"tbody tr td:nth-child({column + 1})").all()]

    button = table.locator("thead th button").nth(column)
    button.click()
    assert cells() == sorted(cells())
    button.click()
    assert cells() == sorted(cells(), reverse=True)
    assert table.locator("th[aria-sort=descending]").count() == 1
    tab.locator("details.part summary").first.click()
    heat = tab.locator("details.part[open] .grid .chart").first
    before = heat.locator("svg").inner_html()
    captions = tab.locator("details.part[open] .choices + .grid caption")
    assert "relative to the ideal update" in captions.nth(0).text_content()
    assert [made.evaluate("made => made.closest('div[hidden]') === null") for made in captions.all()[:3]] == [True, False, False]
    tab.locator("details.part[open] .choices input").nth(2).check()
    assert [made.evaluate("made => made.closest('div[hidden]') === null") for made in captions.all()[:3]] == [False, False, True]
    tab.wait_for_function("old => document.querySelector('details.part[open] .grid .chart svg').innerHTML !== old", arg=before)
    paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    tab.locator("#theme").click()
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") != paper
    tab.emulate_media(media="print")  # from the dark theme, on white paper all the same
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == paper
    tab.close()


def test_on_paper_everything_is_open_and_drawn(browser, pages):
    """And closed again afterwards; nothing is wider than A4."""
    tab = browser.new_page(viewport={"width": 794, "height": 1100})
    tab.set_default_timeout(180_000)
    tab.goto((pages / "several.html").as_uri())
    tab.wait_for_selector("html[data-ready]", timeout=180_000)
    closed = "document.querySelectorAll('details.part:not([open]), details.setup:not([open])').length"
    undrawn = "[...document.querySelectorAll('.chart')].filter(place => place.querySelectorAll('svg path, svg rect').length < 3).length"
    before = tab.evaluate(closed)
    assert before >= 3
    tab.evaluate(
        f"window.addEventListener('beforeprint', () => queueMicrotask(() => {{ window.wasClosed = {closed} }}));"
        f"window.addEventListener('afterprint', () => {{ window.wasUndrawn = {undrawn} }})"
    )
    tab.pdf(format="A4")
    assert tab.evaluate("window.wasClosed") == 0
    assert tab.evaluate("window.wasUndrawn") == 0
    assert tab.evaluate(closed) == before
    tab.emulate_media(media="print")
    table = tab.locator("table.sortable").first
    assert table.evaluate("table => table.scrollWidth <= table.parentElement.clientWidth")
    tab.close()
