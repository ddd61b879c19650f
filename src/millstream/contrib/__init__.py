"""millstream where its users already are: one module a framework, each an extra of its own.

A module stands on the public face of millstream alone, as any program of a user does, and is
imported by whoever names it.
"""


def require(
    package: str,
    extra: str,
    least: tuple[int, ...],
    below: tuple[int, ...],
    module: str | None = None,
) -> None:
    """Raise ImportError where a framework is not there, too old or too new, or cannot be imported.

    Args:
        package: the name of the distribution.
        extra: of millstream, that installs it.
        least: versions from this one on,
        below: and before this one.
        module: what is imported of it; default: the package of that name.
    """
    import re
    from importlib import import_module
    from importlib.metadata import PackageNotFoundError, version

    wanted = f"{package} {'.'.join(map(str, least))} or later, before {'.'.join(map(str, below))}"
    advice = f"pip install 'millstream[{extra}]'"
    try:
        found = version(package)
    except PackageNotFoundError:
        text = f"millstream.contrib: {wanted} is needed and {package} is not installed; {advice}"
        raise ImportError(text) from None
    numbers = tuple(map(int, re.findall(r"\d+", found)[: max(len(least), len(below))]))
    if not least <= numbers < below:
        raise ImportError(f"millstream.contrib: {wanted} is needed, found {found}; {advice}")
    try:
        import_module(module or package.replace("-", "_"))
    except Exception as error:  # a broken package raises what it likes
        text = f"millstream.contrib: {package} {found} cannot be imported ({error}); {advice}"
        raise ImportError(text) from error
