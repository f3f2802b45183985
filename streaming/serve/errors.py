"""What the server refuses: a code for programs, a sentence for people."""

from http import HTTPStatus

CODES = {
    "bad_request": (HTTPStatus.BAD_REQUEST, "the request cannot be understood"),
    "bad_message": (HTTPStatus.BAD_REQUEST, "a message of a socket cannot be understood"),
    "bad_audio": (HTTPStatus.BAD_REQUEST, "sound cannot be used: not finite, cut in mid-sample, no known format"),
    "bad_portrait": (HTTPStatus.BAD_REQUEST, "the portrait is no picture, or too small"),
    "unauthorised": (HTTPStatus.UNAUTHORIZED, "token, key or ticket is missing, wrong, used or too old"),
    "forbidden_origin": (HTTPStatus.FORBIDDEN, "a page of another site asks"),
    "not_found": (HTTPStatus.NOT_FOUND, "there is no such thing, or no longer"),
    "busy": (HTTPStatus.CONFLICT, "another client speaks in this session"),
    "no_snapshots": (HTTPStatus.CONFLICT, "the server was started without --snapshots"),
    "too_large": (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "more bytes or pixels than the limit"),
    "too_many": (HTTPStatus.TOO_MANY_REQUESTS, "more requests than the limit; wait"),
    "limit_viewers": (HTTPStatus.TOO_MANY_REQUESTS, "the session has as many viewers as it may have"),
    "limit_sessions": (HTTPStatus.SERVICE_UNAVAILABLE, "as many sessions as may be are open; try later"),
    "draining": (HTTPStatus.SERVICE_UNAVAILABLE, "the server is about to end"),
    "lost": (HTTPStatus.SERVICE_UNAVAILABLE, "the replica of the session has died; resume the session"),
    "failed": (HTTPStatus.INTERNAL_SERVER_ERROR, "generation has failed"),
    "internal": (HTTPStatus.INTERNAL_SERVER_ERROR, "a fault of the server"),
}


class RefusedError(Exception):
    """Something that a client asked for is refused. `code` is one of `CODES`, `str(refusal)` one line."""

    def __init__(self, code: str, message: str | None = None) -> None:
        """Without a message, the code's own sentence is taken."""
        self.code = code
        self.status = CODES[code][0]
        super().__init__(message or CODES[code][1])
