"""Certificates and node keys, made for the occasion: what `flower try` needs, and what a first deployment may start with."""

import datetime
import ipaddress
import os
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedex_lora.errors import UsageError

DAYS = 365


def make_certificates(folder: Path, hosts: list[str]) -> None:
    """Write `ca.crt`, `ca.key`, and `server.pem`, `server.key` signed by it, for these host names and addresses.

    Only `ca.crt` goes to the parties; `ca.key` belongs in a safe.
    """
    names = [_name(host) for host in hosts]
    folder.mkdir(parents=True, exist_ok=True)
    ca_key, key = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedex-lora federation CA")])
    usage = {name: False for name in ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement")}
    usage |= {"encipher_only": False, "decipher_only": False}
    ca = (
        _certificate(issuer, issuer, ca_key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(digital_signature=True, key_cert_sign=True, crl_sign=True, **usage), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedex-lora server")])
    server = (
        _certificate(subject, issuer, key)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    for name, certificate in (("ca.crt", ca), ("server.pem", server)):
        _write_new(folder / name, certificate.public_bytes(serialization.Encoding.PEM), 0o666)
    for name, private in (("ca.key", ca_key), ("server.key", key)):
        _write_key(folder / name, private, serialization.PrivateFormat.PKCS8)


def make_node_key(path: Path) -> None:
    """Write a node's key pair: `path`, which stays with the node, and `path.pub`, which the server registers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP384R1())
    _write_key(path, key, serialization.PrivateFormat.OpenSSH)
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    _write_new(path.with_name(f"{path.name}.pub"), public + b"\n", 0o666)


def mismatches(ssl_certfile: Path, ssl_keyfile: Path, ssl_ca_certfile: Path) -> list[str]:
    """What of a server's files does not go together, a line each; behind its certificate there may be those of a chain."""
    chain, roots = (x509.load_pem_x509_certificates(path.read_bytes()) for path in (ssl_certfile, ssl_ca_certfile))
    key = serialization.load_pem_private_key(ssl_keyfile.read_bytes(), None)
    problems = []
    if key.public_key() != chain[0].public_key():
        problems.append(f"ssl_keyfile: {ssl_keyfile} is not the key of {ssl_certfile}: give the one that it was made with")
    if not any(_is_signed(one, root) for one in chain for root in roots):
        problems.append(f"ssl_ca_certfile: {ssl_ca_certfile} did not sign {ssl_certfile}: give the certificate of the authority that did")
    return problems


def _is_signed(one: x509.Certificate, root: x509.Certificate) -> bool:
    try:
        one.verify_directly_issued_by(root)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> None:
    _write_new(path, key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()), 0o600)


def _write_new(path: Path, content: bytes, mode: int) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)


def _certificate(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=DAYS))
    )


def _name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        try:
            return x509.DNSName(host.encode("idna").decode())
        except UnicodeError:
            raise UsageError(f"{host!r} is no name of a host: give --hosts federation.example.org,192.0.2.1, say") from None
