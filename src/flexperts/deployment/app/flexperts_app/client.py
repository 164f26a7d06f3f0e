"""The ClientApp, from the flexperts that is installed where the SuperNode runs."""

from flexperts.deployment.relay import app

__all__ = ["app"]
