"""The page of a run."""

import pytest

from lora_dp.fed.page import write_page
from tests.fed.page.run_folders import ROUNDS, account, make_run, read


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


@pytest.mark.slow
def test_ten_thousand_clients_make_a_short_page(tmp_path):
    page = write_page(make_run(tmp_path / "run", ledger=account(10_000), clients=10_000))
    found = read(page)
    assert page.stat().st_size < 500_000
    assert found.tags.count("tr") < 150
    assert "The 100 clients with the largest ε" in found.plain and "10000 clients" in found.plain
    # The last of them has the largest ε.
    assert "9999 10699 20 1.25 0.0914 7.9" in found.plain
