"""The page of `steer-heal chat`: a small server on loopback, and the files of the page.

    GET  /about    what there is to choose from (chat.About)
    POST /answer   a chat.Question -> server-sent events, each the reply so far (chat.Answer); then
                   an event `end`, or `trouble`, which says in a sentence why there is no more of it
    GET  /         the page (chat_page/), which asks nothing of any other place

Ctrl-C ends it.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path

from loguru import logger
from pydantic import Field

from eval.errors import UserError
from eval.settings import Device, Settings, resolve_settings
from steer_heal.chat import About, Chat, Question
from steer_heal.saved import read_saved_run

try:
    import uvicorn
    from fastapi import FastAPI
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from fastapi.sse import EventSourceResponse, ServerSentEvent
    from fastapi.staticfiles import StaticFiles
    from starlette.middleware.trustedhost import TrustedHostMiddleware
except ImportError as error:
    raise UserError(
        f"chat needs libraries of its own ({error.name} is not there): pip install "
        "'steer-heal[chat]', or take `just chat`, which has them"
    ) from error

_PAGE_FOLDER = Path(__file__).parent / "chat_page"
_PATIENCE_S = 1  # with answers that are being given when the server is stopped


class ChatConfig(Settings):
    """Where the page is."""

    host: str = Field("127.0.0.1", min_length=1)
    """Address that is listened on; any other than loopback lets others in."""
    port: int = Field(8765, ge=0, le=65535)
    """Port that is listened on; 0: one that is free."""
    device: Device = "auto"
    """auto takes a GPU where there is one."""


def serve(run_path: Path, settings: Sequence[str]) -> None:
    """Serves the page of a run until it is interrupted.

    Raises:
        UserError: a bad setting, no run, no finished round, a model that cannot be loaded, or an
            address that cannot be listened on.
    """
    config = resolve_settings(ChatConfig, settings)
    with _listening(config) as listener:  # before a model is loaded for nothing
        chat = Chat(read_saved_run(run_path), config.device)
        app = chat_app(chat, config.host, lambda: server.should_exit)
        server = uvicorn.Server(
            uvicorn.Config(
                app, log_level="critical", lifespan="off", timeout_graceful_shutdown=_PATIENCE_S
            )
        )
        name, port = listener.getsockname()[:2]
        if not _is_loopback(name):
            logger.warning("chat listens on {}: whoever reaches this machine can use it", name)
        logger.info(
            "chat: http://{}:{} (Ctrl-C ends it)", f"[{name}]" if ":" in name else name, port
        )
        server.run(sockets=[listener])


def chat_app(chat: Chat, host: str, is_ending: Callable[[], bool]) -> FastAPI:
    """The server's answers.

    Args:
        host: that requests name as theirs, where it is loopback.
        is_ending: whether an answer that is being given is to end where it is.
    """
    app = FastAPI(openapi_url=None)  # its own pages would ask other places for their scripts
    # a page of another place cannot give this server its own name, to read what it says
    names = ["localhost", "127.0.0.1", "::1", "[::1]", host] if _is_loopback(host) else ["*"]
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=names)

    @app.get("/about")
    def about() -> About:
        return chat.about()

    @app.post("/answer", response_class=EventSourceResponse)
    def answer(question: Question) -> Iterator[ServerSentEvent]:
        try:
            for each in takewhile(lambda _: not is_ending(), chat.answer(question)):
                yield ServerSentEvent(data=each)
            if not is_ending():
                yield ServerSentEvent(event="end")
        except UserError as error:
            yield ServerSentEvent(event="trouble", data=str(error))
        except RuntimeError as error:  # of torch: mostly a lack of memory
            logger.exception("no answer")
            yield ServerSentEvent(event="trouble", data=str(error).splitlines()[0])

    @app.exception_handler(RequestValidationError)
    def refuse(_: object, error: RequestValidationError) -> JSONResponse:
        """What is wrong and where, without what was given: that may be no text at all."""
        told = [{"loc": each["loc"], "msg": each["msg"]} for each in error.errors()]
        return JSONResponse({"detail": told}, status_code=422)

    app.mount("/", StaticFiles(directory=_PAGE_FOLDER, html=True))
    return app


def _listening(config: ChatConfig) -> socket.socket:
    try:
        (family, *_), *_ = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)
        return socket.create_server((config.host, config.port), family=family)
    except OSError as error:  # also a name that is none
        raise UserError(
            f"host={config.host} port={config.port} cannot be listened on "
            f"({error.strerror}); take another port=, or port=0 for one that is free"
        ) from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
