"""The options of commands, as a user gives them."""

import re

import pytest

from lora_dp.fed import cli
from lora_dp.fed.config import RunConfig
from lora_dp.fed.runs.loop import Outcome


@pytest.fixture
def ran(monkeypatch):
    """Configurations that were to be run."""
    seen: list[RunConfig] = []

    def record(config, console, began):
        seen.append(config)
        return Outcome(None, {"status": "finished"}, [])

    monkeypatch.setattr("lora_dp.fed.launch.run", record)
    return seen


def test_without_arguments_the_embedded_default_runs(ran):
    assert cli.main([]) == 0
    assert ran == [RunConfig()]
    chosen = ran[0]
    assert (chosen.federation.method, chosen.federation.clients, chosen.federation.rounds) == ("la-lora", 5, 20)
    assert (chosen.privacy.epsilon, chosen.privacy.delta, chosen.federation.local_steps) == (8.0, 1e-5, 10)
    assert (chosen.model.name, chosen.data.dataset) == ("default", "digits")


@pytest.mark.parametrize("words", [["--epsilon", "3"], ["run", "--epsilon=3"]])
def test_run_may_be_left_out(ran, words):
    assert cli.main(words) == 0
    assert ran[0].privacy.target == 3


def test_short_names_reach_every_group(ran, tmp_path, monkeypatch):
    for folder in ("somewhere", "here"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    line = (
        "--method rolora --clients 7 --epsilon none --lr 0.3 --model vit_tiny_patch16_224 --dataset ../somewhere "
        "--r 2 --seed 4 --reproducible --local-steps 3 --target_modules [qkv,proj] --low-pass gaussian "
        "--low_pass_strength 2 --pretrained false --output out"
    )
    assert cli.main(line.split()) == 0
    config = ran[0]
    assert (config.federation.method, config.federation.clients, config.federation.local_steps) == ("rolora", 7, 3)
    assert (config.privacy.target, config.optimization.lr, config.optimization.low_pass) == (None, 0.3, "gaussian")
    assert (config.model.name, config.model.r, config.model.pretrained) == ("vit_tiny_patch16_224", 2, False)
    assert (config.model.target_modules, config.data.dataset) == (["qkv", "proj"], "../somewhere")
    assert (config.run.seed, config.run.reproducible, str(config.run.output)) == (4, True, "out")


def test_a_file_gives_options_and_the_command_line_overrides_them(ran, tmp_path):
    (tmp_path / "options.yaml").write_text("method: ffa-lora\nepsilon: 1\nmodel: some/model\nreproducible: true\n")
    assert cli.main(["--config", str(tmp_path / "options.yaml"), "--epsilon", "2"]) == 0
    config = ran[0]
    assert (config.federation.method, config.privacy.target, config.model.name) == ("ffa-lora", 2, "some/model")
    assert config.run.reproducible


def test_the_configuration_of_a_run_is_such_a_file(ran, tmp_path):
    cli.main(["--method", "dp-lora", "--epsilon", "none", "--seed", "3", "--model", "x", "--clients_per_round", "2"])
    (tmp_path / "config.yaml").write_text(ran[0].to_yaml())
    assert cli.main(["--config", str(tmp_path / "config.yaml")]) == 0
    assert ran[1] == ran[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("frobnicate", "there is no command 'frobnicate': choose run, "),
        ("--nonsense 1", "unrecognized arguments: --nonsense"),
        ("--rounds many", "--rounds: expected int. Got value: many"),
        ("--rounds 0", "rounds must be at least 1, not 0"),
        ("--partition zipf", "--partition: expected one of 'iid', 'dirichlet'"),
        ("--low_pass box", "--low-pass: expected one of 'none', 'gaussian', 'laplacian'. Got value: box"),
        ("--low_pass laplacian", "low_pass laplacian needs low_pass_strength"),
        ("--method dp-lora --low_pass_strength 1", "low_pass_strength needs low_pass"),
        ("--low_pass none --low_pass_strength 1", "has no effect with low_pass none"),
        ("--method fedavg", "There is no method 'fedavg': choose la-lora, dp-lora, ffa-lora, rolora"),
        ("--epsilon 0", "epsilon must be positive (or none), not 0.0"),
        (
            "--class_texts [no,yes]",
            "--class-texts: expected text, in quotes where YAML has another meaning for it (yes, no, on, off) or",
        ),
        ("--epsilon lots", "--epsilon: expected float or 'none', 'inf'. Got value: lots"),
        ("--delta 1", "delta must lie between 0 and 1, not 1.0: try 1e-5"),
        ("--lr -1", "lr must be positive, not -1.0"),
        ("--max_grad_norm 0", "max_grad_norm must be positive and finite, not 0.0"),
        ("--max_grad_norm 1e-21", "max_grad_norm must lie within 1e-20 and 1e20, not 1e-21"),
        ("--unit client --max_update_norm 1e21", "max_update_norm must lie within 1e-20 and 1e20, not 1e+21"),
        ("--clients 3 --clients_per_round 4", "clients_per_round must be from 1 to the number of clients (3), not 4"),
        ("--split_seed -1", "split_seed is -1: it must not be negative"),
        ("--input_column foo", "input_column has no meaning for the built-in digits"),
        ("--output /proc/foo", "cannot make the folder /proc/foo"),
        ("--clients 1000", "too few for 1000 clients"),
        ("--config missing.yaml", "--config: File does not exist"),
        ("--dataset ./missing", "no folder ./missing"),
        ("--device abacus", "There is no device 'abacus' here"),
        ("--target_modules [nothing]", "nothing"),
        ("--method_options.rho 1", "The method la-lora has no option 'rho'"),
        ("--method flat-lora:nothing", "There is no method 'nothing'"),
        ("--ranks [2,2,2,2,4]", "take flora, flexlora or fedask"),
        ("--method flora --r 8 --ranks 2,2,4,4,4", "r = 8 and ranks were both given: leave r out"),
        ("--noise_by client", "noise_by has no effect with unit example: leave it out"),
        ("--mechanism as-released --max_grad_norm 3", "max_grad_norm has no effect with mechanism as-released"),
        ("--max_update_norm 5", "max_update_norm has no effect with unit example"),
        ("--unit client --max_grad_norm 3", "max_grad_norm has no effect with unit client"),
        ("--unit client --clipping flat", "clipping has no effect with unit client"),
        ("--unit client --clipping adaptive", "clipping has no effect with unit client"),
        ("--views 0", "views must be at least 1, not 0"),
        ("--mirror true", "mirror has no effect without views"),
        ("--views 2 --mechanism as-released", "mechanism as-released takes each image as it is: leave views out"),
        ("--method quiet-lora --mechanism as-released", "mechanism as-released is there for la-lora and deer"),
        ("--views 2 --adapt_last 1", "views are of images that all of the model is trained on"),
        ("--clip_quantile 0.7", "clip_quantile has no effect with clipping automatic: choose adaptive"),
        ("--clipping adaptive --clip_quantile 1", "clip_quantile must lie between 0 and 1, not 1.0: try 0.5"),
        ("--clipping adaptive --server_optimizer adam", "server_optimizer adam must know the noise in a mean"),
        ("--unit client --min_clients 2", "min_clients has no meaning with noise by the server"),
        ("--min_clients 9", "min_clients must not be above the number of clients (5), but it is 9"),
        ("--delta 0.9", "delta 0.9 promises nothing to one of "),
        ("resume missing", "missing holds no run"),
        ("pretrain --epochs few", "--epochs: expected int. Got value: few"),
    ],
)
def test_a_wrong_option_is_one_clear_sentence(words, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = cli.main(words.split())
    except SystemExit as end:
        code = end.code
    output = capsys.readouterr()
    assert code == 2
    assert expected in output.err
    assert output.err.startswith("error: ") and len(output.err.strip().splitlines()) == 1
    # What is wrong with data or model shows once they are opened, which is said.
    assert re.fullmatch(r"(opening .* …\n)?", output.out) and not list(tmp_path.iterdir())


IN_A_FILE = [
    ("rounds: many", "", "{0}: rounds: expected int. Got value: many"),
    ("partition: zipf", "--rounds 3", "{0}: partition: expected one of 'iid', 'dirichlet'. Got value: zipf"),
    ("- 1", "", "{0}: Unexpected config"),
    ("rounds: 0", "", "rounds must be at least 1, not 0. ({0} gives rounds)"),
    ("min_clients: 9", "", "the number of clients (5), but it is 9. ({0} gives min_clients)"),
    ("rounds: 3", "--rounds 0", "rounds must be at least 1, not 0.\n"),
    ("rounds: 3", "--clients 0", "clients must be at least 1, not 0.\n"),
]
IN_THE_FILE_OF_A_RUN = [
    ("epsilon: lots", "", "{0}: epsilon: expected float or 'none', 'inf'. Got value: lots"),
    ("method: fedavg", "", "({0} gives method)"),
    ("method_options: {rho: 1}", "", "({0} gives method_options)"),
    ("dataset: ./missing\nclients: 3", "", "({0} gives dataset)"),
    ("input_column: foo\nclients: 3", "", "({0} gives input_column)"),
]


@pytest.mark.parametrize(
    ("command", "text", "more", "said"),
    [("", *case) for case in IN_A_FILE + IN_THE_FILE_OF_A_RUN] + [("compare ", *case) for case in IN_A_FILE],
)
def test_a_wrong_value_in_a_file_names_the_file(command, text, more, said, tmp_path, capsys):
    path = tmp_path / "options.yaml"
    path.write_text(text)
    try:
        code = cli.main(f"{command}--config {path} {more}".split())
    except SystemExit as end:
        code = end.code
    error = capsys.readouterr().err
    assert code == 2 and len(error.splitlines()) == 1
    assert said.format(path) in error


def test_of_several_files_the_one_that_counts_is_named(tmp_path, capsys):
    for name, rounds in (("first", 3), ("second", 0)):
        (tmp_path / f"{name}.yaml").write_text(f"rounds: {rounds}\n")
    words = [f"--config={tmp_path / 'first.yaml'}", f"--config={tmp_path / 'second.yaml'}"]
    assert cli.main(words) == 2
    assert capsys.readouterr().err.endswith(f" ({tmp_path / 'second.yaml'} gives rounds)\n")


def test_methods_options_ranks_and_units(ran):
    words = (
        "--method lora-fair --method_options.objective cosine --unit client --noise_by client "
        "--max-update-norm 0.5 --min_clients 2 --client_timeout 60"
    )
    assert cli.main(words.split()) == 0
    assert cli.main(["--method", "flora", "--ranks", "{4:0.5,8:0.5}", "--clients", "4"]) == 0
    assert cli.main(["--method", "flexlora", "--ranks", "2,4,8,16,2"]) == 0
    assert ran[0].method.objective == "cosine"
    assert (ran[0].privacy.unit, ran[0].privacy.noise_by, ran[0].federation.weighting) == ("client", "client", "equal")
    assert ran[1].federation.client_ranks(4, 0).count(8) == 2 and ran[1].model.r == 8
    assert ran[2].federation.client_ranks(4, 0) == [2, 4, 8, 16, 2] and ran[2].model.r == 16
    for blocks in ("-3,-1", "[-3,-1]"):
        assert cli.main(["--features", "mean", "--feature-blocks", blocks]) == 0
        assert ran[-1].model.feature_blocks == [-3, -1]


@pytest.mark.parametrize(
    "words",
    [
        "--methods la-lora,flat-lora:deer --epsilons 1,none --seeds 3 --search.lr 0.3,10 --search.max-grad-norm=0.1,1",
        "--methods=[la-lora,flat-lora:deer] --epsilons=[1,none] --seeds=3 --search={lr:[0.3,10],max_grad_norm:[0.1,1]}",
    ],
)
def test_compare_takes_lists_and_common_options(monkeypatch, words, tmp_path):
    import lora_dp.fed.compare.comparison

    seen = []

    def fake(grid, common, console):
        seen.append((grid, common))
        return tmp_path

    monkeypatch.setattr(lora_dp.fed.compare.comparison, "compare", fake)
    assert cli.main(["compare", *words.split(), "--local-steps", "3", "--processes", "2"]) == 0
    [(grid, common)] = seen
    assert (grid.methods, grid.epsilons, grid.seeds) == (["la-lora", "flat-lora:deer"], [1.0, "none"], [3])
    assert grid.search == {"lr": [0.3, 10.0], "max_grad_norm": [0.1, 1.0]} and grid.tuning_seeds == [100, 101]
    assert grid.processes == 2 and common["local_steps"] == 3
    assert not {"method", "epsilon", "seed", "output"} & set(common)
    RunConfig.from_flat(common)
