from pretended import folder, pretended  # noqa: F401 - fixtures
