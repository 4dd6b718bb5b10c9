"""The HTML page of a run and of a comparison."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from PIL import Image

from lora_dp.fed.config import RunConfig
from lora_dp.fed.page import number_format, write_page

ROUNDS = [
    {
        "round": 0,
        "phases": "",
        "participants": [0, 1],
        "loss": 0.9,
        "accuracy": 0.503,
        "epsilon": 0.0,
        "bytes_up": 0,
        "bytes_down": 0,
        "seconds": 0.5,
        "failed": [],
    },
    {
        "round": 1,
        "phases": "BA",
        "participants": [0],
        "loss": None,
        "accuracy": None,
        "epsilon": 4.0,
        "bytes_up": 1_250_000,
        "bytes_down": 750_000,
        "seconds": 60.0,
        "failed": [{"client": 1, "reason": "sent <script>alert(1)</script>"}],
    },
    {
        "round": 2,
        "phases": "BA",
        "participants": [0, 1],
        "loss": 0.4,
        "accuracy": 0.817,
        "epsilon": 7.99961,
        "bytes_up": 1_250_000,
        "bytes_down": 750_000,
        "seconds": 60.0,
        "failed": [],
    },
]
VOID = {"meta", "img", "link", "br", "hr", "input"}


class Page(HTMLParser):
    """Checks that tags are balanced, and gathers text and addresses."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.words = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag in ("td", "th", "dd", "small"):
            self.words += " "
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "svg"} & set(self.open):
            self.words += data

    @property
    def plain(self) -> str:
        return " ".join(self.words.split())


def account(clients: int = 2) -> dict:
    rows = [
        {
            "client": i,
            "examples": 700 + i,
            "steps": 20,
            "epsilon": 7.5 + 0.4 * i / clients,
            "ledger": {"format": "", "entries": [{"noise_multiplier": 1.25, "sample_rate": 0.0914, "count": 20}]},
        }
        for i in range(clients)
    ]
    return {"unit": "", "delta": 1e-5, "accountant": "pld", "worst_epsilon": 7.99961, "clients": rows}


def make_run(path: Path, *, ended: bool = True, rounds: list[dict] = ROUNDS, ledger: dict | None = None, **options):
    path.mkdir(parents=True)
    config = RunConfig.from_flat({"clients": 2, "rounds": 2, **options})
    (path / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    (path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rounds))
    if ended:
        (path / "ledger.json").write_text(json.dumps(ledger or account()))
        (path / "summary.json").write_text(
            json.dumps(
                {
                    "status": "finished",
                    "guarantee": None,
                    "release": None,
                    "accuracy_before": 0.503,
                    "accuracy_after": 0.817,
                    "worst_epsilon": 7.99961,
                    "bytes_up": 2_500_000,
                    "bytes_down": 1_500_000,
                    "public": "Public: sizes.",
                    "something_new": 1,
                }
            )
        )
    return path


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def test_a_finished_run(tmp_path):
    folder = make_run(tmp_path / "run")
    page = write_page(folder)
    assert page == folder / "report.html" and not list(folder.glob("*.tmp"))
    found = read(page)
    for words_ in (
        "50.3 → 81.7 %",
        "8 at δ = 1e-05, of a budget of 8",
        "one example of one client, added or removed",
        "Public: sizes.",
        "4 MB",
        "2.5 MB up, 1.5 MB down",
        "2 min 00 s",
        "1 time",
        "2 of 2 rounds",
        "0.0914",
        "1.25",
        "701",
        "la-lora on digits",
        "torch",
        "local_steps: 10",
    ):
        assert words_ in found.plain, words_
    assert found.tags.count("svg") == 4
    assert "has not ended" not in found.plain and 'role="alert"' not in page.read_text()


def test_nothing_is_loaded_from_elsewhere_and_nothing_runs(tmp_path):
    folder = make_run(tmp_path / "run")
    Image.new("RGB", (4, 4), "red").save(folder / "inspect.png")
    page = read(write_page(folder))
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert any(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert not re.search(r"url\((?!#)|@import", (folder / "report.html").read_text())


def test_what_users_write_is_escaped(tmp_path):
    folder = make_run(tmp_path / "run", dataset="<img src=x onerror=alert(1)>&")
    page = read(write_page(folder))
    assert "img" not in page.tags and "script" not in page.tags
    assert "la-lora on <img src=x onerror=alert(1)>&" in page.plain
    assert "sent <script>alert(1)</script>" in page.plain


def test_a_run_that_has_not_ended(tmp_path):
    folder = make_run(tmp_path / "run", ended=False, rounds=ROUNDS[:2])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"round": 2, "pha')  # cut off by a crash
    page = read(write_page(folder))
    assert "This run has not ended (not finished)" in page.plain and "1 of 2 rounds" in page.plain
    assert "50.3 → 50.3 %" in page.plain  # round 1 was not evaluated
    assert "Written when the run ends" in page.plain


def test_a_run_before_its_first_round(tmp_path):
    page = read(write_page(make_run(tmp_path / "run", ended=False, rounds=[])))
    assert "No round has been evaluated yet" in page.plain and "0 of 2 rounds" in page.plain


def test_the_warning_of_research_runs(tmp_path):
    folder = make_run(tmp_path / "run", ended=False, reproducible=True)
    text = write_page(folder).read_text()
    assert 'role="alert"' in text and "do not release" in read(folder / "report.html").plain
    assert "Nothing as it is" in read(folder / "report.html").plain


@pytest.mark.parametrize("options", [{"epsilon": "none"}, {"mechanism": "as-released"}])
def test_runs_without_privacy_show_no_finite_epsilon(tmp_path, options):
    rounds = [{**each, "epsilon": None} for each in ROUNDS]
    ledger = account()
    for client in ledger["clients"]:
        client["epsilon"] = None
    page = read(write_page(make_run(tmp_path / "run", rounds=rounds, ledger=ledger, **options)))
    assert "∞ no privacy" in page.plain and "of a budget of" not in page.plain
    assert "released one clipped sum" not in page.plain and "automatic, to norm" not in page.plain
    assert "Worst client's ε by round" not in (tmp_path / "run" / "report.html").read_text()


def test_a_secret_draw_stays_secret(tmp_path):
    rounds = [{**each, "participants": None, "seconds": None, "failed": []} for each in ROUNDS]
    ledger = account(1)
    ledger["clients"][0] |= {"client": "all", "examples": None}
    folder = make_run(tmp_path / "run", rounds=rounds, ledger=ledger, unit="client", clients=100)
    (folder / "server-only.jsonl").write_text('{"round": 1, "failed": [{"client": 77, "reason": "secret"}]}\n')
    page = read(write_page(folder))
    assert "who failed would tell who was drawn" in page.plain and 'secret"' not in page.plain
    assert "77" not in page.plain.partition("Configuration")[0] and "Time in rounds" not in page.plain


def test_ten_thousand_clients_make_a_short_page(tmp_path):
    page = write_page(make_run(tmp_path / "run", ledger=account(10_000), clients=10_000))
    found = read(page)
    assert page.stat().st_size < 500_000
    assert found.tags.count("tr") < 150
    assert "The 100 clients with the largest ε" in found.plain and "10000 clients" in found.plain
    # The last of them has the largest ε.
    assert "9999 10699 20 1.25 0.0914 7.9" in found.plain


def test_folders_without_a_run_are_refused(tmp_path):
    with pytest.raises(ValueError, match="neither a run nor a comparison"):
        write_page(tmp_path)
    folder = make_run(tmp_path / "run")
    (folder / "summary.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        write_page(folder)


def make_comparison(path: Path) -> Path:
    path.mkdir()
    (path / "compare.yaml").write_text(
        yaml.safe_dump(
            {"methods": ["la-lora", "dp-lora"], "epsilons": [1.0, "none"], "seeds": [0, 1], "clients": 2, "rounds": 2}
        )
    )
    for method, accuracies in {"la-lora": (0.8, 0.9), "dp-lora": (0.7, 0.7)}.items():
        for seed, accuracy in enumerate(accuracies):
            cell = make_run(path / "cells" / method / "eps1" / f"seed{seed}", method=method, epsilon=1.0, seed=seed)
            summary = json.loads((cell / "summary.json").read_text())
            (cell / "summary.json").write_text(json.dumps({**summary, "accuracy_after": accuracy}))
    (path / "failures.json").write_text(
        json.dumps([{"folder": "cells/dp-lora/epsnone/seed1", "reason": "a < b & no memory"}])
    )
    return path


def test_a_comparison(tmp_path):
    folder = make_comparison(tmp_path / "grid")
    text = write_page(folder).read_text(encoding="utf-8")
    page = Page(text)
    assert '<td class="n best">85.0 ± 7.1</td>' in text and '<td class="n">70.0 ± 0.0</td>' in text
    assert "4 of 8 runs finished" in page.plain and "4 of 8 runs are missing" in page.plain
    assert "dp-lora, no privacy, seed 1 a < b & no memory" in page.plain
    assert "Mean ± sample standard deviation over n = 2 seeds (0, 1)" in page.plain
    assert page.tags.count("svg") == 1
    heads = re.findall(r"<th class=\"n\">([^<]*)</th>", text.split("Accuracy by method and budget")[1])[:2]
    assert heads == ["ε = 1", "no privacy"]
    assert "sent up" in page.plain and "2.5 MB" in page.plain and "1.5 MB" in page.plain
    links = [address for address in page.addresses if not address.startswith("#")]
    assert len(links) == 4 and all((folder / link).is_dir() for link in links)
    write_page(folder / "cells/la-lora/eps1/seed0")
    assert "cells/la-lora/eps1/seed0/report.html" in read(write_page(folder)).addresses


def test_accuracy_by_round_where_rounds_between_were_evaluated(tmp_path):
    folder = make_comparison(tmp_path / "grid")
    for metrics in folder.glob("cells/*/*/*/metrics.jsonl"):
        rounds = [{**each, "accuracy": 0.5 + 0.1 * each["round"], "loss": 0.1} for each in ROUNDS]
        metrics.write_text("".join(json.dumps(each) + "\n" for each in rounds))
    text = write_page(folder).read_text(encoding="utf-8")
    assert Page(text).tags.count("svg") == 2 and 'aria-label="Accuracy by round, ε = 1"' in text


def test_epsilon_is_rounded_up():
    assert [number_format.epsilon(value) for value in (None, 0.0, 7.99961, 7.99949, 0.99941, 1.0, 12.341, 8.0)] == [
        "∞",
        "0",
        "8",
        "8",
        "0.9995",
        "1",
        "12.35",
        "8",
    ]


def test_sizes_and_times():
    assert [number_format.size(count) for count in (None, 12, 1_250, 5_175_200)] == ["–", "12 B", "1.25 kB", "5.18 MB"]
    assert [number_format.duration(value) for value in (None, 12.53, 59.7, 187, 7500)] == [
        "–",
        "12.5 s",
        "1 min 00 s",
        "3 min 07 s",
        "2 h 05 min",
    ]
