"""Keys and certificates of a deployment."""

import stat

import pytest

pytest.importorskip("flwr")

from lora_dp.fed.flower.keys import main, make_keys


def test_keys_and_certificates_are_what_flower_wants(tmp_path):
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
    from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

    make_keys(tmp_path / "keys", ["127.0.0.1", "fed.example.org"], 2)
    root, leaf = (
        x509.load_pem_x509_certificate((tmp_path / "keys" / name).read_bytes()) for name in ("ca.crt", "server.crt")
    )
    policy = PolicyBuilder().store(Store([root])).time(datetime.datetime.now(datetime.UTC))
    for subject in (x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("fed.example.org")):
        assert policy.build_server_verifier(subject).verify(leaf, [])
    with pytest.raises(VerificationError):
        policy.build_server_verifier(x509.DNSName("other.example.org")).verify(leaf, [])
    for name in ("server.key", "node-0", "node-1"):
        assert stat.S_IMODE((tmp_path / "keys" / name).stat().st_mode) == 0o600
    key = load_ssh_private_key((tmp_path / "keys" / "node-1").read_bytes(), None)
    public = load_ssh_public_key((tmp_path / "keys" / "node-1.pub").read_bytes())
    assert isinstance(key, ec.EllipticCurvePrivateKey) and key.public_key() == public


def test_keys_are_never_overwritten(tmp_path, capsys):
    assert main([str(tmp_path), "--nodes", "1"]) == 0
    before = (tmp_path / "server.key").read_bytes()
    assert main([str(tmp_path)]) == 2
    assert "holds keys already" in capsys.readouterr().err
    assert (tmp_path / "server.key").read_bytes() == before
