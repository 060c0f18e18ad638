"""Apple's push service over HTTP/2 with TLS: `POST /3/device/{token}`."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import json
import re
import ssl
import uuid
from pathlib import Path
from typing import Any

import jwt
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import ConnectionTerminated, DataReceived, RequestReceived, StreamEnded, StreamReset
from h2.exceptions import ProtocolError

from .base import Answer, PushStub

TEAM = "TEAM123456"
KEY_ID = "KEY1234567"
TOPIC = "com.example.clinic"
PAYLOAD_BYTES_MAX = 4096


def apns_error(status: int, reason: str, **headers: str) -> Answer:
    """An error as Apple forms it."""
    return Answer(status, {"reason": reason}, headers)


class ApnsStub(PushStub):
    """`certificate` is for the client to trust. `issued`: the provider tokens that were seen, in order.

    `expires`: the next this many requests are answered ExpiredProviderToken.
    """

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(**options)
        self.certificate = folder / "apns-cert.pem"
        self._tls_key = folder / "apns-key.pem"
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.issued: list[str] = []
        self.expires = 0
        # Streams that were open at once on one connection.
        self.parallel = 0

    @property
    def url(self) -> str:
        """Where the provider's API begins."""
        return f"https://127.0.0.1:{self.port}"

    def private_key(self) -> str:
        """What Apple's `.p8` file holds."""
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()

    async def start(self) -> None:
        """Listen with TLS; HTTP/2 is all that is spoken."""
        if not self.certificate.exists():
            write_certificate(self.certificate, self._tls_key)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, self._tls_key)
        context.set_alpn_protocols(["h2"])
        self._server = await asyncio.start_server(self.serve, "127.0.0.1", self.port, ssl=context)
        self.port = self._server.sockets[0].getsockname()[1]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        self.connections += 1
        self._writers.add(writer)
        connection = H2Connection(H2Configuration(client_side=False, header_encoding="utf-8"))
        connection.initiate_connection()
        writer.write(connection.data_to_send())
        requests: dict[int, tuple[dict[str, str], bytearray]] = {}
        try:
            async with asyncio.TaskGroup() as group:
                while data := await reader.read(65536):
                    for event in connection.receive_data(data):
                        match event:
                            case RequestReceived(stream_id=int(stream), headers=list(headers)):
                                requests[stream] = ({str(n): str(v) for n, v in headers}, bytearray())
                                self.parallel = max(self.parallel, len(requests))
                            case DataReceived(stream_id=int(stream), data=bytes(part)):
                                requests[stream][1].extend(part)
                                length = event.flow_controlled_length
                                assert length is not None
                                connection.acknowledge_received_data(length, stream)
                            case StreamEnded(stream_id=int(stream)):
                                headers_, body = requests[stream]
                                group.create_task(
                                    self._respond(connection, writer, stream, headers_, bytes(body), requests)
                                )
                            case StreamReset(stream_id=int(stream)):
                                requests.pop(stream, None)
                            case ConnectionTerminated():
                                writer.close()
                    writer.write(connection.data_to_send())
        except* (OSError, ProtocolError):
            pass
        self._writers.discard(writer)
        writer.transport.abort()

    async def _respond(
        self,
        connection: H2Connection,
        writer: asyncio.StreamWriter,
        stream: int,
        headers: dict[str, str],
        body: bytes,
        requests: dict[int, tuple[dict[str, str], bytearray]],
    ) -> None:
        answer = await self.handle(headers[":method"], headers[":path"], headers, body)
        if requests.pop(stream, None) is None:
            return
        if answer.cut:
            writer.transport.abort()
            return
        content = b"" if answer.body is None else json.dumps(answer.body).encode()
        sent = [(":status", str(answer.status)), ("apns-id", str(uuid.uuid4()).upper())]
        sent += [(name.lower(), value) for name, value in answer.headers.items()]
        connection.send_headers(stream, sent, end_stream=not content)
        if content:
            connection.send_data(stream, content, end_stream=True)
        writer.write(connection.data_to_send())

    async def handle(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        """`POST /3/device/{token}`."""
        if method != "POST":
            return self.fault("method", apns_error(405, "MethodNotAllowed"))
        found = re.fullmatch(r"/3/device/([0-9a-f]+)", path)
        if found is None:
            return self.fault("path", apns_error(404, "BadPath"))
        refusal = self._refusal(headers, body)
        if refusal is not None:
            return refusal
        return await self.accept(found[1], json.loads(body), headers, Answer(200))

    def _refusal(self, headers: dict[str, str], body: bytes) -> Answer | None:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return self.fault("no token", apns_error(403, "MissingProviderToken"))
        if not self.issued or self.issued[-1] != token:
            self.issued.append(token)
        try:
            claims = jwt.decode(
                token, self.key.public_key(), algorithms=["ES256"], issuer=TEAM, options={"verify_iat": False}
            )
            assert jwt.get_unverified_header(token)["kid"] == KEY_ID
        except (jwt.InvalidTokenError, AssertionError, KeyError) as error:
            return self.fault(repr(error), apns_error(403, "InvalidProviderToken"))
        if self.expires > 0 or abs(self.now() - claims["iat"]) > 3600:
            self.expires -= 1
            return apns_error(403, "ExpiredProviderToken")
        payload = json.loads(body)
        push_type, priority = headers.get("apns-push-type"), headers.get("apns-priority")
        silent = "content-available" in payload["aps"] and "alert" not in payload["aps"]
        for wrong, status, reason in (
            (headers.get("apns-topic") != TOPIC, 400, "BadTopic"),
            (push_type != ("background" if silent else "alert"), 400, "InvalidPushType"),
            (priority not in (("5",) if silent else ("5", "10")), 400, "BadPriority"),
            (not re.fullmatch(r"0|1[0-9]{9}", headers.get("apns-expiration", "0")), 400, "BadExpirationDate"),
            (len(headers.get("apns-collapse-id", "").encode()) > 64, 400, "BadCollapseId"),
            (len(body) > PAYLOAD_BYTES_MAX, 413, "PayloadTooLarge"),
        ):
            if wrong:
                return self.fault(reason, apns_error(status, reason))
        return None


def write_certificate(path: Path, key_path: Path) -> None:
    """A certificate for 127.0.0.1 that nobody else trusts, and its key, as PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    path.write_bytes(certificate.public_bytes(Encoding.PEM))
    key_path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
