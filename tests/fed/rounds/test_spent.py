"""Whatever a folder says of ε counts all rounds that were begun, wherever a run was stopped, resumed and stopped."""

import errno
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lora_dp.fed.config import RunConfig
from lora_dp.fed.launch import resume, run
from lora_dp.fed.page import number_format, write_page
from lora_dp.fed.page import run_page as page
from lora_dp.fed.rounds.federation import Federation
from lora_dp.fed.rounds.ledgers import LOG, AheadLog, LogError
from lora_dp.fed.rounds.setup import plan_of
from lora_dp.hash_chain import ChainedLog, Heads
from lora_dp.privacy.accounting import Ledger, PoissonGaussian
from tests.fed.chained import forge
from tests.fed.page.run_folders import read

TINY = {
    "clients": 3,
    "rounds": 6,
    "local_steps": 1,
    "batch_size": 16,
    "accountant": "rdp",
    "device": "cpu",
    "method": "dp-lora",
    "validation_fraction": 0.05,
}
SAYING = ("summary.json", "ledger.json", "curves.png", "report.html")


class Killed(BaseException):
    """As a power cut: nothing is written any more."""


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, BaseException], None]:
    """A function that lets the round after so many others raise, when it has begun."""
    append = AheadLog.append

    def plant(rounds: int, what: BaseException) -> None:
        left = rounds

        def stopped(log: AheadLog, *args: Any) -> None:
            nonlocal left
            append(log, *args)
            left -= 1
            if left < 0:
                raise what

        monkeypatch.setattr(AheadLog, "append", stopped)

    return plant


def begun(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


def spent(folder: Path) -> list[float]:
    """Each client's ε by the log, counted by hand; one client's where the server adds the noise."""
    head, *rounds = begun(folder)
    terms, found = head["terms"], []
    shared = terms["sizes"] is None and terms["noise_by"] == "server"
    different = sorted(set(terms["sizes"] or [0]))
    for client in range(1 if shared else terms["clients"]):
        event = terms["events"][different.index((terms["sizes"] or [0] * terms["clients"])[client])]
        count = len(rounds) if shared else sum(client in each["clients"] for each in rounds)
        ledger = Ledger()
        ledger.append(PoissonGaussian(*event), count * terms["releases_per_round"])
        found.append(ledger.epsilon(terms["delta"], "rdp"))
    return found


def check_page(folder: Path) -> None:
    content = page.content(folder)
    assert content["worst_epsilon"] == pytest.approx(max(spent(folder)), rel=1e-12)
    assert [each["epsilon"] for each in content["ledger"]["listed"]] == pytest.approx(spent(folder), rel=1e-12)
    summary, account = (folder / name for name in SAYING[:2])
    for path in (summary, account):
        if path.exists():
            assert json.loads(path.read_text())["worst_epsilon"] == pytest.approx(max(spent(folder)), rel=1e-12)


KINDS: dict[str, dict[str, Any]] = {
    "examples": {},
    "two turns": {"method": "deer"},
    "some clients": {"clients_per_round": 2},
    "one client": {"clients": 1},
    "server noise": {"unit": "client", "clients_per_round": 2, "delta": 0.01},
    "client noise": {"unit": "client", "noise_by": "client", "delta": 0.01},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_resumed_and_killed(tmp_path, stopping, kind):
    folder, config = tmp_path / "run", RunConfig.from_flat({**TINY, **KINDS[kind], "output": tmp_path / "run"})
    stopping(2, KeyboardInterrupt())
    assert run(config, quiet()).interrupted
    write_page(folder)
    assert all((folder / name).exists() for name in SAYING)
    check_page(folder)
    early = max(spent(folder))

    stopping(2, Killed())
    with pytest.raises(Killed):
        resume(folder, quiet())
    assert max(spent(folder)) > early
    assert not any((folder / name).exists() for name in SAYING)
    check_page(folder)
    shown = read(write_page(folder)).plain
    assert "This run has not ended (not finished)" in shown and "ε counts every round that was begun" in shown
    if kind != "some clients":  # the round that was cut short has no line of its own
        assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["epsilon"] < max(spent(folder))


@pytest.mark.slow
def test_a_round_that_has_only_begun_is_on_the_page(tmp_path, stopping):
    folder, config = tmp_path / "run", RunConfig.from_flat({**TINY, "rounds": 1, "output": tmp_path / "run"})
    stopping(0, KeyboardInterrupt())
    outcome = run(config, quiet())
    assert (outcome.interrupted, outcome.summary["rounds"]) == (True, 0)
    check_page(folder)
    shown = number_format.epsilon(max(spent(folder)))
    assert float(shown) > 7.9 and f"{shown} at δ = 1e-05, of a budget of 8" in read(write_page(folder)).plain


@pytest.mark.slow
def test_results_stay_until_a_further_round_is_about_to_begin(tmp_path, stopping, monkeypatch):
    """What stops a resumption before that leaves them: they are still true."""
    folder, config = tmp_path / "run", RunConfig.from_flat({**TINY, "output": tmp_path / "run"})
    stopping(1, KeyboardInterrupt())
    run(config, quiet())
    with monkeypatch.context() as patch:
        patch.setattr(AheadLog, "begin", lambda *_, **__: (_ for _ in ()).throw(LogError("of another run")))
        with pytest.raises(LogError):
            resume(folder, quiet())
    assert (folder / "summary.json").exists() and (folder / "ledger.json").exists()

    gone = []
    stopping(100, Killed())
    append = AheadLog.append

    def seen(log: AheadLog, *args: Any) -> None:
        gone.append(not any((folder / name).exists() for name in SAYING))
        append(log, *args)

    monkeypatch.setattr(AheadLog, "append", seen)
    assert resume(folder, quiet()).summary["status"] == "budget spent"
    assert gone == [True] * 4  # of 6 rounds, 2 had begun
    check_page(folder)


@pytest.mark.slow
def test_a_log_that_is_not_whole_has_no_page(tmp_path, stopping):
    folder, config = tmp_path / "run", RunConfig.from_flat({**TINY, "output": tmp_path / "run"})
    stopping(2, Killed())
    with pytest.raises(Killed):
        run(config, quiet())
    entries = [{name: value for name, value in entry.items() if name != "digest"} for entry in begun(folder)]
    text = (folder / LOG).read_text()
    (folder / LOG).write_text("".join(line + "\n" for line in text.splitlines()[:-1]))
    with pytest.raises(LogError, match="is not whole"):
        write_page(folder)
    for damage in ({"sizes": [1, 2]}, {"events": []}, {"events": [[1.0]]}, {"clients": "three", "sizes": None}):
        forge(folder / LOG, [{**entries[0], "terms": {**entries[0]["terms"], **damage}}, *entries[1:]])
        with pytest.raises(LogError, match=r"line 1 is damaged|differ"):
            write_page(folder)
    forge(folder / LOG, [*entries, {"round": 4, "clients": [3]}])
    with pytest.raises(LogError, match="clients that this run does not have"):
        write_page(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("option", "value"), [("delta", "0.001"), ("epsilon", "1.0"), ("local_steps", "2")])
def test_a_page_of_other_terms_is_refused(tmp_path, stopping, option, value):
    folder, config = tmp_path / "run", RunConfig.from_flat({**TINY, "output": tmp_path / "run"})
    stopping(1, Killed())
    with pytest.raises(Killed):
        run(config, quiet())
    lines = (folder / "config.yaml").read_text().splitlines()
    assert sum(line.startswith(f"{option}: ") for line in lines) == 1
    (folder / "config.yaml").write_text(
        "\n".join(f"{option}: {value}" if line.startswith(f"{option}: ") else line for line in lines)
    )
    with pytest.raises(LogError, match="was begun on other terms"):
        write_page(folder)


@pytest.mark.slow
def test_the_account_of_a_log_is_that_of_a_resumed_run(tmp_path, stopping):
    folder, config = tmp_path / "run", RunConfig.from_flat({**TINY, "output": tmp_path / "run"})
    assert AheadLog(folder / LOG).counted(plan_of(config)) is None
    stopping(2, Killed())
    with pytest.raises(Killed):
        run(config, quiet())
    counted = AheadLog(folder / LOG).counted(plan_of(config))
    assert counted is not None
    federation = Federation.from_config(config)
    AheadLog(folder / LOG).replay(federation.account, rounds_done=2, reproducible=False)
    assert counted.report() == federation.account.report()


@pytest.mark.slow
def test_a_reproducible_run_counts_each_round_once(tmp_path, stopping):
    folder = tmp_path / "run"
    stopping(1, Killed())
    with pytest.raises(Killed):
        run(RunConfig.from_flat({**TINY, "reproducible": True, "output": folder}), quiet())
    stopping(0, Killed())
    with pytest.raises(Killed):
        resume(folder, quiet())
    assert [entry["round"] for entry in begun(folder)[1:]] == [1, 2, 2]
    assert [client["steps"] for client in page.content(folder)["ledger"]["listed"]] == [2, 2, 2]


@pytest.mark.slow
def test_a_disk_that_is_still_full_is_told_with_the_remedy(tmp_path, stopping, monkeypatch):
    folder = tmp_path / "run"
    stopping(1, Killed())
    with pytest.raises(Killed):
        run(RunConfig.from_flat({**TINY, "output": folder}), quiet())

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lora_dp.fed.runs.folder.write_atomically", full)
    with pytest.raises(OSError, match=r"The run in .* stopped \(.*No space left.*resume .* goes on"):
        resume(folder, quiet())


def test_a_log_is_read_whole_while_another_process_appends(tmp_path, monkeypatch):
    """A page may be made while its run goes on."""
    path, last = tmp_path / LOG, Heads.last
    writer = ChainedLog(path)
    writer.append({"round": 0})

    def meanwhile(heads: Heads) -> tuple[int, str]:
        monkeypatch.setattr(Heads, "last", last)
        writer.append({"round": 1})
        return last(heads)

    monkeypatch.setattr(Heads, "last", meanwhile)
    assert ChainedLog(path).read() == [{"round": 0}, {"round": 1}]
