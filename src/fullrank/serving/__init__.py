"""A bundle over HTTP."""

from fullrank.extras import needs

with needs("serve", "serving"):
    from fullrank.serving.app import ServingConfig, create_app

__all__ = ["ServingConfig", "create_app"]
