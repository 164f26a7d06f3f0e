"""The ServerApp, from the flexperts that is installed where the SuperLink runs."""

from flexperts.deployment.server_app import app

__all__ = ["app"]
