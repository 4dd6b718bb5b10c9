"""Seeds of a reproducible run: one for each place in it, and streams that never coincide."""

from lora_dp.fed.rounds.seeds import Stream, derived_seed


def test_a_seed_has_63_bits_of_which_every_one_varies():
    seeds = [derived_seed(0, place) for place in range(2000)]
    assert len(set(seeds)) == 2000 and all(0 <= seed < 2**63 for seed in seeds)
    for bit in range(63):
        assert abs(sum(seed >> bit & 1 for seed in seeds) - 1000) < 5 * 500**0.5


def test_no_two_streams_of_a_seed_coincide():
    """One stream's numbers would else tell of another's: a public perturbation, say, of the noise."""
    assert len(Stream) == len(Stream.__members__) == 9


def test_a_seed_means_the_same_in_every_version():
    """Runs that were begun by an earlier version go on with the same bits."""
    assert [(stream.name, int(stream)) for stream in Stream] == [
        ("CLIENT_DRAWS", 1),
        ("TRAINING", 2),
        ("NOISE", 3),
        ("PERTURBATION", 4),
        ("RANKS", 5),
        ("BEGIN", 6),
        ("SERVER_NOISE", 7),
        ("SUMS", 8),
        ("SUMS_NOISE", 9),
    ]
    assert derived_seed(0, Stream.NOISE, 3, 1, 4) == derived_seed(0, 3, 3, 1, 4) == 4219495833034697420
