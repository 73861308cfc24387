"""`python scripts/web_demo.py RUN`: the chat page in a browser (the same as `minigpt serve RUN`)."""

import sys

from jsonargparse import ArgumentParser

from minigpt.serve.command import ServeOptions, serve


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_class_arguments(ServeOptions, as_positional=True)
    options = parser.parse_args()
    try:
        serve(ServeOptions(**options.as_dict()))
    except (ValueError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
