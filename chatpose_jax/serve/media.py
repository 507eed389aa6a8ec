"""Pictures from addresses, where the server may fetch any: over https from named domains only, and never from a private network."""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import urllib.parse
from collections.abc import Callable, Iterable, Iterator

from chatpose_jax import __version__
from chatpose_jax.serve.openai import invalid

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def resolve(host: str) -> list[str]:
    """The addresses of a host."""
    return list(dict.fromkeys(str(found[4][0]) for found in socket.getaddrinfo(host, 443, type=socket.SOCK_STREAM)))


def is_public(text: str) -> bool:
    """Whether an address belongs to the internet: not to this machine, its network, or a translation of those."""
    address: Address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        inner = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if address in ipaddress.ip_network("64:ff9b::/96"):
            inner.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if not all(is_public(str(each)) for each in inner if each is not None):
            return False
        if any(each is not None for each in inner):
            return True
    # Python counts forms of old that hold an address of version 4, and local ones, as global: ::127.0.0.1, 64:ff9b:1::7f00:1, fec0::1.
    local = isinstance(address, ipaddress.IPv6Address) and address.is_site_local
    return address.is_global and not (address.is_multicast or address.is_reserved or local)


class Media:
    """Fetches pictures. Calls may come from several threads.

    domains: exact names of hosts. most: bytes of a picture. seconds: for one picture in all. resolve, connect, context: for tests.
    """

    def __init__(
        self,
        domains: Iterable[str],
        *,
        most: int = 20 << 20,
        seconds: float = 10.0,
        resolve: Callable[[str], list[str]] = resolve,
        connect: Callable[..., socket.socket] = socket.create_connection,
        context: ssl.SSLContext | None = None,
    ):
        self.domains = {domain.lower().rstrip(".") for domain in domains}
        self.most, self.seconds, self.resolve, self.connect = most, seconds, resolve, connect
        self.context = ssl.create_default_context() if context is None else context

    def __call__(self, url: str, where: str) -> bytes:
        """What an address holds. Raises ApiError 400, with ``where`` as the field, for one that may not be fetched or that fails."""

        def refuse(why: str, code: str = "invalid_image_url") -> Exception:
            return invalid(where, f"{where}: {why}", code)

        try:
            parts = urllib.parse.urlsplit(url)
            host, port = (parts.hostname or "").rstrip("."), parts.port
        except ValueError:
            raise refuse("this is no address") from None
        if parts.scheme != "https" or "@" in parts.netloc or port not in (None, 443) or host not in self.domains:
            raise refuse(
                f"must be a data: address, or https:// of {' or '.join(sorted(self.domains))}; found {url[:60]!r}"
            )
        path = _quoted(parts.path or "/") + (f"?{_quoted(parts.query)}" if parts.query else "")
        try:
            addresses = self.resolve(host)
            if not addresses or not all(map(is_public, addresses)):  # one private address among them is a trick
                raise refuse(f"{host} does not lead to the internet")
            # To that very address, which nobody can change any more; the certificate must be the domain's.
            plain = self.connect((addresses[0], 443), timeout=self.seconds)
            wrap = self.context.wrap_socket(plain, server_hostname=host, do_handshake_on_connect=False)
            with wrap as connection, _ending(connection, self.seconds) as late:
                status, data = self._get(connection, host, path)
                if late.is_set():
                    raise TimeoutError
        except (OSError, http.client.HTTPException, UnicodeError, ValueError) as error:
            raise refuse(f"{host} cannot be read: {type(error).__name__}", "image_not_fetched") from None
        if status != 200:  # of a redirection too: it may lead anywhere
            raise refuse(
                f"{host} answered with status {status}, expected 200; no redirection is followed", "image_not_fetched"
            )
        if len(data) > self.most:
            raise refuse(f"the picture has more than {self.most} bytes", "image_too_large")
        return data

    def _get(self, connection: ssl.SSLSocket, host: str, path: str) -> tuple[int, bytes]:
        """The status, and as much of the content as shows that it is too large."""
        connection.do_handshake()
        agent = f"User-Agent: chatpose-jax/{__version__}\r\nAccept: image/*\r\nConnection: close"
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n{agent}\r\n\r\n".encode("ascii"))
        response = http.client.HTTPResponse(connection, method="GET")
        response.begin()
        data = bytearray()
        while response.status == 200 and len(data) <= self.most and (chunk := response.read1(65536)):
            data += chunk
        return response.status, bytes(data)


def _quoted(text: str) -> str:
    """No character of an address ends a line of the request."""
    return urllib.parse.quote(text, safe="/%:@!$&'()*+,;=~-._?")


@contextlib.contextmanager
def _ending(connection: socket.socket, seconds: float) -> Iterator[threading.Event]:
    """Ends a connection after a time, so that nobody reads on, however slowly the other side sends. The event says that it did."""
    late = threading.Event()

    def end() -> None:
        late.set()
        with contextlib.suppress(OSError):
            socket.socket.shutdown(connection, socket.SHUT_RDWR)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield late
    finally:
        timer.cancel()
