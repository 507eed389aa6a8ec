"""Pictures from addresses: only of named domains, only from the internet, and never more than the limits allow. No test leaves this machine."""

import contextlib
import datetime
import io
import socket
import ssl
import threading

import pytest
from PIL import Image

pytest.importorskip("starlette")
pytest.importorskip("prometheus_client")

from chatpose_jax.serve.media import Media, is_public
from chatpose_jax.serve.openai import ApiError

PUBLIC = "93.184.215.14"


@pytest.mark.parametrize(
    ("address", "public"),
    [
        (PUBLIC, True), ("2606:2800:21f:cb07::1", True), ("127.0.0.1", False), ("10.1.2.3", False), ("192.168.0.1", False), ("172.16.5.4", False),
        ("169.254.169.254", False), ("0.0.0.0", False), ("100.64.0.1", False), ("224.0.0.1", False), ("255.255.255.255", False), ("::1", False),
        ("::", False), ("fe80::1%eth0", False), ("fc00::1", False), ("::ffff:127.0.0.1", False), ("::ffff:8.8.8.8", True), ("64:ff9b::7f00:1", False),
        ("64:ff9b::808:808", True), ("2002:7f00:1::", False), ("2002:a00:1::", False), ("ff02::1", False), ("198.18.0.1", False),
        ("::127.0.0.1", False), ("::ffff:0:127.0.0.1", False), ("64:ff9b:1::7f00:1", False), ("fec0::1", False),
    ],
)  # fmt: skip
def test_which_addresses_are_the_internet(address, public):
    assert is_public(address) == public


def no_connection(*_, **__):
    raise AssertionError("nothing may be connected to")


@pytest.mark.parametrize(
    "url",
    [
        "http://pictures.example/x.png", "https://other.example/x.png", "https://sub.pictures.example/x.png", "https://pictures.example:8443/x.png",
        "https://me@pictures.example/x.png", "https://pictures.example@evil.example/x.png", "https://127.0.0.1/x.png", "https://[::1]/x.png",
        "file:///etc/passwd", "ftp://pictures.example/x.png", "//pictures.example/x.png", "https://[bad/x.png", "https://pictures.example:x/",
        "https:pictures.example", "", "https://", "https://pictures.example.evil.example/", "gopher://pictures.example/",
    ],
)  # fmt: skip
def test_other_addresses_are_refused_unseen(url):
    media = Media(["pictures.example"], resolve=no_connection, connect=no_connection)
    with pytest.raises(ApiError) as error:
        media(url, "here")
    assert (error.value.status, error.value.param, error.value.code) == (400, "here", "invalid_image_url")


@pytest.mark.parametrize(
    "found", [["127.0.0.1"], ["10.0.0.7"], ["169.254.169.254"], ["::1"], [PUBLIC, "192.168.1.1"], []]
)
def test_a_domain_that_leads_inside_is_refused(found):
    media = Media(["pictures.example"], resolve=lambda _: found, connect=no_connection)
    with pytest.raises(ApiError, match="does not lead to the internet"):
        media("https://pictures.example/x.png", "here")


def test_loopback_is_refused_by_the_real_resolver():
    with pytest.raises(ApiError, match="does not lead to the internet"):
        Media(["localhost"], connect=no_connection)("https://localhost/x.png", "here")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """What a server of pictures.example shows, and a context that trusts it."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "pictures.example")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("pictures.example"), x509.DNSName("second.example")]), critical=False)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("certificates")
    plain = serialization.NoEncryption()
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    (folder / "both.pem").write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    shown = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    shown.load_cert_chain(folder / "both.pem")
    trusting = ssl.create_default_context(cadata=certificate.public_bytes(serialization.Encoding.PEM).decode())
    return shown, trusting


@contextlib.contextmanager
def web(shown, respond):
    """A server on loopback. Gives the ``connect`` that leads to it, whatever the address, and what was asked: (address, request)."""
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run():
            with (
                contextlib.suppress(OSError),
                listener.accept()[0] as plain,
                shown.wrap_socket(plain, server_side=True) as client,
            ):
                asked.append(client.recv(65536))
                respond(client)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()

        def connect(address, timeout):
            asked.append(address)
            return socket.create_connection(listener.getsockname(), timeout=timeout)

        yield connect, asked
    thread.join(10)


def sends(*parts):
    def respond(client):
        for part in parts:
            client.sendall(part)

    return respond


def png():
    file = io.BytesIO()
    Image.new("RGB", (5, 4), "red").save(file, "PNG")
    return file.getvalue()


def fetched(certificates, respond, url="https://pictures.example/a%20b.png?x=1", **settings):
    with web(certificates[0], respond) as (connect, asked):
        options = {"resolve": lambda _: [PUBLIC], "context": certificates[1], **settings}
        return Media(["pictures.example", "third.example"], connect=connect, **options)(url, "here"), asked


def test_a_picture_of_a_named_domain_is_fetched(certificates):
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(png())}\r\n\r\n".encode()
    data, (address, request) = fetched(certificates, sends(head, png()))
    assert data == png() and address == (PUBLIC, 443)  # the very address that was looked at
    assert request.startswith(b"GET /a%20b.png?x=1 HTTP/1.1\r\nHost: pictures.example\r\n")
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    assert fetched(certificates, sends(chunked))[0] == b"abc"
    data, (_, request) = fetched(certificates, sends(head, png()), url="https://pictures.example/x y\r\nEvil: 1")
    assert b"Evil: 1\r\n" not in request


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (
            b"HTTP/1.1 302 Found\r\nLocation: https://pictures.example/y.png\r\nContent-Length: 0\r\n\r\n",
            "no redirection",
        ),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "status 404"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n" + b"x" * 5000, "more than 1000 bytes"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 5000, "more than 1000 bytes"),
        (b"nonsense\r\n\r\n", "cannot be read"),
        (b"", "cannot be read"),
    ],
)
def test_what_it_answers_else_is_an_error(certificates, head, words):
    with pytest.raises(ApiError, match=words) as error:
        fetched(certificates, sends(head), most=1000)
    assert error.value.status == 400 and error.value.param == "here"


def test_it_must_be_the_domain_itself(certificates):
    """By its certificate, whatever the address."""
    with pytest.raises(ApiError, match="SSLCertVerificationError"):
        fetched(certificates, sends(b""), url="https://third.example/x.png")


def test_a_slow_one_ends(certificates):
    stop = threading.Event()

    def drip(client):
        client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        with contextlib.suppress(OSError):
            while not stop.wait(0.05):
                client.sendall(b"x")

    try:
        with pytest.raises(ApiError, match="TimeoutError"):
            fetched(certificates, drip, seconds=0.4)
    finally:
        stop.set()
