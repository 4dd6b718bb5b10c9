"""Folders of runs, and their pages read."""

import json
from html.parser import HTMLParser
from pathlib import Path

from lora_dp.fed.config import RunConfig

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
