"""What holds for every page: nothing is loaded or run, and a folder without a run has none."""

import re

import pytest
from PIL import Image

from lora_dp.fed.page import write_page
from tests.fed.page.run_folders import make_run, read


def test_nothing_is_loaded_from_elsewhere_and_nothing_runs(tmp_path):
    folder = make_run(tmp_path / "run")
    Image.new("RGB", (4, 4), "red").save(folder / "inspect.png")
    page = read(write_page(folder))
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert any(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert not re.search(r"url\((?!#)|@import", (folder / "report.html").read_text())


def test_folders_without_a_run_are_refused(tmp_path):
    with pytest.raises(ValueError, match="neither a run nor a comparison"):
        write_page(tmp_path)
    folder = make_run(tmp_path / "run")
    (folder / "summary.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        write_page(folder)
