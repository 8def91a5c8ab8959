"""A signature beside a manifest: Ed25519 (RFC 8032) over its bytes, by a key that the user names.

    manifest.sig    key: ssh-ed25519 AAAA...
                    fingerprint: SHA256:...       as `ssh-keygen -l` shows it
                    signature: ...                64 bytes, base64

Who has the public key checks it with `verify`, or with any other tool. Without one the signature says that the manifest
is as it was signed, and by which key, but not whose that key is.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from recovery.disk import write_flushed

_ALLOWED = "an Ed25519 key without a passphrase, as PEM (PKCS8) or OpenSSH, e.g. of `ssh-keygen -t ed25519 -N ''`"
_ALLOWED_PUBLIC = "an Ed25519 public key, as PEM or as a line of OpenSSH (ssh-ed25519 ...)"
_FIELDS = ("key", "fingerprint", "signature")


class SignatureError(RuntimeError):
    """A key that cannot be used, or a signature that is none of what it lies beside. Names the file, what was found and
    what is allowed."""


def read_key(key: Path) -> Ed25519PrivateKey:
    """The private key in a file: to be read before work is done that is to be signed. Raises SignatureError."""
    data, encrypted = _read(key, _ALLOWED), f"{key} is a key with a passphrase; allowed: {_ALLOWED}"
    try:
        if b"OPENSSH PRIVATE KEY" in data:
            found: Any = serialization.load_ssh_private_key(data, None)
        else:
            found = serialization.load_pem_private_key(data, None)
    except TypeError as error:
        raise SignatureError(encrypted) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        if "password" in str(error).lower() or "bcrypt" in str(error).lower():
            raise SignatureError(encrypted) from error
        what = "a public key" if _is_public(data) else "no private key that can be read"
        raise SignatureError(f"{key} is {what}; allowed: {_ALLOWED}") from error
    if not isinstance(found, Ed25519PrivateKey):
        raise SignatureError(f"{key} is {_kind(found)}; allowed: {_ALLOWED}")
    return found


def sign(path: Path, key: Path) -> Path:
    """Sign the bytes of a file with the private key in another; returns where the signature lies, on the disk before
    this returns: beside it, ending in .sig. Raises SignatureError."""
    private = read_key(key)
    line, data = _line(private.public_key()), _read(path, "a file to sign")
    values = (line, _fingerprint(line), base64.b64encode(private.sign(data)).decode())
    target = path.with_suffix(".sig")
    try:
        write_flushed(target, "".join(f"{name}: {value}\n" for name, value in zip(_FIELDS, values)).encode())
    except OSError as error:
        raise SignatureError(f"{target} cannot be written: {error.strerror}") from error
    return target


def verify(path: Path, signature: Path, public: Path | None = None) -> str:
    """The fingerprint of the key that has signed a file as it is now. With `public`, that must be the key; without one,
    whose it is remains to be asked. Raises SignatureError."""
    values = _parts(signature)
    signer = _public(values["key"].encode(), f"key of {signature}")
    found = _fingerprint(_line(signer))
    if values["fingerprint"] != found:
        raise SignatureError(f"{signature} says fingerprint {values['fingerprint']}; its key has {found}")
    if public is not None:
        wanted = _fingerprint(_line(_public(_read(public, _ALLOWED_PUBLIC), str(public))))
        if wanted != found:
            raise SignatureError(f"{signature} is by the key {found}; {public} is {wanted}")
    try:
        signer.verify(base64.b64decode(values["signature"], validate=True), _read(path, "the file that was signed"))
    except (InvalidSignature, ValueError) as error:
        raise SignatureError(f"{signature} is no signature of {path} as it is now: one of them has changed") from error
    return found


def _parts(signature: Path) -> dict[str, str]:
    lines = _read(signature, "a file that sign has written").decode(errors="replace").splitlines()
    values = dict(line.split(": ", 1) for line in lines if ": " in line)
    if missing := [name for name in _FIELDS if name not in values]:
        raise SignatureError(f"{signature} has no {', '.join(missing)}; allowed: lines of {', '.join(_FIELDS)}")
    return values


def _public(data: bytes, where: str) -> Ed25519PublicKey:
    try:
        if data.lstrip().startswith(b"-----"):
            found: Any = serialization.load_pem_public_key(data)
        else:
            found = serialization.load_ssh_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        what = "a private key" if b"PRIVATE KEY" in data else "no public key that can be read"
        raise SignatureError(f"{where} is {what}; allowed: {_ALLOWED_PUBLIC}") from error
    if not isinstance(found, Ed25519PublicKey):
        raise SignatureError(f"{where} is {_kind(found)}; allowed: {_ALLOWED_PUBLIC}")
    return found


def _line(public: Ed25519PublicKey) -> str:
    return public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def _fingerprint(line: str) -> str:
    digest = hashlib.sha256(base64.b64decode(line.split()[1])).digest()
    return f"SHA256:{base64.b64encode(digest).decode().rstrip('=')}"


def _is_public(data: bytes) -> bool:
    return b"PUBLIC KEY" in data or data.startswith((b"ssh-", b"ecdsa-"))


def _kind(key: object) -> str:
    """What a message calls a key of another type."""
    name = type(key).__name__.removeprefix("_").removesuffix("PrivateKey").removesuffix("PublicKey")
    return f"a key of type {name}"


def _read(path: Path, allowed: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SignatureError(f"{path} cannot be read: {error.strerror}; allowed: {allowed}") from error
