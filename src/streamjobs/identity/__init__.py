"""Who asks: principals, and the credentials that prove them. Nothing here knows HTTP or Redis."""
