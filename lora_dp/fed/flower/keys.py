"""Certificates and keys for a SuperLink and its SuperNodes: ``python -m lora_dp.fed.flower.keys --help``.

For trials and closed networks: an authority of its own signs the server's certificate. Where there is a public-key
infrastructure already, take certificates from there.
"""

import argparse
import datetime
import ipaddress
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import lora_dp.fed.flower.without_telemetry  # noqa: F401  (Flower brings cryptography along)

# isort: split
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_DAYS = 365


def make_keys(folder: Path, hosts: Sequence[str], nodes: int) -> None:
    """Writes ``ca.crt``, ``server.crt`` and ``server.key`` (PEM), and ``node-0``, ``node-0.pub``, … (OpenSSH).

    The authority's own key is kept nowhere: nothing else can ever be signed by it. Private keys are readable by this
    user only.

    Args:
        folder: made where it is missing.
        hosts: names and addresses under which nodes reach the server.
        nodes: number of SuperNodes to make P-384 keys for.

    Raises:
        ValueError: there are keys in the folder already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any((folder / name).exists() for name in ("ca.crt", "server.key", "node-0")):
        raise ValueError(f"{folder} holds keys already: choose another folder.")
    authority, server = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    issuer = _name("lora-dp federation")
    root = (
        _certificate(issuer, issuer, authority)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(authority.public_key()), critical=False)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(authority, hashes.SHA384())
    )
    leaf = (
        _certificate(_name(hosts[0]), issuer, server)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), critical=False)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(authority, hashes.SHA384())
    )
    (folder / "ca.crt").write_bytes(root.public_bytes(Encoding.PEM))
    (folder / "server.crt").write_bytes(leaf.public_bytes(Encoding.PEM))
    _write_secret(folder / "server.key", server.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    for node in range(nodes):
        key = ec.generate_private_key(ec.SECP384R1())
        secret = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
        _write_secret(folder / f"node-{node}", secret)
        public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        (folder / f"node-{node}.pub").write_bytes(public + b"\n")


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _certificate(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # Clocks of nodes may be a little behind.
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=_DAYS))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _write_secret(path: Path, data: bytes) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m lora_dp.fed.flower.keys",
        description="Make a server certificate and keys for the nodes of a Flower federation, valid for a year.",
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--host", action="append", help="name or address of the server; may be repeated [127.0.0.1]")
    parser.add_argument("--nodes", type=int, default=0, help="number of SuperNodes to make keys for [0]")
    options = parser.parse_args(arguments)
    try:
        make_keys(options.folder, options.host or ["127.0.0.1", "localhost"], options.nodes)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    print(f"written to {options.folder}: give nodes ca.crt and their own key, and nobody server.key")
    return 0


if __name__ == "__main__":
    sys.exit(main())
