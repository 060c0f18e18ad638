"""What browsers load: the SDK's modules under /sdk, and the demonstration under /demo where it is switched on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
from litestar import Request, Response, get, post

from tidings.server.errors import NotFound, Refusal
from tidings.server.services.example import PEOPLE, TOKEN_SECONDS, Example
from tidings.wire.codec import encode

_PAGES: Final = Path(__file__).parents[1] / "web"
# In an installed server beside the pages, in a checkout where they are written.
_SDKS: Final = (_PAGES / "sdk", Path(__file__).parents[4] / "sdk")
_PACKAGES: Final = ("js", "components")
_TYPES: Final = {
    ".js": "text/javascript",
    ".css": "text/css",
    ".html": "text/html",
    ".svg": "image/svg+xml",
}
# Asked again each time: a new version of the server brings new modules under the same names.
_CACHED: Final = "no-cache"
# No script and no style but our own files; the page speaks to this server alone. Images come from where messages say.
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' https: data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_BODY_BYTES_MAX: Final = 1_000
_WORKER: Final = "worker.js"


class SessionWanted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who somebody wants to be in the demonstration."""

    user: str


@dataclass(slots=True, frozen=True)
class _File:
    content: bytes
    media_type: str
    etag: str


def sdk_routes() -> list[Any]:
    """`/sdk/js/src/…` and `/sdk/components/src/…`: the modules as they are written, for pages without a build step."""
    files = _read_sdks()

    @get("/sdk/{path:path}", include_in_schema=False, name="sdk.file")
    async def sdk(request: Request[Any, Any, Any]) -> Response[bytes]:
        return _answer(request, files.get(str(request.path_params["path"]).lstrip("/")))

    return [sdk]


def demo_routes(example: Example) -> list[Any]:
    """The demonstration: a page, who is in it, and a token for one of them."""
    files = {path.name: _read(path) for path in sorted(_PAGES.iterdir()) if path.suffix in _TYPES}

    @get("/demo", include_in_schema=False, name="demo.page")
    async def page(request: Request[Any, Any, Any]) -> Response[bytes]:
        return _answer(request, files["demo.html"], policy=True)

    @get("/demo/people", include_in_schema=False, name="demo.people")
    async def people() -> Response[bytes]:
        listed = [{"id": one.id, "name": one.name, "about": one.about} for one in PEOPLE]
        return Response(
            encode({"people": listed}), media_type="application/json", headers={"cache-control": "no-store"}
        )

    @get("/demo/{name:str}", include_in_schema=False, name="demo.file")
    async def file(request: Request[Any, Any, Any]) -> Response[bytes]:
        name = request.path_params["name"]
        if name == _WORKER:
            answer = _answer(request, files[name], policy=True)
            # The page is beside the worker's folder, not below it.
            answer.headers["service-worker-allowed"] = "/demo"
            return answer
        return _answer(request, files.get(name) if name != "demo.html" else None)

    @post("/demo/session", status_code=200, include_in_schema=False, name="demo.session")
    async def session(request: Request[Any, Any, Any]) -> Response[bytes]:
        body = await request.body()
        if len(body) > _BODY_BYTES_MAX:
            raise Refusal("too_large", f"The body may have {_BODY_BYTES_MAX} bytes.", bound=_BODY_BYTES_MAX)
        try:
            wanted = msgspec.json.decode(body, type=SessionWanted)
        except (msgspec.DecodeError, msgspec.ValidationError):
            raise Refusal("invalid_field", 'Send {"user": "amira"}.', field="user") from None
        token = await example.token(wanted.user)
        answer = {"user": wanted.user, "token": token.token, "expires_in": TOKEN_SECONDS}
        return Response(encode(answer), media_type="application/json", headers={"cache-control": "no-store"})

    return [page, people, file, session]


def _read_sdks() -> dict[str, _File]:
    found = {}
    root = next((root for root in _SDKS if (root / _PACKAGES[0]).is_dir()), None)
    for package in _PACKAGES if root is not None else ():
        assert root is not None
        for path in sorted((root / package / "src").rglob("*")):
            if path.is_file() and path.suffix in _TYPES:
                found[path.relative_to(root).as_posix()] = _read(path)
    return found


def _read(path: Path) -> _File:
    content = path.read_bytes()
    return _File(content, _TYPES[path.suffix], f'"{hashlib.sha256(content).hexdigest()[:24]}"')


def _answer(request: Request[Any, Any, Any], file: _File | None, *, policy: bool = False) -> Response[bytes]:
    if file is None:
        raise NotFound("file", field="path")
    headers = {"cache-control": _CACHED, "etag": file.etag}
    if policy:
        headers["content-security-policy"] = _POLICY
        headers["referrer-policy"] = "no-referrer"
    else:
        # A page of another address may import the modules; there is nothing secret in them.
        headers["access-control-allow-origin"] = "*"
        headers["cross-origin-resource-policy"] = "cross-origin"
    if file.etag in request.headers.get("if-none-match", ""):
        return Response(b"", status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)
