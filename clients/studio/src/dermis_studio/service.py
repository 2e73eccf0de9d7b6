"""How the studio reaches a dermis service: connections for all visitors, credentials for each call."""

from __future__ import annotations

import ssl

import httpx
from dermis_client import AsyncDermisClient

from dermis_studio._version import __version__

TIMEOUT_SECONDS = 120.0
# A busy service says when to come back. While images are generated slowly, the first attempts are often refused, and a visitor
# sees the progress of the page meanwhile, which can be stopped.
MAX_RETRIES = 3
_USER_AGENT = f"dermis-studio/{__version__}"


class Service:
    """A dermis service and the connections to it. Its methods belong on one event loop.

    The studio has no credentials of its own: every call has those of the visitor who caused it, or none.

    Attributes:
        base_url: Address of the service.
        own_host: Whether the service is the one that the studio is mounted in; then visitors see it under their own address.
        public_url: Address of the service for readers of studies and programs of visitors; None if it is not known.
    """

    def __init__(
        self,
        base_url: str,
        *,
        verify: ssl.SSLContext | bool = True,
        own_host: bool = False,
        allow_plain_http: bool = False,
        public_url: str | None = None,
    ) -> None:
        """Create it without connecting.

        Args:
            base_url: Address of the service, such as http://127.0.0.1:3000.
            verify: How certificates of https are checked: True for the authorities of the system.
            own_host: Whether the studio is mounted in this service.
            allow_plain_http: Whether credentials may be sent over http:// to another machine.
            public_url: Address under which others reach the service, if it is not `base_url`.
        """
        self.base_url = base_url.rstrip("/")
        self.own_host = own_host
        self.public_url = None if public_url is None else public_url.rstrip("/")
        self._verify = verify
        self._allow_plain_http = allow_plain_http or own_host
        self._http: httpx.AsyncClient | None = None
        self._files: httpx.AsyncClient | None = None

    @property
    def http(self) -> httpx.AsyncClient:
        """The HTTP client. It has no credentials, keeps no cookies, and uses no proxy for its own host."""
        if self._http is None:
            self._http = self._connections(200, httpx.Timeout(TIMEOUT_SECONDS))
        return self._http

    @property
    def files(self) -> httpx.AsyncClient:
        """The HTTP client for downloads. A visitor may read them slowly, which keeps no connection of `http`."""
        if self._files is None:
            self._files = self._connections(100, httpx.Timeout(TIMEOUT_SECONDS, pool=5.0))
        return self._files

    def _connections(self, number: int, timeout: httpx.Timeout) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            verify=self._verify,
            trust_env=not self.own_host,
            headers={"User-Agent": _USER_AGENT},
            limits=httpx.Limits(max_connections=number, max_keepalive_connections=20),
            timeout=timeout,
        )

    def client(self, key: str | None, *, max_retries: int = MAX_RETRIES) -> AsyncDermisClient:
        """Return a client with the credentials of a visitor.

        Args:
            key: API key or access token; None for a service without access control.
            max_retries: Further attempts after a broken connection or a busy service.

        Raises:
            dermis_client.InvalidRequestError: The key cannot be sent.
        """
        return AsyncDermisClient(
            self.base_url,
            api_key=key or "",  # "": never that of the environment
            allow_plain_http=self._allow_plain_http,
            timeout=TIMEOUT_SECONDS,
            max_retries=max_retries,
            http_client=self.http,
        )

    async def close(self) -> None:
        """Close the connections."""
        for client in (self._http, self._files):
            if client is not None:
                await client.aclose()
        self._http = self._files = None
