"""What was meant by a wrong word is said."""

import pytest

from lora_dp.fed import cli


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("comapre", "there is no command 'comapre': did you mean compare?"),
        ("--epslon 1", "unrecognized arguments: --epslon 1, did you mean --epsilon?"),
        ("--locl-steps 3", "unrecognized arguments: --locl-steps 3, did you mean --local-steps?"),
        ("--locl_steps a_b", "unrecognized arguments: --locl-steps a_b, did you mean --local-steps?"),
        ("compare --mehtods la-lora", "unrecognized arguments: --mehtods la-lora, did you mean --methods?"),
        ("--method la_lora", "Did you mean la-lora?"),
        ("--method flat-lora:rolora2", "Did you mean rolora?"),
    ],
)
def test_what_was_meant_is_said(words, said, capsys):
    try:
        code = cli.main(words.split())
    except SystemExit as end:
        code = end.code
    assert code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("given", ["--config {}", "--config={}"])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("epsilon: 1\nlocal-steps: 3\n", "{} has no option 'local-steps', did you mean local_steps?"),
        ("methd: rolora\n", "{} has no option 'methd', did you mean method?"),
        ("frobnicate: 1\n", "{} has no option 'frobnicate' ("),
    ],
)
def test_a_wrong_name_in_a_file_names_the_file(given, text, said, tmp_path, capsys):
    path = tmp_path / "options.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit) as end:
        cli.main(given.format(path).split())
    assert end.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert said.format(path) in line
