"""A ClientApp out of one function: every request that a client is asked goes to it, with its kind."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

Reply = Callable[[str, Message, Context], Message]


def client_app(reply: Reply) -> ClientApp:
    """Return a ClientApp whose ``reply`` is called with the kind, the message and the context of every request."""
    app = ClientApp()
    app.query("join")(partial(reply, "query.join"))
    app.query("initial")(partial(reply, "query.initial"))
    app.train()(partial(reply, "train"))
    app.evaluate()(partial(reply, "evaluate"))
    return app
