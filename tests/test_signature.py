"""A signature says that a manifest is as it was signed, and by which key; a key that cannot sign is named."""

from __future__ import annotations

import base64
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from jobs.unlearn.signature import SignatureError, read_key, sign, verify

PEM, OPENSSH = serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH
PKCS8 = serialization.PrivateFormat.PKCS8
NOTHING = serialization.NoEncryption()


def write_key(path: Path, form: serialization.PrivateFormat = PKCS8, key: Any = None, how: Any = NOTHING) -> Path:
    key = key or Ed25519PrivateKey.generate()
    path.write_bytes(key.private_bytes(PEM, form, how))
    return path


def write_public(path: Path, key: Any, line: bool) -> Path:
    form = serialization.PublicFormat.OpenSSH if line else serialization.PublicFormat.SubjectPublicKeyInfo
    encoding = serialization.Encoding.OpenSSH if line else PEM
    path.write_bytes(key.public_key().public_bytes(encoding, form))
    return path


def manifest(folder: Path) -> Path:
    path = folder / "manifest.json"
    path.write_text('{"generation":1}')
    return path


@pytest.mark.parametrize("line", [False, True])
@pytest.mark.parametrize("form", [PKCS8, OPENSSH])
def test_what_is_signed_is_verified(tmp_path: Path, form: serialization.PrivateFormat, line: bool) -> None:
    path, key = manifest(tmp_path), write_key(tmp_path / "key", form)
    signature = sign(path, key)
    assert signature == tmp_path / "manifest.sig"
    public = write_public(tmp_path / "public", read_key(key), line)
    fingerprint = verify(path, signature)
    assert fingerprint == verify(path, signature, public)
    assert f"fingerprint: {fingerprint}\n" in signature.read_text()
    before = signature.read_bytes()
    assert sign(path, key).read_bytes() == before


def test_every_change_is_seen(tmp_path: Path) -> None:
    path = manifest(tmp_path)
    signature = sign(path, write_key(tmp_path / "key"))
    data = path.read_bytes()
    for changed in (data[:-1], data + b"\n", data.replace(b"1", b"2"), b""):
        path.write_bytes(changed)
        with pytest.raises(SignatureError, match=r"manifest\.sig is no signature of .*manifest\.json as it is now"):
            verify(path, signature)
    path.write_bytes(data)
    text = signature.read_text()
    for old, new, message in (
        ("signature: ", "signature: AAAA", "is no signature of"),
        ("signature: ", "signature: !", "is no signature of"),
        ("SHA256:", "SHA256:x", "says fingerprint SHA256:x"),
        ("key: ssh-ed25519 ", "key: ssh-ed25519 A", "no public key that can be read"),
        ("signature: ", "", "has no signature; allowed: lines of key, fingerprint, signature"),
    ):
        signature.write_text(text.replace(old, new))
        with pytest.raises(SignatureError, match=message):
            verify(path, signature)


def test_another_key_is_not_the_one_that_was_asked_for(tmp_path: Path) -> None:
    path, other = manifest(tmp_path), Ed25519PrivateKey.generate()
    signature = sign(path, write_key(tmp_path / "key"))
    with pytest.raises(SignatureError, match=r"manifest\.sig is by the key SHA256:.*; .*other is SHA256:"):
        verify(path, signature, write_public(tmp_path / "other", other, True))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (rsa.generate_private_key(65537, 1024), "key is a key of type RSA; allowed: an Ed25519 key without a passp"),
        (ec.generate_private_key(ec.SECP256R1()), "key is a key of type EC; allowed: an Ed25519 key"),
    ],
)
def test_a_key_of_another_type_is_named(tmp_path: Path, key: Any, message: str) -> None:
    for form in (PKCS8, OPENSSH):
        with pytest.raises(SignatureError, match=message):
            sign(manifest(tmp_path), write_key(tmp_path / "key", form, key))
    signature = sign(manifest(tmp_path), write_key(tmp_path / "good"))
    with pytest.raises(SignatureError, match=r"is a key of type .*; allowed: an Ed25519 public key"):
        verify(tmp_path / "manifest.json", signature, write_public(tmp_path / "public", key, False))


def test_a_key_that_is_none_is_named(tmp_path: Path) -> None:
    path, key = manifest(tmp_path), Ed25519PrivateKey.generate()
    with pytest.raises(
        SignatureError, match=r"gone cannot be read: No such file or directory; allowed: an Ed25519 key"
    ):
        sign(path, tmp_path / "gone")
    (tmp_path / "junk").write_text("junk")
    with pytest.raises(SignatureError, match="junk is no private key that can be read"):
        sign(path, tmp_path / "junk")
    for line in (False, True):
        with pytest.raises(SignatureError, match="public is a public key; allowed: an Ed25519 key"):
            sign(path, write_public(tmp_path / "public", key, line))
    locked = write_key(tmp_path / "locked", how=serialization.BestAvailableEncryption(b"secret"))
    with pytest.raises(SignatureError, match="locked is a key with a passphrase; allowed"):
        sign(path, locked)
    assert not (tmp_path / "manifest.sig").exists()
    signature = sign(path, write_key(tmp_path / "key"))
    for name, what in (("key", "a private key"), ("junk", "no public key that can be read")):
        with pytest.raises(SignatureError, match=f"{name} is {what}; allowed: an Ed25519 public key"):
            verify(path, signature, tmp_path / name)
    with pytest.raises(SignatureError, match=r"none\.sig cannot be read"):
        verify(path, tmp_path / "none.sig")


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs ssh-keygen")
def test_keys_of_ssh_keygen(tmp_path: Path) -> None:
    path = manifest(tmp_path)
    for name, phrase in (("open", ""), ("locked", "secret")):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", phrase, "-f", str(tmp_path / name)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    fingerprint = verify(path, sign(path, tmp_path / "open"), tmp_path / "open.pub")
    shown = subprocess.run(
        ["ssh-keygen", "-l", "-f", tmp_path / "open.pub"], check=True, capture_output=True, text=True
    )
    assert fingerprint in shown.stdout.split()
    with pytest.raises(SignatureError, match="locked is a key with a passphrase; allowed"):
        sign(path, tmp_path / "locked")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_another_tool_verifies_it(tmp_path: Path) -> None:
    path, key = manifest(tmp_path), write_key(tmp_path / "key")
    lines = dict(line.split(": ", 1) for line in sign(path, key).read_text().splitlines())
    (tmp_path / "raw").write_bytes(base64.b64decode(lines["signature"]))
    public = write_public(tmp_path / "public", read_key(key), False)
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-rawin", "-inkey", public, "-in", path]
    done = subprocess.run([*command, "-sigfile", tmp_path / "raw"], capture_output=True, text=True)
    if "rawin" in done.stderr:
        pytest.skip("this openssl is older than Ed25519 on its command line")
    assert done.returncode == 0, done.stderr
