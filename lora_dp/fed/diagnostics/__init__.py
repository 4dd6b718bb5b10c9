"""Why a run ended as it did: the quantities by which papers explain their methods. See :mod:`.inspect`."""
