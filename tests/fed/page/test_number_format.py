"""Numbers as a page shows them."""

from lora_dp.fed.page import number_format


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
