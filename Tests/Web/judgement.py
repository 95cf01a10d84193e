"""The list of checks, each with a sentence. A check raises `Wrong` with what it saw instead."""
CHECKS = []


class Wrong(Exception):
    pass


def check(group, sentence):
    def register(function):
        CHECKS.append((group, sentence, function))
        return function

    return register


def demand(condition, words):
    if not condition:
        raise Wrong(words)
