"""The order of the house: a test file for every module, and imports that only lead downwards."""

import ast
import graphlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]

# Tests

# Modules that are tested elsewhere than in the file of their name, and where.
ELSEWHERE: dict[str, tuple[str, ...]] = {
    "lora_dp/errors.py": ("tests/isolation/test_check.py", "tests/fed/rounds/test_failed_rounds.py"),
    "lora_dp/privacy/clip_bounds.py": ("tests/privacy/test_clipping.py",),
    "lora_dp/nn/adapter_start.py": ("tests/nn/test_lora_linear.py", "tests/lora/test_config.py"),
    "lora_dp/engine/step_options.py": ("tests/engine/test_setup_refusals.py", "tests/test_argument_checks.py"),
    "lora_dp/__main__.py": ("tests/test_capabilities.py",),
    "lora_dp/fed/__main__.py": ("tests/fed/test_cli.py",),
    "lora_dp/fed/advise_options.py": ("tests/fed/test_advice.py",),
    "lora_dp/fed/run_options.py": ("tests/fed/test_config.py",),
    # Figures, and how they look, are seen on the pages.
    "lora_dp/fed/page/figures.py": ("tests/fed/page/test_run_page.py", "tests/fed/page/test_comparison_page.py"),
    # Names of choices alone.
    "lora_dp/fed/server_options.py": ("tests/fed/rounds/test_server_optimizer.py",),
    "lora_dp/fed/plot_style.py": ("tests/fed/compare/test_plot.py", "tests/fed/diagnostics/test_plots.py"),
    # One table of tests is for all methods.
    "lora_dp/fed/methods/base.py": ("tests/fed/methods/test_methods.py", "tests/fed/methods/test_own_method.py"),
    "lora_dp/fed/methods/by_product.py": ("tests/fed/methods/test_products.py",),
    "lora_dp/fed/methods/deer.py": ("tests/fed/methods/test_methods.py",),
    "lora_dp/fed/methods/dp_lora.py": ("tests/fed/methods/test_methods.py",),
    "lora_dp/fed/methods/ffa_lora.py": ("tests/fed/methods/test_methods.py",),
    "lora_dp/fed/methods/flat_lora.py": ("tests/fed/methods/test_methods.py",),
    "lora_dp/fed/methods/flexlora.py": ("tests/fed/methods/test_products.py",),
    "lora_dp/fed/methods/flora.py": ("tests/fed/methods/test_products.py",),
    "lora_dp/fed/methods/galore.py": ("tests/fed/methods/test_products.py",),
    "lora_dp/fed/methods/la_lora.py": ("tests/fed/methods/test_methods.py",),
    "lora_dp/fed/methods/lora_fair.py": ("tests/fed/methods/test_products.py",),
    "lora_dp/fed/methods/low_rank.py": ("tests/fed/methods/test_products.py",),
    "lora_dp/fed/methods/rac_lora.py": ("tests/fed/methods/test_products.py",),
    "lora_dp/fed/methods/rolora.py": ("tests/fed/methods/test_methods.py",),
    # A protocol alone, which the engine of one process keeps.
    "lora_dp/fed/rounds/engines.py": ("tests/fed/rounds/test_local_engine.py",),
    "lora_dp/fed/rounds/messages.py": ("tests/fed/methods/test_products.py", "tests/fed/rounds/test_fixed_shapes.py"),
    "lora_dp/fed/rounds/regulators.py": ("tests/fed/rounds/test_units.py",),
    "lora_dp/fed/data/other_company.py": (
        "tests/fed/rounds/test_fixed_shapes.py",
        "tests/fed/data/test_kept_activations.py",
    ),
    # Parts of kernels, which run within them.
    "kernels/__main__.py": ("tests/kernels/test_resources.py",),
    "kernels/adapted_product.py": ("tests/kernels/test_products.py",),
    "kernels/clip_margin.py": ("tests/privacy/test_clipping.py", "tests/kernels/test_norms.py"),
    "kernels/gaussian_filter.py": ("tests/kernels/test_noise_update.py",),
    "kernels/launching.py": ("tests/kernels/test_products.py",),
    "kernels/lora_product.py": ("tests/kernels/test_products.py",),
    "kernels/low_rank_update.py": ("tests/kernels/test_products.py",),
    "kernels/optimizer_rows.py": ("tests/kernels/test_noise_update.py",),
    "kernels/philox.py": ("tests/kernels/test_noise_update.py",),
    "kernels/skinny_product.py": ("tests/kernels/test_products.py",),
    "kernels/tile_table.py": ("tests/kernels/test_clip_sum.py",),
    # Triton kernels run on a GPU, or in Triton's interpreter.
    "lora_dp/ops/clip_and_sum.py": ("tests/kernels/test_clip_sum.py",),
}


def modules() -> Iterator[str]:
    """Paths of the modules, from the repository's root: an installation puts ``kernels`` into ``lora_dp``."""
    for path in sorted((ROOT / "kernels").glob("*.py")):
        if path.name != "__init__.py":
            yield path.relative_to(ROOT).as_posix()
    for path in sorted((ROOT / "lora_dp").rglob("*.py")):
        name = path.relative_to(ROOT)
        if path.name != "__init__.py" and name.parts[1] != "kernels":
            yield name.as_posix()


def file_of_tests(module: str) -> str:
    """Where the tests of a module are: ``lora_dp/room/x.py`` has ``tests/room/test_x.py``."""
    path = Path(module.removeprefix("lora_dp/"))
    return (Path("tests") / path.parent / f"test_{path.name}").as_posix()


def test_every_module_has_a_test_file_of_its_name() -> None:
    alone = {module for module in modules() if not (ROOT / file_of_tests(module)).exists()}
    assert sorted(alone - ELSEWHERE.keys()) == [], "give each tests in the file of its name, or an entry in ELSEWHERE"
    assert sorted(ELSEWHERE.keys() - alone) == [], "these have their file, or are gone: take them out of ELSEWHERE"


def test_what_is_tested_elsewhere_is_tested_in_files_that_there_are() -> None:
    assert [path for paths in ELSEWHERE.values() for path in paths if not (ROOT / path).exists()] == []


# Names

# Always written behind the name of their module: ``checkpoint.read``. Each kernel has its ``builds``.
QUALIFIED = {"builds", "content", "main", "read", "write"}


def test_no_two_public_classes_or_functions_share_a_name() -> None:
    homes: dict[str, list[str]] = {}
    for module in modules():
        for node in ast.parse((ROOT / module).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(module)
    assert len(homes) > 500
    assert {name: places for name, places in homes.items() if len(places) > 1 and name not in QUALIFIED} == {}


# Imports

# From the bottom: a module may import what stands below its own level, and what stands in its own place.
LEVELS: dict[str, list[set[str]]] = {
    "lora_dp": [
        {"lazy_torch"},
        {"errors", "extras", "argument_checks", "atomic_files", "opacus_names"},
        {"hash_chain"},
        {"kernels"},
        {"ops"},
        {"privacy", "capabilities"},
        {"nn"},
        {"lora", "losses", "optim"},
        {"isolation"},
        {"engine"},
        {"auditing", "trainers"},
        {"fed"},
        {"__main__"},
    ],
    "lora_dp.fed": [
        {"option_types", "server_options", "safe_text", "plot_style", "did_you_mean", "hub", "interrupts"},
        {"data"},
        {"models"},
        {"methods"},
        {"run_options"},
        {"config"},
        {"origin"},
        {"rounds"},
        {"runs"},
        {"flower"},
        {"launch"},
        {"compare"},
        {"advise_options"},
        {"page", "diagnostics", "auditing", "advice"},
        {"commands"},
        {"cli"},
        {"__main__"},
    ],
    "lora_dp.isolation": [
        {"deterministic", "seeding"},
        {"model_state", "trial_values"},
        {"batches"},
        {"collation", "full_precision"},
        {"loss_checks"},
        {"trials"},
        {"other_batches"},
        {"check"},
    ],
}
# Packages whose names are imported late.
FACES = {"lora_dp", "lora_dp.fed"}

Arrows = Mapping[str, Iterable[str]]


def wrong_arrows(arrows: Arrows, levels: Mapping[str, list[set[str]]] = LEVELS) -> list[str]:
    """Each import that leads up, or to a neighbour of the same level, in a sentence."""
    found = []
    for importer, imported in sorted((one, other) for one, others in arrows.items() for other in others):
        for house, floors in levels.items():
            one, other = place(importer, house), place(imported, house)
            if one is None or other is None or one == other:
                continue
            heights = {name: height for height, names in enumerate(floors) for name in names}
            lost = [name for name in (one, other) if name not in heights]
            if lost:
                found.append(f"{house}.{lost[0]} stands on no level of {house}")
            elif heights[other] >= heights[one]:
                where = "above it" if heights[other] > heights[one] else "beside it"
                found.append(f"{importer} imports {imported}, which stands {where}")
    return found


def place(module: str, house: str) -> str | None:
    """The room of a house in which a module is; None outside of it, and for the house itself."""
    return module.removeprefix(house + ".").partition(".")[0] if module.startswith(house + ".") else None


def circle(arrows: Arrows) -> str | None:
    """Modules that import each other in a circle, if there are some."""
    try:
        graphlib.TopologicalSorter(arrows).prepare()
    except graphlib.CycleError as error:
        return " ← ".join(error.args[1])
    return None


@pytest.fixture(scope="module")
def arrows() -> Arrows:
    """What each module imports, also inside its functions; not for type checkers alone."""
    graph = grimp.build_graph("lora_dp", exclude_type_checking_imports=True, cache_dir=None)
    # An editable install makes folders beside the package look like parts of it.
    folders = {"lora_dp": ROOT / "lora_dp", "lora_dp.kernels": ROOT / "kernels"}
    ours = {
        ".".join([name, *path.relative_to(folder).with_suffix("").parts]).removesuffix(".__init__")
        for name, folder in folders.items()
        for path in folder.rglob("*.py")
    }
    assert len(ours & graph.modules) > 150
    return {
        one: [
            other
            for other in graph.find_modules_directly_imported_by(one)
            if other in ours and not is_native(graph, one, other)
        ]
        for one in sorted(ours & graph.modules)
    }


def is_native(graph: grimp.ImportGraph, one: str, other: str) -> bool:
    """Whether an import from the package itself is of the native library alone, which is no module of Python's."""
    lines = [detail["line_contents"] for detail in graph.get_import_details(importer=one, imported=other)]
    return other == "lora_dp" and all(line.startswith("from lora_dp import _native") for line in lines)


def test_imports_lead_down(arrows: Arrows) -> None:
    assert wrong_arrows(arrows) == []


def test_nothing_inside_imports_by_the_faces(arrows: Arrows) -> None:
    """Their names are imported when somebody asks for them: such an arrow would not show."""
    found = {(one, face) for one, others in arrows.items() for face in FACES.intersection(others)}
    assert found <= {("lora_dp.fed.cli", "lora_dp")}, "the command line asks for the version alone"


def test_no_modules_import_each_other_in_a_circle(arrows: Arrows) -> None:
    assert circle(arrows) is None


def test_an_arrow_that_leads_up_or_aside_is_named() -> None:
    planted = {
        "lora_dp.privacy.noise": ["lora_dp.ops.native", "lora_dp.engine.hooks", "lora_dp.capabilities"],
        "lora_dp.hash_chain": ["lora_dp.atomic_files"],
        "lora_dp.atomic_files": ["lora_dp.hash_chain"],
        "lora_dp.fed.data.examples": ["lora_dp.fed.config", "lora_dp.fed.data.encoding", "lora_dp.nn.layers"],
        "lora_dp.isolation.seeding": ["lora_dp.isolation.deterministic", "lora_dp.isolation.check"],
        "lora_dp.cellar": ["lora_dp.errors"],
    }
    assert wrong_arrows(planted) == [
        "lora_dp.atomic_files imports lora_dp.hash_chain, which stands above it",
        "lora_dp.cellar stands on no level of lora_dp",
        "lora_dp.fed.data.examples imports lora_dp.fed.config, which stands above it",
        "lora_dp.isolation.seeding imports lora_dp.isolation.check, which stands above it",
        "lora_dp.isolation.seeding imports lora_dp.isolation.deterministic, which stands beside it",
        "lora_dp.privacy.noise imports lora_dp.capabilities, which stands beside it",
        "lora_dp.privacy.noise imports lora_dp.engine.hooks, which stands above it",
    ]


def test_a_circle_is_named() -> None:
    assert circle({"a": ["b"], "b": ["c"], "c": []}) is None
    found = circle({"a": ["b"], "b": ["c"], "c": ["a"], "d": ["a"]})
    assert found is not None and sorted(set(found.split(" ← "))) == ["a", "b", "c"]
