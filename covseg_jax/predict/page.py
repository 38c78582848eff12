"""What the program's HTML pages have in common: each is one file that opens without a network."""

import pathlib

import jinja2


def make_environment(*folders: pathlib.Path) -> jinja2.Environment:
    """The templates of these folders, and those that all pages share: `page.html.j2`, which others
    extend, and `viewer.html.j2`."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, pathlib.Path(__file__).parent]),
        # Not select_autoescape: it goes by the ending, and .j2 is not one that it escapes.
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
