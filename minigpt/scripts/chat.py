"""`python scripts/chat.py RUN`: talk to a trained model in the terminal (the same as `minigpt chat RUN`)."""

import sys

from jsonargparse import ArgumentParser

from minigpt.generation.chat import ChatOptions, chat


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_class_arguments(ChatOptions, as_positional=True)
    options = parser.parse_args()
    try:
        chat(ChatOptions(**options.as_dict()))
    except (ValueError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
