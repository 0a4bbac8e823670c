"""Which Octavo this is."""


def version() -> str:
    """The installed distribution's version; "unknown" where Octavo runs without having been installed."""
    import importlib.metadata

    try:
        return importlib.metadata.version("octavo")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
