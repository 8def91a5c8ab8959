"""Both ends of a connection prove that they know the run's token, before anything else is read.

    client -> server   HELLO, a fresh nonce          server -> client   a fresh nonce
    client -> server   its proof                     server -> client   its proof, or REFUSED

All four are of fixed size. The proofs, and one key for each direction, come from HKDF-SHA256 over the token, with both
nonces as its salt: nothing of the token can be read from the wire, a proof that was heard before is worth nothing under
another nonce, and one that is sent back is that of the other side. The server says nothing but a random number to who
has not proved itself.
"""

from __future__ import annotations

import hmac
import secrets
from dataclasses import dataclass

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from pipeline.store.frames import Seal

HELLO = b"unbroken store 1"
NONCE_BYTES = PROOF_BYTES = 32
HELLO_BYTES = len(HELLO) + NONCE_BYTES
REFUSED = bytes(PROOF_BYTES)
LEAST_BYTES = 32
"""Of a token: a shorter one could be guessed, by who has heard a handshake."""


class Refused(ConnectionError):
    """The other end does not know the token, or does not speak like a part of this run."""


def fresh_nonce() -> bytes:
    """Never used before: what is proved over it is proved now."""
    return secrets.token_bytes(NONCE_BYTES)


def begins_well(hello: bytes | bytearray) -> bool:
    """Whether what has come so far of a client's first message may become one."""
    return hello[: len(HELLO)] == HELLO[: len(hello)]


def client_nonce(hello: bytes) -> bytes:
    """The nonce in a client's first message. Raises Refused for one of another protocol."""
    if len(hello) != HELLO_BYTES or not hello.startswith(HELLO):
        raise Refused("what has connected is no part of a run")
    return hello[len(HELLO) :]


@dataclass(frozen=True)
class Secrets:
    """What follows from a token and both nonces: each side's proof, and the key of what it sends."""

    client_proof: bytes
    server_proof: bytes
    client_key: bytes
    server_key: bytes

    @classmethod
    def of(cls, token: bytes, client: bytes, server: bytes) -> Secrets:
        """Of the nonces of the client and the server."""
        made = HKDF(SHA256(), 4 * PROOF_BYTES, salt=client + server, info=HELLO).derive(token)
        return cls(*(made[i : i + PROOF_BYTES] for i in range(0, len(made), PROOF_BYTES)))

    def check_client(self, proof: bytes) -> None:
        """Raises Refused unless it is the client's proof."""
        if not hmac.compare_digest(proof, self.client_proof):
            raise Refused("what has connected does not know the token of the run")

    def check_server(self, proof: bytes) -> None:
        """Raises Refused unless it is the server's proof."""
        if hmac.compare_digest(proof, REFUSED):
            raise Refused("the store has another token than this process")
        if not hmac.compare_digest(proof, self.server_proof):
            raise Refused("what answers is not the store of this run: it does not know its token")

    def seals(self, server: bool) -> tuple[Seal, Seal]:
        """(of what is sent, of what is received), of one side."""
        mine, theirs = (self.server_key, self.client_key) if server else (self.client_key, self.server_key)
        return Seal(mine), Seal(theirs)
