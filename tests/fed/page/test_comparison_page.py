"""The page of a comparison."""

import json
import re
from pathlib import Path

import pytest
import yaml

from lora_dp.fed.page import write_page
from tests.fed.page.run_folders import ROUNDS, Page, make_run, read


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


@pytest.mark.slow
def test_a_comparison(tmp_path):
    folder = make_comparison(tmp_path / "grid")
    text = write_page(folder).read_text(encoding="utf-8")
    page = Page(text)
    assert '<td class="n best">85.0 ± 63.5</td>' in text and '<td class="n">70.0 ± 0.0†</td>' in text
    assert "4 of 8 runs finished" in page.plain and "4 of 8 runs are missing" in page.plain
    assert "dp-lora, no privacy, seed 1 a < b & no memory" in page.plain
    assert "Mean ± half of the 95 % confidence interval (Student's t) over n = 2 seeds (0, 1)" in page.plain
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
