"""Every kernel in every configuration compiles for sm_80, sm_90 and sm_100, spills nothing and fits the chip."""

import pytest

from lora_dp.kernels.launching import INTERPRETED

triton = pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("the interpreter compiles nothing: this runs in the ordinary test run", allow_module_level=True)

from lora_dp.kernels import resources  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def measured() -> dict[str, list[resources.Resources]]:
    """Every build of every kernel file, compiled side by side."""
    return dict(zip(resources.modules(), resources.measure_all(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("module", resources.modules())
def test_every_build_fits_every_chip(module, measured):
    rows = measured[module]
    assert {row.capability for row in rows} == set(resources.SHARED_LIMITS)
    assert not [row for row in rows if not row.fits]


def test_every_configuration_is_built():
    """No configuration that a launcher can choose goes uncompiled."""
    import importlib

    for name in resources.modules():
        module = importlib.import_module(name)
        built = [
            {**build.constexprs, "num_warps": build.num_warps, "num_stages": build.num_stages}
            for build in module.builds()
        ]
        for label, config in module.CONFIGS.items():
            assert any(
                all(build.get(key, value) == value for key, value in config.launch.items()) for build in built
            ), f"{name}: {label}"


def test_a_spill_or_too_much_memory_does_not_fit():
    row = resources.Resources("k", "b", 80, 255, 0, 0, 163 * 1024)
    assert row.fits
    for change in ({"stack": 8}, {"local": 8}, {"shared": 163 * 1024 + 1}, {"tensor": 513}):
        assert not resources.Resources(**{**row.__dict__, **change}).fits
