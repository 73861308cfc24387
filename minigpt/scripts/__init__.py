if "." not in __name__:  # imported as the guide does, from within minigpt/
    from minigpt._seed_alias import alias

    alias(__name__)
