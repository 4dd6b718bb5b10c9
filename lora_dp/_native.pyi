cuda: bool

def new_key() -> int: ...
def key_from(bytes: bytes) -> int: ...
def drop_key(key: int) -> None: ...
def keys_are_locked() -> bool: ...
def instructions() -> str: ...
def keystream(key: bytes, nonce: bytes, counter: int, out: int, n_bytes: int, instructions: str = "") -> None: ...
def sampling_bits(key: int, draw: int, out: int, n_bytes: int) -> None: ...
def mask_bits(key: int, parameter: int, draw: int, out: int, n_bytes: int) -> None: ...
def rounded_gaussians(
    key: int, parameter: int, draw: int, scale: float, out: int, n: int, instructions: str = ""
) -> None: ...
def gaussian_pair(
    u_high: int, u_low: int, v_high: int, v_low: int, scale: float
) -> tuple[tuple[int, int] | None, tuple[int, int]]: ...
def private_update(
    key: int,
    draw: int,
    rows: int,
    hyper: int,
    count: int,
    optimizer: int,
    noisy: bool,
    scale: float,
    step: float,
    expected_batch_size: float,
    weights: int,
    n_weights: int,
    threads: int,
    instructions: str = "",
) -> None: ...

# Where `cuda` is true.
def keystream_cuda(key: bytes, nonce: bytes, counter: int, out: int, n_bytes: int, stream: int) -> None: ...
def sampling_bits_cuda(key: int, draw: int, out: int, n_bytes: int, stream: int) -> None: ...
def rounded_gaussians_cuda(
    key: int, parameter: int, draw: int, scale: float, out: int, n: int, stream: int
) -> None: ...
def private_update_cuda(
    key: int,
    draw: int,
    rows: int,
    device_rows: int,
    device_hyper: int,
    count: int,
    optimizer: int,
    noisy: bool,
    scale: float,
    step: float,
    expected_batch_size: float,
    weights: int,
    device_weights: int,
    n_weights: int,
    stream: int,
) -> None: ...
