"""A small OpenID Connect provider in a process of its own: discovery document, keys, access tokens, rotation of the keys.

Run as a program, it prints its port and serves until its standard input closes. A token is signed as the caller asks, so that
tests also get tokens that a provider should never issue.
"""

from __future__ import annotations

import base64
import hmac
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx

AUDIENCE = "dermis"


class Keys:
    """The keys of the provider. The last one of an algorithm signs; `rotate` removes the older ones."""

    def __init__(self) -> None:
        self.number = 0
        self.signing: dict[str, Any] = {}
        self.fetched = 0
        self.rotate()

    def rotate(self) -> None:
        from joserfc.jwk import ECKey, OctKey, OKPKey, RSAKey

        self.number += 1

        def named(kind: str) -> dict[str, Any]:
            return {"kid": f"{kind}-{self.number}"}

        rsa = RSAKey.generate_key(2048, named("rsa"))
        self.signing = {
            "RS256": rsa,
            "PS256": rsa,
            "ES256": ECKey.generate_key("P-256", named("ec")),
            "EdDSA": OKPKey.generate_key("Ed25519", named("ed")),
            "HS256": OctKey.generate_key(256, named("secret")),
        }
        self.encryption = RSAKey.generate_key(2048, {"kid": f"enc-{self.number}"})
        self.weak = RSAKey.generate_key(1024, {"kid": f"weak-{self.number}"})

    def public(self) -> list[dict[str, Any]]:
        self.fetched += 1
        keys = [self.signing["RS256"], self.signing["ES256"], self.signing["EdDSA"], self.weak]
        return [
            *(key.as_dict(private=False) for key in keys),
            {**self.encryption.as_dict(private=False), "use": "enc"},
            {"kty": "unknown", "kid": "new kind"},
        ]

    def token(self, order: Mapping[str, Any]) -> str:
        """A token. `claims` and `header` are merged into the usual ones; None removes one. `attack` changes the signature."""
        from joserfc import jws

        algorithm, attack = order.get("algorithm", "RS256"), order.get("attack")
        key = {"encryption key": self.encryption, "weak key": self.weak}.get(attack or "", self.signing.get(algorithm))
        header = {"alg": algorithm, "typ": "at+jwt", "kid": key.kid if key is not None else None} | order.get(
            "header", {}
        )
        now = time.time()
        claims = {
            "iss": order["issuer"],
            "aud": AUDIENCE,
            "sub": "user-1",
            "iat": int(now),
            "nbf": int(now),
            "exp": int(now) + 300,
            "scope": "models:read",
        } | order.get("claims", {})
        header = {name: value for name, value in header.items() if value is not None}
        payload = json.dumps({name: value for name, value in claims.items() if value is not None}).encode()
        if attack == "none":
            return b".".join((_b64(json.dumps(header | {"alg": "none"}).encode()), _b64(payload), b"")).decode()
        if attack == "public key as secret":
            pem = self.signing["RS256"].as_pem(private=False)
            signed = b".".join((_b64(json.dumps(header | {"alg": "HS256"}).encode()), _b64(payload)))
            return b".".join((signed, _b64(hmac.digest(pem, signed, "sha256")))).decode()

        class Unchecked(jws.JWSRegistry):
            def check_header(self, header: dict[str, Any]) -> None:
                """Allow every header."""

        registry = Unchecked(algorithms=[algorithm])
        token = jws.serialize_compact(header, payload, key, registry=registry)
        if attack == "changed":
            first, _, last = token.split(".")
            changed = json.dumps(claims | {"scope": "admin"}).encode()
            return f"{first}.{_b64(changed).decode()}.{last}"
        return token


def _b64(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


class Handler(BaseHTTPRequestHandler):
    """Answers of the provider."""

    keys: Keys

    def do_GET(self) -> None:
        host = f"http://{self.headers['Host']}"
        if self.path == "/.well-known/openid-configuration":
            self._answer({"issuer": host, "jwks_uri": f"{host}/keys"})
        elif self.path == "/keys":
            self._answer({"keys": self.keys.public()})
        elif self.path == "/fetched":
            self._answer({"fetched": self.keys.fetched})
        else:
            self.send_error(404)

    def do_POST(self) -> None:
        order = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/rotate":
            self.keys.rotate()
            self._answer({})
        else:
            self._answer({"access_token": self.keys.token({"issuer": f"http://{self.headers['Host']}"} | order)})

    def _answer(self, document: Mapping[str, Any]) -> None:
        body = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@dataclass
class Provider:
    """A provider that runs."""

    issuer: str
    process: subprocess.Popen[str]

    def token(self, **order: Any) -> str:
        """An access token; `Keys.token` says what can be ordered."""
        answer = httpx.post(f"{self.issuer}/token", json=order, trust_env=False, timeout=60)
        token: str = answer.json()["access_token"]
        return token

    def rotate(self) -> None:
        """Replace all keys of the provider."""
        httpx.post(f"{self.issuer}/rotate", json={}, trust_env=False, timeout=60).raise_for_status()

    def fetched(self) -> int:
        """How often the keys were fetched."""
        number: int = httpx.get(f"{self.issuer}/fetched", trust_env=False, timeout=60).json()["fetched"]
        return number


@contextmanager
def running_provider() -> Iterator[Provider]:
    """A provider on a free port of this machine."""
    process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        port = int(process.stdout.readline())
        yield Provider(f"http://127.0.0.1:{port}", process)
    finally:
        process.kill()
        process.communicate()


def main() -> None:
    """Serve until the standard input closes."""
    Handler.keys = Keys()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
