"""Keys and certificates of a federation: a certificate authority, the server's certificate, a key pair for each client.

They are for trials and for organisations without a certificate authority. Certificates of an existing authority can be used
instead.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from dermis.errors import StorageError, TrainingError
from dermis.files import atomic_write, write_file

CA, CERTIFICATE, KEY = "ca.pem", "server.pem", "server.key"
_DAYS = 825


def write_certificates(out: Path, hosts: Sequence[str], days: int = _DAYS) -> None:
    """Write ca.pem (for clients), server.pem and server.key (for the server only).

    The private key of the authority is not kept, so that no other certificate can be issued in its name.

    Args:
        out: The folder.
        hosts: Names and addresses by which clients reach the server.
        days: Validity.

    Raises:
        TrainingError: The folder has one of these files already.
        StorageError: A file cannot be written.
    """
    for name in (CA, CERTIFICATE, KEY):
        if (out / name).exists():
            raise TrainingError(f"{out / name}: exists already; choose another folder, or remove it")
    if not hosts:
        raise TrainingError("--host: give the name or address by which clients reach the server")
    authority_key, server_key = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    authority = _name("dermis federation")
    now = datetime.datetime.now(datetime.UTC)
    until = now + datetime.timedelta(days=days)

    def builder(subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(authority)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(until)
        )

    signs = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    ca = (
        builder(authority, authority_key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(signs, critical=True)
        .sign(authority_key, hashes.SHA384())
    )
    server = (
        builder(_name(hosts[0]), server_key)
        .add_extension(x509.SubjectAlternativeName([_alternative(host) for host in hosts]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(authority_key, hashes.SHA384())
    )
    write_file(out / CA, ca.public_bytes(serialization.Encoding.PEM))
    write_file(out / CERTIFICATE, server.public_bytes(serialization.Encoding.PEM))
    private = server_key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    _write_secret(out / KEY, private)


def write_client_key(out: Path) -> Path:
    """Write a private key (P-384, OpenSSH format) to `out` and the public key to out.pub.

    Returns:
        The file of the public key.

    Raises:
        TrainingError: One of the files exists.
        StorageError: A file cannot be written.
    """
    public = out.with_name(f"{out.name}.pub")
    for path in (out, public):
        if path.exists():
            raise TrainingError(f"{path}: exists already; choose another name, or remove it")
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    _write_secret(out, private)
    text = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    write_file(public, text + b"\n")
    return public


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common[:64])])


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write_secret(path: Path, content: bytes) -> None:
    """Write a file completely or not at all. Only its owner can read it, from its creation on."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, concurrent=True) as partial:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            with os.fdopen(os.open(partial, flags, 0o600), "wb") as file:
                file.write(content)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror}") from None
